"""What a step writes down: its line of metrics.jsonl and, now and then, a group of completions for samples.jsonl."""

import sys

import torch

from grpo import constant
from trainer.policy import Rollout

try:
    import resource
except ImportError:  # Windows
    resource = None

# The largest |pi_theta / pi_old - 1| before a rollout's first update that rounding explains.
RATIO_LIMITS = {"fp32": 1e-3, "bf16": 2e-2}


def metrics_line(rollout, sampled, updates, group_size):
    """The step's numbers but for its times; the README's table says what each means.

    rollout: the rows trained on; sampled: list of everything sampled for it; updates: what
    Updater.update returned. A metric covers one of these sets of rows only.
    """
    r, every = rollout, Rollout.join(sampled)
    groups = every.rewards.view(-1, group_size)
    A = per_token(r.advantages, r.mask)
    against = torch.where(r.right[:, None] > 0.5, A < 0, A > 0)  # [B, T]
    signal = max(1, sum(u["signal"] for u in updates))
    ratios = [ratio for u in updates for ratio in u["ratio"]]
    norms = [u["grad_norm"] for u in updates if u["grad_norm"] is not None]
    return {
        "reward": every.rewards.mean().item(),
        "accuracy": every.right.mean().item(),
        "accuracy_trained": r.right.mean().item(),
        "entropy": r.entropy[r.mask].mean().item(),
        "kl": sum(u["kl"] for u in updates) / signal,
        "clip_frac": sum(u["clipped"] for u in updates) / signal,
        "ratio_first": sum(ratios) / len(ratios) if ratios else None,
        "ratio_first_max": furthest_from_1(ratios) if ratios else None,
        "grad_norm": sum(norms) / len(norms) if norms else None,
        "length": every.mask.sum(1).float().mean().item(),
        "truncated": every.truncated.float().mean().item(),
        "zero_std": constant(groups).float().mean().item(),
        "sign_flip": against[r.mask].float().mean().item(),
        "skipped": sum(bool(u["bad_rows"]) for u in updates),
        "prompts": len(groups),
    }


def furthest_from_1(ratios):
    """The largest |w - 1| of a list; NaN if one is NaN."""
    return (torch.tensor(ratios, dtype=torch.float64) - 1).abs().max().item()


def ratio_warning(step, largest, dtype):
    """A warning if a ratio is not 1 although nothing has been trained yet, else None.

    largest: ratio_first_max, None if nothing was run.
    """
    limit = RATIO_LIMITS[dtype]
    if largest is None or largest <= limit:  # NaN is told
        return None
    return (
        f"warning: step {step}: before its first update pi_theta / pi_old is off 1 by up to "
        f"{largest:.2g} (rounding in {dtype} explains {limit:g}): two passes of the same weights "
        f"differ, so every ratio is off by as much. Is something random, such as dropout, left in the model? "
        f"Said once; see ratio_first_max in metrics.jsonl"
    )


def per_token(advantages, mask):
    """[B] or [B, T] -> [B, T]"""
    return (advantages[:, None] if advantages.ndim == 1 else advantages).expand(mask.shape)


def sample_lines(step, rollout, rows, tokenizer, **more):
    """One object for each of the rows: the completion, and what training made of its tokens."""
    r, lines = rollout, []
    per = {
        "advantages": per_token(r.advantages, r.mask),
        "logprobs": r.logprobs,
        "old_logprobs": r.old_logprobs,
        "entropy": r.entropy,
    }
    for i in rows:
        n = int(r.mask[i].sum())
        line = {"step": step, "prompt": r.problems[i]["question"], "completion": r.texts[i]}
        line["answer"] = r.problems[i]["answer"]
        line["right"] = r.right[i].item() > 0.5
        line["reward"] = r.rewards[i].item()
        line["tokens"] = [tokenizer.decode([token]) for token in r.completions[i, :n].tolist()]
        for name, values in per.items():
            line[name] = [round(x, 6) for x in values[i, :n].tolist()]
        line.update(more)
        lines.append(line)
    return lines


def group_to_show(rollout, group_size):
    """Rows of the last group with right and wrong completions, else of the last group.

    In the last one the policy has moved most.
    """
    groups = [range(i, i + group_size) for i in range(0, len(rollout.prompts), group_size)]
    mixed = [g for g in groups if 0 < rollout.right[g.start : g.stop].sum() < group_size]
    return (mixed or groups)[-1]


def peak_mib(device):
    """The most memory held so far, in MiB: by the GPU's allocator, or by the whole process on a CPU.

    None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
