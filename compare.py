"""Train several algorithms over several seeds and compare them: a figure, a table, and their .csv.

What follows -- goes to train.py unchanged. Runs that are done are not run again, and interrupted
ones are resumed: after a Ctrl-C the same command continues. A run that was made from other data,
start weights, code or versions is refused. At one seed, all algorithms see the same problems in the
same order, which is why the table takes differences seed by seed.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import textwrap
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from run.commandline import Parser, output_folder, quit_on_interrupt, run_main, writing

if __name__ == "__main__":
    quit_on_interrupt()

from tqdm import tqdm

from run.checks import fill
from run.curves import plot_runs
from run.names import algorithm_names
from run.options import FIELDS, flag
from run.parser import parse
from run.progress import Progress
from run.runs import BAD_VALUE, read_config, read_folder, read_runs
from run.style import method_name, style
from run.table import LAST, cell, per_seed, tabulate, write_csv
from trainer.methods import ALGORITHMS, label

TRAIN = Path(__file__).resolve().parent / "train.py"
OURS = ("--algo", "--seed", "--out", "--resume", "--overwrite", "--eval-only", "--show-prompt")
# The number of draws of an evaluation changes only its pass@k.
NOT_COMPARED = {"out", "overwrite", "threads", "k", "eval_samples"}
MEND = "pass another --out, or --overwrite"
EXAMPLES = """examples:
  python compare.py                                  all seven, seeds 0, 1, 2
  python compare.py --off-policy 1,4,16              1, 4, 16 updates per rollout, at equal samples
  python compare.py --eps 0.2/0.28,3e-4/4e-4         the clip range, of TEPO
  python compare.py --algos tepo,gspo -- --steps 20  shorter, two algorithms
  python compare.py --algos all                      all 28, sorted
  python compare.py --algos tepo,my_method.py        a method of your own (docs/own.md) beside TEPO
  python compare.py --table docs/methods.csv         the table of earlier runs; trains nothing
