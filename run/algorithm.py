"""The options of a method, checked; and a method in a file of the user."""

import functools
import inspect
import math
from types import SimpleNamespace

import torch

from run.ownfile import guarded, load_file, place_of
from trainer.methods import (
    OwnFileError,
    inputs,
    is_file,
    keywords,
    known,
    label,
    load_method,
    parameters,
    split_options,
    with_advantages,
)
from trainer.update import gradient_of

ARGUMENTS = {  # of the two functions; what stands after them is keyword-only
    "advantages": ("rewards", "group_size"),
    "loss": ("logprobs", "old_logprobs", "advantages", "mask"),
}
MAY_BE_NEGATIVE = ("tau", "mu", "ignore_id")  # every other numeric option is at least 0


def load_algorithm(algo):
    """The module of a method: the file algo.py, more/algo.py, or a file of the user."""
    return load_own(algo) if is_file(algo) else load_method(algo)


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
            options = ", ".join(f"{known}={default}" for known, default in defaults.items())
            raise ValueError(f"{label(algo)} has no option {name!r}; it has {options or 'none'}")
        values[name] = converted(name, str(text), type(defaults[name]))
    try_out(module, values, algo)
    return values


def converted(name, text, kind):
    """The text of an option as a bool, float, int or str (kind). Raises ValueError."""
    wanted = {bool: "true or false", float: "a finite number", int: "a whole number"}.get(kind)
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"--option {name}={text}: {wanted} is required") from None
    if kind in (float, int):
        least = -math.inf if name in MAY_BE_NEGATIVE else 0
        if not (abs(value) < math.inf and value >= least):  # NaN fails this test
            raise ValueError(f"--option {name}={text}: {wanted} of at least {least} is required")
    return value


def toy():
    """A batch of two groups of two completions, of 3, 1, 2 and 3 tokens. [4, 3]"""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    right = torch.tensor([1.0, 0.0, 0.0, 1.0])
    batch = SimpleNamespace(mask=mask, completions=mask.long(), right=right, history=[0.5])
    batch.entropy = mask.float()
    batch.ref_logprobs = -mask.float()
    return batch


def toy_inputs(function):
    batch = toy()
    return inputs(function, batch, slice(None), batch.entropy, batch.mask.shape[1])


def try_out(module, values, algo):
    """Call both functions once on the toy batch. Raises what they raise.

    What a file of the user returns must be finite and of the right shape; else OwnFileError.
    """
    batch = toy()
    advantage_options, loss_options = split_options(module, values)
    filled = {**toy_inputs(module.advantages), **advantage_options}
    advantages = module.advantages(batch.right, 2, **filled)
    if is_file(algo):
        check_advantages(module.advantages, advantages, batch.mask)
        if not advantages.isfinite().all():
            refuse(module.advantages, f"gave {advantages.tolist()} for rewards of 1, 0, 0, 1")
    old_logprobs = -batch.mask.float()
    logprobs = old_logprobs.clone().requires_grad_(is_file(algo))
    filled = {**toy_inputs(module.loss), **loss_options}
    loss = module.loss(logprobs, old_logprobs, advantages, batch.mask, **filled)
    if is_file(algo):
        check_loss(module.loss, loss, logprobs)


# A file of the user


@functools.cache
def load_own(path):
    """The module in a file of the user, with GRPO's advantages if it has none.

    Its functions raise OwnFileError whatever goes wrong in them. Raises ValueError.
    """
    module = with_advantages(load_file(path))
    for name, arguments in ARGUMENTS.items():
        function = getattr(module, name, None)
        wanted = f"a method is a function {name}({', '.join(arguments)}, *, ...)"
        if not callable(function):
            raise OwnFileError(f"{path}: {wanted}; there is none")
        problem = wrong_signature(function, arguments)
        if problem:
            raise OwnFileError(f"{place_of(function, path)}: {problem}; {wanted}")
        setattr(module, name, guarded(name, function, path))
    return module


def wrong_signature(function, arguments):
    """What the trainer cannot call or fill in, in words, or None."""
    try:
        filled = toy_inputs(function)
        inspect.signature(function).bind(*arguments, **filled)
    except (TypeError, ValueError) as error:  # the latter of a builtin, for one
        return f"it cannot be called: {error}"
    for place, (name, parameter) in enumerate(parameters(function).items()):
        if place >= len(arguments) and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            return f"put * before {name}: inputs and options are keyword-only"
    for name, parameter in keywords(function).items():
        if name not in filled and not isinstance(parameter.default, bool | int | float | str):
            names = ", ".join(known(toy(), slice(None), None, 1))
            return (
                f"{name} is no option, whose default is a number, bool or text, and nothing that "
                f"is filled in ({names})"
            )
    return None


def check_advantages(function, advantages, mask):
    """Raise OwnFileError unless `advantages` of a user's file returned a tensor [B] or [B, T]."""
    if not isinstance(advantages, torch.Tensor):
        what = type(advantages).__name__
        refuse(function, f"must return a tensor, [B] or [B, T], not a {what}")
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        (B, T), shape = mask.shape, list(advantages.shape)
        refuse(function, f"must return [B] or [B, T], for B = {B} and T = {T}; it returned {shape}")


def check_loss(function, loss, logprobs):
    """Raise OwnFileError unless `loss` of a user's file returned one number with a gradient."""
    if not isinstance(loss, torch.Tensor):
        refuse(function, f"must return a tensor of one number, not a {type(loss).__name__}")
    if loss.ndim:
        refuse(function, f"must return one number, and not a tensor {list(loss.shape)}")
    if not loss.requires_grad:
        refuse(function, "must depend on logprobs, or it has no gradient")
    gradient = gradient_of(function, loss, logprobs)
    if not loss.isfinite():
        refuse(function, f"gave {loss.item()} for a batch of four completions")
    if not gradient.isfinite().all():
        refuse(function, "has a gradient that is not finite, for a batch of four completions")


def refuse(function, problem):
    raise OwnFileError(f"{function.place}: {function.name} {problem}")
