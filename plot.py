"""Figures of runs: learning curves, entropy against accuracy, and the credit picture.

`python plot.py --help`. Runs are read from folders that train.py wrote, or from a .csv of many
runs, the compact form that compare.py writes and docs/ keeps. train.py calls `plot_runs` on its own
folder while it trains.

matplotlib and torch are imported where they are used: --help and a wrong command line are answered
without them. pyplot is not used: within a trainer there is neither a display nor a global state.
"""

import argparse
import math
import os
import re
import textwrap
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

from run.commandline import Parser, output_file, quit_on_interrupt, run_main, writing

if __name__ == "__main__":
    quit_on_interrupt()

import numpy as np

from run.names import algorithm_names
from run.runs import ORDER, average, finite, group, read_runs, rows_of
from run.samples import read_groups
from trainer.methods import ALGORITHMS, is_file, label

# The seven have the colours of Okabe and Ito, without their yellow, which is lost on white, and
# with a violet in place of their second blue. The
# others have the colours that are furthest (in CIELAB) from these and from one another.
# Dashes and markers distinguish the methods in grey.
DASHED, DOTTED = (0, (6, 1)), (0, (1, 2))
STYLES = {  # algo: name, colour, dashes, marker
    "grpo": ("GRPO", "#000000", (0, (5, 2)), "s"),
    "dapo": ("DAPO", "#E69F00", (0, (5, 1.5, 1, 1.5)), "^"),
    "gspo": ("GSPO", "#0072B2", (0, (9, 2)), "D"),
    "tepo": ("TEPO", "#D55E00", "-", "o"),
    "gtpo": ("GTPO", "#009E73", (0, (1, 1)), "v"),
    "grpo_s": ("GRPO-S", "#4411BB", (0, (5, 1.5, 1, 1.5, 1, 1.5)), "P"),
    "trgrpo": ("TR-GRPO", "#CC79A7", (0, (2.5, 1.5)), "X"),
    "clip_cov": ("Clip-Cov", "#0000FF", "-", "<"),
    "kl_cov": ("KL-Cov", "#00CC00", "-", ">"),
    "ce_gppo": ("CE-GPPO", "#FF00DD", "-", "p"),
    "aspo": ("ASPO", "#FF0066", "-", "*"),
    "dppo": ("DPPO", "#0066FF", "-", "h"),
    "reweight": ("Reweighting", "#667700", "-", "d"),
    "raft": ("RAFT", "#771188", "-", "8"),
    "ha_dw": ("HA-DW", "#882222", "-", "H"),
    "ktae": ("KTAE", "#CC88FF", DASHED, "<"),
    "dhpo": ("DHPO", "#EE9977", DASHED, ">"),
    "dr_grpo": ("Dr. GRPO", "#AA44FF", DASHED, "p"),
    "rloo": ("RLOO", "#FF0022", DASHED, "*"),
    "cispo": ("CISPO", "#CC1188", DASHED, "h"),
    "sapo": ("SAPO", "#88BB00", DASHED, "d"),
    "gmpo": ("GMPO", "#663355", DASHED, "8"),
    "luspo": ("LUSPO", "#005555", DOTTED, "<"),
    "vespo": ("VESPO", "#888899", DOTTED, ">"),
    "maxrl": ("MaxRL", "#004411", DOTTED, "p"),
    "opo": ("OPO", "#55BBEE", DOTTED, "*"),
    "dro": ("DRO", "#667755", DOTTED, "h"),
    "topr": ("TOPR", "#FF6655", DOTTED, "d"),
}
# Of the user's methods, in the order in which they are first drawn; chosen in the same way.
OWN_LOOKS = (
    ("#775522", (0, (3, 1)), "o"),
    ("#444499", (0, (3, 1, 1, 1)), "s"),
    ("#22bb55", (0, (7, 1)), "^"),
    ("#bbbb77", (0, (3, 1)), "D"),
    ("#55bbbb", (0, (3, 1, 1, 1)), "v"),
    ("#7799ff", (0, (7, 1)), "P"),
)
own = {}  # {label: look}
TOGETHER = 7  # methods in one panel; more are drawn as small multiples
BEHIND = {"grpo": "#777777", "dapo": "#B0B0B0"}  # in grey behind every other method
PANELS = (  # metric, title, unit
    ("accuracy", "Accuracy", "share correct"),
    ("entropy", "Entropy", "nats per token"),
    ("length", "Completion length", "tokens"),
    ("clip_frac", "Clip fraction", "share of tokens"),
)
TRUNCATED = ("truncated", "Cut off at the limit", "share of completions")  # if any run has some
JOINED_FROM = 4  # evaluations; fewer are points without a line
ENDS_FROM = 4  # methods; from here on a panel shows the ends of the runs
LENIENT_FROM = 0.01  # of the accuracy above the strict one
SHOWN_FROM = 0.05  # of its completions at some step
MAX_BYTES = 300_000  # of a picture that is to be committed


# Learning curves


def style(algo):
    """Name, colour, dashes and marker of an algorithm.

    Of ours the same in every figure, of the user's the same in this process. A variant in `overlay`
    is (name, number), and has the look of one of the seven.
    """
    if isinstance(algo, tuple):
        name, number = algo
        return name, *list(STYLES.values())[number][1:]
    if algo in STYLES:
        return STYLES[algo]
    return algo, *own.setdefault(algo, OWN_LOOKS[len(own) % len(OWN_LOOKS)])


def method_name(algo, variant):
    """The name of a method in a table or a note, with its variant if there is one."""
    name = style(algo)[0]
    return f"{name}, {variant}" if variant else name


