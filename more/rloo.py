"""RLOO: REINFORCE Leave-One-Out. "Back to Basics", arXiv 2402.14740.

GRPO, but the baseline is the mean of the group's OTHER rewards, without a std, and a completion is
one action: its ratio is the product of its token ratios.

    A_i = r_i - mean of the others = G / (G - 1) (r_i - mean_group r)                        [B]
    W_i = pi_theta(o_i) / pi_old(o_i) = exp(sum_t log(pi_theta / pi_old))                    [B]
    loss = - 1/B sum_i min(W A, clamp(W, 1 - eps_low, 1 + eps_high) A)                       scalar

On policy the gradient is the paper's REINFORCE: -A_i / B for each token, however long the
completion. W is a product of |o_i| ratios, so a long completion leaves the clip range after one
optimizer step: watch clip_frac.

Source: TRL's and verl's code. The ratio and its clip are TRL's (rloo_trainer.py). Left out: its KL
term inside the reward (0.05).

Worked example: grpo.py's batch. A = 1 and -1; W_0 = 1.5 * 0.9 = 1.35 is clipped to 1.2, W_1 = 1.

    >>> import torch
    >>> A = advantages(torch.tensor([1.0, 0.0]), group_size=2)
    >>> A
    tensor([ 1., -1.])
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), torch.zeros(2, 2), A, mask)  # -(1.2 - 1.0) / 2
    tensor(-0.1000)
"""

from grpo import clip_term, constant, exp_ratio, prepare, sequence_mean, split_groups


def advantages(rewards, group_size):
    """Rewards minus the mean of the group's others, 0 if constant: [B] -> [B], or a ValueError."""
    r = split_groups(rewards, group_size)  # [B/G, G]
    a = group_size / (group_size - 1) * (r - r.mean(1, keepdim=True))
    return a.masked_fill(constant(r), 0).flatten()  # [B]


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=0.2, eps_high=0.2):
    """All [B, T] but advantages [B] -> scalar to minimise, or a ValueError."""
    if advantages.ndim != 1:
        raise ValueError(f"RLOO takes one advantage per sequence; got {list(advantages.shape)}")
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(((logp - old) * mask).sum(1))[:, None]  # W_i  [B, 1]
    # - 1/B sum_i min(W A, clamp(W, 1 - eps_low, 1 + eps_high) A), constant along the row
    return -sequence_mean(clip_term(ratio, A, eps_low, eps_high), mask)
