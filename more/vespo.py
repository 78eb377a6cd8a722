"""VESPO: Variational sequence-level soft policy optimization. arXiv 2602.10693.

CISPO, but the weight of the gradient is a smooth function of the ratio of the whole completion: it
fades on both sides, and nothing is clipped.

    A_i as in GRPO                                                                           [B]
    W_i = pi_theta(o_i) / pi_old(o_i) = exp(sum_t log(pi_theta / pi_old))                    [B]
    phi_i = stopgrad(exp(lambda + k log W - lambda W))                                       [B]
            k, lambda = k_pos, lambda_pos where A >= 0, else k_neg, lambda_neg
    loss = - 1/sum_i |o_i| sum_{i,t} phi_i A_i logp                                          scalar

The push is phi A / sum_i |o_i|. phi is 1 at W = 1 and largest at W = k / lambda: 2/3 where A > 0,
so what has become likelier already is pushed less; 3/2 where A < 0, so what has become rarer is
pushed less. The value is no objective: only the gradient means something.

Source: TRL's and the authors' code (FloyedShen/VESPO). Log-ratios are clamped to +-20, their sum to
log 1e-8 and 20, lambda to at least 1e-4. Our choice: advantages [B, T] are refused.

Worked example: grpo.py's batch. W_0 = 1.5 * 0.9 = 1.35: phi = exp(3 + 2 log 1.35 - 3 * 1.35) =
0.6378; W_1 = 1.

    >>> import torch
    >>> A, old = torch.tensor([0.7070, -0.7070]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> logprobs = ratios.log().requires_grad_()
    >>> value = loss(logprobs, old, A, mask)
    >>> torch.autograd.grad(value, logprobs)[0]  # -0.6378 * 0.7070 / 3 twice, 1.0 * 0.7070 / 3
    tensor([[-0.1503, -0.1503],
            [ 0.2357,  0.0000]])
"""

import math

import torch

from grpo import prepare, token_mean

# No `advantages` here: the trainer takes GRPO's.


def loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    k_pos=2.0,
    lambda_pos=3.0,
    k_neg=3.0,
    lambda_neg=2.0,
):
    """All [B, T] but advantages [B] -> scalar to minimise, or a ValueError."""
    if advantages.ndim != 1:
        raise ValueError(f"VESPO takes one advantage per sequence; got {list(advantages.shape)}")
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    log_ratio = (logp.detach() - old).clamp(-20, 20)
    log_W = log_ratio.sum(1, keepdim=True).clamp(math.log(1e-8), 20)  # [B, 1]
    k = torch.full_like(A, k_neg).masked_fill(A >= 0, k_pos)  # [B, T]
    lam = torch.full_like(A, lambda_neg).masked_fill(A >= 0, lambda_pos).clamp(min=1e-4)  # [B, T]
    phi = (lam + k * log_W - lam * log_W.exp()).exp()  # [B, T]
    phi = phi.nan_to_num(posinf=0)
    # - 1/sum_i |o_i| sum_{i,t} phi A logp
    return -token_mean(phi * A * logp, mask)
