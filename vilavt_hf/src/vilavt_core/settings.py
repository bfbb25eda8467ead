"""How a checkpoint wants to be run (its ``vilavt_chat.json``), and limits that fit a model.

Every engine, local or hosted, starts from these, so that they run the same episodes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .errors import CheckpointError, EpisodeError
from .presets import Limits, Preset, get_preset
from .regions import MAX_PIXELS
from .spelling import meant

logger = logging.getLogger(__name__)

SETTINGS = "vilavt_chat.json"
"""File of a checkpoint that says how the checkpoint wants to be run; see :func:`save_chat_settings`."""


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


def preset_of(
    checkpoint: str | Path, preset: str | Preset | None = None, *, hub: Mapping[str, Any] | None = None
) -> Preset:
    """The preset that a checkpoint asks for, or the one given, with the limits that the checkpoint asks for.

    Without a settings file it is the one given, or ``default``.

    Args:
        checkpoint: a folder or a hub id.
        preset: the one given.
        hub: how to reach the hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        CheckpointError: the file cannot be read, or has unknown fields or values that are none.
        EpisodeError: unknown preset.
    """
    path = _settings_file(checkpoint, hub or {})
    if path is None:
        return get_preset(preset or "default")
    try:
        wanted, limits = _checked(json.loads(path.read_text(encoding="utf-8")), path)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    chosen = get_preset(preset or wanted)
    try:
        return chosen.with_limits(**limits)
    except EpisodeError as error:
        raise CheckpointError(f"{path}: {error}") from None


def is_hub_id(name: str | Path) -> bool:
    """Whether it is written like a hub id, ``owner/name``, and no folder here is called so."""
    text = str(name)
    return text.count("/") == 1 and not text.startswith((".", "~", "/")) and not Path(text).is_dir()


def _settings_file(checkpoint: str | Path, hub: Mapping[str, Any]) -> Path | None:
    if not is_hub_id(checkpoint):
        path = Path(checkpoint) / SETTINGS
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(checkpoint), SETTINGS, **hub))
    except LocalEntryNotFoundError:
        logger.warning("%s: the hub is out of reach and %s is not in the cache: defaults apply", checkpoint, SETTINGS)
    except EntryNotFoundError:
        pass  # it has none
    except (OSError, ValueError):
        pass  # no such checkpoint, or not for us: who loads its weights says so
    return None


def _checked(data: Any, path: Path) -> tuple[Preset, dict[str, Any]]:
    known = {f.name for f in fields(Limits)}
    if not isinstance(data, dict) or set(data) - {"preset", "limits"} or not isinstance(data.get("limits", {}), dict):
        raise CheckpointError(f'{path}: it must be {{"preset": name, "limits": {{…}}}}')
    limits = data.get("limits", {})
    if unknown := sorted(set(limits) - known):
        raise CheckpointError(
            f"{path}: unknown limits {', '.join(unknown)}; known are {', '.join(sorted(known))}{meant(unknown, known)}"
        )
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
