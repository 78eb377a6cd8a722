"""What the trainer asks of an algorithm file: its two functions, their inputs and their options."""

import importlib
import inspect
import math

import torch

MAY_BE_NEGATIVE = ("tau", "mu")  # every other number of an algorithm is at least 0


def parameters(function):
    return inspect.signature(function).parameters


def named(function, values):
    """Those of values, {name: value}, that are parameters of the function."""
    return {name: values[name] for name in values if name in parameters(function)}


def split_options(module, values):
    """The options of module.advantages and those of module.loss."""
    return named(module.advantages, values), named(module.loss, values)


def option_defaults(module):
    """{name: default} of what --option may set: each keyword whose default is a number, a bool or
    a text. An input of the trainer, such as entropy, has the default None.
    """
    defaults = {}
    for function in (module.advantages, module.loss):
        for name, parameter in parameters(function).items():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not None:
                defaults[name] = parameter.default
    return defaults


def checked_options(algo, given):
    """{name: value} of texts or values, each in the type of its default.

    Raises ValueError for an unknown option, a value of another type, or a value that the algorithm
    refuses: each is tried once on a toy batch.
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
    """The value of a text in a type: bool, float, int or str. Raises ValueError."""
    if kind is bool:
        if str(text).lower() not in ("true", "false"):
            raise ValueError(f"--option {name}={text}: true or false is wanted")
        return str(text).lower() == "true"
    wanted = "a finite number, not negative" if kind is float else kind.__name__
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"--option {name}={text}: {wanted} is wanted") from None
    if kind is float and not (math.isfinite(value) and (value >= 0 or name in MAY_BE_NEGATIVE)):
        raise ValueError(f"--option {name}={text}: {wanted} is wanted")
    return value


def try_out(module, values):
    """Call both functions once, on two completions of one token. Raises what they raise."""
    ones = torch.ones(2, 1)
    rewards = torch.tensor([1.0, 0.0])
    of_advantages, of_loss = split_options(module, values)
    advantages = module.advantages(rewards, 2, entropy=ones, mask=ones, **of_advantages)
    inputs = {"ref_logprobs": ones, "entropy": ones, "old_entropy": ones}
    module.loss(-ones, -ones, advantages, ones, **of_loss, **named(module.loss, inputs))
