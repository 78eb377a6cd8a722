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

from trainer.methods import ALGORITHMS, MORE  # noqa: E402

del os.environ["VERL_USE_EXTERNAL_MODULES"]
verl_losses = sys.modules["verl_losses"]
load_algorithm, named = verl_losses.load_algorithm, verl_losses.named
AVERAGE = verl_losses.AVERAGE
WHOLE = ("clip_cov", "kl_cov")  # need the whole mini-batch in one micro-batch
CLIP = {  # the files' own clip ranges; of those not named here: 0.2, 0.28
    **dict.fromkeys(["grpo", "ce_gppo", "aspo", "raft", "ha_dw", "dr_grpo", "rloo"], (0.2, 0.2)),
    **dict.fromkeys(["trgrpo", "reweight"], (0.2, 0.24)),
    "gspo": (3e-4, 4e-4),
    "clip_cov": (1.0, 1.0),
    "dppo": (0.15, 0.15),
    "cispo": (1.0, 4.0),
    "gmpo": (0.4, 0.4),
    "luspo": (2e-3, 2.5e-3),
}
NO_WEIGHTS = verl_losses.NO_WEIGHTS
LONGEST = 9  # tokens, Dr. GRPO's constant
LENGTHS = torch.tensor([7, 1, 4, 5, 2, 6, 3, 3])


def actor_config(algo, **settings):
    low, high = CLIP.get(algo, (0.2, 0.28))
    own = {"clip_ratio_low": low, "clip_ratio_high": high, "loss_agg_mode": AVERAGE[algo]}
    own["loss_scale_factor"] = LONGEST if algo == "dr_grpo" else None
    policy_loss = {"kl_cov_ratio": 2e-3, "ppo_kl_coef": 1.0, **settings.pop("policy_loss", {})}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=2,
        policy_loss=PolicyLossConfig(loss_mode=algo, **policy_loss),
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
        alone = load_algorithm(algo).loss(logp, old, A[:, 0], mask)
        torch.testing.assert_close(alone, value, atol=1e-6, rtol=0)
    if spread == 0.5:
        clipped = (gradient == 0)[mask & (A != 0)].float().mean().item()
        assert 0 < clipped == pytest.approx(logged["actor/pg_clipfrac"]) or weighed


PEERS = {  # ours -> verl's function, and its settings beside those of actor_config
    "clip_cov": (core_algos.compute_policy_loss_clip_cov, {}),
    "kl_cov": (core_algos.compute_policy_loss_kl_cov, {}),
    "dppo": (core_algos.compute_policy_loss_dppo_tv, {"clip_ratio_c": 20.0}),
    "cispo": (core_algos.compute_policy_loss_cispo, {}),
    "sapo": (core_algos.compute_policy_loss_sapo, {}),
    "gmpo": (core_algos.compute_policy_loss_geo_mean, {}),
    "dr_grpo": (core_algos.compute_policy_loss_vanilla, {"clip_ratio_c": 1e9}),
    "raft": (core_algos.compute_policy_loss_vanilla, {"clip_ratio_c": 3.0}),
    "opo": (core_algos.compute_policy_loss_vanilla, {"clip_ratio_c": 1e9}),
    "dro": (core_algos.compute_policy_loss_dro, {"policy_loss": {"dro_beta": 1.0}}),
}


def double(*tensors):
    """float64 copies: the ratios of spread 2.0 are so large that fp32 rounds by over 1e-6.

    All logprobs are made negative: DPPO takes exp(logprobs) as probabilities.
    """
    logp, *others = tensors
    others = [x if x.dtype == torch.bool else x.double() for x in others]
    logp = -logp.detach().double().abs()
    return logp.requires_grad_(), *others


def value_and_gradient(loss, logp):
    """loss() with the same random state at every call: the choice of Clip-Cov."""
    torch.manual_seed(5)
    value = loss()
    return value, torch.autograd.grad(value, logp)[0]


