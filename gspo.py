"""GSPO: Group Sequence Policy Optimization. arXiv 2507.18071, sections 4.1 (GSPO) and 4.3 (GSPO-token).

    A_i as in GRPO                                                                          [B]
    s_i = (pi_theta(o_i) / pi_old(o_i))^(1/|o_i|) = exp(1/|o_i| sum_t log w_{i,t})          [B]
    loss = - 1/B sum_i min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A)                      scalar

Against GRPO: one ratio a sequence, the geometric mean of its token ratios; a sequence is clipped whole or not at all.
s_i moves on a 1e-3 scale: the paper clips at 3e-4 / 4e-4, and 0.2 would hardly ever bind.

With advantages [B, T] it is GSPO-token, whose ratio has the value s_i, and the gradient of the token alone:

    s_{i,t} = stopgrad(s_i) pi_theta(o_{i,t}) / stopgrad(pi_theta(o_{i,t}))                 [B, T]
    loss = - 1/B sum_i 1/|o_i| sum_t min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A)

Equal to GSPO in value and gradient where the advantage is constant along the sequence.

Worked example: grpo.py's batch, with a clip of 0.2. s_0 = sqrt(1.5 x 0.9) = 1.1619 is inside, s_1 = 1.

    >>> import torch
    >>> A = advantages(torch.tensor([1.0, 0.0]), group_size=2)
    >>> mask = torch.tensor([[1, 1], [1, 0]])
    >>> loss(torch.tensor([[1.5, 0.9], [1.0, 1.0]]).log(), torch.zeros(2, 2), A, mask, eps_low=0.2, eps_high=0.2)
    tensor(-0.0572)
    >>> round(-(1.1619 - 1.0) * 0.7070 / 2, 4)
    -0.0572
"""

from grpo import advantages, clip_term, exp_ratio, prepare, row_mean, sequence_mean

__all__ = ["advantages", "loss"]


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=3e-4, eps_high=4e-4):
    """All [B, T], advantages [B] (GSPO) or [B, T] (GSPO-token) -> scalar to be minimised. Raises ValueError on shapes
    that do not fit.
    """
    per_token = advantages.ndim == 2
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(row_mean(logp - old, mask))[
        :, None
    ]  # s_i  [B, 1]: a mean of log-ratios, never their sum
    if per_token:
        ratio = ratio.detach() * (logp - logp.detach()).exp()  # s_{i,t}  [B, T]
    # - 1/B sum_i 1/|o_i| sum_t min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A); with A [B] the inner mean is of equals
    return -sequence_mean(clip_term(ratio, A, eps_low, eps_high), mask)
