"""--lora: W + (alpha / r) B A by hand; what is trained, sampled from, saved, resumed and merged."""

import copy
import json
import shutil

import child
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from small import WORDS, change, copy_tiny, refused, run, timeless
from test_architectures import SETTINGS, loaded
from test_update import B, rollout, updater
from transformers import AutoModelForCausalLM

from run import checkpoint, session, start
from run.checks import fill
from run.parser import parse
from trainer import adapter
from trainer.bf16 import sampling_copy
from trainer.logprobs import token_logprobs
from trainer.lora import LoRALinear, adapted, adapters_off, add_adapters, merged_model
from trainer.memory import bytes_to_come
from trainer.policy import load_policy
from trainer.probes import check_adapters

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])


def with_adapters(rank=3, alpha=6, targets=None):
    """(a small model with adapters whose B is not 0, the model before)."""
    model = tiny_model()
    before = copy.deepcopy(model)
    add_adapters(model, rank, alpha, targets)
    torch.manual_seed(1)
    for layer in adapted(model).values():
        torch.nn.init.normal_(layer.B, std=0.2)
    return model, before


def by_hand(model, before):
    """`before` with W + (alpha / r) B A written into its weights, for autograd to run through."""
    copied = copy.deepcopy(before)
    weights = {}
    for name, layer in adapted(model).items():
        A, B = layer.A.detach().clone().requires_grad_(), layer.B.detach().clone().requires_grad_()
        weights[name] = A, B
        plain = copied.get_submodule(name)
        W = plain.weight.detach()
        del plain.weight
        plain.weight = W + 2.0 * B @ A  # alpha / r = 6 / 3
    return copied, weights


def test_logits_and_gradients_are_those_of_the_sum_by_hand():
    model, before = with_adapters()
    slow, weights = by_hand(model, before)
    model(input_ids=IDS).logits.square().sum().backward()
    slow_logits = slow(input_ids=IDS).logits
    slow_logits.square().sum().backward()
    torch.testing.assert_close(model(input_ids=IDS).logits, slow_logits, rtol=1e-5, atol=1e-5)
    for name, layer in adapted(model).items():
        for own, slow_own in zip((layer.A, layer.B), weights[name], strict=True):
            torch.testing.assert_close(own.grad, slow_own.grad, rtol=1e-4, atol=1e-4)


def test_only_the_adapters_are_trained():
    model, _ = with_adapters()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"{name}.{part}" for name in adapted(model) for part in "AB"}
    assert trained == expected and len(adapted(model)) == 2 * 7  # q k v o gate up down, two layers


def test_at_the_start_the_model_computes_as_before():
    model, before = tiny_model(), tiny_model()
    add_adapters(model, 4, 8)
    assert torch.equal(model(input_ids=IDS).logits, before(input_ids=IDS).logits)


def test_switched_off_it_computes_as_before_and_then_again_as_trained():
    model, before = with_adapters()
    trained = model(input_ids=IDS).logits
    with adapters_off(model):
        assert torch.equal(model(input_ids=IDS).logits, before(input_ids=IDS).logits)
    assert torch.equal(model(input_ids=IDS).logits, trained)


def test_merged_it_is_a_plain_model_with_the_same_logits():
    model, before = with_adapters()
    merged = merged_model(model)
    assert not adapted(merged) and adapted(model)
    assert merged.state_dict().keys() == before.state_dict().keys()
    trained, plain = model(input_ids=IDS).logits, merged(input_ids=IDS).logits
    torch.testing.assert_close(plain, trained, rtol=1e-5, atol=1e-5)


def test_merging_copies_no_other_weight():
    model, _ = with_adapters()
    embeddings = model.get_input_embeddings().weight
    assert merged_model(model).get_input_embeddings().weight is embeddings


def test_targets_by_the_last_part_of_their_names():
    model, _ = with_adapters(targets={"q_proj", "v_proj"})
    assert {name.split(".")[-1] for name in adapted(model)} == {"q_proj", "v_proj"}
    with pytest.raises(
        ValueError, match="besides its head the model has no linear layer called w_proj"
    ):
        add_adapters(tiny_model(), 4, 8, {"q_proj", "w_proj"})


