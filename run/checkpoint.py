"""Checkpoints, and files that are written completely or not at all.

A checkpoint is a folder checkpoints/step-000020. It holds the policy and its tokenizer, as
from_pretrained loads them, and state.pt with our own tensors and numbers, which is read with
weights_only=True. It is written under another name and then renamed, so a checkpoint that exists is
complete, unless the disk itself failed; then the one before it is used.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from run.runs import checked_rows, read_config, read_log
from trainer import adapter
from trainer.lora import adapted, merged_model

KEPT = 2  # checkpoints
# One JSON object per line, appended while the run goes on.
LINES = ("metrics.jsonl", "samples.jsonl", "held_out.jsonl")
RUN_FILES = ("config.json", *LINES, "curves.png", "samples.html", "checkpoints", "model")
RUN_FILES += ("adapter", "best")  # of --lora and --keep-best
RUN_FILES += ("track.json", "tensorboard", "wandb")  # of --track


# Folders


def refuse_existing(out, eval_only):
    """Raise ValueError if the folder holds a run, or with --eval-only an evaluation."""
    if eval_only and (out / "eval.json").exists():
        raise ValueError(
            f"{out} holds an evaluation already: --overwrite replaces it, --out FOLDER leaves it"
        )
    if not eval_only and any((out / name).exists() for name in RUN_FILES):
        raise ValueError(
            f"{out} holds a run already: --resume {out} continues it, --overwrite deletes it, "
            f"--out FOLDER leaves it alone"
        )


def clear(out, source):
    """Create the folder, or delete the run that it holds; its other files stay.

    source: the model that the new run starts from. Raises ValueError, and deletes nothing, if it is
    part of the old run.
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
    """Delete a file or a folder, if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def model_folder(name):
    """The folder or Hub name to load for --model.

    A run's folder stands for its trained model, or for its latest checkpoint if the run is not
    done. Every other name stands for itself. Raises ValueError if a run has no model yet.
    """
    run = Path(name)
    try:
        status = read_config(run)["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return name  # not the folder of a run
    choices = [run / "model", *steps_saved(run).values()]  # the last one that is there is taken
    if status == "done":
        choices.append(run / "model")
    files = "config.json", adapter.CONFIG
    found = [path for path in choices if any((path / file).is_file() for file in files)]
    if not found:
        raise ValueError(
            f"--model {name} is a run without a model or a checkpoint: resume it first"
        )
    return str(found[-1])


def find_model(name):
    """model_folder; prints a line if that is not the name itself."""
    folder = model_folder(name)
    if folder != name:
        print(f"--model {name} is a run: taking {folder}")
    return folder


# Files


@contextlib.contextmanager
def whole(path):
    """Write a file or folder completely or not at all.

    Yields a temporary name to write to, which is renamed to `path` at the end. If anything fails,
    the old content of `path` stays and the temporary one is deleted. Raises OSError, with the path,
    if it cannot be written.
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
    except (OSError, RuntimeError, SafetensorError) as error:
        # A full disk raises any of the three: it depends on the library that is writing.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"cannot write {path}: {cause}") from None
    finally:
        with contextlib.suppress(OSError):
            remove(part)


def sync(path):
    """fsync a file or a folder's list of names, so that it survives a power failure."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path, value):
    """Replace the file by the value as JSON, completely or not at all."""
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


def append_lines(path, rows):
    """Append each row as a line of JSON, all rows or none; NaN and infinity are written as null."""
    data = b""
    for row in rows:
        finite = json.loads(json.dumps(row), parse_constant=lambda _: None)
        data += json.dumps(finite, ensure_ascii=False).encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while data:  # an unbuffered write may write a part
                data = data[file.write(data) :]
        except OSError as error:
            file.truncate(size)
            raise OSError(f"cannot write {path}: {error}") from None


def save_pretrained(run, model, tokenizer):
    """Write the trained model to run/model, as from_pretrained reads it; adapters to run/adapter.

    Each folder is written completely or not at all.
    """
    with whole(run / "model") as part:
        write_model(part, model, tokenizer)
    if adapted(model):
        with whole(run / "adapter") as part:
            part.mkdir()
            adapter.save_adapter(part, model)


def save_best(run, model, tokenizer, line):
    """Write the model to run/best if the evaluation `line` is better than that of the model there.

    best.json says which evaluation that was.
    """
    best = read_best(run)
    if best and line["accuracy"] <= best["accuracy"]:
        return
    with whole(run / "best") as part:
        write_model(part, model, tokenizer)
        about = {name: line[name] for name in ("step", "accuracy", "n")}
        (part / "best.json").write_text(json.dumps(about) + "\n")


def read_best(run):
    """{"step", "accuracy", "n"} of the evaluation whose model is in run/best; None if none is."""
    path = run / "best" / "best.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write_model(folder, model, tokenizer):
    """Write a folder that from_pretrained loads, adapters merged into the weights."""
    model = merged_model(model)
    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        # Some models come with settings that save_pretrained refuses: keep only the token ids.
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# Checkpoints


def steps_saved(run):
    """{step: folder} of the run's checkpoints, in order of their steps."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if not path.suffix]
    return dict(sorted((int(path.name.removeprefix("step-")), path) for path in folders))


