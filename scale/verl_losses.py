"""The seven algorithms in verl's registries, as policy losses and advantage estimators.

    VERL_USE_EXTERNAL_MODULES=verl_losses PYTHONPATH=scale python -m verl.trainer.main_ppo \\
        algorithm.adv_estimator=tepo actor_rollout_ref.actor.policy_loss.loss_mode=tepo ...

They have the names of our files. verl calls a policy loss once per micro-batch on every GPU, sums
the gradients of the micro-batches and averages those of the GPUs. None of the seven losses mixes
sequences. So each micro-batch's loss is multiplied by its share of the mini-batch's tokens or
sequences and by the number of GPUs; the results add up to the loss of the whole mini-batch. verl
gives the totals in global_batch_info.

From the config come the clip range, actor.clip_ratio_low and clip_ratio_high (README.md lists each
file's own), and actor.loss_agg_mode, which must name the algorithm's own average. A KL to a
reference is verl's use_kl_loss. Every other option has its file's default. Our "gspo" loss replaces
verl's own, which is equal. The estimator "grpo" stays verl's, which divides by std + 1e-6 where
ours divides by std + 1e-4.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import torch
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

# At the end of the path, so that none of our files hides a package of the same name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

AVERAGE = {
    "tepo": "token-mean",
    "dapo": "token-mean",
    "gtpo": "token-mean",
    "grpo": "seq-mean-token-mean",
    "gspo": "seq-mean-token-mean",
    "grpo_s": "seq-mean-token-mean",
    "trgrpo": "seq-mean-token-mean",
}
# [B, T] nats, of the rollout whose advantages are computed next; verl_entropy.py sets it.
sampling_entropy = None


def policy_loss(algo):
    """algo.loss in verl's signature: tensors [b, T] and an ActorConfig -> (scalar, metrics)."""
    module = importlib.import_module(algo)

    def loss(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode="token-mean",
        config=None,
        rollout_is_weights=None,
    ):
        if loss_agg_mode != AVERAGE[algo]:
            raise ValueError(
                f"{algo} averages by {AVERAGE[algo]}: "
                f"set actor.loss_agg_mode to it, not {loss_agg_mode}"
            )
        mask = response_mask != 0
        if rollout_is_weights is not None:
            # A weight is not negative, so it multiplies the token's term of the loss.
            advantages = advantages * rollout_is_weights
        if algo == "grpo_s":  # one advantage per sequence, which verl repeats on every token
            advantages = (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
        low, high = clip_range(config)
        value = module.loss(log_prob, old_log_prob, advantages, mask, eps_low=low, eps_high=high)
        logged = metrics(value, log_prob, old_log_prob, advantages, mask)
        return scaled(algo, value, mask, config.global_batch_info), logged

    return loss


def clip_range(config):
    """(low, high); where the config leaves one out, its clip_ratio."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    low = config.clip_ratio if low is None else low
    high = config.clip_ratio if high is None else high
    return low, high


def scaled(algo, value, mask, info):
    """The micro-batch's loss times its share of the mini-batch and the number of GPUs.

    info: verl's global_batch_info. Without a total, on one GPU, the micro-batch is the whole.
    """
    if AVERAGE[algo] == "token-mean":
        count, key = mask.sum(), "batch_num_tokens"
    else:
        count, key = len(mask), "global_batch_size"
    total, gpus = info.get(key), info.get("dp_size", 1)
    if total is not None:
        return value * count / total * gpus
    if gpus > 1:
        raise ValueError(f"{algo} needs {key} in global_batch_info on {gpus} GPUs")
    return value


def metrics(value, log_prob, old_log_prob, advantages, mask):
    """Two metrics of this micro-batch, under verl's names.

    actor/ppo_kl: KL(pi_old || pi_theta) in nats per completion token, as the mean of
    log pi_old - log pi_theta (k1, as in verl: unbiased, may be negative).
    actor/pg_clipfrac: of the tokens with an advantage (verl: of all tokens), the share to which the
    clip leaves no gradient. The loss has no KL term here.
    """
    kl = (old_log_prob - log_prob.detach())[mask].mean()
    logged = {"actor/ppo_kl": kl.nan_to_num().item()}
    if log_prob.requires_grad:  # not in a forward pass alone
        per_token = advantages if advantages.ndim == 2 else advantages[:, None]
        signal = mask & per_token.ne(0)
        push = torch.autograd.grad(value, log_prob, retain_graph=True)[0]
        clipped = (push[signal] == 0).float().mean()
        logged["actor/pg_clipfrac"] = clipped.nan_to_num().item()
    return logged


def estimator(algo):
    """algo.advantages in verl's signature.

    token_level_rewards [B, T], response_mask [B, T], index [B] (the prompts' ids) ->
    (advantages, returns), both [B, T]. The rows of a prompt may be in any order. A row alone in its
    group gets 0.
    """
    module = importlib.import_module(algo)

    def advantages(token_level_rewards, response_mask, index, config=None, **_):
        if algo in ("gtpo", "grpo_s"):
            check_entropy(algo, response_mask)
        rewards = token_level_rewards.sum(1)
        A = torch.zeros_like(token_level_rewards)
        for prompt in np.unique(index):
            rows = torch.from_numpy(np.flatnonzero(index == prompt))
            if len(rows) == 1:
                continue
            entropy = None if sampling_entropy is None else sampling_entropy[rows]
            mask = response_mask[rows]
            a = module.advantages(rewards[rows], len(rows), entropy=entropy, mask=mask)
            A[rows] = a if a.ndim == 2 else a[:, None].expand(-1, A.shape[1])
        A = A * response_mask
        return A, A

    return advantages


def check_entropy(algo, response_mask):
    if sampling_entropy is None or sampling_entropy.shape != response_mask.shape:
        raise ValueError(
            f"{algo} needs the sampling policy's entropies, which verl does not give to "
            f"estimators: set VERL_USE_EXTERNAL_MODULES=verl_losses,verl_entropy"
        )


for name in AVERAGE:
    register_policy_loss(name)(policy_loss(name))
    if name != "grpo":  # for this name verl's trainer always calls its own
        register_adv_est(name)(estimator(name))
