"""TR-GRPO: Token-Regulated GRPO. arXiv 2511.00066v1 (later versions call it GRPO-SG).

    A_i as in GRPO                                                                          [B]
    w_{i,t} = pi_theta(o_{i,t}) / pi_old(o_{i,t})                                           [B, T]
    v_{i,t} = clip(alpha sigmoid(tau (pi_theta(o_{i,t}) - mu)), lower, upper)               [B, T], no gradient
    loss = - 1/B sum_i 1/|o_i| sum_t v min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)      scalar

Against GRPO: a token weighs more the more probable it is, since a rare token's gradient is large and drowns the others.

The paper's sigmoid-then-clip and its constants (alpha 2, tau 9, mu 0.25, L 1.0, U 1.4) are known to us at second hand.
Our choices: the argument tau (pi - mu), the reading in which v leaves 1 exactly at pi = mu, where
sigmoid(pi / tau) - mu would make v = 1 always; eps 0.2 / 0.24; and the weight outside the clip, which the abstract's
argument needs. `weight_inside_clip=True` is Eq. 9 as reviewers report it, min(v w A, clamp(v w, 1 - eps_low,
1 + eps_high) A): there v > 1 + eps_high clips away the gradient of confident tokens of right answers, on the very first
update.

Worked example: grpo.py's ratios, with probabilities. v = 1.4 for pi = 0.75 (capped), 2 sigmoid(9 x 0.02) = 1.0898 for
pi = 0.27, and 1 for pi = 0.2 (2 sigmoid(-0.45) = 0.7787 is below L); w = 1.5 is clipped to 1.24.

    >>> import torch
    >>> A = advantages(torch.tensor([1.0, 0.0]), group_size=2)
    >>> mask, old = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[0.5, 0.3], [0.2, 1.0]]).log()
    >>> loss(torch.tensor([[0.75, 0.27], [0.2, 1.0]]).log(), old, A, mask)
    tensor(-0.1267)
    >>> round(-((1.4 * 1.24 + 1.0898 * 0.9) / 2 - 1.0) * 0.7070 / 2, 4)
    -0.1267
"""

import torch

from grpo import advantages, clip_term, exp_ratio, prepare, sequence_mean

__all__ = ["advantages", "loss"]


def loss(
    logprobs, old_logprobs, advantages, mask, *,
    eps_low=0.2, eps_high=0.24, alpha=2.0, tau=9.0, mu=0.25, lower=1.0, upper=1.4, weight_inside_clip=False,
):  # fmt: skip
    """All [B, T], advantages [B] or [B, T] -> scalar to be minimised. Raises ValueError on shapes that do not fit."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    # v = clip(alpha sigmoid(tau (pi_theta - mu)), L, U)
    v = (alpha * torch.sigmoid(tau * (logp.detach().exp() - mu))).clamp(lower, upper)  # [B, T]
    if weight_inside_clip:
        # - 1/B sum_i 1/|o_i| sum_t min(v w A, clamp(v w, 1 - eps_low, 1 + eps_high) A)
        return -sequence_mean(clip_term(v * ratio, A, eps_low, eps_high), mask)
    # - 1/B sum_i 1/|o_i| sum_t v min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)
    return -sequence_mean(v * clip_term(ratio, A, eps_low, eps_high), mask)