def line_sizes(run):
    """{file: bytes} of the run's LINES files; `load` cuts them back to these sizes."""
    return {name: (run / name).stat().st_size for name in LINES if (run / name).exists()}


def save(run, step, model, tokenizer, optimizer, sizes, **counters):
    """Write run/checkpoints/step-NNNNNN, and delete all but the last KEPT checkpoints.

    sizes: `line_sizes` after the step's training lines. counters: numbers that `load` returns.
    """
    root = run / "checkpoints"
    root.mkdir(exist_ok=True)
    for stale in root.glob("*.part"):  # of a process that was killed
        remove(stale)
    for name in sizes:
        sync(run / name)  # a checkpoint must not survive a power failure without its lines
    state = {"step": step, "optimizer": optimizer.state_dict(), "sizes": sizes, **counters}
    state["rng"] = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    with whole(root / f"step-{step:06}") as part:
        part.mkdir()
        if adapted(model):
            adapter.save_adapter(part, model)
        else:
            write_model(part, model, tokenizer)
        # An open file: given a path, torch.save would hide the reason of a failure.
        with open(part / "state.pt", "wb") as file:
            torch.save(state, file)
    saved = steps_saved(run)
    # A checkpoint of a later step is one that `load` could not read: it goes too.
    kept = [known for known in saved if known <= step][-KEPT:]
    for known in saved.keys() - kept:
        remove(saved[known])


def load(run, model, optimizer, steps):
    """Load the latest readable checkpoint, and cut the run's LINES files back to its step.

    steps: of the whole run. After the last of them samples.jsonl stays, for nothing is sampled any
    more. Restores the model, the optimizer and the random generators. Returns the checkpoint's
    counters; those of step 0 if the run has no checkpoint yet. Prints a line for an unreadable
    checkpoint. Raises ValueError if there are checkpoints and none can be read.
    """
    saved = steps_saved(run)
    state, why = None, "there is none"
    for folder in reversed(saved.values()):
        try:
            state = restore(run, folder, model, optimizer)
            break
        except Exception as error:  # truncated zip, broken header, missing file: many types
            why = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
            print(f"checkpoint {folder.name} cannot be read ({why}); taking the one before")
    if state is None:
        if saved or (run / "model").exists():
            raise ValueError(
                f"no checkpoint in {run / 'checkpoints'} can be read ({why}); mend that, or start "
                "again with --overwrite"
            )
        state = {"step": 0, "cursor": 0, "history": [], "bad_steps": 0, "sizes": {}}
    sizes = state.pop("sizes")
    for name in LINES:
        is_whole = name == "samples.jsonl" and state["step"] == steps
        if (run / name).exists() and not is_whole:
            os.truncate(run / name, sizes.get(name, 0))
    return state


def load_weights(folder, model):
    """Copy a folder's weights into the model. Raises ValueError if one is missing."""
    saved, found = type(model).from_pretrained(
        folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
    )
    if found["missing_keys"]:  # transformers fills them in at random
        raise ValueError(f"it lacks {min(found['missing_keys'])}")
    model.load_state_dict(saved.state_dict())


def restore(run, folder, model, optimizer):
    """Load one checkpoint. Returns its counters and sizes. Raises an exception of any type."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    for name, size in state["sizes"].items():
        if (run / name).stat().st_size < size:
            raise ValueError(f"{name} is shorter than it was")
    if "metrics.jsonl" in state["sizes"]:  # what cannot be drawn is found now, not after training
        path = run / "metrics.jsonl"
        checked_rows(read_log(path, state["sizes"]["metrics.jsonl"]), path)
    if adapted(model):
        adapter.load_adapter(folder, model)
    else:
        load_weights(folder, model)
    optimizer.load_state_dict(state.pop("optimizer"))
    rng = state.pop("rng")
    torch.set_rng_state(rng["cpu"])
    torch.cuda.set_rng_state_all(rng["cuda"])
    return state
