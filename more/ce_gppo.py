"""CE-GPPO: Coordinating Entropy via Gradient-Preserving Policy Optimization. arXiv 2509.20712.

DAPO, but a clipped token keeps a bounded gradient: the clip's edge, times beta1 or beta2.

    A_i as in GRPO                                                                           [B]
    g_{i,t} = pi_theta(o_{i,t}) / stopgrad(pi_theta(o_{i,t})),  value 1                      [B, T]
    u_{i,t} = beta1 (1 - eps_low) g    where A < 0 and w < 1 - eps_low
            = beta2 (1 + eps_high) g   where A > 0 and w > 1 + eps_high
            = w                        elsewhere                                             [B, T]
    loss = - 1/sum_i |o_i| sum_{i,t} u A                                                     scalar

beta1 sets how hard a token is still pushed down once it is below the clip range, beta2 how hard it
is still pushed up above it. beta1 = beta2 = 0 has the gradient of DAPO at these eps, but not its
value; beta1 = beta2 = 1 has DAPO's value, but not its gradient.

Source: the authors' code (Kwai-Klear/CE-GPPO, its 1.5B script; 7B: beta1 0.75). The method was
trained with --dynamic-sampling. Left out: the code's dual clip (no gradient where A < 0, w > 10).

Worked example: grpo.py's batch. w = 1.5 is clipped to 1.2, which DAPO would give no gradient.

    >>> A, old = torch.tensor([0.7070, -0.7070]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> logprobs = ratios.log().requires_grad_()
    >>> value = loss(logprobs, old, A, mask)
    >>> round(value.item(), 4)  # -(1.2 + 0.9 - 1.0) * 0.7070 / 3
    -0.2592
    >>> torch.autograd.grad(value, logprobs)[0]  # -1.2 * 0.7070 / 3, then 0.9 and -1.0
    tensor([[-0.2828, -0.2121],
            [ 0.2357,  0.0000]])
"""

import torch

from grpo import exp_ratio, prepare, token_mean

# No `advantages` here: the trainer takes GRPO's.


def loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.2,
    beta1=0.5,
    beta2=1.0,
):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    g = (logp - logp.detach()).exp()  # value 1, the gradient of logp
    below = (A < 0) & (ratio < 1 - eps_low)
    above = (A > 0) & (ratio > 1 + eps_high)
    u = torch.where(below, beta1 * (1 - eps_low) * g, ratio)
    u = torch.where(above, beta2 * (1 + eps_high) * g, u)
    # - 1/sum_i |o_i| sum_{i,t} u A
    return -token_mean(u * A, mask)
