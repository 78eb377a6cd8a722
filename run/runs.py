"""Runs as data: read from folders, .csv files and logs of minimal.py.

A run is {"algo", "seed", "settings", "path", "rows"}. settings: {name: value} of the options that
define its experiment. rows: a DataFrame with `phase`, `step` and a column per metric of
metrics.jsonl, NaN where a row has no value; `ci_lo` and `ci_hi` are the ends of ci95, `seconds` is
rollout_s + update_s. The algo of a user's file is its label; "file" tells two of one label apart.

pandas is imported where it is used: --help does not wait for it.
"""

import csv
import json
import math
import sys
from dataclasses import fields
from pathlib import Path

from run.options import DEFAULTS, MOST, Options
from trainer.methods import MORE, is_file, label

# In figures and tables.
ORDER = ("grpo", "dapo", "gspo", "tepo", "gtpo", "grpo_s", "trgrpo", *MORE)
COLUMNS = (  # that every table of rows has
    *("accuracy", "accuracy_trained", "accuracy_lenient", "ci_lo", "ci_hi", "entropy", "length"),
    *("truncated", "clip_frac", "pass_at_k", "k", "n", "seconds"),
)
ABOUT = ("algo", "seed", "settings", "phase", "step")  # of a row; the rest are metrics
NO_RUN = "no metrics.jsonl in it, so it is not a run of train.py"
DETAILS = {about.name for about in fields(Options) if not about.metadata["experiment"]}
# What reading a value raises where a file holds something else.
BAD_VALUE = (AttributeError, KeyError, OverflowError, TypeError, ValueError)


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


def metrics_row(line):
    """A row of `rows` of a line of metrics.jsonl or of a .csv. Raises one of BAD_VALUE."""
    row = {"phase": line["phase"], "step": int(line["step"])}
    if row["phase"] not in ("train", "eval") or not 0 <= row["step"] <= MOST:
        raise ValueError
    values = dict(line)
    if "ci95" in line:
        values["ci_lo"], values["ci_hi"] = line["ci95"] or (None, None)
    if "rollout_s" in line:
        values["seconds"] = (line["rollout_s"] or 0) + (line.get("update_s") or 0)
    for name, value in values.items():
        if name in COLUMNS or (name not in ABOUT and not isinstance(value, list | dict)):
            row[name] = finite(value)
    return row


def checked_rows(numbered, path):
    """[row, ...] of [(line number, line), ...]. Raises ValueError for the first bad line."""
    rows = []
    for number, line in numbered:
        try:
            rows.append(metrics_row(line))
        except BAD_VALUE:
            raise ValueError(f"{path}: line {number} is not a line of metrics") from None
    return rows


def frame(rows):
    """The DataFrame of some rows."""
    import pandas as pd

    names = dict.fromkeys(COLUMNS)
    for row in rows:
        names.update(row)
    metrics = [name for name in names if name not in ABOUT]
    table = pd.DataFrame(rows, columns=["phase", "step", *metrics])
    return table.astype({"phase": str, "step": int, **dict.fromkeys(metrics, float)})


def read_config(folder):
    """The config.json of a run's folder. Raises OSError or ValueError."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def read_folder(folder):
    """The run in a folder of train.py. Raises ValueError."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder}: {NO_RUN}")
    try:
        config = read_config(folder)
        options = config["options"]
        algo = options["algo"]
        run = {"algo": label(algo), "seed": int(options["seed"])}
        run["settings"] = settings_of(options)
        if is_file(algo):  # by its content if that is recorded: a file may move
            run["file"] = config.get("code", {}).get(algo, algo)
    except (OSError, *BAD_VALUE):
        why = "config.json is missing or does not say algo and seed"
        raise ValueError(f"{folder}: {why}") from None
    return {**run, "path": folder, "rows": frame(checked_rows(read_log(path), path))}


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


def read_log_of_minimal(path):
    """The run in a file of minimal.py --log. Raises ValueError."""
    lines = read_log(path)
    about = {"algo": path.name, "seed": 0}
    if lines and isinstance(lines[0][1].get("algo"), str):
        about["algo"] = f"minimal.py {label(lines[0][1]['algo'])}"
    if lines and isinstance(lines[0][1].get("seed"), int):
        about["seed"] = lines[0][1]["seed"]
    return {**about, "settings": {}, "path": path, "rows": frame(checked_rows(lines, path))}


def read_csv(path):
    """The runs in a file of `write_csv`, in its order. Raises ValueError."""
    runs = {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        lines = csv.DictReader(file)
        try:
            for line in lines:
                key = line["algo"], int(line["seed"]), line["settings"]
                if None in line:  # more cells than line 1
                    raise ValueError
                if key not in runs:
                    runs[key] = read_settings(key[2]), []
                runs[key][1].append(metrics_row(line))
        except (csv.Error, *BAD_VALUE):
            raise ValueError(f"{path}: line {lines.line_num} is not a line of metrics") from None
    if not runs:
        raise ValueError(f"{path}: no metrics in it")
    found = []
    for (algo, seed, _), (settings, rows) in runs.items():
        run = {"algo": algo, "seed": seed, "settings": settings}
        found.append({**run, "path": path, "rows": frame(rows)})
    return found


def read_settings(cell):
    """The settings in a cell of a .csv: a JSON object, or name=value;name=value in older files."""
    if cell.startswith("{"):
        return json.loads(cell)
    pairs = [pair.split("=", 1) for pair in cell.split(";") if pair]
    return {name: json.loads(value) for name, value in pairs}


def read_runs(paths):
    """The runs of folders, .csv files and logs of minimal.py (.jsonl).

    A folder that is not a run but holds some, as compare.py makes it, stands for those. What is not
    a run is skipped with a note on stderr. Raises ValueError, one line, if no run is left.
    """
    runs, notes, inside = [], [], {}
    for path in dict.fromkeys(map(Path, paths)):
        if not path.exists():
            raise ValueError(f"{path}: no such run")
        if path.suffix == ".csv":
            runs += read_csv(path)
        elif path.suffix == ".jsonl":
            runs.append(read_log_of_minimal(path))
        elif is_run(path):
            runs.append(read_folder(path))
        elif path.is_file():
            notes.append(f"{path}: neither a run's folder, nor a .csv or .jsonl")
        else:
            folders = sorted(filter(is_run, path.iterdir()))
            inside.update({folder.resolve(): folder for folder in folders})
            if not folders:
                is_evaluation = (path / "eval.json").is_file()
                notes.append(f"{path}: {'an evaluation, no run' if is_evaluation else NO_RUN}")
    given = [about(run) for run in runs]
    for run in map(read_folder, inside.values()):
        if about(run) in given:
            notes.append(f"{run['path']}: another run of the same experiment and seed is taken")
        else:
            runs.append(run)
    if not runs:
        raise ValueError("; ".join(notes))
    for note in notes:
        print(f"note: skipped {note}", file=sys.stderr)
    return runs


def about(run):
    """What tells a run from others, whatever its folder is called."""
    return run["algo"], run.get("file"), run["seed"], run["settings"]


def is_run(path):
    return (path / "metrics.jsonl").is_file()
