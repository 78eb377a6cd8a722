"""The fifteen methods of more/ again, as slow loops over tokens in plain floats.

Written from the formulas, not from our files, so that the same mistake is not made twice.
- Losses take nested lists and return (value, gradient with respect to logprobs as nested lists).
  Each gradient is derived by hand: a stopgrad is a factor that is not differentiated.
- The clip is written as its cases. Ratios are not clamped: the batches stay within exp(+-20).
- Advantages: lists of floats.
"""

import math
from fractions import Fraction
from itertools import combinations
from statistics import fmean

import torch
from reference import at, groups, grpo_advantages, tokens


def clip_term(ratio, a, eps_low, eps_high):
    """(min(ratio A, clamp(ratio) A), its derivative by the log of the ratio), by cases."""
    if a > 0 and ratio > 1 + eps_high:
        return (1 + eps_high) * a, 0.0
    if a < 0 and ratio < 1 - eps_low:
        return (1 - eps_low) * a, 0.0
    return ratio * a, ratio * a


def every_token(mask):
    return [(i, t) for i, row in enumerate(mask) for t in tokens(row)]


def summed(term, weight, mask):
    """sum of weight(i) term(i, t) over all tokens: (value, gradient); term gives both too."""
    value, grad = 0.0, [[0.0] * len(row) for row in mask]
    for i, t in every_token(mask):
        v, g = term(i, t)
        value += weight(i) * v
        grad[i][t] = weight(i) * g
    return value, grad


def by_token(term, mask):
    count = len(every_token(mask))
    return summed(term, lambda i: 1 / count, mask)


def by_sequence(term, mask):
    return summed(term, lambda i: 1 / len(tokens(mask[i])) / len(mask), mask)


def covariance(logp, A, mask):
    on = every_token(mask)
    mean_a = fmean(at(A, i, t) for i, t in on)
    mean_logp = fmean(logp[i][t] for i, t in on)
    return {(i, t): (at(A, i, t) - mean_a) * (logp[i][t] - mean_logp) for i, t in on}


# ---- losses averaged over tokens -----------------------------------------------------------------


def clip_cov_chosen(logp, old, A, mask, eps_low, eps_high, cov_ratio, cov_low, cov_high):
    """The chosen tokens, and how many there were to choose from."""
    candidates = []
    for (i, t), cov in covariance(logp, A, mask).items():  # row-major
        a, w = at(A, i, t), math.exp(logp[i][t] - old[i][t])
        silent = (a > 0 and w > 1 + eps_high) or (a < 0 and w < 1 - eps_low)
        if cov_low < cov < cov_high and not silent:
            candidates.append((i, t))
    k = max(1, int(cov_ratio * len(every_token(mask))))
    order = torch.randperm(len(candidates)).tolist() if candidates else []
    return [candidates[j] for j in order[:k]], len(candidates)


def clip_cov_loss(
    logp,
    old,
    A,
    mask,
    *,
    eps_low=1.0,
    eps_high=1.0,
    cov_ratio=2e-4,
    cov_low=1.0,
    cov_high=5.0,
):
    options = (eps_low, eps_high, cov_ratio, cov_low, cov_high)
    chosen, _ = clip_cov_chosen(logp, old, A, mask, *options)

    def term(i, t):
        if (i, t) in chosen:
            return 0.0, 0.0
        v, g = clip_term(math.exp(logp[i][t] - old[i][t]), at(A, i, t), eps_low, eps_high)
        return -v, -g

    return by_token(term, mask)


def kl_cov_loss(logp, old, A, mask, *, cov_ratio=2e-3, cov_coef=1.0):
    cov = covariance(logp, A, mask)
    k = max(1, int(cov_ratio * len(cov)))
    largest = sorted(cov, key=cov.get, reverse=True)[:k]

    def term(i, t):
        lr = logp[i][t] - old[i][t]
        push = -math.exp(lr) * at(A, i, t)
        coef = cov_coef if (i, t) in largest else 0.0
        sign = (lr > 0) - (lr < 0)
        return push + coef * abs(lr), push + coef * sign

    return by_token(term, mask)


def ce_gppo_loss(logp, old, A, mask, *, eps_low=0.2, eps_high=0.2, beta1=0.5, beta2=1.0):
    def term(i, t):
        w, a = math.exp(logp[i][t] - old[i][t]), at(A, i, t)
        if a < 0 and w < 1 - eps_low:
            w = beta1 * (1 - eps_low)
        if a > 0 and w > 1 + eps_high:
            w = beta2 * (1 + eps_high)
        return -w * a, -w * a

    return by_token(term, mask)


def aspo_loss(logp, old, A, mask, *, eps_low=0.2, eps_high=0.2, cap=3.0):
    def term(i, t):
        w, a = math.exp(logp[i][t] - old[i][t]), at(A, i, t)
        if a > 0:
            c, is_open = min(1 / min(w, 1 + eps_high), cap), w <= 1 + eps_high
        else:
            c, is_open = min(max(w, 1 - eps_low), cap), w >= 1 - eps_low
        return -a * c, -a * c if is_open else 0.0

    return by_token(term, mask)