def new_figure(width, height, layout="constrained"):
    """An empty figure; width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def save(figure, out):
    """Write the figure under a temporary name, then rename it: no reader sees half a picture.

    A PNG that is too large to commit gets a palette of 256 colours, a third of the size, or of 96.
    """
    out = Path(out)
    part = out.with_name(f".{out.stem}.part{out.suffix or '.png'}")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(part, dpi=160)
            if part.suffix == ".png" and part.stat().st_size > MAX_BYTES:
                from PIL import Image  # a dependency of matplotlib

                image = Image.open(part).convert("RGB")
                look = {"method": Image.Quantize.MAXCOVERAGE, "dither": Image.Dither.NONE}
                for colours in (256, 96):
                    image.quantize(colours, **look).save(part, optimize=True)
                    if part.stat().st_size <= MAX_BYTES:
                        break
            os.replace(part, out)
        finally:
            part.unlink(missing_ok=True)


def stretches(count):
    """The parts of a curve, as slices, over which equally many seeds have a value. count [N]"""
    ends = np.flatnonzero(np.diff(count)) + 1
    bounds = [0, *ends.tolist(), len(count)]
    return [slice(start, end) for start, end in pairwise(bounds) if start < end]


def label_seeds(ax, step, value, seeds, colour):
    """Write at the first point of a stretch how many seeds it has."""
    look = {"fontsize": 7, "color": colour, "textcoords": "offset points", "xytext": (3, 6)}
    look["bbox"] = {"fc": "white", "alpha": 0.75, "lw": 0, "pad": 0.5}
    ax.annotate(f"n = {seeds}", (step, value), annotation_clip=False, zorder=20, **look)


def draw_metric(ax, metric, algos):
    """Draw one metric of {algo: runs} into one panel: means over seeds, with their spread.

    Where a seed ends, the line breaks. The rest of it is thinner and says how many seeds it has.
    """
    for z, (algo, runs) in enumerate(algos.items(), 3):
        if metric == "accuracy":
            draw_sampled_accuracy(ax, algo, runs)
            draw_lenient(ax, algo, runs)
            draw_evaluations(ax, algo, runs, z)
            continue
        _, colour, dashes, _ = style(algo)
        steps, mean, low, high, count = average(runs, "train", metric)
        for part in stretches(count):
            x, y = steps[part], mean[part]
            fewer = count[part][0] < count.max()
            width = 0.7 if fewer else 1.4
            ax.plot(x, y, color=colour, ls=dashes, lw=width, marker=point(x), zorder=z)
            ax.fill_between(x, low[part], high[part], color=colour, alpha=0.13, lw=0)
            if fewer:
                label_seeds(ax, x[0], y[0], count[part][0], colour)


def few_evaluations(runs):
    """Whether so few evaluations say nothing about the way from one to the next."""
    return len(average(runs, "eval", "accuracy")[0]) < JOINED_FROM


def draw_sampled_accuracy(ax, algo, runs):
    """Draw the accuracy of the training rollouts, the mean over the seeds, as a thin line.

    As a bold one if there are few evaluations: then it is the curve.
    """
    _, colour, dashes, _ = style(algo)
    look = {"lw": 0.6, "alpha": 0.5}
    if few_evaluations(runs):
        look = {"lw": 1.4, "ls": dashes}
    steps, mean, _, _, count = average(runs, "train", "accuracy")
    for part in stretches(count):
        x, y = steps[part], mean[part]
        ax.plot(x, y, color=colour, marker=point(x), **look)


def is_lenient_shown(runs):
    """Whether the lenient accuracy is known and is not the strict one."""
    lenient, strict = (average(runs, "eval", f"accuracy{kind}")[1] for kind in ("_lenient", ""))
    return len(lenient) == len(strict) and bool(np.any(lenient - strict > LENIENT_FROM))


def draw_lenient(ax, algo, runs):
    """Draw the lenient accuracy as a dotted line, if it is to be shown."""
    if is_lenient_shown(runs):
        steps, lenient, *_ = average(runs, "eval", "accuracy_lenient")
        ax.plot(steps, lenient, color=style(algo)[1], ls=":", lw=1.2, marker="_", ms=6)


def point(x):
    """The marker of a line: a line of one point does not show without one."""
    return "." if len(x) == 1 else None


def draw_evaluations(ax, algo, runs, z):
    """Draw greedy accuracy on held-out problems, with bars from the lowest to the highest seed.

    Where there is only one seed, the bar is its own interval. Markers are hollow for fewer seeds.
    """
    _, colour, dashes, marker = style(algo)
    steps, mean, low, high, count = average(runs, "eval", "accuracy")
    low = np.where(count == 1, own_bound(runs, "ci_lo", steps, mean), low)
    high = np.where(count == 1, own_bound(runs, "ci_hi", steps, mean), high)
    bars = np.abs([mean - low, high - mean])  # [2, N]
    look = {"color": colour, "ls": dashes, "marker": marker, "ms": 4, "elinewidth": 0.9}
    if few_evaluations(runs):
        look["ls"] = "none"
    for part in stretches(count):
        x, y = steps[part], mean[part]
        fewer = count[part][0] < count.max()
        look["lw"] = 0.7 if fewer else 1.4
        look["mfc"] = "white" if fewer else colour
        ax.errorbar(x, y, bars[:, part], zorder=z, **look)
        if fewer:
            label_seeds(ax, x[0], y[0], count[part][0], colour)


def own_bound(runs, name, steps, mean):
    """A bound of the interval at each step, or the mean where no run has one. [N]"""
    at, bound, *_ = average(runs, "eval", name)
    known = dict(zip(at, bound, strict=True))
    return [known.get(step, value) for step, value in zip(steps, mean, strict=True)]


def seeds_note(groups):
    """What the figure says about its seeds, in sentences.

    What is averaged, what the bars are, and which curves have fewer seeds where.
    groups: {variant: {algo: runs}}.
    """
    most, least, uneven = [], [], []
    for variant, algos in groups.items():
        for algo, runs in algos.items():
            steps, *_, count = average(runs, "train", "accuracy")
            held_out, *_, markers = average(runs, "eval", "accuracy")
            if not len(count):  # no step of training yet, or an older file
                steps, count = held_out, markers
            if not len(count):
                continue
            most.append(count.max())
            least.append(min([*count, *markers]))
            ends = [f"{count[part][0]} to step {steps[part][-1]}" for part in stretches(count)]
            if len(ends) > 1:
                uneven.append(f"{method_name(algo, variant)}: {', '.join(ends)}")
    sentences = []
    if max(most, default=0) > 1:
        several = " to ".join(str(n) for n in sorted({min(most), max(most)}))
        sentences.append(f"Means of {several} seeds; bands and bars: lowest to highest seed.")
    if min(least, default=0) == 1:
        sentences.append("One seed: bars are its 95% Wilson interval.")
    lines = [" ".join(sentences)]
    if uneven:
        lines += textwrap.wrap(f"Seeds (n where they are fewer): {'; '.join(uneven)}.", 130)
    return "\n".join(lines)


def plot_runs(runs, out):
    """Draw accuracy, entropy [nats], length [tokens] and clip fraction into the file `out`.

    And the share of truncated completions, if there are many.

    runs: folders, .csv files, or what `read_runs` returns. Runs that differ in the seed alone are
    averaged, at each step over those that have a value; variants of one algorithm stand side by
    side. More than TOGETHER methods make small multiples. A run without lines yet makes empty
    panels. Raises ValueError for what is no run.
    """
    found = []
    for item in runs:
        found += [item] if isinstance(item, dict) else read_runs([item])
    groups = group(found)
    used = dict.fromkeys(algo for algos in groups.values() for algo in algos)
    figure = curves(groups, used) if len(used) <= TOGETHER else small_multiples(groups)
    is_shown = any(is_lenient_shown(runs) for algos in groups.values() for runs in algos.values())
    lenient = " (dotted: graded leniently)" if is_shown else ""
    accuracy = (
        f"Accuracy: markers are greedy, on held-out problems{lenient}; "
        "lines without markers are the sampled training rollouts."
    )
    figure.supxlabel(f"{accuracy}\n{seeds_note(groups)}{clip_note(groups)}", fontsize=8)
    save(figure, out)


def curves(groups, used):
    """A figure of {variant: {algo: runs}} in which the methods of `used` share their panels."""
    if len(used) == 1 < len(groups) <= TOGETHER:
        groups = overlay(groups)
        used = groups[""]
    panels = panels_of(groups)
    if len(groups) > 1:
        figure, columns = variant_panels(groups, panels)
    else:
        figure, columns = large_panels(panels, *groups.values())
    for algos, axes in zip(groups.values(), columns, strict=True):
        for (metric, _, _), ax in zip(panels, axes, strict=True):
            draw_metric(ax, metric, algos)
            finish_panel(ax, metric)
    add_legend(figure, used)
    return figure


def overlay(groups):
    """The variants of one method as curves of the same panels: {"": {(name, number): runs}}."""
    curves = {}
    for variant, algos in groups.items():
        for algo, runs in algos.items():
            first = list(STYLES).index(algo) if algo in ORDER[:TOGETHER] else 0
            number = (first + len(curves)) % TOGETHER
            curves[f"{style(algo)[0]}\n{short(variant)}", number] = runs
    return {"": curves}


def short(variant, most=24):
    """A variant's settings for a title: long values are cut, and each goes on a line of its own."""
    settings = []
    for setting in variant.split(", "):
        settings.append(setting if len(setting) <= most else setting[: most - 1] + "…")
    one_line = ", ".join(settings)
    return one_line if len(one_line) <= most else "\n".join(settings)


