"""GRPO: Group Relative Policy Optimization. DeepSeekMath, arXiv 2402.03300, section 4.1 (outcome supervision).

    A_i = (r_i - mean_group r) / (std_group r + 1e-4)                                       [B]
    w_{i,t} = pi_theta(o_{i,t}) / pi_old(o_{i,t})                                           [B, T]
    loss = - 1/B sum_i 1/|o_i| sum_t min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)        scalar
           + beta 1/B sum_i 1/|o_i| sum_t (pi_ref/pi_theta - log pi_ref/pi_theta - 1)       the k3 estimate of the KL

Our choice: std has Bessel's correction and + 1e-4, as TRL and verl compute it; beta is 0 by default (the paper: 0.04).

Read this file first: what the seven files share stands here, once, and above `advantages`. Our choices for all of them:
less than fp32 is raised to fp32 (1 + 4e-4 is 1 in bf16); log-ratios are clamped to +-20 before exp; everything but
`logprobs` is detached; a mask entry is on where it is not 0, and nothing that stands elsewhere matters, NaN included.

Worked example: one prompt, two completions, the first right, of 2 tokens and 1 token; the policy has moved on row 0.

    >>> import torch
    >>> A = advantages(torch.tensor([1.0, 0.0]), group_size=2)                         # (1 - 0.5) / (0.70711 + 1e-4)
    >>> A
    tensor([ 0.7070, -0.7070])
    >>> mask = torch.tensor([[1, 1], [1, 0]])
    >>> loss(torch.tensor([[1.5, 0.9], [1.0, 1.0]]).log(), torch.zeros(2, 2), A, mask)  # w = 1.5 is clipped to 1.2
    tensor(-0.0177)
    >>> round(-((1.2 + 0.9) / 2 * 0.7070 - 1.0 * 0.7070) / 2, 4)
    -0.0177
"""

import torch


def split_groups(rewards, group_size):
    """rewards [B], a prompt's rows contiguous -> [B / group_size, group_size], at least fp32. Raises ValueError."""
    if rewards.ndim != 1 or group_size < 2 or len(rewards) % group_size:
        raise ValueError(
            f"rewards must be [B] with B a multiple of a group_size of at least 2; "
            f"got rewards {list(rewards.shape)}, group_size {group_size}"
        )
    return (
        rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group_size)
    )


def prepare(logprobs, old_logprobs, advantages, mask, **others):
    """Check shapes, raise to fp32, detach all but logprobs, and put 0 wherever mask is off.

    logprobs, old_logprobs, mask and each of `others` [B, T]; advantages [B] or [B, T]. Returns all as [B, T], in that
    order, mask as 0/1; `others` that are None stay None. Raises ValueError with the shapes if they do not fit.
    """
    shape = logprobs.shape
    tensors = {"old_logprobs": old_logprobs, "mask": mask} | {
        k: v for k, v in others.items() if v is not None
    }
    fits = logprobs.ndim == 2 and all(x.shape == shape for x in tensors.values())
    if not fits or advantages.shape not in (shape, shape[:1]):
        tensors = {"logprobs": logprobs} | tensors | {"advantages": advantages}
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"need [B, T] throughout and advantages [B] or [B, T]; got {shapes}")
    dtype, off = torch.promote_types(logprobs.dtype, torch.float32), mask == 0
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(shape)  # [B] -> [B, T]

    def clean(x):
        return x.to(dtype).masked_fill(off, 0)

    fixed = (old_logprobs, advantages, *others.values())
    old_logprobs, advantages, *others = (None if x is None else clean(x.detach()) for x in fixed)
    return clean(logprobs), old_logprobs, advantages, (~off).to(dtype), *others


def exp_ratio(log_ratio):
    """exp of a log-ratio of any shape, clamped to +-20 first so that no ratio overflows."""
    return log_ratio.clamp(-20, 20).exp()


def clip_term(ratio, advantages, eps_low, eps_high):
    """PPO's clipped objective, min(ratio A, clamp(ratio, 1 - eps_low, 1 + eps_high) A); shapes broadcast."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)


def k3(ref_logprobs, logprobs):
    """Schulman's k3 estimate of KL(pi_theta || pi_ref) from pi_theta's samples, in nats, never negative. [B, T]"""
    log_ratio = (ref_logprobs - logprobs).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def row_mean(x, mask):
    """1/|o_i| sum_t m x: [B, T] -> [B]; a row with an empty mask gives 0."""
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def sequence_mean(x, mask):
    """1/B sum_i 1/|o_i| sum_t m x: every sequence weighs the same. [B, T] -> scalar"""
    return row_mean(x, mask).sum() / max(len(x), 1)


def token_mean(x, mask):
    """sum_{i,t} m x / sum_{i,t} m: every token weighs the same. [B, T] -> scalar"""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def constant(groups):
    """Whether all values of a group are equal: [P, G] -> [P, 1] bool.

    Detected by max == min, because the floating-point std of equal numbers need not be 0.
    """
    return groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)


def advantages(rewards, group_size, *, entropy=None, mask=None):
    """Rewards standardised within their group: rewards [B] -> [B]; entropy and mask are not used.

    A group whose rewards are all equal gets exactly 0. Raises ValueError if group_size is below 2 or does not divide B.
    """
    r = split_groups(rewards, group_size)  # [B/G, G]
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
    ref_logprobs=None,
):
    """All [B, T], advantages [B] or [B, T] -> scalar to be minimised. beta > 0 needs ref_logprobs [B, T], the log-
    probabilities under the frozen start policy. Raises ValueError on shapes that do not fit and on a missing reference.
    """
    if beta and ref_logprobs is None:
        raise ValueError(
            f"beta {beta} needs ref_logprobs, the log-probabilities under the frozen start policy"
        )
    logp, old, A, mask, ref = prepare(
        logprobs, old_logprobs, advantages, mask, ref_logprobs=ref_logprobs
    )
    ratio = exp_ratio(logp - old)  # w_{i,t}  [B, T]
    # - 1/B sum_i 1/|o_i| sum_t min(w A, clamp(w, 1 - eps_low, 1 + eps_high) A)
    policy_loss = -sequence_mean(clip_term(ratio, A, eps_low, eps_high), mask)
    # + beta 1/B sum_i 1/|o_i| sum_t k3
    return policy_loss + beta * sequence_mean(k3(ref, logp), mask) if beta else policy_loss
