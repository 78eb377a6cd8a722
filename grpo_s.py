"""GRPO-S: sequence-level GRPO with entropy-shaped rewards. arXiv 2508.04349, equations of v6.

n and m are the sizes of O+ and O-; H_i = 1/|o_i| sum_t H_{i,t}, the mean entropy over tokens.

    r+_i =  beta1 * r_i + beta2 * n * H_i / sum_{k in O+} H_k                         Eq. 8  [B]
    r-_j = -beta1 - beta2 * m * (1/H_j) / sum_{k in O-} (1/H_k)                       Eq. 9  [B]
    A_i = (r+ - mean R+) / std R+  on O+,  (r- - mean R-) / std R-  on O-            Eq. 10  [B]
    w_i = 1/|o_i| sum_t pi_theta(o_{i,t}) / pi_old(o_{i,t})                                  [B]
    loss = - 1/B sum_i min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)               Eq. 11  scalar

GTPO, but with one shaped reward and one ratio per sequence. See gtpo.py for O+, O-, R+, R- (here
over the G sequences of a group), the options and our choices. Two more choices: the entropy is
clamped per token, before its mean; a completion without tokens is in neither set.

GSPO, but w_i is the ARITHMETIC mean of the token ratios, where GSPO's s_i is their geometric mean.
With equal advantages, and until the clip binds, this loss equals GRPO's in value and gradient.

Source: the paper's own text.

Worked example: grpo.py's batch, mean entropies 1 and 0.5. r+ = 1.1 and r- = -1.1, so R+ = {1.1, 0}
and R- = {0, -1.1}, and A = +-(1.1 - 0.55) / (0.77782 + 1e-4); w_0 = (1.5 + 0.9) / 2 = 1.2, w_1 = 1.

    >>> mask, H = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.5], [0.5, 0.0]])
    >>> A = advantages(torch.tensor([1.0, 0.0]), 2, entropy=H, mask=mask)
    >>> A
    tensor([ 0.7070, -0.7070])
    >>> ratios = torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), torch.zeros(2, 2), A, mask)  # -(1.2 - 1.0) * 0.7070 / 2
    tensor(-0.0707)
"""

import torch

from grpo import clip_term, exp_ratio, prepare, row_mean, sequence_mean, split_groups
from gtpo import check_inputs, normalize_sets, share


def advantages(
    rewards,
    group_size,
    *,
    entropy=None,  # [B, T], nats, of pi_old
    mask=None,  # [B, T]
    right=None,  # [B], above 0.5 where a completion succeeded; None: where its reward is
    beta1=1.0,
    beta2=0.1,
    normalize="zeros",
    entropy_low=0.0,  # nats; 0: no bound
    entropy_high=0.0,
):
    """rewards [B] -> [B]. Raises ValueError if an argument does not fit."""
    right = rewards if right is None else right
    check_inputs("GRPO-S", entropy_low, entropy_high, rewards, right, entropy, mask)
    dtype = torch.promote_types(rewards.dtype, entropy.dtype)
    r = split_groups(rewards.to(dtype), group_size)  # [P, G]
    on = mask != 0  # [B, T]
    # H_i = 1/|o_i| sum_t H_{i,t}
    H = entropy.detach().to(r.dtype).clamp(entropy_low, entropy_high or torch.inf)  # [B, T]
    H = row_mean(H.masked_fill(~on, 0), on).clamp(min=1e-6).view_as(r)  # [P, G]
    not_empty = on.any(1).view_as(r)  # [P, G]
    successful = (right > 0.5).view_as(r)  # [P, G]
    plus, minus = successful & not_empty, ~successful & not_empty  # [P, G]
    # r+ = beta1 * r + beta2 * n * H / sum_{k in O+} H_k
    r_plus = plus * (beta1 * r + beta2 * share(H, plus))
    # r- = -beta1 - beta2 * m * (1/H) / sum_{k in O-} (1/H_k)
    r_minus = minus * (-beta1 - beta2 * share(1 / H, minus))
    # A+ = (r+ - mean R+) / std R+,  A- = (r- - mean R-) / std R-
    return normalize_sets(r_plus, r_minus, plus, minus, normalize).flatten()  # [B]


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=0.2, eps_high=0.28):
    """All [B, T] but advantages [B] -> scalar to minimise, or a ValueError."""
    if advantages.ndim != 1:
        raise ValueError(f"GRPO-S takes one advantage per sequence; got {list(advantages.shape)}")
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = row_mean(exp_ratio(logp - old), mask)[:, None]  # w_i  [B, 1]
    # - 1/B sum_i min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A), constant along the row
    return -sequence_mean(clip_term(ratio, A, eps_low, eps_high), mask)
