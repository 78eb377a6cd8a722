"""GTPO: Group Token Policy Optimization. arXiv 2508.04349; equations as numbered in v6 (v4 has no base term in Eq. 5).

O+ are a group's successful completions (r > 0.5), O- the others; d_t and h_t say how many of O+ and of O- are still
running at position t; H is the entropy of pi_old, in nats, without gradient. One that has ended is in no sum.

    r+_{i,t} =  alpha1 r_i + alpha2 H_{i,t} / sum_{O+} H_{k,t} d_t            on O+, 0 on O-        Eq. 3     [B, T]
    r-_{j,t} = -alpha1 - alpha2 (1/H_{j,t}) / sum_{O-} (1/H_{k,t}) h_t        on O-, 0 on O+        Eq. 5     [B, T]
    A+- = (r+- - mean R+-) / std R+-,    A+ on O+ and A- on O-                                      Eq. 6     [B, T]
    loss = - 1/sum_i |o_i| sum_i sum_t min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)              Eq. 7     scalar

Against DAPO: an advantage a token. Uncertain tokens of right answers are paid most, confident tokens of wrong answers
punished most. At each t the sets share out (alpha1 + alpha2) d_t and -(alpha1 + alpha2) h_t for rewards of 1 and 0.

R+- are all shaped rewards of the group, one a token. Our choices: R includes the zeros of the other set (`normalize=
"zeros"`: v4 sums over all G sequences, v6 can be read both ways); "within" takes each set alone, which makes each set's
mean advantage 0, so that the outcome no longer counts; "joint" standardises r+ on O+ and r- on O- as one collection. A
group all right or all wrong has no second set and gets 0. Sums run over the group, as the equations read.
Known property of "zeros": where one set holds more than about 1 / (1 + alpha2) of a group's tokens, its least-weighted
tokens change sign (G = 16 with 15 right: about 40% of the right tokens get A < 0, by how the entropies spread; with 15
wrong more still, 1/H having the longer tail). train.py logs that share, sign_flip.
Not to be confused with 2508.03772, another GTPO.

Worked example: two right completions of 2 and 1 tokens, one wrong of 1. At t = 0, d = 2 and 3 : 1 nats share the bonus:
r+ = (1.15, 1.1), (1.05); r- = (-1.1). So R+ = {1.15, 1.1, 1.05, 0} and R- = {0, 0, 0, -1.1}.

    >>> import torch
    >>> mask, H = torch.tensor([[1, 1], [1, 0], [1, 0]]), torch.tensor([[3.0, 2.0], [1.0, 0.0], [0.5, 0.0]])
    >>> advantages(torch.tensor([1.0, 1.0, 0.0]), 3, entropy=H, mask=mask)
    tensor([[ 0.5892,  0.4985],
            [ 0.4079,  0.0000],
            [-1.4997,  0.0000]])
    >>> round((1.15 - 3.3 / 4) / (0.55151 + 1e-4), 4), round((-1.1 + 1.1 / 4) / (0.55 + 1e-4), 4)  # mean, std of R+, R-
    (0.5892, -1.4997)
"""

import torch

from grpo import clip_term, exp_ratio, prepare, split_groups, token_mean


def standardise(x, on):
    """(x - mean) / (std + 1e-4) of the entries that are on, per row; 0 where they are all equal. x, on [P, N]."""
    n = on.sum(1, keepdim=True)
    mean = (x * on).sum(1, keepdim=True) / n.clamp(min=1)
    std = (((x - mean) * on).square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    equal = x.masked_fill(~on, -torch.inf).amax(1, keepdim=True) <= x.masked_fill(
        ~on, torch.inf
    ).amin(1, keepdim=True)
    return ((x - mean) / (std + 1e-4)).masked_fill(equal, 0)


def normalize_sets(r_plus, r_minus, plus, minus, normalize):
    """Eq. 6 and its GRPO-S twin: A+ on O+, A- on O-, 0 elsewhere. Shaped rewards and bool sets, all [P, N]."""
    if normalize not in ("zeros", "within", "joint"):
        raise ValueError(f"normalize must be 'zeros', 'within' or 'joint'; got {normalize!r}")
    if normalize == "joint":
        r_plus = r_minus = r_plus + r_minus
    pool_plus, pool_minus = (plus, minus) if normalize == "within" else (plus | minus, plus | minus)
    a_plus, a_minus = standardise(r_plus, pool_plus), standardise(r_minus, pool_minus)
    return a_plus.masked_fill(~plus, 0) + a_minus.masked_fill(~minus, 0)


def share(x, members):
    """x / sum over the group's members of x, times their number, for members; else 0. x, members [P, G, ...]."""
    x = x * members
    total, count = x.sum(1, keepdim=True), members.sum(1, keepdim=True)
    return x / total.masked_fill(count == 0, 1) * count


def advantages(
    rewards, group_size, *, entropy=None, mask=None, alpha1=1.0, alpha2=0.1, normalize="zeros"
):
    """rewards [B], entropy (nats, of the sampling policy) and mask [B, T] -> [B, T], 0 where mask is off.

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
        raise ValueError(f"GTPO needs rewards [B], entropy [B, T] and mask [B, T]; got {shapes}")
    r = split_groups(rewards.to(torch.promote_types(rewards.dtype, entropy.dtype)), group_size)[
        ..., None
    ]  # [P, G, 1]
    on = (mask != 0).view(*r.shape[:2], -1)  # [P, G, T]
    H = entropy.detach().to(r.dtype).view_as(on).masked_fill(~on, 1).clamp(min=1e-6)  # [P, G, T]
    right = r > 0.5
    plus, minus = right & on, ~right & on  # [P, G, T]
    two_sets = plus.any((1, 2), keepdim=True) & minus.any((1, 2), keepdim=True)  # [P, 1, 1]
    plus, minus = plus & two_sets, minus & two_sets  # [P, G, T]
    # r+ = alpha1 r + alpha2 H / sum_{O+} H d_t
    r_plus = plus * (alpha1 * r + alpha2 * share(H, plus))
    # r- = -alpha1 - alpha2 (1/H) / sum_{O-} (1/H) h_t
    r_minus = minus * (-alpha1 - alpha2 * share(1 / H, minus))
    # A+- = (r+- - mean R+-) / std R+-
    a = normalize_sets(
        *(x.flatten(1) for x in (r_plus, r_minus, plus, minus)), normalize
    )  # [P, G * T]
    return a.view(mask.shape)


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=0.2, eps_high=0.28):
    """All [B, T], advantages [B] or [B, T] -> scalar to be minimised. Raises ValueError on shapes that do not fit."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    # - 1/sum_i |o_i| sum_i sum_t min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)
    return -token_mean(clip_term(ratio, A, eps_low, eps_high), mask)
