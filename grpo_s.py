"""GRPO-S: sequence-level GRPO with entropy-shaped rewards. arXiv 2508.04349, equations as numbered in v6.

GTPO's twin (see gtpo.py for O+, O- and normalize): one shaped reward a sequence, from its mean entropy over tokens
H_i = 1/|o_i| sum_t H_{i,t}; n and m are the sizes of O+ and O-.

    r+_i =  beta1 r_i + beta2 H_i / sum_{O+} H_k n                            on O+, 0 on O-        Eq. 8     [B]
    r-_j = -beta1 - beta2 (1/H_j) / sum_{O-} (1/H_k) m                        on O-, 0 on O+        Eq. 9     [B]
    A+- = (r+- - mean R+-) / std R+- over the G sequences,  A+ on O+, A- on O-                      Eq. 10    [B]
    w_i = 1/|o_i| sum_t pi_theta(o_{i,t}) / pi_old(o_{i,t})                                                   [B]
    loss = - 1/B sum_i min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)                              Eq. 11    scalar

Against GSPO: w_i is the ARITHMETIC mean of the token ratios, where GSPO's s_i is their geometric mean.
Until the clip binds it is GRPO, in value and gradient. Our choices: as in gtpo.py; a completion with no token is in
neither set.

Worked example: grpo.py's batch, mean entropies 1 and 0.5. r+ = 1.1, r- = -1.1; w_0 = (1.5 + 0.9) / 2 = 1.2, w_1 = 1.

    >>> import torch
    >>> mask, H = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.5], [0.5, 0.0]])
    >>> A = advantages(torch.tensor([1.0, 0.0]), 2, entropy=H, mask=mask)    # R+ = {1.1, 0}, R- = {0, -1.1}
    >>> A                                                                    # (1.1 - 0.55) / (0.77782 + 1e-4)
    tensor([ 0.7070, -0.7070])
    >>> loss(torch.tensor([[1.5, 0.9], [1.0, 1.0]]).log(), torch.zeros(2, 2), A, mask)
    tensor(-0.0707)
    >>> round(-(1.2 - 1.0) * 0.7070 / 2, 4)
    -0.0707
"""

import torch

from grpo import clip_term, exp_ratio, prepare, row_mean, sequence_mean, split_groups
from gtpo import normalize_sets, share


def advantages(
    rewards, group_size, *, entropy=None, mask=None, beta1=1.0, beta2=0.1, normalize="zeros"
):
    """rewards [B], entropy (nats, of the sampling policy) and mask [B, T] -> [B].

    Raises ValueError if entropy or mask is missing or does not fit, on an unknown normalize, and on a group_size below
    2 or that does not divide B.
    """
    if (
        entropy is None
        or mask is None
        or entropy.shape != mask.shape
        or mask.shape[:-1] != rewards.shape
    ):
        shapes = [None if x is None else list(x.shape) for x in (rewards, entropy, mask)]
        raise ValueError(f"GRPO-S needs rewards [B], entropy [B, T] and mask [B, T]; got {shapes}")
    r = split_groups(
        rewards.to(torch.promote_types(rewards.dtype, entropy.dtype)), group_size
    )  # [P, G]
    on = mask != 0  # [B, T]
    H = entropy.detach().to(r.dtype).masked_fill(~on, 0)
    H = row_mean(H, on).clamp(min=1e-6).view_as(r)  # H_i  [P, G]
    right, on = r > 0.5, on.any(1).view_as(r)
    plus, minus = right & on, ~right & on  # [P, G]
    two_sets = plus.any(1, keepdim=True) & minus.any(1, keepdim=True)  # [P, 1]
    plus, minus = plus & two_sets, minus & two_sets
    # r+ = beta1 r + beta2 H / sum_{O+} H n
    r_plus = plus * (beta1 * r + beta2 * share(H, plus))
    # r- = -beta1 - beta2 (1/H) / sum_{O-} (1/H) m
    r_minus = minus * (-beta1 - beta2 * share(1 / H, minus))
    # A+- = (r+- - mean R+-) / std R+-
    return normalize_sets(r_plus, r_minus, plus, minus, normalize).flatten()  # [B]


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=0.2, eps_high=0.28):
    """logprobs, old_logprobs and mask [B, T], advantages [B] -> scalar to be minimised. Raises ValueError on shapes
    that do not fit, advantages [B, T] among them.
    """
    if advantages.ndim != 1:
        raise ValueError(
            f"GRPO-S takes one advantage a sequence, [B]; got {list(advantages.shape)}"
        )
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = row_mean(exp_ratio(logp - old), mask)[:, None]  # w_i  [B, 1]
    # - 1/B sum_i min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A), constant along the row
    return -sequence_mean(clip_term(ratio, A, eps_low, eps_high), mask)
