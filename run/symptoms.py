"""What can go wrong in a run and shows in its metrics: one table, a warning per symptom and run.

All limits are our choices. Above each stands what it was measured against: runs that learn (of the
embedded task, if no other is named), and those of docs/stress.csv, many of which break.
docs/troubleshooting.md has the same table for the reader.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

WINDOW = 5  # steps that a mean is taken over; fewer steps give no warning
LEARNED = 0.5  # share of right completions from which low entropy is no longer early
SURE = 4  # standard errors by which accuracy must have fallen


def means(steps, key):
    """The means of a metric over each WINDOW steps in a row; NaN where a step has no value."""
    values = [math.nan if line.get(key) is None else line[key] for line in steps]
    return [fmean(values[i : i + WINDOW]) for i in range(len(values) - WINDOW + 1)]


def last_mean(steps, key):
    return means(steps[-WINDOW:], key)[0] if len(steps) >= WINDOW else math.nan


# A test gets the lines of metrics.jsonl so far, those of steps and those of evaluations, and the
# limit. It returns the numbers that fill the warning, or None.


def high(key):
    """A test of whether the mean of a metric is over the limit."""

    def found(steps, _, limit):
        value = last_mean(steps, key)
        return (value,) if value > limit else None

    return found


def ratio_off_1(steps, _, limit):
    largest = steps[-1].get("ratio_first_max") if steps else None
    if largest is None or largest <= limit:  # NaN fails this test, and is reported
        return None
    return largest, limit


def unmarked_answers(_, evaluations, limit):
    """Not before the first step: the form of an answer is what a model learns first."""
    last = evaluations[-1] if evaluations else {"step": 0}
    if last["step"] == 0 or last.get("accuracy_lenient") is None:
        return None
    strict, lenient = last["accuracy"], last["accuracy_lenient"]
    beyond_noise = lenient > last["ci95"][1]
    return (strict, lenient) if lenient - strict > limit and beyond_noise else None


def early_low_entropy(steps, _, limit):
    entropy, right = last_mean(steps, "entropy"), last_mean(steps, "accuracy")
    return (entropy, right) if entropy < limit and right < LEARNED else None


def fallen_accuracy(steps, _, limit):
    """Accuracy below `limit` times its best, and not by chance, as if a group were one draw."""
    every = means(steps, "accuracy")
    if not every:
        return None
    best, now = max(every), every[-1]
    error = math.sqrt(best * (1 - best) / (WINDOW * steps[-1].get("prompts", 1)))
    return (now, best) if now < limit * best and best - now > SURE * error else None


@dataclass(frozen=True)
class Symptom:
    name: str  # as in docs/troubleshooting.md
    test: Callable
    limit: float | dict  # {dtype: float} where it depends on --dtype
    text: str  # filled with what the test returns
    in_bf16: str = ""  # what else to try with --dtype bf16


SYMPTOMS = (
    # Runs that learn: at most 0.62.
    Symptom(
        "no signal",
        high("zero_std"),
        0.9,
        "{:.0%} of the groups of the last 5 steps had equal rewards, and nothing can be learned "
        "from such a group. Are the problems too hard, or too easy? Try a larger --group-size, "
        "other problems, --dynamic-sampling 4; read samples.jsonl",
    ),
    # Runs that learn: at most 0.002.
    Symptom(
        "cut off",
        high("truncated"),
        0.3,
        "{:.0%} of the completions of the last 5 steps were cut off before they ended, and most "
        "of those have no answer. Raise --max-new-tokens",
    ),
    # Runs that learn: 0.
    Symptom(
        "right, but not marked",
        unmarked_answers,
        0.1,
        "greedy accuracy is {:.2f}, but {:.2f} where the last number counts: answers are right "
        "and not marked as answers. Ask for '#### number' in --prompt; --show-prompt prints it",
    ),
    # Runs that learn fall below it too, but with more than half of the completions right.
    Symptom(
        "low entropy early",
        early_low_entropy,
        0.05,
        "the entropy is down to {:.2g} nats per token while {:.0%} of the completions are right: "
        "the policy explores no more. Try a lower --lr, fewer --updates, a higher --temperature",
    ),
    # Runs that learn: at least 0.61. It finds 37 of the 42 that break (4 and 16 updates).
    Symptom(
        "accuracy falls",
        fallen_accuracy,
        0.5,
        "the accuracy of the last 5 steps is {:.2f}, and it has been {:.2f}: the updates went too "
        "far. Try a lower --lr, or fewer --updates; checkpoints/ may hold the policy from before",
    ),
    # What rounding explains, before the first update on a rollout.
    Symptom(
        "ratio off 1",
        ratio_off_1,
        {"fp32": 1e-3, "bf16": 2e-2},
        "before the first update, pi_theta / pi_old differs from 1 by up to {:.2g} (rounding "
        "explains {:g}). Two passes of the same weights differ, so every ratio of this run has an "
        "error of this size. Does the model contain something random, such as dropout? See "
        "ratio_first_max in metrics.jsonl",
    ),
    # A step's largest: 2e-12 in fp32; in bf16 3e-4, and 6e-4 in a model of 0.5 B weights.
    Symptom(
        "sampler differs",
        high("sampler_kl"),
        {"fp32": 1e-6, "bf16": 5e-3},
        "the policy differs from what sampled by {:.2g} nats per token (sampler_kl), more than "
        "rounding explains. Try --sampler-correction 2",
        in_bf16=", or --dtype fp32",
    ),
)


class Watch:
    """Tells each symptom of a run once."""

    def __init__(self, dtype):
        self.dtype, self.said = dtype, set()
        self.steps, self.evaluations = [], []

    def catch_up(self, lines, step):
        """Take the lines of a run that goes on after this step.

        Their warnings have been printed; those of later steps, which are made again, too.
        """
        for line in lines:
            self.see(line)
        self.steps = [line for line in self.steps if line["step"] <= step]
        self.evaluations = [line for line in self.evaluations if line["step"] <= step]

    def see(self, line):
        """The warnings that are new with this line of metrics.jsonl, as a list."""
        (self.steps if line["phase"] == "train" else self.evaluations).append(line)
        warnings = []
        for symptom in SYMPTOMS:
            if symptom.name in self.said:
                continue
            limit = symptom.limit
            limit = limit[self.dtype] if isinstance(limit, dict) else limit
            numbers = symptom.test(self.steps, self.evaluations, limit)
            if numbers is not None:
                self.said.add(symptom.name)
                text = symptom.text.format(*numbers)
                text += symptom.in_bf16 if self.dtype == "bf16" else ""
                warnings.append(f"warning: step {line['step']}: {text}. Printed once")
        return warnings
