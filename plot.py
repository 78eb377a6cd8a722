"""Figures of runs: learning curves, entropy against accuracy, and the credit picture. `python plot.py --help`.

A run is {"algo", "seed", "settings": {option: value}, "rows": [{"phase", "step", and COLUMNS}]}, read from a folder
that train.py wrote or from a .csv of many runs, the compact form that compare.py writes and docs/ keeps. train.py calls
`plot_runs` on its own folder while it trains.
"""

import argparse
import importlib
import math
import os
import re
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import (
    Figure,  # not pyplot: no global state, no display, fit to be called within a trainer
)
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image  # a dependency of matplotlib

from trainer import options
from trainer.runs import average, finite, group, read_log, read_runs

# Okabe and Ito's colours, less their yellow, lost on white; dashes and markers tell the methods apart in grey.
STYLES = {  # algo: name, colour, dashes, marker
    "grpo": ("GRPO", "#000000", (0, (5, 2)), "s"),
    "dapo": ("DAPO", "#E69F00", (0, (5, 1.5, 1, 1.5)), "^"),
    "gspo": ("GSPO", "#0072B2", (0, (9, 2)), "D"),
    "tepo": ("TEPO", "#D55E00", "-", "o"),
    "gtpo": ("GTPO", "#009E73", (0, (1, 1)), "v"),
    "grpo_s": ("GRPO-S", "#56B4E9", (0, (5, 1.5, 1, 1.5, 1, 1.5)), "P"),
    "trgrpo": ("TR-GRPO", "#CC79A7", (0, (2.5, 1.5)), "X"),
}
PANELS = (  # metric, title, unit
    ("accuracy", "Accuracy", "share correct"),
    ("entropy", "Entropy", "nats per token"),
    ("length", "Completion length", "tokens"),
    ("clip_frac", "Clip fraction", "share of tokens"),
)
MAX_BYTES = 300_000  # of a picture that is to be committed


# Learning curves


def style(algo):
    """Name, colour, dashes and marker of an algorithm, the same in every figure."""
    return STYLES.get(algo, (algo, "#777777", "-", "."))


