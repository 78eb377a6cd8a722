"""The policy: load a language model and its tokenizer, and make it a function of its input alone.

sampling.py samples from it, and logprobs.py computes its log-probabilities.
"""

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as hf_logging

from trainer.adapter import merge_adapter, read_config
from trainer.prompts import AUTO, Prompts
from trainer.sources import first_words, is_path

SMALL_MODEL = 10_000_000  # weights; below this a second thread hardly helps

hf_logging.disable_progress_bar()  # "Loading weights" would break up our own lines


def load_policy(name, device="cpu", chat=AUTO):
    """(model, tokenizer, EOS ids, pad id): a causal language model with fp32 weights in eval mode.

    name: "tiny" (the embedded model), a local folder or a Hub name.
    Raises ValueError, in one line, if there is no such model, no tokenizer or no
    EOS, or if a weight is missing or not finite.
    """
    if name == "tiny":
        name = str(Path(__file__).resolve().parents[1] / "tiny")
        if not Path(name).is_dir():
            raise ValueError(f"the embedded model is missing: no folder {name}; pass --model")
    if is_path(name) and not Path(name).is_dir():
        raise ValueError(
            f"cannot load the model {name!r}: no such folder. Pass --model FOLDER, or --preset tiny"
        )
    try:
        model, tokenizer = read_model(name)
    except Exception as error:  # a dozen types, of transformers, safetensors and the Hub
        where = "a local folder"
        if not Path(name).is_dir():
            where = "no local folder, and not found in the cache or on the Hub"
        why = first_words(error)
        raise ValueError(
            f"cannot load the model {name!r} ({where}): {why} Pass --model FOLDER, or --preset tiny"
        ) from None
    switch_off_randomness(model)
    name_outputs(model)
    end_of_turn = Prompts(tokenizer, chat=chat).end_of_turn()
    eos_ids, pad_id = special_tokens(model, tokenizer, end_of_turn)
    model.generation_config.eos_token_id = eos_ids  # a saved model then stops at them too
    return model.to(device).eval(), tokenizer, eos_ids, pad_id


def read_model(name, adapter=True):
    """(model, tokenizer) from a folder or the Hub; ValueError if they cannot be trained as is.

    Reads weights from safetensors only, and runs no code of the repository. adapter: merge the LoRA
    adapter that is there, if one is.
    """
    found = find_adapter_config_file(name) if adapter else None
    if found:
        return with_adapter(name, read_config(found))
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError("it holds no model: there is no config.json.")
    safe = {"trust_remote_code": False}
    # An installed peft would load an adapter: it must look for it where none is.
    elsewhere = {} if adapter else {"adapter_kwargs": {"subfolder": "none"}}
    tokenizer = AutoTokenizer.from_pretrained(name, **safe)
    model, found = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        **safe,
        **elsewhere,
    )
    # transformers fills in a missing vocabulary as empty, and missing weights with random ones.
    if not tokenizer("1", add_special_tokens=False).input_ids:
        raise ValueError("its tokenizer has no vocabulary; is tokenizer.json missing?")
    missing = found["missing_keys"]
    if missing:
        raise ValueError(f"its files lack {len(missing)} weights, {min(missing)} among them.")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise ValueError("some of its weights are not finite.")
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError("none of its weights takes a gradient, so it cannot be trained.")
    return model, tokenizer


