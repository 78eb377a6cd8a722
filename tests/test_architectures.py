"""Any architecture: its log-probabilities and samples are the plain ones, or it is refused."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainer import probes, sampling
from trainer.bf16 import named_tensors, sampling_copy
from trainer.logprobs import Layout, token_logprobs
from trainer.memory import enable_checkpointing
from trainer.policy import context_length, load_policy, name_outputs, switch_off_randomness
from trainer.probes import probe
from trainer.sampling import sample

PROMPTS = [[5, 9, 17, 30, 4, 8, 21], [11, 6], [7, 33, 12, 19, 40], [11, 6]]
LENGTHS = torch.tensor([6, 2, 1, 4])
COMPLETIONS = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(6) < LENGTHS[:, None]
# What all the small models have in common, under the names that most configs use.
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
# What a probe may choose. Layout() takes the full logits, and every row has its own prompt.
EVERYTHING = Layout(through_head=True, share_prompts=True)
PADDED = Layout(through_head=True)
APART = Layout(equal_lengths=True)  # cannot even pad


def build(kind, **settings):
    """A small random model of the architecture, with weights so large that mistakes show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | settings)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = torch.randn_like(weight) / weight.shape[-1] ** 0.5
    return model


def loaded(kind, **settings):
    """`build`, and then what load_policy does to a model."""
    model = build(kind, **settings)
    switch_off_randomness(model)
    name_outputs(model)
    return model


@torch.no_grad()
def plain_logprobs(model, prompt, completion):
    """The reference: one row alone, without padding, through the model's own logits. [T]"""
    ids = torch.tensor([prompt + completion])
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion)), completion]