def equal(ours, theirs, logp):
    ours, theirs = value_and_gradient(ours, logp), value_and_gradient(theirs, logp)
    assert theirs[1].any()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(
    "algo, weighed", [(a, w) for a in PEERS for w in (False, True) if not (w and a in NO_WEIGHTS)]
)
def test_loss_and_gradient_equal_those_of_verl_for_the_methods_of_more(algo, spread, weighed):
    """The file with its defaults, and the loss that is registered in verl.

    Rollout weights: some refuse them; for geo_mean verl takes the geometric mean of
    a row's weights and we take their mean, so they agree where all weights of a row are equal.
    """
    logp, old, A, mask = double(*batch(spread))
    weights = torch.linspace(0, 2, 56).view(8, 7) if weighed else None
    if weighed and algo == "gmpo":
        weights = weights[:, :1].expand(8, 7)
    peer, settings = PEERS[algo]
    config = actor_config(algo, **settings)
    config.global_batch_info["loss_scale_factor"] = config.loss_scale_factor  # as ppo_loss does

    def theirs():
        return peer(old, logp, A, mask, AVERAGE[algo], config, weights)[0]

    def ours():
        loss = core_algos.get_policy_loss_fn(algo)
        return loss(old, logp, A, mask, AVERAGE[algo], config, weights)[0]

    def alone():
        module = load_algorithm(algo)
        lengths = named(module.loss, {"max_length": LONGEST})
        return module.loss(logp, old, A[:, 0], mask, **lengths)

    equal(ours, theirs, logp)
    if not weighed:
        equal(alone, theirs, logp)


@pytest.mark.parametrize("algo", ["clip_cov", "kl_cov", "sapo", "raft", "dro"])
def test_options_that_verls_config_has_are_taken_from_it(algo):
    logp, old, A, mask = double(*batch(2.0))
    peer, settings = PEERS[algo]
    more = {"clip_cov_ratio": 0.3, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0}
    more |= {"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.4, "dro_beta": 0.3}
    settings = {"clip_ratio_c": 1.5, "tau_pos": 2.0, "tau_neg": 3.0, "policy_loss": more}
    config = actor_config(algo, **settings)
    defaults = actor_config(algo)

    def theirs():
        return peer(old, logp, A, mask, AVERAGE[algo], config)[0]

    def ours(config=config):
        return core_algos.get_policy_loss_fn(algo)(old, logp, A, mask, AVERAGE[algo], config)[0]

    equal(ours, theirs, logp)
    by_default = value_and_gradient(lambda: ours(defaults), logp)[1]
    assert (value_and_gradient(ours, logp)[1] - by_default).abs().max() > 1e-3


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_dppo_with_divergence_kl_equals_verls_dppo_kl(spread):
    logp, old, A, mask = double(*batch(spread))
    options = {"divergence": "kl", "delta_low": 0.05, "delta_high": 0.05}
    ranges = {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05, "clip_ratio_c": 20.0}
    config = actor_config("dppo", **ranges)

    def ours():
        return load_algorithm("dppo").loss(logp, old, A[:, 0], mask, **options)

    def theirs():
        peer = core_algos.compute_policy_loss_dppo_kl
        return peer(old, logp, A, mask, "token-mean", config)[0]

    equal(ours, theirs, logp)


@pytest.mark.parametrize("variant", ["raft++", "reinforce_rej"])
def test_raft_and_reinforce_rej_equal_verls_vanilla_with_our_advantages(variant):
    logp, old, _, mask = double(*batch(2.0))
    raft = load_algorithm("raft")
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1]).double()
    A = raft.advantages(rewards, 4, variant=variant)
    wanted = {"raft++": [1, 0, 0, 1, 1, 1, 1, 1], "reinforce_rej": [1, -1, -1, 1, 0, 0, 0, 0]}
    assert A.tolist() == wanted[variant]
    config = actor_config("raft", clip_ratio_c=3.0)

    def theirs():
        peer = core_algos.compute_policy_loss_vanilla
        return peer(old, logp, A[:, None] * mask, mask, "token-mean", config)[0]

    equal(lambda: raft.loss(logp, old, A, mask, variant=variant), theirs, logp)


@pytest.mark.parametrize(
    "algo, theirs",
    [
        ("rloo", {"adv_estimator": "rloo"}),
        ("rloo", {"adv_estimator": "rloo_vectorized"}),
        ("dr_grpo", {"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": False}),
        ("opo", {"adv_estimator": "opo"}),
    ],
)
def test_advantages_equal_verls(algo, theirs):
    """Groups of four, rows in any order. A row alone in its group is left out: all of verl's but
    rloo_vectorized leave it its bare reward.
    """
    data, order, right, _, mask = rollout()
    module = load_algorithm(algo)
    want = module.advantages(right[:12], 4, **named(module.advantages, {"mask": mask[:12]}))
    want = want[:, None] * mask[:12]
    got = torch.empty(13, 6)
    got[order] = compute_advantage(data, **theirs).batch["advantages"].float()
    assert want.any()
    torch.testing.assert_close(got[:12], want, atol=1e-6, rtol=0)


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


