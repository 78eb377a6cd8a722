"""The seven algorithms again, as slow loops over tokens: the tests compare our files with these.

Written from the papers' equations, not from our files, so that the same mistake is not made twice.
- Losses: `logprobs` is a [B, T] float64 leaf, everything else is nested lists of floats. Each token
  is one 0-d tensor, so autograd differentiates exactly what is written.
- The clip is written as its cases, not as min and clamp.
- Advantages: plain floats.
"""

import math
from statistics import fmean, stdev


def tokens(mask_row):
    """Positions of the row's completion tokens."""
    return [t for t, on in enumerate(mask_row) if on]


def at(advantages, i, t):
    """A_i or A_{i,t}, whichever is given."""
    return advantages[i][t] if isinstance(advantages[i], list) else advantages[i]


# (sign of A, side of the clip) that clip_term has seen: a test checks that all six are reached
branches = set()


def clip_term(ratio, a, eps_low, eps_high):
    """min(ratio A, clamp(ratio, 1-eps_low, 1+eps_high) A) by cases; a clipped token is constant."""
    above = ratio.item() > 1 + eps_high
    below = ratio.item() < 1 - eps_low
    branches.add(("+" if a > 0 else "-", "above" if above else "below" if below else "in"))
    if a > 0 and above:
        return (1 + eps_high) * a
    if a < 0 and below:
        return (1 - eps_low) * a
    return ratio * a


def sequence_mean(x, mask):
    """(1/B) sum_i (1/|o_i|) sum_t x(i, t)."""
    total = 0.0
    for i, row in enumerate(mask):
        on = tokens(row)
        for t in on:
            total = total + x(i, t) / len(on) / len(mask)
    return total


def token_mean(x, mask):
    """sum_{i,t} x(i, t) / sum_i |o_i|."""
    count = sum(len(tokens(row)) for row in mask)
    total = 0.0
    for i, row in enumerate(mask):
        for t in tokens(row):
            total = total + x(i, t) / count
    return total


def k3(logp, ref):
    return (ref - logp).exp() - (ref - logp) - 1


def sequence_ratio(logprobs, old, mask, i):
    """s_i: the geometric mean of the row's ratios."""
    on = tokens(mask[i])
    return (sum(logprobs[i, t] - old[i][t] for t in on) / len(on)).exp()


def token_carrier(logprobs, old, mask, i, t):
    """stopgrad(s_i) pi / stopgrad(pi): its value is s_i, its gradient that of this token alone."""
    s = sequence_ratio(logprobs, old, mask, i)
    logp = logprobs[i, t]
    return s.detach() * (logp - logp.detach()).exp()


# ---- losses --------------------------------------------------------------------------------------


def grpo_loss(
    logprobs, old, advantages, mask, *, eps_low=0.2, eps_high=0.2, ref_logprobs=None, beta=0.0
):
    def x(i, t):
        ratio = (logprobs[i, t] - old[i][t]).exp()
        kl = k3(logprobs[i, t], ref_logprobs[i][t]) if beta else 0.0
        return -clip_term(ratio, at(advantages, i, t), eps_low, eps_high) + beta * kl

    return sequence_mean(x, mask)


def dapo_loss(logprobs, old, advantages, mask, *, eps_low=0.2, eps_high=0.28):
    def x(i, t):
        ratio = (logprobs[i, t] - old[i][t]).exp()
        return -clip_term(ratio, at(advantages, i, t), eps_low, eps_high)

    return token_mean(x, mask)


gtpo_loss = dapo_loss  # Eq. 7 is DAPO's, with A_{i,t}


def gspo_loss(logprobs, old, advantages, mask, *, eps_low=3e-4, eps_high=4e-4):
    if isinstance(advantages[0], list):  # GSPO-token

        def x(i, t):
            ratio = token_carrier(logprobs, old, mask, i, t)
            return -clip_term(ratio, advantages[i][t], eps_low, eps_high)

        return sequence_mean(x, mask)
    total = 0.0
    for i, row in enumerate(mask):
        if any(row):
            ratio = sequence_ratio(logprobs, old, mask, i)
            total = total - clip_term(ratio, advantages[i], eps_low, eps_high)
    return total / len(mask)


