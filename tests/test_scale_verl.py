"""scale/verl_losses.py in the real verl: registries, ppo_loss, compute_advantage and config."""

import importlib
import os
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "scale"))
os.environ["VERL_USE_EXTERNAL_MODULES"] = "verl_losses"  # as in a run, verl imports our module
for module in ("tensordict", "ray", "hydra", "verl"):
    pytest.importorskip(
        module, reason=f"verl is not installed ({module} is missing): see scale/README.md"
    )

import numpy as np  # noqa: E402
import torch  # noqa: E402
import verl  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.trainer.ppo.ray_trainer import compute_advantage  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

del os.environ["VERL_USE_EXTERNAL_MODULES"]
verl_losses = sys.modules["verl_losses"]
AVERAGE = verl_losses.AVERAGE
CLIP = {"grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4), "trgrpo": (0.2, 0.24)}  # the others: 0.2, 0.28
LENGTHS = torch.tensor([7, 1, 4, 5, 2, 6, 3, 3])


def actor_config(algo, **settings):
    low, high = CLIP.get(algo, (0.2, 0.28))
    own = {"clip_ratio_low": low, "clip_ratio_high": high, "loss_agg_mode": AVERAGE[algo]}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=2,
        policy_loss=PolicyLossConfig(loss_mode=algo),
        **{**own, **settings},
    )


