"""TR-GRPO: Token-Regulated GRPO. arXiv 2511.00066v1 (later versions call it GRPO-SG).

    A_i as in GRPO                                                                      [B]
    w_{i,t} = pi_theta(o_{i,t}) / pi_old(o_{i,t})                                       [B, T]
    v_{i,t} = clip(alpha sigmoid(tau (pi_theta(o_{i,t}) - mu)), lower, upper)           [B, T]
    loss = - 1/B sum_i 1/|o_i| sum_t v min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)  scalar

GRPO, but each token has a weight v, without gradient, which grows with the token's probability:
the gradients of rare tokens are large and would drown the others.

What we know of the paper, at second hand: v is a sigmoid of the probability, then clipped;
alpha 2, tau 9, mu 0.25, L = lower = 1.0, U = upper = 1.4.

Our choices:
- the sigmoid's argument is tau (pi - mu): then v leaves 1 exactly at pi = mu. The other reading,
  sigmoid(pi / tau) - mu, would make v = 1 always with these constants;
- eps is 0.2 / 0.24;
- v stands outside the clip, as the abstract's argument needs.

`weight_inside_clip=True` is Eq. 9 as reviewers report it:
min(v w A, clamp(v w, 1 - eps_low, 1 + eps_high) A). There v > 1 + eps_high clips away the gradient
of confident tokens of right answers, on the very first update.

Worked example: grpo.py's ratios, with probabilities. w = 1.5 is clipped to 1.24.
- pi = 0.75: v = 1.4, because 2 sigmoid(9 * 0.5) = 1.978 is above U;
- pi = 0.27: v = 2 sigmoid(9 * 0.02) = 1.0898;
- pi = 0.2: v = 1, because 2 sigmoid(9 * -0.05) = 0.7787 is below L.

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
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.24,
    alpha=2.0,
    tau=9.0,
    mu=0.25,
    lower=1.0,
    upper=1.4,
    weight_inside_clip=False,
):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    # v = clip(alpha sigmoid(tau (pi_theta - mu)), lower, upper)
    pi = logp.detach().exp()
    v = (alpha * torch.sigmoid(tau * (pi - mu))).clamp(lower, upper)  # [B, T]
    if weight_inside_clip:
        # - 1/B sum_i 1/|o_i| sum_t min(v w A, clamp(v w, 1 - eps_low, 1 + eps_high) A)
        return -sequence_mean(clip_term(v * ratio, A, eps_low, eps_high), mask)
    # - 1/B sum_i 1/|o_i| sum_t v min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)
    return -sequence_mean(v * clip_term(ratio, A, eps_low, eps_high), mask)
