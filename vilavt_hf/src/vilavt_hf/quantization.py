"""Weights in 8 or 4 bits: which package computes with them, and which modules keep all their bits.

All through transformers' ``quantization_config``. What makes a ViLaVT of a Qwen2.5-VL stays as it is, since it is small
(52 of 8,942 million parameters at the 7B shape): the query projections, ``text_proj``; and the LM head.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from vilavt_core.errors import EngineError
from vilavt_core.spelling import did_you_mean

from .configuration_vilavt import VilavtConfig

PACKAGES = {"int8": "torchao", "fp8": "torchao", "int4": "bitsandbytes"}
"""Ways to quantise weights, each with what it needs; activations stay in the model's type."""
_BLOCK = 64
"""Weights that share a scale in int4; bitsandbytes' kernel for CPUs wants whole blocks in every row."""


def quantization_config(method: str, config: VilavtConfig, device: torch.device) -> Any:
    """What to pass to the model's `from_pretrained`.

    Args:
        method: one of `PACKAGES`. ``int8`` and ``fp8`` (e4m3) have a scale for each output, ``int4`` is NF4 in blocks
            of 64 and leaves the vision tower alone.
        config: of the checkpoint.
        device: where the model will be.

    Raises:
        EngineError: no such method, its package is not installed, or it cannot take these sizes.
    """
    if method not in PACKAGES:
        raise EngineError(
            f"weights cannot be quantised as {method!r}; choose {', '.join(PACKAGES)}{did_you_mean(method, PACKAGES)}"
        )
    for package in (PACKAGES[method], "accelerate"):
        if find_spec(package) is None:
            raise EngineError(f"quantize={method} needs the package {package}: pip install {package}")
    kept = unquantised(config)
    if method == "int4":
        from transformers import BitsAndBytesConfig

        if device.type == "cpu":
            _require_whole_blocks(config)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=None if device.type == "cpu" else torch.bfloat16,
            llm_int8_skip_modules=[*kept, "model.visual"],
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    of_weights = Int8WeightOnlyConfig() if method == "int8" else Float8WeightOnlyConfig()
    return TorchAoConfig(of_weights, modules_to_not_convert=kept)


def unquantised(config: VilavtConfig) -> list[str]:
    """Modules that always keep their weights, by their full names: every version reads those alike."""
    joint = sorted(config.vision_config.query_aware_blocks())
    names = [f"model.visual.blocks.{i}.attn.instruct_{part}_proj" for i in joint for part in ("key", "value")]
    return [*names, "model.text_proj", "lm_head"]


def _require_whole_blocks(config: VilavtConfig) -> None:
    for part in ("text_config", "text_encoder_config"):
        for name in ("hidden_size", "intermediate_size"):
            if (size := getattr(getattr(config, part), name)) % _BLOCK:
                raise EngineError(
                    f"quantize=int4 on a CPU takes sizes that are multiples of {_BLOCK}, and {part}.{name} is {size}; "
                    "use int8"
                )
