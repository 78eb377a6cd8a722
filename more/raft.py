"""RAFT, RAFT++ and Reinforce-Rej. "A Minimalist Approach to LLM Reasoning", arXiv 2504.11343.

DAPO, but the advantage is the reward itself: no mean, no std.

    variant "raft", "raft++":  A_i = max(r_i, 0)                                             [B]
    variant "reinforce_rej":   A_i = 2 r_i - 1 in groups that are mixed, else 0              [B]
    u = min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A);  A < 0: at least dual_clip A        [B, T]
    loss = - 1/sum_i |o_i| sum_{i,t} u                                                       scalar
    variant "raft":  u = A logp, without a ratio: old_logprobs are not used

- "raft" is supervised training on the right answers, also of groups that are all right; "raft++"
  adds the ratio and its clip. --dynamic-sampling drops groups that are all right all the same.
- "reinforce_rej" drops constant groups and keeps the wrong answers of the others.
- With rewards of 0 and 1, on policy, the three have one gradient at equal A.

Source: the authors' code (RLHFlow/Minimal-RL), whose average counts the tokens with A = 0 too. Our
choice: 2 r - 1; the code takes r as it comes (signed=False), so with rewards of 0 and 1 it would
train on right answers only, and the method is about wrong ones. Left out: its KL term of 0.001.

Worked example: grpo.py's batch with "raft++". A = 1 and 0; w = 1.5 is clipped to 1.2.

    >>> A = advantages(torch.tensor([1.0, 0.0]), group_size=2)
    >>> A
    tensor([1., 0.])
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), torch.zeros(2, 2), A, mask)  # -(1.2 + 0.9) / 3
    tensor(-0.7000)
"""

import torch

from grpo import clip_term, constant, exp_ratio, prepare, split_groups, token_mean

NEEDS_ALL_ROWS = True  # all-right groups have an advantage


def check(variant):
    if variant not in ("raft", "raft++", "reinforce_rej"):
        raise ValueError(f"variant must be 'raft', 'raft++' or 'reinforce_rej'; got {variant!r}")


def advantages(rewards, group_size, *, variant="raft++", signed=True):
    """The rewards as the variant takes them: [B] -> [B], or a ValueError."""
    check(variant)
    r = split_groups(rewards, group_size)  # [B/G, G]
    if variant != "reinforce_rej":
        return r.clamp(min=0).flatten()  # [B]
    a = 2 * r - 1 if signed else r
    return a.masked_fill(constant(r), 0).flatten()  # [B]


def loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.2,
    dual_clip=3.0,
    variant="raft++",
):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    check(variant)
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    if variant == "raft":
        return -token_mean(A * logp, mask)
    u = clip_term(exp_ratio(logp - old), A, eps_low, eps_high)  # [B, T]
    u = torch.where(A < 0, torch.maximum(u, dual_clip * A), u)
    return -token_mean(u, mask)
