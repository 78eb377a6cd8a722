"""TOPR: Tapered Off-Policy REINFORCE. arXiv 2503.14286.

CISPO, but the ratio weighs wrong answers only, and at most 1: right ones are imitated however old
they are, wrong ones count less the rarer they have become.

    A_i = r_i - mean_group r,  Dr. GRPO's                                                    [B]
    c_{i,t} = 1 where A > 0, else stopgrad(clamp(w, 0, 1)),  w = pi_theta / pi_old           [B, T]
    loss = - 1/sum_i |o_i| sum_{i,t} c A logp                                                scalar

The push is c A / sum_i |o_i|. The value is no objective: only the gradient means something. With
sequence=True, w is the ratio of the whole completion, exp(sum_t log w), as in the paper.

Source: Trinity-RFT's and ROLL's code (w per token). Our choice: the advantages; the paper takes the
reward itself, the code what it is given.

Worked example: two tokens of a right answer, w = 1.5 and 0.9, and one of a wrong one, w = 0.5.

    >>> import torch
    >>> A, old = torch.tensor([0.5, -0.5]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [0.5, 1.0]])
    >>> logprobs = ratios.log().requires_grad_()
    >>> value = loss(logprobs, old, A, mask)
    >>> torch.autograd.grad(value, logprobs)[0]  # -0.5 / 3 twice, 0.5 * 0.5 / 3
    tensor([[-0.1667, -0.1667],
            [ 0.0833,  0.0000]])
"""

from grpo import exp_ratio, prepare, token_mean
from more import dr_grpo

advantages = dr_grpo.advantages


def loss(logprobs, old_logprobs, advantages, mask, *, sequence=False):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    logp, old, A, mask = prepare(logprobs, old_logprobs, advantages, mask)
    log_ratio = (logp - old).detach()  # log w_{i,t}, 0 off the mask  [B, T]
    if sequence:
        log_ratio = log_ratio.sum(1, keepdim=True)  # of the completion  [B, 1]
    # c = 1 where A > 0, else clamp(w, 0, 1)
    c = exp_ratio(log_ratio).clamp(max=1).masked_fill(A > 0, 1)  # [B, T]
    # - 1/sum_i |o_i| sum_{i,t} c A logp
    return -token_mean(c * A * logp, mask)
