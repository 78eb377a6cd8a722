"""Advantage Reweighting. "Do Not Let Low-Probability Tokens Over-Dominate in RL for LLMs",
arXiv 2505.12929.

DAPO, but an advantage counts less where the sampled token was unlikely.

    A_i as in GRPO                                                                           [B]
    A'_{i,t} = (alpha pi_old(o_{i,t}) + 1 - alpha) A_i                                       [B, T]
    loss = - 1/sum_i |o_i| sum_{i,t} min(w A', clamp(w, 1 - eps_low, 1 + eps_high) A')       scalar

The weight is between 1 - alpha and 1. It comes from pi_old, so it is fixed for the rollout, and it
holds for both signs of A. alpha = 0 is DAPO at these eps. trgrpo.py follows the same idea, with a
sigmoid of the current probability.

Source: the authors' code (zhyang2226/AR-Lopti, train_kklogic_AR_4x80GB.sh; alpha 0.3 where Lopti is
added). Left out: its KL term of 0.001 and its dual clip at 10.

Worked example: trgrpo.py's probabilities. pi_old = 0.5, 0.3 and 0.2 weigh 0.9, 0.86 and 0.84;
w = 1.5 is clipped to 1.24.

    >>> import torch
    >>> A, mask = torch.tensor([0.7070, -0.7070]), torch.tensor([[1, 1], [1, 0]])
    >>> pi, pi_old = torch.tensor([[[0.75, 0.27], [0.2, 1.0]], [[0.5, 0.3], [0.2, 1.0]]])
    >>> loss(pi.log(), pi_old.log(), A, mask)  # -(0.9 * 1.24 + 0.86 * 0.9 - 0.84) * 0.7070 / 3
    tensor(-0.2475)
"""

from grpo import clip_term, exp_ratio, prepare, token_mean

# No `advantages` here: the trainer takes GRPO's.


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=0.2, eps_high=0.24, alpha=0.2):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    # A' = (alpha pi_old + 1 - alpha) A
    A = (alpha * old.exp() + 1 - alpha) * A  # [B, T]
    # - 1/sum_i |o_i| sum_{i,t} min(w A', clamp(w, 1 - eps_low, 1 + eps_high) A')
    return -token_mean(clip_term(ratio, A, eps_low, eps_high), mask)