def panels_of(groups):
    """PANELS, without a clip fraction that is always 0; TRUNCATED if the limit cuts off many."""
    panels = list(PANELS)
    if not reaches(groups, "clip_frac", 1e-9):
        panels.remove(PANELS[-1])
    if reaches(groups, "truncated", SHOWN_FROM):
        panels.append(TRUNCATED)
    return panels


def clip_note(groups):
    """A sentence in place of the panel that `panels_of` leaves out; empty if nothing is known."""
    if reaches(groups, "clip_frac", 0) and not reaches(groups, "clip_frac", 1e-9):
        return " No token was clipped."
    return ""


def reaches(groups, metric, value):
    """Whether a metric of training reaches this value anywhere, in the mean over the seeds."""
    for algos in groups.values():
        for runs in algos.values():
            _, mean, *_ = average(runs, "train", metric)
            if np.any(mean >= value):
                return True
    return False


def large_panels(panels, algos):
    """A figure with accuracy over the other panels, smaller, and its one column of axes.

    Beside the accuracy of several methods, a panel for the end of the runs.
    """
    metrics = [metric for metric, _, _ in panels]
    lower = len(panels) - 1
    figure = new_figure(8 if lower <= 3 else 9.5, 6.2)
    top, wide = ["accuracy"] * 3 * lower, lower
    if len(algos) >= ENDS_FROM:
        top[-wide:] = ["end"] * wide
    bottom = [metric for metric in metrics[1:] for _ in range(3)]
    axes = figure.subplot_mosaic([top, bottom], height_ratios=(1.4, 1))
    for metric, title, unit in panels:
        axes[metric].set(title=title, ylabel=unit, xlabel="training step")
    if "end" in axes:
        draw_end(axes["end"], algos)
    return figure, [[axes[metric] for metric in metrics]]


