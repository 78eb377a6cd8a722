"""The policy: load it, sample from it, and compute its log-probabilities without ever holding its logits.

Three facts shape this file. Sampling and training must mean the same distribution: softmax(logits / temperature) over
the whole vocabulary, nothing else. The logits are the largest tensor of all: 64 completions of 512 tokens of Qwen2.5's
151,936 words are 18.5 GiB in fp32, so they are made a few tokens at a time and never kept. And a group's G completions
have one prompt: causal attention gives it the same keys and values in every row, so it is run once, not G times.
"""

import contextlib
import copy
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.utils import logging as hf_logging

from trainer.checkpoint import find_model
from trainer.logprobs import PLAIN, cache_argument, left_padded, prefill
from trainer.prompts import AUTO, Prompts

SMALL_MODEL = 10_000_000  # weights; below this a second thread gains little or nothing

hf_logging.disable_progress_bar()  # "Loading weights" and the like, in the middle of our own lines


@dataclass
class Rollout:
    """B completions and what is known of them; a prompt's group_size rows are contiguous."""

    prompts: list  # B lists of token ids, without padding
    completions: torch.Tensor  # [B, T] token ids, right-padded
    mask: torch.Tensor  # [B, T] bool, on through the first EOS
    truncated: torch.Tensor  # [B] bool: no EOS within max_new_tokens
    problems: list = None  # B problems
    texts: list = None  # B completions, decoded
    right: torch.Tensor = None  # [B] 1 where the answer is right
    rewards: torch.Tensor = None  # [B] what is trained on
    old_logprobs: torch.Tensor = None  # [B, T] of the policy that sampled
    entropy: torch.Tensor = None  # [B, T] nats, of the policy that sampled
    ref_logprobs: torch.Tensor = None  # [B, T] of the start policy, only where a loss asks for it
    advantages: torch.Tensor = None  # [B] or [B, T]
    logprobs: torch.Tensor = None  # [B, T] of the policy at its latest update on the row

    @property
    def lengths(self):
        """Tokens of each row, prompt and completion together. [B], on the CPU"""
        return self.mask.sum(1).cpu() + torch.tensor([len(p) for p in self.prompts])

    def groups(self, group_size):
        """A Rollout for each group, with what sampling and rewarding filled in."""
        starts = range(0, len(self.prompts), group_size)
        return [self.rows(start, start + group_size) for start in starts]

    def rows(self, start, stop):
        """The rows start..stop of what sampling and rewarding filled in."""
        return Rollout(*(getattr(self, name)[start:stop] for name in SAMPLED))

    @staticmethod
    def join(pieces):
        """One Rollout of several, completions padded to the longest."""
        width = max(piece.mask.shape[1] for piece in pieces)
        columns = {name: [getattr(piece, name) for piece in pieces] for name in SAMPLED}
        for name in ("completions", "mask"):
            columns[name] = [pad(x, (0, width - x.shape[1])) for x in columns[name]]
        return Rollout(
            *(sum(c, []) if isinstance(c[0], list) else torch.cat(c) for c in columns.values())
        )


SAMPLED = ("prompts", "completions", "mask", "truncated", "problems", "texts", "right", "rewards")


