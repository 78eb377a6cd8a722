"""The rows of a file, of a folder's files, or of a data set on the Hub.

Files are read here: `datasets` would turn the numbers of JSON into floats, name no line in its
errors, and keep a copy of each file in its cache. It loads what has a name on the Hub.
"""

import csv
import io
import json
import os
import re
import socket
import urllib.request
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub

FILE_TYPES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
EXPECTED = (
    "--data takes a .jsonl, .json, .csv, .tsv or .parquet file, a folder with train.* and test.*, "
    "or the name of a data set on the Hub"
)
# How `datasets` names the cause where the Hub is not reached.
OFFLINE = re.compile(r"\((OfflineModeIsEnabled|\w*(Connect|Timeout)\w*)\)")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def find_splits(name):
    """{split: its file, or its rows from the Hub}; one file is "train". Raises ValueError."""
    path = Path(name)
    if path.is_file():
        return {"train": path}
    if path.is_dir():
        return split_files(path)
    if is_path(name):
        raise ValueError(f"cannot read {name}: no such file or folder; {EXPECTED}")
    return hub_splits(name)


def split_files(folder):
    """{split: file} of a folder. Raises ValueError if there are two files of one split."""
    found = {}
    for path in sorted(folder.iterdir()):
        split = path.stem.lower()
        if split not in ("train", "test", "validation") or path.suffix.lower() not in FILE_TYPES:
            continue
        if split in found:
            raise ValueError(f"{folder} holds {found[split].name} and {path.name}: remove one")
        found[split] = path
    return found


def is_path(name):
    """Whether a name means a file or a folder, there or not, rather than a data set of the Hub."""
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        return True
    return name.lower().endswith((*FILE_TYPES, ".txt", ".gz", ".zip", ".arrow"))


def hub_splits(name):
    """{split: rows} of a data set from the Hub or its cache. Raises ValueError."""
    import datasets  # here: it takes a second to import, and the preset tiny does not need it

    if name in ("gsm8k", "openai/gsm8k"):
        name = "openai/gsm8k:main"
    repo, _, config = name.partition(":")
    try:
        return datasets.load_dataset(repo, config or None).with_format("arrow")
    except Exception as error:  # a dozen types, of datasets and the Hub
        why = first_words(error)
        raise ValueError(
            f"cannot load the data set {name!r}: {why}. Pass --data FILE.jsonl, one object with "
            f"question and answer per line, or --data tiny"
        ) from None


def first_words(error):
    """The first line of an error's text; more of it if the line only announces a list."""
    text = OFFLINE.sub("(no network, or HF_HUB_OFFLINE is set)", str(error).strip())
    line = text.split("\n")[0]
    return line if not line.endswith(":") else " ".join(text.split())[:300]


def read_rows(source):
    """The rows of a split from `find_splits`: [(its place, "line 3" or "row 3"; a dict)].

    A row of JSON may be another value. Numbers keep every digit of the file: those of JSON with a
    decimal point become Decimal, those of a .csv stay text. Raises ValueError.
    """
    if isinstance(source, Path):
        return read_file(source)
    return numbered(source[:].to_pylist())


def read_file(path):
    kind = path.suffix.lower()
    if kind not in FILE_TYPES:
        raise ValueError(f"cannot read {path}: {EXPECTED}")
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError("it is a Git LFS pointer and not the data: run git lfs pull")
        if kind == ".parquet":
            return read_parquet(path)
        text = path.read_text("utf-8-sig")
        return read_json(text) if kind in (".jsonl", ".json") else read_csv(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: {error}; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {first_words(error)}") from None


def read_parquet(path):
    import pyarrow.parquet  # here, like datasets, which requires it

    try:
        return numbered(pyarrow.parquet.ParquetFile(path).read().to_pylist())
    except pyarrow.ArrowException as error:  # not always a ValueError
        raise ValueError(first_words(error)) from None


def numbered(rows):
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def read_json(text):
    """The rows of one value after another, as in a .jsonl, or of one list of them."""
    decoder, space = json.JSONDecoder(parse_float=Decimal), re.compile(r"\s*")
    rows, line, end = [], 1, 0
    while True:
        start = space.match(text, end).end()
        line += text.count("\n", end, start)
        if start == len(text):
            break
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:  # thousands of digits; deep nesting
            raise ValueError(f"the value on line {line} is not JSON: {error}") from None
        rows.append((f"line {line}", value))
        line += text.count("\n", start, end)
    if len(rows) == 1 and isinstance(rows[0][1], list):
        return numbered(rows[0][1])
    return rows


def read_csv(text):
    """Rows of texts; the separator is the one of comma, semicolon and tab that the header has."""
    header = text.partition("\n")[0]
    style = {"delimiter": max(",;\t", key=header.count), "skipinitialspace": True, "strict": True}
    csv.field_size_limit(2**31 - 1)  # its default is too small for a long solution
    reader = csv.DictReader(io.StringIO(text), **style)
    rows, end = [], 0
    try:
        for row in reader:
            if None in row:
                raise csv.Error("more fields than the header has; a text with a comma needs quotes")
            end = reader.line_num
            first = end - sum(field.count("\n") for field in row.values() if field)
            rows.append((f"line {first}", row))
    except csv.Error as error:
        raise ValueError(f"after line {end}: {error}") from None
    return rows


def offline_without_network(*names):
    """Put the Hub's libraries in offline mode if a name is not local and the Hub cannot be reached.

    Otherwise they would retry for a minute before they used their cache.
    """
    constants = huggingface_hub.constants
    local = all(name == "tiny" or Path(name).exists() for name in names)
    if local or constants.HF_HUB_OFFLINE:
        return
    if urllib.request.getproxies():  # a proxy resolves host names itself
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True  # as the variable does at import
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries imported later