@pytest.mark.parametrize("algo", [a for a in AVERAGE if a not in WHOLE])
def test_micro_batches_on_two_gpus_add_up_to_the_whole(algo):
    """Summed over micro-batches as in verl and averaged over GPUs as in FSDP, the losses and
    gradients are those of the whole mini-batch.
    """
    logp, old, A, mask = batch(0.05)
    per_token = algo in ("gtpo", "ktae")
    if per_token:
        A = A * torch.linspace(0.5, 1.5, 7)
    low, high = 0.01, 0.03  # the config's, not the files'
    options = {"eps_low": low, "eps_high": high, "delta_low": low, "delta_high": high}
    module = load_algorithm(algo)
    options = named(module.loss, {**options, "max_length": LONGEST})
    whole = module.loss(logp, old, A if per_token else A[:, 0], mask, **options)
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


@pytest.mark.parametrize("algo", WHOLE)
def test_what_needs_the_whole_mini_batch_is_refused(algo):
    """Unless one GPU has it in one micro-batch; then the loss is the file's."""
    logp, old, A, mask = batch(0.05)
    config = actor_config(algo)
    info = {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": 8}
    rows = list(range(8))
    torch.manual_seed(5)
    value, _ = ppo_loss(config, *micro_batch(rows, logp, old, A, mask, **info))
    torch.manual_seed(5)
    torch.testing.assert_close(value, load_algorithm(algo).loss(logp, old, A[:, 0], mask))
    with pytest.raises(ValueError, match=f"{algo} chooses among all tokens"):
        ppo_loss(config, *micro_batch(rows[:3], logp, old, A, mask, **info))
    with pytest.raises(ValueError, match=f"{algo} chooses among all tokens"):
        ppo_loss(config, *micro_batch(rows, logp, old, A, mask, **{**info, "dp_size": 2}))


@pytest.mark.parametrize("algo", NO_WEIGHTS)
def test_rollout_weights_that_would_do_something_else_are_refused(algo):
    logp, old, A, mask = batch(0.05)
    loss = core_algos.get_policy_loss_fn(algo)
    with pytest.raises(ValueError, match=f"{algo} cannot take rollout weights, which would"):
        loss(old, logp, A, mask, "token-mean", actor_config(algo), torch.ones(8, 7))


def test_dr_grpo_without_its_constant_is_refused():
    logp, old, A, mask = batch(0.0)
    config = actor_config("dr_grpo")
    object.__setattr__(config, "loss_scale_factor", None)
    with pytest.raises(ValueError, match="set actor.loss_scale_factor to data.max_response_length"):
        core_algos.get_policy_loss_fn("dr_grpo")(
            old, logp, A, mask, "seq-mean-token-sum-norm", config
        )


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


OF_GRPO = [  # their advantages are GRPO's
    *("tepo", "dapo", "gspo", "trgrpo", "clip_cov", "kl_cov", "ce_gppo", "aspo", "dppo"),
    *("reweight", "dhpo", "cispo", "sapo", "gmpo", "luspo", "vespo"),
]


def token_ids(seed=0):
    return torch.randint(0, 5, (13, 6), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "algo", [*OF_GRPO, "gtpo", "grpo_s", "raft", "ktae", "dr_grpo", "maxrl", "dro", "topr"]
)
def test_estimators(algo, monkeypatch):
    data, order, right, entropy, mask = rollout()
    ids = token_ids()
    monkeypatch.setattr(verl_losses, "sampling_entropy", entropy[order])
    monkeypatch.setattr(verl_losses, "sampled_ids", ids[order])
    got = torch.empty(13, 6)
    got[order] = compute_advantage(data, adv_estimator=algo).batch["advantages"]
    module = load_algorithm(algo)
    inputs = {"entropy": entropy[:12], "mask": mask[:12], "completions": ids[:12]}
    want = module.advantages(right[:12], 4, **named(module.advantages, inputs))
    want = (want if want.ndim == 2 else want[:, None]) * mask[:12]
    torch.testing.assert_close(got[:12], want)
    assert not got[12].any() and got[8:12].any() == (algo == "raft") and got[:8].any()
    if algo in OF_GRPO:
        rewards, masks = data.batch["token_level_rewards"], data.batch["response_mask"]
        uid = data.non_tensor_batch["uid"]
        theirs, _ = core_algos.compute_grpo_outcome_advantage(rewards, masks, uid, epsilon=1e-4)
        alone = order == 12  # verl gives it its bare reward
        torch.testing.assert_close(got[order][~alone], theirs[~alone].float(), atol=1e-6, rtol=0)


def test_every_method_has_an_estimator():
    for algo in AVERAGE:
        assert callable(core_algos.get_adv_estimator_fn(algo))
    assert set(AVERAGE) == {*ALGORITHMS, *MORE}


def test_the_estimator_of_ha_dw_compares_with_all_groups_and_earlier_rollouts():
    data, order, right, _, mask = rollout()
    in_groups = order < 12
    rewards = data.batch["token_level_rewards"][in_groups]
    masks, uid = data.batch["response_mask"][in_groups], data.non_tensor_batch["uid"][in_groups]
    advantages = verl_losses.estimator("ha_dw")
    module = load_algorithm("ha_dw")
    right = right[:12]
    for history in ([], [right.mean().item()]):
        got = torch.empty(12, 6)
        # The second rollout has fewer right answers, so that its anchor depends on the history.
        now = right if not history else right * (torch.arange(12) % 4 == 0)
        scale = (now / right.clamp(min=1e-9))[order[in_groups]][:, None]
        got[order[in_groups]] = advantages(rewards * scale, masks, uid)[0]
        want = module.advantages(now, 4, history=history)[:, None] * mask[:12]
        torch.testing.assert_close(got, want)
        assert want.any()
    assert (want - module.advantages(now, 4)[:, None] * mask[:12]).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"ha_dw needs groups of one size; got \[1, 4\]"):
        compute_advantage(data, adv_estimator="ha_dw")


