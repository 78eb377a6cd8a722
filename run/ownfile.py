"""Load a Python file of the user's by its path, for --reward FILE.py and the like.

Every error is a ValueError in one line, which begins with the file and the line it is about.
"""

import ast
import functools
import importlib.util
import sys
import traceback
import zlib
from pathlib import Path

from trainer.methods import OwnFileError

ROOT = Path(__file__).resolve().parents[1]
RAISED = (Exception, SystemExit)  # what a file may raise; Ctrl-C stays Ctrl-C


def full_path(path):
    """The absolute path of a file, from a path in the working folder."""
    return Path(path).expanduser().resolve()


def load_file(path):
    """The module of a file, which is run once as long as its text stays the same.

    path: absolute, or relative to the project. The module is in sys.modules, under a name made
    from the file's, so dataclasses and pickle find it. It can import the files of its own folder;
    where a name is one of ours or of an installed package too, that one is taken. Raises
    ValueError.
    """
    path = ROOT / path
    source = read_source(path)
    return run(path, source)


def read_source(path):
    """The bytes of a Python file. Raises ValueError if there is none, or for a syntax error."""
    path = ROOT / path
    if path.suffix != ".py":
        raise ValueError(f"{path}: not a Python file, whose name ends in .py")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot read the file: {error.strerror}") from None
    try:
        compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # deep nesting
        raise ValueError(f"{place(error, path)}: {described(error)}") from None
    return source


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

    Where the file only calls a library, that is the line of the call. FILE alone if no line is.
    """
    of_syntax = isinstance(error, SyntaxError) and error.filename and error.lineno
    if of_syntax and Path(error.filename).parent == path.parent:
        return f"{error.filename}:{error.lineno}"
    found = str(path)
    trace = error.__traceback__
    while trace:
        filename = trace.tb_frame.f_code.co_filename
        if Path(filename).parent == path.parent:
            found = f"{filename}:{trace.tb_lineno}"
        trace = trace.tb_next
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
    """The names that the import statements of a file may load: a, a.b of `from a import b`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    for name in list(names):  # a package is loaded before its parts
        parts = name.split(".")
        names.update(".".join(parts[:i]) for i in range(1, len(parts)))
    return names


def guarded(name, function, path, check):
    """The function of a file, with each of its errors told as an OwnFileError.

    check(result, *arguments) raises ValueError for a result that cannot be used: "must ...".
    """
    import torch  # here: a file is loaded without it

    def explain(what, error):
        """The OwnFileError for an error that arose in `what`, say "the gradient of loss"."""
        at = place_of_error(error, function, path)
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
            check(result, *args)
        except ValueError as error:
            raise OwnFileError(f"{place_of(function, path)}: {name} {error}") from None
        return result

    call.name, call.place, call.explain = name, place_of(function, path), explain
    return call


def place_of_error(error, function, path):
    """FILE:LINE of the last line of the file that an exception came through, if there is one.

    The file may stand beside ours and call them: its own line is what the user can change.
    """
    trace = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in trace if frame.filename == str(Path(path).resolve())]
    if lines:
        return f"{path}:{lines[-1]}"
    found = place(error, Path(path))
    return place_of(function, path) if found == path else found


def place_of(function, path):
    """FILE:LINE of a function's `def`; the file alone if it is not in there."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename != str(Path(path).resolve()):
        return path
    return f"{path}:{code.co_firstlineno}"
