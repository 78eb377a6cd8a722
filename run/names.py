"""--algo and --algos: methods by name, as config.json keeps them."""

import argparse
import difflib
import re
from pathlib import Path

from trainer.methods import ALGORITHMS, MORE, is_file, label

ROOT = Path(__file__).resolve().parents[1]
NAMES = (*ALGORITHMS, *MORE)


def method(algo):
    """The name of one of our methods, or the absolute path of a user's file.

    A name may be written as papers do: TEPO, GRPO-S, Dr. GRPO. The path of one of our own files
    becomes its name. What is neither stays as it is: see check_name.
    """
    if is_file(algo):
        path = Path(algo).expanduser().absolute()
        ours = {ROOT / ("more" if name in MORE else "") / f"{name}.py": name for name in NAMES}
        return ours.get(path.resolve(), str(path))
    for name in NAMES:
        if letters(name) == letters(algo):
            return name
    return algo


def letters(name):
    return re.sub(r"[\W_]", "", name).lower()


def check_name(algo):
    """Raise ValueError if there is no such method, or if a file's name cannot be a label."""
    if algo in NAMES:
        return
    path = Path(algo)
    if not is_file(algo):
        near = difflib.get_close_matches(algo.lower(), NAMES, n=1, cutoff=0.4)
        if Path(f"{algo}.py").is_file():
            near = [f"{algo}.py"]
        meant = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no algorithm {algo!r}; {meant}There are {', '.join(NAMES)}")
    if not path.is_file():
        why = "not a file; a method is a Python file" if path.exists() else "no such file"
        raise ValueError(f"--algo {algo}: {why}")
    if not re.fullmatch(r"[A-Za-z][\w-]*\.py", path.name, re.ASCII):
        raise ValueError(
            f"--algo {algo}: its runs and curves are named after the file, so its name is made of "
            f"letters, digits, - and _, such as my_method.py"
        )


def algorithm_names(text):
    """ "tepo,my.py" -> ["tepo", "/path/of/my.py"]; "all" stands for all of ours.

    For argparse: raises ArgumentTypeError.
    """
    names = []
    for word in text.split(","):
        names += NAMES if word.lower() == "all" else [method(word)]
    labels = {}
    for name in names:
        try:
            check_name(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(error) from None
        other = labels.setdefault(label(name), name)
        if other != name:
            raise argparse.ArgumentTypeError(f"{other} and {name} have one name: rename a file")
    return list(labels.values())