def draw_end(ax, algos):
    """Draw the last evaluation of each method: the mean over the seeds, and each seed."""
    for x, (algo, runs) in enumerate(algos.items()):
        _, colour, _, marker = style(algo)
        ends = [average([run], "eval", "accuracy")[1][-1:] for run in runs]
        ends = np.concatenate(ends)
        if not len(ends):
            continue
        ax.plot([x - 0.3, x + 0.3], [ends.mean()] * 2, color=colour, lw=1.8)
        beside = x + 0.12 * (np.arange(len(ends)) - (len(ends) - 1) / 2)
        ax.plot(beside, ends, color=colour, marker=marker, ms=4, ls="none", alpha=0.6)
    ax.set_xticks(range(len(algos)), [style(algo)[0] for algo in algos], rotation=60, fontsize=8)
    several = any(len(runs) > 1 for runs in algos.values())
    ax.set_title("Accuracy at the end" + "\n(each seed, and the mean)" * several, fontsize=10)
    ax.margins(y=0.15)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def variant_panels(variants, panels):
    """A figure with one column per variant and one row per metric, and its columns of axes."""
    figure = new_figure(max(8, 2.7 * len(variants)), 2.25 * len(panels))
    axes = figure.subplots(len(panels), len(variants), sharex=True, sharey="row")
    for ax, variant in zip(axes[0], variants, strict=True):
        ax.set_title(short(variant), fontsize=10)
    for ax, (_, title, unit) in zip(axes[:, 0], panels, strict=True):
        ax.set_ylabel(f"{title}\n[{unit}]")
    for ax in axes[-1]:
        ax.set_xlabel("training step")
    return figure, axes.T


def small_multiples(groups):
    """A figure of {variant: {algo: runs}}: one method per cell, GRPO and DAPO in grey behind it.

    A cell has two panels, accuracy over entropy. Length and clip fraction are left to the .csv.
    """
    cells = []
    for variant, algos in groups.items():
        behind = {algo: algos[algo] for algo in BEHIND if algo in algos}
        for algo, runs in algos.items():
            if algo not in BEHIND:
                cells.append((method_name(algo, variant), {algo: runs}, behind))
    wide = 5
    high = math.ceil(len(cells) / wide)
    figure = new_figure(8, 2.1 * high + 0.9)
    axes = figure.subplots(2 * high, wide, sharex=True, squeeze=False)
    for k, (metric, title, unit) in enumerate(PANELS[:2]):
        panels = axes[k::2].flatten()  # of this metric, cell by cell
        for ax in panels[1:]:
            ax.sharey(panels[0])
        for ax, (name, method, behind) in zip(panels, cells, strict=False):
            for algo, runs in behind.items():
                draw_behind(ax, metric, algo, runs)
            draw_metric(ax, metric, method)
            finish_panel(ax, metric)
            ax.tick_params(labelsize=7, labelleft=False, labelbottom=False)
            if metric == "accuracy":
                ax.set_title("\n".join(textwrap.wrap(name, 24)), fontsize=8.5)
        for ax in panels[::wide]:
            ax.set_ylabel(f"{title}\n[{unit}]", fontsize=7.5)
            ax.tick_params(labelleft=True)
        for ax in panels[len(cells) :]:
            ax.set_axis_off()
    for ax in axes[1::2].flatten()[max(0, len(cells) - wide) : len(cells)]:
        ax.set_xlabel("training step", fontsize=7.5)
        ax.tick_params(labelbottom=True)
    add_grey_legend(figure, [algo for algo in BEHIND if any(algo in cell[2] for cell in cells)])
    return figure


def draw_behind(ax, metric, algo, runs):
    """Draw the mean of a method's runs as a grey line, for comparison."""
    phase = "eval" if metric == "accuracy" else "train"
    steps, mean, *_ = average(runs, phase, metric)
    ax.plot(steps, mean, color=BEHIND[algo], ls=style(algo)[2], lw=1.1, zorder=2)


def add_grey_legend(figure, algos):
    """The names of the methods in grey, above the small multiples."""
    from matplotlib.lines import Line2D

    lines = []
    for algo in algos:
        look = {"color": BEHIND[algo], "ls": style(algo)[2], "lw": 1.1}
        lines.append(Line2D([], [], label=f"{style(algo)[0]}, in every panel", **look))
    look = {"frameon": False, "fontsize": 9, "handlelength": 3.2}
    figure.legend(handles=lines, loc="outside upper center", ncols=2, **look)


