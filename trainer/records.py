"""What a step records: a line of metrics.jsonl and, every few steps, a group for samples.jsonl."""

import sys
from statistics import fmean

import torch

from grpo import constant
from trainer.decoding import token_texts

try:
    import resource
except ImportError:  # Windows
    resource = None


def metrics_line(rollout, every, updates, group_size):
    """The metrics of a step, without its times. docs/metrics.md defines each of them.

    rollout: the rows trained on. every: all that were sampled for it. updates: list of what
    Updater.update returned. Each metric is taken over one of these three only.
    """
    groups = every.rewards.view(-1, group_size)
    mask, right = rollout.mask, rollout.right
    advantages = per_token(rollout.advantages, mask)  # [B, T]
    # A right completion's token with A < 0, or a wrong one's with A > 0.
    sign_flip = torch.where(right[:, None] > 0.5, advantages < 0, advantages > 0)
    signal = max(1, sum(update["signal"] for update in updates))  # tokens
    ratios = []
    for update in updates:
        ratios += update["ratio"]
    measured = mask & rollout.measured[:, None].to(mask.device)  # [B, T]
    sampler_log_ratio = (rollout.old_logprobs - rollout.sampler_logprobs)[measured]
    norms = [update["grad_norm"] for update in updates if update["grad_norm"] is not None]
    return {
        "reward": every.rewards.mean().item(),
        "accuracy": every.right.mean().item(),
        "accuracy_trained": right.mean().item(),
        "entropy": rollout.entropy[mask].mean().item(),
        "kl": sum(update["kl"] for update in updates) / signal,
        "clip_frac": sum(update["clipped"] for update in updates) / signal,
        "ratio_first": sum(ratios) / len(ratios) if ratios else None,
        "ratio_first_max": furthest_from_1(ratios) if ratios else None,
        "sampler_kl": kl_estimate(sampler_log_ratio, 0.0).mean().item() if measured.any() else None,
        "sampler_ratio_max": sampler_log_ratio.max().exp().item() if measured.any() else None,
        "grad_norm": sum(norms) / len(norms) if norms else None,
        "length": every.mask.sum(1).float().mean().item(),
        "length_wrong": length_of_wrong(every.mask, every.right),
        "truncated": every.truncated.float().mean().item(),
        "zero_std": constant(groups).float().mean().item(),
        "sign_flip": sign_flip[mask].float().mean().item(),
        "skipped": sum(bool(update["bad_rows"]) for update in updates),
        "prompts": len(groups),
        **mean_parts(every.parts or []),
    }


def nonzero_advantages(rollout):
    """Which tokens have an advantage other than 0. [B, T] bool"""
    advantages = rollout.advantages.view(len(rollout.prompts), -1)  # [B, 1] or [B, T]
    return rollout.mask & (advantages != 0)


def kl_estimate(logprobs, old_logprobs):
    """(w - 1) - log w with w = pi_theta / pi_old, in nats, at tokens sampled from pi_old. [B, T]

    Its mean over samples of pi_old is an unbiased estimate of KL(pi_old || pi_theta), because
    E[w] = 1, and no term is negative.
    """
    log_ratio = logprobs - old_logprobs
    # clamp: w must not overflow (the losses clamp at 20 too).
    # expm1: for w near 1, w - 1 would lose its digits to rounding.
    return log_ratio.clamp(max=20).expm1() - log_ratio


def length_of_wrong(mask, right):
    """Mean length in tokens of the completions that are not right; None if all are."""
    lengths = [n for n, is_right in zip(mask.sum(1).tolist(), right, strict=True) if is_right < 0.5]
    return fmean(lengths) if lengths else None


def mean_parts(parts):
    """{"reward/NAME": mean of the part} of a list of one dict for each completion."""
    names = parts[0] if parts else {}
    return {f"reward/{name}": fmean(row[name] for row in parts) for name in names}


def furthest_from_1(ratios):
    """The largest |w - 1| of a list of ratios; NaN if one of them is NaN."""
    return (torch.tensor(ratios, dtype=torch.float64) - 1).abs().max().item()


def per_token(advantages, mask):
    """Advantages [B] or [B, T] -> [B, T], the shape of mask."""
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    return advantages.expand(mask.shape)


def sample_lines(step, rollout, rows, tokenizer, **more):
    """One dict for each of the rows: the completion, and the training numbers of its tokens.

    more: further entries of each dict.
    """
    columns = {
        "advantages": per_token(rollout.advantages, rollout.mask),
        "logprobs": rollout.logprobs,
        "old_logprobs": rollout.old_logprobs,
        "entropy": rollout.entropy,
    }
    lines = []
    for i in rows:
        problem = rollout.problems[i]
        n = int(rollout.mask[i].sum())  # tokens
        ids = rollout.completions[i, :n].tolist()
        line = {
            "step": step,
            "prompt": problem["question"],
            "completion": rollout.texts[i],
            "answer": problem["answer"],
            "right": rollout.right[i].item() > 0.5,
            "reward": rollout.rewards[i].item(),
            "tokens": token_texts(tokenizer, ids, ended=not rollout.truncated[i]),
        }
        for name, values in columns.items():
            line[name] = [round(value, 6) for value in values[i, :n].tolist()]
        line.update(more)
        lines.append(line)
    return lines


def group_to_show(rollout, group_size):
    """The rows (a range) of the last group with both right and wrong completions, else of the last.

    The last, because the policy has moved most by the time of its update.
    """
    starts = range(0, len(rollout.prompts), group_size)
    groups = [range(start, start + group_size) for start in starts]
    one_sided = constant(rollout.right.view(-1, group_size)).flatten().tolist()  # [P]
    mixed = [group for group, same in zip(groups, one_sided, strict=True) if not same]
    return (mixed or groups)[-1]


def peak_mib(device):
    """Peak memory so far, in MiB: of the GPU's allocator, or of the whole process on a CPU.

    None where the system does not report it (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    units_per_mib = 2**20 if sys.platform == "darwin" else 2**10  # macOS: bytes; Linux: KiB
    return peak / units_per_mib
