"""TEPO: Token-Level Policy Optimization. arXiv 2510.09369v1; with a KL mask: 2604.12736 (ACL 2026).

    A_i as in GRPO                                                                           [B]
    s_i = exp(1/|o_i| sum_t log(pi_theta(o_{i,t}) / pi_old(o_{i,t})))                        [B]
    loss = - 1/sum_i |o_i| sum_{i,t} min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A)         scalar

GSPO, but averaged over tokens: sequence i has the weight |o_i| / sum_j |o_j| instead of 1/B. With
one advantage per sequence, that and the clip range are the whole difference. The |o_i| cancels the
1/|o_i| in s_i: at s = 1, dL/dlogp_{i,t} = -A_i / sum_j |o_j|, as in DAPO. But the clip drops whole
sequences. The paper derives s_i from what it calls the "Markov likelihood".

Source: abstracts and readers' reports. Our choices, where they are silent:
- advantages: GRPO's; with advantages [B, T] the ratio is GSPO-token's (gspo.py);
- average: 1/sum_i |o_i|, as in DAPO;
- eps: 0.2 / 0.28, from the DAPO setting in which the paper trains; its own values are not known to
  us. s_i moves on a 1e-3 scale, so these rarely bind: watch clip_frac. Published ranges for s_i are
  GSPO's 3e-4 / 4e-4 and LUSPO's 2e-3 / 2.5e-3 (more/luspo.py: this loss times sum_i |o_i| / B):
  train.py --option eps_low=2e-3 --option eps_high=2.5e-3.

2604.12736 adds a KL penalty "masked to tokens with positive advantages and decreasing entropy":

    loss = ... + kl_coef 1/sum_i |o_i| sum_{i,t} M_{i,t} k3_{i,t}
    M_{i,t} = 1 if A_{i,t} > 0 and H_{i,t} < H_old,{i,t} - 1e-4, else 0                      [B, T]

H and H_old are the measured entropies of pi_theta and pi_old. Our choices: kl_coef is 0 by default;
k3 is taken against pi_old unless ref_logprobs is given; "decreasing" means by more than 1e-4 nats;
the average counts all tokens, not only those where M is 1. In a step's first update M is 0.

Worked example: grpo.py's batch. s_0 = sqrt(1.5 * 0.9) = 1.1619 for both tokens of row 0, s_1 = 1.

    >>> import torch
    >>> A, old = torch.tensor([0.7070, -0.7070]), torch.zeros(2, 2)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), old, A, mask)  # -(2 * 1.1619 - 1.0) * 0.7070 / 3
    tensor(-0.3120)
"""

from grpo import clip_term, exp_ratio, k3, prepare, row_mean, token_mean
from gspo import gspo_token

# No `advantages` here: the trainer takes GRPO's.


def loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.28,
    kl_coef=0.0,
    entropy=None,  # [B, T], nats, of pi_theta; kl_coef > 0 needs both entropies
    old_entropy=None,  # [B, T], nats, of pi_old
    ref_logprobs=None,  # [B, T]; None: the penalty is taken against old_logprobs
):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    if kl_coef and (entropy is None or old_entropy is None):
        need = "entropy and old_entropy, the policy's and the sampling policy's"
        raise ValueError(f"kl_coef {kl_coef} needs {need}")
    others = {"ref_logprobs": ref_logprobs, "entropy": entropy, "old_entropy": old_entropy}
    logp, old, A, mask, ref, H, H_old = prepare(logprobs, old_logprobs, advantages, mask, **others)
    # s_i = exp(1/|o_i| sum_t log w_{i,t}): a mean of the log-ratios, not their sum
    ratio = exp_ratio(row_mean(logp - old, mask))[:, None]  # [B, 1]
    if advantages.ndim == 2:
        ratio = gspo_token(ratio, logp)  # s_i, with the gradient of its own token  [B, T]
    # - 1/sum_i |o_i| sum_{i,t} min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A)
    policy_loss = -token_mean(clip_term(ratio, A, eps_low, eps_high), mask)
    if not kl_coef:
        return policy_loss
    # + kl_coef 1/sum_i |o_i| sum_{i,t} M k3,  M = 1 where A > 0 and H < H_old - 1e-4
    M = (A > 0) & (H < H_old - 1e-4)  # [B, T]
    return policy_loss + kl_coef * token_mean(M * k3(ref, logp), mask)
