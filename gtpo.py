"""GTPO: Group Token Policy Optimization. arXiv 2508.04349, equations as numbered in v6.

O+ are the successful completions of a group, O- the others; d_t and h_t are how many of O+ and of
O- are still running at position t. H is the entropy of pi_old, in nats, without gradient.

    r+_{i,t} =  alpha1 * r_i + alpha2 * d_t * H_{i,t} / sum_{k in O+} H_{k,t}         Eq. 3  [B, T]
    r-_{j,t} = -alpha1 - alpha2 * h_t * (1/H_{j,t}) / sum_{k in O-} (1/H_{k,t})       Eq. 5  [B, T]
    A_{i,t} = (r+ - mean R+) / std R+  on O+,  (r- - mean R-) / std R-  on O-         Eq. 6  [B, T]
    loss = - 1/sum_i |o_i| sum_{i,t} min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)  Eq. 7  scalar

DAPO, but with one advantage per token: uncertain tokens of right answers gain most, confident
tokens of wrong answers lose most. (v4 has no -alpha1 in Eq. 5; 2508.03772 is an unrelated GTPO.)

R+ are the shaped rewards r+ of a group, one per token, R- the r-. Which tokens, `normalize` says:
- "zeros": of the whole group, with r+ = 0 on O- and r- = 0 on O+ (v4; v6 can be read both ways);
- "within": R+ of O+ only, R- of O- only. Each set's mean advantage is 0: the outcome is lost;
- "joint": both are one collection, r+ on O+ and r- on O- [ours].
Known property of "zeros": if one set holds more than about 1 / (1 + alpha2) of a group's tokens,
its tokens of least weight change sign (the metric sign_flip). With 15 of 16 right, about 40% of the
right tokens get A < 0; with 15 of 16 wrong, more than half of the wrong ones A > 0.

Source: the paper's own text. Our choices:
- eps 0.2 / 0.28, DAPO's: Eq. 7 gives no value. The one sentence with these numbers clips the
  entropy at them: entropy_low=0.2, entropy_high=0.28 (0, the default: no bound);
- success is correctness, `right`: a reward shaped further enters as r_i only, also by the length
  punishment (Appendix D), `train.py --group-overlong 0.75`;
- a group without O+ or O- gets 0; sums run over the group; std as in grpo.py;
- the geometric variant (Appendix C) is not built.

Worked example: right completions of 2 tokens and 1, a wrong one of 1. At t = 0, H = 3 and 1 in O+
are 1.5 and 0.5 times their mean: r+ = (1.15, 1.1), (1.05); r- = (-1.1). R+ = {1.15, 1.1, 1.05, 0}
has mean 0.825, std 0.5515; R- = {0, 0, 0, -1.1}: -0.275, 0.55. (1.15 - 0.825) / 0.5516 = 0.5892.

    >>> rewards, mask = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([[1, 1], [1, 0], [1, 0]])
    >>> H = torch.tensor([[3.0, 2.0], [1.0, 0.0], [0.5, 0.0]])
    >>> advantages(rewards, 3, entropy=H, mask=mask)
    tensor([[ 0.5892,  0.4985],
            [ 0.4079,  0.0000],
            [-1.4997,  0.0000]])
"""

import torch

import dapo
from grpo import split_groups


def advantages(
    rewards,
    group_size,
    *,
    entropy=None,  # [B, T], nats, of pi_old
    mask=None,  # [B, T]
    right=None,  # [B], above 0.5 where a completion succeeded; None: where its reward is
    alpha1=1.0,
    alpha2=0.1,
    normalize="zeros",
    entropy_low=0.0,  # nats; 0: no bound
    entropy_high=0.0,
):
    """rewards [B] -> [B, T], 0 where mask is 0. Raises ValueError if an argument does not fit."""
    right = rewards if right is None else right
    check_inputs("GTPO", entropy_low, entropy_high, rewards, right, entropy, mask)
    dtype = torch.promote_types(rewards.dtype, entropy.dtype)
    r = split_groups(rewards.to(dtype), group_size)[..., None]  # [P, G, 1]
    on = (mask != 0).view(*r.shape[:2], -1)  # [P, G, T]
    H = entropy.detach().to(r.dtype).view_as(on).clamp(entropy_low, entropy_high or torch.inf)
    # 1 off the mask, where `share` multiplies by 0: there 1/H must not be infinite or NaN
    H = H.masked_fill(~on, 1).clamp(min=1e-6)  # [P, G, T]
    successful = (right > 0.5).view_as(r)  # [P, G, 1]
    plus, minus = successful & on, ~successful & on  # [P, G, T]
    # r+ = alpha1 * r + alpha2 * d_t * H / sum_{k in O+} H_k
    r_plus = plus * (alpha1 * r + alpha2 * share(H, plus))
    # r- = -alpha1 - alpha2 * h_t * (1/H) / sum_{k in O-} (1/H_k)
    r_minus = minus * (-alpha1 - alpha2 * share(1 / H, minus))
    # A+ = (r+ - mean R+) / std R+,  A- = (r- - mean R-) / std R-
    flat = [x.flatten(1) for x in (r_plus, r_minus, plus, minus)]  # [P, G * T]
    return normalize_sets(*flat, normalize).view(mask.shape)


loss = dapo.loss  # Eq. 7


def check_inputs(name, low, high, *inputs):
    """Raises ValueError unless inputs are rewards, right [B] and entropy, mask [B, T]."""
    if 0 < high < low:
        raise ValueError(f"{name} needs entropy_low <= entropy_high; got {low} and {high}")
    rewards, right, entropy, mask = shapes = [x if x is None else list(x.shape) for x in inputs]
    if mask is None or entropy != mask or not rewards == right == mask[:-1]:
        raise ValueError(f"{name} needs rewards, right [B] and entropy, mask [B, T]; got {shapes}")


def share(x, members):
    """x relative to its mean over the group's members (at that position); else 0. [P, G, ...]"""
    x = x * members
    total, count = x.sum(1, keepdim=True), members.sum(1, keepdim=True)
    return x / total.masked_fill(count == 0, 1) * count


def normalize_sets(r_plus, r_minus, plus, minus, normalize):
    """Eq. 6: A+ on O+, A- on O-, 0 elsewhere and in groups that lack one of the two. All [P, N]."""
    if normalize not in ("zeros", "within", "joint"):
        raise ValueError(f"normalize must be 'zeros', 'within' or 'joint'; got {normalize!r}")
    both = plus.any(1, keepdim=True) & minus.any(1, keepdim=True)  # [P, 1]
    plus, minus = plus & both, minus & both
    if normalize == "joint":
        r_plus = r_minus = r_plus + r_minus
    pools = (plus, minus) if normalize == "within" else (plus | minus, plus | minus)
    a_plus, a_minus = standardise(r_plus, pools[0]), standardise(r_minus, pools[1])
    return a_plus.masked_fill(~plus, 0) + a_minus.masked_fill(~minus, 0)


def standardise(x, on):
    """(x - mean) / (std + 1e-4) per row, of the entries that are on; 0 if they are equal. [P, N]"""
    n = on.sum(1, keepdim=True)
    mean = (x * on).sum(1, keepdim=True) / n.clamp(min=1)
    std = (((x - mean) * on).square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    low = x.masked_fill(~on, torch.inf).amin(1, keepdim=True)
    high = x.masked_fill(~on, -torch.inf).amax(1, keepdim=True)
    return ((x - mean) / (std + 1e-4)).masked_fill(high <= low, 0)
