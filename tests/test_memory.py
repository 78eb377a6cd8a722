"""memory.py: the rows that --micro-batch auto chooses, against the memory that is really used."""

import os
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_architectures import KINDS, loaded

from trainer import memory
from trainer.bf16 import sampling_copy
from trainer.logprobs import token_logprobs
from trainer.memory import bytes_per_token, bytes_to_come, kept_bytes, rows_that_fit

MIB = 2**20
DTYPES = "fp32", "bf16"
LLAMA = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "head_dim": 16}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def allocated_peak(work):
    """The most bytes that torch had allocated during work() above those before it."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profiled:
        work()
    # Not profiled.events(): it assigns most allocations to operations.
    events = profiled.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def update_peak(model, rows, dtype, share_prompts=False, tokens=96):
    """Peak bytes of a forward and backward pass; prompts and completions of half the tokens."""
    ids = torch.arange(tokens // 2).expand(rows, -1) % 64
    mask = torch.ones_like(ids).bool()

    def work():
        how = {"share_prompts": share_prompts, "casts": {}}
        with torch.autocast("cpu", torch.bfloat16, dtype == "bf16", cache_enabled=False):
            out, _ = token_logprobs(model, ids.tolist(), ids, mask, **how)
        out.backward(gradient=torch.ones_like(out))

    work()  # the gradients are allocated
    return allocated_peak(work)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_estimate_is_a_little_above_the_memory_of_a_real_update(dtype):
    model = loaded("llama", **LLAMA)
    one, nine = update_peak(model, 1, dtype), update_peak(model, 9, dtype)
    measured = (nine - one) / 8
    estimate = 96 * bytes_per_token(model, dtype, True, False)
    assert measured < estimate < 1.3 * measured
    assert update_peak(model, 9, dtype, share_prompts=True) < nine


def test_shared_prompts_hold_no_second_gradient_of_the_weights():
    """One row of few tokens: as one graph, the peak grew by the layers' weights."""
    model = loaded("llama", **{**LLAMA, "hidden_size": 128, "num_hidden_layers": 8})
    layers = 4 * sum(p.numel() for p in model.model.layers.parameters())
    apart = update_peak(model, 1, "fp32", tokens=8)
    shared = update_peak(model, 1, "fp32", share_prompts=True, tokens=8)
    assert shared < apart + layers / 4


def test_the_estimate_of_bf16_is_below_that_of_fp32():
    model = loaded("llama", **LLAMA)
    fp32, bf16 = (bytes_per_token(model, dtype, True, False) for dtype in DTYPES)
    assert 0.5 < bf16 / fp32 < 0.8  # norms and residuals stay in fp32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_covers_every_architecture(kind, dtype):
    layout, settings = KINDS[kind]
    model, head = loaded(kind, **settings), layout.through_head
    one, five = (kept_bytes(model, rows, 32, dtype, head) for rows in (1, 5))
    kept = (five - one) / (4 * 32)  # per token
    estimate = bytes_per_token(model, dtype, head, False)
    assert kept < estimate < 2 * kept  # two layers, and one of them counted twice
    assert bytes_per_token(model, dtype, head, True) < estimate


@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_that_samples_is_the_model_loaded_in_bf16(tied, tmp_path):
    """Tied weights stay tied, buffers are what from_pretrained makes of them, and no fp32 copy of
    the weights is made on the way.
    """
    model = loaded("llama", **LLAMA, tie_word_embeddings=tied)
    if tied:
        model.tie_weights()
    copies = []
    peak = allocated_peak(lambda: copies.append(sampling_copy(model, "bf16")))
    weights = sum(p.numel() for p in model.parameters())
    assert 2 * weights <= peak < 2.2 * weights
    copy = copies[0]
    model.save_pretrained(tmp_path)
    want = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = dict(getattr(copy, kind)()), dict(getattr(want, kind)())
        assert found.keys() == wanted.keys() and found
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert (copy.lm_head.weight is copy.model.embed_tokens.weight) == tied
    assert not copy.training and sampling_copy(model, "fp32") is model


