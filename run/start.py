"""Start or resume a run: its folder, its config.json, its model and its problems."""

import gc
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import torch

from run import checkpoint, origin
from run.algorithm import checked_options
from run.checks import check_config, fill
from run.machine import machine_name, warn_of_slow_bf16, why_no_gpu
from run.names import check_name
from run.options import CHANGEABLE_ON_RESUME, Options, flag
from run.ownreward import load_reward, try_reward
from run.runs import read_config
from trainer.bf16 import hold_in_bf16
from trainer.data import load_problems, split_overlap
from trainer.grading import check_answer
from trainer.lora import add_adapters
from trainer.methods import label
from trainer.policy import context_length, load_policy, use_threads
from trainer.probes import check_adapters, probe
from trainer.prompts import Chat, encode_problems, show, start_line
from trainer.sources import offline_without_network

# Python's garbage collector need not look through the imported libraries again and again: they
# stay. This saves half a second of the start.
gc.freeze()


def chosen(given, argv=()):
    """(options, folder, config.json so far) of the run that a command line asks for.

    given: of `parse`. Raises ValueError.
    """
    if "resume" in given:
        return resumed(given, Path(given["resume"]))
    o = fill(given)
    if not o.fit:
        print_preset(o, given)
    name = f"{label(o.algo)}-{o.preset}"
    if o.eval_only:
        parts = [re.sub(r"[^\w.]+", "-", path)[-100:].strip("-.") for path in (o.model, o.data)]
        name = "-".join(["eval", *parts])
    out = Path(o.out or f"runs/{name}-s{o.seed}")
    command = shlex.join(["python", "train.py", *argv])
    return o, out, {"options": asdict(o), "command": command, "status": "running"}


def print_preset(o, given):
    """Print the preset, why it was taken, and how to get the other one."""
    why = "a CUDA GPU was found" if torch.cuda.is_available() else why_no_gpu()
    other = "--preset gsm8k trains Qwen2.5-0.5B on GSM8K, which is slow without a GPU"
    if o.preset == "gsm8k":
        other = "--preset tiny trains the embedded model in minutes, with or without a GPU"
        why = why if torch.cuda.is_available() else "for --eval-only on GSM8K"
    if given.get("preset", "auto") != "auto":
        why = "as asked"
    print(f"preset {o.preset} ({why}): {o.model} on {o.data}; {other}")


def resumed(given, out):
    """`chosen`, of --resume. Raises ValueError if an option differs from that of the run."""
    try:
        config = read_config(out)
        saved, steps = config["options"], config["options"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out} holds no run to resume (no readable config.json)") from None
    check_config(config, out / "config.json")
    refuse_other_options(given, Options(**saved), out)
    changed = {name: given[name] for name in CHANGEABLE_ON_RESUME if name in given}
    o = fill({**saved, **changed})
    if o.steps < steps:
        raise ValueError(f"--resume {out}: it has {steps} steps, and --steps may only be raised")
    return o, out, {**config, "options": asdict(o), "status": "running"}


def refuse_other_options(given, run, out):
    """Raise ValueError if an option of the command line differs from that of the run, Options."""
    check_name(run.algo)
    for name, value in given.items():
        if name in ("resume", *CHANGEABLE_ON_RESUME):
            continue
        own = getattr(run, name)
        if name == "option":
            value = checked_options(run.algo, value)  # its values were texts
        if isinstance(value, dict) and value.items() <= own.items():
            continue  # the run may have further ones
        if value != own:
            raise ValueError(
                f"--resume {out}: its {flag(name)} is {own}, not {value}; only --steps (upwards), "
                f"--save-every and --track may change"
            )