def batch(spread, seed=0):
    """(logprobs, old_logprobs, advantages constant along a row, mask), all [8, 7]."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < LENGTHS[:, None]
    old = -3 * torch.rand(8, 7, generator=g)
    logp = (old + spread * torch.randn(8, 7, generator=g)).requires_grad_()
    return logp, old, torch.randn(8, 1, generator=g).expand(8, 7) * mask, mask


THEIRS = {
    "grpo": core_algos.compute_policy_loss_vanilla,
    "dapo": core_algos.compute_policy_loss_vanilla,
    "gspo": core_algos.compute_policy_loss_gspo,
}


@pytest.mark.parametrize("algo", THEIRS)
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("weighed", [False, True])
def test_loss_and_gradient_equal_those_of_verl(algo, spread, weighed):
    logp, old, A, mask = batch(spread)
    weights = torch.linspace(0, 2, 56).view(8, 7) if weighed else None
    # verl clips a third time, at clip_ratio_c where A < 0 (dual clip); the papers do not. 1e9 is
    # never reached.
    config = actor_config(algo, clip_ratio_c=1e9)
    value, _ = THEIRS[algo](old, logp, A, mask, AVERAGE[algo], config, weights)
    (gradient,) = torch.autograd.grad(value, logp)
    ours, logged = core_algos.get_policy_loss_fn(algo)(
        old, logp, A, mask, AVERAGE[algo], config, weights
    )
    assert gradient.any()
    torch.testing.assert_close(ours, value, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, logp)[0], gradient, atol=1e-6, rtol=0)
    if not weighed:  # the file itself, with its own defaults
        alone = importlib.import_module(algo).loss(logp, old, A[:, 0], mask)
        torch.testing.assert_close(alone, value, atol=1e-6, rtol=0)
    if spread == 0.5:
        clipped = (gradient == 0)[mask & (A != 0)].float().mean().item()
        assert 0 < clipped == pytest.approx(logged["actor/pg_clipfrac"]) or weighed


def nested(x, lengths):
    return torch.nested.nested_tensor(
        [row[:n] for row, n in zip(x, lengths, strict=True)], layout=torch.jagged
    )


def micro_batch(rows, logp, old, A, mask, **info):
    """(model_output, data) as verl's engine passes them to ppo_loss: jagged, with prompts of 2
    tokens.
    """
    n = LENGTHS[rows]
    shifted = [
        torch.cat([torch.zeros(1), x[:k], torch.zeros(1)])
        for x, k in zip(logp[rows], n, strict=True)
    ]
    data = {
        "prompts": nested(torch.ones(len(rows), 2), torch.full_like(n, 2)),
        "responses": nested(mask[rows], n),
    }
    named = {"response_mask": mask, "old_log_probs": old, "advantages": A}
    data |= {name: nested(x[rows], n) for name, x in named.items()}
    data = TensorDict(data, batch_size=len(rows))
    tu.assign_non_tensor(data, **info)
    return {"log_probs": torch.nested.as_nested_tensor(shifted, layout=torch.jagged)}, data


@pytest.mark.parametrize("algo", AVERAGE)
def test_micro_batches_on_two_gpus_add_up_to_the_whole(algo):
    """Summed over micro-batches as in verl and averaged over GPUs as in FSDP, the losses and
    gradients are those of the whole mini-batch.
    """
    logp, old, A, mask = batch(0.05)
    if algo == "gtpo":  # an advantage per token
        A = A * torch.linspace(0.5, 1.5, 7)
    low, high = 0.01, 0.03  # the config's, not the files'
    whole = importlib.import_module(algo).loss(
        logp, old, A if algo == "gtpo" else A[:, 0], mask, eps_low=low, eps_high=high
    )
    (expected,) = torch.autograd.grad(whole, logp)
    config = actor_config(algo, clip_ratio_low=low, clip_ratio_high=high)
    info = {"dp_size": 2, "batch_num_tokens": int(mask.sum()), "global_batch_size": 8}
    total = 0
    for gpu in ([0, 1, 2], [3]), ([4, 5], [6, 7]):  # ragged micro-batches
        for rows in gpu:
            loss, _ = ppo_loss(config, *micro_batch(rows, logp, old, A, mask, **info))
            total += loss / 2
    torch.testing.assert_close(total, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(total, logp)[0], expected, atol=1e-6, rtol=0)


def rollout(seed=0):
    """verl's DataProto of 3 prompts x 4 completions and one completion alone, shuffled; and the
    order of its rows.
    """
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(13, generator=g)
    lengths = torch.randint(1, 7, (13,), generator=g)
    mask = (torch.arange(6) < lengths[:, None]).long()
    rewards = torch.zeros(13, 6)
    right = torch.tensor([1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1, 1, 1.0])
    rewards[range(13), lengths - 1] = right
    uid = np.array([*"aaaabbbbccccd"], dtype=object)
    entropy = torch.rand(13, 6, generator=g) + 0.1
    tensors = {"token_level_rewards": rewards[order], "response_mask": mask[order]}
    data = verl.DataProto.from_dict(tensors=tensors, non_tensors={"uid": uid[order]})
    return data, order, right, entropy, mask


@pytest.mark.parametrize("algo", [a for a in AVERAGE if a != "grpo"])
def test_estimators(algo, monkeypatch):
    data, order, right, entropy, mask = rollout()
    monkeypatch.setattr(verl_losses, "sampling_entropy", entropy[order])
    got = torch.empty(13, 6)
    got[order] = compute_advantage(data, adv_estimator=algo).batch["advantages"]
    want = importlib.import_module(algo).advantages(
        right[:12], 4, entropy=entropy[:12], mask=mask[:12]
    )
    want = (want if want.ndim == 2 else want[:, None]) * mask[:12]
    torch.testing.assert_close(got[:12], want)
    assert not got[12].any() and not got[8:12].any() and got[:8].any()
    if algo not in ("gtpo", "grpo_s"):
        rewards, masks = data.batch["token_level_rewards"], data.batch["response_mask"]
        uid = data.non_tensor_batch["uid"]
        theirs, _ = core_algos.compute_grpo_outcome_advantage(rewards, masks, uid, epsilon=1e-4)
        alone = order == 12  # verl gives it its bare reward
        torch.testing.assert_close(got[order][~alone], theirs[~alone].float(), atol=1e-6, rtol=0)


def test_entropy_reaches_the_estimator_in_verls_trainer(monkeypatch):
    """verl's own PPOTrainer._compute_advantage; only its transfer queue is replaced by a dict."""
    pytest.importorskip(
        "transfer_queue", reason="TransferQueue is not installed: see scale/README.md"
    )
    from verl.trainer.ppo.v1 import trainer_base

    monkeypatch.setattr(
        trainer_base.PPOTrainer, "_compute_advantage", trainer_base.PPOTrainer._compute_advantage
    )
    monkeypatch.setattr(verl_losses, "sampling_entropy", None)
    data, order, right, entropy, mask = rollout()
    lengths = mask[order].sum(1)
    store = {
        "uid": torch.tensor([ord(u) for u in data.non_tensor_batch["uid"]]),
        "rm_scores": nested(data.batch["token_level_rewards"], lengths),
        "response_mask": nested(mask[order], lengths),
        "entropy": nested(entropy[order], lengths),
    }

    def kv_batch_get(keys, partition_id, select_fields):
        return TensorDict(
            {name: store[name] for name in select_fields if name in store}, batch_size=13
        )

    def kv_batch_put(keys, partition_id, fields):
        store.update(fields.items())

    monkeypatch.setattr(trainer_base.tq, "kv_batch_get", kv_batch_get)
    monkeypatch.setattr(trainer_base.tq, "kv_batch_put", kv_batch_put)
    config = verl_config("algorithm.adv_estimator=gtpo")
    trainer = SimpleNamespace(config=config)
    keys = trainer_base.KVBatchMeta(
        keys=[str(i) for i in range(13)], tags=[{}] * 13, partition_id="train"
    )
    with pytest.raises(ValueError, match="verl_losses,verl_entropy"):
        trainer_base.PPOTrainer._compute_advantage(trainer, keys, {})
    importlib.import_module("verl_entropy")
    trainer_base.PPOTrainer._compute_advantage(trainer, keys, {})
    got = torch.zeros(13, 6)
    got[order] = store["advantages"].to_padded_tensor(0.0, (13, 6))
    want = importlib.import_module("gtpo").advantages(
        right[:12], 4, entropy=entropy[:12], mask=mask[:12]
    )
    torch.testing.assert_close(got[:12], want)


