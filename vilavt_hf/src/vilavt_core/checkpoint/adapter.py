"""Folders and hub ids that hold an adapter (LoRA) instead of weights: what it was trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..json_text import parse_json
from ..settings import SETTINGS
from .hub import hub_file, hub_folder, names_hub_id
from .layout import ADAPTER_CONFIG


def adapter_folder(checkpoint: str | os.PathLike, hub: Mapping[str, Any] | None = None) -> Path | None:
    """The folder of an adapter, fetched if a hub id names it; None if it is no adapter, or nothing that is there.

    Args:
        checkpoint: folder or hub id.
        hub: how to reach the hub; see `hub_folder`.

    Raises:
        CheckpointError: there is such an adapter on the hub, and it cannot be had.
    """
    name = os.fspath(checkpoint)
    if not names_hub_id(name):
        return Path(name) if (Path(name) / ADAPTER_CONFIG).is_file() else None
    if hub_file(name, ADAPTER_CONFIG, hub or {}) is None:
        return None
    return hub_folder(name, hub or {})


def adapter_base(
    checkpoint: str | os.PathLike, base: str | None = None, *, hub: Mapping[str, Any] | None = None
) -> str | None:
    """The checkpoint under an adapter; None if `checkpoint` is no adapter.

    Args:
        checkpoint: folder or hub id.
        base: the one to use; None: the one that the adapter names.
        hub: how to reach the hub; see `hub_folder`.

    Raises:
        CheckpointError: its configuration cannot be read or names none; or there is a base, and nothing to put on it.
    """
    folder = adapter_folder(checkpoint, hub)
    if folder is None:
        if base is not None:
            raise CheckpointError(f"{checkpoint} is no adapter: it has no {ADAPTER_CONFIG}, and needs no base {base}")
        return None
    path = folder / ADAPTER_CONFIG
    try:
        named = parse_json(path.read_text(encoding="utf-8-sig"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if base is None:
            raise CheckpointError(f"{path} does not say what it was trained on ({error}); pass --base") from None
        named = None
    found = base or named
    if not isinstance(found, str) or not found:
        raise CheckpointError(f"{path} does not say what it was trained on; pass --base")
    return found


def settings_source(checkpoint: str | os.PathLike, base: str | None, *, hub: Mapping[str, Any] | None = None) -> str:
    """Who says how it wants to be run: an adapter that does so itself, else the checkpoint under it."""
    if base is None:
        return os.fspath(checkpoint)
    folder = adapter_folder(checkpoint, hub)
    return base if folder is None or not (folder / SETTINGS).is_file() else os.fspath(folder)
