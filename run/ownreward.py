"""The reward in a file of the user, --reward FILE.py (trainer/grading.py says what it has)."""

from numbers import Real
from types import SimpleNamespace

import numpy as np

from run.ownfile import guarded, load_file, place_of
from trainer.grading import Grader
from trainer.methods import OwnFileError

LARGEST = 1e15  # of a reward: in a standard deviation, the square of more overflows fp32


def load_reward(path):
    """The functions `reward` and `correct` (None if there is none) of a file; None for no path.

    Whatever goes wrong in them is told with FILE:LINE. Raises ValueError.
    """
    if not path:
        return None
    module = load_file(path)
    if not callable(getattr(module, "reward", None)):
        raise OwnFileError(f"{path}: there is no function reward(completion, problem) in it")
    functions = SimpleNamespace(correct=None)
    functions.reward = guarded("reward", module.reward, path, check_reward)
    own_check = getattr(module, "correct", None)
    if place_of(own_check, path) != path:  # not rewards.correct, imported to be called
        functions.correct = guarded("correct", own_check, path, check_right)
    return functions


def try_reward(o, functions, problem):
    """Call the functions once, on a made-up completion of the problem. Raises OwnFileError."""
    Grader(o, functions).reward("2 + 2 = 4\n#### 4", problem, 2, False)


def check_reward(value):
    """Raise ValueError unless it is a finite number or a dict of such numbers by name."""
    if not isinstance(value, dict):
        check_number(value, "a number, or a dict of numbers by name")
        return
    for name, part in value.items():
        if not (isinstance(name, str) and name.isprintable()):
            raise ValueError(f"must name its parts by printable texts, not {name!r}")
        check_number(part, f"a number as its part {name!r}")


def check_number(value, what):
    if not isinstance(value, Real | np.bool_):
        raise ValueError(f"must return {what}, not a {type(value).__name__}")
    if not abs(value) <= LARGEST:  # NaN fails this test
        raise ValueError(f"must return {what}, finite and at most {LARGEST:g}, not {value}")


def check_right(value):
    if not isinstance(value, Real | np.bool_) or value not in (True, False):
        raise ValueError(f"must return True or False, not {value!r}")
