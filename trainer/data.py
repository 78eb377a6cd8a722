"""Problems with answers that can be checked.

A problem is {"question", "answer"}. The answer is a GSM8K answer (a worked solution that ends in
`#### n`) or a bare number. Errors in a file are reported in one line, with the line number, before
a model is loaded.
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

# Training problems of the embedded generator; short runs do not use all of them.
TINY_TRAIN = 20_000
RESERVED = ("question", "answer", "prompt_ids")  # the last is filled in later
FILE_TYPES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip")


def load_problems(name, split, any_answer=False):
    """The problems of a split, "train" or "test": a list of {"question", "answer"}.

    name: "tiny" (the embedded generator), "gsm8k", another Hub data set with those two fields
    ("owner/name" or "owner/name:config"), a local folder with train.jsonl and test.jsonl, or one
    .jsonl file, whose last tenth (at most 500) is then the test split. any_answer: the answer need
    not hold a number; --reward says what is right. Of problems with the same
    question only the first is kept; prints how many repeat one. Raises ValueError, in one line.
    """
    if name == "tiny":
        return tiny_rows(split)  # made here: there is nothing to check
    path = Path(name)
    where, one_file = name, False
    if path.is_dir():
        where = path / f"{split}.jsonl"
        if not where.is_file():
            raise ValueError(
                f"{path} holds no {split}.jsonl; pass --data a folder with train.jsonl and "
                f"test.jsonl"
            )
        rows = read_jsonl(where)
    elif path.is_file():
        where, one_file = path, True
        rows = read_jsonl(path)
    elif is_path(name):
        raise ValueError(
            f"cannot read {name}: no such file or folder; --data takes a folder with train.jsonl "
            f"and test.jsonl, one .jsonl, or the name of a data set"
        )
    else:
        rows = hub_rows(name, split)
    problems = check(rows, where, any_answer)
    repeats = len(rows) - rows.count(None) - len(problems)
    # One file serves both splits: print the line for the training split only.
    if repeats and not (one_file and split == "test"):
        print(f"{where}: {repeats} problems repeat a question; the first of each is kept")
    return split_file(path, problems, split) if one_file else problems


def split_file(path, problems, split):
    """The training or test split of one file's problems. Raises ValueError if there is only one."""
    if len(problems) < 2:
        raise ValueError(
            f"{path} holds one problem; two are the least, one to train on and one to hold out"
        )
    held_out = min(500, max(1, len(problems) // 10))
    if split == "train":
        return problems[:-held_out]
    print(f"{path}: the last {held_out} of its {len(problems)} problems are held out")
    return problems[-held_out:]


def is_path(name):
    """Whether a name means a file or a folder, there or not, rather than a data set of the Hub."""
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        return True
    return name.lower().endswith(FILE_TYPES)


def tiny_rows(split):
    """The problems of the embedded generator; they do not depend on the run's seed.

    Raises ValueError if its folder was deleted.
    """
    try:
        from tiny.problems import problems  # here: nothing else needs the folder tiny/
    except ModuleNotFoundError:
        raise ValueError(
            "the embedded data set is missing: there is no tiny/problems.py; pass --data FILE.jsonl"
        ) from None
    count = TINY_TRAIN if split == "train" else 500
    return problems(count, seed=0, split=split)


def read_jsonl(path):
    """A list of one JSON value per line; None for a blank line, so that the index counts lines.

    Numbers with a decimal point become Decimal, which keeps every digit of the file. Raises
    ValueError, with the line number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            rows.append(None)
            continue
        try:
            rows.append(json.loads(line, parse_float=Decimal))
        except (ValueError, RecursionError) as error:  # deep nesting; thousands of digits
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    return rows


def hub_rows(name, split):
    """The rows of a data set from the Hub or its cache. Raises ValueError."""
    import datasets  # here: it takes a second to import, and the preset tiny does not need it

    if name in ("gsm8k", "openai/gsm8k"):
        name = "openai/gsm8k:main"
    repo, _, config = name.partition(":")
    try:
        return list(datasets.load_dataset(repo, config or None, split=split))
    except Exception as error:  # a dozen types, of datasets and the Hub
        why = first_words(error)
        raise ValueError(
            f"cannot load the data set {name!r}: {why}. Pass --data FILE.jsonl, one object with "
            f"question and answer per line, or --data tiny"
        ) from None


def first_words(error):
    """The first line of an error's text; more of it if the line only announces a list."""
    text = str(error).strip()
    line = text.split("\n")[0]
    return line if not line.endswith(":") else " ".join(text.split())[:300]


def check(rows, where, any_answer=False):
    """The rows as problems, in order, the first of each question only.

    Raises ValueError, with the row's number, if a row is no problem or there is none.
    """
    seen = {}
    for number, row in enumerate(rows, 1):
        if row is None:
            continue
        try:
            problem = problem_of(row, any_answer)
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: {error}") from None
        seen.setdefault(problem["question"], problem)
    if not seen:
        raise ValueError(f"{where} holds no problem")
    return list(seen.values())


def problem_of(row, any_answer=False):
    """{"question", "answer"}, both text, and the row's other fields; the answer may be a number.

    Raises ValueError, in one line.
    """
    fields = row if isinstance(row, dict) else {}
    question, answer = fields.get("question"), fields.get("answer")
    number = isinstance(answer, int | float | Decimal) and not isinstance(answer, bool)
    if number:
        answer = str(answer)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError(
            f'need {{"question": text, "answer": text or number}}, got {str(row)[:80]}'
        )
    try:
        (question + answer).encode()
    except UnicodeEncodeError as error:  # JSON may contain half a surrogate pair
        raise ValueError(f"{error.object[error.start]!r} is no character") from None
    if not question.strip():
        raise ValueError("the question is empty")
    if not any_answer:
        true_answer(answer)  # raises ValueError if it contains no number
    others = {name: plain(value) for name, value in row.items() if name not in RESERVED}
    return {"question": question, "answer": answer, **others}


def plain(value):
    """A JSON value with float in place of Decimal, which read_jsonl makes of its numbers."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value


def problems_at(problems, seed, cursor, count):
    """The next `count` problems after the first `cursor` ones, in endless passes over `problems`.

    Each pass has a new random order, which depends only on the seed and the number of the pass.
    """
    chosen, total = [], len(problems)
    for at in range(cursor, cursor + count):
        if not chosen or at % total == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + at // total)
            order = torch.randperm(total, generator=generator).tolist()
        chosen.append(problems[order[at % total]])
    return chosen


def split_overlap(train, test):
    """(the training problems whose question is not in the test split, how many were dropped).

    Questions count as the same if they differ only in white space, in case, or in forms that
    Unicode's NFKC makes equal.
    """
    held_out = {same_question(p["question"]) for p in test}
    kept = [p for p in train if same_question(p["question"]) not in held_out]
    return kept, len(train) - len(kept)


def same_question(text):
    """A normal form, equal for questions that split_overlap counts as the same."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def checksum(problems, expected=None):
    """{"problems": checksum of questions and answers, "prompts": of the prompts' token ids}.

    Raises ValueError, with what differs, if it is not `expected`, that of the resumed run.
    """
    rows = [[p["question"], p["answer"], *others(p)] for p in problems]
    ids = [p["prompt_ids"] for p in problems]
    found = {"problems": crc32_of(rows), "prompts": crc32_of(ids)}
    if expected is None or found == expected:
        return found
    if not isinstance(expected, dict):
        raise ValueError(
            "the run was made by an earlier version, which did not record its prompts; it cannot "
            "be resumed with this one"
        )
    if found["problems"] != expected.get("problems"):
        raise ValueError(
            "the data are not what they were when the run began; it cannot be resumed with other "
            "problems"
        )
    raise ValueError(
        "the prompts have other token ids than when the run began, for the same problems: another "
        "tokenizer, or a chat template that writes today's date (python train.py --show-prompt "
        "shows it); the run cannot be resumed with other prompts"
    )


def others(problem):
    """The further fields of a problem, as a list of one dict; [] if it has none."""
    fields = {name: value for name, value in problem.items() if name not in RESERVED}
    return [fields] if fields else []


def crc32_of(rows):
    return zlib.crc32(json.dumps(rows, default=str).encode())


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
