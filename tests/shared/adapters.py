"""A LoRA adapter for a ViLaVT, and the model with its update merged in."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK, ALPHA = 8, 16
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def write_adapter(model: Any, folder: Path, *, seed: int, spread: float) -> Any:
    """Write a random adapter of the language model as peft does, and return a copy of the model with it merged in."""
    generator = torch.Generator().manual_seed(seed)
    merged, tensors = copy.deepcopy(model), {}
    for name, module in merged.named_modules():
        if name.startswith("model.language_model.") and name.endswith(TARGETS):
            a = torch.randn(RANK, module.in_features, generator=generator) * spread
            b = torch.randn(module.out_features, RANK, generator=generator) * spread
            module.weight.data += ALPHA / RANK * b @ a
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [target.rsplit(".", 1)[-1] for target in TARGETS]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return merged
