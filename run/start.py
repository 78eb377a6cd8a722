"""Start or resume a run: its folder, its config.json, its model and its problems."""

import gc
import json
import platform
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import torch

from run import checkpoint, origin
from run.algorithm import checked_options
from run.machine import warn_of_slow_bf16, why_no_gpu
from run.options import CHANGEABLE_ON_RESUME, Options, check_config, check_name, fill, flag
from run.ownreward import load_reward, try_reward
from trainer.data import load_problems, split_overlap
from trainer.grading import check_answer
from trainer.methods import label
from trainer.policy import context_length, load_policy, use_threads
from trainer.probes import probe
from trainer.prompts import Chat, encode_problems, show, start_line
from trainer.sources import offline_without_network

# Python's garbage collector need not look through the imported libraries again and again: they
# stay. This saves half a second of the start.
gc.freeze()


def run_folder(given):
    """The folder of --resume or --out, or one named after the options. Raises ValueError."""
    if "resume" in given:
        out = Path(given["resume"])
        if not (out / "config.json").is_file():
            raise ValueError(f"{out} holds no run to resume (no readable config.json)")
        return out
    o = fill(given)
    name = f"{label(o.algo)}-{o.preset}"
    if o.eval_only:
        name = f"eval-{path_name(o.model)}-{path_name(o.data)}"
    out = Path(o.out or f"runs/{name}-s{o.seed}")
    checkpoint.check_folder(out)
    return out


def path_name(path):
    """A path as part of a folder's name; A/model and B/model get different names."""
    name = re.sub(r"[^\w.]+", "-", path.removesuffix(".jsonl"))
    return name.strip("-.")[-100:]


def begun(given, out, argv):
    """(options, config) of a new run. Prints its preset, why, and how to get the other preset."""
    o = fill(given)
    cuda = torch.cuda.is_available()
    why = "as asked"
    if given.get("preset", "auto") == "auto":
        why = "a CUDA GPU was found" if cuda else why_no_gpu()
        if o.preset == "gsm8k" and not cuda:
            why = "for --eval-only on GSM8K"
    other = "--preset gsm8k trains Qwen2.5-0.5B on GSM8K, which is slow without a GPU"
    if o.preset == "gsm8k":
        other = "--preset tiny trains the embedded model in minutes, with or without a GPU"
    print(f"preset {o.preset} ({why}): {o.model} on {o.data}; {other}")
    if checkpoint.holds_run(out) and not o.overwrite and not o.eval_only:
        raise ValueError(
            f"{out} holds a run already: --resume {out} continues it, --overwrite deletes it, "
            f"--out FOLDER leaves it alone"
        )
    command = shlex.join(["python", "train.py", *argv])
    return o, {"options": asdict(o), "command": command, "status": "running"}


def resumed(given, out):
    """(options, config) of the run to resume. Raises ValueError if an option differs from it."""
    config = read_config(out)
    saved, steps = config["options"], config["options"]["steps"]
    refuse_other_options(given, Options(**saved), out)
    changed = {name: given[name] for name in CHANGEABLE_ON_RESUME if name in given}
    o = fill({**saved, **changed})
    if o.steps < steps:
        raise ValueError(f"--resume {out}: it has {steps} steps, and --steps may only be raised")
    return o, {**config, "options": asdict(o), "status": "running"}


def read_config(out):
    """The config.json of the run to resume. Raises ValueError if this version cannot use it."""
    path = out / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["options"]["steps"]  # every run has it
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out} holds no run to resume (no readable config.json)") from None
    check_config(config, path)
    return config


def refuse_other_options(given, run, out):
    """Raise ValueError if an option of the command line differs from that of the run.

    run: its Options.
    """
    for name, value in given.items():
        if name in ("resume", *CHANGEABLE_ON_RESUME):
            continue
        own = getattr(run, name)
        if name == "option":
            check_name(run.algo)
            value = checked_options(run.algo, value)  # its values were texts
        if isinstance(value, dict) and value.items() <= own.items():
            continue  # the run may have further ones
        if value != own:
            raise ValueError(
                f"--resume {out}: its {flag(name)} is {own}, not {value}; only --steps (upwards), "
                f"--save-every and --track may change"
            )