def set_up(o, new=None):
    """Load what the options name: the data, the model, and how its rows can be run.

    new: the folder of a new run; refused, once the data are read, if it holds one. Returns (model,
    tokenizer, generation, training problems, held-out problems). generation: the remaining keyword
    arguments of sampling.sample. Each problem has its "prompt_ids".
    """
    torch.manual_seed(o.seed)
    offline_without_network(o.model, o.data)
    own = load_reward(o.reward)
    train, held_out, overlap = load_data(o, any_answer=bool(own and own.correct))
    if own:
        try_reward(o, own, held_out[0])
    if new and not o.overwrite:
        checkpoint.refuse_existing(new, o.eval_only)

    chat, (model, tokenizer, eos_ids, pad_id) = load_model(o)
    if not (own and own.correct):
        check_answer(tokenizer)

    longest = context_length(model) - o.max_new_tokens
    vocabulary = len(model.get_input_embeddings().weight)
    how = o.prompt, longest, vocabulary, chat, eos_ids, o.max_new_tokens
    train, held_out = encode(o, tokenizer, train, held_out, overlap, how)
    print(start_line(tokenizer, chat, eos_ids))

    prompts = [problem["prompt_ids"] for problem in train + held_out]
    layout = probe(model, prompts, o.max_new_tokens, pad_id, o.cache)
    generation = {"max_new_tokens": o.max_new_tokens, "eos_ids": eos_ids, "pad_id": pad_id}
    generation["layout"] = layout
    return model, tokenizer, generation, train, held_out


def load_model(o):
    """(the Chat of its prompts, what `load_policy` returns) of the model that the options name."""
    chat = Chat(o.chat_template, o.system, o.template_option)
    loaded = load_policy(checkpoint.find_model(o.model), o.device, chat)
    use_threads(o.threads, loaded[0])
    warn_of_slow_bf16(o)
    return chat, loaded


def encode(o, tokenizer, train, held_out, overlap, how):
    """(training problems, held-out problems) with their "prompt_ids"; prints how many are dropped.

    how: the remaining arguments of encode_problems. overlap: of load_data.
    """
    long_train = 0
    if not o.eval_only:
        train, long_train = encode_problems(tokenizer, train, *how)
    held_out, long_held_out = encode_problems(tokenizer, held_out, *how)
    if overlap or long_train or long_held_out:
        print(
            f"dropped problems: {overlap} of training that are held out too; prompts over "
            f"{how[1]} tokens: {long_train} of training, {long_held_out} held out"
        )
    # Cut only now: no training question is among the held-out ones beyond it.
    return train, held_out[: o.eval_n]


def load_data(o, any_answer):
    """(training problems, held-out problems, how many training problems were held out too).

    With --eval-only there are no training problems.
    """
    how = any_answer, o.columns, o.skip_bad_rows
    held_out = load_problems(o.data, "test", *how)
    train, overlap = [], 0
    if not o.eval_only:
        train, overlap = split_overlap(load_problems(o.data, "train", *how), held_out)
    return train, held_out, overlap


def adapt(o, model):
    """Freeze the model, in place, and give it adapters. Returns the names of their layers.

    The frozen weights are held in the dtype of the compute: nothing of them is trained, so no
    update is rounded away.
    """
    if o.dtype == "bf16":
        hold_in_bf16(model)
    targets = o.lora_targets and set(o.lora_targets.split(","))
    return add_adapters(model, o.lora, o.lora_alpha or 2 * o.lora, targets)


def add_lora(o, model):
    """--lora: `adapt` the model, and print how. Raises ValueError if it does not work with it."""
    if not o.lora:
        return
    frozen = sum(weight.numel() for weight in model.parameters())
    layers = adapt(o, model)
    check_adapters(model)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    print(
        f"LoRA of rank {o.lora} in {len(layers)} linear layers: {trained / 1e6:.2f} M weights are "
        f"trained, {frozen / 1e6:.2f} M are frozen ({o.dtype})"
    )


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
    if "weights" not in config:  # a new run
        return {**now, "machine": machine_name(model.device)}
    if config["weights"] != now["weights"]:
        raise ValueError(
            f"the start model {o.model} is not what it was when the run began; the run cannot be "
            f"resumed with other start weights"
        )
    changed = origin.other_code(config, now)
    if changed:
        print(f"note: changed since the run began: {changed}")
    return {**now, **origin.both(config, now)}


def show_prompt(o):
    """--show-prompt: print the first prompt as the model gets it."""
    _, tokenizer, generation, train, held_out = set_up(o)
    print(show(tokenizer, (train or held_out)[0], generation["eos_ids"]))
