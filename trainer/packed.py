"""Sample on a CPU with weights that are laid out for its matrix products.

To draw a token, generate multiplies a few rows by every weight of the model. The kernels read a
weight in small blocks. With so few rows, gathering the blocks from the matrix takes as long as
multiplying. oneDNN, torch's library of such kernels, can store them gathered. That is done once per
rollout here, and changes the rounding only. docs/benchmarks.md has the times.
"""

import contextlib
import functools

import torch

FEWEST = 10_000_000  # weights of a model: the embedded one's 0.7 M got 7% slower


def packable(model):
    """Whether the model is large enough, and its weights are on a CPU that oneDNN can pack for."""
    return (
        model.device.type == "cpu"
        and sum(weight.numel() for weight in model.parameters()) >= FEWEST
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@contextlib.contextmanager
def packed(model):
    """During the with block, the model's linear layers multiply by packed copies of their weights.

    The copies take as much memory as these weights. No gradient flows through them.
    """
    dtypes = [torch.float32]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.append(torch.bfloat16)
    layers = [
        layer
        for layer in model.modules()
        if type(layer) is torch.nn.Linear and layer.weight.dtype in dtypes
    ]
    try:
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            layer.forward = functools.partial(linear, weight, layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # the class has the plain one


def linear(weight, bias, x):
    """x [..., D] W^T + bias, for a packed weight W."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
