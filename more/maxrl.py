"""MaxRL: Maximum Likelihood Reinforcement Learning. arXiv 2602.02710.

DAPO, but the advantage is divided by the mean of the rewards and not by their std: the fewer of a
group are right, the more each right one counts.

    A_i = (r_i - mean_group r) / (mean_group r + 1e-6)                                       [B]
    loss: DAPO's                                                                             scalar

With rewards of 0 and 1 the mean estimates the chance p of a right answer, and the gradient of p
divided by p is that of log p: the likelihood of a right answer.

Source: the authors' code, a blog post. Our choices: DAPO's loss (the authors train on policy); a
negative mean is an error, as the derivation is for rewards of 0 and 1.

Worked example: a hard and an easy prompt. GRPO has 1.4997 and -0.4999; 0.4999 and -1.4997.

    >>> A = advantages(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]), group_size=4)
    >>> A.view(2, 4)  # 0.75 / 0.25 and -0.25 / 0.25; 0.25 / 0.75 and -0.75 / 0.75
    tensor([[ 3.0000, -1.0000, -1.0000, -1.0000],
            [ 0.3333,  0.3333,  0.3333, -1.0000]])
"""

import torch

import dapo
from grpo import constant, split_groups


def advantages(rewards, group_size):
    """(r - mean) / mean of the group, 0 if constant: [B] -> [B], or a ValueError."""
    r = split_groups(rewards, group_size)  # [B/G, G]
    mean = r.mean(1, keepdim=True)  # [B/G, 1]
    if torch.any(mean < 0):
        raise ValueError(f"MaxRL needs rewards of 0 and 1; the mean of a group is {mean.min():.3g}")
    # A_i = (r_i - mean r) / (mean r + 1e-6)
    return ((r - mean) / (mean + 1e-6)).masked_fill(constant(r), 0).flatten()  # [B]


loss = dapo.loss