GEMMA3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "intermediate_size": [48, 48, 40, 48],
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 4,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 4,
}
RECURRENT_GEMMA = {
    "num_hidden_layers": 3,
    "lru_width": 32,
    "attention_window_size": 8,
    "block_types": ["recurrent", "recurrent", "attention"],
}
# model_type: (the layout that the probe must choose, further settings)
KINDS = {
    "mistral": (EVERYTHING, {"sliding_window": 4}),
    "mixtral": (EVERYTHING, {"num_local_experts": 4, "output_router_logits": True}),
    "gemma2": (Layout(), {"sliding_window": 4, "final_logit_softcapping": 0.5}),
    "gemma3n_text": (Layout(), GEMMA3N),
    "granite": (Layout(), {"logits_scaling": 3.0}),
    "opt": (EVERYTHING, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mpt": (EVERYTHING, {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 48}),
    "bloom": (EVERYTHING, {"n_layer": 2, "n_head": 4}),
    "gpt_neox": (EVERYTHING, {}),
    "mamba": (PADDED, {"state_size": 4}),
    "recurrent_gemma": (APART, RECURRENT_GEMMA),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_architecture_has_its_layout_and_the_plain_log_probabilities(kind):
    want, settings = KINDS[kind]
    model = loaded(kind, **settings)
    layout = probe(model, PROMPTS, 6, 0)
    assert layout == want
    how = {"through_head": layout.through_head, "share_prompts": layout.share_prompts}
    got, _ = token_logprobs(model, PROMPTS, COMPLETIONS, MASK, **how)
    for i, prompt in enumerate(PROMPTS):
        row = COMPLETIONS[i][MASK[i]].tolist()
        alone = plain_logprobs(model, prompt, row)
        torch.testing.assert_close(got[i][MASK[i]], alone, rtol=0, atol=1e-4)
    generation = {"temperature": 0, "max_new_tokens": 4, "eos_ids": [2], "pad_id": 0}
    drawn = sample(model, PROMPTS, 2, layout=layout, **generation)
    for prompt, ids, mask in zip(drawn.prompts, drawn.completions, drawn.mask, strict=True):
        row = ids[mask].tolist()
        for t, chosen in enumerate(plain_logprobs(model, prompt, row)):
            logits = model(torch.tensor([prompt + row[:t]]), use_cache=False).logits[0, -1]
            assert chosen >= logits.log_softmax(-1).max() - 1e-4


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
AT_13 = "depend on the length of the row: at 13 tokens"  # the longest of PROMPTS and 6 tokens
REFUSED = {
    "roberta": ("no causal language model", {}),
    "phi3": (AT_13, {"original_max_position_embeddings": 10, "rope_parameters": LONGROPE}),
    "llama": (AT_13, {"max_position_embeddings": 10, "rope_parameters": DYNAMIC}),
    "rwkv": (
        "generate samples from another distribution",
        {"attention_hidden_size": 32, "context_length": 64},
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_layout_makes_right_is_refused_in_a_line(kind):
    line, settings = REFUSED[kind]
    with pytest.raises(ValueError, match=line):
        probe(loaded(kind, **settings), PROMPTS, 6, 0)


def test_rows_stay_where_the_rotary_factors_do_not_change(capsys):
    model = loaded("phi3", original_max_position_embeddings=10, rope_parameters=LONGROPE)
    assert context_length(model) == 10
    assert "longrope change beyond 10 tokens" in capsys.readouterr().out
    assert probe(model, PROMPTS, 3, 0) == EVERYTHING


def test_a_forward_pass_that_changes_the_weights_is_refused():
    model = loaded("llama")

    def rescale(*_):
        model.model.norm.weight.mul_(1.0)

    model.model.register_forward_pre_hook(rescale)
    with pytest.raises(ValueError, match="changes its own weights"):
        probe(model, PROMPTS, 6, 0)


def test_right_padding_that_reaches_a_row_is_refused():
    model = loaded("llama")
    base = model.model.embed_tokens.forward

    def embed(ids):  # a pad anywhere in a row (token 0) changes the whole row
        return base(ids) + 0.1 * (ids == 0).any(1)[:, None, None]

    model.model.embed_tokens.forward = embed
    with pytest.raises(ValueError, match="padded on the right"):
        probe(model, PROMPTS, 6, 0)


def test_a_failure_in_a_probe_says_in_a_line_what_is_given_up(capsys, monkeypatch):
    model = loaded("llama")

    monkeypatch.setattr(sampling, "cache_argument", lambda _: "no_such_cache")
    assert probe(model, PROMPTS, 6, 0) == PADDED
    (line,) = capsys.readouterr().out.splitlines()
    assert "ValueError" in line and "no_such_cache" in line
    assert line.endswith("running each prompt once per completion, which takes more time")
    monkeypatch.undo()
    model.base_model.forward = lambda **_: 1 / 0
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda _: None)
    with pytest.raises(ValueError, match="cannot run this model: ZeroDivisionError") as refused:
        probe(model, PROMPTS, 6, 0)
    assert "\n" not in str(refused.value)
    assert "using the full-logits path" in capsys.readouterr().out


def test_the_probe_sees_a_mistake_beyond_the_first_eight_tokens():
    """A layer in which token 11 changes all others: only rows as long as the run's show it."""
    model = loaded("llama")
    base = model.model.layers[0].forward

    def late(hidden, *args, **kwargs):
        out = base(hidden, *args, **kwargs)
        return out + hidden[:, 11:12] if hidden.shape[1] > 11 else out

    model.model.layers[0].forward = late
    with pytest.raises(ValueError, match="depend on the length"):
        probe(model, PROMPTS, 6, 0)
    assert probe(model, PROMPTS, 4, 0) == EVERYTHING


@pytest.mark.parametrize(("most", "late", "seen"), [(9, 9, True), (40, 32, True), (40, 33, False)])
def test_the_probe_of_generate_looks_at_a_whole_completion_or_32_tokens(most, late, seen):
    """A cache whose error begins at token `late` of the longest prompt's completion."""
    model = loaded("llama")
    base = model.model.layers[0].forward

    def drifting(hidden, *args, **kwargs):
        out = base(hidden, *args, **kwargs)
        from_cache = hidden.shape[1] == 1
        is_late = kwargs["position_ids"].max() >= len(PROMPTS[0]) + late - 2
        return out + hidden if from_cache and is_late else out

    model.model.layers[0].forward = drifting
    if not seen:
        assert probe(model, PROMPTS, most, 0) == EVERYTHING
        return
    with pytest.raises(ValueError, match="generate samples from another distribution"):
        probe(model, PROMPTS, most, 0)


RANDOM = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5, "layerdrop": 0.5},
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "attn_config": {"attn_pdrop": 1}},
    "mixtral": {"num_local_experts": 4, "router_jitter_noise": 0.5},
    "phimoe": {"num_local_experts": 4, "input_jitter_noise": 0.5, "router_jitter_noise": 0.5},
    "qwen2": {"attention_dropout": 0.5},
}


