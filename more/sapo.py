"""SAPO: Soft Adaptive Policy Optimization. arXiv 2511.20347.

GRPO, but a sigmoid of the ratio takes the place of the clip: a token's gradient fades as its ratio
leaves 1, and never ends.

    A_i as in GRPO                                                                           [B]
    w_{i,t} = pi_theta(o_{i,t}) / pi_old(o_{i,t})                                            [B, T]
    f_{i,t} = 4/tau sigmoid(tau (w - 1)),  tau = tau_pos where A > 0, else tau_neg           [B, T]
    loss = - 1/B sum_i 1/|o_i| sum_t f A                                                     scalar

df/dw = 4 s (1 - s), s the sigmoid: 1 at w = 1 whatever tau is, so on policy the gradient is GRPO's.
A larger tau fades sooner. The value on policy is not GRPO's: f = 2/tau there.

Source: TRL's and verl's code ("sapo").

Worked example: grpo.py's batch. f = 4 sigmoid(0.5) = 2.4898 and 4 sigmoid(-0.1) = 1.9001; row 1 has
2 / 1.05 = 1.9048.

    >>> A, old = torch.tensor([0.7070, -0.7070]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), old, A, mask)  # -((2.4898 + 1.9001) / 2 - 1.9048) * 0.7070 / 2
    tensor(-0.1026)
"""

import torch

from grpo import exp_ratio, prepare, sequence_mean

# No `advantages` here: the trainer takes GRPO's.


def loss(logprobs, old_logprobs, advantages, mask, *, tau_pos=1.0, tau_neg=1.05):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    if tau_pos <= 0 or tau_neg <= 0:
        raise ValueError(f"tau_pos and tau_neg must be above 0; got {tau_pos} and {tau_neg}")
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    tau = torch.full_like(A, tau_neg).masked_fill(A > 0, tau_pos)  # [B, T]
    f = 4 / tau * torch.sigmoid(tau * (ratio - 1))  # [B, T]
    # - 1/B sum_i 1/|o_i| sum_t f A
    return -sequence_mean(f * A, mask)