def finish_panel(ax, metric):
    """Set the limits and scales of a panel, after its curves are drawn."""
    if metric == "accuracy":
        row = ax.get_shared_y_axes().get_siblings(ax)
        highest = max((other.dataLim.y1 for other in row if other.has_data()), default=1)
        ax.set_ylim(-0.02, 0.52 if highest <= 0.5 else 1.02)
    if metric == "clip_frac":
        # It is 0 with some methods, 0.001 or 0.3 with others: logarithmic, and linear below 0.001.
        ticks = (0, 0.001, 0.01, 0.1, 1)
        ax.set_yscale("symlog", linthresh=1e-3, linscale=0.5)
        ax.set(ylim=(-1e-4, 1), yticks=ticks, yticklabels=map(str, ticks))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def add_legend(figure, algos):
    """The names of the algorithms, above the panels."""
    from matplotlib.lines import Line2D

    lines = []
    for algo in algos:
        name, colour, dashes, marker = style(algo)
        look = {"color": colour, "ls": dashes, "marker": marker, "lw": 1.4, "ms": 4}
        lines.append(Line2D([], [], label=name, **look))
    look = {"frameon": False, "fontsize": 9, "handlelength": 4.6, "columnspacing": 1.1}
    columns = 7 if len(lines) <= 3 else math.ceil(len(lines) / 2)
    figure.legend(handles=lines, loc="outside upper center", ncols=columns, **look)


# Entropy against accuracy


def fit_entropy(entropy, accuracy):
    """(a, b) of the least-squares fit accuracy = -a exp(entropy) + b, of arXiv 2505.22617.

    entropy [N] in nats, accuracy [N]. NaN where the points do not determine a line.
    """
    x = np.exp(np.asarray(entropy, float))
    y = np.asarray(accuracy, float)
    if len(x) < 3 or np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9:
        return math.nan, math.nan
    slope, b = np.polyfit(x, y, 1)
    return -slope, b


def entropy_points(runs):
    """A DataFrame of step, entropy and accuracy of the training steps that have both.

    Both are of the rows trained on. Files from before accuracy_trained was logged have `accuracy`
    alone, which without --dynamic-sampling is the same.
    """
    table = rows_of(runs, "train")
    accuracy = table["accuracy_trained"].fillna(table["accuracy"])
    return table[["step", "entropy"]].assign(accuracy=accuracy).dropna()


def misfit(entropy, accuracy, a, b, parts=10):
    """The largest mean error of the fit over a tenth of the points, ordered by entropy.

    Noise of single points averages out; what is left is the wrong form of the curve. 0 for none.
    """
    order = np.argsort(entropy)
    error = (np.asarray(accuracy) - (b - a * np.exp(entropy)))[order]
    means = [part.mean() for part in np.array_split(error, parts) if len(part)]
    return float(np.abs(means).max()) if means else 0.0


def plot_entropy(runs, out):
    """Draw accuracy against entropy [nats] of every training step, and the fit to all of them.

    Prints the fit of each method, and how far it is off.
    """
    figure = new_figure(8, 5.6)
    ax = figure.subplots()
    print(f"{'R = -a exp(H) + b':<32} {'a':>8} {'b':>8} {'off by':>7} {'points':>7}")
    every = []
    for algo, (name, seeds) in entropy_methods(runs):
        points = entropy_points(seeds)
        every.append(points[["entropy", "accuracy"]].to_numpy())
        print_fit(name, *every[-1].T)
        _, colour, _, marker = style(algo)
        ax.scatter(*every[-1].T, s=9, lw=0, alpha=0.45, color=colour, marker=marker, label=name)
    entropy, accuracy = np.concatenate(every).T
    a, b = fit_entropy(entropy, accuracy)
    off = print_fit("all", entropy, accuracy) if len(every) > 1 else misfit(entropy, accuracy, a, b)
    grid = np.linspace(entropy.min(), entropy.max(), 50) if len(entropy) else entropy
    label = f"least-squares fit −{a:.2f} exp(H) + {b:.2f},\noff by up to {off:.2f}"
    ax.plot(grid, b - a * np.exp(grid), color="0.25", lw=1.6, label=label)
    ax.set(xlabel="entropy H [nats per token]", ylabel="accuracy R of the training rollouts")
    ax.grid(alpha=0.25)
    legend = ax.legend(fontsize=8, markerscale=1.8)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    note = "Off by: the largest mean error over a tenth of the points, ordered by entropy."
    figure.supxlabel(f"A point is the mean of one training step of one seed. {note}", fontsize=8)
    save(figure, out)


def entropy_methods(runs):
    """[(algo for the look, (name, its runs))] of all variants of all methods."""
    methods = []
    for variant, algos in group(runs).items():
        for algo, seeds in algos.items():
            methods.append((algo, (method_name(algo, variant), seeds)))
    return methods


def print_fit(name, entropy, accuracy):
    """Print the fit of one method. Returns how far it is off."""
    a, b = fit_entropy(entropy, accuracy)
    off = misfit(entropy, accuracy, a, b)
    print(f"{name:<32} {a:8.3f} {b:8.3f} {off:7.3f} {len(entropy):7d}")
    return off


# The credit picture

