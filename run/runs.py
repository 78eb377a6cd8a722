"""Runs as data: read from folders or .csv files, grouped by what differs, averaged over seeds.

A run is {"algo", "seed", "settings": {option: value}, "rows": [{"phase", "step", and COLUMNS}]}.
Settings are the options that define the experiment. A value that a row does not have is None. The
algo of a user's file is its label; "file" tells two files with one label apart.

pandas is imported where it is used: a training run draws its curves without it.
"""

import json
import math
import sys
from dataclasses import fields
from itertools import permutations
from pathlib import Path
from statistics import fmean

import numpy as np

from run.options import DEFAULTS, MOST, Options
from trainer.methods import MORE, is_file, label

# In figures and tables.
ORDER = ("grpo", "dapo", "gspo", "tepo", "gtpo", "grpo_s", "trgrpo", *MORE)
COLUMNS = (
    "accuracy",
    "accuracy_trained",
    "accuracy_lenient",
    "ci_lo",
    "ci_hi",
    "entropy",
    "length",
    "truncated",
    "clip_frac",
    "pass_at_k",
    "k",
    "n",
    "seconds",
)
DETAILS = {about.name for about in fields(Options) if not about.metadata["experiment"]}
# What reading a value raises where a file holds something else.
BAD_VALUE = (AttributeError, KeyError, OverflowError, TypeError, ValueError)


# Reading and writing runs


def read_log(path, size=None):
    """[(line number, object), ...] of a .jsonl file that train.py may be writing at this moment.

    size: how many bytes of it to read, whole lines; None: all. A torn last line of the whole file
    is left out: the run is writing it, or was killed while it did. Any other line that is not a
    JSON object raises ValueError. (trainer/sources.py reads problems: it keeps every digit
    of a number and accepts no torn line.)
    """
    lines = path.read_bytes()[:size].decode(errors="replace").split("\n")
    objects = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # deep nesting
            value = None
        if isinstance(value, dict):
            objects.append((number, value))
        elif number < len(lines) or size is not None:  # the last line has no newline after it
            raise ValueError(f"{path}: line {number} is not a JSON object")
    return objects


def finite(value):
    """A float, or None for what cannot be drawn: null, NaN, an infinity, an empty cell."""
    if value is None or value == "":
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def metrics_row(raw):
    """The row of a run from a raw one, {column: JSON value or text}. Raises one of BAD_VALUE."""
    row = {"phase": raw["phase"], "step": int(raw["step"])}
    if not 0 <= row["step"] <= MOST:
        raise ValueError
    for column in COLUMNS:
        row[column] = finite(raw.get(column))
    return row


def renamed(line):
    """A line of metrics.jsonl with its interval and its seconds under the names of COLUMNS."""
    low, high = line.get("ci95") or (None, None)
    seconds = (line.get("rollout_s") or 0) + (line.get("update_s") or 0)
    return {**line, "ci_lo": low, "ci_hi": high, "seconds": seconds}


def read_folder(folder):
    """The run in a folder of train.py. Raises ValueError."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder}: no metrics.jsonl in it, so it is not a run of train.py")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        options = config["options"]
        algo = options["algo"]
        run = {"algo": label(algo), "seed": int(options["seed"])}
        run["settings"] = settings_of(options)
        if is_file(algo):  # by its content if that is recorded: a file may move
            run["file"] = config.get("code", {}).get(algo, algo)
    except (OSError, *BAD_VALUE):
        why = "config.json is missing or does not say algo and seed"
        raise ValueError(f"{folder}: {why}") from None
    run["rows"] = read_metrics(path)
    return run


def read_metrics(path, size=None):
    """The rows of a metrics.jsonl, or of its first `size` bytes. Raises ValueError."""
    rows = []
    for number, line in read_log(path, size):
        try:
            rows.append(metrics_row(renamed(line)))
        except BAD_VALUE:
            raise ValueError(f"{path}: line {number} is not a line of metrics") from None
    return rows


def settings_of(options):
    """{name: value} of the options of a run that define its experiment.

    The algorithm's options are settings like the others. An option that is younger than the run has
    its preset's default; one that exists no more is a setting.
    """
    defaults = DEFAULTS.get(options.get("preset"), {})
    settings = {}
    for name, value in {**defaults, **options}.items():
        if name != "option" and name not in DETAILS:
            settings[name] = value
    settings.update(options.get("option", {}))
    return settings


def read_csv(path):
    """The runs in a file of `write_csv`, in its order. Raises ValueError."""
    import pandas as pd

    look = {"dtype": str, "keep_default_na": False, "encoding_errors": "replace"}
    try:
        table = pd.read_csv(path, skip_blank_lines=False, **look)
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path}: no metrics in it") from None
    except pd.errors.ParserError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(table.index, pd.RangeIndex):  # pandas took the first cells for an index
        raise ValueError(f"{path}: line 2 has more cells than line 1")
    table.index += 2  # the number of the line
    table = table[(table != "").any(axis="columns")]  # without blank lines
    runs = {}
    for number, raw in table.to_dict("index").items():
        try:
            key = raw["algo"], int(raw["seed"]), raw["settings"]
            if key not in runs:
                runs[key] = {"algo": key[0], "seed": key[1], "settings": read_settings(key[2])}
                runs[key]["rows"] = []
            runs[key]["rows"].append(metrics_row(raw))
        except BAD_VALUE:
            raise ValueError(f"{path}: line {number} is not a line of metrics") from None
    if not runs:
        raise ValueError(f"{path}: no metrics in it")
    return list(runs.values())


def read_settings(cell):
    """The settings in a cell of a .csv: a JSON object, or name=value;name=value in older files."""
    if cell.startswith("{"):
        return json.loads(cell)
    settings = {}
    for pair in filter(None, cell.split(";")):
        name, value = pair.split("=", 1)
        settings[name] = json.loads(value)
    return settings


def write_csv(runs, path):
    """The numbers behind a figure, one line per row of a run, with four digits.

    The file is small enough to commit, and the figure can be drawn again from it. Of the settings
    it has those in which the runs differ.
    """
    import pandas as pd

    names = differing(runs)
    lines = []
    for run in runs:
        values = varied(run, names)
        cell = json.dumps(values) if values else ""
        about = {"algo": run["algo"], "seed": run["seed"], "settings": cell}
        lines += [{**about, **row} for row in run["rows"]]
    columns = ["algo", "seed", "settings", "phase", "step", *COLUMNS]
    table = pd.DataFrame(lines, columns=columns)
    table.to_csv(path, index=False, float_format="%.4g", lineterminator="\n")


def read_runs(paths):
    """All runs of some folders and .csv files.

    A folder that is not a run but holds some, as compare.py makes it, stands for those. What is not
    a run is skipped with a note on stderr. Raises ValueError, one line, if no run is left.
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
    for path in inside:  # last: of two equal runs, the one that was named itself is taken
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
    """A line for a path that is not a run and holds none."""
    if not path.is_dir():
        return f"{path}: neither a run's folder nor a .csv"
    if (path / "eval.json").is_file():
        return f"{path}: an evaluation, no run"
    return f"{path}: no metrics.jsonl in it, so it is not a run of train.py"


