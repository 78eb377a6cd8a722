"""The policy: load it, sample from it, and compute its log-probabilities without ever holding its logits.

Three facts shape this file. Sampling and training must mean the same distribution: softmax(logits / temperature) over
the whole vocabulary, nothing else. The logits are the largest tensor of all: 64 completions of 512 tokens of Qwen2.5's
151,936 words are 18.5 GiB in fp32, so they are made a few tokens at a time and never kept. And a group's G completions
have one prompt: causal attention gives it the same keys and values in every row, so it is run once, not G times.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as hf_logging

from trainer.checkpoint import find_model
from trainer.logprobs import left_padded, prefill
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
    for (
        module
    ) in model.modules():  # a policy is one function: the ratio would not be 1 with dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
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


def completion_mask(completions, eos_ids):
    """On through the first EOS inclusive, by position: the policy must learn to stop. [B, T] ids -> [B, T] bool"""
    is_eos = torch.isin(completions, torch.tensor(eos_ids, device=completions.device)).long()
    return is_eos.cumsum(1) - is_eos == 0


@torch.no_grad()
def sample(
    model, prompts, n, *, temperature, max_new_tokens, eos_ids, pad_id, share_prompts=False, rows_at_once=None,
    progress=None,
):  # fmt: skip
    """n completions of each prompt by Hugging Face generate; temperature 0 is greedy.

    prompts: P lists of token ids. Returns a Rollout of P * n rows, on the model's device. Prompts of like length go
    together; rows_at_once bounds the rows of one generate call, None puts all in one. share_prompts runs each prompt
    once instead of n times (see prompts_can_be_shared); the completions are the same.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_call = len(prompts) if rows_at_once is None else max(1, rows_at_once // n)
    pieces = [None] * len(prompts)
    for start in range(0, len(prompts), per_call):
        chosen = order[start : start + per_call]
        ids, real = left_padded([prompts[i] for i in chosen], pad_id, model.device)
        which = torch.arange(len(chosen), device=model.device).repeat_interleave(n)
        shared = (
            {"past_key_values": prefill(model, ids, real, which)} if share_prompts and n > 1 else {}
        )
        # A whole config of our own: a model's generation_config may hide a top_k, top_p or repetition_penalty, and
        # then the sampler is not the policy whose gradient we take.
        drawn = (
            dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
            if temperature
            else {"do_sample": False}
        )
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=eos_ids, pad_token_id=pad_id, use_cache=True,
            repetition_penalty=1.0, **drawn,
        )  # fmt: skip
        with generation_config(model, config):
            out = model.generate(
                ids[which], attention_mask=real[which], generation_config=config, **shared
            )
        for i, rows in zip(chosen, out[:, ids.shape[1] :].split(n), strict=True):
            pieces[i] = rows
        if progress is not None:
            progress.update(len(chosen))
    completions = pad_sequence([row for rows in pieces for row in rows], True, pad_id)  # [P * n, T]
    ended = torch.isin(completions, torch.tensor(eos_ids, device=completions.device)).any(1)
    return Rollout(
        [p for p in prompts for _ in range(n)],
        completions,
        completion_mask(completions, eos_ids),
        ~ended,
    )


@contextlib.contextmanager
def generation_config(model, config):
    """generate fills what a config leaves unset from the model's own: for the time of a call, that is ours too."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


def context_length(model):
    """The most tokens, prompt and completion together, that the model was built for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
