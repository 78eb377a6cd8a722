"""What a run was made from: its data, start weights, our own code, and library versions.

config.json records the four. A run is continued or reused only where they agree: --resume refuses
other data and other start weights, and compare.py reuses a finished run only if a new run would
have the same four.
"""

import json
import platform
import zlib

import torch
import transformers

from run.names import ROOT
from run.ownfile import files_of
from trainer.data import RESERVED
from trainer.methods import MORE, is_file

# Files beside those of the trainer and the method that can change a number of a run.
DECIDE = (
    *("train.py", "grpo.py", "rewards.py", "tiny/problems.py"),
    *("run/options.py", "run/checks.py", "run/session.py", "run/start.py"),
)


def data_checksum(problems, expected=None):
    """{"problems": checksum of questions and answers, "prompts": of the prompts' token ids}.

    Raises ValueError, with what differs, if it is not `expected`, that of the resumed run.
    """
    rows = []
    for problem in problems:
        others = {name: value for name, value in problem.items() if name not in RESERVED}
        rows.append([problem["question"], problem["answer"], *([others] if others else [])])
    ids = [problem["prompt_ids"] for problem in problems]
    found = {"problems": crc32_of(rows), "prompts": crc32_of(ids)}
    if expected is None or found == expected:
        return found
    why = "another tokenizer, or a chat template that writes today's date (--show-prompt)?"
    what = f"the prompts' token ids are not what they were when the run began: {why}"
    if not isinstance(expected, dict) or found["problems"] != expected.get("problems"):
        what = "the data are not what they were when the run began"
    raise ValueError(f"{what}; it cannot be resumed with others")


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
    files = [*(ROOT / "trainer").glob("*.py"), *map(ROOT.joinpath, DECIDE)]
    method = algo if is_file(algo) else f"{'more/' * (algo in MORE)}{algo}.py"
    for own in (method, reward):
        files += files_of(own) if own else []
    checksums = {}
    for file in sorted(files):
        inside = file.is_relative_to(ROOT) and str(file) not in (algo, reward)
        name = file.relative_to(ROOT).as_posix() if inside else str(file)
        if file.is_file():  # a checkout may be without tiny/
            checksums[name] = f"{zlib.crc32(file.read_bytes()):08x}"
    return checksums


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
        if not held.get(kind):
            words.append(f"{kind} not recorded")
            continue
        for name in sorted(held[kind].keys() | now[kind].keys()):
            old, new = held[kind].get(name), now[kind].get(name)
            if old != new:
                words.append(name if kind == "code" else f"{name} {old}, now {new}")
    return "; ".join(words)


def both(held, now):
    """The code and versions of a run that began with `held` and continues with `now`.

    Where they differ, both are recorded ("1, then 2"). This equals no single version, so compare.py
    never reuses such a run.
    """
    joined = {"code": {}, "versions": {}}
    for kind, names in joined.items():
        for name, new in now[kind].items():
            old = held.get(kind, {}).get(name, "unknown")
            same = old.split(", then ")[-1] == new
            names[name] = old if same else f"{old}, then {new}"
    return joined
