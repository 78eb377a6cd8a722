"""The seven on a task with room: the embedded problems, but with three to six steps.

    python claims/room.py                # 21 runs into runs/room: about 20 minutes on two cores

The embedded task (two to five steps) is nearly solved after 100 training steps, and what is nearly
solved cannot tell methods apart. The same generator makes longer problems. The start model, which
has never seen six steps, solves fewer of them, and the runs end before they level out at the top.

Per method: greedy accuracy on 500 held-out problems after the last step, and its mean over the
evaluations after the start, which measures speed. Each less GRPO's at equal seed. As in apart.py
the residual of method + seed is pooled over all methods; p-values are Holm's for the number of
methods. (To see a difference in four of five experiments, it has to be 1.4 times the half-width.)
A mean over evaluations hides where curves cross; `--redraw` prints the differences at each step.
Six seeds, run later for a review and not kept, confirmed that GRPO-S is slower and saw no
difference of TEPO's mean.

`runs/room` is compare.py's folder: what is done is not trained again.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when run as a script

import numpy as np
from scipy import stats

import compare
from claims import kit
from claims.apart import residual
from run.commandline import Parser, output_file, output_folder
from run.curves import plot_runs
from run.runs import ORDER, is_run, read_runs
from run.style import style
from run.table import write_csv
from tiny.problems import problems
from trainer.methods import ALGORITHMS

OUT = Path(__file__).with_suffix(".png")
FEWEST, MOST = 3, 6  # steps of a problem
SIZES = {"train": 20_000, "test": 500}  # problems
FLAGS = ["--max-new-tokens", "96", "--steps", "70", "--eval-every", "10", "--k", "0"]


def write_problems(folder):
    """The data folder of train.py: train.jsonl and test.jsonl, the same on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in SIZES.items():
        lines = [json.dumps(p) + "\n" for p in problems(count, 0, split, FEWEST, MOST)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def evaluations(run):
    """The rows of one run's evaluations."""
    return run["rows"][run["rows"]["phase"] == "eval"]


def measures(run):
    """{name: greedy accuracy} of one run: after its last step, and the mean of all evaluations."""
    found = evaluations(run)["accuracy"].tolist()
    return {"final": found[-1], "mean": sum(found[1:]) / len(found[1:])}


def against_grpo(runs, measure):
    """{algo: (difference to GRPO at equal seed, its half-width, p by Holm)}; None of one seed.

    measure(run) -> a number. Of GRPO: its own mean, None, None.
    """
    seeds = sorted({run["seed"] for run in runs})
    found = {(run["algo"], run["seed"]): measure(run) for run in runs}
    algos = sorted({algo for algo, _ in found}, key=[*ORDER, *{a for a, _ in found}].index)
    values = np.array([[found[algo, seed] for seed in seeds] for algo in algos])  # [methods, seeds]
    base = values[algos.index("grpo")]
    if len(seeds) < 2 or len(algos) < 2:
        pairs = zip(algos, values, strict=True)
        return {a: ((v - (a != "grpo") * base).mean(), None, None) for a, v in pairs}
    variance, freedom = residual(values)
    error = np.sqrt(2 * variance / len(seeds))
    half, others = stats.t.ppf(0.975, freedom) * error, [a for a in algos if a != "grpo"]
    less = [(values[algos.index(algo)] - base).mean() for algo in others]
    p = kit.holm([2 * stats.t.sf(abs(x) / error, freedom) for x in less])
    rows = {a: (x, half, q) for a, x, q in zip(others, less, p, strict=True)}
    return {"grpo": (base.mean(), None, None), **rows}


def say(runs):
    """The table's lines, and the differences to GRPO at each evaluation."""
    columns = [
        against_grpo(runs, lambda run, n=name: measures(run)[n]) for name in ("final", "mean")
    ]
    lines = ["| method | final accuracy less GRPO's | p | mean accuracy less GRPO's | p |"]
    lines.append("|---|---|---|---|---|")
    for algo in columns[0]:
        cells = [style(algo)[0] + (" (itself)" if algo == "grpo" else "")]
        for column in columns:
            difference, half, p = column[algo]
            text = f"{difference:{'' if algo == 'grpo' else '+'}.3f}"
            cells += [
                text + (f" ± {half:.3f}" if half else ""),
                f"{p:.2g}" if p is not None else "",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    for i, step in list(enumerate(evaluations(runs[0])["step"]))[1:]:
        column = against_grpo(runs, lambda run, i=i: evaluations(run)["accuracy"].iloc[i])
        texts = [
            f"{style(algo)[0]} {x:+.3f}" for algo, (x, _, _) in column.items() if algo != "grpo"
        ]
        lines.append(f"step {step}, less GRPO's {column['grpo'][0]:.3f}: {', '.join(texts)}")
    return lines


def by_steps(run):
    """The lines of --by-steps: of how many held-out problems the run's model solves how many."""
    data = run.parent / "data"
    if not (is_run(run) and data.is_dir()):
        raise ValueError(f"--by-steps {run}: not a run of this script, such as runs/room/grpo-s0")
    flags = ["--model", str(run), "--data", str(data), *FLAGS[:2]]
    asked, solved = Counter(), Counter()
    with kit.trainer("grpo", *flags) as (trainer, held_out):
        for problem, right in zip(held_out, kit.greedy(trainer, held_out), strict=True):
            steps = problem["answer"].count("\n")  # a line per step, then the answer's
            asked[steps] += 1
            solved[steps] += int(right)
    return [f"{n} steps: {solved[n]} of {asked[n]}" for n in sorted(asked)]


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--algos", default=",".join(ALGORITHMS), metavar="A,B", help="default: the seven")
    add("--seeds", default="0,1,2", metavar="N,N", help="default 0,1,2")
    add("--jobs", type=int, default=2, help="runs at a time (default 2)")
    add("--runs", type=output_folder, default=Path("runs/room"), help="their folder (runs/room)")
    add("--out", type=output_file, default=OUT, help=f"the figure (default {OUT.name})")
    add("--redraw", action="store_true", help="figure and table of the .csv; trains nothing")
    text = "print what the model of a run solves, by steps of the problem, and stop"
    add("--by-steps", type=Path, metavar="RUN", help=text)
    args = parser.parse_args(argv)
    return kit.status_of(lambda: work(args))


def work(args):
    """What the command line asks for."""
    if args.by_steps:
        print("\n".join(by_steps(args.by_steps)))
        return
    table = args.out.with_suffix(".csv")
    if not args.redraw:
        data = write_problems(args.runs / "data")
        ours = ["--algos", args.algos, "--seeds", args.seeds]
        ours += ["--jobs", str(args.jobs), "--out", str(args.runs)]
        if compare.main([*ours, "--", "--preset", "tiny", "--data", str(data), *FLAGS]):
            raise ValueError("some run did not end; the same command goes on from here")
        table.parent.mkdir(parents=True, exist_ok=True)
        write_csv(read_runs([args.runs]), table)
    if not table.exists():
        raise ValueError(f"no {table} to draw: run it without --redraw first")
    runs = read_runs([table])
    plot_runs(runs, args.out)
    print("\n".join([*say(runs), f"wrote {args.out}"]))


if __name__ == "__main__":
    sys.exit(main())
