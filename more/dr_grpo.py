"""Dr. GRPO: GRPO done right. "Understanding R1-Zero-Like Training", arXiv 2503.20783.

GRPO, but nothing is divided by the std of a group or by the length of a completion.

    A_i = r_i - mean_group r                                                                 [B]
    w_{i,t} = pi_theta(o_{i,t}) / pi_old(o_{i,t})                                            [B, T]
    loss = - 1/B sum_i 1/L sum_t min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)             scalar

Division by the std gives more weight to groups that are nearly all right or all wrong; division by
|o_i| makes each token of a long wrong answer cost less. L is a constant of the run: max_length, the
largest number of tokens that a completion may have. If max_length is 0, L is the width T of the
batch, as in verl; then the weight of a token varies with the batch.

Source: the authors' code (sail-sg/understand-r1-zero, train_zero_math.py: generate_max_length).

Worked example: grpo.py's batch. A = 0.5 and -0.5. w = 1.5 is clipped to 1.2: 1.2 + 0.9 - 1.0 = 1.1.

    >>> import torch
    >>> A = advantages(torch.tensor([1.0, 0.0]), group_size=2)
    >>> A
    tensor([ 0.5000, -0.5000])
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), torch.zeros(2, 2), A, mask, max_length=5)  # -1.1 / 5 * 0.5 / 2
    tensor(-0.0550)
"""

from grpo import clip_term, constant, exp_ratio, prepare, split_groups


def advantages(rewards, group_size):
    """Rewards minus their group's mean, 0 if constant: [B] -> [B], or a ValueError."""
    r = split_groups(rewards, group_size)  # [B/G, G]
    a = r - r.mean(1, keepdim=True)
    return a.masked_fill(constant(r), 0).flatten()  # [B]


def loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.2,
    max_length=0,  # tokens, a constant of the run; 0: the width T of this batch
):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    B, T = ratio.shape
    L = max_length or T
    # - 1/B sum_i 1/L sum_t min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)
    total = (clip_term(ratio, A, eps_low, eps_high) * mask).sum()
    return -total / max(B * L, 1)
