"""Word problems in GSM8K's format, without end: {"question", "answer"}, worked line by line and closed by `#### n`.

Every problem is a running count in 0..99 that changes two to five times by at most 20. Training and test problems are
told apart by a checksum of the question, so that no seed and no number of problems can make the two meet.
"""

import random
import zlib

NAMES = {
    "Mia": "She",
    "Ana": "She",
    "Eva": "She",
    "Zoe": "She",
    "Tom": "He",
    "Ben": "He",
    "Max": "He",
    "Sam": "He",
}
ITEMS = ("eggs", "pens", "coins", "cards", "books", "apples", "shells", "stamps")
MORE = ("buys", "finds", "wins", "gets")
LESS = ("sells", "loses", "uses", "drops")
SPLITS = ("train", "test")
LARGEST, OPERAND = 99, 20


def split_of(question):
    """The split a question belongs to, one in ten "test", the others "train": a property of its text alone."""
    return "test" if zlib.crc32(question.encode()) % 10 == 0 else "train"


def draw(rng):
    """One problem from `rng`, a random.Random: (question, start, steps), a step being a signed change of the count."""
    name, item = rng.choice(list(NAMES)), rng.choice(ITEMS)
    start = count = rng.randint(2, LARGEST)
    steps, events = [], []
    for _ in range(rng.randint(2, 5)):
        change = rng.choice(
            [c for c in range(-OPERAND, OPERAND + 1) if c and 0 <= count + c <= LARGEST]
        )
        steps.append(change)
        events.append(f"{rng.choice(MORE if change > 0 else LESS)} {abs(change)}")
        count += change
    told = ", ".join(events[:-1]) + " and " + events[-1]
    return f"{name} has {start} {item}. {NAMES[name]} {told}. How many {item} now?", start, steps


def line(before, change, after):
    """One line of work: "23+14=37"."""
    return f"{before}{change:+d}={after}"


def worked(start, steps):
    """The answer with every step on a line of its own: "23+14=37\\n37-9=28\\n#### 28"."""
    lines, count = [], start
    for change in steps:
        lines.append(line(count, change, count + change))
        count += change
    return "\n".join([*lines, f"#### {count}"])


def problems(n, seed, split):
    """`n` different problems of one split, the same ones for the same arguments: a list of {"question", "answer"}.

    Raises ValueError for a split that is not "train" or "test".
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    rng = random.Random(f"{split} {seed}")
    found = {}
    while len(found) < n:
        question, start, steps = draw(rng)
        if split_of(question) == split:
            found[question] = worked(
                start, steps
            )  # a question drawn twice has one answer and stays one entry
    return [{"question": question, "answer": answer} for question, answer in found.items()]