def dict_as_transfer_queue(monkeypatch, module, store):
    def kv_batch_get(keys, partition_id, select_fields):
        return TensorDict(
            {name: store[name] for name in select_fields if name in store}, batch_size=13
        )

    def kv_batch_put(keys, partition_id, fields):
        store.update(fields.items())

    monkeypatch.setattr(module.tq, "kv_batch_get", kv_batch_get)
    monkeypatch.setattr(module.tq, "kv_batch_put", kv_batch_put)


@pytest.mark.parametrize("algo", ["gtpo", "ktae"])
def test_entropies_and_ids_reach_the_estimator_in_verls_trainer(algo, monkeypatch):
    """verl's own PPOTrainer._compute_advantage; only its transfer queue is replaced by a dict."""
    pytest.importorskip(
        "transfer_queue", reason="TransferQueue is not installed: see scale/README.md"
    )
    from verl.trainer.ppo.v1 import trainer_base

    monkeypatch.setattr(
        trainer_base.PPOTrainer, "_compute_advantage", trainer_base.PPOTrainer._compute_advantage
    )
    monkeypatch.setattr(verl_losses, "sampling_entropy", None)
    monkeypatch.setattr(verl_losses, "sampled_ids", None)
    monkeypatch.delitem(sys.modules, "verl_entropy", raising=False)  # wraps anew
    ids = token_ids()
    data, order, right, entropy, mask = rollout()
    lengths = mask[order].sum(1)
    store = {
        "uid": torch.tensor([ord(u) for u in data.non_tensor_batch["uid"]]),
        "rm_scores": nested(data.batch["token_level_rewards"], lengths),
        "response_mask": nested(mask[order], lengths),
        "entropy": nested(entropy[order], lengths),
        "responses": nested(ids[order], lengths),
    }

    dict_as_transfer_queue(monkeypatch, trainer_base, store)
    config = verl_config(f"algorithm.adv_estimator={algo}")
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
    module = load_algorithm(algo)
    inputs = {"entropy": entropy[:12], "mask": mask[:12], "completions": ids[:12]}
    want = module.advantages(right[:12], 4, **named(module.advantages, inputs))
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
            config = actor_config(algo, loss_agg_mode="token-sum")
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