def save(figure, out):
    """Writes under a temporary name first: whoever looks at a running trainer's picture sees a whole one.
    A PNG too large to commit gets a palette of 256 colours, a third of the size."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.stem}.part{out.suffix or '.png'}")
    try:
        figure.savefig(part, dpi=160)
        if part.suffix == ".png" and part.stat().st_size > MAX_BYTES:
            Image.open(part).convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE).save(
                part
            )
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def stretches(count):
    """The parts of a curve, as slices, over which as many seeds have a value. count [N]"""
    ends = np.flatnonzero(np.diff(count)) + 1
    bounds = [0, *ends.tolist(), len(count)]
    return [slice(start, end) for start, end in pairwise(bounds) if start < end]


def label_seeds(ax, step, value, seeds, colour):
    """Says at its first point how many seeds a stretch has."""
    look = {"fontsize": 7, "color": colour, "textcoords": "offset points", "xytext": (3, 6)}
    look["bbox"] = {"fc": "white", "alpha": 0.75, "lw": 0, "pad": 0.5}
    ax.annotate(f"n = {seeds}", (step, value), annotation_clip=False, zorder=20, **look)


def draw_metric(ax, metric, algos):
    """One metric of {algo: runs} into one panel: means over seeds, with their spread.

    Where a seed ends, the line breaks, and what remains is thinner and says how many seeds it has.
    """
    for z, (algo, runs) in enumerate(algos.items(), 3):
        _, colour, dashes, _ = style(algo)
        steps, mean, low, high, count = average(runs, "train", metric)
        for part in stretches(count):
            x, y = steps[part], mean[part]
            fewer = count[part][0] < count.max()
            dot = "." if len(x) == 1 else None  # a line of one point does not show
            if metric == "accuracy":
                ax.plot(x, y, color=colour, lw=0.6, alpha=0.5, marker=dot)
                continue
            width = 0.7 if fewer else 1.4
            ax.plot(x, y, color=colour, ls=dashes, lw=width, marker=dot, zorder=z)
            ax.fill_between(x, low[part], high[part], color=colour, alpha=0.13, lw=0)
            if fewer:
                label_seeds(ax, x[0], y[0], count[part][0], colour)
        if metric == "accuracy":
            draw_evaluations(ax, algo, runs, z)


def draw_evaluations(ax, algo, runs, z):
    """Greedy accuracy on held-out problems: bars from the lowest to the highest seed.

    Where there is one seed only, the bar is its own interval. Markers are hollow for fewer seeds.
    """
    _, colour, dashes, marker = style(algo)
    steps, mean, low, high, count = average(runs, "eval", "accuracy")
    ends = []
    for bound, name in ((low, "ci_lo"), (high, "ci_hi")):
        at, interval, *_ = average(runs, "eval", name)
        interval = dict(zip(at, interval, strict=True))
        alone = [interval.get(step, value) for step, value in zip(steps, mean, strict=True)]
        ends.append(np.where(count == 1, alone, bound))
    bars = np.abs([mean - ends[0], ends[1] - mean])  # [2, N]
    look = {"color": colour, "ls": dashes, "marker": marker, "ms": 4, "elinewidth": 0.9}
    for part in stretches(count):
        fewer = count[part][0] < count.max()
        look["lw"], look["mfc"] = (0.7, "white") if fewer else (1.4, colour)
        ax.errorbar(steps[part], mean[part], bars[:, part], zorder=z, **look)
        if fewer:
            label_seeds(ax, steps[part][0], mean[part][0], count[part][0], colour)


def seeds_note(groups):
    """What the figure says of its seeds: what is averaged, what the bars are, and which curves have
    fewer seeds where. groups: {variant: {algo: runs}}."""
    most, least, told = [], [], []
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
                name = style(algo)[0] + (f", {variant}" if variant else "")
                told.append(f"{name}: {', '.join(ends)}")
    sentences = []
    if max(most, default=0) > 1:
        several = " to ".join(str(n) for n in sorted({min(most), max(most)}))
        sentences.append(f"Means of {several} seeds; bands and bars: lowest to highest seed.")
    if min(least, default=0) == 1:
        sentences.append("One seed: bars are its 95% Wilson interval.")
    lines = [" ".join(sentences)]
    if told:
        lines += textwrap.wrap(f"Seeds (n where they are fewer): {'; '.join(told)}.", 130)
    return "\n".join(lines)


def plot_runs(runs, out):
    """Draws accuracy, entropy [nats], length [tokens] and clip fraction into the file `out`.

    runs: folders, .csv files, or what `read_runs` returns. Runs that differ in the seed alone are
    averaged, at each step over those that have a value; variants of one algorithm stand side by
    side. A run without lines yet makes empty panels. Raises ValueError for what is no run.
    """
    runs = [
        run for item in runs for run in ([item] if isinstance(item, dict) else read_runs([item]))
    ]
    groups = group(runs)
    if len(groups) > 1:
        figure = Figure(figsize=(max(8, 2.7 * len(groups)), 9), layout="constrained")
        columns = list(figure.subplots(4, len(groups), sharex=True, sharey="row").T)
    else:
        figure = Figure(figsize=(8, 6.2), layout="constrained")
        axes = figure.subplot_mosaic(
            [["accuracy"] * 3, ["entropy", "length", "clip_frac"]], height_ratios=(1.4, 1)
        )
        columns = [[axes[metric] for metric, _, _ in PANELS]]
    for i, (variant, algos) in enumerate(groups.items()):
        for j, (metric, title, unit) in enumerate(PANELS):
            ax = columns[i][j]
            draw_metric(ax, metric, algos)
            if len(groups) == 1:
                ax.set(title=title, ylabel=unit, xlabel="training step")
            else:
                ax.set_title(variant if j == 0 else "", fontsize=10)
                ax.set(
                    ylabel=f"{title}\n[{unit}]" if i == 0 else "",
                    xlabel="training step" if j == 3 else "",
                )
            if (
                metric == "clip_frac"
            ):  # 0 with some, 0.001 or 0.3 with others: logarithmic, and linear below 0.001
                ax.set_yscale("symlog", linthresh=1e-3, linscale=0.5)
                ax.set(
                    ylim=(-1e-4, 1),
                    yticks=(ticks := (0, 0.001, 0.01, 0.1, 1)),
                    yticklabels=map(str, ticks),
                )
            if metric == "accuracy":
                ax.set_ylim(-0.02, 1.02)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
    used = [
        style(algo) for algo in dict.fromkeys(algo for algos in groups.values() for algo in algos)
    ]
    lines = [
        Line2D([], [], label=name, color=c, ls=ls, marker=m, lw=1.4, ms=4)
        for name, c, ls, m in used
    ]
    look = {"frameon": False, "fontsize": 9, "handlelength": 3.2, "columnspacing": 1.1}
    figure.legend(handles=lines, loc="outside upper center", ncols=7, **look)
    note = "Accuracy: markers are greedy, on held-out problems; thin lines are the sampled training rollouts."
    figure.supxlabel(f"{note}\n{seeds_note(groups)}", fontsize=8)
    save(figure, out)


# Entropy against accuracy


def fit_entropy(entropy, accuracy):
    """(a, b, R^2) of the least-squares fit accuracy = -a exp(entropy) + b, the form of arXiv 2505.22617; entropy [N] in
    nats, accuracy [N]. NaN where the points fix no line."""
    x, y = np.exp(np.asarray(entropy, float)), np.asarray(accuracy, float)
    if len(x) < 3 or np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9:
        return (math.nan,) * 3
    slope, b = np.polyfit(x, y, 1)
    return -slope, b, 1 - ((y - slope * x - b) ** 2).sum() / ((y - y.mean()) ** 2).sum()


def plot_entropy(runs, out):
    """Draws accuracy against entropy [nats] of every training step, a panel per method, and the fit.

    Both are of the rows trained on. Files from before accuracy_trained was logged have `accuracy`
    only, which without --dynamic-sampling is the same. Prints the fits.
    """
    methods = [
        (name, algo, runs) for name, algos in group(runs).items() for algo, runs in algos.items()
    ]
    high, wide = math.ceil(len(methods) / 4), min(4, len(methods))
    figure = Figure(figsize=(8, 2.6 * high + 0.6), layout="constrained")
    axes = figure.subplots(high, wide, sharex=True, sharey=True, squeeze=False)
    last = max(
        (r["step"] for _, _, runs in methods for run in runs for r in run["rows"]), default=1
    )
    print(f"{'R = -a exp(H) + b':<32} {'a':>8} {'b':>8} {'R2':>6} {'points':>7}")
    for ax, (variant, algo, runs) in zip(axes.flat, methods, strict=False):
        points = []
        for row in (row for run in runs for row in run["rows"] if row["phase"] == "train"):
            trained = row["accuracy_trained"]
            accuracy = row["accuracy"] if trained is None else trained
            points.append((row["entropy"], accuracy, row["step"]))
        entropy, accuracy, step = (
            np.array([p for p in points if None not in p]).reshape(-1, 3).T
        )  # [N] each
        a, b, r2 = fit_entropy(entropy, accuracy)
        name = style(algo)[0] + (f", {variant}" if variant else "")
        print(f"{name:<32} {a:8.3f} {b:8.3f} {r2:6.2f} {len(step):7d}")
        shown = ax.scatter(entropy, accuracy, c=step, cmap="viridis", s=7, lw=0, vmin=0, vmax=last)
        grid = np.linspace(entropy.min(), entropy.max(), 50) if len(step) else entropy
        ax.plot(grid, b - a * np.exp(grid), color="#D55E00", lw=1.6)
        ax.set_title(f"{name}\na = {a:.2f}, b = {b:.2f}\nR² = {r2:.2f}", fontsize=9)
        ax.grid(alpha=0.25)
    for ax in axes.flat[len(methods) - wide : len(methods)]:
        ax.tick_params(labelbottom=True)
    for ax in axes.flat[len(methods) :]:
        ax.set_axis_off()
    figure.supxlabel(
        "entropy H [nats per token]; line: least-squares fit R = −a exp(H) + b", fontsize=9
    )
    figure.supylabel("accuracy R of the training rollouts", fontsize=9)
    figure.colorbar(shown, ax=axes, label="training step", aspect=40, pad=0.01)
    save(figure, out)


# The credit picture

NOTES = {
    "grpo": "a row shares one push among its tokens, so tokens of short rows get more",
    "dapo": "every token of the group weighs the same",
    "gspo": "one ratio a row; the whole row is pushed or the whole row is clipped",
    "tepo": "GSPO's ratio, DAPO's equal tokens, so long rows weigh more than in GSPO",
    "gtpo": "right rows by entropy, wrong rows by 1 / entropy, position by position",
    "grpo_s": "rows weighted by their mean entropy",
    "trgrpo": "probable tokens up to 1.4 times the push",
}


def push(algo, rewards, right, entropy, logprobs, old_logprobs, mask):
    """How the algorithm, with its default options, pushes the tokens of one group.

    rewards and right (1 where the answer is right) [G], the others [G, T].

    Returns -dloss/dlogprobs [G, T], above 0 where the update makes a token more likely, and clipped [G, T], where the
    advantage is not 0 and yet the gradient is exactly 0.
    """
    import torch  # here: the curves do without it

    from trainer.algorithm import named

    module = importlib.import_module(algo)
    inputs = named(module.advantages, {"entropy": entropy, "mask": mask, "right": right})
    advantages = module.advantages(rewards, len(rewards), **inputs)  # [G] or [G, T]
    logprobs = logprobs.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        module.loss(logprobs, old_logprobs, advantages, mask), logprobs
    )  # [G, T]
    return -gradient, (advantages.reshape(len(rewards), -1) != 0) & (mask != 0) & (gradient == 0)


def read_group(path, step=None):
    """One prompt's completions at one step, as train.py samples them, with right and wrong ones among them. Without a
    `step`: groups with two of each before others, and of these the one whose policy moved most, by mean |log ratio|."""
    path = path / "samples.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    groups, best, chosen = {}, (0, 0.0), None
    for number, row in read_log(path):
        try:
            if row.get("skipped"):  # single rows, logged because they broke an update
                continue
            lists = [row["logprobs"], row["old_logprobs"], row["entropy"]]
            if all(len(x) == len(row["tokens"]) and None not in map(finite, x) for x in lists):
                # files from before "right" was recorded: their reward
                row["right"] = row.get("right", row["reward"]) > 0.5
                groups.setdefault((row["step"], row["prompt"]), []).append(row)
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path}: line {number} is not a completion with tokens and logprobs"
            ) from None
    for (at, _), rows in groups.items():
        right = sum(row["right"] for row in rows)
        ratios = np.concatenate([np.subtract(row["logprobs"], row["old_logprobs"]) for row in rows])
        rank = min(right, len(rows) - right, 2), np.abs(ratios).mean()
        if right not in (0, len(rows)) and step in (None, at) and rank > best:
            best, chosen = rank, rows
    if chosen is None:
        at = "" if step is None else f" at step {step}"
        raise ValueError(f"{path}: no group with both right and wrong completions{at}")
    return chosen


def draw_tokens(ax, y, tokens, shade, clipped, colours):
    """One completion as a line of cells, wide as their text; shade [T] in -1..1, clipped [T] tokens hatched."""
    x, width = 0.0, ax.get_xlim()[1]
    for token, value, silent in zip(tokens, shade, clipped, strict=True):
        text = (
            re.sub("^<.+>$", "EOS", token)
            .replace("Ġ", " ")
            .replace("Ċ", "\n")
            .replace("\n", "↵")
            .strip()
            or "␣"
        )
        wide = len(text) + 0.7  # in characters, as the axis
        if x + wide > width - 2:
            ax.text(x + 0.4, y + 0.5, "…", va="center", fontsize=8)
            break
        look = {
            "fc": colours(0.5 + 0.38 * value),
            "ec": "white",
            "lw": 0.4,
        }  # the map's ends are too dark to read on
        look |= {"ec": "#999999", "hatch": "//////"} if silent else {}
        ax.add_patch(Rectangle((x, y + 0.04), wide, 0.92, **look))
        look = {
            "family": "DejaVu Sans Mono",
            "fontsize": 7.2,
            "color": "white" if abs(value) > 0.75 else "black",
        }
        ax.text(x + wide / 2, y + 0.52, text, ha="center", va="center", parse_math=False, **look)
        x += wide


def plot_credit(path, out, step=None, shown=2):
    """Draws one group of completions under the seven algorithms: of its right and its wrong ones `shown` each, though
    advantages and losses are those of the whole group. path: a run folder or a samples.jsonl. Raises ValueError."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = read_group(Path(path), step)
    given = {
        k: [torch.tensor(row[k]).double() for row in rows]
        for k in ("entropy", "logprobs", "old_logprobs")
    }
    given["mask"] = [torch.ones(len(row["tokens"])) for row in rows]
    given = {k: pad_sequence(x, batch_first=True) for k, x in given.items()}  # [G, T] each
    rewards = torch.tensor([row["reward"] for row in rows]).double()  # [G]
    correct = torch.tensor([row["right"] for row in rows])  # [G]
    picked = []  # the right ones first; of each kind the shortest, the longest and what lies between
    for right in True, False:
        kind = sorted(
            (i for i, row in enumerate(rows) if row["right"] == right),
            key=lambda i: len(rows[i]["tokens"]),
        )
        picked += [
            kind[j] for j in sorted({round(j) for j in np.linspace(0, len(kind) - 1, shown)})
        ]

    panels = [("Entropy", "of the policy that sampled, nats", given["entropy"], given["mask"] < 0)]
    panels += [
        (STYLES[algo][0], note, *push(algo, rewards, correct, **given))
        for algo, note in NOTES.items()
    ]
    panel = 0.29 + 0.19 * len(picked)  # inches, title and rows
    height = 0.42 + len(panels) * panel + 0.5
    figure = Figure(figsize=(8, height))
    caption = (
        f"Step {rows[0]['step']}, {len(picked)} of {len(rows)} completions of: {rows[0]['prompt']}"
    )
    caption = "\n".join(textwrap.wrap(caption, 116, max_lines=2, placeholder=" …"))
    figure.text(0.01, 1 - 0.08 / height, caption, va="top", fontsize=8.5, parse_math=False)
    for i, (name, note, values, clipped) in enumerate(panels, 1):
        at = 0.08, (height - 0.42 - i * panel) / height, 0.915, 0.19 * len(picked) / height
        ax = figure.add_axes(at, xlim=(0, 112), ylim=(len(picked), 0))
        ax.set_axis_off()
        top, colours, sign = values[picked].abs().max().item(), colormaps["RdBu"], "±"
        if name == "Entropy":
            colours, sign = colormaps["PRGn_r"], ""
        ax.set_title(f"{name}: {note}", loc="left", fontsize=9, pad=3)
        ax.set_title(
            f"full colour = {sign}{top:.2g}" if top else "nothing is pushed",
            loc="right",
            fontsize=8,
            pad=3,
        )
        for y, row in enumerate(picked):
            ax.text(
                -1,
                y + 0.5,
                "right" if rows[row]["right"] else "WRONG",
                ha="right",
                va="center",
                fontsize=8,
            )
            shade, silent = (values[row] / (top or 1)).tolist(), clipped[row].tolist()
            tokens = rows[row]["tokens"]
            draw_tokens(ax, y, tokens, shade[: len(tokens)], silent[: len(tokens)], colours)
    keys = (
        ("more likely (−∂loss/∂logprob > 0)", 1, None),
        ("less likely", -1, None),
        ("clipped: exactly 0", 0, "//////"),
    )
    keys = [
        Patch(fc=colormaps["RdBu"](0.5 + 0.38 * v), ec="#999999", hatch=h, label=label)
        for label, v, h in keys
    ]
    look = {
        "frameon": False,
        "fontsize": 8.5,
        "title": "At its default options, the method's update makes a token",
        "title_fontsize": 8.5,
    }
    figure.legend(handles=keys, loc="lower center", ncols=3, **look)
    save(figure, out)