def test_a_model_without_linear_layers_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="besides its head the model has no linear layer$"):
        add_adapters(model, 4, 8)


def test_a_layer_in_bf16_keeps_its_dtype_and_its_adapter_is_fp32():
    layer = LoRALinear(torch.nn.Linear(4, 6).bfloat16(), 2, 4)
    x = torch.randn(3, 4).bfloat16()
    assert layer(x).dtype == merged_model(layer).weight.dtype == torch.bfloat16
    assert layer.A.dtype == layer.B.dtype == torch.float32


# The settings of deepseek_v3 there are for its weights: it does not run, with or without adapters.
@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "deepseek_v3"])
def test_with_adapters_every_architecture_computes_what_it_computes_merged(kind):
    model = loaded(kind, **SETTINGS[kind])
    add_adapters(model, 3, 6)
    for layer in adapted(model).values():
        torch.nn.init.normal_(layer.B, std=0.1)
    check_adapters(model)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        before, merged = loaded(kind, **SETTINGS[kind])(ids).logits, merged_model(model)(ids).logits
    torch.testing.assert_close(model(ids).logits, merged, rtol=1e-3, atol=1e-4)
    assert (merged - before).abs().max() > 1e-3


def test_a_model_that_cannot_run_with_adapters_is_refused_in_a_line():
    model = tiny_model()
    block = model.model.layers[0].mlp
    block.forward = lambda x: x * block.up_proj.weight_scale  # of a quantized layer, say
    add_adapters(model, 3, 6)
    with pytest.raises(ValueError, match="--lora does not work with this model: AttributeError"):
        check_adapters(model)


# An update


def after_an_update(dtype=torch.float64, large=False, **options):
    """(the adapters after one update of a model, the Updater, its rollout)."""
    model, _ = with_adapters()
    model.to(dtype)
    u = updater(model, "grpo", {"beta": 0.1}, updates=1, **options)
    u.in_place = large
    r = rollout(dtype=dtype)
    u.measure(r, [torch.arange(B)])
    r.advantages = u.algo.advantages(r.rewards, 4)
    assert u.update(r, torch.arange(B), on_policy=True)["moved"]
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, u, r


def test_neither_micro_batches_nor_checkpointing_nor_the_in_place_layers_change_the_update():
    whole, u, _ = after_an_update(micro_batch="8")
    moments = [s["exp_avg"].numel() for s in u.optimizer.state.values()]
    assert sum(moments) == sum(p.numel() for p in whole.values())
    for how in (
        {"micro_batch": "1"},
        {"micro_batch": "3"},
        {"micro_batch": "3", "large": True},
        {"micro_batch": "3", "gradient_checkpointing": True},
    ):
        found, _, _ = after_an_update(**how)
        for name, weight in whole.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-10)


def test_the_reference_of_a_kl_term_is_the_model_itself_without_adapters():
    _, u, r = after_an_update()
    assert u.reference is u.model
    plain = with_adapters()[1].double()
    want, _ = token_logprobs(plain, r.prompts, r.completions, r.mask, temperature=0.9)
    torch.testing.assert_close(r.ref_logprobs, want.detach())


@pytest.mark.parametrize("large", [False, True])
def test_in_bf16_the_frozen_weights_are_bf16_and_the_adapters_move_in_fp32(large):
    model, o = tiny_model(), fill(parse("--lora 4 --preset tiny --dtype bf16".split()))
    start.add_lora(o, model)
    before = copy.deepcopy(model.state_dict())
    u = updater(model, "grpo", updates=1, dtype="bf16")
    u.in_place = large
    r = rollout(dtype=torch.float32)
    u.measure(r, [torch.arange(B)])
    r.advantages = u.algo.advantages(r.rewards, 4)
    assert u.update(r, torch.arange(B), on_policy=True)["moved"]
    for name, weight in model.state_dict().items():
        ours = name.endswith((".A", ".B"))
        assert weight.dtype == (torch.float32 if ours else torch.bfloat16), name
        assert torch.equal(weight, before[name]) != name.endswith(".B"), name
    sampler = sampling_copy(model, "bf16")
    assert not adapted(sampler) and {p.dtype for p in sampler.parameters()} == {torch.bfloat16}


