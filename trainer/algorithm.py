"""The interface to an algorithm file: its two functions, their inputs and their options."""

import importlib
import inspect
import math

import torch

MAY_BE_NEGATIVE = ("tau", "mu")  # every other numeric option is at least 0


def parameters(function):
    """{name: inspect.Parameter} of a function."""
    return inspect.signature(function).parameters


def named(function, values):
    """The part of values, {name: value}, that the function has a parameter for."""
    known = parameters(function)
    return {name: value for name, value in values.items() if name in known}


def split_options(module, values):
    """(options of module.advantages, options of module.loss) out of values."""
    return named(module.advantages, values), named(module.loss, values)


def option_defaults(module):
    """{name: default} of what --option may set: the keyword-only parameters with a default.

    A keyword that the trainer fills in, such as entropy, has the default None and is no option.
    """
    defaults = {}
    for function in (module.advantages, module.loss):
        for name, parameter in parameters(function).items():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not None:
                defaults[name] = parameter.default
    return defaults


def checked_options(algo, given):
    """{name: value} with each value converted to the type of its default.

    given: {name: text or value}. Raises ValueError for an unknown option, a value of another type,
    or a value that the algorithm refuses when called on a toy batch.
    """
    module = importlib.import_module(algo)
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
    if kind is float and not signed:
        wanted += ", not negative"
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"--option {name}={text}: {wanted} is required") from None
    if kind is float and not (math.isfinite(value) and (signed or value >= 0)):
        raise ValueError(f"--option {name}={text}: {wanted} is required")
    return value


def try_out(module, values):
    """Call both functions once, on two completions of one token. Raises what they raise."""
    ones = torch.ones(2, 1)
    rewards = torch.tensor([1.0, 0.0])
    advantage_options, loss_options = split_options(module, values)
    advantages = module.advantages(rewards, 2, entropy=ones, mask=ones, **advantage_options)
    inputs = {"ref_logprobs": ones, "entropy": ones, "old_entropy": ones}
    loss_options.update(named(module.loss, inputs))
    module.loss(-ones, -ones, advantages, ones, **loss_options)
