"""What a run writes so that nothing is lost: checkpoints, and lines that are whole or not there.

A checkpoint is a folder checkpoints/step-000020: the policy as safetensors, and state.pt, our own tensors and numbers,
read back with weights_only=True. It is written under another name, then renamed: one that is there is complete, unless
the disk itself failed, and then the one before it is used.
"""

import json
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model

KEPT = 2


def write_json(path, value):
    """Replace the file at once, or leave it as it was."""
    write_whole(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))


def write_whole(path, write):
    """write(temporary path), then rename to path; on any failure nothing is left behind but the old file."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def append_lines(path, rows):
    """Append each row as a line of JSON, all of them or none; what is not finite is written as null."""
    text = "".join(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows)
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        data = text.encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def _finite(x):
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


RUN_FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoints", "model")


def holds_run(out):
    return any((out / name).exists() for name in RUN_FILES)


def clear(out):
    """Make the folder, without a run in it; whatever else it holds stays."""
    out.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        remove(out / name)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def save_pretrained(folder, model, tokenizer):
    """The trained model as from_pretrained reads it, with its tokenizer; all of it or nothing."""
    part = folder.with_name(folder.name + ".part")
    remove(part)
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        remove(folder)
        os.replace(part, folder)
    finally:
        remove(part)


def rng_state():
    """The state of every generator that sampling draws from."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def save(run, step, model, optimizer, **counters):
    """Write run/checkpoints/step-NNNNNN and drop all but the last KEPT.

    counters: plain numbers. The sizes of metrics.jsonl and samples.jsonl go in, for `load` to cut back what came after.
    """
    root = Path(run) / "checkpoints"
    root.mkdir(exist_ok=True)
    for stale in root.glob("*.part"):
        shutil.rmtree(stale)
    part, final = root / f"step-{step:06}.part", root / f"step-{step:06}"
    part.mkdir()
    try:
        save_model(model, str(part / "model.safetensors"))
        sizes = {name: _size(Path(run) / name) for name in ("metrics.jsonl", "samples.jsonl")}
        state = {"step": step, "optimizer": optimizer.state_dict(), "rng": rng_state(), "sizes": sizes, **counters}
        torch.save(state, part / "state.pt")
        for file in part.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.replace(part, final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for old in sorted(root.glob("step-??????"))[:-KEPT]:
        shutil.rmtree(old)


def _size(path):
    return path.stat().st_size if path.exists() else 0


def load(run, model, optimizer, say):
    """Put the latest readable checkpoint into model, optimizer and the generators, and cut the run's files back to it.

    Returns its counters, those of step 0 if there is no checkpoint yet. say(line) tells of an unreadable one. Raises
    ValueError if there are checkpoints and none can be read, or if metrics.jsonl is shorter than it was.
    """
    run = Path(run)
    found = sorted((run / "checkpoints").glob("step-??????"), reverse=True)
    for folder in found:
        try:
            device = next(model.parameters()).device
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            load_model(model, str(folder / "model.safetensors"), device=str(device))
        except Exception as error:  # torn zip, torn header, missing file: each library has its own type
            why = (str(error).strip() or type(error).__name__).split("\n")[0][:120]
            say(f"checkpoint {folder.name} cannot be read ({why}); falling back to the one before")
            continue
        optimizer.load_state_dict(state.pop("optimizer"))
        set_rng_state(state.pop("rng"))
        break
    else:
        if found:
            raise ValueError(f"no checkpoint in {run / 'checkpoints'} can be read; start again with --overwrite")
        state = {"step": 0, "cursor": 0, "bad_steps": 0, "sizes": {"metrics.jsonl": 0, "samples.jsonl": 0}}
    for name, size in state.pop("sizes").items():
        path = run / name
        if _size(path) < size:
            raise ValueError(f"{path} is shorter than when the checkpoint was written; start again with --overwrite")
        if path.exists():
            os.truncate(path, size)
    return state
