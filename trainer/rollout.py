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

    def pick(self, rows):
        """The rows with these indices, a list. For a rollout that has no advantages yet."""

        def of(values):
            return [values[i] for i in rows] if isinstance(values, list) else values[rows]

        columns = vars(self).items()
        return Rollout(**{name: of(values) for name, values in columns if values is not None})

    @staticmethod
    def join(pieces):
        """Concatenate rollouts without advantages; completions are padded to the longest."""
        width = max(piece.mask.shape[1] for piece in pieces)
        columns = {}
        for name, first in vars(pieces[0]).items():
            column = [getattr(piece, name) for piece in pieces]
            if isinstance(first, list):
                columns[name] = sum(column, [])
            elif first is not None:
                if first.ndim == 2:
                    column = [pad(x, (0, width - x.shape[1])) for x in column]
                columns[name] = torch.cat(column)
        return Rollout(**columns)


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
