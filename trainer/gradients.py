"""Layers that add the gradients of their weights to `.grad` in place, and cast a weight once.

Autograd makes a new tensor of each weight's gradient and adds it to `.grad`. For the embedding it
first fills a matrix with zeros, one row per word of the vocabulary. Under autocast every weight is
cast to bf16 in each forward pass, and the casts are kept until the backward pass. All this is paid
per micro-batch, whatever the number of its tokens.
"""

import torch
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode

FEWEST = 10_000_000  # weights of a model that runs so; our choice, as in packed.py


class InPlace(TorchFunctionMode):
    """In its `with` block, linear layers run as `Linear`, and embeddings as `Embedding`.

    A backward pass through them needs backward(), not torch.autograd.grad. Other layers are left to
    autograd. casts: {weight: its cast}, filled in here. Clear it when the weights change.
    """

    def __init__(self, casts):
        super().__init__()
        self.casts = casts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        ours = {linear: self.linear, embedding: self.embedding}.get(function, function)
        return ours(*args, **(kwargs or {}))

    def linear(self, x, weight, bias=None):
        """x [..., in], weight [out, in] -> [..., out]"""
        if not isinstance(weight, torch.nn.Parameter) or x.ndim < 2:
            return linear(x, weight, bias)
        return Linear.apply(x, weight, cast(weight, self.casts), bias)

    def embedding(self, ids, weight, padding_idx=None, max_norm=None, *others, **more):
        """ids [...], weight [V, D] -> [..., D]"""
        if not isinstance(weight, torch.nn.Parameter) or max_norm is not None:
            return embedding(ids, weight, padding_idx, max_norm, *others, **more)
        return Embedding.apply(ids, weight, -1 if padding_idx is None else padding_idx)


class Linear(torch.autograd.Function):
    """x W^T + b, computed in the dtype of `cast`: x [..., in] -> [..., out]."""

    @staticmethod
    def forward(ctx, x, weight, cast, bias):
        x = x.to(cast.dtype)
        ctx.weight, ctx.cast = weight, cast
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return linear(x, cast, bias)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if x is not None:
            add_product(ctx.weight, grad.flatten(0, -2), x.flatten(0, -2))
        grad_x = grad @ ctx.cast if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_bias


class Embedding(torch.autograd.Function):
    """The rows `ids` of the weight; the row of the padding gets no gradient, as in torch."""

    @staticmethod
    def forward(ctx, ids, weight, padding):
        ctx.ids, ctx.weight, ctx.padding = ids, weight, padding
        return embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        weight, real = ctx.weight, ctx.ids != ctx.padding
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ctx.ids[real], grad[real])
        return None, None, None


def add_product(weight, left, right):
    """weight.grad += left^T right, for left [N, out] and right [N, in]."""
    if weight.grad is None:
        weight.grad = (left.T @ right).to(weight.dtype)
    elif weight.grad.dtype == left.dtype:
        weight.grad.addmm_(left.T, right)  # without a temporary as large as the weight
    else:
        weight.grad += left.T @ right


def cast(weight, casts):
    """The weight without a graph; under autocast in its dtype, from `casts` if it is there."""
    kind = weight.device.type
    if not torch.is_autocast_enabled(kind):
        return weight.detach()
    if weight not in casts:
        casts[weight] = weight.detach().to(torch.get_autocast_dtype(kind))
    return casts[weight]
