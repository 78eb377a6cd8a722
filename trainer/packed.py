"""Sample on a CPU with weights in the layout of its matrix kernels.

For each token, generate multiplies a few rows by every weight of the model. The kernels work on
small blocks of a weight. With so few rows, collecting the blocks from the matrix can take as long
as the multiplication. oneDNN, torch's library of CPU kernels, can store a weight in blocks: packed.
sampling.py packs the weights once per rollout. Only the rounding of the results changes.
docs/benchmarks.md has the times.
"""

import contextlib
import functools

import torch

FEWEST = 10_000_000  # weights; the embedded model (0.7 M) samples a tenth slower if packed


def packable(model):
    """Whether the model is large enough, and oneDNN is there to pack its weights: on a CPU."""
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
