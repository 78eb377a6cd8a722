"""Packed weights: the plain ones' results, and nothing of them is left when the rollout is over."""

import pytest
import torch
from conftest import tiny_model
from test_architectures import build

from trainer import packed as packing
from trainer.packed import packable, packed
from trainer.probes import probe

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
PROMPTS = [[5, 9, 17, 3, 4], [11, 6], [7, 13]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 130])
def test_a_packed_layer_computes_the_same(rows, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 80, bias)
    for shape in ((rows, 48), (rows, 5, 48)):
        x = torch.randn(shape)
        with packed(layer), torch.no_grad():
            got = layer(x)
            slices = layer(x.repeat_interleave(2, -1)[..., ::2])  # not contiguous
        torch.testing.assert_close(got, layer(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(slices, layer(x), rtol=0, atol=1e-5)


def test_a_packed_bf16_layer_computes_the_same():
    """Without instructions for bf16 it stays plain."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(48, 80).bfloat16(), torch.randn(16, 48).bfloat16()
    with packed(layer), torch.no_grad():
        assert ("forward" in vars(layer)) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
        got = layer(x)
    torch.testing.assert_close(got, layer(x), rtol=0.01, atol=0.01)


def test_each_block_packs_the_weights_of_its_time_and_leaves_none():
    layer, x = torch.nn.Linear(4, 4, bias=False), torch.eye(4)
    for scale in (1.0, 2.0):
        layer.weight.data = torch.full((4, 4), scale)
        with packed(layer), torch.no_grad():
            assert torch.equal(layer(x), torch.full((4, 4), scale))
            layer.weight.data = torch.zeros(4, 4)
            assert torch.equal(layer(x), torch.full((4, 4), scale))  # it is a copy
        assert "forward" not in vars(layer) and not layer(x).any()
        assert layer(x).requires_grad
    with pytest.raises(KeyError), packed(layer):
        raise KeyError
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gpt2", "gpt_neox", "gemma2"])
def test_a_probe_packs_a_large_model_that_agrees(kind, monkeypatch, capsys):
    model = build(kind)
    assert not packable(model) and not probe(model, PROMPTS, 6, pad_id=0).packed
    monkeypatch.setattr(packing, "FEWEST", 0)
    capsys.readouterr()
    assert probe(model, PROMPTS, 6, pad_id=0).packed
    assert "pack" not in capsys.readouterr().out


def test_a_probe_does_not_pack_what_disagrees_or_fails(monkeypatch, capsys):
    monkeypatch.setattr(packing, "FEWEST", 0)
    right = packing.linear
    monkeypatch.setattr(packing, "linear", lambda w, b, x: right(w, b, x) * 1.1)
    assert not probe(build("llama"), PROMPTS, 6, pad_id=0).packed
    assert "packed weights change this model's log-probabilities" in capsys.readouterr().out
    monkeypatch.setattr(packing, "linear", lambda w, b, x: 1 / 0)
    assert not probe(build("llama"), PROMPTS, 6, pad_id=0).packed
    said = capsys.readouterr().out
    assert "cannot be packed (ZeroDivisionError" in said and "sampling with the plain ones" in said


def test_only_a_cpu_with_onednn_packs(monkeypatch):
    monkeypatch.setattr(packing, "FEWEST", 0)
    assert packable(tiny_model())
    assert not packable(tiny_model().to("meta"))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not packable(tiny_model())
