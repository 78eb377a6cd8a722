"""The seven algorithms in verl's registries: policy losses and advantage estimators under our files' names.

    VERL_USE_EXTERNAL_MODULES=verl_losses PYTHONPATH=scale python -m verl.trainer.main_ppo \
        algorithm.adv_estimator=tepo actor_rollout_ref.actor.policy_loss.loss_mode=tepo ...

verl calls a policy loss once a micro-batch on every GPU, sums the gradients of the micro-batches and averages those of
the GPUs. None of the seven looks across sequences, so a micro-batch's loss, times its share of the mini-batch's tokens
or sequences and times the number of GPUs, adds up to the loss of the whole; verl gives the totals in global_batch_info.

What the config decides: the clip range is actor.clip_ratio_low and clip_ratio_high (README.md lists each file's own);
actor.loss_agg_mode must name the algorithm's own average, or the loss refuses. A KL to a reference is verl's
use_kl_loss. Every other option stands at its file's default. verl's own "gspo" loss is replaced, by an equal one; the
estimator "grpo" stays verl's, which divides by std + 1e-6 where ours has 1e-4.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import torch
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

sys.path.append(
    str(Path(__file__).resolve().parent.parent)
)  # last: evaluate.py must not hide a package of that name

AVERAGE = {
    "tepo": "token-mean", "dapo": "token-mean", "gtpo": "token-mean",
    "grpo": "seq-mean-token-mean", "gspo": "seq-mean-token-mean",
    "grpo_s": "seq-mean-token-mean", "trgrpo": "seq-mean-token-mean",
}  # fmt: skip
sampling_entropy = None  # [B, T] nats, of the rollout whose advantages are about to be computed; see verl_entropy.py


def policy_loss(algo):
    """algo.loss in verl's signature: tensors [b, T], an ActorConfig -> (scalar, metrics)."""
    module = importlib.import_module(algo)

    def loss(
        old_log_prob, log_prob, advantages, response_mask,
        loss_agg_mode="token-mean", config=None, rollout_is_weights=None,
    ):  # fmt: skip
        if loss_agg_mode != AVERAGE[algo]:
            raise ValueError(
                f"{algo} averages by {AVERAGE[algo]}: set actor.loss_agg_mode to it, not {loss_agg_mode}"
            )
        mask = response_mask != 0
        if (
            rollout_is_weights is not None
        ):  # the loss is linear in the advantages: this weighs each token's term
            advantages = advantages * rollout_is_weights
        if algo == "grpo_s":  # one advantage a sequence; verl carries it on every token
            advantages = (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
        low, high = (
            config.clip_ratio if x is None else x
            for x in (config.clip_ratio_low, config.clip_ratio_high)
        )
        value = module.loss(log_prob, old_log_prob, advantages, mask, eps_low=low, eps_high=high)

        info = config.global_batch_info
        by_tokens = AVERAGE[algo] == "token-mean"
        here, key = (
            (mask.sum(), "batch_num_tokens") if by_tokens else (len(mask), "global_batch_size")
        )
        total, gpus = info.get(key), info.get("dp_size", 1)
        if total is None and gpus > 1:
            raise ValueError(f"{algo} needs {key} in global_batch_info on {gpus} GPUs")
        logged = metrics(value, log_prob, old_log_prob, advantages, mask)
        return value if total is None else value * here / total * gpus, logged

    return loss


def metrics(value, log_prob, old_log_prob, advantages, mask):
    """Under verl's two names, of this micro-batch.

    ppo_kl: KL(pi_old || pi_theta), nats per completion token, as the mean of log pi_old - log pi_theta
    (k1, verl's own: unbiased, may be below 0). pg_clipfrac: of the tokens with an advantage (verl: of
    all), the share to which the clip leaves no gradient; the loss has no KL term here.
    """
    logged = {"actor/ppo_kl": (old_log_prob - log_prob.detach())[mask].mean().nan_to_num().item()}
    if log_prob.requires_grad:  # a forward pass alone has no gradient to look at
        signal = mask & (advantages if advantages.ndim == 2 else advantages[:, None]).ne(0)
        push = torch.autograd.grad(value, log_prob, retain_graph=True)[0]
        logged["actor/pg_clipfrac"] = (push[signal] == 0).float().mean().nan_to_num().item()
    return logged


def estimator(algo):
    """algo.advantages in verl's signature: token_level_rewards, response_mask [B, T], index [B] the prompts' ids ->
    (advantages, returns), both [B, T]. A prompt's rows may stand anywhere; one that is alone in its group gets 0.
    """
    module = importlib.import_module(algo)

    def advantages(token_level_rewards, response_mask, index, config=None, **_):
        if algo in ("gtpo", "grpo_s") and (
            sampling_entropy is None or sampling_entropy.shape != response_mask.shape
        ):
            raise ValueError(
                f"{algo} needs the sampling policy's entropies, which verl does not hand to estimators: set "
                f"VERL_USE_EXTERNAL_MODULES=verl_losses,verl_entropy"
            )
        rewards = token_level_rewards.sum(1)
        A = torch.zeros_like(token_level_rewards)
        for prompt in np.unique(index):
            rows = torch.from_numpy(np.flatnonzero(index == prompt))
            if len(rows) > 1:
                entropy = None if sampling_entropy is None else sampling_entropy[rows]
                a = module.advantages(
                    rewards[rows], len(rows), entropy=entropy, mask=response_mask[rows]
                )
                A[rows] = a if a.ndim == 2 else a[:, None].expand(-1, A.shape[1])
        A = A * response_mask
        return A, A

    return advantages


for name in AVERAGE:
    register_policy_loss(name)(policy_loss(name))
    if name != "grpo":  # verl's trainer calls its own for this name whatever the registry says
        register_adv_est(name)(estimator(name))
