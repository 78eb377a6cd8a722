"""DRO: policy gradient with a quadratic penalty, as Kimi k1.5 has it. arXiv 2501.12599, per token.

DAPO, but instead of a clip each token pays for the square of its log-ratio.

    A_i = r_i - mean_group r,  Dr. GRPO's                                                    [B]
    loss = - 1/sum_i |o_i| sum_{i,t} (A logp - tau/2 log(pi_theta / pi_old)^2)               scalar

The push is (A - tau log w) / sum_i |o_i|: a token is pulled back as far as it has moved, also one
with A = 0. The value is no objective: only the gradient means something. tau = 0 is REINFORCE with
a baseline.

Source: verl's and ROLL's code ("dro"). Our choice: tau 1; verl calls it beta and has no default.

Worked example: grpo.py's batch. log 1.5 = 0.4055, log 0.9 = -0.1054, log 1 = 0.

    >>> import torch
    >>> A, old = torch.tensor([0.5, -0.5]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> logprobs = ratios.log().requires_grad_()
    >>> value = loss(logprobs, old, A, mask)
    >>> torch.autograd.grad(value, logprobs)[0]  # (-0.5 + 0.4055) / 3, (-0.5 - 0.1054) / 3, 0.5 / 3
    tensor([[-0.0315, -0.2018],
            [ 0.1667,  0.0000]])
"""

from grpo import prepare, token_mean
from more import dr_grpo

# Tokens with A = 0 are pulled back too: the logprobs of their rows must be current.
NEEDS_ALL_ROWS = True

advantages = dr_grpo.advantages


def loss(logprobs, old_logprobs, advantages, mask, *, tau=1.0):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    if tau < 0:
        raise ValueError(f"tau must be at least 0; got {tau}")
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    # - 1/sum_i |o_i| sum_{i,t} (A logp - tau/2 (log w)^2)
    return -token_mean(A * logp - tau / 2 * (logp - old).square(), mask)
