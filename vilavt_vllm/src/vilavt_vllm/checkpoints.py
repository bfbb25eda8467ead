"""Whether vLLM can serve a checkpoint, judged before vLLM starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vilavt_core.checkpoint import require_vilavt
from vilavt_core.json_text import parse_json


def require_servable(model: str, arguments: Mapping[str, Any]) -> None:
    """Stop at a checkpoint that is no ViLaVT or lacks something, with the remedy that every command gives.

    Args:
        model: folder or hub id.
        arguments: of vLLM's engine. ``hf_overrides`` that name architectures admit the published SFT format, and
            weights that come from elsewhere (``load_format``) are not looked for.

    Raises:
        CheckpointError: with problem and remedy.
    """
    if arguments.get("load_format") in (None, "auto", "safetensors"):
        hub = {"revision": arguments["revision"]} if arguments.get("revision") else {}
        require_vilavt(model, hub=hub, sft="architectures" in _overrides(arguments.get("hf_overrides")))


def _overrides(given: Any) -> Mapping[str, Any]:
    if isinstance(given, str):
        try:
            given = parse_json(given)
        except ValueError:
            return {}  # vLLM says so
    return given if isinstance(given, Mapping) else {}
