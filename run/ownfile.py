"""Load a Python file of the user's by its path, for --algo FILE.py and --reward FILE.py.

Every error is a ValueError in one line, which begins with the file and the line it is about.
"""

import ast
import functools
import importlib.util
import sys
import traceback
import zlib
from pathlib import Path

from run.names import ROOT
from trainer.methods import OwnFileError

RAISED = (Exception, SystemExit)  # what a file may raise; Ctrl-C stays Ctrl-C


def load_file(path):
    """The module of a file, which is run once as long as its text stays the same.

    path: absolute, or relative to the project. The module is in sys.modules, under a name made
    from the file's, so dataclasses and pickle find it. It can import the files of its own folder;
    where a name is one of ours or of an installed package too, that one is taken. Raises
    ValueError.
    """
    path = ROOT / path
    if path.suffix != ".py":
        raise ValueError(f"{path}: not a Python file, whose name ends in .py")
    try:
        return run(path, path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot read the file: {error.strerror}") from None


@functools.cache
def run(path, source):
    """The module of a file with this text. Raises ValueError for what the file raises.

    Compiled from the text, not taken from __pycache__, which notices no change within a second.
    """
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except RAISED as error:
        del sys.modules[name]
        raise ValueError(f"{place(error, path)}: {described(error)}") from None
    return module


def place(error, path):
    """ "FILE:LINE", where an exception arose: the innermost line in the file or beside it.

    Where the file only calls a library, that is the line of the call. So it is where the files
    beside it are ours. FILE alone if no line is there.
    """
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        lines.append((error.filename or "", error.lineno))
    found = str(path)
    for file, line in lines:
        beside = Path(file).parent == path.parent and not path.parent.is_relative_to(ROOT)
        if file == str(path) or beside:
            found = f"{file}:{line}"
    return found


def described(error):
    """An exception in one line, "TypeError: ..."."""
    words = error.msg if isinstance(error, SyntaxError) else str(error)
    text = " ".join(f"{type(error).__name__}: {words}".split())
    return text if len(text) <= 200 else text[:200] + "..."


def files_of(path):
    """The file, and those of its folder and of ours that it imports, and that these import, ...

    Read from the import statements of the files, wherever they stand. A list of absolute paths.
    """
    path = ROOT / path
    found, waiting = [], [path]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.append(file)
        for name in imported_names(file):
            for folder in (path.parent, ROOT):
                module = folder / name.replace(".", "/")
                choices = (module.with_name(module.name + ".py"), module / "__init__.py")
                waiting += [choice for choice in choices if choice.is_file()]
    return found


def imported_names(file):
    """The names that the import statements of a file may load: a, and a.b of `from a import b`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in imported:  # a package is loaded before its parts
            parts = name.split(".")
            names.update(".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return names


def guarded(name, function, path, check=lambda _: None):
    """The function of a file, with each of its errors told as an OwnFileError.

    check(result) raises ValueError for a result that cannot be used: "must ...".
    """
    import torch  # here: a file is loaded without it

    defined = place_of(function, path)

    def explain(what, error):
        """The OwnFileError for an error that arose in `what`, say "the gradient of loss"."""
        at = place(error, Path(path))
        at = defined if at == path else at
        return OwnFileError(f"{at}: {what}{': ' if what else ''}{described(error)}")

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            result = function(*args, **kwargs)
        except (MemoryError, torch.OutOfMemoryError):
            raise  # the caller tries a smaller batch
        except RAISED as error:
            raise explain("", error) from error
        try:
            check(result)
        except ValueError as error:
            raise OwnFileError(f"{defined}: {name} {error}") from None
        return result

    call.name, call.place, call.explain = name, defined, explain
    return call


def place_of(function, path):
    """FILE:LINE of a function's `def`; the file alone if it is not in there."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename != path:
        return path
    return f"{path}:{code.co_firstlineno}"
