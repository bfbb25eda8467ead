"""How a checkpoint wants to be run (its ``vilavt_chat.json``), and limits that fit a model.

Every engine, local or hosted, starts from these, so that they run the same episodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .presets import Limits, Preset, get_preset
from .regions import MAX_PIXELS

SETTINGS = "vilavt_chat.json"
"""File in a checkpoint folder that says how the checkpoint wants to be run; see :func:`save_chat_settings`."""


def save_chat_settings(folder: str | Path, *, preset: str = "default", limits: Mapping[str, Any] | None = None) -> Path:
    """Write how a checkpoint wants to be run: ``vilavt_chat.json``, read by :func:`preset_of`.

    Args:
        folder: the checkpoint.
        preset: name of a preset.
        limits: fields of `Limits` that differ from the preset's.

    Raises:
        CheckpointError: an unknown field.
    """
    settings = {"preset": preset, "limits": dict(limits or {})}
    path = Path(folder) / SETTINGS
    _checked(settings, path)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return path


def preset_of(folder: str | Path, preset: str | Preset | None = None) -> Preset:
    """The preset that a folder asks for, or the one given, with the limits that the folder asks for.

    Without a settings file it is the one given, or ``default``.

    Raises:
        CheckpointError: the file cannot be read, or has unknown fields.
        EpisodeError: unknown preset.
    """
    path = Path(folder) / SETTINGS
    if not path.is_file():
        return get_preset(preset or "default")
    try:
        wanted, limits = _checked(json.loads(path.read_text(encoding="utf-8")), path)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return get_preset(preset or wanted).with_limits(**limits)


def _checked(data: Any, path: Path) -> tuple[Preset, dict[str, Any]]:
    known = {f.name for f in fields(Limits)}
    if not isinstance(data, dict) or set(data) - {"preset", "limits"} or not isinstance(data.get("limits", {}), dict):
        raise CheckpointError(f'{path}: it must be {{"preset": name, "limits": {{…}}}}')
    limits = data.get("limits", {})
    if unknown := sorted(set(limits) - known):
        raise CheckpointError(f"{path}: unknown limits {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return get_preset(str(data.get("preset", "default"))), limits


def fitting_limits(limits: Limits, image_size: Mapping[str, int | None], context: int) -> Limits:
    """Limits no looser than an image processor's pixel bounds and a language model's context.

    Args:
        limits: a preset's.
        image_size: ``shortest_edge`` and ``longest_edge`` of the image processor, in pixels of area.
        context: tokens; replaces an unlimited ``max_context`` only.
    """
    low, high = image_size["shortest_edge"], image_size["longest_edge"]
    minimum = max(limits.min_pixels, low or 0)
    maximum = max(minimum, min(limits.max_pixels, high or MAX_PIXELS))
    crop = limits.crop_max_pixels
    return replace(
        limits,
        min_pixels=minimum,
        max_pixels=maximum,
        crop_max_pixels=None if crop is None else max(minimum, crop),
        max_context=limits.max_context or context,
    )
