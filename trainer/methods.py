"""The methods by name, and what the trainer hands over to their two functions.

A method is a module with `loss(logprobs, old_logprobs, advantages, mask, *, ...)` and
`advantages(rewards, group_size, *, ...)`; one without `advantages` takes GRPO's. Their keyword-only
parameters are inputs, which the trainer fills in by name (`known` is the list), or options.
"""

import importlib
import inspect
import os
from pathlib import Path

ALGORITHMS = ("tepo", "grpo", "dapo", "gspo", "gtpo", "grpo_s", "trgrpo")
MORE = (  # in the folder more/
    *("clip_cov", "kl_cov", "ce_gppo", "aspo", "dppo", "reweight", "raft", "ha_dw"),
    *("ktae", "dhpo", "dr_grpo", "rloo", "cispo", "sapo", "gmpo"),
    *("luspo", "vespo", "maxrl", "opo", "dro", "topr"),
)


class OwnFileError(ValueError):
    """An error in a file of the user: one line that begins with FILE:LINE."""


def is_file(algo):
    """Whether --algo names a file of the user and not one of our methods."""
    return algo.endswith(".py") or "/" in algo or os.sep in algo


def label(algo):
    """What a method is called in folders, tables and figures.

    For a file, its name without .py; with it, where that is the name of one of ours.
    """
    if not is_file(algo):
        return algo
    path = Path(algo)
    return path.name if path.stem in (*ALGORITHMS, *MORE) else path.stem


def load_method(name):
    """The module of one of our methods: the file name.py or more/name.py."""
    return with_advantages(importlib.import_module(f"more.{name}" if name in MORE else name))


def with_advantages(module):
    """The module of a method, with GRPO's `advantages` if it has none."""
    import grpo  # here, because it imports torch, and --help needs none

    if not hasattr(module, "advantages"):
        module.advantages = grpo.advantages
    return module


def parameters(function):
    """{name: inspect.Parameter} of a function."""
    return inspect.signature(function).parameters


def keywords(function):
    """{name: inspect.Parameter} of the function's keyword-only parameters."""
    takes = parameters(function)
    return {name: takes[name] for name in takes if takes[name].kind is takes[name].KEYWORD_ONLY}


def named(function, values):
    """The part of values, {name: value}, that the function has a keyword-only parameter for."""
    takes = keywords(function)
    return {name: value for name, value in values.items() if name in takes}


def inputs(function, *batch):
    """What the trainer fills in, {name: value}: the keyword-only parameters that `known` has.

    function: `advantages` or `loss` of a method. batch: the arguments of `known`.
    """
    return named(function, known(*batch))


def known(rollout, rows, entropy, max_length):
    """All that the trainer can fill in, {name: value}.

    rows: a part of the rollout, B rows. entropy [B, T]: in nats, of the policy that sampled in
    `advantages`, of the current one in `loss`.
    """

    def of_rows(values):
        return None if values is None else values[rows]

    return {
        "mask": rollout.mask[rows],  # [B, T]
        "completions": rollout.completions[rows],  # [B, T], token ids
        "right": rollout.right[rows],  # [B], 1 where the answer is right
        "history": rollout.history,  # the mean rewards of earlier steps, oldest first
        "max_length": max_length,  # --max-new-tokens
        "entropy": entropy,  # [B, T]
        "old_entropy": of_rows(rollout.entropy),  # [B, T], of the policy that sampled
        "ref_logprobs": of_rows(rollout.ref_logprobs),  # [B, T], if `beta` is above 0
    }


def split_options(module, values):
    """(options of module.advantages, options of module.loss) out of values."""
    return named(module.advantages, values), named(module.loss, values)
