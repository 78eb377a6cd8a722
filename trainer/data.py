"""Problems with answers that can be checked.

A problem is {"question", "answer"}, both text, and the other fields of its row. The answer is a
GSM8K answer (a worked solution that ends in `#### n`) or a bare number. What is wrong with the data
is said in one line, with the line of the file, before a model is loaded.
"""

import unicodedata
from decimal import Decimal
from pathlib import Path

import torch

from rewards import true_answer
from trainer.sources import EXPECTED, find_splits, read_rows

# Training problems of the embedded generator; short runs do not use all of them.
TINY_TRAIN = 20_000
RESERVED = ("question", "answer", "prompt_ids")  # the last is filled in later
# Columns of a question and its answer: the first pair that a row has is taken. a.b is b within a.
PAIRS = (
    *(("question", "answer"), ("problem", "answer"), ("problem", "solution"), ("input", "target")),
    *(("query", "response"), ("instruction", "output"), ("messages", "messages")),
    ("prompt", "reward_model.ground_truth"),  # verl's
)
ROLES = ("user", "assistant")  # whose turn of a chat is the question, and the answer


def load_problems(name, split, any_answer=False, columns=None, skip_bad_rows=False):
    """The problems of a split, "train" or "test": a list of {"question", "answer"}.

    name: "tiny" (the embedded generator), "gsm8k", another data set of the Hub ("owner/name" or
    "owner/name:config"), one file of sources.FILE_TYPES, or a folder with train.* and test.*. If
    there is no test split, validation is taken for it, else a tenth of train (at most 500), drawn
    by a fixed seed. any_answer: the answer need not hold a number; --reward says what is right.
    columns: "QUESTION,ANSWER", their names, instead of one of PAIRS. skip_bad_rows: drop rows that
    are no problems. Of problems with the same question only the first is kept. Prints what was
    chosen, dropped and held out. Raises ValueError, in one line.
    """
    if name == "tiny":
        return tiny_rows(split)  # made here: there is nothing to check
    splits = find_splits(name)
    held_out = next((other for other in ("test", "validation") if other in splits), "train")
    used = held_out if split == "test" else "train"
    if used not in splits:
        raise ValueError(f"{name} holds no {used} split; {EXPECTED}")
    where = splits[used] if isinstance(splits[used], Path) else name
    rows = read_rows(splits[used])
    problems, notes = check(rows, where, any_answer, columns, skip_bad_rows)
    if used == "validation":
        notes.append(f"{name} has no test split: validation is held out")
    if held_out == "train":
        problems, note = split_one(problems, where, split)
        notes = [] if split == "train" else [*notes, note]  # the same for both: printed once
    for note in notes:
        print(note)
    return problems


def split_one(problems, where, split):
    """(the training or test problems, a line about both) of what has no test split."""
    if len(problems) < 2:
        raise ValueError(
            f"{where} holds one problem; two are the least, one to train on and one to hold out"
        )
    count = min(500, max(1, len(problems) // 10))
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = set(order[:count])
    chosen = [p for at, p in enumerate(problems) if (at in drawn) == (split == "test")]
    note = f"{where}: {count} of its {len(problems)} problems, drawn by a fixed seed, are held out"
    return chosen, note


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


def check(rows, where, any_answer=False, columns=None, skip_bad_rows=False):
    """(the problems in order, the first of each question only; lines to print) of placed rows.

    Raises ValueError, with the first places, if a row is no problem or none is.
    """
    if not rows:
        raise ValueError(f"{where} holds no problem")
    pair, notes = choose_columns(rows, where, columns)
    found, bad = {}, []
    for place, row in rows:
        try:
            problem = problem_of(row, pair, any_answer)
        except (ValueError, RecursionError) as error:  # the latter: deep nesting
            bad.append(f"{place}: {error}")
            continue
        found.setdefault(problem["question"], problem)
    if bad and not found:
        raise ValueError(f"{where} holds no problem in {' and '.join(pair)}: {'; '.join(bad[:3])}")
    if bad:
        count, examples = f"{len(bad)} of its {len(rows)} rows", "; ".join(bad[:3])
        if not skip_bad_rows:
            raise ValueError(
                f"{where}: {count} cannot be used (--skip-bad-rows drops them): {examples}"
            )
        notes.append(f"{where}: dropped {count}: {examples}")
    repeats = len(rows) - len(bad) - len(found)
    if repeats:
        notes.append(f"{where}: {repeats} problems repeat a question; the first of each is kept")
    return list(found.values()), notes


def choose_columns(rows, where, columns):
    """((question's column, answer's column), lines to print). Raises ValueError."""
    for pair in [tuple(columns.split(","))] if columns else PAIRS:
        asked, answered = pair
        both = (row for _, row in rows if None not in (cell(row, asked), cell(row, answered)))
        first = next(both, None)
        if first is not None:
            break
    else:
        objects = (row for _, row in rows if isinstance(row, dict))
        there = " ".join(", ".join(next(objects, ["none"])).split())
        raise ValueError(
            f"{where}: no row has {columns or 'question and answer'}; its columns: {there[:300]}; "
            f"--columns QUESTION,ANSWER names two of them"
        )
    if pair == PAIRS[0]:
        return pair, []
    names = []
    for column, role in zip(pair, ROLES, strict=True):
        chat = isinstance(cell(first, column), list)
        names.append(f"the {role}'s turn in {column}" if chat else column)
    note = f"{where}: {names[0]} is the question, {names[1]} the answer"
    if names[0] != asked:
        note += "; system turns are left out (--system gives one)"
    if asked == "instruction":
        note += "; an input follows its instruction"
    return pair, [note]


def cell(row, column):
    """The value of a row's column, or None; the column may be written in any case, or be a path."""
    if not isinstance(row, dict):
        return None
    if column in row:
        return row[column]
    head, *path = column.split(".")
    named = {name.strip().lower(): value for name, value in row.items()}
    value = named.get(head.lower())
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def problem_of(row, pair, any_answer=False):
    """{"question", "answer"}, both text, and the row's other fields; the answer may be a number.

    Raises ValueError, in one line.
    """
    asked, answered = pair
    if asked == answered and isinstance(cell(row, asked), str):
        raise ValueError(f"need the turns of a chat in {asked}: {str(row)[:80]}")
    question, answer = said(cell(row, asked), "user"), said(cell(row, answered), "assistant")
    if isinstance(answer, int | float | Decimal) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError(f"need text in {asked}, text or a number in {answered}: {str(row)[:80]}")
    if pair == ("instruction", "output") and cell(row, "input"):
        question += f"\n{cell(row, 'input')}"
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


def said(value, role):
    """What the only turn of a role says, if the value is a chat: a list of turns."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return value
    turns = [turn.get("content") for turn in value if turn.get("role") == role]
    if len(turns) != 1:
        raise ValueError(f"need one turn of the {role}, not {len(turns)}: {str(value)[:80]}")
    return turns[0]


def plain(value):
    """A JSON value with float in place of Decimal, which read_json makes of numbers."""
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
