"""What a run writes so that nothing is lost: checkpoints, and lines that are whole or not there.

A checkpoint is a folder checkpoints/step-000020: the policy and its tokenizer, as from_pretrained
loads them, and state.pt, our own tensors and numbers, read back with weights_only=True. It is
written under another name, then renamed: one that is there is complete, unless the disk itself
failed, and then the one before it is used.
"""

import contextlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

KEPT = 2
RUN_FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoints", "model")
LINES = ("metrics.jsonl", "samples.jsonl")


def check_folder(out):
    """Raises ValueError if the folder `out` is something else, or cannot be made or written to."""
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"--out {out}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: no permission to write in {nearest}; name another folder")


def holds_run(out):
    return any((out / name).exists() for name in RUN_FILES)


def clear(out, source):
    """Make the folder, without a run in it; whatever else it holds stays. source: the model that a new run starts from;
    a ValueError, and nothing is deleted, if it is part of the old run.
    """
    source = Path(model_folder(source)).resolve()
    if any((out / name).resolve() in (source, *source.parents) for name in RUN_FILES):
        raise ValueError(
            f"--overwrite would delete {source}, the model to start from; name another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        remove(out / name)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole(path):
    """Write the file or folder `path` under the name given, which takes its place at the end; if anything fails, what
    was there before is still there and nothing else. Raises OSError, with the path, if it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        remove(part)
        yield part
        for file in [*part.rglob("*"), part]:
            sync(file)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(part, path)
        sync(path.parent)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # a full disk is one of the three, by who meets it
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"cannot write {path}: {cause}") from None
    finally:
        with contextlib.suppress(OSError):
            remove(part)


def sync(path):
    """Have the disk itself hold the file, or the names in a folder: what a power cut does not undo."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # Windows opens no folder
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path, value):
    """Replace the file at once, or leave it as it was."""
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


def append_lines(path, rows):
    """Append each row as a line of JSON, all of them or none; what is not finite is written as null."""
    data = "".join(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows).encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            file.truncate(size)
            raise OSError(f"cannot write {path}: {error}") from None


def _finite(x):
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def save_pretrained(folder, model, tokenizer):
    """The trained model as from_pretrained reads it, with its tokenizer; all of it or nothing."""
    with whole(folder) as part:
        write_model(part, model, tokenizer)


def write_model(folder, model, tokenizer):
    """Write a folder that from_pretrained loads."""
    config = model.generation_config
    try:
        config.validate(strict=True)
    except (
        ValueError
    ):  # some models come with flags that save_pretrained refuses: only the ids stay
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_weights(model, folder):
    """Put the weights of such a folder into the model. Raises if the folder is not whole."""
    saved, found = type(model).from_pretrained(
        folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
    )
    if found["missing_keys"]:  # transformers makes them up, at random
        raise ValueError(f"it lacks {min(found['missing_keys'])}")
    model.load_state_dict(saved.state_dict())


def rng_state():
    """The state of every generator that sampling draws from."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state):
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def steps_saved(run):
    """{step: folder} of the checkpoints, by step."""
    found = [
        path
        for path in (run / "checkpoints").glob("step-*")
        if re.fullmatch(r"step-\d+", path.name)
    ]
    return {step: path for step, path in sorted((int(path.name[5:]), path) for path in found)}


def line_sizes(run):
    """{file: bytes} of the run's files of lines, for `load` to cut back what came after."""
    return {name: (run / name).stat().st_size for name in LINES if (run / name).exists()}


def model_folder(name):
    """What --model means. The folder of a run stands for its trained model, or for its latest
    checkpoint while the run is not done; anything else stands for itself. Raises ValueError.
    """
    run = Path(name)
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        status = config["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return name  # a model's folder, or no folder at all
    choices = [*reversed(steps_saved(run).values()), run / "model"]
    if status == "done":
        choices.insert(0, run / "model")
    for folder in choices:
        if (folder / "config.json").is_file():
            return str(folder)
    raise ValueError(f"--model {name} is a run without a model or a checkpoint: resume it first")


def find_model(name):
    """model_folder, and a line that says so where it is not the name itself."""
    folder = model_folder(name)
    if folder != name:
        print(f"--model {name} is a run: taking {folder}")
    return folder


def save(run, step, model, tokenizer, optimizer, sizes, **counters):
    """Write run/checkpoints/step-NNNNNN and drop all but the last KEPT.

    sizes: `line_sizes` after the step's training lines. counters: plain numbers.
    """
    run = Path(run)
    root = run / "checkpoints"
    root.mkdir(exist_ok=True)
    for stale in root.glob("*.part"):  # of a process that was killed here
        remove(stale)
    for name in sizes:
        sync(run / name)  # a checkpoint must not outlive the lines that it counts on
    with whole(root / f"step-{step:06}") as part:
        part.mkdir()
        write_model(part, model, tokenizer)
        state = {
            "step": step,
            "optimizer": optimizer.state_dict(),
            "rng": rng_state(),
            "sizes": sizes,
            **counters,
        }
        with open(
            part / "state.pt", "wb"
        ) as file:  # given the path, torch.save would not say why it fails
            torch.save(state, file)
    saved = steps_saved(run)
    kept = [known for known in saved if known <= step][
        -KEPT:
    ]  # a later one is what `load` could not read
    for known in saved.keys() - kept:
        remove(saved[known])


def load(run, model, optimizer, say):
    """Put the latest readable checkpoint into model, optimizer and the generators, and cut the run's files back to it.

    Returns its counters, those of step 0 if the run has not come to a checkpoint yet. say(line) tells of an unreadable
    one. Raises ValueError if none can be read and there have been some.
    """
    run = Path(run)
    saved = steps_saved(run)
    for folder in reversed(saved.values()):
        try:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            for name, size in state["sizes"].items():
                if (run / name).stat().st_size < size:
                    raise ValueError(f"{name} is shorter than it was")
            read_weights(model, folder)
            optimizer.load_state_dict(state.pop("optimizer"))
            set_rng_state(state.pop("rng"))
            break
        except (
            Exception
        ) as error:  # torn zip, torn header, missing file: each library has its own type
            why = (str(error).strip() or type(error).__name__).split("\n")[0][:120]
            say(f"checkpoint {folder.name} cannot be read ({why}); falling back to the one before")
    else:
        if saved or (run / "model").exists():
            raise ValueError(
                f"no checkpoint in {run / 'checkpoints'} can be read; start again with --overwrite"
            )
        state = {"step": 0, "cursor": 0, "bad_steps": 0, "sizes": {}}
    sizes = state.pop("sizes")
    for name in LINES:
        if (run / name).exists():
            os.truncate(run / name, sizes.get(name, 0))
    return state
