"""A small run of train.py, and what tests look at: its refusal, its folder, its lines."""

import json
import re
import shutil

from conftest import ROOT

# Four steps of four short completions, no evaluation in between.
WORDS = """--preset tiny --steps 4 --prompts 2 --group-size 2 --updates 2 --max-new-tokens 8
    --eval-n 2 --eval-every 0 --k 0""".split()
TIMES = ("rollout_s", "update_s", "tokens_per_s", "peak_mib")


def run(*words):
    """The exit status of `train.py WORDS`, in this process."""
    import train

    return train.main([str(word) for word in words])


def refused(capsys, *words, status=2):
    """The only line on stderr, lines of progress aside, of a run that ends with this status."""
    capsys.readouterr()
    assert run(*words) == status
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line and not re.match(r"(\S+ )?step \d", line)]
    return line.removeprefix("train.py: error: ").removeprefix("train.py: ")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path):
    """The objects of a .jsonl file. Not by splitlines: a text may hold U+2028."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def lines(folder, phase):
    return [line for line in read(folder / "metrics.jsonl") if line["phase"] == phase]


def timeless(folder):
    """metrics.jsonl without its times and its memory."""
    rows = read(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def write(path, rows):
    """One line per row, a text as it is, anything else as JSON. Returns the path."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path


def own_file(folder, text, name="mine.py"):
    """A Python file of the user. Returns its path."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def copy_tiny(folder):
    return shutil.copytree(ROOT / "tiny", folder, ignore=shutil.ignore_patterns("*.py", "__*"))


def change(path, **values):
    """Set, or with None remove, entries of a JSON file."""
    content = {**json.loads(path.read_text()), **values}
    content = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps(content))
