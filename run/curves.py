"""The curves of runs: what train.py draws into curves.png, and plot.py and compare.py of several.

Up to TOGETHER curves, one per method and variant, share their panels. More are compared by their
last evaluation: sorted, or against the option in which they differ.

matplotlib and pandas are imported where they are used: --help does not wait for them.
"""

import math
import textwrap

from run.runs import read_runs
from run.style import looks_of, method_name, new_figure, save, style
from run.table import CURVE, average, differing, mean_interval, per_seed, tabulate

TOGETHER = 7  # curves in one panel
PANELS = {  # metric: title, unit; another metric is its own title
    "accuracy": ("Accuracy", "share correct"),
    "entropy": ("Entropy", "nats per token"),
    "length": ("Completion length", "tokens"),
    "clip_frac": ("Clip fraction", "share of tokens"),
    "truncated": ("Cut off at the limit", "share of completions"),
    "kl": ("KL(old ‖ current)", "nats per token"),
    "zero_std": ("Groups of equal rewards", "share of groups"),
}
SMOOTH = 5  # steps; see `average`
ENDS_FROM = 4  # curves; from here on a panel shows the ends of the runs
LENIENT_FROM = 0.01  # of the accuracy above the strict one
CUT_OFF_FROM = 0.05  # of the completions at some step
LOOK = {"axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False}  # of matplotlib
LOOK |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5}


def plot_runs(runs, out, metrics=(), smooth=SMOOTH):
    """Draw runs into the file `out`.

    runs: folders, .csv files, or what `read_runs` returns; those that differ in the seed alone are
    averaged. metrics: keys of metrics.jsonl, a panel each; none: those that say most. smooth: steps
    of a training metric that are averaged. Raises ValueError for what is no run, and for a metric
    that none of them has.
    """
    import matplotlib

    found = [run for run in runs if isinstance(run, dict)] or read_runs(runs)
    table = tabulate(found)
    looks = looks_of(table)
    with matplotlib.rc_context(LOOK):
        if metrics or len(looks) <= TOGETHER:
            figure = curves(table, looks, metrics, smooth)
        elif table["value"].notna().all():
            figure = ends_against_option(table, differing(found)[0])
        else:
            figure = sorted_ends(table, looks)
        save(figure, out)


# Curves over the steps


def curves(table, looks, metrics, smooth):
    """A figure in which all curves share their panels, one per metric."""
    names = known_metrics(table, metrics) or usual_metrics(table)
    rows = grid(names, 3)
    if not metrics:  # the accuracy above the others, and larger
        ends = ["accuracy", "end"] if len(looks) >= ENDS_FROM else []
        rows = [["accuracy", *ends], *grid(names[1:], 4)]
    wide = 9.5 if len(rows[-1]) > 3 else 8
    lines = max((name.count("\n") for name, *_ in looks.values()), default=0)
    figure = new_figure(wide, 1.8 + 2.1 * len(rows) + 0.2 * lines)
    heights = [1.0 if metrics else 1.4, *[1] * (len(rows) - 1)]
    axes = figure.subplot_mosaic([[[row]] for row in rows], height_ratios=heights)
    for name in names:
        title, unit = PANELS.get(name, (name, ""))
        axes[name].set(title=title, ylabel=unit, xlabel="training step")
        for z, (curve, look) in enumerate(looks.items(), 3):
            draw = draw_accuracy if name == "accuracy" else draw_line
            draw(axes[name], of_curve(table, curve), name, look, smooth, z)
        finish_panel(axes[name], name)
    if "end" in axes:
        draw_ends(axes["end"], per_seed(table)["final"], looks)
        axes["end"].set_title("At the end: each seed,\nthe mean and its 95% interval", fontsize=10)
    add_legend(figure, looks.values())
    figure.supxlabel(note(table, names, smooth), fontsize=8)
    return figure


def grid(names, most):
    """Rows of a mosaic, with equally many names in each, at most `most`; "." is an empty place."""
    wide = math.ceil(len(names) / math.ceil(len(names) / most))
    padded = [*names, *["."] * (-len(names) % wide)]
    return [padded[i : i + wide] for i in range(0, len(padded), wide)]


def known_metrics(table, metrics):
    """The metrics as a list. Raises ValueError for one that no row has."""
    values = table.drop(columns="value").select_dtypes(float)
    known = values.dropna(axis=1, how="all").columns
    of_eval = values[table["phase"] == "eval"].dropna(axis=1, how="all").columns
    for name in metrics:
        if name not in known and name.removeprefix("eval/") not in of_eval:
            raise ValueError(f"no run has a metric {name!r}; there are {', '.join(known)}")
    return list(metrics)


