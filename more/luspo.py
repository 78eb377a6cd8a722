"""LUSPO: Length-Unbiased Sequence Policy Optimization. arXiv 2602.05261.

TEPO, but the sum over the tokens is divided by B and not by their number: GSPO, but each sequence
counts as often as it has tokens.

    A_i as in GRPO                                                                           [B]
    s_i = exp(1/|o_i| sum_t log(pi_theta(o_{i,t}) / pi_old(o_{i,t}))),  as in GSPO           [B]
    loss = - 1/B sum_i |o_i| min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A)                 scalar

It is TEPO's loss times sum_i |o_i| / B, the mean length, which AdamW undoes as far as it stays the
same. The range is the published one for s_i under an average that weighs tokens alike.

Source: TRL's code ("luspo" with sequence-level ratios). Our choice: advantages [B, T] are refused.

Worked example: grpo.py's batch. s_0 = sqrt(1.5 * 0.9) = 1.1619 is clipped to 1.0025, and s_1 = 1.

    >>> import torch
    >>> A, old = torch.tensor([0.7070, -0.7070]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), old, A, mask)  # -(2 * 1.0025 - 1.0) * 0.7070 / 2
    tensor(-0.3553)
"""

from grpo import clip_term, exp_ratio, prepare, row_mean

# No `advantages` here: the trainer takes GRPO's.


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=2e-3, eps_high=2.5e-3):
    """All [B, T] but advantages [B] -> scalar to minimise, or a ValueError."""
    if advantages.ndim != 1:
        raise ValueError(f"LUSPO takes one advantage per sequence; got {list(advantages.shape)}")
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(row_mean(logp - old, mask))[:, None]  # s_i  [B, 1]
    # - 1/B sum_i |o_i| min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A)
    term = clip_term(ratio, A, eps_low, eps_high) * mask  # the same |o_i| times in row i  [B, T]
    return -term.sum() / max(len(term), 1)
