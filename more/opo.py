"""OPO: On-Policy RL with Optimal reward baseline. arXiv 2505.23585.

DAPO, but the baseline is the mean reward weighted by length, and nothing is divided by the std.

    A_i = r_i - sum_k |o_k| r_k / sum_k |o_k|,  k over the group                             [B]
    loss: DAPO's                                                                             scalar

A long completion has more tokens to push, so its reward counts more in the baseline: with this one
sum_i |o_i| A_i is 0 in every group, so all pushes of a group on policy add up to 0.

Source: abstract and verl's code ("opo"). The paper takes one update per rollout, exactly on policy:
--updates 1. Our choice: DAPO's clip, which then never acts.

Worked example: completions of 1 and 3 tokens, the short one is right. The baseline is 1/4.

    >>> import torch
    >>> mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    >>> advantages(torch.tensor([1.0, 0.0]), 2, mask=mask)
    tensor([ 0.7500, -0.2500])
"""

import dapo
from grpo import constant, split_groups


def advantages(rewards, group_size, *, mask=None):
    """rewards [B], mask [B, T] -> [B], 0 in constant groups and empty rows. Or a ValueError."""
    r = split_groups(rewards, group_size)  # [B/G, G]
    shapes = [x if x is None else list(x.shape) for x in (rewards, mask)]
    if mask is None or mask.ndim != 2 or shapes[1][:1] != shapes[0]:
        raise ValueError(f"OPO needs rewards [B] and mask [B, T]; got {shapes}")
    length = (mask != 0).sum(1).view_as(r)  # |o_i|  [B/G, G]
    # A_i = r_i - sum_k |o_k| r_k / sum_k |o_k|; 0 / 0 in a group of empty rows, which get 0
    a = r - (length * r).sum(1, keepdim=True) / length.sum(1, keepdim=True)
    return a.masked_fill(constant(r) | (length == 0), 0).flatten()  # [B]


loss = dapo.loss
