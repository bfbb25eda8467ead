"""Low-rank adapters on the language model, through peft."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from vilavt_core.checkpoint import adapter_base, adapter_folder, require_vilavt, write_build_info
from vilavt_core.checkpoint.build_info import PROVENANCE, public_name
from vilavt_core.checkpoint.card import write_card
from vilavt_core.checkpoint.companions import bring_companions
from vilavt_core.checkpoint.hub import checkpoint_folder
from vilavt_core.checkpoint.layout import ADAPTER_CONFIG, read_json
from vilavt_core.checkpoint.writing import check_destination, staged_folder
from vilavt_core.errors import TrainingError
from vilavt_core.failures import loading
from vilavt_core.sft_config import LoraSettings

from ..modeling_vilavt import VilavtForConditionalGeneration


def add_adapters(model: Any, settings: LoraSettings, base: str) -> Any:
    """The model with adapters in its language model; nothing else is trained.

    Args:
        model: a `VilavtForTraining`.
        settings: see there.
        base: where the model came from, noted in the adapter.

    Raises:
        TrainingError: peft is not installed.
    """
    peft = _peft()
    layers = "|".join(map(re.escape, settings.targets))
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        # the query encoder has layers of the same names
        target_modules=rf".*\blanguage_model\.layers\.\d+\.\w+\.({layers})",
        bias="none",
        base_model_name_or_path=base,
    )
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def merge_adapter(
    adapter: str | os.PathLike, destination: str | os.PathLike, *, base: str | None = None, dtype: str = "bf16"
) -> Path:
    """Add an adapter's update to the weights it was trained on, and write a complete checkpoint.

    Args:
        adapter: folder that a LoRA run saved, or its hub id.
        destination: new folder.
        base: checkpoint folder; default: the one that the adapter names.
        dtype: of the weights written, ``bf16`` or ``fp32``; the sum is taken in fp32.

    Raises:
        TrainingError: not an adapter of ours, or peft is not installed.
        CheckpointError: the destination exists, or the adapter names no base.
    """
    peft = _peft()
    check_destination(destination)
    folder = adapter_folder(adapter)
    if folder is None:
        raise TrainingError(f"{adapter}: no {ADAPTER_CONFIG}; name an adapter's folder or hub id")
    base = str(adapter_base(folder, base))
    require_vilavt(base)
    with loading(str(base)):
        model = VilavtForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    with loading(str(adapter)):
        merged = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    merged.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    with staged_folder(destination) as partial:
        merged.save_pretrained(partial)
        (partial / "generation_config.json").unlink(missing_ok=True)
        bring_companions(partial, [folder, checkpoint_folder(base)])
        details: dict[str, Any] = {"made_by": "merge-lora", "adapter": Path(adapter).name, "base": public_name(base)}
        if (folder / PROVENANCE).is_file():
            details["source_provenance"] = read_json(folder / PROVENANCE)
        write_build_info(partial, details)
        write_card(partial)
    return Path(destination)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise TrainingError('LoRA needs peft: pip install "vilavt-hf[lora]"') from None
    return peft
