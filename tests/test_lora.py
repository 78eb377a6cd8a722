"""trainer/lora.py: W + (alpha / r) B A by hand; what is trained; merged, and switched off."""

import copy

import pytest
import torch
from conftest import tiny_model

from trainer.lora import LoRALinear, adapted, adapters_off, add_adapters, merged_model

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