def load_policy(name, device="cpu", chat=AUTO):
    """(model, tokenizer, EOS ids, pad id): a causal language model with fp32 weights in eval mode.

    name: "tiny" (the embedded one), a local folder, a run's folder (see checkpoint.model_folder) or
    a Hub name. Weights are read from safetensors alone and no code of the repository is run. Raises
    ValueError with one line if there is no such model, no tokenizer or no EOS, or if a weight is
    missing or not finite.
    """
    safe = {"trust_remote_code": False}
    if name == "tiny":  # the embedded one, wherever one stands
        name = str(Path(__file__).resolve().parents[1] / "tiny")
        if not Path(name).is_dir():
            raise ValueError(f"the embedded model is missing: no folder {name}; pass --model")
    name = find_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **safe)
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **safe
        )
        if not tokenizer(
            "1", add_special_tokens=False
        ).input_ids:  # transformers makes up an empty one
            raise ValueError("its tokenizer has no vocabulary; is tokenizer.json missing?")
        if missing := found["missing_keys"]:  # transformers makes them up, at random
            raise ValueError(f"its files lack {len(missing)} weights, {min(missing)} among them.")
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise ValueError("some of its weights are not finite.")
    except Exception as error:  # a dozen types, of transformers, safetensors and the Hub
        why = str(error).strip().split("\n")[0]
        where = (
            "a local folder"
            if Path(name).is_dir()
            else "no local folder, nor found in the cache or on the Hub"
        )
        line = (
            f"cannot load the model {name!r} ({where}): {why} Pass --model FOLDER, or --preset tiny"
        )
        raise ValueError(line) from None
    switch_off_randomness(model)
    name_outputs(model)
    end_of_turn = Prompts(tokenizer, chat=chat).end_of_turn()
    eos_ids, pad_id = special_tokens(model, tokenizer, end_of_turn)
    model.generation_config.eos_token_id = eos_ids  # so that generate stops a saved model there too
    return model.to(device).eval(), tokenizer, eos_ids, pad_id


def use_threads(threads, model):
    """Set the number of CPU threads: `threads`, or a choice by the size of the model for "auto".

    Threads wait for each other at the end of every operation. A small model has so little to do in
    between that a second thread hardly helps; on a busy machine it makes a step many times slower.
    OMP_NUM_THREADS, where it is set, is the user's choice.
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
    """The configs of the model and its modules, and the configs in them (text_config, attn_config)."""
    waiting = [getattr(module, "config", None) for module in model.modules()]
    found = {}
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting.extend(vars(config).values())
    return list(found.values())


def switch_off_randomness(model):
    """Set every rate of dropout or jitter to 0: a policy is one function of its input.

    In train mode, which gradient checkpointing needs, modules read these rates from an attribute of
    their own or from a config. A rate is a number whose name contains "drop" or "jitter".
    """
    for holder in [*model.modules(), *all_configs(model)]:
        for name, value in list(vars(holder).items()):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and ("drop" in name or "jitter" in name):
                setattr(holder, name, type(value)(0))
        if isinstance(holder, torch.nn.modules.dropout._DropoutNd):
            holder.p = 0.0


def name_outputs(model):
    """Have the model return outputs by name, without the auxiliary loss of a router.

    No loss here uses that one, and generate fails on it: a cache holds no router logits.
    """
    for config in all_configs(model):
        config.return_dict = True
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False


def special_tokens(model, tokenizer, end_of_turn=None):
    """(sorted EOS ids, pad id). An EOS is what the generation config, the config or the tokenizer
    names as one, and the token with which the chat template closes a turn (prompts.end_of_turn).
    """
    eos = {end_of_turn} - {None}
    for named in (
        model.generation_config.eos_token_id,
        model.config.eos_token_id,
        tokenizer.eos_token_id,
    ):
        eos |= set(named if isinstance(named, list) else [named]) - {None}
    # A tokenizer may name a word that its model has no row for: transformers adds a missing EOS or pad at the end.
    known = range(model.get_input_embeddings().weight.shape[0])
    eos &= set(known)
    if not eos:
        raise ValueError(
            "the model names no EOS token (generation_config.eos_token_id): it could never learn to stop"
        )
    pad = tokenizer.pad_token_id
    return sorted(eos), pad if pad in known else min(
        eos
    )  # the mask goes by position, so pad may be an EOS


def sampling_copy(model, dtype):
    """What generate runs: the model itself for fp32, a bf16 copy for bf16.

    generate reads every weight once per token, and bf16 has half the bytes. The copy is made anew
    for each rollout, so no update has to hold it. What is trained stays fp32: at a learning rate of
    1e-6 an update is below half a bf16 ulp.
    """
    return copy.deepcopy(model).bfloat16() if dtype == "bf16" else model


def completion_mask(completions, eos_ids):
    """On through the first EOS inclusive, by position: the policy must learn to stop. [B, T] ids -> [B, T] bool"""
    is_eos = torch.isin(completions, torch.tensor(eos_ids, device=completions.device)).long()
    return is_eos.cumsum(1) - is_eos == 0


@torch.no_grad()
def sample(
    model,
    prompts,
    n,
    *,
    temperature,
    max_new_tokens,
    eos_ids,
    pad_id,
    layout=PLAIN,
    cache=None,
    rows_at_once=None,
    progress=None,
):
    """n completions of each prompt by Hugging Face generate; temperature 0 is greedy.

    prompts: P lists of token ids. Returns a Rollout of P * n rows, on the model's device. Prompts of
    similar length go together. layout: what the model allows (probes.probe); the completions do not
    depend on it. rows_at_once bounds the rows of one generate call, None puts all in one.
    """
    settings = sampling_settings(temperature, max_new_tokens, eos_ids, pad_id)
    settings.cache_implementation = cache  # of generate; None: its default
    size = len(prompts) if rows_at_once is None else max(1, rows_at_once // n)
    pieces = [None] * len(prompts)
    for chosen in batches(prompts, size, layout.equal_lengths):
        batch = [prompts[i] for i in chosen]
        out = generate(model, batch, n, settings, share_prompts=layout.share_prompts)
        for i, rows in zip(chosen, out.split(n), strict=True):
            pieces[i] = rows
        if progress is not None:
            progress.update(len(chosen))
    completions = pad_sequence([row for rows in pieces for row in rows], True, pad_id)  # [P * n, T]
    ended = torch.isin(completions, torch.tensor(eos_ids, device=completions.device)).any(1)
    repeated = [prompt for prompt in prompts for _ in range(n)]
    return Rollout(repeated, completions, completion_mask(completions, eos_ids), ~ended)


def sampling_settings(temperature, max_new_tokens, eos_ids, pad_id):
    """The whole of what generate is told: softmax(logits / temperature), and nothing else."""
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids,
        pad_token_id=pad_id,
        use_cache=True,
        repetition_penalty=1.0,
        do_sample=temperature > 0,
    )
    if temperature > 0:
        settings.update(temperature=temperature, top_k=0, top_p=1.0)
    return settings


def batches(prompts, size, equal_lengths):
    """Indices of prompts in batches of at most `size`, sorted by length; see Layout.equal_lengths."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order]
    if equal_lengths:
        by_length = itertools.groupby(order, key=lambda i: len(prompts[i]))
        groups = [list(group) for _, group in by_length]
    starts = [(group, start) for group in groups for start in range(0, len(group), size)]
    return [group[start : start + size] for group, start in starts]