def test_a_kept_copy_to_sample_from_gets_the_merged_weights_of_each_rollout():
    model, _ = with_adapters()
    kept = sampling_copy(model, "fp32", keep=True)
    torch.nn.init.normal_(next(iter(adapted(model).values())).B)
    assert sampling_copy(model, "fp32", keep=True) is kept
    merged = merged_model(model).state_dict()
    assert all(torch.equal(kept.state_dict()[name], merged[name]) for name in merged)


def test_an_update_allocates_nothing_for_frozen_weights():
    model = tiny_model()
    chunks = bytes_to_come(model, "fp32") - 3 * 4 * sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters())
    add_adapters(model, 4, 8)
    trained = sum(p.numel() for p in model.parameters()) - frozen
    assert bytes_to_come(model, "fp32") == chunks + 12 * trained
    assert bytes_to_come(model, "bf16") == chunks + 12 * trained + 2 * (frozen + trained)
    for weight in model.parameters():
        weight.data = weight.data if weight.requires_grad else weight.data.bfloat16()
    assert bytes_to_come(model, "bf16") == chunks + 12 * trained + 2 * trained


# A run

LORA = [*WORDS, "--lora", "4", "--save-every", "1", "--algo", "grpo", "--beta", "0.1"]
STEPS = "step-000003", "step-000004"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with --lora, whose base is a folder: (the run, the base)."""
    folder = tmp_path_factory.mktemp("lora")
    base = copy_tiny(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.plot_runs", lambda *_: None)
        patch.setattr("trainer.grading.correct", child.parity)
        assert run(*LORA, "--model", base, "--out", folder / "run") == 0
    return folder / "run", base


def test_a_run_trains_and_its_checkpoints_hold_adapters_and_moments_alone(whole):
    out, base = whole
    names = {"adapter_config.json", "adapter_model.safetensors", "state.pt"}
    for step in STEPS:
        assert {path.name for path in (out / "checkpoints" / step).iterdir()} == names
    size = sum(path.stat().st_size for path in (out / "checkpoints" / STEPS[1]).iterdir())
    assert size < (base / "model.safetensors").stat().st_size / 4
    trained, before = (load_file(f / "model.safetensors") for f in (out / "model", base))
    assert trained.keys() == before.keys()
    changed = {name for name in before if not torch.equal(trained[name], before[name])}
    assert changed and all("_proj" in name for name in changed)


def test_a_resumed_run_equals_the_whole_one_to_the_bit(whole, tmp_path, quiet_run, monkeypatch):
    monkeypatch.setattr("trainer.grading.correct", child.parity)
    out = shutil.copytree(whole[0], tmp_path / "run")
    for name in ("model", "adapter", f"checkpoints/{STEPS[1]}"):
        shutil.rmtree(out / name)
    assert run("--resume", out) == 0
    assert timeless(out) == timeless(whole[0])
    for name in ("samples.jsonl", "model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole[0] / name).read_bytes()


def test_a_run_is_not_resumed_on_another_base(whole, tmp_path, quiet_run, capsys):
    shutil.copytree(whole[0], tmp_path / "run")
    other = shutil.copytree(whole[1], tmp_path / "base")
    change(tmp_path / "run" / "config.json", status="running")
    options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    change(tmp_path / "run" / "config.json", options={**options, "model": str(other)})
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values()))[0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, "--resume", tmp_path / "run")
    assert "is not what it was when the run began" in line


@pytest.mark.parametrize("place", ["adapter", f"checkpoints/{STEPS[1]}", "beside"])
def test_an_adapter_is_merged_into_its_model_when_it_is_loaded(whole, place, tmp_path):
    out, base = whole
    folder = out / place
    if place == "beside":
        folder = shutil.copytree(base, tmp_path / "both")
        shutil.copytree(out / "adapter", folder, dirs_exist_ok=True)
    loaded_weights = load_policy(str(folder))[0].state_dict()
    for name, weight in load_file(out / "model" / "model.safetensors").items():
        torch.testing.assert_close(loaded_weights[name], weight, rtol=0, atol=1e-6)


def test_a_run_that_is_not_done_stands_for_its_latest_adapter(whole, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(out / "model")
    change(out / "config.json", status="running")
    assert checkpoint.model_folder(out) == str(out / "checkpoints" / STEPS[1])


NOT_PLAIN = {
    "use_dora": True,
    "use_rslora": True,
    "alpha_pattern": {"q_proj": 4},
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "init_lora_weights": "pissa",
    "peft_type": "IA3",
    "revision": "v2",
    "something_new": 1,
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_an_adapter_that_is_not_plain_lora_is_refused(whole, name, tmp_path):
    folder = shutil.copytree(whole[0] / "adapter", tmp_path / "adapter")
    change(folder / "adapter_config.json", **{name: NOT_PLAIN[name]})
    with pytest.raises(ValueError, match=f"not plain LoRA \\({name}: ") as line:
        load_policy(str(folder))
    assert "\n" not in str(line.value)


def test_an_adapter_without_its_base_or_of_another_model_is_refused(whole, tmp_path):
    folder = shutil.copytree(whole[0] / "adapter", tmp_path / "adapter")
    gone = str(tmp_path / "gone")
    for base, why in ((None, "names no base model"), (gone, f"the base of its adapter, '{gone}'")):
        change(folder / "adapter_config.json", base_model_name_or_path=base)
        with pytest.raises(ValueError, match=why):
            load_policy(str(folder))
    shutil.copytree(whole[1], folder, dirs_exist_ok=True)
    tensors = load_file(folder / adapter.WEIGHTS)
    key = min(tensors)
    for other in (key.replace("_proj", "_fc"), key.replace("lora_A", "lora_magnitude_vector")):
        save_file({**tensors, other: tensors[key].clone()}, folder / adapter.WEIGHTS)
        with pytest.raises(ValueError, match="does not fit the model: no linear layer for"):
            load_policy(str(folder))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between peft and transformers
def test_peft_computes_the_same_with_our_adapter_and_we_with_its(whole, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    out, base = whole
    ids, plain = torch.arange(3, 20)[None], load_policy(str(base))[0]
    theirs = peft.PeftModel.from_pretrained(plain, out / "adapter").eval()
    with torch.no_grad():
        got, want = theirs(input_ids=ids).logits, load_policy(str(out / "model"))[0](ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(load_policy(str(base))[0], config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want, got = (
            model(input_ids=ids).logits,
            load_policy(str(tmp_path / "theirs"))[0](ids).logits,
        )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [[], ["--lora", "2"]])
def test_keep_best_keeps_the_model_of_the_first_best_evaluation(
    lora, tmp_path, quiet_run, monkeypatch, capsys
):
    monkeypatch.setattr("trainer.grading.correct", child.parity)
    planned, seen = [0.1, 0.5, 0.5, 0.3, 0.2], []
    real = session.evaluated

    def evaluated(o, model, *args):
        seen.append(copy.deepcopy(model.state_dict()))
        return {**real(o, model, *args), "accuracy": planned[len(seen) - 1]}

    monkeypatch.setattr(session, "evaluated", evaluated)
    words = [*WORDS, *lora, "--eval-every", "1", "--save-every", "1", "--keep-best"]
    assert run(*words, "--out", tmp_path / "run") == 0
    best = tmp_path / "run" / "best"
    assert f"{best}: the model after step 1, greedy 0.500" in capsys.readouterr().out
    kept = AutoModelForCausalLM.from_pretrained(best).state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in seen[1].items())
    assert not all(torch.equal(kept[name], weight) for name, weight in seen[2].items())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / STEPS[1])
    planned[5:] = [0.3, 0.6]  # of steps 3, again, and 4
    assert run("--resume", tmp_path / "run") == 0
    assert json.loads((best / "best.json").read_text())["step"] == 4
    assert not list(best.parent.glob("*.part"))


def test_the_learning_rate_is_ten_times_that_of_full_training_unless_one_is_given():
    plain, lora, own = (
        fill(parse(["--preset", "tiny", *words]))
        for words in ([], ["--lora", "8"], ["--lora", "8", "--lr", "0.5"])
    )
    assert lora.lr == 10 * plain.lr and own.lr == 0.5
    with pytest.raises(ValueError, match="no effect without --lora"):
        fill(parse(["--preset", "tiny", "--lora-alpha", "8"]))
