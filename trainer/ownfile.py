"""Files of your own: loaded by path, and their errors told in one line with FILE:LINE."""

import functools
import sys
import traceback
import zlib
from pathlib import Path
from types import ModuleType

import torch


class OwnFileError(ValueError):
    """An error in a file of the user: one line that begins with FILE:LINE."""


def load_file(path):
    """The module in a file, run once per process. Raises OwnFileError.

    It is compiled here and not imported: a cached .pyc may be older than a file that is edited
    twice in a second.
    """
    path = str(Path(path).absolute())
    name = f"own_{Path(path).stem}_{zlib.crc32(path.encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), vars(module))
    except BaseException as error:  # SystemExit too: sys.exit() in the file is no wish to stop us
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise told(error, path) from error
    return module


def told(error, path, place=None):
    """The OwnFileError for an exception of a file.

    place: where it is if the traceback does not pass through the file.
    """
    place = place or path
    lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == path]
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}:{error.lineno}"
        error = f"SyntaxError: {error.msg}"
    elif isinstance(error, OSError) and not lines:  # the file itself cannot be read
        error = error.strerror or error
    else:
        place = f"{path}:{lines[-1]}" if lines else place
        error = f"{type(error).__name__}: {error}"
    return OwnFileError(" ".join(f"{place}: {error}".split()))


def place_of(function, path):
    """FILE:LINE of a function's `def`; the file alone if it is not in there."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename != path:
        return path
    return f"{path}:{code.co_firstlineno}"


def guarded(name, function, path, check):
    """The function of a file, with each of its errors told as an OwnFileError.

    check(result, *arguments) raises ValueError for a result that cannot be used: "must ...".
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            result = function(*args, **kwargs)
        except (MemoryError, torch.OutOfMemoryError):
            raise  # the caller tries a smaller batch
        except (Exception, SystemExit) as error:  # sys.exit() is no wish to stop us
            raise told(error, path, place_of(function, path)) from error
        try:
            check(result, *args)
        except ValueError as error:
            raise OwnFileError(f"{place_of(function, path)}: {name} {error}") from None
        return result

    return call
