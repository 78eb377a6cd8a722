"""The 28 methods again, as slow loops over tokens in plain floats.

Written from the papers' equations, not from our files, so that the same mistake is not made twice.
- Losses take nested lists and return (value, gradient with respect to logprobs as nested lists).
  Each gradient is derived by hand: a stopgrad is a factor that is not differentiated.
- The clip is written as its cases. Ratios are not clamped: the batches stay within exp(+-20).
- Advantages: lists of floats.
"""

import math
from fractions import Fraction
from itertools import combinations
from statistics import fmean, stdev

import torch


def tokens(mask_row):
    """Positions of the row's completion tokens."""
    return [t for t, on in enumerate(mask_row) if on]


def every_token(mask):
    return [(i, t) for i, row in enumerate(mask) for t in tokens(row)]


def at(advantages, i, t):
    """A_i or A_{i,t}, whichever is given."""
    return advantages[i][t] if isinstance(advantages[i], list) else advantages[i]


# (sign of A, side of the clip) that clip_term has seen: a test checks that all six are reached
branches = set()


def clip_term(ratio, a, eps_low, eps_high):
    """(min(ratio A, clamp(ratio) A), its derivative by the log of the ratio), by cases."""
    above, below = ratio > 1 + eps_high, ratio < 1 - eps_low
    branches.add(("+" if a > 0 else "-", "above" if above else "below" if below else "in"))
    if a > 0 and above:
        return (1 + eps_high) * a, 0.0
    if a < 0 and below:
        return (1 - eps_low) * a, 0.0
    return ratio * a, ratio * a


def k3(k):
    """(exp(k) - k - 1, its derivative by the current log-probability), k = log(ref / pi)."""
    return math.exp(k) - k - 1, 1 - math.exp(k)


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


def log_ratios(logp, old, mask, i):
    return [logp[i][t] - old[i][t] for t in tokens(mask[i])]


def minus(pair):
    return -pair[0], -pair[1]


# ---- losses: the seven ---------------------------------------------------------------------------


def grpo_loss(logp, old, A, mask, *, eps_low=0.2, eps_high=0.2, beta=0.0, ref_logprobs=None):
    def term(i, t):
        v, g = clip_term(math.exp(logp[i][t] - old[i][t]), at(A, i, t), eps_low, eps_high)
        kl, kl_g = k3(ref_logprobs[i][t] - logp[i][t]) if beta else (0, 0)
        return -v + beta * kl, -g + beta * kl_g

    return by_sequence(term, mask)


def dapo_loss(logp, old, A, mask, *, eps_low=0.2, eps_high=0.28):
    def term(i, t):
        w = math.exp(logp[i][t] - old[i][t])
        return minus(clip_term(w, at(A, i, t), eps_low, eps_high))

    return by_token(term, mask)


ha_dw_loss = grpo_loss
gtpo_loss = ktae_loss = maxrl_loss = opo_loss = dapo_loss


def sequence_term(logp, old, A, mask, eps_low, eps_high):
    """term(i, t) of GSPO, TEPO and LUSPO, for A_i and for A_{i,t}.

    One A per row: row i's |o_i| equal terms have the gradient s A / |o_i| at each of its tokens, so
    s A in all, as one term with GSPO-token's ratio has at its own token.
    """

    def term(i, t):
        s = math.exp(fmean(log_ratios(logp, old, mask, i)))
        return minus(clip_term(s, at(A, i, t), eps_low, eps_high))

    return term


def gspo_loss(logp, old, A, mask, *, eps_low=3e-4, eps_high=4e-4):
    return by_sequence(sequence_term(logp, old, A, mask, eps_low, eps_high), mask)


def luspo_loss(logp, old, A, mask, *, eps_low=2e-3, eps_high=2.5e-3):
    term = sequence_term(logp, old, A, mask, eps_low, eps_high)
    return summed(term, lambda i: 1 / len(mask), mask)


def tepo_loss(
    logp,
    old,
    A,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.28,
    kl_coef=0.0,
    entropy=None,
    old_entropy=None,
    ref_logprobs=None,
):
    policy = sequence_term(logp, old, A, mask, eps_low, eps_high)

    def term(i, t):
        v, g = policy(i, t)
        if kl_coef and at(A, i, t) > 0 and entropy[i][t] < old_entropy[i][t] - 1e-4:
            kl, kl_g = k3((ref_logprobs or old)[i][t] - logp[i][t])
            v, g = v + kl_coef * kl, g + kl_coef * kl_g
        return v, g

    return by_token(term, mask)


