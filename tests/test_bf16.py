"""bf16.py: the gradient of plain autocast, from less memory, and nothing stays behind."""

import gc

import pytest
import torch
from test_architectures import KINDS, loaded

from trainer.bf16 import bf16_compute, keep_once, restore
from trainer.logprobs import token_logprobs

LLAMA = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "head_dim": 16}


def plain_autocast():
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def logprobs_of(model, **how):
    ids = torch.arange(60).view(3, 20) % 48
    out, _ = token_logprobs(model, [[1, 2, 3]] * 3, ids, torch.ones_like(ids).bool(), **how)
    return out


def gradients(model, compute, **how):
    model.zero_grad()
    with compute:
        out = logprobs_of(model, **how)
    out.backward(gradient=torch.linspace(-1, 1, out.numel()).view_as(out))
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_autocast_bit_for_bit(kind):
    layout, settings = KINDS[kind]
    model = loaded(kind, **settings)
    how = {"through_head": layout.through_head, "share_prompts": layout.share_prompts}
    want = gradients(model, plain_autocast(), **how)
    for a, b in zip(want, gradients(model, bf16_compute("cpu"), **how), strict=True):
        assert a is b is None or torch.equal(a, b)


def kept_bytes(model, compute, keep):
    kept = {}

    def pack(tensor):
        tensor = keep(tensor)
        if isinstance(tensor, torch.Tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with compute, torch.autograd.graph.saved_tensors_hooks(pack, restore):
        out = logprobs_of(model)
    assert out.requires_grad
    return sum(kept.values())


def test_no_copy_of_a_weight_and_one_of_each_input_is_kept():
    model = loaded("llama", **LLAMA)
    plain = kept_bytes(model, plain_autocast(), torch.Tensor.detach)
    ours = kept_bytes(model, plain_autocast(), keep_once())
    layers = 2 * sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    copies = 6 * 3 * 2 * 64 * 3 * (20 + 2)  # 6 layers, 3 copies, bf16, width, rows, tokens but one
    assert plain - ours == pytest.approx(layers + copies, rel=0.02)


def test_equal_tensors_are_kept_once_and_unequal_ones_apart():
    keep = keep_once()
    a = torch.tensor([1.0, 2.0]).bfloat16()
    first, again, other = keep(a), keep(a.clone()), keep(a + 1)
    assert again is first and other is not first
    assert torch.equal(restore(other), a + 1)
    assert keep(a.view(1, 2)) is not first  # another shape


@pytest.mark.parametrize("transposed", [False, True])
def test_a_cast_weight_comes_back_as_it_was(transposed):
    weight = torch.randn(4, 4, requires_grad=True)
    cast = weight.bfloat16().t() if transposed else weight.bfloat16()
    kept = keep_once()(cast)
    assert kept[0] is weight
    assert torch.equal(restore(kept), cast) and restore(kept).stride() == cast.stride()


@pytest.mark.parametrize("share_prompts", [False, True])
def test_nothing_stays_behind_with_or_without_a_backward_pass(share_prompts):
    """A saved tensor that holds its graph would never be freed."""
    model = loaded("llama", **LLAMA)
    gradients(model, bf16_compute("cpu"), share_prompts=share_prompts)
    before = live_bytes()
    for _ in range(2):
        gradients(model, bf16_compute("cpu"), share_prompts=share_prompts)
        with bf16_compute("cpu"):
            logprobs_of(model, share_prompts=share_prompts)
    assert live_bytes() == before


def live_bytes():
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.device.type == "cpu"}.values())
