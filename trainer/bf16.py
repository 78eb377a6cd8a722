"""--dtype bf16: a bf16 copy of the model to sample from.

The trained weights stay fp32: at a learning rate of 1e-6 an update is smaller than half a bf16 ulp,
and would be rounded away. `sampling_copy` casts all of them at each rollout, because generate reads
every weight once per token, and bf16 halves the bytes.
"""

import copy
import re

import torch
from transformers import AutoModelForCausalLM

from trainer.lora import adapted, merged_model


def sampling_copy(model, dtype, keep=False):
    """The model to sample from: the model itself for fp32, a bf16 copy for bf16; with LoRA a copy
    with merged weights, in the dtype of the frozen ones.

    Each rollout makes a new copy, so no update has to keep it in memory. Each weight and buffer has
    the dtype that from_pretrained(dtype=bfloat16) gives it.

    keep: keep the copy, and renew its weights at the next call. generate compiles a model for
    --cache static, and would compile another copy again.
    """
    layers = adapted(model)
    if dtype != "bf16" and not layers:
        return model
    kept = vars(model).get("kept_copy")
    if keep and kept is not None:
        merged = {f"{name}.weight": layer.weight for name, layer in layers.items()}
        kept.load_state_dict(merged or model.state_dict(), strict=not layers)
        return kept
    copied = merged_model(model) if layers else bf16_copy(model)
    if keep:
        vars(model)["kept_copy"] = copied  # not an attribute: it is no part of the model
    return copied


def bf16_copy(model):
    """A copy whose weights and buffers have the dtypes of `bf16_dtypes`, without gradients."""
    dtypes = bf16_dtypes(model)
    copies = {}  # {id: copy}, for deepcopy: it takes these and makes no fp32 copy of its own
    for name, weight in named_tensors(model):
        cast = weight.detach().to(dtypes[name], copy=True)
        if isinstance(weight, torch.nn.Parameter):
            cast = torch.nn.Parameter(cast, requires_grad=False)
        copies.setdefault(id(weight), cast)
    return copy.deepcopy(model, copies)


def hold_in_bf16(model):
    """Cast the model's weights and buffers, in place, to the dtypes of `bf16_dtypes`."""
    dtypes = bf16_dtypes(model)
    for name, weight in named_tensors(model):
        weight.data = weight.data.to(dtypes[name])


def bf16_dtypes(model):
    """{name: dtype} of the weights and buffers of from_pretrained(dtype=bfloat16).

    Some stay fp32: what the architecture creates in fp32, such as the frequencies of rotary
    embeddings, and what it lists as to be kept, such as the biases of a router.
    """
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in named_tensors(blank)}
    patterns = model._keep_in_fp32_modules_strict or ()  # glob patterns of parts of names
    for name in blank.state_dict():
        if any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns):
            dtypes[name] = torch.float32
    return dtypes


def named_tensors(model):
    """(name, weight or buffer), each once: a tied weight has its first name."""
    return [*model.named_parameters(), *model.named_buffers()]