"""


# The runs


@dataclass
class Run:
    """A run of train.py: its folder and command, its steps, and how many it had before."""

    out: Path
    command: list
    steps: int
    first: int
    is_done: bool
    started: float | None = None  # when, in seconds since the epoch


def plan(args):
    """The Runs, all checked before the first is started. Raises ValueError."""
    ours = {*OURS, "--updates"} if args.off_policy else set(OURS)
    clash = ours & {word.split("=")[0] for word in args.rest}
    if clash:
        raise ValueError(f"{min(clash)} cannot stand after --, compare.py sets it")
    usual = fill(parse(args.rest)).updates
    updates = []  # (part of the folder's name, options); the usual number of updates has no name
    for n in args.off_policy:
        updates.append((f"-u{n}" * (n != usual), ["--updates", str(n)]))
    clips = []
    for low, high in args.eps:
        options = ["--option", f"eps_low={low}", "--option", f"eps_high={high}"]
        clips.append((f"-eps_low{low}-eps_high{high}", options))
    none = [("", [])]
    # Seeds outermost: an evening that ends early leaves every algorithm with equally many seeds.
    product = itertools.product(args.seeds, updates or none, clips or none, args.algos)
    runs = []
    inputs = None  # data and start weights of a new run: the same for all, loaded once
    for seed, (of_updates, update), (of_clip, clip), algo in product:
        out = args.out / f"{label(algo)}-s{seed}{of_updates}{of_clip}"
        flags = [*args.rest, *update, *clip, "--algo", algo, "--seed", str(seed), "--out", str(out)]
        asked = fill(parse(flags))  # refuses what train.py would refuse
        done, first = False, 0
        if args.overwrite:
            flags.append("--overwrite")
        elif (out / "config.json").exists():
            config = checked_config(out)
            different = other_options(config["options"], asked)
            if not different:
                inputs = inputs or data_and_weights(asked)
                different = other_origin(config, inputs, args.keep)
            if different:
                raise ValueError(f"{out} was made with {different}")
            done, first = config["status"] == "done", last_step(out)
            flags = ["--resume", str(out)]
        runs.append(Run(out, [sys.executable, str(TRAIN), *flags], asked.steps, first, done))
    return runs


def checked_config(out):
    """The config.json of a run that has options and a status. Raises ValueError."""
    with contextlib.suppress(*BAD_VALUE):
        config = read_config(out)
        if config["options"]["algo"] and config["status"]:
            return config
    raise ValueError(f"{out}: its config.json cannot be read; delete the run or pass --overwrite")


def data_and_weights(asked):
    """The checksums of data and start weights that train.py would record for a new run."""
    # Here, since torch is imported by them: --help, --table and a first comparison do without.
    from run import origin
    from run.start import set_up

    with contextlib.redirect_stdout(io.StringIO()):  # each run says the same in its own output
        model, _, _, problems, held_out = set_up(replace(asked, device="cpu"))
    data = origin.data_checksum(problems + held_out)
    return {"checksum": data, "weights": origin.weights_checksum(model)}


def other_options(held, asked):
    """Which option a run was made with instead of the one asked for, in words; "" if none."""
    for name, value in sorted(asdict(asked).items()):
        if name not in NOT_COMPARED and held.get(name) != value:
            return f"{name} {held.get(name)!r}, not {value!r}: {MEND}"
    return ""


def other_origin(config, inputs, keep):
    """Which data, start weights, code or versions a run was made with instead of today's, in words.

    "" if none. keep: accept other code and versions.
    """
    from run import origin

    other, o = origin.other_inputs(config, inputs), config["options"]
    if other:
        return f"{other}: {MEND}"
    now = {"code": origin.code_checksums(o["algo"], o.get("reward")), "versions": origin.versions()}
    changed = origin.other_code(config, now)
    if not changed or keep:
        return ""
    mend = "--overwrite trains it again, --keep takes it as it is, another --out leaves it alone"
    return f"other code or versions ({changed}): {mend}"


def train_all(runs, jobs):
    """Train what is not done, `jobs` at a time; show which runs, their steps, and the time left.

    Returns the folders of the runs that are done, in the order of the plan.
    """
    done = [run.out for run in runs if run.is_done]
    first = sum(run.first for run in runs)
    env = dict(os.environ)
    if jobs > 1:
        env["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // jobs))
    with (
        ThreadPoolExecutor(jobs) as pool,
        Progress(f"{len(done)}/{len(runs)} runs", sum(run.steps for run in runs), first) as bar,
    ):
        started = {pool.submit(train, run, env): run for run in runs if not run.is_done}
        waiting = set(started)
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for future in ended:
                    tell_end(started[future], *future.result(), done)
                show(bar, runs, len(done), [run for f, run in started.items() if f.running()])
        except KeyboardInterrupt:
            # The trainers received it too: each finishes its step, saves and ends.
            pool.shutdown(cancel_futures=True)
            raise
    return [run.out for run in runs if run.out in done]


def train(run, env):
    """Run one command. Returns (exit status, the last line of its stderr)."""
    run.started = time.time()
    result = subprocess.run(run.command, env=env, capture_output=True, text=True, errors="replace")
    lines = [line for line in result.stderr.split("\n") if line.strip()]
    return result.returncode, lines[-1] if lines else "no message"


def tell_end(run, status, message, done):
    """Print how a run ended, and add its folder to `done` if it is."""
    run.first, run.started = step_of(run), None
    if status:
        tqdm.write(f"{run.out} failed with exit status {status}: {message}", file=sys.stderr)
        return
    done.append(run.out)
    rows = read_folder(run.out)["rows"]
    first, *_, last = rows.loc[rows["phase"] == "eval", "accuracy"]
    tqdm.write(f"{run.out.name}: greedy {first:.3f} -> {last:.3f}", file=sys.stderr)


def show(bar, runs, done, running):
    """Bring the bar up to date."""
    words = [f"{run.out.name} {step_of(run)}/{run.steps}" for run in running]
    bar.show(sum(map(step_of, runs)), f"{done}/{len(runs)} runs", words)


def step_of(run):
    """The last step of a run in its metrics.jsonl; what it had before until it has a new line."""
    path = run.out / "metrics.jsonl"
    if run.started and path.exists() and path.stat().st_mtime >= run.started:
        return last_step(run.out)
    return run.first


def last_step(out):
    """The step of the last line of metrics.jsonl, 0 if there is none."""
    try:
        lines = (out / "metrics.jsonl").read_bytes().split(b"\n")
        return int(json.loads(lines[-2])["step"])  # after its newline nothing, or a torn line
    except (OSError, *BAD_VALUE, LookupError):
        return 0


# The tables


COMPARED = (  # key of `per_seed`, title in Markdown, title in a terminal, digits, sign
    ("before", "accuracy before", None, 3, ""),
    ("final", "final accuracy", "accuracy", 3, ""),
    ("less", "final less GRPO's", "less GRPO's", 3, "+"),
    ("pass", "pass@{k}", "pass@{k}", 3, ""),
    ("entropy", "entropy left", "entropy", 3, ""),
    ("length", "length", "length", 1, ""),
    ("seconds", "seconds", "seconds", 0, ""),
)
NOTE = f"""
Means over the seeds, ± the half-width of the 95% t-interval over them. Accuracy: greedy, on
held-out problems, at the first evaluation and at the last. Less GRPO's: the difference at equal
seed, and so at equal data order; where its interval holds 0, these seeds do not tell the two apart.
Entropy (nats per token) and length (tokens): rollouts of the last {LAST} training steps. Seconds:
the median step's, rollout and updates, times the steps.
"""


def compared(runs):
    """(rows of `per_seed`, [((variant, algo), how many seeds, cells of COMPARED), ...], the k of
    pass@k as text)."""
    table = tabulate(runs)
    found, rows = per_seed(table), []
    for key, part in found.groupby(level=["variant", "algo"], observed=True):
        columns = [cell(part[name].dropna(), *how) for name, _, _, *how in COMPARED]
        rows.append((key, len(part), columns))
    ks = sorted({int(k) for k in table["k"].dropna() if k})
    return found, rows, "/".join(map(str, ks)) or "k"


def markdown(runs):
    """The comparison in Markdown: one row per method and variant, averaged over seeds."""
    _, rows, k = compared(runs)
    titles = [title.format(k=k) for _, title, *_ in COMPARED]
    lines = [["method", "seeds", *titles], ["---"] * (2 + len(titles))]
    for (variant, algo), seeds, cells in rows:
        lines.append([method_name(algo, variant), str(seeds), *cells])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n{NOTE}"


def aligned(runs):
    """The comparison for a terminal of 80 columns: means, with intervals of accuracies only."""
    found, rows, k = compared(runs)
    lines = [["method", *(title.format(k=k) for _, _, title, *_ in COMPARED if title)]]
    for (_, algo), _, (_, final, less, *others) in rows:
        name = textwrap.shorten(style(algo)[0], 14, placeholder="…")
        lines.append([name, final, less, *(text.split(" ±")[0] for text in others)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    texts = [head]
    for ((variant, _), *_), line in zip(rows, lines, strict=True):
        if variant and f"{variant}:" not in texts:
            texts.append(f"{variant}:")
        texts.append(line)
    seeds = span([seeds for _, seeds, _ in rows], 0)
    before = span(found["before"].dropna(), 3)
    texts.append(f"Greedy accuracy at the last evaluation; at the first it was {before}.")
    means = f"Means of {seeds} seeds, ± the half-width of the 95% t-interval."
    texts.append("One seed, so there are no intervals." if seeds == "1" else means)
    return "\n".join(texts)


def span(values, digits):
    """ "3", or "2 to 3": the lowest and the highest of some numbers."""
    ends = [f"{end(values):.{digits}f}" for end in (min, max) if len(values)]
    return " to ".join(dict.fromkeys(ends)) or "unknown"


# Command line


def counts(text):
    """ "0,1,2" -> [0, 1, 2]. Raises ArgumentTypeError."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers with commas, such as 0,1,2")
    return list(dict.fromkeys(int(part) for part in parts))


