"""What a run was made from: its data, its start weights, our own code, and the versions it runs on.

config.json records the four. A result is reused only where they agree: --resume refuses other data
and other start weights, and compare.py takes a finished run as done only if a new run would have
the same four.
"""

import importlib
import platform
import zlib
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
ONLY_DRAWS = "trainer/runs.py"  # as plot.py: it changes no number of a run


def weights_checksum(model):
    """A checksum of all weights and saved buffers, tied ones once. About 1 s per GB."""
    crc, seen = 0, set()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        crc = zlib.crc32(f"{name} {list(tensor.shape)}".encode(), crc)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        crc = zlib.crc32(data.numpy(), crc)
    return f"{crc:08x}"


def code_checksums(algo):
    """{file: checksum} of our files that determine the numbers of a run of this algorithm."""
    names = {"train.py", "rewards.py"}
    if (ROOT / "tiny" / "problems.py").is_file():  # a checkout may be without it
        names.add("tiny/problems.py")
    names |= {f"trainer/{path.name}" for path in (ROOT / "trainer").glob("*.py")}
    names.discard(ONLY_DRAWS)
    module = importlib.import_module(algo)
    parts = [getattr(value, "__module__", "") for value in vars(module).values()]
    flat = {f"{name}.py" for name in [algo, *parts]}
    names |= {name for name in flat if (ROOT / name).is_file()}
    return {name: f"{zlib.crc32((ROOT / name).read_bytes()):08x}" for name in sorted(names)}


def versions():
    """{name: version} of what computes the numbers."""
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
        before = held.get(kind)
        if before is None:
            words.append(f"{kind} not recorded")
            continue
        for name in sorted(before.keys() | now[kind].keys()):
            old, new = before.get(name), now[kind].get(name)
            if old != new:
                words.append(name if kind == "code" else f"{name} {old}, now {new}")
    return "; ".join(words)


def both(held, now):
    """The code and versions of a run that began with `held` and goes on with `now`.

    Where they differ, both are named. That equals no single version, so compare.py never takes such
    a run for one that was made with one version.
    """
    joined = {}
    for kind in ("code", "versions"):
        before = held.get(kind) or {}
        joined[kind] = {name: _then(before.get(name), new) for name, new in now[kind].items()}
    return joined


def _then(old, new):
    if old is None:
        return f"unknown, then {new}"
    return old if old.split(", then ")[-1] == new else f"{old}, then {new}"
