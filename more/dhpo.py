"""DHPO: Dynamic Hybrid Policy Optimization. arXiv 2601.05607.

DAPO, but each token's objective is mixed with TEPO's: a token ratio and a sequence ratio, each
clipped in a range of its own before they are mixed.

    A_i as in GRPO                                                                           [B]
    w_{i,t} the token ratio of dapo.py,  s_i the sequence ratio of tepo.py
    loss = - 1/sum_i |o_i| sum_{i,t} (     weight  min(w A, clamp(w, eps) A)
                                      + (1 - weight) min(s A, clamp(s, seq_eps) A))          scalar

That is weight * DAPO's loss + (1 - weight) * TEPO's, with seq_eps as TEPO's clip range.

Source: second-hand notes. Our choices: the clip ranges (DAPO's, and GSPO's for the sequence ratio),
the min, the average. Left out: the paper's weight that follows the entropy; its form is not known
to us.

Worked example: grpo.py's batch. DAPO's loss on it is -0.2781 (dapo.py). s_0 = 1.1619 is clipped to
1.0004, and s_1 = 1.

    >>> import torch
    >>> A, old = torch.tensor([0.7070, -0.7070]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), old, A, mask)  # -(0.2781 + (2 * 1.0004 - 1.0) * 0.7070 / 3) / 2
    tensor(-0.2570)
"""

import dapo
import tepo
from grpo import prepare

# No `advantages` here: the trainer takes GRPO's.


def loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.28,
    seq_eps_low=3e-4,
    seq_eps_high=4e-4,
    weight=0.5,
):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    # prepared here, so that the two gradients are added in fp32
    batch = prepare(logprobs, old_logprobs, advantages, mask)
    # - 1/sum_i |o_i| sum_{i,t} min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)
    by_token = dapo.loss(*batch, eps_low=eps_low, eps_high=eps_high)
    # - 1/sum_i |o_i| sum_{i,t} min(s A, clamp(s, 1 - seq_eps_low, 1 + seq_eps_high) A)
    by_sequence = tepo.loss(*batch, eps_low=seq_eps_low, eps_high=seq_eps_high)
    return weight * by_token + (1 - weight) * by_sequence