# Command line

EXAMPLES = """examples:
  python plot.py runs/tepo-tiny-s0                      the curves of one run, into its curves.png
  python plot.py runs/*-tiny-s* --out curves.png        methods compared; seeds averaged, with a band
  python plot.py docs/methods.csv --out curves.png      the same from the compact metrics of compare.py
  python plot.py --entropy runs/*-tiny-s*               accuracy against entropy, and the fit R = -a exp(H) + b
  python plot.py --credit runs/tepo-tiny-s0 --step 20   how each of the seven losses pushes each token of one group
"""


class Parser(options.Parser):
    """Refuses a wrong command line in one line, like every other error, with exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv=None):
    parser = Parser(
        "plot.py",
        None,
        "Draw runs of train.py.",
        EXAMPLES,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder of train.py, folder of runs, or .csv of compare.py",
    )
    text = "picture to write; default curves.png, entropy.png or credit.png,\nin RUN if there is one, else here"
    parser.add_argument("--out", metavar="FILE", type=Path, help=text)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--entropy",
        action="store_true",
        help="accuracy against entropy, with the fit of arXiv 2505.22617",
    )
    text = "one group of RUN's samples.jsonl (or of that file) under the seven losses"
    kind.add_argument("--credit", action="store_true", help=text)
    text = "with --credit: the group of this step; default: where the policy had moved most"
    parser.add_argument("--step", type=int, metavar="N", help=text)
    args = parser.parse_args(argv)
    if args.credit and len(args.runs) > 1:
        parser.error("--credit draws one RUN")
    if args.step is not None and not args.credit:
        parser.error("--step goes with --credit")
    home = Path(args.runs[0]) if len(args.runs) == 1 and Path(args.runs[0]).is_dir() else Path()
    name = "credit.png" if args.credit else "entropy.png" if args.entropy else "curves.png"
    out = args.out or home / name
    try:
        if args.credit:
            plot_credit(args.runs[0], out, args.step)
        else:
            (plot_entropy if args.entropy else plot_runs)(read_runs(args.runs), out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(out)


if __name__ == "__main__":
    sys.exit(main())
