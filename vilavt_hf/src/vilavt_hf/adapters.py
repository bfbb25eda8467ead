"""Adapters of peft on a model that is asked."""

from __future__ import annotations

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vilavt_core.errors import EngineError


def put_adapter(model: Any, folder: str | os.PathLike) -> Any:
    """The model with the adapter of a folder in its layers, not merged: its own weights may be quantised.

    Raises:
        EngineError: peft is not installed, or see `bare_model`.
    """
    if find_spec("peft") is None:
        raise EngineError(f'{folder} is an adapter, which needs peft: pip install "vilavt-hf[lora]"')
    from peft import PeftModel

    return bare_model(PeftModel.from_pretrained(model, os.fspath(folder)))


def bare_model(model: Any) -> Any:
    """The model inside a ``PeftModel``, its layers adapted; any other model as it is.

    Raises:
        EngineError: the adapter is a learned prompt, which has no place in the layers.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    for name, config in model.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            raise EngineError(
                f"adapter {name!r} is a learned prompt ({config.peft_type}), and prompts are written by the episode; "
                "use one that changes layers, such as LoRA"
            )
    return model.get_base_model()


def adapted_fingerprint(base: str, folder: Path) -> str:
    """SHA-256 (hex) of a base's fingerprint and an adapter's files."""
    digest = hashlib.sha256(base.encode())
    for path in sorted(folder.glob("adapter_*")):
        digest.update(f"\n{path.name} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
