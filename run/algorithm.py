"""The options of a method, checked; and a method in a file of the user."""

import functools
import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import torch

import grpo
from run.ownfile import (
    guarded,
    load_file,
    place_of,
)
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
)
from trainer.update import gradient_of

ARGUMENTS = {  # of the two functions; what stands after them is keyword-only
    "advantages": ("rewards", "group_size"),
    "loss": ("logprobs", "old_logprobs", "advantages", "mask"),
}
MAY_BE_NEGATIVE = ("tau", "mu", "ignore_id")  # every other numeric option is at least 0


def load_algorithm(algo):
    """The module of a method: the file algo.py, more/algo.py, or a file of the user."""
    if is_file(algo):
        return load_own(algo)
    return load_method(algo)


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
        values[name] = converted(name, text, type(defaults[name]))
    try_out(module, values, algo)
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
    except (ValueError, OverflowError):
        raise ValueError(f"--option {name}={text}: {wanted} is required") from None
    if kind is not str and not (math.isfinite(value) and (signed or value >= 0)):
        raise ValueError(f"--option {name}={text}: {wanted} is required")
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
        check_own(module.advantages, wrong_shape(advantages, batch.mask))
        check_own(module.advantages, not_finite(advantages))
    old_logprobs = -batch.mask.float()
    logprobs = old_logprobs.clone().requires_grad_(is_file(algo))
    filled = {**toy_inputs(module.loss), **loss_options}
    loss = module.loss(logprobs, old_logprobs, advantages, batch.mask, **filled)
    if is_file(algo):
        check_own(module.loss, wrong_loss(loss, gradient_of(module.loss, loss, logprobs)))


# A file of the user


@functools.cache
def load_own(path):
    """The module in a file of the user, with GRPO's advantages if it has none.

    Its functions raise OwnFileError whatever goes wrong in them. Raises ValueError.
    """
    module = load_file(Path(path).resolve())
    if not hasattr(module, "advantages"):
        module.advantages = grpo.advantages
    for name, arguments in ARGUMENTS.items():
        function = getattr(module, name, None)
        wanted = f"{name}({', '.join(arguments)}, *, ...)"
        if not callable(function):
            raise OwnFileError(f"{path}: a method is a function {wanted}; there is none")
        problem = wrong_signature(function, arguments)
        if problem:
            at = place_of(function, path)
            raise OwnFileError(f"{at}: {problem}; a method is a function {wanted}")
        check = check_loss if name == "loss" else check_advantages
        setattr(module, name, guarded(name, function, path, check))
    return module


def wrong_signature(function, arguments):
    """What the trainer cannot call or fill in, in words, or None."""
    try:
        takes = list(parameters(function).values())
    except (TypeError, ValueError) as error:  # a builtin, for one
        return str(error)
    for parameter in takes[len(arguments) :]:
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            return f"put * before {parameter.name}: inputs and options are keyword-only"
    filled = toy_inputs(function)
    try:
        inspect.signature(function).bind(*arguments, **filled)
    except TypeError as error:
        return f"it cannot be called: {error}"
    for name, parameter in keywords(function).items():
        if name not in filled and not isinstance(parameter.default, bool | int | float | str):
            names = ", ".join(known(toy(), slice(None), None, 1))
            return (
                f"{name} is no option, whose default is a number, bool or text, and nothing that "
                f"is filled in ({names})"
            )
    return None


def check_advantages(result, rewards, *_):
    """Raise ValueError unless the advantages of B rewards are a tensor [B] or [B, T]."""
    B = len(rewards)
    if not isinstance(result, torch.Tensor):
        raise ValueError(f"must return a tensor, [B] or [B, T], not a {type(result).__name__}")
    if result.ndim not in (1, 2) or len(result) != B:
        shape = list(result.shape)
        raise ValueError(f"must return [B] or [B, T], and B is {B}; it returned {shape}")


def check_loss(result, logprobs, *_):
    """Raise ValueError unless the loss is one number with a gradient."""
    if not isinstance(result, torch.Tensor):
        raise ValueError(f"must return a tensor of one number, not a {type(result).__name__}")
    if result.ndim:
        raise ValueError(f"must return one number, and not a tensor {list(result.shape)}")
    if logprobs.requires_grad and not result.requires_grad:
        raise ValueError("must depend on logprobs, or it has no gradient")


def check_own(function, problem):
    """Raise OwnFileError with the problem, if any, of what a file's function returned."""
    if problem:
        raise OwnFileError(f"{function.place}: {function.name} {problem}")


def wrong_shape(advantages, mask):
    if advantages.shape in (mask.shape, mask.shape[:1]):
        return None
    (B, T), shape = mask.shape, list(advantages.shape)
    return f"must return [B] or [B, T], for B = {B} and T = {T}; it returned {shape}"


def not_finite(advantages):
    if not advantages.isfinite().all():
        return f"gave {advantages.tolist()} for rewards of 1, 0, 0, 1"
    return None


def wrong_loss(loss, gradient):
    if not loss.isfinite():
        return f"gave {loss.item()} for a batch of four completions"
    if not gradient.isfinite().all():
        return "has a gradient that is not finite, for a batch of four completions"
    return None