def tepo_loss(
    logprobs,
    old,
    advantages,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.28,
    kl_coef=0.0,
    entropy=None,
    old_entropy=None,
    ref_logprobs=None,
):
    def x(i, t):
        a = at(advantages, i, t)
        if isinstance(advantages[i], list):
            ratio = token_carrier(logprobs, old, mask, i, t)
        else:
            ratio = sequence_ratio(logprobs, old, mask, i)
        kl = 0.0
        if kl_coef and a > 0 and entropy[i][t] < old_entropy[i][t] - 1e-4:
            kl = k3(logprobs[i, t], (ref_logprobs or old)[i][t])
        return -clip_term(ratio, a, eps_low, eps_high) + kl_coef * kl

    return token_mean(x, mask)


def grpo_s_loss(logprobs, old, advantages, mask, *, eps_low=0.2, eps_high=0.28):
    total = 0.0
    for i, row in enumerate(mask):
        on = tokens(row)
        if on:
            w = sum((logprobs[i, t] - old[i][t]).exp() for t in on) / len(on)  # arithmetic
            total = total - clip_term(w, advantages[i], eps_low, eps_high)
    return total / len(mask)


def trgrpo_loss(
    logprobs,
    old,
    advantages,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.24,
    alpha=2.0,
    tau=9.0,
    mu=0.25,
    lower=1.0,
    upper=1.4,
    weight_inside_clip=False,
):
    def x(i, t):
        pi = math.exp(logprobs[i, t].item())
        v = min(max(alpha / (1 + math.exp(-tau * (pi - mu))), lower), upper)
        w, a = (logprobs[i, t] - old[i][t]).exp(), at(advantages, i, t)
        if weight_inside_clip:
            return -clip_term(v * w, a, eps_low, eps_high)
        return -v * clip_term(w, a, eps_low, eps_high)

    return sequence_mean(x, mask)


# ---- advantages ----------------------------------------------------------------------------------


def groups(n, group_size):
    return [range(start, start + group_size) for start in range(0, n, group_size)]


def standardise(values, pool):
    """(values - mean pool) / (std pool + 1e-4), Bessel's correction; 0 if the pool is constant."""
    if not pool or max(pool) == min(pool):
        return [0.0 for _ in values]
    mean, std = fmean(pool), stdev(pool)
    return [(v - mean) / (std + 1e-4) for v in values]


def grpo_advantages(rewards, group_size):
    out = []
    for group in groups(len(rewards), group_size):
        r = [rewards[i] for i in group]
        out += standardise(r, r)
    return out


def sets(group, success):
    """O+ and O- of a group."""
    return [i for i in group if success[i] > 0.5], [i for i in group if success[i] <= 0.5]


def gtpo_shaped(rewards, success, group, entropy, mask, alpha1, alpha2):
    """Eqs. 3 and 5: r+ and r- as {(i, t): value} over the tokens of O+ and of O-."""
    right, wrong = sets(group, success)
    h = {(i, t): max(entropy[i][t], 1e-6) for i in group for t in tokens(mask[i])}
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


def grpo_s_shaped(rewards, success, group, entropy, mask, beta1, beta2):
    """Eqs. 8 and 9: r+ and r- as {i: value}."""
    right, wrong = sets(group, success)
    h = {i: max(fmean(entropy[i][t] for t in tokens(mask[i])), 1e-6) for i in group}
    r_plus = {
        i: beta1 * rewards[i] + beta2 * h[i] / sum(h[k] for k in right) * len(right) for i in right
    }
    r_minus = {j: -beta1 - beta2 / h[j] / sum(1 / h[k] for k in wrong) * len(wrong) for j in wrong}
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


def gtpo_advantages(
    rewards, group_size, entropy, mask, *, right=None, alpha1=1.0, alpha2=0.1, normalize="zeros"
):
    out = [[0.0] * len(mask[0]) for _ in rewards]
    for group in groups(len(rewards), group_size):
        shaped = gtpo_shaped(rewards, right or rewards, group, entropy, mask, alpha1, alpha2)
        for (i, t), a in normalised(*shaped, normalize).items():
            out[i][t] = a
    return out


def grpo_s_advantages(
    rewards, group_size, entropy, mask, *, right=None, beta1=1.0, beta2=0.1, normalize="zeros"
):
    out = [0.0] * len(rewards)
    for group in groups(len(rewards), group_size):
        shaped = grpo_s_shaped(rewards, right or rewards, group, entropy, mask, beta1, beta2)
        for i, a in normalised(*shaped, normalize).items():
            out[i] = a
    return out
