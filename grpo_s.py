"""GRPO-S: sequence-level GRPO with entropy-shaped rewards. arXiv 2508.04349, equations of v6.

GTPO's twin (see gtpo.py for O+, O-, right and normalize): one shaped reward per sequence, from its
mean entropy over tokens H_i = 1/|o_i| sum_t H_{i,t}; n and m are the sizes of O+ and O-.

    r+_i =  beta1 r_i + beta2 H_i / sum_{O+} H_k n,      0 on O-                    Eq. 8   [B]
    r-_j = -beta1 - beta2 (1/H_j) / sum_{O-} (1/H_k) m,  0 on O+                    Eq. 9   [B]
    A+- = (r+- - mean R+-) / std R+- over the G sequences, A+ on O+, A- on O-       Eq. 10  [B]
    w_i = 1/|o_i| sum_t pi_theta(o_{i,t}) / pi_old(o_{i,t})                                 [B]
    loss = - 1/B sum_i min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)              Eq. 11  scalar

Against GSPO: w_i is the ARITHMETIC mean of the token ratios, where GSPO's s_i is their geometric
mean. Until the clip binds it is GRPO, in value and gradient. Our choices: as in gtpo.py; a
completion without tokens is in neither set.

Worked example: grpo.py's batch, mean entropies 1 and 0.5. r+ = 1.1 and r- = -1.1, so R+ = {1.1, 0}
and R- = {0, -1.1}, and A = +-(1.1 - 0.55) / (0.77782 + 1e-4); w_0 = (1.5 + 0.9) / 2 = 1.2, w_1 = 1.

    >>> import torch
    >>> mask, H = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.5], [0.5, 0.0]])
    >>> A = advantages(torch.tensor([1.0, 0.0]), 2, entropy=H, mask=mask)
    >>> A
    tensor([ 0.7070, -0.7070])
    >>> loss(torch.tensor([[1.5, 0.9], [1.0, 1.0]]).log(), torch.zeros(2, 2), A, mask)
    tensor(-0.0707)
    >>> round(-(1.2 - 1.0) * 0.7070 / 2, 4)
    -0.0707
"""

import torch

from grpo import clip_term, exp_ratio, prepare, row_mean, sequence_mean, split_groups
from gtpo import check_inputs, normalize_sets, share


def advantages(
    rewards,
    group_size,
    *,
    entropy=None,
    mask=None,
    right=None,
    beta1=1.0,
    beta2=0.1,
    normalize="zeros",
):
    """rewards [B], entropy (nats, of pi_old) and mask [B, T] -> [B].

    right [B]: above 0.5 where a completion succeeded; None: where its reward is above 0.5. Raises
    ValueError on shapes, group_size or normalize that do not fit, and without entropy or mask.
    """
    right = rewards if right is None else right
    check_inputs("GRPO-S", rewards, right, entropy, mask)
    dtype = torch.promote_types(rewards.dtype, entropy.dtype)
    r = split_groups(rewards.to(dtype), group_size)  # [P, G]
    on = mask != 0  # [B, T]
    H = entropy.detach().to(r.dtype).masked_fill(~on, 0)
    H = row_mean(H, on).clamp(min=1e-6).view_as(r)  # H_i  [P, G]
    on = on.any(1).view_as(r)  # [P, G]
    successful = (right > 0.5).view_as(r)
    plus, minus = successful & on, ~successful & on  # [P, G]
    # r+ = beta1 r + beta2 H / sum_{O+} H n
    r_plus = plus * (beta1 * r + beta2 * share(H, plus))
    # r- = -beta1 - beta2 (1/H) / sum_{O-} (1/H) m
    r_minus = minus * (-beta1 - beta2 * share(1 / H, minus))
    # A+- = (r+- - mean R+-) / std R+-
    return normalize_sets(r_plus, r_minus, plus, minus, normalize).flatten()  # [B]


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=0.2, eps_high=0.28):
    """logprobs, old_logprobs and mask [B, T], advantages [B] -> scalar to minimise.

    Raises ValueError on shapes that do not fit, advantages [B, T] among them.
    """
    if advantages.ndim != 1:
        raise ValueError(
            f"GRPO-S takes one advantage a sequence, [B]; got {list(advantages.shape)}"
        )
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = row_mean(exp_ratio(logp - old), mask)[:, None]  # w_i  [B, 1]
    # - 1/B sum_i min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A), constant along the row
    return -sequence_mean(clip_term(ratio, A, eps_low, eps_high), mask)
