"""Countdown: reach a number from given ones by + - * /, each used exactly once.

    python train.py --preset gsm8k --reward examples/countdown.py --data examples/countdown.jsonl \\
        --prompt "{question}"

A right answer is not one number, so this file has its own `correct`, which decides accuracy too.
Nothing in a completion is evaluated as code: the expression is parsed, and only whole numbers,
the four operations and brackets count.

`python examples/countdown.py` writes countdown.jsonl again. The embedded model knows none of these
words; take Qwen or another pretrained model.
"""

import ast
import json
import random
from fractions import Fraction
from pathlib import Path

MARKER = "####"
LONGEST = 100  # characters of an expression
OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def reward(completion, problem, *, truncated):
    """1 for a right answer; 0.1 for any expression of just the given numbers."""
    found = expression(completion, truncated)
    legal = found is not None and sorted(found[1]) == sorted(problem["numbers"])
    return {
        "right": float(correct(completion, problem, truncated=truncated)),
        "legal": 0.1 if legal else 0.0,
    }


def correct(completion, problem, *, truncated):
    """Whether the last line after #### is such an expression, and equals the target."""
    found = expression(completion, truncated)
    if found is None:
        return False
    value, numbers = found
    return value == int(problem["answer"]) and sorted(numbers) == sorted(problem["numbers"])


def expression(completion, truncated):
    """(value, the numbers in it) of the expression after the last ####, or None if there is none.

    A truncated completion's line counts if it has ended: it could have gone on.
    """
    _, marker, rest = completion.rpartition(MARKER)
    line, line_end, _ = rest.partition("\n")
    if not marker or len(line) > LONGEST or (truncated and not line_end):
        return None
    try:
        tree = ast.parse(line.strip(), mode="eval")
        numbers = []
        return value(tree.body, numbers), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def value(node, numbers):
    """The exact value of a parsed expression; appends its numbers. Raises ValueError."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        left = value(node.left, numbers)
        return OPERATIONS[type(node.op)](left, value(node.right, numbers))
    raise ValueError("neither a whole number nor one of the four operations")


def problems(count, seed=0):
    """Solvable problems with three or four numbers from 1 to 20 and a target from 1 to 100."""
    rng = random.Random(seed)
    found = {}
    while len(found) < count:
        numbers = [rng.randint(1, 20) for _ in range(rng.randint(3, 4))]
        target = Fraction(numbers[0])
        for number in numbers[1:]:
            operation = rng.choice(list(OPERATIONS.values()))
            target = operation(target, number)
        if target.denominator != 1 or not 1 <= target <= 100:
            continue
        shown = ", ".join(map(str, rng.sample(numbers, len(numbers))))
        question = (
            f"Use each of the numbers {shown} exactly once, with + - * / and brackets, to make "
            f"{target}. End with a line: {MARKER} expression"
        )
        found[question] = {"question": question, "answer": str(target), "numbers": numbers}
    return list(found.values())


if __name__ == "__main__":
    lines = [json.dumps(problem) + "\n" for problem in problems(400)]
    Path(__file__).with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
