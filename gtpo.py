"""GTPO: Group Token Policy Optimization. arXiv 2508.04349, equations as numbered in v6.

O+ are the successful completions of a group, O- the others; d_t and h_t are how many of O+ and of
O- are still running at position t. H is the entropy of pi_old, in nats, without gradient.

    r+_{i,t} =  alpha1 r_i + alpha2 H_{i,t} / sum_{O+} H_{k,t} d_t,      0 on O-     Eq. 3  [B, T]
    r-_{j,t} = -alpha1 - alpha2 (1/H_{j,t}) / sum_{O-} (1/H_{k,t}) h_t,  0 on O+     Eq. 5  [B, T]
    A+- = (r+- - mean R+-) / std R+-,  A+ on O+ and A- on O-                         Eq. 6  [B, T]
    loss = - 1/sum |o_i| sum_{i,t} min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)   Eq. 7  scalar

DAPO with an advantage per token: uncertain tokens of right answers gain most, confident tokens of
wrong answers lose most. (v4 has no -alpha1 in Eq. 5. Another GTPO, 2508.03772, is unrelated.)

Our choices. Success is correctness, `right`: a reward that is also shaped, by length for example,
enters as r_i in alpha1 r_i only. A group that is all right or all wrong has no second set and
gets 0. Sums run over the group. R+- are all shaped rewards of the group, one per token;
`normalize` says which: "zeros" includes the zeros of the other set (v4 sums over all G sequences,
v6 can be read both ways); "within" takes each set alone, so each set's mean advantage is 0 and the
outcome no longer counts; "joint" standardises r+ on O+ and r- on O- as one collection.

Known property of "zeros": where one set holds more than about 1 / (1 + alpha2) of a group's tokens,
its least-weighted tokens change sign. With 15 of 16 right, about 40% of the right tokens get A < 0;
with 15 wrong, more than half get A > 0. The metric sign_flip is that share.

Worked example: two right completions of 2 and 1 tokens, one wrong of 1. At t = 0, d = 2, and 3 : 1
nats share the bonus: r+ = (1.15, 1.1), (1.05); r- = (-1.1). R+ = {1.15, 1.1, 1.05, 0} has mean
0.825 and std 0.5515, R- = {0, 0, 0, -1.1} has -0.275 and 0.55: (1.15 - 0.825) / 0.5516 = 0.5892.

    >>> import torch
    >>> r, H = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([[3.0, 2.0], [1.0, 0.0], [0.5, 0.0]])
    >>> mask = torch.tensor([[1, 1], [1, 0], [1, 0]])
    >>> advantages(r, 3, entropy=H, mask=mask)
    tensor([[ 0.5892,  0.4985],
            [ 0.4079,  0.0000],
            [-1.4997,  0.0000]])
"""

import torch

from grpo import clip_term, exp_ratio, prepare, split_groups, token_mean


def standardise(x, on):
    """(x - mean) / (std + 1e-4) per row, of the entries that are on; equal ones get 0. [P, N]"""
    n = on.sum(1, keepdim=True)
    mean = (x * on).sum(1, keepdim=True) / n.clamp(min=1)
    std = (((x - mean) * on).square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    low = x.masked_fill(~on, torch.inf).amin(1, keepdim=True)
    high = x.masked_fill(~on, -torch.inf).amax(1, keepdim=True)
    return ((x - mean) / (std + 1e-4)).masked_fill(high <= low, 0)


def normalize_sets(r_plus, r_minus, plus, minus, normalize):
    """Eq. 6: A+ on O+, A- on O-, 0 elsewhere and in groups that lack one of the two. All [P, N]."""
    if normalize not in ("zeros", "within", "joint"):
        raise ValueError(f"normalize must be 'zeros', 'within' or 'joint'; got {normalize!r}")
    both = plus.any(1, keepdim=True) & minus.any(1, keepdim=True)  # [P, 1]
    plus, minus = plus & both, minus & both
    if normalize == "joint":
        r_plus = r_minus = r_plus + r_minus
    within = normalize == "within"
    a_plus = standardise(r_plus, plus if within else plus | minus)
    a_minus = standardise(r_minus, minus if within else plus | minus)
    return a_plus.masked_fill(~plus, 0) + a_minus.masked_fill(~minus, 0)


def share(x, members):
    """x / sum of x over the group's members, times their number; 0 elsewhere. [P, G, ...]"""
    x = x * members
    total, count = x.sum(1, keepdim=True), members.sum(1, keepdim=True)
    return x / total.masked_fill(count == 0, 1) * count


def check_inputs(name, rewards, right, entropy, mask):
    """Raises ValueError unless rewards and right are [B], entropy and mask [B, T]."""
    shapes = [None if x is None else list(x.shape) for x in (rewards, right, entropy, mask)]
    of_rewards, of_right, of_entropy, of_mask = shapes
    if of_mask is None or not of_entropy == of_mask or not of_rewards == of_right == of_mask[:-1]:
        raise ValueError(f"{name} needs rewards, right [B] and entropy, mask [B, T]; got {shapes}")


def advantages(
    rewards,
    group_size,
    *,
    entropy=None,
    mask=None,
    right=None,
    alpha1=1.0,
    alpha2=0.1,
    normalize="zeros",
):
    """rewards [B], entropy (nats, of pi_old) and mask [B, T] -> [B, T], 0 where mask is off.

    right [B]: above 0.5 where a completion succeeded; None: where its reward is above 0.5. Raises
    ValueError on shapes, group_size or normalize that do not fit, and without entropy or mask.
    """
    right = rewards if right is None else right
    check_inputs("GTPO", rewards, right, entropy, mask)
    dtype = torch.promote_types(rewards.dtype, entropy.dtype)
    r = split_groups(rewards.to(dtype), group_size)[..., None]  # [P, G, 1]
    on = (mask != 0).view(*r.shape[:2], -1)  # [P, G, T]
    H = entropy.detach().to(r.dtype).view_as(on).masked_fill(~on, 1).clamp(min=1e-6)  # [P, G, T]
    successful = (right > 0.5).view_as(r)  # [P, G, 1]
    plus, minus = successful & on, ~successful & on  # [P, G, T]
    # r+ = alpha1 r + alpha2 H / sum_{O+} H d_t
    r_plus = plus * (alpha1 * r + alpha2 * share(H, plus))
    # r- = -alpha1 - alpha2 (1/H) / sum_{O-} (1/H) h_t
    r_minus = minus * (-alpha1 - alpha2 * share(1 / H, minus))
    # A+- = (r+- - mean R+-) / std R+-  [P, G * T]
    a = normalize_sets(*(x.flatten(1) for x in (r_plus, r_minus, plus, minus)), normalize)
    return a.view(mask.shape)


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=0.2, eps_high=0.28):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise. Raises ValueError on shapes."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    # - 1/sum |o_i| sum_{i,t} min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)
    return -token_mean(clip_term(ratio, A, eps_low, eps_high), mask)
