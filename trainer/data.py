"""Problems with answers that can be checked.

A problem is {"question", "answer"}; the answer is GSM8K's field (a worked solution that ends in `#### n`) or a bare
number. Everything that is wrong with a file is said in one line, with the line's number, before any model is loaded.
"""

import json
import os
import socket
import unicodedata
import urllib.request
import zlib
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import torch

from rewards import true_answer

# Problems that the embedded generator makes for training; many runs will not see them all.
TINY_TRAIN = 20_000
FILE_TYPES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip")


def load_problems(name, split):
    """The train or test problems of `name`, a list of {"question", "answer"}, duplicates dropped.

    name: "tiny" (the embedded generator), "gsm8k", another Hub data set with those two fields ("owner/name" or
    "owner/name:config"), a local folder with train.jsonl and test.jsonl, or one .jsonl, whose last tenth (at most 500)
    is then the test split. Says so, and how many problems repeat a question. Raises ValueError, in one line, with the
    line's number where there is one.
    """
    path = Path(name)
    if name == "tiny":
        rows, where = tiny_rows(split), "tiny"
    elif path.is_dir():
        where = path / f"{split}.jsonl"
        if not where.is_file():
            raise ValueError(
                f"{path} holds no {split}.jsonl; pass --data a folder with train.jsonl and test.jsonl"
            )
        rows = read_jsonl(where)
    elif path.is_file():
        rows, where = read_jsonl(path), path
    elif is_path(name):
        raise ValueError(
            f"cannot read {name}: no such file or folder; --data takes a folder with train.jsonl "
            f"and test.jsonl, one .jsonl, or the name of a data set"
        )
    else:
        rows, where = hub_rows(name, split), name
    problems = check(rows, where)
    one_file = path.is_file()
    repeats = len(rows) - rows.count(None) - len(problems)
    if repeats and not (
        one_file and split == "test"
    ):  # of one file it has been said with the train split
        print(f"{where}: {repeats} problems repeat a question; the first of each is kept")
    if one_file:
        if len(problems) < 2:
            raise ValueError(
                f"{path} holds one problem; two are the least, one to train on and one to hold out"
            )
        held_out = min(500, max(1, len(problems) // 10))
        if split == "test":
            print(f"{path}: the last {held_out} of its {len(problems)} problems are held out")
        return problems[:-held_out] if split == "train" else problems[-held_out:]
    return problems


def is_path(name):
    """Whether a name means a file or a folder, there or not, rather than a data set of the Hub."""
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        return True
    return name.lower().endswith(FILE_TYPES)


def tiny_rows(split):
    """The problems of the embedded generator. Raises ValueError if its folder was deleted."""
    try:
        from tiny.problems import problems  # here: nothing else needs the folder tiny/
    except ModuleNotFoundError:
        raise ValueError(
            "the embedded data set is missing: there is no tiny/problems.py; pass --data FILE.jsonl"
        ) from None
    return problems(TINY_TRAIN if split == "train" else 500, 0, split)


def read_jsonl(path):
    """One JSON object per line; blank lines are skipped but counted. Returns a list with None for them.

    Numbers with a point become Decimal, which keeps every digit that the file has.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line, parse_float=Decimal) if line.strip() else None)
        except (
            ValueError,
            RecursionError,
        ) as error:  # ValueError: also a number of thousands of digits
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    return rows


def hub_rows(name, split):
    """A data set of the Hub, or of its cache, through datasets.load_dataset."""
    import datasets  # here, since it takes a second to import and the tiny preset needs none of it

    repo, _, config = (
        "openai/gsm8k:main" if name in ("gsm8k", "openai/gsm8k") else name
    ).partition(":")
    try:
        return list(datasets.load_dataset(repo, config or None, split=split))
    except Exception as error:  # the Hub fails in a dozen types, none of them ours
        why = str(error).strip().split("\n")[0]
        raise ValueError(
            f"cannot load the data set {name!r}: {why}. Pass --data FILE.jsonl, one object with question and answer a "
            f"line, or --data tiny"
        ) from None


def check(rows, where):
    """Rows that are problems, in their order, the first of each question; else ValueError with the row's number."""
    seen = {}
    for number, row in enumerate(rows, 1):
        if row is None:
            continue
        try:
            problem = problem_of(row)
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: {error}") from None
        seen.setdefault(problem["question"], problem)
    if not seen:
        raise ValueError(f"{where} holds no problem")
    return list(seen.values())


def problem_of(row):
    """{"question", "answer"}, both text, of one row; an answer may be a JSON number. Raises ValueError, in one line."""
    fields = row if isinstance(row, dict) else {}
    question, answer = fields.get("question"), fields.get("answer")
    if isinstance(answer, int | float | Decimal) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError(
            f'need {{"question": text, "answer": text or number}}, got {str(row)[:80]}'
        )
    try:
        (question + answer).encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
        raise ValueError(f"{error.object[error.start]!r} is no character") from None
    if not question.strip():
        raise ValueError("the question is empty")
    true_answer(answer)
    return {"question": question, "answer": answer}


def problems_at(problems, seed, cursor, count):
    """The next `count` problems of an endless walk over `problems` that has come to `cursor`.

    Each pass has a new order, drawn from the seed and the number of the pass alone.
    """
    chosen, total = [], len(problems)
    for at in range(cursor, cursor + count):
        if not chosen or at % total == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + at // total)
            order = torch.randperm(total, generator=generator).tolist()
        chosen.append(problems[order[at % total]])
    return chosen


def split_overlap(train, test):
    """(training problems whose question is not in the test split, how many were left out for that).

    Questions are the same if they differ only in white space, in case, or in forms that NFKC makes equal.
    """
    held_out = {same_question(p["question"]) for p in test}
    kept = [p for p in train if same_question(p["question"]) not in held_out]
    return kept, len(train) - len(kept)


def same_question(text):
    """The text that is equal for questions that split_overlap takes for one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def checksum(problems, expected=None):
    """{"problems": checksum of questions and answers, "prompts": of the prompts' token ids}.

    Raises ValueError, saying what differs, if it is not the one that a resumed run had.
    """
    rows = [(p["question"], p["answer"]) for p in problems]
    ids = [p["prompt_ids"] for p in problems]
    found = {"problems": crc32_of(rows), "prompts": crc32_of(ids)}
    if expected is None or found == expected:
        return found
    if not isinstance(expected, dict):
        raise ValueError(
            "the run is of an earlier version, which did not write down what its prompts were; "
            "it cannot be resumed with this one"
        )
    if found["problems"] != expected.get("problems"):
        raise ValueError(
            "the data are not what they were when the run began; it cannot be resumed with other problems"
        )
    raise ValueError(
        "the prompts have other token ids than when the run began, of the same problems: another "
        "tokenizer, or a chat template that writes today's date (python train.py --show-prompt "
        "shows it); it cannot be resumed with other prompts"
    )


def crc32_of(rows):
    return zlib.crc32(json.dumps(rows).encode())


def offline_without_network(*names):
    """If one of the names is not here and the Hub's host name cannot be looked up, tell the Hub's library, which would
    try for a minute before it turned to its cache.
    """
    constants = huggingface_hub.constants
    here = all(name == "tiny" or Path(name).exists() for name in names)
    if (
        here or constants.HF_HUB_OFFLINE or urllib.request.getproxies()
    ):  # a proxy looks names up itself
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True  # what HF_HUB_OFFLINE=1 sets when the library is imported
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later
