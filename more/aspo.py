"""ASPO: Asymmetric Importance Sampling Policy Optimization. arXiv 2510.06062.

DAPO, but the ratio of tokens with A > 0 is turned over: what has become rarer is pushed harder.

    A_i as in GRPO                                                                           [B]
    A > 0: c = min(1 / min(w, 1 + eps_high), cap),  open where w <= 1 + eps_high             [B, T]
    A < 0: c = min(max(w, 1 - eps_low), cap),       open where w >= 1 - eps_low              [B, T]
    g_{i,t} = pi_theta / stopgrad(pi_theta) where open, else 1                               [B, T]
    loss = - 1/sum_i |o_i| sum_{i,t} stopgrad(c) g A                                         scalar

So the gradient is -A c / sum_i |o_i| where open, and 0 elsewhere. c has no gradient: the derivative
of 1/w itself would push the other way. Above the cap the gradient stays, at cap: the paper's "soft
dual clip".

Source: the authors' code (wizard-III/Archer2.0, compute_policy_loss_archer). Our choice: beyond the
cap our value is -cap A and the code's is -cap A logp, with the same gradient. Left out: its clip
range of 0.4 for the fifth of a row's tokens that have the most entropy, and its KL term of 0.001.

Worked example: grpo.py's batch. w = 1.5 is closed; w = 0.9 counts 1 / 0.9 = 1.1111; row 1 counts 1.

    >>> A, old = torch.tensor([0.7070, -0.7070]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> logprobs = ratios.log().requires_grad_()
    >>> value = loss(logprobs, old, A, mask)
    >>> round(value.item(), 4)  # -(1 / 1.2 + 1 / 0.9 - 1.0) * 0.7070 / 3
    -0.2226
    >>> torch.autograd.grad(value, logprobs)[0]  # 0, -1.1111 * 0.7070 / 3, 1.0 * 0.7070 / 3
    tensor([[ 0.0000, -0.2619],
            [ 0.2357,  0.0000]])
"""

import torch

from grpo import exp_ratio, prepare, token_mean

# No `advantages` here: the trainer takes GRPO's.


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=0.2, eps_high=0.2, cap=3.0):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old).detach()  # w_{i,t}  [B, T]
    right = A > 0
    # A > 0: 1 / min(w, 1 + eps_high);  A < 0: max(w, 1 - eps_low);  at most cap
    c = torch.where(right, 1 / ratio.clamp(max=1 + eps_high), ratio.clamp(min=1 - eps_low))
    c = c.clamp(max=cap)
    is_open = torch.where(right, ratio <= 1 + eps_high, ratio >= 1 - eps_low)
    g = torch.where(is_open, (logp - logp.detach()).exp(), 1)  # value 1
    # - 1/sum_i |o_i| sum_{i,t} stopgrad(c) g A
    return -token_mean(c * g * A, mask)