def test_a_kept_copy_is_the_same_object_with_the_new_weights():
    model = tiny_model()
    kept = sampling_copy(model, "bf16", keep=True)
    torch.nn.init.normal_(model.lm_head.weight)
    assert not torch.equal(kept.lm_head.weight, model.lm_head.weight.bfloat16())
    assert sampling_copy(model, "bf16", keep=True) is kept
    for got, want in zip(kept.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(got, want.to(got.dtype))
    assert sampling_copy(model, "bf16") is not kept  # without keep, another copy
    assert "kept_copy" not in dict(model.named_modules())
    assert model.dtype == torch.float32 and all(p.requires_grad for p in model.parameters())


def test_what_else_an_update_allocates():
    model = loaded("llama", **LLAMA)
    weights = 4 * sum(p.numel() for p in model.parameters())
    head, chunks = 4 * 64 * 64, 3 * 4 * 2**24
    assert bytes_to_come(model, "fp32") == 3 * weights + chunks
    assert bytes_to_come(model, "bf16") == 3.5 * weights + head / 2 + chunks


@pytest.mark.parametrize(("rows", "fit"), [(0.5, 1), (1, 1), (7.5, 7), (8, 8)])
def test_the_rows_are_those_that_fit_and_at_least_1(rows, fit, monkeypatch):
    model = loaded("llama", **LLAMA)
    row = 100 * bytes_per_token(model, "fp32", True, False)
    free = bytes_to_come(model, "fp32") + int(rows * row / memory.SHARE["cpu"]) + 2
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert rows_that_fit(model, 100, through_head=True)[:2] == (fit, row)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert rows_that_fit(model, 100, through_head=True) == (1, row, 0)


def test_free_memory_of_a_gpu_includes_what_the_allocator_keeps_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 200)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 150)
    assert memory.free_bytes(CUDA) == 750


def test_free_memory_of_a_cpu_is_the_systems_or_the_containers(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "system_bytes", lambda: 1000)
    limit, used = tmp_path / "limit", tmp_path / "used"
    monkeypatch.setattr(memory, "CGROUPS", [(limit, used)])
    assert memory.free_bytes(CPU) == 1000  # no such files
    used.write_text("300\n")
    for text, free in (("max\n", 1000), ("9223372036854771712\n", 1000), ("800\n", 500)):
        limit.write_text(text)
        assert memory.free_bytes(CPU) == free


def test_the_systems_memory_is_known_or_assumed(monkeypatch):
    available = memory.system_bytes()
    assert 100 * MIB < available < 2**45

    def nothing(*_):
        raise OSError

    monkeypatch.setattr(memory.Path, "read_text", nothing)
    assert memory.system_bytes() >= available  # the physical memory
    monkeypatch.setattr(memory.os, "sysconf", nothing)
    assert memory.system_bytes() == memory.UNKNOWN


def test_freed_memory_between_blocks_in_use_goes_back_to_the_system():
    if not hasattr(memory.c_library(), "malloc_trim"):
        pytest.skip("this C library has no malloc_trim")
    model = torch.nn.Linear(1000, 10_000)  # weights enough
    model.device = CPU
    blocks = [torch.ones(25_000) for _ in range(1000)]  # 100 kB each
    del blocks[:-1]
    memory.return_free_memory(model)
    blocks += [torch.ones(25_000) for _ in range(1000)]
    del blocks[1:-1]  # the last one keeps the heap from shrinking
    before = resident()
    memory.return_free_memory(model)
    assert resident() < before - 50 * MIB


def resident():
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("weights", [1000, 20_000_000])
def test_memory_is_returned_for_large_models_alone(weights, monkeypatch):
    called = []

    class Library:
        malloc_trim = called.append

    monkeypatch.setattr(memory, "c_library", lambda: Library)
    model = torch.nn.Linear(weights // 1000, 1000, bias=False, device="meta")
    model.device = CPU
    memory.return_free_memory(model)
    assert called == [0] * (weights > 10_000_000)
    model.device = CUDA
    memory.return_free_memory(model)
    assert called == [0] * (weights > 10_000_000)
