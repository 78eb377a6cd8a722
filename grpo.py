"""GRPO: Group Relative Policy Optimization. DeepSeekMath, arXiv 2402.03300, section 4.1.

    A_i = (r_i - mean_group r) / (std_group r + 1e-4)                                   [B]
    w_{i,t} = pi_theta(o_{i,t}) / pi_old(o_{i,t})                                       [B, T]
    loss = - 1/B sum_i 1/|o_i| sum_t min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)    scalar
           + beta 1/B sum_i 1/|o_i| sum_t k3      k3 estimates KL(pi_theta || pi_ref)

Our choices: std with Bessel's correction and + 1e-4, as in TRL and verl; beta 0 (paper: 0.04).
Read this file first: the other six import its helpers.

Worked example: completions of 2 tokens and 1 token, the first is right. w = 1.5 is clipped to 1.2.

    >>> A = advantages(torch.tensor([1.0, 0.0]), group_size=2)  # (1 - 0.5) / (0.70711 + 1e-4)
    >>> A
    tensor([ 0.7070, -0.7070])
    >>> mask = torch.tensor([[1, 1], [1, 0]])
    >>> loss(torch.tensor([[1.5, 0.9], [1.0, 1.0]]).log(), torch.zeros(2, 2), A, mask)
    tensor(-0.0177)
    >>> round(-((1.2 + 0.9) / 2 * 0.7070 - 1.0 * 0.7070) / 2, 4)
    -0.0177
"""

import torch


def split_groups(rewards, group_size):
    """rewards [B], each prompt's rows contiguous -> [B/G, G], at least fp32, or a ValueError."""
    if rewards.ndim != 1 or group_size < 2 or len(rewards) % group_size:
        need = "rewards must be [B] with B a multiple of a group_size of at least 2"
        raise ValueError(f"{need}; got rewards {list(rewards.shape)}, group_size {group_size}")
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return rewards.detach().to(dtype).view(-1, group_size)


def prepare(logprobs, old_logprobs, advantages, mask, **others):
    """Raise to fp32 (1 + 4e-4 is 1 in bf16), detach all but logprobs, put 0 where mask is 0.

    advantages [B] or [B, T]; the rest [B, T]; `others` may be None. Returns them in this order,
    all [B, T], mask as 0/1, None as None. Raises ValueError if the shapes do not fit.
    """
    tensors = {"logprobs": logprobs, "old_logprobs": old_logprobs, "mask": mask, **others}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    shape, off = logprobs.shape, mask == 0
    fits = logprobs.ndim == 2 and all(x.shape == shape for x in tensors.values())
    if not fits or advantages.shape not in (shape, shape[:1]):
        tensors["advantages"] = advantages
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"need [B, T] throughout and advantages [B] or [B, T]; got {shapes}")
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(shape)  # [B] -> [B, T]
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    fixed = [old_logprobs, advantages, *others.values()]
    fixed = [None if x is None else x.detach().to(dtype).masked_fill(off, 0) for x in fixed]
    return logprobs.to(dtype).masked_fill(off, 0), *fixed[:2], (~off).to(dtype), *fixed[2:]


def exp_ratio(log_ratio):
    """exp of a log-ratio of any shape, clamped to +-20 first so that no ratio overflows."""
    return log_ratio.clamp(-20, 20).exp()


def clip_term(ratio, advantages, eps_low, eps_high):
    """PPO's objective, min(ratio A, clamp(ratio, 1 - eps_low, 1 + eps_high) A). Broadcasts."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)


def k3(ref_logprobs, logprobs):
    """Schulman's k3, pi_ref/pi_theta - log(pi_ref/pi_theta) - 1: nats per token, >= 0. [B, T]"""
    log_ratio = (ref_logprobs - logprobs).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def row_mean(x, mask):
    """1/|o_i| sum_t m x: [B, T] -> [B]; a row with an empty mask gives 0."""
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def sequence_mean(x, mask):
    """1/B sum_i 1/|o_i| sum_t m x: every sequence has the same weight. [B, T] -> scalar"""
    return row_mean(x, mask).sum() / max(len(x), 1)


def token_mean(x, mask):
    """sum_{i,t} m x / sum_{i,t} m: every token has the same weight. [B, T] -> scalar"""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def constant(groups):
    """Whether a group's values are all equal (their std need not be 0): [P, G] -> [P, 1] bool."""
    return groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)


def advantages(rewards, group_size, *, entropy=None, mask=None):
    """Rewards standardised within their group, 0 if constant: [B] -> [B], or a ValueError."""
    r = split_groups(rewards, group_size)  # [B/G, G]; entropy and mask are not used
    # A_i = (r_i - mean r) / (std r + 1e-4)
    a = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    return a.masked_fill(constant(r), 0).flatten()  # [B]


def loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.2,
    beta=0.0,
    ref_logprobs=None,  # [B, T], under pi_ref, the frozen start policy; beta > 0 needs them
):
    """All [B, T], advantages [B] or [B, T] -> scalar to minimise, or a ValueError."""
    if beta and ref_logprobs is None:
        raise ValueError(f"beta {beta} needs ref_logprobs, those of the frozen start policy")
    logp, old, A, mask, ref = prepare(logprobs, old_logprobs, advantages, mask, ref=ref_logprobs)
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    # - 1/B sum_i 1/|o_i| sum_t min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)
    policy_loss = -sequence_mean(clip_term(ratio, A, eps_low, eps_high), mask)
    # + beta 1/B sum_i 1/|o_i| sum_t k3
    return policy_loss + beta * sequence_mean(k3(ref, logp), mask) if beta else policy_loss
