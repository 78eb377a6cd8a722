"""The recorded completions of a run, read from its samples.jsonl and its held_out.jsonl.

records.py and evaluate.py write them; docs/metrics.md says what each key is.
"""

from run.runs import BAD_VALUE, finite, read_log


def read_groups(path, held_out=False):
    """The groups of a samples.jsonl, or of a held_out.jsonl: lists of rows, in the file's order.

    Rows that caused a skipped update make groups of their own. Raises ValueError.
    """
    groups = {}
    for number, row in read_log(path):
        try:
            row = checked(row, held_out)
        except BAD_VALUE:
            what = "a completion with tokens and numbers"
            raise ValueError(f"{path}: line {number} is not {what}") from None
        key = row["step"], row["prompt"], bool(row.get("skipped"))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def checked(row, held_out):
    """The row, if its values have the types that this file needs. Raises one of BAD_VALUE.

    A greedy completion of a held-out problem has no reward, and no second policy.
    """
    texts = [row["prompt"], *row["tokens"]]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError
    row["step"] = int(row["step"])
    row["completion"] = str(row.get("completion", "".join(row["tokens"])))
    names = ["logprobs", "entropy"]
    if not held_out:
        row["reward"] = float(row["reward"])
        row.setdefault("right", row["reward"])  # files from before it was recorded
        row.setdefault("advantages", [None] * len(row["tokens"]))
        names += ["old_logprobs", "advantages"]
    row["right"] = row["right"] > 0.5
    for name in names:
        row[name] = [finite(value) for value in row[name]]
        if len(row[name]) != len(row["tokens"]):
            raise ValueError
    return row
