"""KL-Cov. "The Entropy Mechanism of Reinforcement Learning for Reasoning", arXiv 2505.22617.

Clip-Cov, but nothing is clipped: the tokens of largest covariance pay for moving.

    A_i as in GRPO                                                                           [B]
    cov_{i,t} = (A_{i,t} - mean A) (logp_{i,t} - mean logp),  as in clip_cov.py              [B, T]
    S = the max(1, int(cov_ratio N)) tokens of largest cov,  N = sum_i |o_i|
    loss = 1/sum_i |o_i| sum_{i,t} (-w A + cov_coef 1[S] |log w|)                            scalar

S has no gradient. A token of S may have A = 0. On the first update of a rollout log w = 0, and the
penalty does nothing.

Source: the authors' code (PRIME-RL/Entropy-Mechanism-of-RL, 7b_kl_cov.sh); its script for 32B has
cov_ratio 2e-4, verl's defaults are 2e-4 and cov_coef 0.1.

Worked example: grpo.py's batch. The token with w = 1.5 has the largest cov, 0.1439 (clip_cov.py),
and pays log 1.5 = 0.4055.

    >>> A, old = torch.tensor([0.7070, -0.7070]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), old, A, mask)  # (-(1.5 + 0.9 - 1.0) * 0.7070 + 0.4055) / 3
    tensor(-0.1948)
"""

import torch

from grpo import exp_ratio, prepare, token_mean
from more.clip_cov import covariance

# No `advantages` here: the trainer takes GRPO's.

# Rows whose advantages are all 0 enter the means of cov, and their tokens may be in S: their
# logprobs must be current too.
NEEDS_ALL_ROWS = True


def loss(logprobs, old_logprobs, advantages, mask, *, cov_ratio=2e-3, cov_coef=1.0):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    N = int(mask.sum())
    k = min(max(1, int(cov_ratio * N)), N)
    cov = covariance(logp, A, mask).masked_fill(mask == 0, -torch.inf)  # [B, T]
    S = torch.zeros_like(cov).flatten()  # 1 on the tokens of S  [B * T]
    S[cov.flatten().topk(k).indices] = 1
    penalty = S.view_as(cov) * (logp - old).abs()  # [B, T]
    # 1/sum_i |o_i| sum_{i,t} (-w A + cov_coef 1[S] |log w|)
    return token_mean(-ratio * A + cov_coef * penalty, mask)