def generate(model, prompts, n, settings, share_prompts=False):
    """n completions of each prompt in one generate call, a prompt's rows contiguous. [P * n, T] ids

    With settings.return_dict_in_generate, the ModelOutput of generate instead.
    """
    ids, real = left_padded(prompts, settings.pad_token_id, model.device)  # [P, L]
    which = torch.arange(len(prompts), device=model.device).repeat_interleave(n)  # [P * n]
    cache = {}
    if share_prompts and n > 1:
        cache[cache_argument(model)] = prefill(model, ids, real, which)
    with generation_config(model, settings):
        out = model.generate(
            ids[which], attention_mask=real[which], generation_config=settings, **cache
        )
    return out if settings.return_dict_in_generate else out[:, ids.shape[1] :]


@contextlib.contextmanager
def generation_config(model, config):
    """generate fills what a config leaves unset from the model's own: for the time of a call, that is ours too."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def context_length(model):
    """The most tokens, prompt and completion together, that the model was built for.

    A rotary embedding of type longrope changes all angles once a row is longer than its original
    context: a later token would change earlier log-probabilities, so rows stay within that context.
    (Type dynamic changes them beyond max_position_embeddings.) 2**31 if the config names no limit.
    """
    config = model.config.get_text_config()
    stated = [getattr(config, name, None) for name in CONTEXT_NAMES]
    limit = min((n for n in stated if isinstance(n, int) and n > 0), default=2**31)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)]  # one per type of layer
    for kind in kinds or [rope]:
        original = kind.get("original_max_position_embeddings")
        if kind.get("rope_type") == "longrope" and original and original < limit:
            print(
                f"rotary embeddings of type longrope change beyond {original} tokens: "
                f"rows are kept within that, not within {limit}"
            )
            limit = original
    return limit
