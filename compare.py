"""Train several algorithms over several seeds and compare them: one figure, one table, one small .csv behind both.

What follows -- goes to train.py as it stands. Runs that are done are not run again and interrupted
ones are resumed: after a Ctrl-C the same command goes on. A run that was made from other data,
start weights, code or versions is refused. At one seed all algorithms see the same problems in the
same order, which is why the table takes differences seed by seed.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from plot import Parser, plot_runs, style
from trainer import origin
from trainer.options import ALGORITHMS, fill, parse
from trainer.runs import group, read_runs, write_csv

TRAIN = Path(__file__).resolve().parent / "train.py"
# Student's t at 97.5% for 1, 2, ... degrees of freedom; beyond the last, that one: a little too wide.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
LAST = 5  # the table's entropy and length are means over so many last training steps
EXAMPLES = """examples:
  python compare.py                                        all seven, seeds 0, 1, 2
  python compare.py --off-policy 1,4,16                    more optimizer steps a rollout, at equal samples
  python compare.py --eps 0.2/0.28,3e-4/4e-4               the clip range, of TEPO
  python compare.py --algos tepo,gspo -- --steps 20        shorter, two algorithms
  python compare.py --table docs/methods.csv               the table of earlier runs; trains nothing
"""


def plan(args):
    """[(run folder, command, is it done)], all checked before the first is started. Raises ValueError."""
    ours = {
        "--algo",
        "--seed",
        "--out",
        "--resume",
        "--overwrite",
        "--eval-only",
        "--show-prompt",
    } | ({"--updates"} if args.off_policy else set())
    clash = ours & {word.split("=")[0] for word in args.rest}
    if clash:
        raise ValueError(f"{min(clash)} cannot stand after --, compare.py sets it")
    updates = [["--updates", str(n)] for n in args.off_policy] or [[]]
    clips = [
        ["--option", f"eps_low={low}", "--option", f"eps_high={high}"] for low, high in args.eps
    ] or [[]]
    usual, runs = fill(parse(args.rest)).updates, []
    inputs = None  # data and start weights of a new run: the same for all, asked for once
    # Seeds outermost: an evening that ends early leaves every algorithm with equally many.
    for seed, update, clip, algo in itertools.product(args.seeds, updates, clips, args.algos):
        # A variant that is the default has the name, and so the folder, of the run without variants.
        varied = [f"u{n}" for n in update[1:] if int(n) != usual] + [
            c.replace("=", "") for c in clip[1::2]
        ]
        name = "-".join([algo, f"s{seed}", *varied])
        out = args.out / name
        flags = [*args.rest, *update, *clip, "--algo", algo, "--seed", str(seed), "--out", str(out)]
        asked, done = fill(parse(flags)), False  # refuses what train.py would refuse
        if args.overwrite:
            flags.append("--overwrite")
        elif (out / "config.json").exists():
            config = read_config(out)
            refuse_other_options(out, config["options"], asked)
            inputs = inputs or data_and_weights(asked)
            refuse_other_origin(out, config, inputs, algo, args.keep)
            done = config["status"] == "done"
            flags = ["--resume", str(out)]
        runs.append((out, [sys.executable, str(TRAIN), *flags], done))
    return runs


def read_config(out):
    """The config.json of a run, with its options and status. Raises ValueError."""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        config["options"].items(), config["status"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{out}: its config.json cannot be read; delete the run or pass --overwrite"
        ) from None
    return config


def refuse_other_options(out, held, asked):
    """ValueError if the run was made with other options than are asked for."""
    asked = asdict(asked)
    # How many draws its evaluations make changes nothing of a run but its pass@k.
    for key in sorted(asked.keys() - {"out", "overwrite", "threads", "k", "eval_samples"}):
        if held.get(key) != asked[key]:
            was = f"{key} {held.get(key)!r}, not {asked[key]!r}"
            raise ValueError(f"{out} was made with {was}: pass another --out, or --overwrite")


def data_and_weights(asked):
    """The checksums of data and start weights that train.py would record for a new run."""
    from trainer.data import checksum  # here: --table and a first comparison need none of it
    from trainer.start import set_up

    with contextlib.redirect_stdout(io.StringIO()):  # each run says the same in its own output
        model, _, _, problems, held_out = set_up(replace(asked, device="cpu"))
    return {
        "checksum": checksum(problems + held_out),
        "weights": origin.weights_checksum(model),
    }


def refuse_other_origin(out, config, inputs, algo, keep):
    """ValueError if a new run would have other data, start weights, code or versions.

    keep: accept other code and versions.
    """
    other = origin.other_inputs(config, inputs)
    if other:
        raise ValueError(f"{out} was made with {other}: pass another --out, or --overwrite")
    now = {"code": origin.code_checksums(algo), "versions": origin.versions()}
    changed = origin.other_code(config, now)
    if changed and not keep:
        raise ValueError(
            f"{out} was made with other code or versions ({changed}): --overwrite trains it again, "
            f"--keep takes it as it is, another --out leaves it alone"
        )


def train_all(runs, jobs):
    """Runs the commands of `plan`, `jobs` at a time, with a bar. Returns the folders of those that are done."""
    done = [out for out, _, ready in runs if ready]
    bar = tqdm(total=len(runs), initial=len(done), unit="run", desc=f"{len(done)} done before")
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {}

    def train(out, command):
        result = subprocess.run(
            command, env=os.environ | threads, capture_output=True, text=True, errors="replace"
        )
        lines = result.stderr.replace("\r", "\n").split(
            "\n"
        )  # progress bars end their lines with \r
        return (
            out,
            result.returncode,
            next((line for line in reversed(lines) if line.strip()), "no message"),
        )

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed(
                [pool.submit(train, out, command) for out, command, ready in runs if not ready]
            ):
                out, status, message = future.result()
                if status == 0:
                    done.append(out)
                else:
                    bar.write(f"{out} failed with exit status {status}: {message}", file=sys.stderr)
                bar.set_description(out.name)
                bar.update()
        except KeyboardInterrupt:  # the trainers got it too: each finishes its step, saves and ends
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            bar.close()
    return [out for out, _, _ in runs if out in done]


def mean_interval(values):
    """The mean of numbers and the half-width of its 95% t-interval, None of a single one."""
    n = len(values)
    half = T975[min(n - 1, len(T975)) - 1] * statistics.stdev(values) / n**0.5 if n > 1 else None
    return statistics.fmean(values), half


def cell(values, digits, sign=""):
    """Mean ± half-width of the seeds' values, those that are None left out; a dash where none is left."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    mean, half = mean_interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def table(runs):
    """The markdown table of some runs: a row a method and variant, seeds averaged."""

    def values(run, phase, key):
        return [row[key] for row in run["rows"] if row["phase"] == phase and row[key] is not None]

    def at_end(run, phase, key, n=1):
        return statistics.fmean(values(run, phase, key)[-n:]) if values(run, phase, key) else None

    def typical(seconds):
        """Of the whole run, did every step take the median step's: a machine put to sleep does not count."""
        return statistics.median(seconds) * len(seconds) if seconds else None

    ks = sorted({int(k) for run in runs for k in values(run, "eval", "k") if k})
    lines = [
        ["method", "seeds", "accuracy before", "final accuracy", "final less GRPO's"]
        + [f"pass@{'/'.join(map(str, ks)) or 'k'}", "entropy left", "length", "seconds"]
    ]
    lines.append(["---"] * len(lines[0]))
    for variant, algos in group(runs).items():
        grpo = {run["seed"]: at_end(run, "eval", "accuracy") for run in algos.get("grpo", [])}
        for algo, seeds in algos.items():
            final = [at_end(run, "eval", "accuracy") for run in seeds]
            pairs = [
                (mine, grpo.get(run["seed"]))
                for mine, run in zip(final, seeds, strict=True)
                if algo != "grpo"
            ]
            lines.append(
                [
                    style(algo)[0] + (f", {variant}" if variant else ""),
                    str(len(seeds)),
                    cell([next(iter(values(run, "eval", "accuracy")), None) for run in seeds], 3),
                    cell(final, 3),
                    cell(
                        [mine - theirs for mine, theirs in pairs if None not in (mine, theirs)],
                        3,
                        "+",
                    ),
                    cell([at_end(run, "eval", "pass_at_k") for run in seeds], 3),
                    cell([at_end(run, "train", "entropy", LAST) for run in seeds], 3),
                    cell([at_end(run, "train", "length", LAST) for run in seeds], 1),
                    cell([typical(values(run, "train", "seconds")) for run in seeds], 0),
                ]
            )
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        + f"""

Means over the seeds, ± the half-width of the 95% t-interval over them. Accuracy: greedy, on held-out problems, before
the first step and after the last. Less GRPO's: the difference at equal seed, and so at equal data order; where its
interval holds 0, these seeds do not tell the two apart. Entropy (nats per token) and length (tokens): rollouts of the
last {LAST} training steps. Seconds: the median step's, rollout and updates, times the steps.
"""
    )


