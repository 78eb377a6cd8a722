"""A reward that prefers short right answers.

    python train.py --reward examples/length_reward.py

Only right answers pay for their length. If wrong ones did too, the policy would learn to say
nothing: a short wrong answer would beat a long wrong one.
"""

from rewards import correct

FULL_COST = 200  # characters from which the whole cost is due
COST = 0.5


def reward(completion, problem, *, truncated):
    """1 for a right answer, less up to 0.5 for its length; 0 for a wrong one."""
    right = correct(completion, problem["answer"], truncated)
    return right * (1 - COST * min(1, len(completion) / FULL_COST))
