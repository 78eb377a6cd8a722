"""Runs as data: read from folders or .csv files, grouped by what differs, averaged over seeds.

A run is {"algo", "seed", "settings": {option: value}, "rows": [{"phase", "step", and COLUMNS}]}.
"""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np

ORDER = ("grpo", "dapo", "gspo", "tepo", "gtpo", "grpo_s", "trgrpo")
COLUMNS = (
    "accuracy",
    "accuracy_trained",
    "ci_lo",
    "ci_hi",
    "entropy",
    "length",
    "clip_frac",
    "pass_at_k",
    "k",
    "n",
    "seconds",
)
# Options that leave an experiment what it is; any other in which runs of one algorithm differ makes them variants.
SAME = """algo preset seed option out overwrite resume steps device threads micro_batch sample_batch
    gradient_checkpointing eval_every eval_n eval_only eval_samples k samples_every save_every
    show_prompt""".split()  # noqa: SIM905


# Reading and writing runs


def read_jsonl(path):
    """[(line number, object), ...]. A torn last line is left out: the run is writing it, or was killed while it did.
    Raises ValueError at any other line that is no JSON object."""
    lines, objects = path.read_text(encoding="utf-8", errors="replace").split("\n"), []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line) if line.strip() else {}
            if not isinstance(value, dict):
                raise ValueError
        except ValueError:
            if number == len(lines):  # no newline behind it
                break
            raise ValueError(f"{path}: line {number} is not a JSON object") from None
        if value:
            objects.append((number, value))
    return objects


def finite(value):
    """A float, or None for what cannot be drawn: null, NaN, an empty cell."""
    return None if value in (None, "") or not math.isfinite(float(value)) else float(value)


def add_row(run, row, where):
    """Appends a line of metrics to a run; ValueError, saying where, if it is none."""
    try:
        values = {column: finite(row.get(column)) for column in COLUMNS}
        run["rows"].append({"phase": row["phase"], "step": int(row["step"])} | values)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where} is not a line of metrics") from None