def grpo_s_loss(logp, old, A, mask, *, eps_low=0.2, eps_high=0.28):
    def term(i, t):
        w = [math.exp(lr) for lr in log_ratios(logp, old, mask, i)]
        v, g = clip_term(fmean(w), A[i], eps_low, eps_high)
        own = math.exp(logp[i][t] - old[i][t])  # the mean's derivative is own / |o_i|
        return -v, -own * A[i] if g else 0.0

    return by_sequence(term, mask)


def trgrpo_loss(
    logp,
    old,
    A,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.24,
    alpha=2.0,
    tau=9.0,
    mu=0.25,
    lower=1.0,
    upper=1.4,
    reading="shifted",
    weight_inside_clip=False,
    beta=0.0,
    ref_logprobs=None,
):
    def term(i, t):
        pi = math.exp(logp[i][t])
        if reading == "shifted":
            v = alpha / (1 + math.exp(-tau * (pi - mu)))
        else:
            v = alpha * (1 / (1 + math.exp(-tau * pi)) - mu)
        v = min(max(v, lower), upper)
        w, a = math.exp(logp[i][t] - old[i][t]), at(A, i, t)
        if weight_inside_clip:
            value, g = clip_term(v * w, a, eps_low, eps_high)
        else:
            value, g = (v * x for x in clip_term(w, a, eps_low, eps_high))
        kl, kl_g = 0.0, 0.0
        if beta:
            x = v * math.exp(ref_logprobs[i][t]) / pi
            kl, kl_g = x - math.log(x) - 1, 1 - x
        return -value + beta * kl, -g + beta * kl_g

    return by_sequence(term, mask)


# ---- losses: more/, averaged over tokens ---------------------------------------------------------


def covariance(logp, A, mask):
    on = every_token(mask)
    mean_a = fmean(at(A, i, t) for i, t in on)
    mean_logp = fmean(logp[i][t] for i, t in on)
    return {(i, t): (at(A, i, t) - mean_a) * (logp[i][t] - mean_logp) for i, t in on}


def clip_cov_loss(
    logp, old, A, mask, *, eps_low=1.0, eps_high=1.0, cov_ratio=2e-4, cov_low=1.0, cov_high=5.0
):
    candidates = []
    for (i, t), cov in covariance(logp, A, mask).items():  # row-major
        a, w = at(A, i, t), math.exp(logp[i][t] - old[i][t])
        silent = (a > 0 and w > 1 + eps_high) or (a < 0 and w < 1 - eps_low)
        if cov_low < cov < cov_high and not silent:
            candidates.append((i, t))
    k = max(1, int(cov_ratio * len(every_token(mask))))
    order = torch.randperm(len(candidates)).tolist() if candidates else []
    chosen = [candidates[j] for j in order[:k]]

    def term(i, t):
        w = math.exp(logp[i][t] - old[i][t])
        v, g = clip_term(w, at(A, i, t), eps_low, eps_high)
        return (0.0, 0.0) if (i, t) in chosen else (-v, -g)

    return by_token(term, mask)


def kl_cov_loss(logp, old, A, mask, *, cov_ratio=2e-3, cov_coef=1.0):
    cov = covariance(logp, A, mask)
    k = max(1, int(cov_ratio * len(cov)))
    largest = sorted(cov, key=cov.get, reverse=True)[:k]

    def term(i, t):
        lr = logp[i][t] - old[i][t]
        policy = -math.exp(lr) * at(A, i, t)
        coef = cov_coef if (i, t) in largest else 0.0
        sign = (lr > 0) - (lr < 0)
        return policy + coef * abs(lr), policy + coef * sign

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
        return minus(clip_term(math.exp(logp[i][t] - old[i][t]), a, eps_low, eps_high))

    return by_token(term, mask)


def raft_loss(logp, old, A, mask, *, eps_low=0.2, eps_high=0.2, dual_clip=3.0, variant="raft++"):
    def term(i, t):
        a = at(A, i, t)
        if variant == "raft":
            return -a * logp[i][t], -a
        w = math.exp(logp[i][t] - old[i][t])
        v, g = clip_term(w, a, eps_low, eps_high)
        return (-a * dual_clip, 0.0) if a < 0 and w > dual_clip else (-v, -g)

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
    sequence = sequence_term(logp, old, A, mask, seq_eps_low, seq_eps_high)

    def term(i, t):
        w = math.exp(logp[i][t] - old[i][t])
        v, g = clip_term(w, at(A, i, t), eps_low, eps_high)
        v_s, g_s = sequence(i, t)
        return (1 - weight) * v_s - weight * v, (1 - weight) * g_s - weight * g

    return by_token(term, mask)