def dppo_loss(logp, old, A, mask, *, delta_low=0.15, delta_high=0.15, cap=20.0, divergence="tv"):
    def term(i, t):
        a, new, past = at(A, i, t), logp[i][t], old[i][t]
        p, q = math.exp(new), math.exp(past)
        if divergence == "tv":
            far = abs(p - q)
        else:
            far = q * (past - new) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
        if a > 0 and p > q and far > delta_high:
            return 0.0, 0.0
        if a <= 0 and p < q and far > delta_low:
            return 0.0, 0.0
        w = min(p / q, cap)
        return -a * w * new, -a * w

    return by_token(term, mask)


def reweight_loss(logp, old, A, mask, *, eps_low=0.2, eps_high=0.24, alpha=0.2):
    def term(i, t):
        a = (alpha * math.exp(old[i][t]) + 1 - alpha) * at(A, i, t)
        v, g = clip_term(math.exp(logp[i][t] - old[i][t]), a, eps_low, eps_high)
        return -v, -g

    return by_token(term, mask)


def raft_loss(logp, old, A, mask, *, eps_low=0.2, eps_high=0.2, dual_clip=3.0, variant="raft++"):
    def term(i, t):
        a = at(A, i, t)
        if variant == "raft":
            return -a * logp[i][t], -a
        w = math.exp(logp[i][t] - old[i][t])
        if a < 0 and w > dual_clip:
            return -a * dual_clip, 0.0
        v, g = clip_term(w, a, eps_low, eps_high)
        return -v, -g

    return by_token(term, mask)


def ktae_loss(logp, old, A, mask, *, eps_low=0.2, eps_high=0.28):
    def term(i, t):
        v, g = clip_term(math.exp(logp[i][t] - old[i][t]), at(A, i, t), eps_low, eps_high)
        return -v, -g

    return by_token(term, mask)


def dhpo_loss(
    logp,
    old,
    A,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.28,
    seq_eps_low=3e-4,
    seq_eps_high=4e-4,
    weight=0.5,
):
    def term(i, t):
        a, on = at(A, i, t), tokens(mask[i])
        v, g = clip_term(math.exp(logp[i][t] - old[i][t]), a, eps_low, eps_high)
        s = math.exp(fmean(logp[i][u] - old[i][u] for u in on))
        # |o_i| terms with a gradient of s a / |o_i| each, or one carrier per token: s a both ways
        v_s, g_s = clip_term(s, a, seq_eps_low, seq_eps_high)
        return -weight * v - (1 - weight) * v_s, -weight * g - (1 - weight) * g_s

    return by_token(term, mask)


def cispo_loss(logp, old, A, mask, *, eps_low=1.0, eps_high=4.0):
    def term(i, t):
        a, w = at(A, i, t), math.exp(logp[i][t] - old[i][t])
        w = min(max(w, 1 - eps_low), 1 + eps_high)
        return -w * a * logp[i][t], -w * a

    return by_token(term, mask)


# ---- losses averaged over sequences --------------------------------------------------------------


def ha_dw_loss(logp, old, A, mask, *, eps_low=0.2, eps_high=0.2, beta=0.0, ref_logprobs=None):
    def term(i, t):
        v, g = clip_term(math.exp(logp[i][t] - old[i][t]), at(A, i, t), eps_low, eps_high)
        if not beta:
            return -v, -g
        k = ref_logprobs[i][t] - logp[i][t]
        return -v + beta * (math.exp(k) - k - 1), -g + beta * (1 - math.exp(k))

    return by_sequence(term, mask)


def dr_grpo_loss(logp, old, A, mask, *, eps_low=0.2, eps_high=0.2, max_length=0):
    def term(i, t):
        v, g = clip_term(math.exp(logp[i][t] - old[i][t]), at(A, i, t), eps_low, eps_high)
        return -v, -g

    length = max_length if max_length else len(mask[0])
    return summed(term, lambda i: 1 / length / len(mask), mask)


def sapo_loss(logp, old, A, mask, *, tau_pos=1.0, tau_neg=1.05):
    def term(i, t):
        a, w = at(A, i, t), math.exp(logp[i][t] - old[i][t])
        tau = tau_pos if a > 0 else tau_neg
        s = 1 / (1 + math.exp(-tau * (w - 1)))
        return -4 / tau * s * a, -4 * s * (1 - s) * w * a

    return by_sequence(term, mask)


def rloo_loss(logp, old, A, mask, *, eps_low=0.2, eps_high=0.2):
    value, grad = 0.0, [[0.0] * len(row) for row in mask]
    for i, row in enumerate(mask):
        if any(row):
            w = math.exp(sum(logp[i][t] - old[i][t] for t in tokens(row)))
            v, g = clip_term(w, A[i], eps_low, eps_high)
            value -= v / len(mask)
            for t in tokens(row):
                grad[i][t] = -g / len(mask)
    return value, grad


