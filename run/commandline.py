"""What the commands share: a parser that refuses in one line, paths to write, the next command."""

import argparse
import contextlib
import difflib
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

from run.names import ROOT


class Parser(argparse.ArgumentParser):
    """Refuses a wrong command line in one line with exit status 2, and suggests what was meant."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)  # --seed is not short for --seeds

    def parse_args(self, argv):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self.refusal(unknown[0]))
        return args

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if any("\udc80" <= char <= "\udcff" for char in word):  # how Python reads such a byte
                self.error(f"{word!a}: not valid UTF-8, as texts and paths must be")
        return super().parse_known_args(args, namespace)

    def format_help(self):
        """The help, with the paths of our files as they are from the current folder."""

        def path(match):
            file = ROOT / match[0]
            return from_here(file) if file.is_file() else match[0]

        return re.sub(r"[\w/]+\.(py|md|csv|jsonl)\b", path, super().format_help())

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def refusal(self, word):
        """The error message for a word that is no option, with the nearest option."""
        name = word.split("=")[0]
        if not name.startswith("-"):
            return f"{word!r} belongs to no option; --help lists the options"
        options = [flag for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(name.replace("_", "-"), options, n=1)
        if near:
            return f"no option {name}; did you mean {near[0]}?"
        return f"no option {name}; --help lists the options"


class RaisingParser(Parser):
    """Raises ValueError instead of exiting."""

    def error(self, message):
        raise ValueError(message)


def quit_on_interrupt():
    """Have Ctrl-C end the process at once, with status 130: for as long as it only imports."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def run_main(main):
    """Exit with the status of a command's main; Ctrl-C raises KeyboardInterrupt in it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def writing(path):
    """Name the file in the OSError of a write that fails: a full disk's error names none."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path` that takes its place at the end: no reader sees half a file.

    It has the suffix of `path`. Raises OSError, with the path.
    """
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    with writing(path):
        try:
            yield part
            os.replace(part, path)
        finally:
            if part.is_file():
                part.unlink()


def output_file(text):
    """The path of a file to write. For argparse: raises ArgumentTypeError if none can be there."""
    path = Path(text)
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path} is a folder; add the name of a file")
    output_folder(path.parent)
    return path


def output_folder(text):
    """The path of a folder to write into, which may not exist yet. Raises ArgumentTypeError."""
    if not str(text):
        raise argparse.ArgumentTypeError("an empty path; name a folder")
    path = Path(text)
    existing = [part for part in (path, *path.parents) if os.path.lexists(part)]
    if existing and not os.path.isdir(existing[0]):
        raise argparse.ArgumentTypeError(f"{existing[0]} is not a folder; name another one")
    return path


def command(script, *words):
    """The shell line that runs one of our scripts with this Python, from the current folder."""
    return f"{python()} {shlex.join([from_here(ROOT / script), *map(str, words)])}"


def python():
    """How a shell in the current folder starts this Python."""
    name = Path(sys.executable).name
    is_found = shutil.which(name) == sys.executable
    return name if is_found else shlex.quote(from_here(sys.executable))


def from_here(path):
    """The path relative to the current folder, unless that is longer."""
    try:
        return min(os.path.relpath(path), str(path), key=len)
    except ValueError:  # on another drive of Windows
        return str(path)
