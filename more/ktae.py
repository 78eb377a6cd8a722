"""KTAE: Key-Token Advantage Estimation. arXiv 2505.16826.

DAPO, but each token's advantage also says whether its id is a key to right or to wrong answers.

    A_{i,t} = GRPO's A_i + key(o_{i,t})                                                      [B, T]
    key = 2 sigmoid((alpha F + beta_ig IG) D / (alpha + beta_ig)) - 1                        (-1, 1)
    F = exp(-2 p), p of Fisher's exact test of (x, y), two-sided; 0 where p = 1
    IG = h(R/n) - s/n h(x/s) - (n - s)/n h((R - x)/(n - s)),  n = R + W,  s = x + y
    D = asin sqrt(x/R) - asin sqrt(y/W) + tf+ / (tf- + 1e-5) - tf- / (tf+ + 1e-5)
    tf = (k1 + 1) f / (f + K),  K = k1 (1 - b + b N / mean N)

In a group, x of R right completions (r > 0.5) and y of W wrong ones have the id; f is its share of
the N tokens of a side, right (+) or wrong (-); h(q) are a coin's bits. An id that all completions
have gets key 0; one that a single side has gets about 1 or -1, because |D| is in the hundreds.
Source: the authors' code (xiaolizh1/KTAE), whose float32 lets rounding decide ties in p. Our
choices: DAPO's loss; an empty completion is on no side; no keys without both sides.

Worked example: id 5 is everywhere. Id 6: p = 1, IG = 1 - 3/4 h(2/3) = 0.3113 and D = 0.7854 +
0.6 / 0.3333 - 0.3333 / 0.6 = 2.03, so its key is 2 sigmoid(0.3113 * 2.03 / 2) - 1 = 0.1567.

    >>> o = torch.tensor([[5, 6], [5, 6], [5, 6], [5, 7]])
    >>> A = advantages(torch.tensor([1.0, 1, 0, 0]), 4, completions=o, mask=torch.ones(4, 2))
    >>> A[2]  # GRPO's advantage is -0.8659
    tensor([-0.8659, -0.7092])
"""

from math import comb, exp, log

import torch

import dapo
import grpo


def h(q):  # entropy of a coin, in bits
    return (torch.special.entr(q) + torch.special.entr(1 - q)) / log(2)


def fisher(x, y, R, W):  # two-sided p-value, by counting
    P = [comb(R, k) * comb(W, x + y - k) / comb(R + W, x + y) for k in range(min(R, x + y) + 1)]
    return sum(P_k for P_k in P if P_k <= P[x] * (1 + 1e-7))


def group_keys(plus, minus, alpha, beta_ig, k1, b):
    """How often each id is in each right and wrong completion, [R, V] and [W, V] -> its key [V]"""
    R, W = torch.tensor([len(plus), len(minus)]).double()
    x, y = (plus > 0).double().sum(0), (minus > 0).double().sum(0)  # [V]
    s, n = x + y, R + W
    p = [fisher(*xy, len(plus), len(minus)) for xy in torch.stack([x, y], 1).long().tolist()]
    F = plus.new_tensor([exp(-2 * p_v) if p_v < 1 - 1e-6 else 0.0 for p_v in p])
    IG = h(R / n) - s / n * h(x / s.clamp(min=1)) - (n - s) / n * h((R - x) / (n - s).clamp(min=1))
    N = torch.stack([plus.sum(), minus.sum()])[:, None]
    f = torch.stack([plus.sum(0), minus.sum(0)]) / N  # [2, V]
    tf_r, tf_w = (k1 + 1) * f / (f + k1 * (1 - b + b * N / N.mean()))
    D = (x / R).sqrt().asin() - (y / W).sqrt().asin() + tf_r / (tf_w + 1e-5) - tf_w / (tf_r + 1e-5)
    return 2 * ((alpha * F + beta_ig * IG) * D / (alpha + beta_ig)).sigmoid() - 1


def advantages(
    rewards,
    group_size,
    *,
    mask=None,  # [B, T]
    completions=None,  # [B, T], token ids
    alpha=1.0,
    beta_ig=1.0,
    k1=2.0,
    b=0.5,
    ignore_id=-1,  # has key 0; the authors' code: 151643
):
    """rewards [B] -> [B, T], 0 where mask is 0. Raises ValueError if an argument does not fit."""
    A = grpo.advantages(rewards, group_size)  # [B]
    shapes = [None if x is None else list(x.shape) for x in (rewards, completions, mask)]
    if not shapes[1] or shapes[1] != shapes[2] or shapes[1][:-1] != shapes[0]:
        raise ValueError(f"KTAE needs rewards [B], completions and mask [B, T]; got {shapes}")
    if alpha + beta_ig <= 0 or k1 <= 0 or b > 1:
        raise ValueError("KTAE needs alpha + beta_ig above 0, k1 above 0 and b of at most 1")
    o, on, right = completions.cpu(), (mask != 0).cpu(), (rewards > 0.5).cpu()
    key = torch.zeros(o.shape).double()
    for rows in torch.arange(len(o)).split(group_size):
        ids, index = o[rows].unique(return_inverse=True)  # [V], [G, T]
        count = torch.zeros(group_size, len(ids)).double().scatter_add_(1, index, on[rows].double())
        plus, minus = (count[count.any(1) & (right[rows] == side)] for side in (True, False))
        if len(plus) and len(minus):
            keys = group_keys(plus, minus, alpha, beta_ig, k1, b).masked_fill(ids == ignore_id, 0)
            key[rows] = keys[index]
    return (A[:, None] + key.to(A)).masked_fill(mask == 0, 0)


loss = dapo.loss
