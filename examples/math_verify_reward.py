r"""Answers beyond one number, such as \sqrt{2} or (1, 2]: the package math-verify decides.

    pip install math-verify
    python train.py --preset gsm8k --reward examples/math_verify_reward.py \
        --data examples/latex.jsonl --prompt "{question} Put the final answer in \boxed{}."

The answer of a problem is LaTeX without dollar signs, that of a completion its last \boxed{...}.
They need not be written alike: 2^{1/2} is \sqrt{2}. Most comparisons take a few hundredths of a
second; one that takes more than a second counts as wrong.
"""

import logging

from rewards import places

try:
    from math_verify import parse, verify
except ImportError:
    raise ImportError("this reward needs the package: pip install math-verify") from None

logging.getLogger("math_verify").setLevel(logging.ERROR)  # no line for each slow comparison


def reward(completion, problem):
    """1 for a right answer, else 0."""
    return float(correct(completion, problem))


def correct(completion, problem):
    """Whether the last box equals the answer. Raises ValueError if the answer cannot be read."""
    truth = expression(problem["answer"])
    if not truth:
        raise ValueError(f"math-verify cannot read the answer {problem['answer']!r}")
    _, boxes = places(completion)
    return bool(boxes) and verify(truth, expression(boxes[-1]), timeout_seconds=1)


def expression(latex):
    """What math-verify makes of it: a list, empty if it cannot be read."""
    return parse(f"${latex}$", fallback_mode="no_fallback", parsing_timeout=1)
