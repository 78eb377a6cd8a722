"""A reward for the form of an answer, besides its being right.

    python train.py --reward examples/format_reward.py

A completion that is right and ends in a line "#### number" gets 1.2, one that is only right 1.0.
metrics.jsonl has the means of both parts, `reward/right` and `reward/format`. `accuracy` stays the
share of right answers, so the two show whether the policy learns the form or the arithmetic.
"""

import re

from rewards import correct

LAST_LINE = re.compile(r"#### -?\d[\d,]*(\.\d+)?")


def reward(completion, problem, *, truncated):
    """1 for a right answer, and 0.2 for a last line in the right form."""
    last_line = completion.rstrip().split("\n")[-1]
    in_form = LAST_LINE.fullmatch(last_line) and not truncated
    return {
        "right": correct(completion, problem["answer"], truncated),
        "format": 0.2 if in_form else 0.0,
    }
