"""DAPO: Decoupled Clip and Dynamic sAmpling Policy Optimization. arXiv 2503.14476, section 3.

    A_i as in GRPO                                                                    Eq. 9  [B]
    w_{i,t} = pi_theta(o_{i,t}) / pi_old(o_{i,t})                                     Eq. 9  [B, T]
    loss = - 1/sum_i |o_i| sum_{i,t} min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)  Eq. 8  scalar

GRPO, but
- averaged over all tokens of the batch, so that a long completion has more weight than a short
  one ("token-level loss", Eq. 12);
- with a wider upper clip, 0.28 instead of 0.2, so that rare tokens can grow ("clip-higher",
  Eq. 10);
- without a KL term.

Source: the paper's own text. DAPO's two other parts are not in the loss: dynamic sampling (Eq. 11)
is `train.py --dynamic-sampling`, the soft overlong punishment (Eq. 13) `rewards.overlong_penalty`.
Our choice: as in verl, the sums run over the mini-batch; in Eq. 8 over the group of one prompt.

Worked example: grpo.py's batch. w = 1.5 is clipped to 1.28, and the mean is over 3 tokens.

    >>> import torch
    >>> A, old = torch.tensor([0.7070, -0.7070]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), old, A, mask)  # -(1.28 + 0.9 - 1.0) * 0.7070 / 3
    tensor(-0.2781)
"""

from grpo import clip_term, exp_ratio, prepare, token_mean

# No `advantages` here: the trainer takes GRPO's.


def loss(logprobs, old_logprobs, advantages, mask, *, eps_low=0.2, eps_high=0.28):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    # - 1/sum_i |o_i| sum_{i,t} min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)
    return -token_mean(clip_term(ratio, A, eps_low, eps_high), mask)
