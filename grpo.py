"""GRPO: Group Relative Policy Optimization. DeepSeekMath, arXiv 2402.03300, section 4.1.

o_i is completion i, drawn from pi_old; |o_i| counts its tokens, where mask m = 1; T is the longest.
The G completions of a prompt are a group. `advantages` gets a step's B rows, `loss` a mini-batch's.

    A_i = (r_i - mean_group r) / (std_group r + 1e-4)                            sec. 4.1.2  [B]
    w_{i,t} = pi_theta(o_{i,t}) / pi_old(o_{i,t})                                            [B, T]
    k3 = pi_ref / pi_theta - log(pi_ref / pi_theta) - 1                               Eq. 4  [B, T]
    loss = - 1/B sum_i 1/|o_i| sum_t min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)
           + beta 1/B sum_i 1/|o_i| sum_t k3                                          Eq. 3  scalar

Source: the paper's own text. Our choices: std with Bessel's correction, as in TRL and verl; + 1e-4,
as in TRL (verl: 1e-6); eps 0.2; beta 0 (paper: 0.04). pi_ref is the frozen start policy.
Read this file first: the others import its helpers, and take its `advantages` if they define none.

Worked example: completions of 2 tokens and 1 token, the first is right. w = 1.5 is clipped to 1.2.

    >>> A = advantages(torch.tensor([1.0, 0.0]), group_size=2)  # +-0.7070 = 0.5 / (0.70711 + 1e-4)
    >>> mask, ratios = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.5, 0.9], [1.0, 1.0]])
    >>> loss(ratios.log(), torch.zeros(2, 2), A, mask)  # -((1.2 + 0.9) / 2 - 1.0) * 0.7070 / 2
    tensor(-0.0177)
"""

import torch


def advantages(rewards, group_size):
    """Rewards standardised within their group, 0 if constant: [B] -> [B], or a ValueError."""
    r = split_groups(rewards, group_size)  # [B/G, G]
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
    ref_logprobs=None,  # [B, T], under pi_ref; beta > 0 needs them
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


def split_groups(rewards, group_size):
    """rewards [B], each prompt's rows contiguous -> [B/G, G], at least fp32, or a ValueError."""
    if rewards.ndim != 1 or group_size < 2 or len(rewards) % group_size:
        need = "rewards must be [B] with B a multiple of a group_size of at least 2"
        raise ValueError(f"{need}; got rewards {list(rewards.shape)}, group_size {group_size}")
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return rewards.detach().to(dtype).view(-1, group_size)


def constant(groups):
    """Whether a group's values are all equal (their std need not be 0): [P, G] -> [P, 1] bool."""
    return groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)


def exp_ratio(log_ratio):
    """exp of a log-ratio of any shape, clamped to +-20 first so that no ratio overflows."""
    return log_ratio.clamp(-20, 20).exp()


def clip_term(ratio, advantages, eps_low, eps_high):
    """PPO's objective, min(ratio A, clamp(ratio, 1 - eps_low, 1 + eps_high) A). Broadcasts."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)


def k3(ref_logprobs, logprobs):
    """Schulman's estimate of KL(pi_theta || pi_ref), Eq. 4: nats per token, >= 0. [B, T]"""
    log_ratio = (ref_logprobs - logprobs).clamp(-20, 20)
    return log_ratio.expm1() - log_ratio


def row_mean(x, mask):
    """1/|o_i| sum_t m x: [B, T] -> [B]; a row with an empty mask gives 0."""
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def sequence_mean(x, mask):
    """1/B sum_i 1/|o_i| sum_t m x: every sequence has the same weight. [B, T] -> scalar"""
    return row_mean(x, mask).sum() / max(len(x), 1)


def token_mean(x, mask):
    """sum_{i,t} m x / sum_{i,t} m: every token has the same weight. [B, T] -> scalar"""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def prepare(logprobs, old_logprobs, advantages, mask, **others):
    """A loss's tensors, ready for its formula, [B, T] each; old_logprobs stand in for None."""
    others = {name: old_logprobs if x is None else x for name, x in others.items()}
    check_shapes(advantages, logprobs=logprobs, old_logprobs=old_logprobs, mask=mask, **others)
    A = advantages if advantages.ndim == 2 else advantages[:, None].expand_as(logprobs)
    fixed = [x.detach() for x in (old_logprobs, A, *others.values())]  # no gradient
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    raised = [x.to(dtype) for x in (logprobs, *fixed)]  # at least fp32: in bf16, 1 + 4e-4 is 1
    logp, old, A, *rest = [x.masked_fill(mask == 0, 0) for x in raised]  # 0 off the mask, not NaN
    return logp, old, A, (mask != 0).to(dtype), *rest


def check_shapes(advantages, **tensors):
    """Raise ValueError unless the tensors are [B, T], and advantages [B] or [B, T]."""
    shape = tensors["logprobs"].shape
    fits = len(shape) == 2 and all(x.shape == shape for x in tensors.values())
    if not fits or advantages.shape not in (shape, shape[:1]):
        tensors["advantages"] = advantages
        got = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"need [B, T] throughout and advantages [B] or [B, T]; got {got}")