def verl_config(*overrides):
    from hydra import compose, initialize_config_dir

    os.environ |= {
        "VERL_USE_EXTERNAL_MODULES": "verl_losses",
        "PYTHONPATH": str(ROOT / "scale"),
        "PWD": str(ROOT),
    }
    with initialize_config_dir(config_dir=str(ROOT / "scale"), version_base=None):
        return compose("verl_gsm8k", overrides=list(overrides))


@pytest.fixture(autouse=True)
def environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_example_config_is_one_that_verl_takes():
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = verl_config()
    OmegaConf.resolve(config)
    validate_config(config, use_reference_policy=False, use_critic=False)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    loss = core_algos.get_policy_loss_fn(actor.policy_loss.loss_mode)
    logp, old, A, mask = batch(0.1)
    value, _ = loss(old, logp, A, mask, actor.loss_agg_mode, actor)
    torch.testing.assert_close(
        value, importlib.import_module("tepo").loss(logp, old, A[:, 0], mask)
    )
    assert config.algorithm.adv_estimator in core_algos.ADV_ESTIMATOR_REGISTRY
    assert (
        config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES == "verl_losses"
    )
    score = get_custom_reward_fn(config)
    assert (
        score(
            data_source="gsm8k",
            solution_str="so #### 72",
            ground_truth="...\n#### 72",
            extra_info={},
        )
        == 1.0
    )


def test_wrong_average_is_refused():
    logp, old, A, mask = batch(0.0)
    for algo in AVERAGE:
        with pytest.raises(ValueError, match=f"{algo} averages by {AVERAGE[algo]}"):
            config = actor_config(algo, loss_agg_mode="seq-mean-token-sum")
            core_algos.get_policy_loss_fn(algo)(old, logp, A, mask, config.loss_agg_mode, config)


def test_data(tmp_path):
    pandas = pytest.importorskip("pandas")
    verl_data = importlib.import_module("verl_data")
    verl_data.main(["--data", "tiny", "--prompt", "Q: {question}", "--out", str(tmp_path)])
    row = pandas.read_parquet(tmp_path / "test.parquet").iloc[3]
    assert row.prompt[0]["content"].startswith("Q: ") and row.prompt[0]["role"] == "user"
    verl_data.main(["--data", "tiny", "--system", "Be brief.", "--out", str(tmp_path / "system")])
    first, second = pandas.read_parquet(tmp_path / "system" / "test.parquet").iloc[3].prompt
    assert first == {"role": "system", "content": "Be brief."} and second["role"] == "user"
    truth = row.reward_model["ground_truth"]
    assert verl_data.compute_score(row.data_source, truth, truth, row.extra_info) == 1.0
    assert verl_data.compute_score(row.data_source, "#### 0.5", truth, row.extra_info) == 0.0
