"""The names that VLMEvalKit learns, and how a model is built when one of them is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

logger = logging.getLogger(__name__)

CLASS = "ViLaVT"
"""``"class"`` of a model in a ``--config`` file."""

MODELS: dict[str, dict[str, Any]] = {
    "ViLaVT-7B": {"checkpoint": "rl"},
    "ViLaVT-SFT-7B": {"checkpoint": "sft"},
    "ViLaVT-7B-vLLM": {"checkpoint": "rl", "backend": "vllm"},
    "ViLaVT-Tiny": {"checkpoint": "tiny"},
}
"""Name -> settings that the name stands for; everything else comes from the environment (see `settings`)."""


def build_adapter(name: str = "", verbose: bool = False, **settings: Any) -> Any:
    """The adapter; imported here, because the table of models is read by everybody.

    Args:
        name: of the model, for the trace.
        verbose: VLMEvalKit's flag; it prints answers itself.
        settings: see `settings.AdapterSettings`.
    """
    from .vlm import ViLaVT

    return ViLaVT(name=name, verbose=verbose, **settings)


def lmms_manifest() -> Any:
    """lmms-eval's description of a model, for its entry point group ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vilavt", chat_class_path="vilavt_vlmeval.lmms.ViLaVT")


def register(supported: MutableMapping[str, Callable[..., Any]]) -> None:
    """Add our names to VLMEvalKit's table of models, and `CLASS` to its module of models.

    A name it has already is left alone. An entry is a `partial` with a `verbose` keyword: the runner looks into it.
    """
    import vlmeval.vlm

    for name, settings in MODELS.items():
        entry = supported.setdefault(name, partial(build_adapter, name=name, verbose=False, **settings))
        if getattr(entry, "func", None) is not build_adapter:
            logger.warning("this VLMEvalKit has a model %s of its own; it is left alone", name)
    if not hasattr(vlmeval.vlm, CLASS):
        setattr(vlmeval.vlm, CLASS, build_adapter)