def algorithms(text):
    """ "tepo,grpo" -> ["tepo", "grpo"]. Raises ArgumentTypeError for a name that is none."""
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            raise argparse.ArgumentTypeError(f"no algorithm {name!r}; there are {known}")
    return names


def counts(text):
    """ "0,1,2" -> [0, 1, 2]. Raises ArgumentTypeError."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers with commas, such as 0,1,2")
    return list(dict.fromkeys(int(part) for part in parts))


def clip_ranges(text):
    """ "0.2/0.28,3e-4/4e-4" -> [("0.2", "0.28"), ("3e-4", "4e-4")]. Raises ArgumentTypeError."""
    pairs = [tuple(part.split("/")) for part in text.split(",")]
    for pair in pairs:
        if len(pair) != 2 or not all(is_clip_bound(bound) for bound in pair):
            raise argparse.ArgumentTypeError(
                f"{'/'.join(pair)!r}: a range is LOW/HIGH, such as 0.2/0.28; commas between ranges"
            )
    return list(dict.fromkeys(pairs))


def is_clip_bound(text):
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False


def parse_args(argv):
    """The options; `rest` is what follows --. Raises SystemExit."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        "compare.py",
        "%(prog)s [options] [-- TRAIN-OPTIONS]",
        __doc__,
        EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument(
        "--algos", type=algorithms, metavar="A,B", help="default: all seven; with --eps: tepo"
    )
    parser.add_argument(
        "--seeds", type=counts, metavar="N,N", default=[0, 1, 2], help="default: 0,1,2"
    )
    parser.add_argument(
        "--off-policy",
        type=counts,
        metavar="N,N",
        default=[],
        help="updates a rollout, each a variant",
    )
    parser.add_argument(
        "--eps",
        type=clip_ranges,
        metavar="LOW/HIGH,...",
        default=[],
        help="clip ranges, each a variant",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time, the cores split among them",
    )
    text = "folder for the runs, the figure, the table and the .csv; default: runs/compare"
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="DIR", help=text)
    parser.add_argument(
        "--overwrite", action="store_true", help="train again what --out holds already"
    )
    text = "take what --out holds, although our code or a version has changed since"
    parser.add_argument("--keep", action="store_true", help=text)
    text = "print the table of these run folders or .csv files, and stop"
    parser.add_argument("--table", nargs="+", metavar="RUN", help=text)
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.rest = argv[split + 1 :]
    args.algos = args.algos or (["tepo"] if args.eps else list(ALGORITHMS))
    if args.jobs < 1:
        parser.error("--jobs is at least 1")
    return args


def main(argv=None):
    """Runs the command line; returns 0, 1 if a run failed, 2 on a wrong command, 130 after Ctrl-C."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if args.table:
            print(table(read_runs(args.table)), end="")
            return 0
        runs = plan(args)
        args.out.mkdir(parents=True, exist_ok=True)
        done = train_all(runs, args.jobs)
        if done:
            stem = (
                "-".join(["off-policy"] * bool(args.off_policy) + ["eps"] * bool(args.eps))
                or "methods"
            )
            files = [args.out / f"{stem}.{kind}" for kind in ("png", "csv", "md")]
            read = read_runs(done)
            plot_runs(read, files[0])
            write_csv(read, files[1])
            files[2].write_text(table(read), encoding="utf-8")
            print(table(read))
            print(*files, sep="\n")
    except (ValueError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0 if len(done) == len(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