def usual_metrics(table):
    """Accuracy, entropy, length; clips and cuts, if any; the parts of a reward that has some."""
    train = table[table["phase"] == "train"]
    names = ["accuracy", "entropy", "length"]
    for name, least in (("clip_frac", 1e-9), ("truncated", CUT_OFF_FROM)):
        if (train[name] >= least).any():
            names.append(name)
    parts = [name for name in table if name.startswith("reward/")]
    return [*names, *["reward"][: len(parts)], *parts]


def of_curve(table, curve):
    """The rows of one curve, (algo, variant)."""
    algo, variant = curve
    return table[(table["algo"] == algo) & (table["variant"] == variant)]


def draw_line(ax, table, name, look, smooth, z, width=1.4, band=0.13):
    """Draw one metric of a curve: the mean over its seeds, and the band from lowest to highest.

    Of evaluations if the name says so, or if no training step has it. Where a seed ends, the rest
    is thinner.
    """
    _, colour, dashes, marker = look
    metric, phase = name.removeprefix("eval/"), "train"
    if metric != name or not table.loc[table["phase"] == "train", metric].notna().any():
        phase, smooth = "eval", 1
    found = average(table, phase, metric, smooth)
    if smooth > 1:
        raw = average(table, phase, metric)
        ax.plot(raw["step"], raw["mean"], color=colour, lw=0.6, alpha=0.3, zorder=2)
    for part, is_fewer in stretches(found):
        how = {"color": colour, "ls": dashes, "lw": width / 2 if is_fewer else width}
        how["marker"] = marker if phase == "eval" else "." if len(part) == 1 else None
        ax.plot(part["step"], part["mean"], ms=4, zorder=z, **how)
        ax.fill_between(part["step"], part["min"], part["max"], color=colour, alpha=band, lw=0)


def stretches(found):
    """[(part of what `average` returns, whether it has fewer seeds than others), ...]: the steps
    over which equally many seeds have a value."""
    changes = found["count"].diff().fillna(0) != 0
    parts = [part for _, part in found.groupby(changes.cumsum())]
    return [(part, part["count"].iloc[0] < found["count"].max()) for part in parts]


def draw_accuracy(ax, table, name, look, smooth, z):
    """Draw greedy accuracy on held-out problems, with bars from lowest to highest seed; thin, that
    of the training rollouts; dotted, the lenient one if it is another.

    Where there is only one seed, the bar is its own interval.
    """
    _, colour, dashes, marker = look
    draw_line(ax, table, name, ("", colour, "-", None), smooth, z, width=0.8, band=0)
    if is_lenient_shown(table):
        lenient = average(table, "eval", "accuracy_lenient")
        ax.plot(lenient["step"], lenient["mean"], color=colour, ls=":", lw=1.2, marker="_", ms=6)
    for part, is_fewer in stretches(evaluations(table)):
        bars = (part["mean"] - part["min"]).abs(), (part["max"] - part["mean"]).abs()
        how = {"color": colour, "ls": dashes, "lw": 0.7 if is_fewer else 1.4, "zorder": z}
        how["mfc"] = "white" if is_fewer else colour
        beside = part["step"] + (z - 3) * table["step"].max() / 250  # equal ones do not hide
        ax.errorbar(beside, part["mean"], bars, elinewidth=0.9, marker=marker, ms=4, **how)


def evaluations(table):
    """`average` of the accuracy; where one seed has a value, min and max are its interval."""
    found = average(table, "eval", "accuracy")
    for end, bound in (("min", "ci_lo"), ("max", "ci_hi")):
        interval = average(table, "eval", bound).set_index("step")["mean"]
        of_one = found["step"].map(interval).fillna(found["mean"])
        found[end] = found[end].where(found["count"] > 1, of_one)
    return found


def is_lenient_shown(table):
    """Whether the lenient accuracy is above the strict one."""
    return bool((table["accuracy_lenient"] - table["accuracy"] > LENIENT_FROM).any())


def draw_ends(ax, column, looks):
    """Draw a column of `per_seed`: of each curve its seeds, the mean and its 95% t-interval.

    The highest mean is at the top.
    """
    rows = []
    for curve, look in looks.items():
        values = column.xs(curve, level=CURVE).dropna().tolist()
        if values:
            rows.append((*mean_interval(values), values, look))
    rows.sort(key=lambda row: row[0])
    for y, (mean, half, values, (_, colour, _, marker)) in enumerate(rows):
        ax.errorbar(mean, y, xerr=half, color=colour, marker=marker, ms=5, capsize=2)
        ax.plot(values, [y - 0.25] * len(values), ".", color=colour, alpha=0.5, ms=4)
    names = [name for *_, (name, *_) in rows]
    if len(names) > TOGETHER:
        names = [name.replace("\n", ", ") for name in names]
    ax.set_yticks(range(len(names)), names, fontsize=8.5)


