"""What a step carries from sampling to the update: the completions and their data."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import pad


@dataclass
class Rollout:
    """B completions and their data. The group_size rows of one prompt are contiguous."""

    prompts: list  # B lists of token ids, without padding
    completions: torch.Tensor  # [B, T] token ids, right-padded
    mask: torch.Tensor  # [B, T] bool, on through the first EOS
    truncated: torch.Tensor  # [B] bool: no EOS within max_new_tokens
    sampler_logprobs: torch.Tensor = None  # [B, T] nats, under the sampler
    sampler_entropy: torch.Tensor = None  # [B, T] nats, of the sampler
    problems: list = None  # B problems
    texts: list = None  # B completions, decoded
    right: torch.Tensor = None  # [B] 1 where the answer is right
    rewards: torch.Tensor = None  # [B] what the policy is trained on
    parts: list = None  # B dicts, {name: part of the reward}; empty if it is one number
    old_logprobs: torch.Tensor = None  # [B, T] nats, under the policy that sampled
    entropy: torch.Tensor = None  # [B, T] nats, of the policy that sampled
    measured: torch.Tensor = None  # [B] bool: both are of the policy's own pass, not the sampler's
    ref_logprobs: torch.Tensor = None  # [B, T] under the start policy, if the loss needs it
    history: list = None  # the mean rewards of the steps before this one, oldest first
    advantages: torch.Tensor = None  # [B] or [B, T]
    logprobs: torch.Tensor = None  # [B, T] before the latest update on the row

    @property
    def lengths(self):
        """Tokens of each row, prompt and completion together. [B], on the CPU."""
        return self.mask.sum(1).cpu() + torch.tensor([len(p) for p in self.prompts])

    def groups(self, group_size):
        """One Rollout per group, with the fields named in SAMPLED."""
        starts = range(0, len(self.prompts), group_size)
        return [self.rows(start, start + group_size) for start in starts]

    def rows(self, start, stop):
        """The rows start to stop - 1, with the fields named in SAMPLED."""
        rows = Rollout(None, None, None, None)
        for name in SAMPLED:
            values = getattr(self, name)
            setattr(rows, name, None if values is None else values[start:stop])
        return rows

    @staticmethod
    def join(pieces):
        """Concatenate Rollouts; shorter completions are padded to the longest. Fields: SAMPLED."""
        width = max(piece.mask.shape[1] for piece in pieces)
        joined = Rollout(None, None, None, None)
        for name in SAMPLED:
            column = [getattr(piece, name) for piece in pieces]
            if column[0] is None:
                continue
            if name in ("completions", "mask", "sampler_logprobs", "sampler_entropy"):
                column = [pad(x, (0, width - x.shape[1])) for x in column]
            is_list = isinstance(column[0], list)
            setattr(joined, name, sum(column, []) if is_list else torch.cat(column))
        return joined


# The fields that are filled in before the advantages: by sampling and by the reward.
SAMPLED = (
    "prompts",
    "completions",
    "mask",
    "truncated",
    "sampler_logprobs",
    "sampler_entropy",
    "problems",
    "texts",
    "right",
    "rewards",
    "parts",
)


def sampler_weights(rollout, most):
    """min(pi_old / sampler, most) for each whole completion, [B]: an importance weight.

    In bf16 the sampler is a bf16 copy of the policy, and computes slightly other probabilities.
    E over the sampler of (pi_old / sampler) f is E over the policy of f. Truncation bounds the
    variance, at the price of a bias (our choice: one weight per sequence, as its advantage).
    """
    log_ratio = rollout.old_logprobs - rollout.sampler_logprobs  # [B, T]
    return log_ratio.masked_fill(~rollout.mask, 0).sum(1).clamp(max=math.log(most)).exp()


def corrected(advantages, rollout, most):
    """The advantages [B] or [B, T], times their row's sampler_weights unless `most` is 0."""
    if not most:
        return advantages
    weights = sampler_weights(rollout, most)  # [B]
    return advantages * (weights if advantages.ndim == 1 else weights[:, None])
