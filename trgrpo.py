"""TR-GRPO: Token-Regulated GRPO. arXiv 2511.00066v1 (later versions call it GRPO-SG).

    A_i as in GRPO                                                                           [B]
    w_{i,t} = pi_theta(o_{i,t}) / pi_old(o_{i,t})                                            [B, T]
    v_{i,t} = clip(alpha sigmoid(tau (pi_theta(o_{i,t}) - mu)), lower, upper)                [B, T]
    loss = - 1/B sum_i 1/|o_i| sum_t v min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)       scalar

GRPO, but each token has a weight v, without gradient, which grows with the token's probability:
the gradients of rare tokens are large and would drown the others.

Source: abstract, reviews, third-party code. They tell of a clipped sigmoid of the probability, with
alpha 2, tau 9, mu 0.25, L = lower = 1.0, U = upper = 1.4. How these enter is open; the option
`reading` has the two ways that do something:
- "shifted", our choice: alpha sigmoid(tau (pi - mu)); v leaves 1 at pi = mu, is 1.4 at 0.344;
- "outside": alpha (sigmoid(tau pi) - mu); v leaves 1 at pi = 0.122 and is 1.4 at 0.327.
alpha (sigmoid(pi / tau) - mu), of an untested config, is below 1 everywhere: v = 1.

Our choices too: eps 0.2 / 0.24; v stands outside the clip, as the abstract's argument needs.
`weight_inside_clip=True` is Eq. 9 as reviewers report it: min(v w A, clamp(v w, 1 - eps_low,
1 + eps_high) A). There v > 1 + eps_high clips away the gradient of confident tokens of right
answers, on the very first update.

Reviewers also report a KL term with the weight in it. It is off by default (a config has 0.01):

    loss = ... + beta 1/B sum_i 1/|o_i| sum_t (x - log x - 1),  x = v pi_ref / pi_theta

Worked example: grpo.py's ratios, with probabilities. w = 1.5 is clipped to 1.24.
- pi = 0.75: v = 1.4, because 2 sigmoid(9 * 0.5) = 1.978 is above U;
- pi = 0.27: v = 2 sigmoid(9 * 0.02) = 1.0898;
- pi = 0.2: v = 1, because 2 sigmoid(9 * -0.05) = 0.7787 is below L.

    >>> A, mask = torch.tensor([0.7070, -0.7070]), torch.tensor([[1, 1], [1, 0]])
    >>> pi, pi_old = torch.tensor([[[0.75, 0.27], [0.2, 1.0]], [[0.5, 0.3], [0.2, 1.0]]])
    >>> loss(pi.log(), pi_old.log(), A, mask)  # -((1.4 * 1.24 + 1.0898 * 0.9) / 2 - 1) * 0.7070 / 2
    tensor(-0.1267)
"""

import torch

from grpo import clip_term, exp_ratio, k3, prepare, sequence_mean

# No `advantages` here: the trainer takes GRPO's.


def weight(pi, alpha, tau, mu, lower, upper, reading):
    """v of tokens of probability pi. Raises ValueError for an unknown reading. [B, T]"""
    if reading == "shifted":
        v = alpha * torch.sigmoid(tau * (pi - mu))
    elif reading == "outside":
        v = alpha * (torch.sigmoid(tau * pi) - mu)
    else:
        raise ValueError(f"reading must be 'shifted' or 'outside'; got {reading!r}")
    return v.clamp(lower, upper)


def loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.24,
    alpha=2.0,
    tau=9.0,
    mu=0.25,
    lower=1.0,
    upper=1.4,
    reading="shifted",
    weight_inside_clip=False,
    beta=0.0,
    ref_logprobs=None,  # [B, T], of the frozen start policy; beta > 0 needs them
):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    if beta and ref_logprobs is None:
        raise ValueError(f"beta {beta} needs ref_logprobs, those of the frozen start policy")
    logp, old, A, mask, ref = prepare(logprobs, old_logprobs, advantages, mask, ref=ref_logprobs)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    v = weight(logp.detach().exp(), alpha, tau, mu, lower, upper, reading)  # [B, T]
    if weight_inside_clip:
        # min(v w A, clamp(v w, 1 - eps_low, 1 + eps_high) A)
        term = clip_term(v * ratio, A, eps_low, eps_high)
    else:
        # v min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)
        term = v * clip_term(ratio, A, eps_low, eps_high)
    if beta:
        # - beta (x - log x - 1),  x = v pi_ref / pi_theta
        term = term - beta * k3(ref + v.log(), logp)
    # - 1/B sum_i 1/|o_i| sum_t
    return -sequence_mean(term, mask)