def clip_ranges(text):
    """ "0.2/0.28,3e-4/4e-4" -> [("0.2", "0.28"), ("3e-4", "4e-4")]. Raises ArgumentTypeError."""
    ranges = [part.strip() for part in text.split(",")]
    for part in ranges:
        try:
            low, high = map(float, part.split("/"))
            is_range = 0 <= low < math.inf and 0 <= high < math.inf
        except ValueError:
            is_range = False
        if not is_range:
            what = "a range is LOW/HIGH, such as 0.2/0.28; commas between ranges"
            raise argparse.ArgumentTypeError(f"{part!r}: {what}")
    return [tuple(part.split("/")) for part in dict.fromkeys(ranges)]


def build_parser():
    look = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES}
    look["usage"] = "%(prog)s [options] [-- TRAIN-OPTIONS]"
    parser = Parser(prog="compare.py", description=__doc__, **look)
    add = parser.add_argument
    text = "any of the 28, or all; files of your own; default: the seven at the top; with --eps: "
    add("--algos", type=algorithm_names, metavar="A,B", help=f"{text}tepo")
    add("--seeds", type=counts, metavar="N,N", default=[0, 1, 2], help="default: 0,1,2")
    text = "updates per rollout, each a variant"
    add("--off-policy", type=counts, metavar="N,N", default=[], help=text)
    text = "clip ranges, each a variant"
    add("--eps", type=clip_ranges, metavar="LOW/HIGH,...", default=[], help=text)
    text = "runs at a time; they share the cores"
    add("--jobs", type=int, default=1, metavar="N", help=text)
    text = "folder for the runs, the figure, the table and the .csv; default: runs/compare"
    add("--out", type=output_folder, default=Path("runs/compare"), metavar="DIR", help=text)
    add("--overwrite", action="store_true", help="train again what --out holds already")
    text = "take what --out holds, although our code or a version has changed since"
    add("--keep", action="store_true", help=text)
    text = "print the table of these run folders or .csv files, and stop"
    add("--table", nargs="+", metavar="RUN", help=text)
    return parser