WIDE = 112  # characters in a line of cells
MOST_LINES = 2  # of one completion
UNDRAWABLE = "[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]"  # no glyph, not allowed in an SVG
HATCH = "///"  # of clipped tokens
HATCH_COLOUR = "#CFCFCF"  # light: the token's text is read through it
NOTES = {
    "grpo": "a row shares one push among its tokens, so tokens of short rows get more",
    "dapo": "every token of the group weighs the same",
    "gspo": "one ratio per row; the whole row is pushed or the whole row is clipped",
    "tepo": "GSPO's ratio, DAPO's equal tokens, so long rows weigh more than in GSPO",
    "gtpo": "right rows by entropy, wrong rows by 1 / entropy, position by position",
    "grpo_s": "rows weighted by their mean entropy",
    "trgrpo": "up to 1.4 times the push, from p = 0.25 on (reading=outside: 0.12)",
    "clip_cov": "DAPO with a wide clip; a few random tokens of high covariance get nothing",
    "kl_cov": "no clip; the tokens of highest covariance are pulled back to the old policy",
    "ce_gppo": "what DAPO would clip keeps a push of a fixed size",
    "aspo": "right rows by 1 / w: what has become rarer gets more",
    "dppo": "a token gets nothing once its probability has moved too far",
    "reweight": "improbable tokens down to 0.8 times the push",
    "raft": "right rows only; the advantage is the reward itself",
    "ha_dw": "GRPO, times a weight for the group's difficulty; here, alone, 1.5",
    "ktae": "DAPO, plus a value for each token that right or wrong rows have more often",
    "dhpo": "half DAPO, half TEPO with GSPO's clip range",
    "dr_grpo": "no std and no length of a row: every token of the group weighs the same",
    "rloo": "the ratio of a row is the product of its tokens'; rows are clipped whole",
    "cispo": "DAPO, but the ratio is clipped and not the push: no token gets nothing",
    "sapo": "GRPO, but the push fades out smoothly where w leaves 1",
    "gmpo": "each token clipped, then one ratio per row",
    "luspo": "TEPO, its sum divided by rows and not by tokens; a narrow clip range",
    "vespo": "one ratio per row; the push fades smoothly where the row has moved",
    "maxrl": "DAPO, the advantage divided by the mean reward: few right rows get more",
    "opo": "DAPO without a std; the baseline weighs each row by its length",
    "dro": "no clip; a token that has moved is pulled back by its log-ratio",
    "topr": "right rows whatever w is; wrong rows by w, at most 1",
}


def note(algo):
    """What the credit picture says about a method; of a user's file, how its docstring begins."""
    if not is_file(algo):
        return NOTES[algo]
    from run.algorithm import load_algorithm

    text = load_algorithm(algo).__doc__ or Path(algo).name
    return textwrap.shorten(text.strip().split("\n\n")[0], 80, placeholder=" …")


def push(algo, group, values=None):
    """How the algorithm pushes the tokens of one group, which is its whole mini-batch.

    values: {name: value} of its options that are not at their defaults. group: a namespace with
    rewards and right (1 where the answer is right) [G], and with entropy, logprobs, old_logprobs,
    mask and completions [G, T]; history and ref_logprobs are None.

    Returns -dloss/dlogprobs [G, T], above 0 where the update makes a token more likely, and clipped
    [G, T], where the advantage is not 0 and yet the gradient is exactly 0.
    """
    import torch

    from run.algorithm import load_algorithm
    from trainer.methods import inputs, split_options

    module = load_algorithm(algo)
    advantage_options, loss_options = split_options(module, values or {})
    G, T = group.mask.shape

    def filled(function, options):
        return {**inputs(function, group, slice(None), group.entropy, T), **options}

    more = filled(module.advantages, advantage_options)
    advantages = module.advantages(group.rewards, G, **more)  # [G] or [G, T]
    logprobs = group.logprobs.detach().clone().requires_grad_()
    batch = logprobs, group.old_logprobs, advantages, group.mask
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # Clip-Cov draws its tokens: every picture shows the same
        loss = module.loss(*batch, **filled(module.loss, loss_options))
    (gradient,) = torch.autograd.grad(loss, logprobs)  # [G, T]
    has_advantage = advantages.reshape(G, -1) != 0  # [G, 1] or [G, T]
    clipped = has_advantage & (group.mask != 0) & (gradient == 0)
    return -gradient, clipped


def read_group(path, step=None):
    """One prompt's completions at one step, with right and wrong ones among them.

    path: a run folder or a samples.jsonl. Without a `step`: groups with two of each come before
    others, and of these the one whose policy moved most, by mean |log ratio|. Raises ValueError.
    """
    path = path / "samples.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    mixed = []
    for rows in read_groups(path):
        rows = [row for row in rows if is_complete(row)]
        if 0 < sum(row["right"] for row in rows) < len(rows):
            mixed.append(rows)
    what = "no group with both right and wrong completions, with tokens and finite numbers"
    if not mixed:
        raise ValueError(f"{path}: {what}")
    chosen = [rows for rows in mixed if step in (None, rows[0]["step"])]
    if not chosen:
        steps = sorted({rows[0]["step"] for rows in mixed})
        raise ValueError(
            f"{path}: {what}, at step {step}; at {', '.join(map(str, steps))} it has one"
        )
    return max(chosen, key=contrast)


def is_complete(row):
    """Whether a row of `read_groups` has tokens, a finite reward and finite numbers per token.

    Single rows that made the trainer skip an update are logged too; they are marked "skipped".
    """
    if row.get("skipped") or not row["tokens"]:
        return False
    numbers = [row["reward"], *row["logprobs"], *row["old_logprobs"], *row["entropy"]]
    return None not in map(finite, numbers)


def contrast(rows):
    """Ranks the groups: two right and two wrong rows before one, then the mean |log ratio|."""
    right = sum(row["right"] for row in rows)
    log_ratios = [np.subtract(row["logprobs"], row["old_logprobs"]) for row in rows]
    return min(right, len(rows) - right, 2), np.abs(np.concatenate(log_ratios)).mean()


def pick(rows, shown):
    """Indices of the rows to show, the right ones first, at most `shown` of each kind.

    Of each kind, the shortest, the longest and what lies between.
    """
    picked = []
    for right in (True, False):
        kind = [i for i, row in enumerate(rows) if row["right"] == right]
        kind.sort(key=lambda i: len(rows[i]["tokens"]))
        places = np.linspace(0, len(kind) - 1, shown)
        picked += [kind[j] for j in sorted({round(place) for place in places})]
    return picked


