"""What the commands share: a parser that refuses in one line, paths to write, the next command."""

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

from run import options


class Parser(options.Parser):
    """Refuses a wrong command line in one line, like every other error, with exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def output_file(text):
    """The path of a file to write. For argparse: raises ArgumentTypeError if none can be there."""
    path = Path(text)
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path} is a folder; add the name of a file")
    output_folder(path.parent)
    return path


def output_folder(text):
    """The path of a folder to write into, which may not exist yet. Raises ArgumentTypeError."""
    path = Path(text)
    existing = [part for part in (path, *path.parents) if os.path.lexists(part)]
    if existing and not os.path.isdir(existing[0]):
        raise argparse.ArgumentTypeError(f"{existing[0]} is not a folder; name another one")
    return path


def command(script, *words):
    """The shell line that runs one of our scripts with this Python, from the current folder."""
    return f"{python()} {shlex.join([from_here(options.ROOT / script), *map(str, words)])}"


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
