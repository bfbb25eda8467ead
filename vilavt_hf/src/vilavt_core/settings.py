"""How a checkpoint wants to be run (its ``vilavt_chat.json``), and limits that fit a model.

Every engine, local or hosted, starts from these, so that they run the same episodes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import CheckpointError, EpisodeError
from .failures import quoted, quoted_error
from .json_text import parse_json
from .outputs import whole_file
from .presets import Limits, Preset, get_preset
from .regions import MAX_PIXELS
from .spelling import meant

logger = logging.getLogger(__name__)

SETTINGS = "vilavt_chat.json"
"""File of a checkpoint that says how the checkpoint wants to be run; see `save_chat_settings`."""


@dataclass(frozen=True)
class ChatSettings:
    """What a settings file says: a preset, and the limits that differ from the preset's."""

    preset: str = "default"
    """Name."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Limits`."""
    note: str = ""
    """What people should know before they ask, e.g. that the model knows drawn cards only: shown, never acted upon."""

    def changed(self, preset: str | None = None, limits: Mapping[str, Any] | None = None) -> ChatSettings:
        """These settings under another preset (None: this one) and with some limits changed."""
        return replace(self, preset=preset or self.preset, limits={**self.limits, **(limits or {})})

    def apply(self, preset: str | Preset | None = None) -> Preset:
        """The preset that is asked for, or the one given, with these limits.

        Raises:
            EpisodeError: unknown preset or limit, or a value that cannot be one.
        """
        return get_preset(preset or self.preset).with_limits(**self.limits)

    def save(self, folder: str | Path) -> Path:
        """Write the settings file of a checkpoint.

        Raises:
            EpisodeError: see `apply`.
        """
        self.apply()
        path = Path(folder) / SETTINGS
        settings: dict[str, Any] = {"preset": self.preset, "limits": dict(self.limits)}
        if self.note:
            settings["note"] = self.note
        with whole_file(path) as file:  # several processes may write the same at once
            file.write((json.dumps(settings, indent=2) + "\n").encode())
        return path


def save_chat_settings(
    folder: str | Path, *, preset: str = "default", limits: Mapping[str, Any] | None = None, note: str = ""
) -> Path:
    """Write how a checkpoint wants to be run: ``vilavt_chat.json``, read by `preset_of`.

    Args:
        folder: the checkpoint.
        preset: name of a preset.
        limits: fields of `Limits` that differ from the preset's.
        note: what people should know before they ask.

    Raises:
        CheckpointError: an unknown preset or field, or a value that cannot be one.
    """
    settings = {"preset": preset, "limits": dict(limits or {}), "note": note}
    return _checked(settings, Path(folder) / SETTINGS).save(folder)


def read_chat_settings(checkpoint: str | Path, *, hub: Mapping[str, Any] | None = None) -> ChatSettings | None:
    """What the settings file of a checkpoint says; None: it has none.

    Args:
        checkpoint: a folder or a hub id.
        hub: how to reach the hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        CheckpointError: the file cannot be read, or has an unknown preset, unknown fields or values that are none.
    """
    path = _settings_file(checkpoint, hub or {})
    if path is None:
        return None
    try:
        data = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {quoted_error(error)}") from None
    return _checked(data, path)


def preset_of(
    checkpoint: str | Path, preset: str | Preset | None = None, *, hub: Mapping[str, Any] | None = None
) -> Preset:
    """The preset that a checkpoint asks for, or the one given, with the limits that the checkpoint asks for.

    Without a settings file it is the one given, or ``default``.

    Args:
        checkpoint: a folder or a hub id.
        preset: the one given.
        hub: as in `read_chat_settings`.

    Raises:
        CheckpointError: see `read_chat_settings`; or the one given cannot be run with its limits.
        EpisodeError: the one given is unknown.
    """
    found, given = read_chat_settings(checkpoint, hub=hub), preset and get_preset(preset)
    if found is None:
        return given or get_preset("default")
    try:
        return found.apply(given)
    except EpisodeError as error:
        raise CheckpointError(f"{checkpoint}/{SETTINGS}: {error}") from None


def describe_preset(preset: Preset) -> str:
    """A preset with its limits in one line, for the end of a training run."""
    limits = preset.limits
    of_what = "all originals together" if preset.budget_split == "total" else "an image"
    sizes = f"{limits.min_pixels:,.0f} to {limits.max_pixels:,.0f} pixels for {of_what}"
    if limits.crop_max_pixels is not None:
        sizes += f" and at most {limits.crop_max_pixels:,.0f} for a crop"
    return f"preset {preset.name}, {sizes}, at most {limits.max_turns} turns and {limits.max_images} images"


def is_hub_id(name: str | Path) -> bool:
    """Whether it is written like a hub id, ``owner/name``, and no folder here is called so."""
    text = str(name)
    return text.count("/") == 1 and not text.startswith((".", "~", "/")) and not Path(text).is_dir()


def _settings_file(checkpoint: str | Path, hub: Mapping[str, Any]) -> Path | None:
    if not is_hub_id(checkpoint):
        path = Path(checkpoint) / SETTINGS
        if os.path.lexists(path) and not path.is_file():
            raise CheckpointError(f"{path} is no file, or a link to none; put it right, or take it away")
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


def _checked(data: Any, path: Path) -> ChatSettings:
    known = {f.name for f in fields(Limits)}
    if (
        not isinstance(data, dict)
        or set(data) - {"preset", "limits", "note"}
        or not isinstance(data.get("limits", {}), dict)
        or not all(isinstance(data.get(name, ""), str) for name in ("preset", "note"))
    ):
        raise CheckpointError(f'{path}: it must be {{"preset": name, "limits": {{…}}, "note": text}}')
    limits = data.get("limits", {})
    if unknown := sorted(set(limits) - known):
        raise CheckpointError(
            f"{path}: unknown limits {quoted(', '.join(unknown))}; known are {', '.join(sorted(known))}"
            f"{meant(unknown, known)}"
        )
    settings = ChatSettings(data.get("preset", "default"), limits, data.get("note", ""))
    try:
        settings.apply()
    except EpisodeError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return settings


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
    crop, inquiry = limits.crop_max_pixels, limits.max_inquiry_pixels
    return replace(
        limits,
        min_pixels=minimum,
        max_pixels=maximum,
        crop_max_pixels=None if crop is None else max(minimum, crop),
        max_inquiry_pixels=None if inquiry is None else max(minimum, inquiry),
        max_context=limits.max_context or context,
    )
