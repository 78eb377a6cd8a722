"""bf16 compute from fp32 weights, in which autograd keeps no number twice.

Under autocast each linear layer casts its input and its weight to bf16, and autograd keeps both
casts until the backward pass: three equal copies of the input of q_proj, k_proj and v_proj, and a
bf16 copy of every weight. Here the first of equal copies serves all, and a weight is cast again
when the backward pass needs it. The gradient is that of autocast without its cache, bit for bit.
"""

import contextlib

import torch


@contextlib.contextmanager
def bf16_compute(kind):
    """Autocast to bf16 on devices of this type, such as "cpu".

    Do not change the weights between a forward pass in this block and its backward pass.
    """
    with (
        # cache_enabled would hold the bf16 weights until the end of the block.
        torch.autocast(kind, torch.bfloat16, cache_enabled=False),
        torch.autograd.graph.saved_tensors_hooks(keep_once(), restore),
    ):
        yield


def keep_once():
    """A function of a tensor that autograd saves: what to keep of it, for `restore`."""
    last = {}  # {shape: the bf16 tensor of that shape that was kept last}

    def keep(tensor):
        weight, transposed = source(tensor)
        tensor = tensor.detach()  # its graph would hold it, and it the graph, for ever
        if tensor.dtype != torch.bfloat16:
            return tensor
        if weight is not None:
            return weight, transposed
        kept = last.get(tensor.shape)
        if kept is not None and torch.equal(kept, tensor):
            return kept
        last[tensor.shape] = tensor
        return tensor

    return keep


def restore(kept):
    """The tensor that `keep` was given."""
    if isinstance(kept, torch.Tensor):
        return kept
    weight, transposed = kept
    weight = weight.detach().bfloat16()
    return weight.t() if transposed else weight


def source(tensor):
    """(the weight of which the tensor is a cast, whether it is transposed); (None, _) if of none.

    The graph tells: only transpositions and casts lie between the two.
    """
    node, transposed = tensor.grad_fn, False
    while node is not None and node.name() in ("TBackward0", "ToCopyBackward0"):
        transposed ^= node.name() == "TBackward0"
        node = node.next_functions[0][0]
    return getattr(node, "variable", None), transposed
