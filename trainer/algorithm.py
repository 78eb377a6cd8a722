"""The interface to an algorithm file: its two functions, their inputs and their options."""

import importlib
import inspect
import math
from types import SimpleNamespace

import torch

from trainer.options import MORE

MAY_BE_NEGATIVE = ("tau", "mu", "ignore_id")  # every other numeric option is at least 0


def load_algorithm(algo):
    """The module of a method: the file algo.py, or more/algo.py."""
    return importlib.import_module(f"more.{algo}" if algo in MORE else algo)


def parameters(function):
    """{name: inspect.Parameter} of a function."""
    return inspect.signature(function).parameters


def keywords(function):
    """{name: inspect.Parameter} of the function's keyword-only parameters."""
    found = {}
    for name, parameter in parameters(function).items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            found[name] = parameter
    return found


def named(function, values):
    """The part of values, {name: value}, that the function has a keyword-only parameter for."""
    known = keywords(function)
    return {name: value for name, value in values.items() if name in known}


def inputs(function, rollout, rows, entropy, max_length):
    """What the trainer fills in, {name: value}: the keyword-only parameters with a name of `known`.

    function: `advantages` or `loss` of an algorithm. rows: its part of the rollout, B rows. entropy
    [B, T]: in nats, of the policy that sampled in `advantages`, of the current one in `loss`.
    """

    def of_rows(values):
        return None if values is None else values[rows]

    known = {
        "mask": rollout.mask[rows],  # [B, T]
        "completions": rollout.completions[rows],  # [B, T], token ids
        "right": rollout.right[rows],  # [B], 1 where the answer is right
        "history": rollout.history,  # the mean rewards of earlier steps, oldest first
        "max_length": max_length,  # --max-new-tokens
        "entropy": entropy,  # [B, T]
        "old_entropy": of_rows(rollout.entropy),  # [B, T], of the policy that sampled
        "ref_logprobs": of_rows(rollout.ref_logprobs),  # [B, T], if `beta` is above 0
    }
    return named(function, known)


def split_options(module, values):
    """(options of module.advantages, options of module.loss) out of values."""
    return named(module.advantages, values), named(module.loss, values)


def option_defaults(module):
    """{name: default} of what --option may set: the keyword-only parameters with a default.

    An input (see `inputs`) has the default None and is no option. Dr. GRPO's max_length, with the
    default 0, is both: given as an option, it replaces what the trainer would fill in.
    """
    defaults = {}
    for function in (module.advantages, module.loss):
        for name, parameter in keywords(function).items():
            if parameter.default is not None:
                defaults[name] = parameter.default
    return defaults


def checked_options(algo, given):
    """{name: value} with each value converted to the type of its default.

    given: {name: text or value}. Raises ValueError for an unknown option, a value of another type,
    or a value that the algorithm refuses when called on a toy batch.
    """
    module = load_algorithm(algo)
    defaults = option_defaults(module)
    values = {}
    for name, text in given.items():
        if name not in defaults:
            known = ", ".join(f"{known}={default}" for known, default in defaults.items())
            raise ValueError(f"{algo} has no option {name!r}; it has {known}")
        values[name] = converted(name, text, type(defaults[name]))
    try_out(module, values)
    return values


def converted(name, text, kind):
    """The text as a bool, float, int or str (kind). Raises ValueError."""
    if kind is bool:
        if str(text).lower() not in ("true", "false"):
            raise ValueError(f"--option {name}={text}: true or false is required")
        return str(text).lower() == "true"
    wanted = {float: "a finite number", int: "a whole number", str: "a text"}[kind]
    signed = name in MAY_BE_NEGATIVE
    if kind in (float, int) and not signed:
        wanted += ", not negative"
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"--option {name}={text}: {wanted} is required") from None
    if kind is not str and not (math.isfinite(value) and (signed or value >= 0)):
        raise ValueError(f"--option {name}={text}: {wanted} is required")
    return value


def try_out(module, values):
    """Call both functions once, on two completions of one token. Raises what they raise."""
    ones = torch.ones(2, 1)
    rewards = torch.tensor([1.0, 0.0])
    batch = SimpleNamespace(mask=ones, completions=ones.long(), right=rewards, history=[0.5])
    batch.entropy = batch.ref_logprobs = ones
    advantage_options, loss_options = split_options(module, values)

    def filled(function, options):
        return {**inputs(function, batch, slice(None), ones, 1), **options}

    advantages = module.advantages(rewards, 2, **filled(module.advantages, advantage_options))
    module.loss(-ones, -ones, advantages, ones, **filled(module.loss, loss_options))