def with_adapter(name, config):
    """`read_model` of a LoRA adapter, merged into the weights beside it, else into its base.

    config: of its adapter_config.json.
    """
    beside, base = (Path(name) / "config.json").is_file(), config.get("base_model_name_or_path")
    if not beside and (not base or base == name):
        raise ValueError("it holds an adapter without a model, and names no base model.")
    try:
        model, tokenizer = read_model(name if beside else base, adapter=not beside)
    except Exception as error:
        if beside:
            raise
        raise ValueError(f"the base of its adapter, {base!r}: {first_words(error)}") from None
    if not beside and (Path(name) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    merge_adapter(name, config, model)
    model.name_or_path = name  # the base of an adapter that is trained on it
    print(f"the adapter in {name} is merged into {'the weights beside it' if beside else base}")
    return model, tokenizer


def use_threads(threads, model):
    """Set the number of CPU threads: `threads`, or for "auto" a choice by the size of the model.

    Threads wait for each other at the end of every operation. For a small model the operations are
    so short that a second thread hardly helps; on a busy machine it makes a step many times slower.
    If OMP_NUM_THREADS is set, "auto" keeps it.
    """
    weights = sum(weight.numel() for weight in model.parameters())
    if threads != "auto":
        torch.set_num_threads(int(threads))
        reason = "as asked"
    elif "OMP_NUM_THREADS" in os.environ:
        reason = "OMP_NUM_THREADS"
    elif weights < SMALL_MODEL:
        torch.set_num_threads(1)
        reason = f"auto: the model has {weights / 1e6:.1f} M weights"
    else:
        reason = f"auto: the model has {weights / 1e6:.0f} M weights"
    print(f"CPU threads: {torch.get_num_threads()} ({reason}); --threads N changes it")


def all_configs(model):
    """All configs of the model and its modules, nested ones (such as text_config) included."""
    waiting = [getattr(module, "config", None) for module in model.modules()]
    found = {}
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting.extend(vars(config).values())
    return list(found.values())


def switch_off_randomness(model):
    """Set every dropout and jitter rate to 0, so that the policy is a function of its input alone.

    In train mode, which gradient checkpointing needs, modules read these rates from their own
    attributes or from a config. A rate is a number whose name contains "drop" or "jitter".
    """
    for holder in [*model.modules(), *all_configs(model)]:
        for name, value in list(vars(holder).items()):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and ("drop" in name or "jitter" in name):
                setattr(holder, name, type(value)(0))
        if isinstance(holder, torch.nn.modules.dropout._DropoutNd):
            holder.p = 0.0


def name_outputs(model):
    """Have the model return its outputs by name, without a router's auxiliary loss.

    No loss here uses the auxiliary loss, and generate fails on it: a cache holds no router logits.
    """
    for config in all_configs(model):
        config.return_dict = True
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False


def special_tokens(model, tokenizer, end_of_turn=None):
    """(sorted EOS ids, pad id).

    The EOS ids are those of the generation config, the config and the tokenizer, and end_of_turn,
    the token that closes a turn in the chat template. Raises ValueError if there is none.
    """
    eos = {end_of_turn}
    for source in (model.generation_config, model.config, tokenizer):
        ids = source.eos_token_id
        eos.update(ids if isinstance(ids, list) else [ids])
    # transformers adds a missing EOS or pad token to a tokenizer; the model has no row for it.
    known = range(len(model.get_input_embeddings().weight))
    eos = sorted(token for token in eos if token is not None and token in known)
    if not eos:
        raise ValueError(
            "the model names no EOS token (generation_config.eos_token_id): it could never learn "
            "to stop"
        )
    warn_of_ordinary(eos, tokenizer)
    pad = tokenizer.pad_token_id
    # An EOS may serve as padding, because completion_mask goes by position.
    return eos, pad if pad in known else eos[0]


def warn_of_ordinary(eos, tokenizer):
    """Print a line for each EOS id that stands for a text, if the tokenizer has an EOS of its own.

    A config whose eos_token_id is a default, made for another vocabulary, may name a digit.
    """
    own = tokenizer.eos_token
    if own is None:
        return
    for token in eos:
        text = tokenizer.convert_ids_to_tokens(token)
        if text in (own, None) or token in tokenizer.added_tokens_decoder:
            continue
        print(
            f"warning: a completion ends at every {text!r}: eos_token_id {token} of the model's "
            f"config.json or generation_config.json is an ordinary token of its tokenizer, whose "
            f"EOS is {own!r}. Is it a default of another vocabulary? Then correct both files"
        )


CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def context_length(model):
    """The most tokens per row, prompt and completion together, that the model supports.

    2**31 if the config names no limit. Rotary embeddings of type longrope change all their angles
    once a row is longer than the original context: a later token would then change earlier
    log-probabilities, so rows stay within that context. (Type dynamic changes its angles only
    beyond max_position_embeddings.)
    """
    config = model.config.get_text_config()
    stated = [getattr(config, name, None) for name in CONTEXT_NAMES]
    limit = min((n for n in stated if isinstance(n, int) and n > 0), default=2**31)
    rope = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [kind for kind in rope.values() if isinstance(kind, dict)]
    for kind in per_layer_type or [rope]:
        longrope = kind.get("rope_type") == "longrope"
        original = kind.get("original_max_position_embeddings")
        if longrope and original and original < limit:
            print(
                f"rotary embeddings of type longrope change beyond {original} tokens: "
                f"rows are limited to that, not to {limit}"
            )
            limit = original
    return limit
