"""Clip-Cov. "The Entropy Mechanism of Reinforcement Learning for Reasoning", arXiv 2505.22617.

DAPO, but a few random tokens of large covariance get no gradient, and the clip is wide.

    A_i as in GRPO                                                                           [B]
    cov_{i,t} = (A_{i,t} - mean A) (logp_{i,t} - mean logp),  logp = log pi_theta            [B, T]
    x_{i,t} = 0 if the token is chosen, else 1                                               [B, T]
    loss = - 1/sum_i |o_i| sum_{i,t} x min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)       scalar

The means run over all N = sum_i |o_i| tokens of the batch; cov has no gradient. It is large where a
likely token has a high advantage, or an unlikely one a low one: these pushes cost the most entropy.
- Candidates: tokens with cov_low < cov < cov_high that the clip has not already silenced.
- Chosen: max(1, int(cov_ratio N)) of them at random. They lose value and gradient, and still count.

Source: the authors' code (PRIME-RL/Entropy-Mechanism-of-RL, 7b_clip_cov.sh: clip range 1 / 1). The
choice of tokens is verl's: torch.randperm, from the global CPU generator.

Know before use: N is our mini-batch's (verl: the micro-batch's). Up to 9,999 tokens the default
cov_ratio chooses one token only; raise it to see an effect on small batches.

Worked example: grpo.py's batch. Mean A is 0.7070 / 3, mean logp is (0.4055 - 0.1054) / 3 = 0.1,
and cov = 0.1439, -0.0968 and 0.0943. One candidate is above 0.1: w = 1.5 loses its push.

    >>> A, old = torch.tensor([0.7070, -0.7070]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), old, A, mask, cov_low=0.1)  # -(0 + 0.9 - 1.0) * 0.7070 / 3
    tensor(0.0236)
"""

import torch

from grpo import clip_term, exp_ratio, prepare, token_mean

# No `advantages` here: the trainer takes GRPO's.

# Rows whose advantages are all 0 enter the means of cov: their logprobs must be current too.
NEEDS_ALL_ROWS = True


def covariance(logp, A, mask):
    """(A - mean A) (logp - mean logp), the means over all tokens. It only chooses tokens. [B, T]"""
    return (A - token_mean(A, mask)) * (logp - token_mean(logp, mask))


def loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    eps_low=1.0,
    eps_high=1.0,
    cov_ratio=2e-4,
    cov_low=1.0,
    cov_high=5.0,
):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    cov = covariance(logp, A, mask)  # [B, T]
    clipped = (A > 0) & (ratio > 1 + eps_high) | (A < 0) & (ratio < 1 - eps_low)
    in_range = (cov > cov_low) & (cov < cov_high)
    candidates = (in_range & ~clipped & (mask > 0)).nonzero()  # [n, 2], row by row
    k = max(1, int(cov_ratio * int(mask.sum())))
    order = torch.randperm(len(candidates))[:k].to(candidates.device)
    i, t = candidates[order].T  # of the chosen
    x = torch.ones_like(A)
    x[i, t] = 0
    # - 1/sum_i |o_i| sum_{i,t} x min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)
    return -token_mean(x * clip_term(ratio, A, eps_low, eps_high), mask)
