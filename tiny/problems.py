"""Word problems in GSM8K's format, as many as are asked for: {"question", "answer"}.

The answer is worked line by line and ends with `#### n`. Every problem is a count in 0..99 that
changes two to five times by at most 20. A checksum of the question decides whether it is for
training or for testing, so no seed and no number of problems can make the two overlap.
"""

import functools
import random
import zlib

PRONOUNS = {
    "Mia": "She",
    "Ana": "She",
    "Eva": "She",
    "Zoe": "She",
    "Tom": "He",
    "Ben": "He",
    "Max": "He",
    "Sam": "He",
}
NAMES = list(PRONOUNS)
ITEMS = ("eggs", "pens", "coins", "cards", "books", "apples", "shells", "stamps")
MORE = ("buys", "finds", "wins", "gets")
LESS = ("sells", "loses", "uses", "drops")
SPLITS = ("train", "test")
LARGEST = 99  # count
OPERAND = 20  # largest change


def split_of(question):
    """The split of a question, from its text alone: one in ten is "test", the others "train"."""
    return "test" if zlib.crc32(question.encode()) % 10 == 0 else "train"


def draw(rng, fewest=2, most=5):
    """One problem from `rng`, a random.Random: (question, start, steps).

    start: the count at first. steps: its `fewest` to `most` signed changes.
    """
    name = rng.choice(NAMES)
    item = rng.choice(ITEMS)
    start = count = rng.randint(2, LARGEST)
    steps, events = [], []
    for _ in range(rng.randint(fewest, most)):
        change = rng.choice(possible_changes(count))
        verb = rng.choice(MORE if change > 0 else LESS)
        steps.append(change)
        events.append(f"{verb} {abs(change)}")
        count += change
    story = ", ".join(events[:-1]) + " and " + events[-1]
    question = f"{name} has {start} {item}. {PRONOUNS[name]} {story}. How many {item} now?"
    return question, start, steps


@functools.cache  # there are 100 counts, and 20,000 problems ask 78,000 times
def possible_changes(count):
    """Changes of at most OPERAND, except 0, that keep the count within 0..LARGEST."""
    changes = range(-OPERAND, OPERAND + 1)
    return tuple(c for c in changes if c and 0 <= count + c <= LARGEST)


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


def problems(n, seed, split, fewest=2, most=5):
    """`n` different problems of one split, a list of {"question", "answer"}.

    fewest, most: steps of a problem. The embedded task has the defaults.

    The same arguments give the same problems. Raises ValueError if split is not "train" or "test".
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    rng = random.Random(f"{split} {seed}")
    found = {}  # a question that is drawn twice has one answer and one entry
    while len(found) < n:
        question, start, steps = draw(rng, fewest, most)
        if split_of(question) == split:
            found[question] = worked(start, steps)
    return [{"question": question, "answer": answer} for question, answer in found.items()]