@pytest.mark.parametrize("kind", RANDOM)
def test_whatever_a_config_calls_dropout_or_jitter_is_switched_off(kind):
    model = build(kind, **RANDOM[kind])
    assert not probes.train_mode_agrees(model)
    with pytest.raises(ValueError, match="--gradient-checkpointing needs train mode"):
        enable_checkpointing(model)
    switch_off_randomness(model)
    assert probes.train_mode_agrees(model) and not model.training
    enable_checkpointing(model)


def test_a_loaded_model_is_one_function_and_names_its_outputs(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    tokenizer.save_pretrained(tmp_path)
    words = {"vocab_size": len(tokenizer), "num_local_experts": 4, "router_jitter_noise": 0.5}
    model = build("mixtral", **words, attention_dropout=0.5, output_router_logits=True)
    model.save_pretrained(tmp_path)
    model = load_policy(str(tmp_path))[0]
    assert probe(model, PROMPTS, 6, 0) == EVERYTHING
    assert probes.train_mode_agrees(model)


EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
MLA |= {"v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1}
LFM2 = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LFM2 |= {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}
FALCON = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}
# Settings of architectures that keep a weight in fp32, by a list of names or as created.
IN_FP32 = {
    "deepseek_v3": EXPERTS | MLA,
    "glm4_moe": EXPERTS | {"first_k_dense_replace": 1},
    "ernie4_5_moe": ERNIE,
    "lfm2_moe": LFM2,
    "nemotron_h": {},
}
SETTINGS = {kind: settings for kind, (_, settings) in (KINDS | REFUSED).items()} | IN_FP32
SETTINGS["falcon_h1"] = FALCON | {"mamba_n_groups": 1}  # casts a buffer that is not saved


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_copy_that_samples_has_the_weights_and_dtypes_of_from_pretrained(kind):
    model = loaded(kind, **SETTINGS[kind])
    state, drawn = model.state_dict(), torch.get_rng_state()
    got = dict(named_tensors(sampling_copy(model, "bf16")))
    assert torch.equal(torch.get_rng_state(), drawn) and model.config.dtype != torch.bfloat16
    bf16 = {"dtype": torch.bfloat16}
    want = type(model).from_pretrained(None, config=model.config, state_dict=state, **bf16)
    dtypes = {name: tensor.dtype for name, tensor in named_tensors(want)}
    assert {name: tensor.dtype for name, tensor in got.items()} == dtypes
    kept = torch.float32 in [dtypes.get(name) for name in state]
    assert kept == (kind in IN_FP32) and torch.bfloat16 in dtypes.values()
    for name, tensor in named_tensors(want):
        assert torch.equal(got[name], tensor), name


LIMITS = [
    ("mpt", "max_seq_len", 48),
    ("gpt2", "n_positions", 48),
    ("llama", "max_position_embeddings", 48),
    ("bloom", None, 2**31),
]


@pytest.mark.parametrize(("kind", "name", "limit"), LIMITS)
def test_the_context_length_is_found_under_every_name(kind, name, limit):
    config = AutoConfig.for_model(kind, **({name: limit} if name else {}))
    assert context_length(SimpleNamespace(config=config)) == limit


def test_a_deprecated_call_fails_here_and_in_the_processes_that_tests_start():
    for kind in (FutureWarning, DeprecationWarning):
        with pytest.raises(kind):
            warnings.warn("renamed", kind, stacklevel=1)
        call = f"import warnings; warnings.warn('renamed', {kind.__name__})"
        started = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
        assert started.returncode == 1 and "renamed" in started.stderr
