"""GSPO: Group Sequence Policy Optimization. arXiv 2507.18071, sections 4.1, 4.3 (GSPO-token).

    A_i as in GRPO                                                                      [B]
    s_i = (pi_theta(o_i) / pi_old(o_i))^(1/|o_i|)
        = exp(1/|o_i| sum_t log(pi_theta(o_{i,t}) / pi_old(o_{i,t})))                   [B]
    loss = - 1/B sum_i min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A)                  scalar

GRPO, but with one ratio per sequence, the geometric mean of its token ratios: a sequence is
clipped whole or not at all. s_i moves on a 1e-3 scale: the paper clips at 3e-4 / 4e-4, and 0.2
would hardly ever bind.

With advantages [B, T] it is GSPO-token. Its ratio has the value s_i, but only the gradient of its
own token:

    s_{i,t} = stopgrad(s_i) pi_theta(o_{i,t}) / stopgrad(pi_theta(o_{i,t}))             [B, T]
    loss = - 1/B sum_i 1/|o_i| sum_t min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A)    scalar

Where the advantage is constant along the sequence, GSPO-token equals GSPO in value and gradient.

Worked example: grpo.py's batch, clipped at 0.2. s_0 = sqrt(1.5 * 0.9) = 1.1619 is inside, s_1 = 1.

    >>> import torch
    >>> A = advantages(torch.tensor([1.0, 0.0]), group_size=2)
    >>> mask, old = torch.tensor([[1, 1], [1, 0]]), torch.zeros(2, 2)
    >>> logprobs = torch.tensor([[1.5, 0.9], [1.0, 1.0]]).log()
    >>> loss(logprobs, old, A, mask, eps_low=0.2, eps_high=0.2)
    tensor(-0.0572)
    >>> round(-(1.1619 - 1.0) * 0.7070 / 2, 4)
    -0.0572
"""

from grpo import advantages, clip_term, exp_ratio, prepare, row_mean, sequence_mean

__all__ = ["advantages", "loss"]


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=3e-4, eps_high=4e-4):
    """All [B, T], advantages [B] (GSPO) or [B, T] (GSPO-token) -> scalar to minimise.

    Raises ValueError if the shapes do not fit.
    """
    per_token = advantages.ndim == 2
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    # s_i = exp(1/|o_i| sum_t log w_{i,t}): a mean of the log-ratios, not their sum
    ratio = exp_ratio(row_mean(logp - old, mask))[:, None]  # [B, 1]
    if per_token:
        # s_{i,t} = stopgrad(s_i) pi_theta / stopgrad(pi_theta)
        ratio = ratio.detach() * (logp - logp.detach()).exp()  # [B, T]
    # - 1/B sum_i 1/|o_i| sum_t min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A)
    # With advantages [B], all terms of the inner mean are equal.
    return -sequence_mean(clip_term(ratio, A, eps_low, eps_high), mask)
