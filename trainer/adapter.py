"""Adapters in PEFT's format, without peft: written beside a run's model, merged into a loaded one.

A folder with adapter_config.json and adapter_model.safetensors, in which each adapted layer has
A [r, in] under base_model.model.NAME.lora_A.weight, and B [out, r] likewise.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from trainer.lora import adapted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.{}.lora_{}.weight"
# Entries of adapter_config.json that leave W + (alpha / r) B A as it is. Whatever else is on, such
# as use_dora or use_rslora, means another sum.
NEUTRAL = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
    *("r", "rank_pattern", "lora_alpha", "lora_dropout", "inference_mode", "megatron_core"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("ensure_weight_tying", "qalora_group_size"),
}
ALLOWED = {"bias": ["none"], "init_lora_weights": [True, "gaussian"], "revision": ["main"]}


def save_adapter(folder, model):
    """Write the adapters of a model into the folder, as the peft library reads them."""
    layers = adapted(model)
    first = next(iter(layers.values()))
    base = model.name_or_path
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).is_dir() else base,
        "r": len(first.A),
        "lora_alpha": first.scale * len(first.A),
        "target_modules": list(layers),
        "inference_mode": True,
    }
    tensors = {}
    for name, layer in layers.items():
        tensors[KEY.format(name, "A")] = layer.A.detach().contiguous()
        tensors[KEY.format(name, "B")] = layer.B.detach().contiguous()
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(folder, model):
    """Fill the adapters of the model with those that save_adapter wrote; the same layers."""
    tensors = load_file(folder / WEIGHTS)
    for name, layer in adapted(model).items():
        layer.A.copy_(tensors.pop(KEY.format(name, "A")))
        layer.B.copy_(tensors.pop(KEY.format(name, "B")))
    if tensors:
        raise ValueError(f"the model has no adapter for {min(tensors)}")


def read_config(path):
    """The content of an adapter_config.json. Raises ValueError unless it is of plain LoRA."""
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    others = {name: value for name, value in config.items() if value and name not in NEUTRAL}
    others = {name: value for name, value in others.items() if value not in ALLOWED.get(name, [])}
    if config.get("peft_type") != "LORA":
        others = {"peft_type": config.get("peft_type")}
    for name, value in others.items():
        raise ValueError(
            f"its adapter is not plain LoRA ({name}: {json.dumps(value)[:60]} in {CONFIG}). Merge "
            "it into its model first, with PEFT's merge_and_unload."
        )
    return config


@torch.no_grad()
def merge_adapter(name, config, model):
    """Add (alpha / r) B A to the weights of the model, in place.

    name: the adapter's folder or Hub name. Raises ValueError if a tensor has no layer in the model.
    """
    tensors = load_file(cached_file(name, WEIGHTS))
    layers = dict(model.named_modules())
    while tensors:
        key = min(tensors)
        layer = layers.get(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        A, B = tensors.pop(key), tensors.pop(key.replace(".lora_A.", ".lora_B."), None)
        shape = None if B is None else torch.Size([len(B), A.shape[1]])
        if type(layer) is not torch.nn.Linear or layer.weight.shape != shape:
            raise ValueError(f"its adapter does not fit the model: no linear layer for {key}.")
        layer.weight += config["lora_alpha"] / len(A) * (B.float() @ A.float())
