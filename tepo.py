"""TEPO: Token-Level Policy Optimization. arXiv 2510.09369v1 (abstract); the KL mask: arXiv 2604.12736 (abstract).

    A_i as in GRPO                                                                          [B]      our choice
    s_i = exp(1/|o_i| sum_t log(pi_theta(o_{i,t}) / pi_old(o_{i,t})))                       [B]
    loss = - 1/sum_i |o_i| sum_i sum_t min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A)      scalar

The sequence likelihood factorises over tokens ("Markov likelihood"); its geometric-mean ratio s_i, the same as GSPO's,
links the reward of a completion to its tokens, and the loss averages over tokens. With one advantage a sequence that is
the whole difference: TEPO weighs sequence i by |o_i| / sum_j |o_j| where GSPO weighs each by 1/B.

Our choices, where the source is silent: 1/sum |o_i| as DAPO has it; with advantages [B, T] the ratio is GSPO-token's,
stopgrad(s_i) pi_theta / stopgrad(pi_theta): the same value, but each token's gradient carries its own advantage; eps
0.2 / 0.28, of the DAPO setting the paper trains in (its own values are not known to us). s_i moves on a 1e-3 scale, so
these rarely bind: watch clip_frac, and try GSPO's with --option eps_low=3e-4 --option eps_high=4e-4.

2604.12736 adds a KL penalty "masked to tokens with positive advantages and decreasing entropy"; off by default:

    + kl_coef 1/sum_i |o_i| sum_{i,t} M k3,    M_{i,t} = 1[A_{i,t} > 0] 1[H_{i,t} < H_old,{i,t} - 1e-4]

H is the measured entropy of pi_theta, H_old that of pi_old; k3 is taken against pi_old unless ref_logprobs is given; M
carries no gradient and the denominator counts all tokens [ours].

Worked example: grpo.py's batch. s_0 = sqrt(1.5 x 0.9) = 1.1619 stands for both tokens of row 0, s_1 = 1.

    >>> import torch
    >>> A = advantages(torch.tensor([1.0, 0.0]), group_size=2)
    >>> mask = torch.tensor([[1, 1], [1, 0]])
    >>> loss(torch.tensor([[1.5, 0.9], [1.0, 1.0]]).log(), torch.zeros(2, 2), A, mask)
    tensor(-0.3120)
    >>> round(-(2 * 1.1619 - 1.0) * 0.7070 / 3, 4)
    -0.312
"""

from grpo import advantages, clip_term, exp_ratio, k3, prepare, row_mean, token_mean

__all__ = ["advantages", "loss"]


def loss(
    logprobs, old_logprobs, advantages, mask, *,
    eps_low=0.2, eps_high=0.28, kl_coef=0.0, entropy=None, old_entropy=None, ref_logprobs=None,
):  # fmt: skip
    """All [B, T], advantages [B] or [B, T] -> scalar to be minimised. kl_coef > 0 needs entropy and old_entropy, in
    nats. Raises ValueError on shapes that do not fit and on missing entropies.
    """
    if kl_coef and (entropy is None or old_entropy is None):
        raise ValueError(
            f"kl_coef {kl_coef} needs entropy and old_entropy, the policy's and the sampling policy's"
        )
    per_token = advantages.ndim == 2
    logp, old, A, mask, ref, H, H_old = prepare(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        old_entropy=old_entropy,
    )
    ratio = exp_ratio(row_mean(logp - old, mask))[
        :, None
    ]  # s_i  [B, 1]: a mean of log-ratios, never their sum
    if per_token:
        ratio = ratio.detach() * (logp - logp.detach()).exp()  # [B, T]
    # - 1/sum_i |o_i| sum_i sum_t min(s A, clamp(s, 1 - eps_low, 1 + eps_high) A)
    policy_loss = -token_mean(clip_term(ratio, A, eps_low, eps_high), mask)
    if not kl_coef:
        return policy_loss
    # M = 1[A > 0] 1[H < H_old - 1e-4];  + kl_coef 1/sum_i |o_i| sum_{i,t} M k3
    decreasing = (A > 0) & (H < H_old - 1e-4)  # [B, T]
    return policy_loss + kl_coef * token_mean(
        decreasing * k3(old if ref is None else ref, logp), mask
    )
