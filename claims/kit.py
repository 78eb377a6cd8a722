"""What the experiments of claims/ share: a trainer in this process, the .csv, the command line.

An experiment is three functions: `measure(args)` returns rows (dicts of numbers and texts),
`draw(rows, out)` makes the figure of them, and `say(rows)` returns the lines to print, with the
numbers that CLAIMS.md quotes. Both see the rows as the .csv holds them, so `--redraw` gives the
same figure and the same lines without measuring again.
"""

import argparse
import contextlib
import csv
import io
import math
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, in a worker too

from scipy import stats
from tqdm import tqdm

from run.commandline import Parser, output_file
from run.table import cell, mean_interval


@contextlib.contextmanager
def trainer(algo, *flags, seed=0):
    """(Trainer, held-out problems) of the embedded task; flags: further options of train.py.

    `trainer.step(n)` for n = 1, 2, ... trains. The run's folder is deleted at the end.
    """
    import train
    from run import start

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        argv = ["--preset", "tiny", "--algo", algo, "--seed", str(seed), "--threads", "1"]
        argv += ["--device", "cpu", "--k", "0", "--out", str(out), *flags]
        with contextlib.redirect_stdout(io.StringIO()):  # the lines of a run's start
            run = start.chosen(train.parse(argv))
            prepared, held_out, *_ = train.prepare(*run, resume=False)
        yield prepared, held_out


def watch(trainer, look):
    """A list that each update adds look(rollout, rows, gradient, loss_inputs) to, before its step.

    rows: of the mini-batch. gradient: dL/dlogp [B, T]. loss_inputs: the loss's keyword arguments.
    rollout.logprobs of these rows are current. Nothing of the update changes.
    """
    seen, updater = [], trainer.updater
    statistics = updater.statistics

    def watched(*update):
        seen.append(look(*update))
        return statistics(*update)

    updater.statistics = watched
    return seen


def rollout(trainer, problems):
    """G graded completions of each problem from the current policy; no training step."""
    batch = trainer.sample([problem["prompt_ids"] for problem in problems], trainer.o.group_size)
    trainer.grade(batch, problems)
    return batch


def greedy(trainer, problems):
    """[1 or 0, ...]: whether the greedy completion of each problem is right."""
    from trainer import evaluate

    how = {"rows_at_once": 256, **trainer.generation}
    batch, _ = evaluate.completions(trainer.model, problems, 0, 1.0, how)
    texts = evaluate.decode(trainer.tokenizer, batch)
    return evaluate.grade(trainer.grader.right, texts, problems, batch)


def each(work, tasks, jobs):
    """[row, ...] of work(task) -> [row, ...] for every task, in their order, `jobs` at a time."""
    with contextlib.ExitStack() as stack:
        results = map(work, tasks)
        if jobs > 1:
            context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads
            results = stack.enter_context(ProcessPoolExecutor(jobs, context)).map(work, tasks)
        return [row for rows in tqdm(results, total=len(tasks), unit="run") for row in rows]


def runs_of(rows, **wanted):
    """The rows with these values in these columns, a list per seed, in the order of the seeds."""
    runs = {}
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            runs.setdefault(row["seed"], []).append(row)
    return [runs[seed] for seed in sorted(runs)]


def values(rows, key, **wanted):
    """The values of one column in the rows that agree with `wanted`: one per seed."""
    return [row[key] for row in rows if all(row[k] == v for k, v in wanted.items())]


def fisher(correlations):
    """(mean, low, high) of correlations: mean and 95% t-interval of atanh r, turned back.

    On this scale an interval ends within -1 and 1. low and high are the mean for a single value.
    """
    centre, half = mean_interval([math.atanh(min(r, 1 - 1e-9)) for r in correlations])
    return tuple(math.tanh(centre + sign * (half or 0)) for sign in (0, -1, 1))


def fisher_cell(correlations, digits=2):
    """ "0.84 (0.60 to 0.94)"."""
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*fisher(correlations), d=digits)


def holm(p):
    """p-values, each corrected for the number of those that are not smaller."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def compared(differences, digits):
    """Texts "+0.010 ± 0.020, p 0.1" of lists of paired differences, p by Holm over all of them."""
    several = all(len(values) > 1 for values in differences)
    p = holm([stats.ttest_1samp(x, 0).pvalue for x in differences]) if several else []
    texts = [cell(values, digits, "+") for values in differences]
    return [f"{text}, p {q:.2g}" for text, q in zip(texts, p, strict=True)] if several else texts


def write_rows(path, rows):
    """Write the .csv: numbers to five digits."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: rounded(value) for key, value in row.items()})


def rounded(value):
    """A number to five digits; a text, an integer and None as they are."""
    return f"{value:.5g}" if isinstance(value, float) else value


class Row(dict):
    """A row of a .csv. A column that is not there is an error of the file, not of our code."""

    def __missing__(self, column):
        raise ValueError(f"it has no column {column!r}, only {', '.join(self)}")


def read_rows(path):
    """The rows of a .csv; what reads as a number is one, and nothing is None.

    Raises ValueError if there is no such file, or no table in it.
    """
    if not path.exists():
        raise ValueError(f"no {path} to draw: run it without --redraw first")
    rows = []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        for cells in reader:
            if None in cells or None in cells.values():  # more cells, or fewer
                line = f"line {reader.line_num} does not have as many cells as line 1"
                raise ValueError(f"{path}: {line}")
            rows.append(Row({name: read(text) for name, text in cells.items()}))
    if not rows:
        raise ValueError(f"{path}: no rows in it; measure again, without --redraw")
    return rows


def read(text):
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text or None


def build_parser(doc, name):
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    add("--out", type=output_file, default=Path(name).with_suffix(".png"), help="the figure")
    add("--redraw", action="store_true", help="figure and lines of the .csv; measures nothing")
    return parser


def command(doc, name, measure, draw, say, argv=None):
    """Measure, write the .csv and the figure, print the lines. name: the experiment's __file__.

    Returns the exit status.
    """
    args = build_parser(doc, name).parse_args(argv)

    def work():
        table = args.out.with_suffix(".csv")
        if not args.redraw:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_rows(table, measure(args))
        rows = read_rows(table)
        try:
            lines = say(rows)
            draw(rows, args.out)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            if not args.redraw:
                raise
            reason = error if isinstance(error, ValueError) else repr(error)
            ours = f"is it a table of {Path(name).name}?"
            raise ValueError(f"{table} cannot be drawn: {reason}; {ours}") from None
        wrote = f"wrote {args.out}" + ("" if args.redraw else f" and {table}")
        print("\n".join([*lines, wrote]))

    return status_of(work)


def status_of(work):
    """Run work(); an error that the user can mend is printed in one line. -> the exit status"""
    try:
        work()
    except (OSError, ValueError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
