"""The algorithms in verl's registries, as policy losses and advantage estimators.

    VERL_USE_EXTERNAL_MODULES=verl_losses PYTHONPATH=scale python -m verl.trainer.main_ppo \\
        algorithm.adv_estimator=tepo actor_rollout_ref.actor.policy_loss.loss_mode=tepo ...

They have the names of our files. verl calls a policy loss once per micro-batch on every GPU, sums
the gradients of the micro-batches and averages those of the GPUs. All losses but clip_cov's and
kl_cov's are sums over sequences. So each micro-batch's loss is multiplied by its share of the
mini-batch's tokens or sequences and by the number of GPUs; the results add up to the loss of the
whole mini-batch. verl gives the totals in global_batch_info. clip_cov and kl_cov choose tokens by a
covariance over the whole mini-batch: they refuse a micro-batch that is only a part of it.

From the config come the clip range, actor.clip_ratio_low and clip_ratio_high (README.md lists each
file's own), the options for which verl has a field (see loss_options), and actor.loss_agg_mode,
which must name the algorithm's own average. A KL to a reference is verl's use_kl_loss. Every other
option has its file's default. Our "gspo", "clip_cov", "kl_cov", "cispo", "sapo" and "dro" losses
replace verl's own. The estimators "grpo", "rloo" and "opo" stay verl's: its grpo divides by
std + 1e-6 where ours divides by std + 1e-4, and the others are ours.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

# At the end of the path, so that none of our files hides a package of the same name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from run.algorithm import load_algorithm  # noqa: E402
from trainer.methods import named  # noqa: E402

AVERAGE = {
    "tepo": "token-mean",
    "dapo": "token-mean",
    "gtpo": "token-mean",
    "grpo": "seq-mean-token-mean",
    "gspo": "seq-mean-token-mean",
    "grpo_s": "seq-mean-token-mean",
    "trgrpo": "seq-mean-token-mean",
    "clip_cov": "token-mean",
    "kl_cov": "token-mean",
    "ce_gppo": "token-mean",
    "aspo": "token-mean",
    "dppo": "token-mean",
    "reweight": "token-mean",
    "raft": "token-mean",
    "ha_dw": "seq-mean-token-mean",
    "ktae": "token-mean",
    "dhpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "rloo": "seq-mean-token-sum",
    "cispo": "token-mean",
    "sapo": "seq-mean-token-mean",
    "gmpo": "seq-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "vespo": "token-mean",
    "maxrl": "token-mean",
    "opo": "token-mean",
    "dro": "token-mean",
    "topr": "token-mean",
}
# Their losses take one advantage per sequence.
PER_SEQUENCE = ("grpo_s", "rloo", "gmpo", "luspo", "vespo")
# Weights multiply the advantages. Why these take none:
NO_WEIGHTS = {
    **dict.fromkeys(["clip_cov", "kl_cov"], "which would change the choice of tokens"),
    "dro": "which would not reach its penalty",
}
# [B, T], of the rollout whose advantages are computed next: the sampling policy's entropies in
# nats, and token ids. verl_entropy.py sets both.
sampling_entropy = None
sampled_ids = None


def policy_loss(algo):
    """algo.loss in verl's signature: tensors [b, T] and an ActorConfig -> (scalar, metrics)."""
    module = load_algorithm(algo)

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
        options = loss_options(algo, config)
        check_weights(algo, rollout_is_weights)
        if algo in ("clip_cov", "kl_cov"):
            check_whole(algo, mask, config.global_batch_info)
        if rollout_is_weights is not None:
            # A weight is not negative, so it multiplies the token's term of the loss.
            advantages = advantages * rollout_is_weights
        if algo in PER_SEQUENCE:  # verl repeats the advantage on every token
            advantages = (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
        value = module.loss(log_prob, old_log_prob, advantages, mask, **options)
        logged = metrics(value, log_prob, old_log_prob, advantages, mask)
        return scaled(algo, value, mask, config.global_batch_info), logged

    return loss


def clip_range(config):
    """(low, high); where the config leaves one out, its clip_ratio."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    low = config.clip_ratio if low is None else low
    high = config.clip_ratio if high is None else high
    return low, high


def loss_options(algo, config):
    """The options of algo.loss for which verl's config has a field. Raises ValueError."""
    low, high = clip_range(config)
    length = config.loss_scale_factor
    if algo == "dr_grpo" and length is None:
        raise ValueError(
            "dr_grpo divides by a constant number of tokens: "
            "set actor.loss_scale_factor to data.max_response_length"
        )
    known = {"eps_low": low, "eps_high": high, "delta_low": low, "delta_high": high}
    known |= {"tau_pos": config.tau_pos, "tau_neg": config.tau_neg}
    known |= {"dual_clip": config.clip_ratio_c, "max_length": length}
    more = config.policy_loss
    if algo == "dro" and more.dro_beta is not None:
        known["tau"] = more.dro_beta
    if algo == "clip_cov":
        known["cov_ratio"] = more.clip_cov_ratio
        known |= {"cov_low": more.clip_cov_lb, "cov_high": more.clip_cov_ub}
    if algo == "kl_cov":
        known |= {"cov_ratio": more.kl_cov_ratio, "cov_coef": more.ppo_kl_coef}
    return named(load_algorithm(algo).loss, known)


def check_whole(algo, mask, info):
    """Raise ValueError unless these rows are the whole mini-batch."""
    total = info.get("batch_num_tokens")
    if info.get("dp_size", 1) > 1 or (total is not None and total != mask.sum()):
        raise ValueError(
            f"{algo} chooses among all tokens of a mini-batch, and verl shows a loss one "
            f"micro-batch: run it on one GPU with a micro-batch as large as the mini-batch, or "
            f"with scale/trl_trainer.py"
        )


def check_weights(algo, weights):
    """Raise ValueError on rollout weights that would not just multiply each token's term."""
    if weights is not None and algo in NO_WEIGHTS:
        raise ValueError(
            f"{algo} cannot take rollout weights, {NO_WEIGHTS[algo]}: "
            f"set algorithm.rollout_correction.rollout_is=null"
        )


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
        gradient = torch.autograd.grad(value, log_prob, retain_graph=True)[0]
        clipped = (gradient[signal] == 0).float().mean()
        logged["actor/pg_clipfrac"] = clipped.nan_to_num().item()
    return logged


def estimator(algo):
    """algo.advantages in verl's signature.

    token_level_rewards [B, T], response_mask [B, T], index [B] (the prompts' ids) ->
    (advantages, returns), both [B, T]. The rows of a prompt may be in any order. A row alone in its
    group gets 0.
    """
    module = load_algorithm(algo)
    history = []  # the mean reward of each rollout so far, for HA-DW

    def advantages(token_level_rewards, response_mask, index, config=None, **_):
        check_sampled(algo, response_mask)
        rewards = token_level_rewards.sum(1)
        A = torch.zeros_like(token_level_rewards)
        for rows, group_size in calls(algo, index):
            if group_size == 1:
                continue
            inputs = {"mask": response_mask[rows], "history": history}
            inputs["entropy"] = None if sampling_entropy is None else sampling_entropy[rows]
            inputs["completions"] = None if sampled_ids is None else sampled_ids[rows]
            wanted = named(module.advantages, inputs)
            a = module.advantages(rewards[rows], group_size, **wanted)
            A[rows] = a if a.ndim == 2 else a[:, None].expand(-1, A.shape[1])
        history.append(rewards.mean().item())
        A = A * response_mask
        return A, A

    return advantages


def calls(algo, index):
    """[(rows, group size)] for each call of algo.advantages: one per prompt.

    HA-DW compares each group with all others: one call for all. Raises ValueError if its groups are
    not of one size.
    """
    _, prompt, sizes = np.unique(index, return_inverse=True, return_counts=True)
    rows = torch.from_numpy(np.argsort(prompt, kind="stable"))
    if algo != "ha_dw":
        return [(part, len(part)) for part in rows.split(sizes.tolist())]
    if (sizes != sizes[0]).any():
        raise ValueError(f"ha_dw needs groups of one size; got {sorted(set(sizes.tolist()))}")
    return [(rows, int(sizes[0]))]


def check_sampled(algo, response_mask):
    """Raise ValueError if an algorithm lacks what only verl_entropy.py hands over."""
    needs = {
        "gtpo": ("the sampling policy's entropies", sampling_entropy),
        "grpo_s": ("the sampling policy's entropies", sampling_entropy),
        "ktae": ("the completions' token ids", sampled_ids),
    }
    if algo not in needs:
        return
    name, given = needs[algo]
    if given is None or given.shape != response_mask.shape:
        raise ValueError(
            f"{algo} needs {name}, which verl does not give to estimators: "
            f"set VERL_USE_EXTERNAL_MODULES=verl_losses,verl_entropy"
        )


for name in AVERAGE:
    register_policy_loss(name)(policy_loss(name))
    # grpo: for this name verl's trainer always calls its own. rloo, opo: verl's are ours.
    if name not in ("grpo", "rloo", "opo"):
        register_adv_est(name)(estimator(name))
