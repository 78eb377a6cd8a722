"""What a run was made from: its data, start weights, our own code, and library versions.

config.json records the four. A run is continued or reused only where they agree: --resume refuses
other data and other start weights, and compare.py reuses a finished run only if a new run would
have the same four.
"""

import inspect
import json
import platform
import sys
import zlib
from pathlib import Path

import torch
import transformers

from run.algorithm import load_algorithm
from run.ownfile import files_of
from trainer.data import RESERVED
from trainer.methods import is_file

ROOT = Path(__file__).resolve().parents[1]
DECIDES = ("options", "session", "start")  # files of run/ that can change a number of a run


def data_checksum(problems, expected=None):
    """{"problems": checksum of questions and answers, "prompts": of the prompts' token ids}.

    Raises ValueError, with what differs, if it is not `expected`, that of the resumed run.
    """
    rows = [[p["question"], p["answer"], *others(p)] for p in problems]
    ids = [p["prompt_ids"] for p in problems]
    found = {"problems": crc32_of(rows), "prompts": crc32_of(ids)}
    if expected is None or found == expected:
        return found
    if not isinstance(expected, dict):
        raise ValueError(
            "the run was made by an earlier version, which did not record its prompts; it cannot "
            "be resumed with this one"
        )
    if found["problems"] != expected.get("problems"):
        raise ValueError(
            "the data are not what they were when the run began; it cannot be resumed with other "
            "problems"
        )
    raise ValueError(
        "the prompts have other token ids than when the run began, for the same problems: another "
        "tokenizer, or a chat template that writes today's date (python train.py --show-prompt "
        "shows it); the run cannot be resumed with other prompts"
    )


def others(problem):
    """The further fields of a problem, as a list of one dict; [] if it has none."""
    fields = {name: value for name, value in problem.items() if name not in RESERVED}
    return [fields] if fields else []


def crc32_of(rows):
    return zlib.crc32(json.dumps(rows, default=str).encode())


def weights_checksum(model):
    """A checksum of all weights and saved buffers; tied ones count once. About 1 s per GB."""
    crc = 0
    seen = set()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.data_ptr() in seen:  # tied
            continue
        seen.add(tensor.data_ptr())
        crc = zlib.crc32(f"{name} {list(tensor.shape)}".encode(), crc)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        crc = zlib.crc32(data.numpy(), crc)
    return f"{crc:08x}"


def code_checksums(algo, reward=None):
    """{file: checksum} of the files that determine the numbers of a run of this algorithm.

    Ours by their path in the project, those of the user by their full path. reward: --reward.
    """
    names = {"train.py", "rewards.py"}
    if (ROOT / "tiny" / "problems.py").is_file():  # a checkout may be without it
        names.add("tiny/problems.py")
    for path in (ROOT / "trainer").glob("*.py"):
        names.add(f"trainer/{path.name}")
    names.update(f"run/{name}.py" for name in DECIDES)
    names.update(files_of_user(algo) if is_file(algo) else own_files(load_algorithm(algo)))
    if reward:
        names.update(files_of_user(reward))
    checksums = {}
    for name in sorted(names):
        checksums[name] = f"{zlib.crc32((ROOT / name).read_bytes()):08x}"
    return checksums


def files_of_user(algo):
    """A file of the user under the path that --algo keeps, and the files that it imports."""
    files = {algo}
    for path in files_of(Path(algo).resolve())[1:]:
        inside = path.is_relative_to(ROOT)
        files.add(path.relative_to(ROOT).as_posix() if inside else str(path))
    return files


def own_files(module):
    """Our files that a module is made of: its own, and those that it imports from, and so on."""
    files, waiting = set(), [module.__name__]
    while waiting:
        name = waiting.pop()
        file = name.replace(".", "/") + ".py"
        if file in files or not (ROOT / file).is_file():
            continue
        files.add(file)
        for value in vars(sys.modules[name]).values():
            is_module = inspect.ismodule(value)
            waiting.append(value.__name__ if is_module else getattr(value, "__module__", ""))
    return files


def versions():
    """{name: version} of Python and of the libraries that compute the numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def other_inputs(held, now):
    """Which of data and start weights differ between two configs, as words; "" if neither."""
    words = []
    for key, word in (("checksum", "data"), ("weights", "start weights")):
        if held.get(key) is None:
            words.append(f"unrecorded {word}")
        elif held[key] != now[key]:
            words.append(f"other {word}")
    return " and ".join(words)


def other_code(held, now):
    """Which of our files and versions differ between two configs, as words; "" if none."""
    words = []
    for kind in ("code", "versions"):
        before = recorded(held, kind)
        if before is None:
            words.append(f"{kind} not recorded")
            continue
        for name in sorted(before.keys() | now[kind].keys()):
            old, new = before.get(name), now[kind].get(name)
            if old != new:
                words.append(name if kind == "code" else f"{name} {old}, now {new}")
    return "; ".join(words)


def both(held, now):
    """The code and versions of a run that began with `held` and continues with `now`.

    Where they differ, both are recorded ("1, then 2"). This equals no single version, so compare.py
    never reuses such a run.
    """
    joined = {}
    for kind in ("code", "versions"):
        before = recorded(held, kind) or {}
        joined[kind] = {name: _then(before.get(name), new) for name, new in now[kind].items()}
    return joined


def recorded(held, kind):
    """The "code" or the "versions" of a config, {name: text}; None if it has none to read."""
    found = held.get(kind)
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        return None
    return found


def _then(old, new):
    if old is None:
        return f"unknown, then {new}"
    return old if old.split(", then ")[-1] == new else f"{old}, then {new}"