def cispo_loss(logp, old, A, mask, *, eps_low=1.0, eps_high=4.0):
    def term(i, t):
        a, w = at(A, i, t), math.exp(logp[i][t] - old[i][t])
        w = min(max(w, 1 - eps_low), 1 + eps_high)
        return -w * a * logp[i][t], -w * a

    return by_token(term, mask)


def vespo_loss(logp, old, A, mask, *, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0):
    def term(i, t):
        W = math.prod(math.exp(lr) for lr in log_ratios(logp, old, mask, i))
        W = min(max(W, 1e-8), math.exp(20))
        k, lam = (k_pos, lambda_pos) if A[i] >= 0 else (k_neg, lambda_neg)
        lam = max(lam, 1e-4)
        phi = math.exp(lam) * W**k * math.exp(-lam * W)  # a gamma density, 1 at W = 1
        return -phi * A[i] * logp[i][t], -phi * A[i]

    return by_token(term, mask)


def dro_loss(logp, old, A, mask, *, tau=1.0):
    def term(i, t):
        lr, a = logp[i][t] - old[i][t], at(A, i, t)
        return -a * logp[i][t] + tau / 2 * lr**2, -a + tau * lr

    return by_token(term, mask)


def topr_loss(logp, old, A, mask, *, sequence=False):
    def term(i, t):
        a, w = at(A, i, t), math.exp(logp[i][t] - old[i][t])
        if sequence:
            w = math.exp(sum(log_ratios(logp, old, mask, i)))
        c = 1 if a > 0 or w > 1 else w
        return -c * a * logp[i][t], -c * a

    return by_token(term, mask)


# ---- losses: more/, averaged over sequences ------------------------------------------------------


def dr_grpo_loss(logp, old, A, mask, *, eps_low=0.2, eps_high=0.2, max_length=0):
    def term(i, t):
        w = math.exp(logp[i][t] - old[i][t])
        return minus(clip_term(w, at(A, i, t), eps_low, eps_high))

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
    def term(i, t):
        W = math.exp(sum(log_ratios(logp, old, mask, i)))
        v, g = clip_term(W, A[i], eps_low, eps_high)
        return -v, -g * len(tokens(mask[i]))  # W is not divided by the length

    return by_sequence(term, mask)


def gmpo_loss(logp, old, A, mask, *, eps_low=0.4, eps_high=0.4):
    def clipped(i, lr):
        return min(lr, eps_high) if A[i] > 0 else max(lr, -eps_low)

    def term(i, t):
        of_row = log_ratios(logp, old, mask, i)
        v = -A[i] * math.exp(fmean(clipped(i, lr) for lr in of_row))
        lr = logp[i][t] - old[i][t]
        return v, v if clipped(i, lr) == lr else 0.0

    return by_sequence(term, mask)


# ---- advantages ----------------------------------------------------------------------------------


def groups(n, group_size):
    return [range(start, start + group_size) for start in range(0, n, group_size)]


def by_group(formula):
    """advantages(rewards, group_size): formula(r) of each group's rewards, 0 if it is constant."""

    def advantages(rewards, group_size, **options):
        out = []
        for group in groups(len(rewards), group_size):
            r = [rewards[i] for i in group]
            out += formula(r, **options) if max(r) > min(r) else [0.0] * len(r)
        return out

    return advantages


def standardise(values, pool):
    """(values - mean pool) / (std pool + 1e-4), Bessel's correction; 0 if the pool is constant."""
    if not pool or max(pool) == min(pool):
        return [0.0 for _ in values]
    mean, std = fmean(pool), stdev(pool)
    return [(v - mean) / (std + 1e-4) for v in values]


grpo_advantages = by_group(lambda r: standardise(r, r))
dr_grpo_advantages = dro_advantages = topr_advantages = by_group(
    lambda r: [x - fmean(r) for x in r]
)
maxrl_advantages = by_group(lambda r: [(x - fmean(r)) / (fmean(r) + 1e-6) for x in r])
rloo_advantages = by_group(lambda r: [r[i] - fmean(r[:i] + r[i + 1 :]) for i in range(len(r))])
rej_advantages = by_group(lambda r, signed: [2 * x - 1 if signed else x for x in r])


def raft_advantages(rewards, group_size, *, variant="raft++", signed=True):
    if variant == "reinforce_rej":
        return rej_advantages(rewards, group_size, signed=signed)
    return [max(r, 0.0) for r in rewards]


