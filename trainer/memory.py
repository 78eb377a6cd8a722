"""Memory: the rows of an update that fit (`--micro-batch auto`), and what was freed goes back."""

import ctypes
import functools
import math
import os
from pathlib import Path

import torch

from trainer import logprobs
from trainer.probes import train_mode_agrees

# What to use of the memory that is free. CUDA: the allocator leaves gaps between its blocks, and
# an error is corrected (BatchSizes.with_smaller). CPU: other programs need memory too, and an
# error ends the process.
SHARE = {"cuda": 0.9, "cpu": 0.5}
UNKNOWN = 8 * 2**30  # free bytes, where the system does not tell (Windows); our choice
TRIM_FROM = 10_000_000  # weights; our choice, between 0.7 M (slower) and 135 M (worth it)
CGROUPS = (  # a container's limit and use, in bytes: version 2 and version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def choose_micro_batch(model, longest, options, through_head):
    """The rows of a micro-batch for --micro-batch auto, rows of `longest` tokens. Prints them.

    As few passes as fit take a mini-batch, and they are of equal size: a pass has a price whatever
    its rows, and equal passes need the least memory.
    """
    fit, row, budget = rows_that_fit(
        model,
        longest,
        dtype=options.dtype,
        through_head=through_head,
        checkpointing=options.gradient_checkpointing,
    )
    mini_batch = options.rows // options.updates
    passes = math.ceil(mini_batch / fit)
    rows = math.ceil(mini_batch / passes)
    print(
        f"micro-batch: {rows} rows (auto: {row / 2**20:,.1f} MiB per row of {longest} tokens, "
        f"{budget / 2**20:,.0f} MiB for rows); --micro-batch N changes it"
    )
    return rows


def rows_that_fit(model, tokens, *, dtype="fp32", through_head=False, checkpointing=False):
    """(rows of `tokens` tokens that fit into one pass of an update, bytes per row, bytes for rows).

    Call it before the first step, when gradients and moments are not allocated yet.
    """
    row = tokens * bytes_per_token(model, dtype, through_head, checkpointing)
    left = free_bytes(model.device) - bytes_to_come(model, dtype)
    budget = max(0, int(left * SHARE.get(model.device.type, 0.5)))
    return max(1, budget // row), row, budget


def bytes_per_token(model, dtype, through_head, checkpointing):
    """What a forward and a backward pass need for each further token of a batch, in bytes.

    The bytes that autograd keeps of a second row, measured without sharing its prompt, which needs
    less. One layer counts twice, because of the temporary tensors of its backward pass.
    Checkpointing keeps the input of each layer, in fp32, and the one layer that it runs again.
    """
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 1
    hidden = model.get_input_embeddings().weight.shape[-1]
    return with_backward(kept_per_token(model, dtype, through_head), layers, hidden, checkpointing)


def with_backward(kept, layers, hidden, checkpointing):
    """`bytes_per_token`, from the bytes that autograd keeps per token, of all layers."""
    layer = kept // layers
    if checkpointing:
        kept = layer + layers * 4 * hidden
    return kept + layer


def kept_per_token(model, dtype, through_head):
    """The bytes that autograd keeps of each token of a second row."""
    tokens = 8  # per row
    one = kept_bytes(model, 1, tokens, dtype, through_head)
    two = kept_bytes(model, 2, tokens, dtype, through_head)
    return (two - one) // tokens


def kept_bytes(model, rows, tokens, dtype, through_head):
    """The bytes that autograd keeps for the backward pass of rows x tokens tokens."""
    vocabulary = len(model.get_input_embeddings().weight)
    ids = torch.arange(tokens, device=model.device).expand(rows, tokens) % vocabulary
    half = tokens // 2
    completions = ids[:, half:]
    kept = {}  # tensors may share their storage

    bf16 = dtype == "bf16"

    def count(tensor):
        tensor = tensor.detach()  # its graph would hold it, and it the graph, for ever
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        torch.autocast(model.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False),
    ):
        out = logprobs.token_logprobs(
            model,
            ids[:, :half].tolist(),
            completions,
            torch.ones_like(completions, dtype=torch.bool),
            through_head=through_head,
            casts={},
        )
    del out  # the graph must live until here: a freed storage's address is used again
    return sum(kept.values())


def bytes_to_come(model, dtype):
    """What an update allocates besides the activations of its rows, in bytes, by arithmetic."""
    return sum(parts_to_come(model, dtype, model.device.type).values())


def parts_to_come(model, dtype, kind):
    """{part: bytes} of `bytes_to_come` on a device of this kind, such as "cuda".

    Gradients and moments are of the trained weights alone. A product of the size of the head is
    made, if the head is trained, before it is added to the gradient.
    """
    weights, head = list(model.parameters()), model.get_input_embeddings().weight
    trained = sum(p.numel() * p.element_size() for p in weights if p.requires_grad)
    parts = {"gradients": trained, "AdamW's two moments": 2 * trained}
    parts["three chunks of logits"] = 3 * 4 * logprobs.logits_at_once(kind)
    if dtype == "bf16":
        parts["fp32 weights in bf16"] = sum(2 * p.numel() for p in weights if p.element_size() > 2)
        parts["gradient of the head in bf16"] = 2 * head.numel() * head.requires_grad
    return parts


def free_bytes(device):
    """Bytes that this process can still allocate on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)  # by torch's allocator, in part unused
        return free + reserved - torch.cuda.memory_allocated(device)
    return min([system_bytes(), *container_bytes()])


def system_bytes():
    """The system's available memory, in bytes; its physical memory if no more is known."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, value = line.split(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return UNKNOWN


def container_bytes():
    """What the limits of the container leave, in bytes: a list, empty without a limit."""
    left = []
    for limit, used in CGROUPS:
        try:
            left.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such file, or the limit is "max"
            continue
    return left


def enable_checkpointing(model):
    """Have the backward pass recompute each layer's activations, which needs train mode.

    Raises ValueError if the model's log-probabilities differ in train mode.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # its name before transformers 5.20
        model.gradient_checkpointing_enable()
    if not train_mode_agrees(model):
        raise ValueError(
            "--gradient-checkpointing needs train mode, in which this model computes other "
            "log-probabilities than in eval mode (randomness or a clamp): leave it out"
        )


def return_free_memory(model):
    """Return the process's freed memory to the system, where the C library can (glibc).

    It keeps freed blocks for reuse, but blocks of other sizes leave gaps between them. Nothing to
    do for a model on a GPU, or a small one: the embedded model updates a fifth slower with it.
    """
    weights = sum(p.numel() for p in model.parameters())
    if model.device.type != "cpu" or weights < TRIM_FROM:
        return
    trim = getattr(c_library(), "malloc_trim", None)
    if trim:
        trim(0)


@functools.cache
def c_library():
    """The C library that this process uses; None where ctypes cannot tell (Windows)."""
    return ctypes.CDLL(None) if os.name == "posix" else None