def same_experiment(run, other):
    same = all(run[key] == other[key] for key in ("algo", "seed", "settings"))
    return same and not other_file(run, other)


def other_file(run, other):
    """Whether two runs have one label, but were made with two files of the user."""
    files = run.get("file"), other.get("file")
    return run["algo"] == other["algo"] and None not in files and files[0] != files[1]


# Grouping runs and averaging seeds


def differing(runs):
    """The names of the settings in which runs of one algorithm differ: they make the variants."""
    names = []
    for run, other in permutations(runs, 2):
        if run["algo"] != other["algo"]:
            continue
        theirs = other["settings"]
        for name, value in run["settings"].items():
            if name not in theirs or theirs[name] != value:
                names.append(name)
    return list(dict.fromkeys(names))


def varied(run, names):
    """Those settings of a run that are among the names."""
    settings = run["settings"]
    return {name: settings[name] for name in names if name in settings}


def group(runs):
    """{variant: {algo: [runs that differ in the seed alone]}}, algorithms in ORDER.

    A lone variant is "". Raises ValueError where a run comes twice, which would count as two seeds,
    and where one name stands for two methods.
    """
    for run, other in permutations(runs, 2):
        if other_file(run, other):
            raise ValueError(
                f"these runs of {run['algo']} were made with two different files: leave some out, "
                f"or name the files differently before training"
            )
    names = differing(runs)
    groups = {}
    for run in sorted(runs, key=place):
        values = varied(run, names)
        variant = rank(values, names), title(values) or ("defaults" if names else "")
        seeds = groups.setdefault(variant, {}).setdefault(run["algo"], [])
        if any(other["seed"] == run["seed"] for other in seeds):
            same = f"{run['algo']}, seed {run['seed']}, same settings"
            raise ValueError(f"two runs of {same}: leave one out")
        seeds.append(run)
    return {variant[1]: groups[variant] for variant in sorted(groups)}


def place(run):
    """Where the algorithm of a run stands in ORDER; an unknown one is last."""
    return [*ORDER, run["algo"]].index(run["algo"])


def rank(values, names):
    """Sorts variants by number. Before the numbers come texts and settings that are missing."""
    ranks = []
    for name in names:
        value = values.get(name)
        is_number = isinstance(value, int | float)
        ranks.append((value, "") if is_number else (-math.inf, str(value)))
    return tuple(ranks)


def title(values):
    """A variant in words: "16 updates per rollout, lr = 0.001"."""
    words = []
    for name, value in values.items():
        if name == "updates":
            words.append(f"{value} update{'s' * (value != 1)} per rollout")
        else:
            words.append(f"{name} = {value}")
    return ", ".join(words)


def rows_of(runs, phase):
    """The rows of one phase, "train" or "eval", in one DataFrame. What is missing is NaN.

    Columns: run (its index in `runs`), step, and COLUMNS.
    """
    import pandas as pd

    rows = []
    for i, run in enumerate(runs):
        rows += [{"run": i, **row} for row in run["rows"] if row["phase"] == phase]
    table = pd.DataFrame(rows, columns=["run", "step", *COLUMNS])
    return table.astype({"step": int, **dict.fromkeys(COLUMNS, float)})


def average(runs, phase, metric):
    """Steps at which any run has a value; over the runs that have one there: the mean, the lowest,
    the highest, and how many runs they are. Five arrays [N], the last of whole numbers.
    """
    found = {}  # step: the values of the runs
    for run in runs:
        rows = [row for row in run["rows"] if row["phase"] == phase]
        of_step = {row["step"]: row[metric] for row in rows}  # the last row of a step counts
        for step, value in of_step.items():
            if value is not None:
                found.setdefault(step, []).append(value)
    steps = sorted(found)
    spread = [(fmean(found[step]), min(found[step]), max(found[step])) for step in steps]
    mean, low, high = np.array(spread, float).reshape(-1, 3).T
    count = np.array([len(found[step]) for step in steps], int)
    return np.array(steps, int), mean, low, high, count