def finish_panel(ax, name):
    """Set the limits and scales of a panel, after its curves are drawn."""
    if name == "accuracy":
        top = next((top for top in (0.1, 0.25, 0.5) if ax.dataLim.y1 <= top), 1)
        ax.set_ylim(-0.02 * top, 1.02 * top)
    if name == "clip_frac":
        # It is 0 with some methods, 0.001 or 0.3 with others: logarithmic, and linear below 0.001.
        ticks = (0, 0.001, 0.01, 0.1, 1)
        ax.set_yscale("symlog", linthresh=1e-3, linscale=0.5)
        ax.set(ylim=(-1e-4, 1), yticks=ticks, yticklabels=map(str, ticks))
    ax.xaxis.get_major_locator().set_params(integer=True)


def add_legend(figure, looks):
    """The names of the curves, above the panels."""
    from matplotlib.lines import Line2D

    lines = []
    for name, colour, dashes, marker in looks:
        how = {"color": colour, "ls": dashes, "marker": marker, "lw": 1.4, "ms": 4}
        lines.append(Line2D([], [], label=name, **how))
    how = {"handlelength": 4.6, "columnspacing": 1.1, "fontsize": 9, "ncols": min(4, len(lines))}
    figure.legend(handles=lines, loc="outside upper center", **how)


def note(table, names, smooth):
    """What the figure says below its panels: what is drawn, and of how many seeds."""
    sentences = []
    if "accuracy" in names:
        lenient = " (dotted: graded leniently)" if is_lenient_shown(table) else ""
        sentences.append(f"Accuracy: markers are greedy, on held-out problems{lenient};")
        sentences.append("lines without markers are the sampled training rollouts.")
        if table["clip_frac"].max() == 0:
            sentences.append("No token was clipped.")
    if smooth > 1:
        sentences.append(f"Lines are means of {smooth} steps; faint: each step.")
    counts, uneven = [], []
    for (algo, variant), part in table.groupby(CURVE, observed=True):
        found = average(part, "train", "accuracy")
        counts += [*found["count"], *average(part, "eval", "accuracy")["count"]]
        ends = [f"{p['count'].iloc[0]} to step {p['step'].iloc[-1]}" for p, _ in stretches(found)]
        if len(ends) > 1:
            uneven.append(f"{method_name(algo, variant)}: {', '.join(ends)}")
    if max(counts, default=0) > 1:
        several = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
        sentences.append(f"Means of {several} seeds; bands and bars: lowest to highest seed.")
    if min(counts, default=0) == 1 and "accuracy" in names:
        sentences.append("One seed: bars are its 95% Wilson interval.")
    if uneven:
        sentences.append(f"Seeds (thinner where they are fewer): {'; '.join(uneven)}.")
    return "\n".join(textwrap.wrap(" ".join(sentences), 125))


# Many methods


def ends_against_option(table, option):
    """A figure of the last evaluation of each method against a numeric option."""
    figure = new_figure(8, 4.4)
    ax = figure.subplots()
    value_of = table.groupby("variant", observed=True)["value"].first()
    values = sorted(value_of)
    found = per_seed(table).reset_index()
    found["place"] = [values.index(value_of[variant]) for variant in found["variant"]]
    algos = list(found.groupby("algo", observed=True))
    for i, (algo, part) in enumerate(algos):
        _, colour, _, marker = style(algo)
        ends = part.groupby("place")["final"].agg(["mean", "min", "max"])
        x = ends.index + 0.07 * (i - (len(algos) - 1) / 2)  # beside one another
        bars = ends["mean"] - ends["min"], ends["max"] - ends["mean"]
        ax.errorbar(x, ends["mean"], bars, color=colour, marker=marker, ms=5, ls="none")
        broken = part.groupby("place")["is_broken"].any()
        ax.plot(x[broken], ends["mean"][broken], "x", color="black", ms=9)
    ax.set(title="Greedy accuracy at the last evaluation", xlabel=option)
    ax.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    add_legend(figure, [style(algo) for algo, _ in algos])
    text = "Markers: means over the seeds; bars: lowest to highest seed."
    if found["is_broken"].any():
        text += "\n×: with some seed, the accuracy of the last five rollouts is below half of that"
        text += " of the best five in a row."
    figure.supxlabel(text, fontsize=8)
    return figure


def sorted_ends(table, looks):
    """A figure of the last evaluations, sorted; as differences to GRPO's where it was run."""
    found = per_seed(table)
    key = "less" if found["less"].notna().any() else "final"
    figure = new_figure(8, 1.4 + 0.24 * len(looks))
    ax = figure.subplots()
    draw_ends(ax, found[key], looks)
    title = "Greedy accuracy at the last evaluation"
    text = "Means over the seeds with their 95% t-intervals; dots: each seed."
    if key == "less":
        ax.axvline(0, color="0.4", lw=0.9)
        title += ", less GRPO's at the same seed"
        text += " An interval that contains 0 does not\ntell the method from GRPO; of so many"
        text += " intervals, some miss by chance."
    ax.set_title(title)
    figure.supxlabel(text, fontsize=8)
    return figure
