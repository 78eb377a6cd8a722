"""Problems with answers that can be checked, and the prompts made of them.

A problem is {"question", "answer"}; the answer is GSM8K's field (a worked solution that ends in `#### n`) or a bare
number. Everything that is wrong with a file is said in one line, with the line's number, before any model is loaded.
"""

import json
from pathlib import Path

from rewards import correct
from tiny.problems import problems as tiny_problems

TINY_TRAIN = 20_000  # problems the embedded generator makes for training; many runs will not see them all


def load_problems(name, split):
    """The train or test problems of `name`, a list of {"question", "answer"}, duplicates dropped.

    name: "tiny" (the embedded generator), "gsm8k", another Hub data set with those two fields ("owner/name" or
    "owner/name:config"), a local folder with train.jsonl and test.jsonl, or one .jsonl, whose last tenth (at most 500)
    is then the test split. Raises ValueError, in one line, with the line's number where there is one.
    """
    path = Path(name)
    if name == "tiny":
        rows = tiny_problems(TINY_TRAIN, seed=0, split="train") if split == "train" else tiny_problems(500, 0, "test")
        where = "tiny"
    elif path.is_dir():
        where = path / f"{split}.jsonl"
        if not where.is_file():
            raise ValueError(f"{path} holds no {split}.jsonl; pass --data a folder with train.jsonl and test.jsonl")
        rows = read_jsonl(where)
    elif path.is_file() or path.suffix == ".jsonl":
        rows, where = read_jsonl(path), path
    else:
        rows, where = hub_rows(name, split), name
    problems = check(rows, where)
    if path.is_file():
        if len(problems) < 2:
            raise ValueError(f"{path} holds one problem; two are the least, one to train on and one to hold out")
        held_out = min(500, max(1, len(problems) // 10))
        return problems[:-held_out] if split == "train" else problems[-held_out:]
    return problems


def read_jsonl(path):
    """One JSON object a line; blank lines are skipped but counted. Returns a list with None for them."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line) if line.strip() else None)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    return rows


def hub_rows(name, split):
    """A data set of the Hub, or of its cache, through datasets.load_dataset."""
    import datasets  # here, since it takes a second to import and the tiny preset needs none of it

    repo, _, config = ("openai/gsm8k:main" if name in ("gsm8k", "openai/gsm8k") else name).partition(":")
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
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
            raise ValueError(f'{where}, line {number}: need {{"question": text, "answer": text}}, got {str(row)[:80]}')
        try:
            correct("", row["answer"])
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: {error}") from None
        if not row["question"].strip():
            raise ValueError(f"{where}, line {number}: the question is empty")
        seen.setdefault(row["question"], {"question": row["question"], "answer": row["answer"]})
    if not seen:
        raise ValueError(f"{where} holds no problem")
    return list(seen.values())


def encode_prompt(tokenizer, question, template):
    """Token ids of the prompt: the template with {question} filled in, as a user's turn where there is a chat template,
    else as plain text and a line end.
    """
    text = template.replace("{question}", question)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer(text + "\n").input_ids


def encode_problems(tokenizer, problems, template, longest):
    """(problems, each with "prompt_ids"; how many were dropped): those over `longest` prompt tokens are dropped whole.

    A prompt is never cut: a cut question is another question. Raises ValueError if none is left.
    """
    encoded = [{**p, "prompt_ids": encode_prompt(tokenizer, p["question"], template)} for p in problems]
    kept = [p for p in encoded if 0 < len(p["prompt_ids"]) <= longest]
    if not kept:
        raise ValueError(
            f"every prompt is over {longest} tokens, the model's context less --max-new-tokens: lower the latter"
        )
    return kept, len(encoded) - len(kept)