def read_folder(folder):
    """The run in a folder of train.py. Raises ValueError."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder}: no metrics.jsonl in it, so it is not a run of train.py")
    try:
        options = json.loads((folder / "config.json").read_text(encoding="utf-8"))["options"]
        settings = {k: v for k, v in options.items() if k not in SAME} | options.get("option", {})
        run = {
            "algo": options["algo"],
            "seed": int(options["seed"]),
            "settings": settings,
            "rows": [],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{folder}: config.json is missing or does not say algo and seed"
        ) from None
    for number, row in read_jsonl(path):
        low, high = row.get("ci95") or (None, None)
        seconds = (row.get("rollout_s") or 0) + (row.get("update_s") or 0)
        add_row(
            run, row | {"ci_lo": low, "ci_hi": high, "seconds": seconds}, f"{path}: line {number}"
        )
    return run


def read_csv(path):
    """The runs in a file of `write_csv`, in its order. Raises ValueError."""
    runs = {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            where = f"{path}: line {number}"
            try:
                algo, seed, settings = key = row["algo"], int(row["seed"]), row["settings"]
                settings = dict(pair.split("=", 1) for pair in settings.split(";") if pair)
                settings = {k: json.loads(v) for k, v in settings.items()}
            except (KeyError, TypeError, ValueError, AttributeError):
                raise ValueError(f"{where} is not a line of compare.py's metrics") from None
            add_row(
                runs.setdefault(
                    key, {"algo": algo, "seed": seed, "settings": settings, "rows": []}
                ),
                row,
                where,
            )
    if not runs:
        raise ValueError(f"{path}: no metrics in it")
    return list(runs.values())


def read_runs(paths):
    """All runs of some folders and .csv files.

    A folder that is no run but holds some, as compare.py makes it, stands for those. What is no run
    is skipped with a note on stderr. Raises ValueError, one line, if no run is left.
    """
    runs, notes, inside = [], [], []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: no such run")
        if is_run(path):
            runs.append(read_folder(path))
        elif path.is_dir() and any(map(is_run, path.iterdir())):
            inside += sorted(filter(is_run, path.iterdir()))
        elif path.suffix == ".csv":
            runs += read_csv(path)
        else:
            notes.append(why_no_run(path))
    for path in inside:  # last: of two equal runs the one that was named itself is taken
        run = read_folder(path)
        if any(same_experiment(run, other) for other in runs):
            notes.append(f"{path}: another run of the same algorithm, seed and settings is taken")
        else:
            runs.append(run)
    if not runs:
        raise ValueError("; ".join(notes))
    for note in notes:
        print(f"note: skipped {note}", file=sys.stderr)
    return runs


def is_run(path):
    return (path / "metrics.jsonl").is_file()


def why_no_run(path):
    """A line for a path that is neither a run nor holds one."""
    if not path.is_dir():
        return f"{path}: neither a run's folder nor a .csv"
    if (path / "eval.json").is_file():
        return f"{path}: an evaluation, no run"
    return f"{path}: no metrics.jsonl in it, so it is not a run of train.py"


def same_experiment(run, other):
    return all(run[key] == other[key] for key in ("algo", "seed", "settings"))


def write_csv(runs, path):
    """The numbers behind a figure, one line a step: small enough to commit, enough to draw the figure again."""
    keys = differing(runs)
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["algo", "seed", "settings", "phase", "step", *COLUMNS])
        for run in runs:
            settings = ";".join(
                f"{k}={json.dumps(run['settings'][k])}" for k in keys if k in run["settings"]
            )
            for row in run["rows"]:
                cells = ("" if row[column] is None else f"{row[column]:.4g}" for column in COLUMNS)
                out.writerow(
                    [run["algo"], run["seed"], settings, row["phase"], row["step"], *cells]
                )


# Grouping runs and averaging seeds


def differing(runs):
    """The settings in which runs of one algorithm differ: they make a figure's variants."""
    pairs = [(a["settings"], b["settings"]) for a in runs for b in runs if a["algo"] == b["algo"]]
    return list(dict.fromkeys(k for a, b in pairs for k in a if k not in b or a[k] != b[k]))


def group(runs):
    """{variant: {algo: [runs, differing in the seed alone]}}, algorithms in the order of STYLES; a lone variant is "".
    Raises ValueError where a run comes twice, which would pass for one seed more."""
    keys, groups = differing(runs), {}
    for run in sorted(runs, key=lambda run: [*ORDER, run["algo"]].index(run["algo"])):
        values = {k: run["settings"][k] for k in keys if k in run["settings"]}
        words = [
            f"{k} = {v}" if k != "updates" else f"{v} update{'s' * (v != 1)} a rollout"
            for k, v in values.items()
        ]
        rank = [
            (v, "") if isinstance(v := values.get(k), int | float) else (-math.inf, str(v))
            for k in keys
        ]
        variant = tuple(rank), ", ".join(words) or ("defaults" if keys else "")
        seeds = groups.setdefault(variant, {}).setdefault(run["algo"], [])
        if any(other["seed"] == run["seed"] for other in seeds):
            raise ValueError(
                f"two runs of {run['algo']}, seed {run['seed']}, same settings: leave one out"
            )
        seeds.append(run)
    return {variant[1]: groups[variant] for variant in sorted(groups)}


def average(runs, phase, metric):
    """Steps at which any run has a value; over the runs that have one there, the mean, the lowest,
    the highest, and how many they are. Five arrays [N], the last of whole numbers."""
    values = {}  # {step: [a value per run]}
    for run in runs:
        curve = {row["step"]: row[metric] for row in run["rows"] if row["phase"] == phase}
        for step, value in curve.items():
            if value is not None:
                values.setdefault(step, []).append(value)
    steps = sorted(values)
    mean = [np.mean(values[step]) for step in steps]
    low = [min(values[step]) for step in steps]
    high = [max(values[step]) for step in steps]
    count = [len(values[step]) for step in steps]
    return (*map(np.array, (steps, mean, low, high)), np.array(count, int))