def tensors(rows):
    """The namespace that `push` takes, of the completions of one group, in fp64.

    samples.jsonl has the texts of the tokens and not their ids: equal texts get equal ids.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def padded(lists):
        values = [torch.tensor(row, dtype=torch.float64) for row in lists]
        return pad_sequence(values, batch_first=True)  # [G, T]

    ids = {}  # {text of a token: its id}
    for row in rows:
        for token in row["tokens"]:
            ids.setdefault(token, len(ids))
    return SimpleNamespace(
        rewards=torch.tensor([row["reward"] for row in rows]).double(),
        right=torch.tensor([row["right"] for row in rows]),
        entropy=padded(row["entropy"] for row in rows),
        logprobs=padded(row["logprobs"] for row in rows),
        old_logprobs=padded(row["old_logprobs"] for row in rows),
        mask=padded([1.0] * len(row["tokens"]) for row in rows).float(),
        completions=padded([ids[token] for token in row["tokens"]] for row in rows).long(),
        history=None,
        ref_logprobs=None,
    )


def credit_panels(rows, algos):
    """The entropy, then how each method pushes the tokens of a group.

    Returns [(name, note, values [G, T], clipped [G, T]), ...].
    """
    group = tensors(rows)
    nowhere = group.mask < 0
    panels = [("Entropy", "of the policy that sampled, nats", group.entropy, nowhere)]
    for algo in sorted(algos, key=[*ORDER, *algos].index):
        panels.append((style(label(algo))[0], note(algo), *push(algo, group)))
    return panels


def plot_credit(path, out, step=None, shown=2, algos=ALGORITHMS):
    """Draw one group of completions under some algorithms.

    Of its right and of its wrong ones, `shown` each are drawn; advantages and losses are those of
    the whole group. path: a run folder or a samples.jsonl. Raises ValueError.
    """
    rows = read_group(Path(path), step)
    panels = credit_panels(rows, algos)
    picked = pick(rows, shown)
    lines = sum(lines_of(cell_texts(rows[i])) for i in picked)
    cells = 0.19 * lines  # inches; a panel is its title and its lines of cells
    panel = 0.29 + cells
    height = 0.42 + len(panels) * panel + 0.5
    figure = new_figure(8, height, layout=None)
    prompt = re.sub(UNDRAWABLE, "�", rows[0]["prompt"])
    group_of = f"{len(picked)} of {len(rows)} completions of: {prompt}"
    caption = f"Step {rows[0]['step']}, {group_of}"
    caption = "\n".join(textwrap.wrap(caption, 116, max_lines=2, placeholder=" …"))
    figure.text(0.01, 1 - 0.08 / height, caption, va="top", fontsize=8.5, parse_math=False)
    shown_rows = [rows[i] for i in picked]
    largest = [values[picked].abs().max().item() for _, _, values, _ in panels]
    for i, (name, about, values, clipped) in enumerate(panels, 1):
        full = largest[0] if i == 1 else max(largest[1:])  # one scale for all methods
        box = 0.08, (height - 0.42 - i * panel) / height, 0.915, cells / height
        ax = figure.add_axes(box, xlim=(0, WIDE), ylim=(lines, 0))
        ax.set_title(f"{name}: {about}", loc="left", fontsize=9, pad=3, parse_math=False)
        ax.set_title(scale_note(panels, largest, i - 1), loc="right", fontsize=8, pad=3)
        shade = signed_root(values[picked] / (full or 1)) if i > 1 else values[picked] / (full or 1)
        draw_panel(ax, shown_rows, shade, clipped[picked], "RdBu" if i > 1 else "PRGn_r")
    add_credit_legend(figure, max(largest[1:]))
    save(figure, out)


def signed_root(x):
    """The square root of |x| with the sign of x: small pushes of a large range stay visible."""
    return x.sign() * x.abs().sqrt()


def scale_note(panels, largest, i):
    """What stands at the right of a panel: its largest value, and how it compares with GRPO's."""
    if i == 0:
        return f"full colour = {largest[0]:.2g}"
    if largest[i] == 0:
        return "nothing is pushed"
    note = f"at most ±{largest[i]:.2g}"
    names = [name for name, *_ in panels]
    if "GRPO" in names and names[i] != "GRPO":
        grpo = largest[names.index("GRPO")]
        note += f", {largest[i] / grpo:.1f} × GRPO's" if grpo else ""
    return note


def draw_panel(ax, rows, shade, clipped, colours):
    """Draw rows of a group under one method. shade [rows, T] in -1..1; clipped [rows, T]"""
    from matplotlib import colormaps

    ax.set_axis_off()
    y = 0
    for i, row in enumerate(rows):
        label = "right" if row["right"] else "WRONG"
        ax.text(-1, y + 0.5, label, ha="right", va="center", fontsize=8)
        texts = cell_texts(row)
        values = shade[i, : len(texts)].tolist(), clipped[i, : len(texts)].tolist()
        draw_tokens(ax, y, texts, *values, colormaps[colours])
        y += lines_of(texts)


def cell_texts(row):
    """What the cells of a row's tokens show. Its EOS, which is not in the completion, is EOS."""
    texts = [cell_text(token) for token in row["tokens"]]
    if not row["completion"].endswith(row["tokens"][-1]):
        texts[-1] = "EOS"
    return texts


