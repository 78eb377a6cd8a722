"""Step 2 of the loop: which completions are right, and what reward each one gets.

Without --reward, a completion is right if `rewards.correct` says so, and its reward is 1 or 0. A
file of the user, --reward FILE.py, has

    reward(completion: str, problem: dict) -> float | dict[str, float]

and, if a task needs its own check of what is right,

    correct(completion: str, problem: dict) -> bool

which then decides accuracy too, in training and on held-out problems. problem has the fields of its
line in the data. Both functions get `truncated`, whether the completion was cut off at the limit,
if they have a keyword-only parameter of that name.
"""

import copy

import torch

from rewards import (
    correct,
    equal,
    extract_answer,
    group_overlong_penalty,
    overlong_penalty,
    true_answer,
)
from trainer.decoding import text_of
from trainer.methods import OwnFileError, named
from trainer.prompts import ids_of

QUOTED = 60  # characters of a question in an error


def check_answer(tokenizer):
    """Raise ValueError unless `rewards.correct` can read an answer that this tokenizer writes."""
    text = text_of(tokenizer, ids_of(tokenizer, "#### 18"))
    if extract_answer(text) != 18:
        raise ValueError(
            f"the model's tokenizer turns '#### 18' into {text!r}, where no answer can be read: "
            f"every reward would be 0. Use another model, or --reward FILE.py with `correct`"
        )


class BadReward(Exception):
    """A default reward that is not a number in [-1, 1], or rewards that the method cannot take."""


class Grader:
    """Grades completions, by rewards.py or by a file of the user."""

    def __init__(self, options=None, own=None):
        """own: the functions `reward` and `correct` (None if there is none) of a file."""
        self.o, self.own = options, own
        self.parts = None  # the names of the reward's parts, once a completion has been rewarded

    def grade(self, batch):
        """Fill in right, rewards and parts of a batch that has its problems and texts."""
        lengths, truncated = batch.mask.sum(1).tolist(), batch.truncated.tolist()
        right, rewards, batch.parts = [], [], []
        for row in zip(batch.texts, batch.problems, lengths, truncated, strict=True):
            is_right, reward, parts = self.reward(*row)
            right.append(is_right)
            rewards.append(reward)
            batch.parts.append(parts)
        rewards = self.by_group(rewards, right, lengths)
        device = batch.mask.device
        batch.right = torch.tensor(right, device=device)  # [B]
        batch.rewards = torch.tensor(rewards, device=device)  # [B]

    def reward(self, text, problem, length, truncated):
        """(1.0 if the completion is right else 0.0, its reward, the reward's parts by name).

        DAPO's overlong penalty is added if --overlong-cache is set. length: in tokens. Raises
        BadReward or OwnFileError.
        """
        right = reward = self.right(text, problem, truncated)
        parts = {}
        if self.own:
            value = self.call(self.own.reward, text, problem, truncated)
            parts = self.named_parts(value, problem)
            reward = float(sum(parts.values()) if isinstance(value, dict) else value)
        if self.o.overlong_cache:
            reward += overlong_penalty(length, self.o.max_new_tokens, self.o.overlong_cache)
        if not self.own and not -1 <= reward <= 1:
            raise BadReward(
                f"the reward {reward} is not a number in [-1, 1]; it was given to {text!r}"
            )
        return right, reward, parts

    def by_group(self, rewards, right, lengths):
        """The rewards with GTPO's length punishment added, if --group-overlong is set. [B]"""
        if not self.o.group_overlong:
            return rewards
        found, G = [], self.o.group_size
        for i in range(0, len(rewards), G):
            group = slice(i, i + G)
            penalties = group_overlong_penalty(lengths[group], right[group], self.o.group_overlong)
            found += [r + p for r, p in zip(rewards[group], penalties, strict=True)]
        return found

    def right(self, text, problem, truncated):
        """1.0 if the completion is right, else 0.0."""
        if self.own and self.own.correct:
            return float(bool(self.call(self.own.correct, text, problem, truncated)))
        return correct(text, problem["answer"], truncated)

    def lenient(self, text, problem, truncated):
        """`right`, but the last number counts where there is no marker."""
        if self.own and self.own.correct:
            return self.right(text, problem, truncated)
        found = extract_answer(text, lenient=True, truncated=truncated)
        return float(equal(found, true_answer(problem["answer"])))

    def call(self, function, text, problem, truncated):
        """A function of the file, with an error that names the problem."""
        fields = {name: value for name, value in problem.items() if name != "prompt_ids"}
        fields = copy.deepcopy(fields)  # the file may change it
        try:
            return function(text, fields, **named(function, {"truncated": truncated}))
        except OwnFileError as error:
            raise OwnFileError(f"{error}; {about(problem)}") from error

    def named_parts(self, value, problem):
        """The parts of a reward, {name: number}; {} if it is one number. Raises OwnFileError."""
        parts = {}
        if isinstance(value, dict):
            parts = {name: float(part) for name, part in value.items()}
        if self.parts is None:
            self.parts = parts.keys()
        if parts.keys() != self.parts:
            got, before = (", ".join(names) or "one number" for names in (parts, self.parts))
            raise OwnFileError(
                f"{self.own.reward.place}: reward must return the same parts for every completion; "
                f"it returned {got} after {before}; {about(problem)}"
            )
        return parts


def about(problem):
    """Which problem it was, for an error message."""
    question = " ".join(problem["question"].split())
    shortened = question if len(question) <= QUOTED else question[:QUOTED] + "…"
    return f"the problem is {shortened!r}"