def gmpo_loss(logp, old, A, mask, *, eps_low=0.4, eps_high=0.4):
    value, grad = 0.0, [[0.0] * len(row) for row in mask]
    for i, row in enumerate(mask):
        total, is_open = 0.0, []
        for t in tokens(row):
            lr = logp[i][t] - old[i][t]
            if A[i] > 0 and lr > eps_high:
                total += eps_high
            elif A[i] < 0 and lr < -eps_low:
                total -= eps_low
            else:
                total += lr
                is_open.append(t)
        if any(row):
            v = A[i] * math.exp(total / len(tokens(row))) / len(mask)
            value -= v
            for t in is_open:
                grad[i][t] = -v / len(tokens(row))
    return value, grad


# ---- advantages ----------------------------------------------------------------------------------


def raft_advantages(rewards, group_size, *, variant="raft++", signed=True):
    if variant != "reinforce_rej":
        return [max(r, 0.0) for r in rewards]
    out = []
    for group in groups(len(rewards), group_size):
        r = [rewards[i] for i in group]
        mixed = max(r) > min(r)
        out += [(2 * x - 1 if signed else x) if mixed else 0.0 for x in r]
    return out


def ha_dw_advantages(rewards, group_size, *, history=None, scale=1.5, window=10):
    past = list(history or []) + [fmean(rewards)]
    anchor = fmean(past[max(0, len(past) - window) :])
    out = grpo_advantages(rewards, group_size)
    for group in groups(len(rewards), group_size):
        d = fmean(rewards[i] for i in group) - anchor
        for i in group:
            harder = (out[i] > 0) == (d < 0)  # a right answer below the anchor, or a wrong above
            out[i] *= scale * math.exp(abs(d) if harder else -abs(d))
    return out


def dr_grpo_advantages(rewards, group_size):
    out = []
    for group in groups(len(rewards), group_size):
        r = [rewards[i] for i in group]
        out += [x - fmean(r) if max(r) > min(r) else 0.0 for x in r]
    return out


def rloo_advantages(rewards, group_size):
    out = []
    for group in groups(len(rewards), group_size):
        for i in group:
            others = [rewards[k] for k in group if k != i]
            same = all(x == rewards[i] for x in others)
            out.append(0.0 if same else rewards[i] - fmean(others))
    return out


def bits(labels):
    """Shannon entropy of a list of labels, in bits."""
    shares = [labels.count(label) / len(labels) for label in set(labels)]
    return -sum(p * math.log2(p) for p in shares)


def fisher_p(labels, has):
    """Fisher's exact two-sided p-value by counting every way to deal out `has`, in fractions."""
    ways = {}
    for which in combinations(range(len(labels)), sum(has)):
        k = sum(labels[i] for i in which)
        ways[k] = ways.get(k, 0) + 1
    seen = ways[sum(label for label, h in zip(labels, has, strict=True) if h)]
    return Fraction(sum(n for n in ways.values() if n <= seen), sum(ways.values()))


def ktae_key(v, rows, labels, alpha, beta_ig, k1, b):
    """The key value of id v. rows: the ids of each completion; labels: 1 where it is right."""
    has = [v in row for row in rows]
    p = fisher_p(labels, has)
    F = 0.0 if p == 1 else math.exp(-2 * p)
    gain = bits(labels)
    for side in (True, False):
        part = [label for label, h in zip(labels, has, strict=True) if h == side]
        if part:
            gain -= len(part) / len(labels) * bits(part)
    tf, shares = {}, {}
    sizes = {s: sum(len(r) for r, x in zip(rows, labels, strict=True) if x == s) for s in (0, 1)}
    for s in (0, 1):
        mine = [row for row, label in zip(rows, labels, strict=True) if label == s]
        f = sum(row.count(v) for row in mine) / sizes[s]
        K = k1 * (1 - b + b * sizes[s] / ((sizes[0] + sizes[1]) / 2))
        tf[s] = (k1 + 1) * f / (f + K)
        shares[s] = sum(v in row for row in mine) / len(mine)
    D = math.asin(math.sqrt(shares[1])) - math.asin(math.sqrt(shares[0]))
    D += tf[1] / (tf[0] + 1e-5) - tf[0] / (tf[1] + 1e-5)
    z = (alpha * F + beta_ig * gain) * D / (alpha + beta_ig)
    # 2 sigmoid(z) - 1, without overflow
    return 2 / (1 + math.exp(-z)) - 1 if z > 0 else 1 - 2 / (1 + math.exp(z))


def ktae_advantages(
    rewards,
    group_size,
    completions,
    mask,
    *,
    alpha=1.0,
    beta_ig=1.0,
    k1=2.0,
    b=0.5,
    ignore_id=-1,
):
    A = grpo_advantages(rewards, group_size)
    out = [[A[i] if on else 0.0 for on in row] for i, row in enumerate(mask)]
    for group in groups(len(rewards), group_size):
        group = [i for i in group if any(mask[i])]
        labels = [int(rewards[i] > 0.5) for i in group]
        rows = [[completions[i][t] for t in tokens(mask[i])] for i in group]
        if len(set(labels)) < 2:
            continue
        for i in group:
            for t in tokens(mask[i]):
                if completions[i][t] != ignore_id:
                    v = completions[i][t]
                    out[i][t] += ktae_key(v, rows, labels, alpha, beta_ig, k1, b)
    return out
