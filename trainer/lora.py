"""LoRA: train two thin matrices beside each frozen weight. Hu et al., arXiv 2106.09685, §4.1.

    y = W x + (alpha / r) B A x          W [out, in] frozen, A [r, in], B [out, r]

B starts at 0, so training starts from the model as it is; A starts as PEFT's does. Only A and B get
gradients and AdamW's moments: r (in + out) numbers per layer instead of in x out. Which layers,
alpha = 2 r, and the learning rate's factor of 10 are our choices: the paper adapts attention only.
"""

import contextlib
import copy
import math

import torch
from torch.nn.functional import linear


class LoRALinear(torch.nn.Module):
    """A frozen linear layer with an adapter of rank r."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.on = True
        like = {"device": base.weight.device, "dtype": torch.float32}
        self.A = torch.nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.B = torch.nn.Parameter(torch.zeros(base.out_features, rank, **like))
        torch.nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        """x [..., in] -> [..., out], in the dtype of the frozen layer's result."""
        y = self.base(x)
        if not self.on:
            return y
        # (alpha / r) B A x: through the thin matrices, A first
        return y + (self.scale * linear(linear(x.to(self.A.dtype), self.A), self.B)).to(y.dtype)

    def merged(self):
        """A plain layer with the weight W + (alpha / r) B A, in W's dtype."""
        W = self.base.weight
        weight = (W.float() + self.scale * self.B.detach() @ self.A.detach()).to(W.dtype)
        memo = {id(W): torch.nn.Parameter(weight, requires_grad=False)}
        return copy.deepcopy(self.base, memo)


def add_adapters(model, rank, alpha, targets=None):
    """Freeze the model, in place, and give its linear layers adapters. Returns the layers' names.

    targets: last parts of the names of the layers to adapt, such as {"q_proj", "v_proj"}; None: all
    but the head. Raises ValueError if the model has no such layer.
    """
    model.requires_grad_(False)
    head, chosen = model.get_output_embeddings(), []
    for name, layer in model.named_modules():
        wanted = layer is not head if targets is None else name.split(".")[-1] in targets
        if type(layer) is torch.nn.Linear and wanted:
            chosen.append((name, layer))
    missing = set(targets or ()) - {name.split(".")[-1] for name, _ in chosen}
    if missing or not chosen:
        what = f"called {', '.join(sorted(missing))}" if missing else "but its head"
        raise ValueError(f"--lora: the model has no linear layer {what}")
    for name, layer in chosen:
        model.set_submodule(name, LoRALinear(layer, rank, alpha))
    return [name for name, _ in chosen]


def adapted(model):
    """{name: LoRALinear} of the model, in its order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextlib.contextmanager
def adapters_off(model):
    """During the with block the model computes as before training: the reference of a KL term."""
    layers = adapted(model).values()
    for layer in layers:
        layer.on = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.on = True


def merged_model(model):
    """A copy with plain layers in place of adapted ones, which shares all other weights."""
    done = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    done.update({id(layer): layer.merged() for layer in adapted(model).values()})
    return copy.deepcopy(model, done)  # takes what is done instead of copying it
