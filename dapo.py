"""DAPO: Decoupled Clip and Dynamic sAmpling Policy Optimization. arXiv 2503.14476, section 3.

    A_i as in GRPO                                                                      [B]
    w_{i,t} = pi_theta(o_{i,t}) / pi_old(o_{i,t})                                       [B, T]
    loss = - 1/sum_i |o_i| sum_i sum_t min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)  scalar

GRPO, but
- averaged over all tokens of the batch, so that a long completion has more weight than a short
  one ("token-level loss");
- with a wider upper clip, 0.28 instead of 0.2, so that rare tokens can grow ("clip-higher");
- without a KL term.
DAPO's two other parts are not in the loss: dynamic sampling is `train.py --dynamic-sampling`, the
soft overlong punishment is `rewards.overlong_penalty`.

Worked example: grpo.py's batch. w = 1.5 is clipped to 1.28, and the mean is over 3 tokens.

    >>> import torch
    >>> A = advantages(torch.tensor([1.0, 0.0]), group_size=2)
    >>> mask = torch.tensor([[1, 1], [1, 0]])
    >>> loss(torch.tensor([[1.5, 0.9], [1.0, 1.0]]).log(), torch.zeros(2, 2), A, mask)
    tensor(-0.2781)
    >>> round(-(1.28 + 0.9 - 1.0) * 0.7070 / 3, 4)
    -0.2781
"""

from grpo import advantages, clip_term, exp_ratio, prepare, token_mean

__all__ = ["advantages", "loss"]


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=0.2, eps_high=0.28):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    # - 1/sum_i |o_i| sum_i sum_t min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)
    return -token_mean(clip_term(ratio, A, eps_low, eps_high), mask)
