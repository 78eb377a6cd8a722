"""Figures of runs: learning curves, entropy against accuracy, and the credit picture.

`python plot.py --help`. Runs are read from folders that train.py wrote, from files of minimal.py
--log, or from a .csv of many runs, the compact form that compare.py writes and docs/ keeps.
"""

import argparse
import math
from pathlib import Path

from run.commandline import Parser, output_file, quit_on_interrupt, run_main

if __name__ == "__main__":
    quit_on_interrupt()

import numpy as np

from run.curves import SMOOTH, of_curve, plot_runs
from run.names import algorithm_names
from run.runs import read_runs
from run.style import looks_of, new_figure, save
from run.table import tabulate
from trainer.methods import ALGORITHMS

EXAMPLES = """examples:
  python plot.py runs/tepo-tiny-s0                  curves of one run, into its curves.png
  python plot.py runs/*-tiny-s* --out curves.png    several methods; seeds averaged, with a band
  python plot.py runs/a runs/b --metrics kl,prompts,grad_norm --smooth 10
      any metrics of docs/metrics.md, a panel each; eval/length: that of the evaluations
  python plot.py docs/methods.csv --out curves.png  the same from the metrics that compare.py keeps
  python plot.py --entropy runs/*-tiny-s*           accuracy against entropy; R = -a exp(H) + b
  python plot.py --credit runs/tepo-tiny-s0 --step 20
      how each of the seven losses pushes each token of one group; --algos all: all 28
"""


def fit_entropy(entropy, accuracy):
    """(a, b, off) of the least-squares fit accuracy = -a exp(entropy) + b, of arXiv 2505.22617.

    entropy [N] in nats, accuracy [N]. off: the largest mean error over a tenth of the points,
    ordered by entropy. Noise of single points averages out; what is left is the wrong form of the
    curve. All NaN where the points do not determine a line.
    """
    x = np.exp(entropy)
    if len(x) < 3 or np.ptp(x) < 1e-9 or np.ptp(accuracy) < 1e-9:
        return math.nan, math.nan, math.nan
    slope, b = np.polyfit(x, accuracy, 1)
    error = (accuracy - (b + slope * x))[np.argsort(entropy)]
    off = max(abs(part.mean()) for part in np.array_split(error, 10) if len(part))
    return -slope, b, off


def plot_entropy(runs, out):
    """Draw accuracy against entropy [nats] of every training step, and the fit to all of them.

    Both are of the rows trained on. Files from before accuracy_trained was logged have `accuracy`
    alone, which without --dynamic-sampling is the same. Prints the fit of each method, and how far
    it is off.
    """
    table, figure = tabulate(runs), new_figure(8, 5.6)
    ax, looks = figure.subplots(), looks_of(table)
    accuracy = table["accuracy_trained"].fillna(table["accuracy"])
    table = table.assign(accuracy=accuracy)[table["phase"] == "train"]
    table = table.dropna(subset=["entropy", "accuracy"])
    print(f"{'R = -a exp(H) + b':<32} {'a':>8} {'b':>8} {'off by':>7} {'points':>7}")
    for curve, (name, colour, _, marker) in [*looks.items(), (None, ("all", None, None, None))]:
        points = of_curve(table, curve) if curve else table
        entropy, accuracy = points[["entropy", "accuracy"]].to_numpy().T
        a, b, off = fit_entropy(entropy, accuracy)
        if curve or len(looks) > 1:
            name = name.replace("\n", ", ")
            print(f"{name:<32} {a:8.3f} {b:8.3f} {off:7.3f} {len(points):7d}")
        if curve:
            how = {"color": colour, "marker": marker, "label": name}
            ax.scatter(entropy, accuracy, s=9, lw=0, alpha=0.45, **how)
    if math.isfinite(a):
        grid = np.linspace(entropy.min(), entropy.max(), 50)
        label = f"least-squares fit −{a:.2f} exp(H) + {b:.2f},\noff by up to {off:.2f}"
        ax.plot(grid, b - a * np.exp(grid), color="0.25", lw=1.6, label=label)
    ax.set(xlabel="entropy H [nats per token]", ylabel="accuracy R of the training rollouts")
    ax.grid(alpha=0.25)
    for handle in ax.legend(fontsize=8, markerscale=1.8).legend_handles:
        handle.set_alpha(1)
    note = "Off by: the largest mean error over a tenth of the points, ordered by entropy."
    figure.supxlabel(f"A point is the mean of one training step of one seed. {note}", fontsize=8)
    save(figure, out)


def build_parser():
    parser = Parser(
        prog="plot.py",
        description="Draw runs of train.py.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    text = "run folder of train.py, folder of runs, .csv of compare.py, or log of minimal.py"
    add("runs", nargs="+", metavar="RUN", help=text)
    text = "picture to write; default curves.png, entropy.png or credit.png,\n"
    text += "in RUN if it is one folder, else here"
    add("--out", metavar="FILE", type=output_file, help=text)
    text = "a panel for each of these keys of metrics.jsonl, such as kl,reward/format"
    add("--metrics", type=lambda text: text.split(","), metavar="A,B", help=text)
    text = f"average training metrics over N steps (default {SMOOTH}); 1: as they are"
    add("--smooth", type=int, metavar="N", help=text)
    kind = parser.add_mutually_exclusive_group()
    text = "accuracy against entropy, with the fit of arXiv 2505.22617"
    kind.add_argument("--entropy", action="store_true", help=text)
    text = "one group of RUN's samples.jsonl (or of that file) under several losses"
    kind.add_argument("--credit", action="store_true", help=text)
    text = "with --credit: the group of this step; default: where the policy had moved most"
    add("--step", type=int, metavar="N", help=text)
    text = "with --credit: these methods, or files of your own, or all; default: the seven"
    add("--algos", type=algorithm_names, metavar="A,B", help=text)
    return parser


def main(argv=None):
    """Run the command line. Raises SystemExit with status 2 on an error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.credit and len(args.runs) > 1:
        parser.error("--credit draws one RUN")
    drawn = "--credit" if args.credit else "--entropy" if args.entropy else "curves"
    for name in ("step", "algos", "metrics", "smooth"):
        kind = "--credit" if name in ("step", "algos") else "curves"
        if getattr(args, name) is not None and kind != drawn:
            parser.error(f"--{name} goes with {kind}")
    if args.smooth is not None and args.smooth < 1:
        parser.error(f"--smooth {args.smooth}: the least is 1")
    first = Path(args.runs[0])
    name = f"{drawn.removeprefix('--')}.png"
    out = args.out or (first / name if len(args.runs) == 1 and first.is_dir() else Path(name))
    try:
        if args.credit:
            from tools.credit import plot_credit

            plot_credit(first, out, args.step, algos=args.algos or ALGORITHMS)
        else:
            runs = read_runs(args.runs)
            if all(run["rows"].empty for run in runs):
                raise ValueError("no metrics so far in what is to be drawn")
            if args.entropy:
                plot_entropy(runs, out)
            else:
                plot_runs(runs, out, args.metrics or (), args.smooth or SMOOTH)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    print(out)


if __name__ == "__main__":
    run_main(main)
