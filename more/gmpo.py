"""GMPO: Geometric-Mean Policy Optimization. arXiv 2507.20673.

GSPO, but the clip acts on each token's log-ratio, before the mean: a token that has moved far loses
its own gradient and does not silence its sequence.

    A_i as in GRPO                                                                           [B]
    l_{i,t} = min(log w_{i,t}, eps_high)    where A_i > 0
            = max(log w_{i,t}, -eps_low)    where A_i < 0                                    [B, T]
    loss = - 1/B sum_i A_i exp(1/|o_i| sum_t l)                                              scalar

eps is a range of log w: 0.4 / 0.4 is w from e^-0.4 = 0.67 to e^0.4 = 1.49. A clipped token has no
gradient; the others keep -A_i exp(mean l) / (B |o_i|), each the same.

Source: the authors' code (callsys/GMPO, train_zero_math_gmpo.py); verl's geo_mean.

Worked example: grpo.py's batch. log 1.5 = 0.4055 is clipped to 0.4, log 0.9 = -0.1054:
exp((0.4 - 0.1054) / 2) = 1.1587, and row 1 has exp(0) = 1.

    >>> A, old = torch.tensor([0.7070, -0.7070]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), old, A, mask)  # -(1.1587 - 1.0) * 0.7070 / 2
    tensor(-0.0561)
"""

import torch

from grpo import exp_ratio, prepare, row_mean, sequence_mean

# No `advantages` here: the trainer takes GRPO's.


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=0.4, eps_high=0.4):
    """All [B, T] but advantages [B] -> scalar to minimise, or a ValueError."""
    if advantages.ndim != 1:
        raise ValueError(f"GMPO takes one advantage per sequence; got {list(advantages.shape)}")
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    log_ratio = logp - old  # log w_{i,t}  [B, T]
    at_most = log_ratio.clamp(max=eps_high)
    at_least = log_ratio.clamp(min=-eps_low)
    clipped = torch.where(A > 0, at_most, at_least)  # l_{i,t}  [B, T]
    ratio = exp_ratio(row_mean(clipped, mask))[:, None]  # [B, 1]
    # - 1/B sum_i A_i exp(1/|o_i| sum_t l), constant along the row
    return -sequence_mean(ratio * A, mask)