def set_up(o):
    """Load what the options name: the data, the model, and how its rows can be run.

    Returns (model, tokenizer, generation, training problems, held-out problems). generation: the
    remaining keyword arguments of sampling.sample. Each problem has its "prompt_ids".
    """
    torch.manual_seed(o.seed)
    offline_without_network(o.model, o.data)
    train, held_out, overlap = load_data(o)
    own = load_reward(o.reward)
    if own:
        try_reward(o, own, held_out[0])

    chat = Chat(o.chat_template, o.system, o.template_option)
    model, tokenizer, eos_ids, pad_id = load_policy(checkpoint.find_model(o.model), o.device, chat)
    if not (own and own.correct):
        check_answer(tokenizer)
    use_threads(o.threads, model)
    warn_of_slow_bf16(o)

    longest = context_length(model) - o.max_new_tokens
    vocabulary = len(model.get_input_embeddings().weight)
    how = o.prompt, longest, vocabulary, chat, eos_ids
    long_train = 0
    if not o.eval_only:
        train, long_train = encode_problems(tokenizer, train, *how)
    held_out, long_held_out = encode_problems(tokenizer, held_out, *how)
    held_out = held_out[: o.eval_n]  # only now: no training question is among those beyond it
    if overlap or long_train or long_held_out:
        print(
            f"dropped problems: {overlap} of training that are held out too; prompts over "
            f"{longest} tokens: {long_train} of training, {long_held_out} held out"
        )
    print(start_line(tokenizer, chat, eos_ids))

    prompts = [problem["prompt_ids"] for problem in train + held_out]
    layout = probe(model, prompts, o.max_new_tokens, pad_id, o.cache)
    generation = {"max_new_tokens": o.max_new_tokens, "eos_ids": eos_ids, "pad_id": pad_id}
    generation["layout"] = layout
    return model, tokenizer, generation, train, held_out


def load_data(o):
    """(training problems, held-out problems, how many training problems were held out too).

    With --eval-only there are no training problems.
    """
    any_answer = bool(o.reward and load_reward(o.reward).correct)
    how = any_answer, o.columns, o.skip_bad_rows
    held_out = load_problems(o.data, "test", *how)
    train, overlap = [], 0
    if not o.eval_only:
        train, overlap = split_overlap(load_problems(o.data, "train", *how), held_out)
    return train, held_out, overlap


def made_from(o, model, problems, config):
    """The origin of a run, for config.json: start weights, code, versions, data and machine.

    config: the run's config so far. Raises ValueError if the data or start weights of a resumed run
    have changed; prints a note if the code or the versions have.
    """
    now = {
        "checksum": origin.data_checksum(problems, config.get("checksum")),
        "weights": origin.weights_checksum(model),
        "code": origin.code_checksums(o.algo, o.reward),
        "versions": origin.versions(),
    }
    processor = platform.processor() or platform.machine()
    machine = f"{processor} CPU, {torch.get_num_threads()} threads"
    if model.device.type == "cuda":
        machine = torch.cuda.get_device_name(model.device)
    if "weights" not in config:  # a new run
        return {**now, "machine": machine}
    if config["weights"] != now["weights"]:
        raise ValueError(
            f"the start model {o.model} is not what it was when the run began; the run cannot be "
            f"resumed with other start weights"
        )
    changed = origin.other_code(config, now)
    if changed:
        print(f"note: changed since the run began: {changed}")
    return {**now, **origin.both(config, now)}


def show_prompt(given):
    """--show-prompt: print the first prompt as the model gets it."""
    if "resume" in given:
        o, _ = resumed(given, Path(given["resume"]))
    else:
        o = fill(given)
    _, tokenizer, generation, train, held_out = set_up(o)
    print(show(tokenizer, (train or held_out)[0], generation["eos_ids"]))