def opo_advantages(rewards, group_size, *, mask):
    out = []
    for group in groups(len(rewards), group_size):
        # the baseline is the mean over tokens of the reward of their completion
        of_tokens = [rewards[i] for i in group for _ in tokens(mask[i])]
        constant = len({rewards[i] for i in group}) == 1
        for i in group:
            out.append(0.0 if constant or not any(mask[i]) else rewards[i] - fmean(of_tokens))
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


def sets(group, success):
    """O+ and O- of a group."""
    return [i for i in group if success[i] > 0.5], [i for i in group if success[i] <= 0.5]


def clamped(h, low, high):
    """An entropy within its bounds, where 0 is no bound."""
    h = max(h, low)
    return min(h, high) if high else h


def gtpo_shaped(rewards, success, group, h, mask, alpha1, alpha2):
    """Eqs. 3 and 5: r+ and r- as {(i, t): value} over the tokens of O+ and of O-."""
    right, wrong = sets(group, success)
    h = {(i, t): max(h[i][t], 1e-6) for i in group for t in tokens(mask[i])}
    r_plus, r_minus = {}, {}
    for t in range(len(mask[0])):
        running = [i for i in right if mask[i][t]]
        for i in running:
            share = h[i, t] / sum(h[k, t] for k in running)
            r_plus[i, t] = alpha1 * rewards[i] + alpha2 * share * len(running)
        running = [j for j in wrong if mask[j][t]]
        for j in running:
            share = (1 / h[j, t]) / sum(1 / h[k, t] for k in running)
            r_minus[j, t] = -alpha1 - alpha2 * share * len(running)
    return r_plus, r_minus


def grpo_s_shaped(rewards, success, group, h, mask, beta1, beta2):
    """Eqs. 8 and 9: r+ and r- as {i: value}."""
    right, wrong = sets(group, success)
    h = {i: max(fmean(h[i][t] for t in tokens(mask[i])), 1e-6) for i in group}
    r_plus, r_minus = {}, {}
    for i in right:
        r_plus[i] = beta1 * rewards[i] + beta2 * h[i] / sum(h[k] for k in right) * len(right)
    for j in wrong:
        r_minus[j] = -beta1 - beta2 / h[j] / sum(1 / h[k] for k in wrong) * len(wrong)
    return r_plus, r_minus


def normalised(r_plus, r_minus, normalize):
    """Eq. 6: A+ on O+ and A- on O-, each standardised over the pool that `normalize` names."""
    plus, minus = list(r_plus.values()), list(r_minus.values())
    if not plus or not minus:  # one set only: entropy noise, no outcome
        return {key: 0.0 for key in (*r_plus, *r_minus)}
    pools = {
        "zeros": (plus + [0.0] * len(minus), minus + [0.0] * len(plus)),
        "within": (plus, minus),
        "joint": (plus + minus, plus + minus),
    }[normalize]
    out = dict(zip(r_plus, standardise(plus, pools[0]), strict=True))
    return out | dict(zip(r_minus, standardise(minus, pools[1]), strict=True))


def shaped_advantages(shape, rewards, group_size, entropy, mask, weights, options):
    """{(i, t) or i: A} by gtpo_shaped or grpo_s_shaped."""
    bounds = options.get("entropy_low", 0), options.get("entropy_high", 0)
    h = [[clamped(x, *bounds) for x in row] for row in entropy]
    found = {}
    for group in groups(len(rewards), group_size):
        shaped = shape(rewards, options.get("right") or rewards, group, h, mask, *weights)
        found.update(normalised(*shaped, options.get("normalize", "zeros")))
    return found


def gtpo_advantages(rewards, group_size, *, entropy, mask, alpha1=1.0, alpha2=0.1, **options):
    weights = alpha1, alpha2
    found = shaped_advantages(gtpo_shaped, rewards, group_size, entropy, mask, weights, options)
    return [[found.get((i, t), 0.0) for t in range(len(row))] for i, row in enumerate(mask)]


def grpo_s_advantages(rewards, group_size, *, entropy, mask, beta1=1.0, beta2=0.1, **options):
    weights = beta1, beta2
    found = shaped_advantages(grpo_s_shaped, rewards, group_size, entropy, mask, weights, options)
    return [found[i] for i in range(len(rewards))]


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
    rewards, group_size, *, completions, mask, alpha=1.0, beta_ig=1.0, k1=2.0, b=0.5, ignore_id=-1
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
