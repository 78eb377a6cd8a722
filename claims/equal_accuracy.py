"""Entropy at equal accuracy: do averages per sequence leave less entropy than averages per token?

    python claims/equal_accuracy.py     # from docs/methods.csv, in seconds; trains nothing

After equal steps a slower method has more entropy left. So each run is read where its accuracy
passes a level, in three ways:
- crossing: a line is fitted over the 9, 15 or 21 steps around each step, to the training accuracy
  (sampled at temperature 1) and to the entropy; the run is read where the first line reaches the
  level for the first time;
- held-out: where greedy accuracy on the 500 held-out problems passes the level, on straight lines
  between the evaluations, which are 25 steps apart; entropy as above, over 15 steps;
- band: a line of entropy against accuracy through all single steps within 0.05 of the level.
A single step's accuracy moves by several points with its 16 problems. A band therefore takes in
late steps that drew hard problems, whose entropy is that of a late policy; more of them, the faster
the run. It is here to show that bias, and so is a test on made-up runs.

Entropy is in nats per token; times the mean length it is nats per completion.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from claims import kit
from run.runs import read_runs
from run.style import new_figure, save, style
from run.table import mean_interval

DATA = Path(__file__).resolve().parents[1] / "docs" / "methods.csv"
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8)
HALF = 7  # steps on each side that a line is fitted over
HALVES = {"crossing, 9": 4, "crossing": 7, "crossing, 21": 10}
BAND = 0.05
FAMILIES = {  # by what the loss averages over; GSPO apart, for its clip makes it slow
    "per sequence": ("grpo", "grpo_s", "trgrpo"),
    "per token": ("dapo", "tepo", "gtpo"),
    "GSPO": ("gspo",),
}
COLOURS = {"per sequence": "#000000", "per token": "#D55E00", "GSPO": "#0072B2"}
DRAWN = {  # in the middle panel
    "crossing": ("#009E73", "where training accuracy passes the level"),
    "held-out": ("#CC79A7", "where held-out accuracy passes it"),
    "band": ("#999999", "single steps within 0.05 of it"),
}
WAYS = (*HALVES, "held-out", "band")


def smooth(values, half=HALF):
    """At each step, the line fitted over the steps within `half` of it. [N] -> [N]"""
    fitted = []
    for i in range(len(values)):
        near = np.arange(max(0, i - half), min(len(values), i + half + 1))
        fitted.append(np.polyfit(near - i, values[near], 1)[1])
    return np.array(fitted)


def crossing(accuracy, level, half=HALF):
    """Where smoothed accuracy first reaches the level, in steps from the first; None if never."""
    line = smooth(accuracy, half)
    reached = np.flatnonzero(line >= level)
    if not len(reached) or reached[0] == 0:
        return None
    i = reached[0]
    return float(i - 1 + (level - line[i - 1]) / (line[i] - line[i - 1]))


def at(values, place, half=HALF):
    """The smoothed values at a place between two steps; None for None."""
    if place is None:
        return None
    return float(np.interp(place, np.arange(len(values)), smooth(values, half)))


def in_band(accuracy, values, level):
    """The line of values against accuracy through the steps near the level, at the level."""
    near = abs(accuracy - level) <= BAND
    slope, start = np.polyfit(accuracy[near], values[near], 1)
    return float(slope * level + start)


def held_out(run, level):
    """Where greedy accuracy passes the level, in steps from the first."""
    rows = run["rows"].query("phase == 'eval'").to_dict("records")
    step, accuracy = ([row[key] for row in rows] for key in ("step", "accuracy"))
    i = next(i for i, value in enumerate(accuracy) if value >= level)
    return float(np.interp(level, accuracy[i - 1 : i + 1], step[i - 1 : i + 1])) - 1


def readings(run):
    """Rows of one run: its step, entropy and length at each level, in each way."""
    rows = run["rows"].query("phase == 'train'").to_dict("records")
    keys = ("accuracy", "entropy", "length")
    accuracy, entropy, length = (np.array([row[key] for row in rows]) for key in keys)
    step = np.arange(1.0, len(rows) + 1)
    found = []
    for level in LEVELS:
        for way in WAYS:
            if way == "band":
                values = [in_band(accuracy, x, level) for x in (step, entropy, length)]
            else:
                half = HALVES.get(way, HALF)
                is_crossing = way in HALVES
                place = crossing(accuracy, level, half) if is_crossing else held_out(run, level)
                values = [at(x, place, half) for x in (step, entropy, length)]
            about = {"method": run["algo"], "seed": run["seed"], "level": level, "way": way}
            values = dict(zip(("step", "entropy", "length"), values, strict=True))
            found.append({**about, **values})
    return found


def measure(args):
    runs = read_runs([DATA])
    return [row for run in runs if run["seed"] in args.seeds for row in readings(run)]


def of_family(rows, family, level, way, key):
    """One number per seed, the mean over the family's methods; [] where a run has none.

    key: a column, or "per completion", entropy times length.
    """
    part = [row for row in rows if row["method"] in FAMILIES[family]]
    part = [row for row in part if row["level"] == level and row["way"] == way]
    if any(row["entropy"] is None for row in part):
        return []
    means = []
    for seed in sorted({row["seed"] for row in part}):
        of_seed = [row for row in part if row["seed"] == seed]
        if key == "per completion":
            means.append(np.mean([row["entropy"] * row["length"] for row in of_seed]))
        else:
            means.append(np.mean([row[key] for row in of_seed]))
    return [float(mean) for mean in means]


def difference(rows, level, way, key, first="per sequence", second="per token"):
    """(mean, half-width) of first less second at equal seed; (None, None) if one is missing."""
    a, b = (of_family(rows, name, level, way, key) for name in (first, second))
    return mean_interval([x - y for x, y in zip(a, b, strict=True)]) if a and b else (None, None)


def points(read):
    """(levels, means, half-widths) of read(level) where that is not None."""
    found = [(level, read(level)) for level in LEVELS]
    found = [(level, mean, half or 0) for level, (mean, half) in found if mean is not None]
    return zip(*found, strict=True)


def draw(rows, out):
    """Entropy at each level; the difference of the two families in three ways; the steps."""
    figure = new_figure(11, 3.9)
    left, middle, right = figure.subplots(1, 3)
    look = {"marker": "o", "ms": 4, "capsize": 3, "lw": 1.2}
    for shift, (family, colour) in zip((-0.006, 0, 0.006), COLOURS.items(), strict=True):
        for ax, key in ((left, "entropy"), (right, "step")):

            def read(level, family=family, key=key):
                values = of_family(rows, family, level, "crossing", key)
                return mean_interval(values) if values else (None, None)

            x, y, half = points(read)
            x = [level + shift for level in x]
            ax.errorbar(x, y, half, label=family, color=colour, **look)
    for shift, (way, (colour, text)) in zip((-0.01, 0, 0.01), DRAWN.items(), strict=True):
        x, y, half = points(lambda level, way=way: difference(rows, level, way, "entropy"))
        x = [level + shift for level in x]
        middle.errorbar(x, y, half, label=text, color=colour, **{**look, "ls": "none"})
    middle.axhline(0, color="0.6", lw=0.8, zorder=0)
    middle.set_ylim(top=0.06)  # room for the legend
    left.set_title("Entropy at equal training accuracy")
    middle.set_title("Entropy, per sequence less per token")
    right.set_title("Step at which the level is passed")
    for ax, label in ((left, "nats per token"), (middle, "nats per token"), (right, "step")):
        ax.set_ylabel(label)
        ax.set_xlabel("held-out or training accuracy" if ax is middle else "training accuracy")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in (left, middle):
        ax.legend(frameon=False, fontsize=8, loc="upper right")
    save(figure, out)


def interval(found, digits=3, sign="+"):
    """ "+0.010 ± 0.020", or "not reached by all"."""
    mean, half = found
    if mean is None:
        return "not reached by all"
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def say(rows):
    lines = ["per sequence less per token at equal accuracy, nats per token, 95% t-intervals:"]
    for level in LEVELS:
        texts = [f"{way}: {interval(difference(rows, level, way, 'entropy'))}" for way in WAYS]
        lines.append(f"  {level}: {'; '.join(texts)}")
    lines.append("in nats per completion (crossing), and GSPO less per token in nats per token:")
    for level in LEVELS:
        whole = interval(difference(rows, level, "crossing", "per completion"), 2)
        gspo = interval(difference(rows, level, "crossing", "entropy", "GSPO"))
        lines.append(f"  {level}: {whole}; {gspo}")
    lines.append("each method's entropy (crossing), and its difference to GRPO:")
    for level in LEVELS:
        lines.append(f"  {level}: " + "; ".join(of_methods(rows, level)))
    return lines


def of_methods(rows, level):
    """Texts of each method's entropy at a level, and less GRPO's at the same seed."""
    texts, base = [], None
    for method in ("grpo", *(algo for family in FAMILIES.values() for algo in family)):
        part = [row for row in rows if row["method"] == method and row["level"] == level]
        part = [row["entropy"] for row in part if row["way"] == "crossing"]
        if None in part or (base is not None and method == "grpo"):
            continue
        base = base or part
        less = mean_interval([x - y for x, y in zip(part, base, strict=True)])
        value = interval(mean_interval(part), sign="")
        texts.append(f"{style(method)[0]} {value} ({interval(less)})")
    return texts


def main(argv=None):
    return kit.command(__doc__, __file__, measure, draw, say, argv)


if __name__ == "__main__":
    sys.exit(main())
