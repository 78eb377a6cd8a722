"""RLOO: REINFORCE Leave-One-Out. "Back to Basics", arXiv 2402.14740.

GRPO, but the baseline is the mean of the group's OTHER rewards, without a std, and a completion is
one action: its ratio is the product of its token ratios.

    A_i = r_i - mean of the others = G / (G - 1) (r_i - mean_group r)                   [B]
    W_i = pi_theta(o_i) / pi_old(o_i) = exp(sum_t log(pi_theta / pi_old))               [B]
    loss = - 1/B sum_i min(W A, clamp(W, 1 - eps_low, 1 + eps_high) A)                  scalar

On policy the gradient is the paper's REINFORCE: -A_i / B for each token, however long the
completion. The ratio and its clip are TRL's (rloo_trainer.py). W is a product of |o_i| ratios, so a
long completion leaves the clip range after one optimizer step: watch clip_frac. Left out: TRL's KL
term inside the reward (0.05).

Worked example: grpo.py's batch. A = 1 and -1; W_0 = 1.5 * 0.9 = 1.35 is clipped to 1.2, W_1 = 1.

    >>> import torch
    >>> A = advantages(torch.tensor([1.0, 0.0]), group_size=2)
    >>> A
    tensor([ 1., -1.])
    >>> mask = torch.tensor([[1, 1], [1, 0]])
    >>> loss(torch.tensor([[1.5, 0.9], [1.0, 1.0]]).log(), torch.zeros(2, 2), A, mask)
    tensor(-0.1000)
    >>> round(-(1.2 - 1.0) / 2, 4)
    -0.1
"""

from grpo import clip_term, constant, exp_ratio, prepare, sequence_mean, split_groups


def advantages(rewards, group_size, *, entropy=None, mask=None):
    """Rewards minus the mean of the group's others, 0 if constant: [B] -> [B], or a ValueError."""
    r = split_groups(rewards, group_size)  # [B/G, G]; entropy and mask are not used
    a = group_size / (group_size - 1) * (r - r.mean(1, keepdim=True))
    return a.masked_fill(constant(r), 0).flatten()  # [B]


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=0.2, eps_high=0.2):
    """logprobs, old_logprobs and mask [B, T], advantages [B] -> scalar to minimise.

    Raises ValueError if the shapes do not fit, also on advantages [B, T].
    """
    if advantages.ndim != 1:
        shape = list(advantages.shape)
        raise ValueError(f"RLOO takes one advantage per sequence, [B]; got {shape}")
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(((logp - old) * mask).sum(1))[:, None]  # W_i  [B, 1]
    # - 1/B sum_i min(W A, clamp(W, 1 - eps_low, 1 + eps_high) A), constant along the row
    return -sequence_mean(clip_term(ratio, A, eps_low, eps_high), mask)
