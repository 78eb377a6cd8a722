"""DPPO: Divergence Proximal Policy Optimization, Binary-TV and Binary-KL. arXiv 2602.04879.

CISPO, but a token loses its gradient once its probability, not its ratio, has moved too far in the
direction of its advantage. A rare token may go from 0.001 to 0.01, a ratio of 10.

    A_i as in GRPO                                                                           [B]
    p = pi_theta(o_{i,t}),  q = pi_old(o_{i,t}),  w = p / q                                  [B, T]
    D = |p - q|                                       divergence "tv"                        [B, T]
      = q log(q / p) + (1 - q) log((1 - q) / (1 - p))  divergence "kl"                       [B, T]
    M = 0 where A > 0,  p > q, D > delta_high
      = 0 where A <= 0, p < q, D > delta_low;  else 1                                        [B, T]
    loss = - 1/sum_i |o_i| sum_{i,t} stopgrad(min(w, cap) M) A logp                          scalar

The value is no objective: only the gradient means something. D is that of two outcomes, this token
or another one. With "kl", use delta 0.05: --option delta_low=0.05 --option delta_high=0.05.

Source: verl's and the authors' code (dppo_tv, dppo_kl, with 1e-8 added to 1 - q and 1 - p;
sail-sg/Stable-RL). Our choices: GRPO's advantages; the average over tokens, verl's default; cap 20
(Stable-RL: 10; verl's script: 10000); q is pi_old everywhere (Stable-RL: of its sampler).

Worked example: trgrpo.py's probabilities. 0.5 -> 0.75 with A > 0 has D = 0.25 > 0.15: no gradient;
0.3 -> 0.27 has w = 0.9.

    >>> import torch
    >>> A, mask = torch.tensor([0.7070, -0.7070]), torch.tensor([[1, 1], [1, 0]])
    >>> pi, pi_old = torch.tensor([[[0.75, 0.27], [0.2, 1.0]], [[0.5, 0.3], [0.2, 1.0]]])
    >>> logprobs = pi.log().requires_grad_()
    >>> value = loss(logprobs, pi_old.log(), A, mask)
    >>> torch.autograd.grad(value, logprobs)[0].abs()  # 0, 0.9 * 0.7070 / 3, 1.0 * 0.7070 / 3
    tensor([[0.0000, 0.2121],
            [0.2357, 0.0000]])
"""

from grpo import exp_ratio, prepare, token_mean

# No `advantages` here: the trainer takes GRPO's.


def binary_divergence(logp, old, divergence):
    """D between (p, 1 - p) and (q, 1 - q), or a ValueError. [B, T]"""
    p, q = logp.exp(), old.exp()
    if divergence == "tv":
        return (p - q).abs()
    if divergence == "kl":
        return q * (old - logp) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    raise ValueError(f"divergence must be 'tv' or 'kl'; got {divergence!r}")


def loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    delta_low=0.15,
    delta_high=0.15,
    cap=20.0,
    divergence="tv",
):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    now = logp.detach()
    D = binary_divergence(now, old, divergence)  # [B, T]
    too_high = (A > 0) & (now > old) & (D > delta_high)
    too_low = (A <= 0) & (now < old) & (D > delta_low)
    weight = exp_ratio(now - old).clamp(max=cap)  # min(w, cap)  [B, T]
    weight = weight.masked_fill(too_high | too_low, 0)
    # - 1/sum_i |o_i| sum_{i,t} stopgrad(min(w, cap) M) A logp
    return -token_mean(weight * A * logp, mask)
