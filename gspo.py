"""GSPO: Group Sequence Policy Optimization. arXiv 2507.18071, section 4.1; GSPO-token: 4.3.

    A_i as in GRPO                                                                    Eq. 6  [B]
    s_i = (pi_theta(o_i) / pi_old(o_i))^(1/|o_i|)
        = exp(1/|o_i| sum_t log(pi_theta(o_{i,t}) / pi_old(o_{i,t})))                 Eq. 7  [B]
    loss = - 1/B sum_i min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A)                Eq. 5  scalar

GRPO, but with one ratio per sequence, the geometric mean of its token ratios: a sequence is
clipped whole or not at all. s_i moves on a 1e-3 scale: the paper clips at 3e-4 / 4e-4, and 0.2
would hardly ever bind.

Source: the paper's own text. Advantages [B, T] make it GSPO-token, the last function below.

Worked example: grpo.py's batch, clipped at 0.2. s_0 = sqrt(1.5 * 0.9) = 1.1619 is inside, s_1 = 1.

    >>> import torch
    >>> A, old = torch.tensor([0.7070, -0.7070]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), old, A, mask, eps_low=0.2, eps_high=0.2)  # -(1.1619 - 1.0) * 0.7070 / 2
    tensor(-0.0572)
"""

from grpo import clip_term, exp_ratio, prepare, row_mean, sequence_mean

# No `advantages` here: the trainer takes GRPO's.


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=3e-4, eps_high=4e-4):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    # s_i = exp(1/|o_i| sum_t log w_{i,t}): a mean of the log-ratios, not their sum
    ratio = exp_ratio(row_mean(logp - old, mask))[:, None]  # [B, 1]
    if advantages.ndim == 2:
        ratio = gspo_token(ratio, logp)  # [B, T]
    # - 1/B sum_i min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A), constant along the row
    return -sequence_mean(clip_term(ratio, A, eps_low, eps_high), mask)


def gspo_token(ratio, logp):
    """GSPO-token's ratio: the value of s_i, with the gradient of each token's own log-probability.

    s_{i,t} = stopgrad(s_i) pi_theta(o_{i,t}) / stopgrad(pi_theta(o_{i,t}))          Eq. 14  [B, T]

    In Eq. 13 it takes the place of s_i, and the mean over the tokens of a sequence then counts. If
    A is constant along the sequence, value and gradient are GSPO's.
    """
    return ratio.detach() * (logp - logp.detach()).exp()
