"""CISPO: Clipped IS-weight Policy Optimization (MiniMax-M1). arXiv 2506.13585.

DAPO, but the clip bounds the weight of a token's gradient instead of removing it: REINFORCE with a
truncated importance weight.

    A_i as in GRPO                                                                           [B]
    w_{i,t} = pi_theta(o_{i,t}) / pi_old(o_{i,t})                                            [B, T]
    c_{i,t} = stopgrad(clamp(w, 1 - eps_low, 1 + eps_high))                                  [B, T]
    loss = - 1/sum_i |o_i| sum_{i,t} c A logp                                                scalar

The gradient is -c A / sum_i |o_i|: inside the range that of -w A; outside it the bound stands in
place of w, and it is never 0. The value is no objective: only the gradient means something.

Source: TRL's and verl's code. eps_low = 1 means no lower bound, as in the paper and both libraries.
The paper gives no eps_high. Our 4, a cap of 5, is the value on TRL's page (its epsilon_high is the
cap itself); verl's example has 0.2.

Worked example: grpo.py's batch with eps_high = 0.2. w = 1.5 weighs 1.2; DAPO would give it nothing.

    >>> import torch
    >>> A, old = torch.tensor([0.7070, -0.7070]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> logprobs = ratios.log().requires_grad_()
    >>> value = loss(logprobs, old, A, mask, eps_high=0.2)
    >>> torch.autograd.grad(value, logprobs)[0]  # -1.2, -0.9 and 1.0, times 0.7070 / 3
    tensor([[-0.2828, -0.2121],
            [ 0.2357,  0.0000]])
"""

from grpo import exp_ratio, prepare, token_mean

# No `advantages` here: the trainer takes GRPO's.


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=1.0, eps_high=4.0):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    c = ratio.clamp(1 - eps_low, 1 + eps_high).detach()  # [B, T]
    # - 1/sum_i |o_i| sum_{i,t} c A logp
    return -token_mean(c * A * logp, mask)
