"""gradients.py: the gradients are autograd's, and a weight is cast once."""

import gc

import pytest
import torch
from test_architectures import KINDS, loaded
from torch.nn.functional import embedding, linear

from trainer.gradients import InPlace
from trainer.logprobs import token_logprobs


def autocast(on):
    return torch.autocast("cpu", torch.bfloat16, enabled=on, cache_enabled=False)


def forward(model, bf16, **how):
    """The log-probabilities of three rows."""
    ids = torch.arange(60).view(3, 20) % 48
    with autocast(bf16):
        return token_logprobs(model, [[1, 2, 3]] * 3, ids, torch.ones_like(ids).bool(), **how)[0]


def backward(model, bf16, **how):
    """`forward`, and a backward pass. Returns the log-probabilities."""
    out = forward(model, bf16, **how)
    out.backward(gradient=torch.linspace(-1, 1, out.numel()).view_as(out))
    return out.detach()


def gradients(model, bf16=False, passes=1, **how):
    model.zero_grad()
    for _ in range(passes):
        backward(model, bf16, **how)
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_autograd_in_one_pass_and_in_two(kind, bf16):
    layout, settings = KINDS[kind]
    model = loaded(kind, **settings)
    plain = gradients(model, bf16, through_head=False)
    size = max(grad.abs().max() for grad in plain if grad is not None)
    atol = size * (2e-2 if bf16 else 1e-5)
    for passes in (1, 2):
        for head, share in ((False, False), (layout.through_head, layout.share_prompts)):
            how = {"through_head": head, "share_prompts": share, "casts": {}}
            ours = gradients(model, bf16, passes, **how)
            for a, b in zip(plain, ours, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(b, passes * a, rtol=0, atol=passes * atol)


def layer(bias):
    """(weight [4, 3], bias or None), with a gradient of earlier passes."""
    weight = torch.nn.Parameter(torch.randn(4, 3))
    weight.grad = torch.ones_like(weight)
    return weight, torch.nn.Parameter(torch.randn(4)) if bias else None


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (3,), (0, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_is_that_of_torch_bit_for_bit(bias, shape, bf16):
    (weight, b), x = layer(bias), torch.randn(shape, requires_grad=True)
    push = torch.randn(*shape[:-1], 4)
    found = []
    for mode in (None, InPlace({})):
        weight.grad, x.grad = torch.ones_like(weight), None
        with autocast(bf16):
            if mode is None:
                y = linear(x, weight, b)
            else:
                with mode:
                    y = linear(x, weight, b)
        y.backward(push.to(y.dtype))
        found.append((y.detach(), weight.grad, x.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if bf16 else 1e-6)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_an_embedding_is_that_of_torch_and_spares_the_padding(padding_idx):
    weight, ids = torch.nn.Parameter(torch.randn(5, 3)), torch.tensor([[1, 2, 2], [4, 1, 1]])
    embedding(ids, weight, padding_idx).backward(torch.ones(2, 3, 3))
    want, weight.grad = 2 * weight.grad, None
    for _ in range(2):
        with InPlace({}):
            embedding(ids, weight, padding_idx).backward(torch.ones(2, 3, 3))
    assert torch.equal(weight.grad, want) and want[1].any()
    assert want[2].any() == (padding_idx is None)


def test_frozen_weights_get_no_gradient_and_keep_no_input():
    frozen, trained = (
        torch.nn.Parameter(torch.randn(3, 3), requires_grad=on) for on in (False, True)
    )
    kept = []
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.shape) or x, lambda x: x
    )
    with keep, InPlace({}):
        y = linear(linear(torch.randn(2, 3), trained), frozen)
    y.backward(torch.ones(2, 3))
    assert frozen.grad is None and trained.grad.any() and kept == [(2, 3)]


def test_a_weight_is_cast_once_until_the_casts_are_cleared():
    model, casts = loaded("llama"), {}
    before = backward(model, True, casts=casts)
    first = dict(casts)
    backward(model, True, casts=casts)
    linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert {id(weight) for weight in casts} == {id(weight) for weight in linears}
    assert all(casts[weight] is first[weight] for weight in linears)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert torch.equal(backward(model, True, casts=casts), before) is False  # the norms moved
    casts.clear()
    fresh = backward(model, True, casts=casts)
    assert torch.equal(fresh, backward(model, True, casts={}))
    casts.clear()
    backward(model, False, casts=casts)
    assert not casts


@pytest.mark.parametrize("share_prompts", [False, True])
def test_nothing_stays_behind_with_or_without_a_backward_pass(share_prompts):
    """A saved tensor that holds its graph would never be freed."""
    model = loaded("llama")
    how = {"share_prompts": share_prompts}
    gradients(model, True, casts={}, **how)
    before = live_bytes()
    for _ in range(2):
        gradients(model, True, casts={}, **how)
        forward(model, True, casts={}, **how)
    assert live_bytes() == before


def live_bytes():
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.device.type == "cpu"}.values())