def parse_args(argv):
    """The options; `rest` is what follows --. Raises SystemExit."""
    parser = build_parser()
    split = argv.index("--") if "--" in argv else len(argv)
    args, unknown = parser.parse_known_args(argv[:split])
    if unknown:
        parser.error(refusal(parser, unknown))
    args.rest = argv[split + 1 :]
    if args.algos is None:
        args.algos = ["tepo"] if args.eps else list(ALGORITHMS)
    if args.jobs < 1:
        parser.error("--jobs is at least 1")
    return args


def refusal(parser, unknown):
    """The error message for words that are no options, which may be options of train.py."""
    name = unknown[0].split("=")[0]
    if name not in OURS and name in map(flag, [*FIELDS, "beta"]):
        words = shlex.join(unknown)
        return f"{name} is an option of train.py; those go after --: compare.py -- {words}"
    return parser.refusal(unknown[0])


def write_results(args, folders):
    """Draw, save and print the comparison of these runs."""
    kinds = ["off-policy"] * bool(args.off_policy) + ["eps"] * bool(args.eps)
    stem = args.out / ("-".join(kinds) or "methods")
    figure, numbers, text = (Path(f"{stem}.{kind}") for kind in ("png", "csv", "md"))
    runs = read_runs(folders)
    plot_runs(runs, figure)
    with writing(numbers):
        write_csv(runs, numbers)
    with writing(text):
        text.write_text(markdown(runs), encoding="utf-8")
    print(aligned(runs))
    print(figure, numbers, text, sep="\n")


def main(argv=None):
    """Run the command line.

    Returns 0, 1 if a run failed, 2 on a wrong command, 130 after Ctrl-C.
    """
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if args.table:
            print(markdown(read_runs(args.table)), end="")
            return 0
        runs = plan(args)
        args.out.mkdir(parents=True, exist_ok=True)
        done = train_all(runs, args.jobs)
        if done:
            write_results(args, done)
    except (ValueError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0 if len(done) == len(runs) else 1


if __name__ == "__main__":
    run_main(main)
