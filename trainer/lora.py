"""LoRA: train two thin matrices beside each frozen weight. Hu et al., arXiv 2106.09685, §4.1.

    y = W x + (alpha / r) B A x          W [out, in] frozen, A [r, in], B [out, r]

B starts at 0, A as PEFT's does. Only they get gradients and moments: r (in + out) numbers per layer
instead of in x out. Our choices: alpha = 2 r, and all linear layers (the paper: attention).
"""

import contextlib
import copy
import math

import torch
from torch.nn.functional import linear


class LoRALinear(torch.nn.Module):
    def __init__(self, base, rank, alpha):
        """base: the frozen layer."""
        super().__init__()
        self.base, self.scale, self.on = base.requires_grad_(False), alpha / rank, True
        new = base.weight.new_zeros
        self.A = torch.nn.Parameter(new(rank, base.in_features, dtype=torch.float32))
        self.B = torch.nn.Parameter(new(base.out_features, rank, dtype=torch.float32))
        torch.nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        """x [..., in] -> [..., out], in the dtype of the frozen layer's result."""
        y = self.base(x)
        if self.on:
            y = y + (self.scale * linear(linear(x.to(self.A.dtype), self.A), self.B)).to(y.dtype)
        return y

    @property
    def weight(self):
        """W + (alpha / r) B A in W's dtype: for code that reads it, and to merge."""
        W = self.base.weight
        return (W + self.scale * self.B @ self.A).to(W.dtype) if self.on else W

    @property
    def bias(self):
        return self.base.bias


def add_adapters(model, rank, alpha, targets=None):
    """Freeze the model and give its linear layers adapters, in place. Returns the layers' names.

    targets: last parts of the names of the layers to adapt; None: all but the head. Raises
    ValueError if the model has no such layer.
    """
    model.requires_grad_(False)
    head, found = model.get_output_embeddings(), dict(model.named_modules())
    layers = {name: m for name, m in found.items() if type(m) is torch.nn.Linear and m is not head}
    chosen = [name for name in layers if targets is None or name.split(".")[-1] in targets]
    missing = set(targets or ()) - {name.split(".")[-1] for name in chosen}
    if missing or not chosen:
        called = f" called {min(missing)}" if missing else ""
        raise ValueError(f"--lora: besides its head the model has no linear layer{called}")
    for name in chosen:
        model.set_submodule(name, LoRALinear(layers[name], rank, alpha))
    return chosen


def adapted(model):
    """{name: LoRALinear} of the model, in its order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextlib.contextmanager
def adapters_off(model):
    """During the with block the model computes as before training: the reference of a KL term."""
    layers = adapted(model).values()
    try:
        for layer in layers:
            layer.on = False
        yield
    finally:
        for layer in layers:
            layer.on = True


def merged_model(model):
    """A copy with merged weights, which shares all others; the model itself without adapters."""
    layers = adapted(model)
    done = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for layer in layers.values():
        weight = torch.nn.Parameter(layer.weight.detach(), requires_grad=False)
        done[id(layer)] = copy.deepcopy(layer.base, {id(layer.base.weight): weight})
    done[id(vars(model).get("kept_copy"))] = None  # of bf16.sampling_copy
    return copy.deepcopy(model, done) if layers else model  # copies only what is not done