def cells_of(texts):
    """(line, place in it, width, text) of each token's cell, in characters; wraps at WIDE.

    After MOST_LINES the rest is left out, and the last cell is an ellipsis.
    """
    cells, line, x = [], 0, 0.0
    for text in texts:
        width = len(text) + 0.7
        if x + width > WIDE - 2:
            line, x = line + 1, 0.0
        if line == MOST_LINES:
            return [*cells, (line - 1, WIDE - 2, 1.7, "…")]
        cells.append((line, x, width, text))
        x += width
    return cells


def lines_of(texts):
    """How many lines the cells of a completion take, at least one."""
    return max([line for line, *_ in cells_of(texts)], default=0) + 1


def draw_tokens(ax, y, texts, shade, clipped, colours):
    """Draw one completion as lines of cells, as wide as their text.

    shade [T] in -1..1; clipped [T], whose cells are hatched.
    """
    from matplotlib.patches import Rectangle

    cells = zip(cells_of(texts), shade, clipped, strict=False)  # fewer cells, if some are left out
    for (line, x, width, text), value, hatched in cells:
        if text == "…":
            value = hatched = 0
        place = x, y + line + 0.04
        cell = Rectangle(place, width, 0.92, fc=tint(colours, value), ec="white", lw=0.4)
        if hatched:
            cell.set(ec=HATCH_COLOUR, hatch=HATCH)
        ax.add_patch(cell)
        look = {"family": "DejaVu Sans Mono", "fontsize": 7.2, "parse_math": False}
        look["color"] = "white" if abs(value) > 0.75 else "black"
        ax.text(x + width / 2, y + line + 0.52, text, ha="center", va="center", **look)


def tint(colours, value):
    """The colour of a value in -1..1. The ends of a colour map are too dark to read text on."""
    return colours(0.5 + 0.38 * value)


def cell_text(token):
    """A token as its cell shows it; ◌ adds no text, as the first part of a character does not."""
    if not token:
        return "◌"
    text = token.replace("\n", "↵").strip()
    return re.sub(UNDRAWABLE, "�", text) or "␣"


def add_credit_legend(figure, largest):
    """What the colours and the hatching mean, below the panels. largest: push of all methods."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    keys = []
    for text, value, hatch in (
        ("more likely (−∂loss/∂logprob > 0)", 1, None),
        ("less likely", -1, None),
        ("clipped: exactly 0", 0, HATCH),
    ):
        colour = tint(colormaps["RdBu"], value)
        edge = HATCH_COLOUR if hatch else "#999999"
        keys.append(Patch(fc=colour, ec=edge, hatch=hatch, label=text))
    title = "At its default options, the method's update makes a token"
    title += f"  (one scale: full colour = ±{largest:.2g}, by the square root)"
    look = {"frameon": False, "fontsize": 8.5, "title": title, "title_fontsize": 8.5}
    figure.legend(handles=keys, loc="lower center", ncols=3, **look)


# Command line

EXAMPLES = """examples:
  python plot.py runs/tepo-tiny-s0                  curves of one run, into its curves.png
  python plot.py runs/*-tiny-s* --out curves.png    several methods; seeds averaged, with a band
  python plot.py docs/methods.csv --out curves.png  the same from the metrics that compare.py keeps
  python plot.py --entropy runs/*-tiny-s*           accuracy against entropy; R = -a exp(H) + b
  python plot.py --credit runs/tepo-tiny-s0 --step 20
      how each of the seven losses pushes each token of one group; --algos all: all 28
"""


def build_parser():
    parser = Parser(
        prog="plot.py",
        description="Draw runs of train.py.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    text = "run folder of train.py, folder of runs, or .csv of compare.py"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=text)
    text = "picture to write; default curves.png, entropy.png or credit.png,\n"
    text += "in RUN if there is one, else here"
    parser.add_argument("--out", metavar="FILE", type=output_file, help=text)
    kind = parser.add_mutually_exclusive_group()
    text = "accuracy against entropy, with the fit of arXiv 2505.22617"
    kind.add_argument("--entropy", action="store_true", help=text)
    text = "one group of RUN's samples.jsonl (or of that file) under several losses"
    kind.add_argument("--credit", action="store_true", help=text)
    text = "with --credit: the group of this step; default: where the policy had moved most"
    parser.add_argument("--step", type=int, metavar="N", help=text)
    text = "with --credit: these methods, or files of your own, or all; default: the seven"
    parser.add_argument("--algos", type=algorithm_names, metavar="A,B", help=text)
    return parser


def picture(args):
    """Where the picture goes: --out, or a name of its own in the one run's folder."""
    if args.out:
        return args.out
    name = "curves.png"
    if args.entropy:
        name = "entropy.png"
    if args.credit:
        name = "credit.png"
    first = Path(args.runs[0])
    return first / name if len(args.runs) == 1 and first.is_dir() else Path(name)


def main(argv=None):
    """Run the command line. Raises SystemExit with status 2 on an error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.credit and len(args.runs) > 1:
        parser.error("--credit draws one RUN")
    if args.step is not None and not args.credit:
        parser.error("--step goes with --credit")
    if args.algos and not args.credit:
        parser.error("--algos goes with --credit")
    out = picture(args)
    try:
        if args.credit:
            algos = args.algos or ALGORITHMS
            plot_credit(args.runs[0], out, args.step, algos=algos)
        elif args.entropy:
            plot_entropy(read_runs(args.runs), out)
        else:
            plot_runs(read_runs(args.runs), out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(out)


if __name__ == "__main__":
    run_main(main)
