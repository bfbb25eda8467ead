"""Folders that hold an adapter (LoRA) instead of weights: what it was trained on."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError
from ..json_text import parse_json
from ..settings import SETTINGS
from .layout import ADAPTER_CONFIG


def adapter_base(checkpoint: str | os.PathLike, base: str | None = None) -> str | None:
    """The checkpoint under an adapter; None if `checkpoint` is no adapter's folder.

    Args:
        checkpoint: folder or hub id.
        base: the one to use; None: the one that the adapter names.

    Raises:
        CheckpointError: its configuration cannot be read or names none; or there is a base, and nothing to put on it.
    """
    path = Path(checkpoint) / ADAPTER_CONFIG
    if not path.is_file():
        if base is not None:
            raise CheckpointError(f"{checkpoint} is no adapter: it has no {ADAPTER_CONFIG}, and needs no base {base}")
        return None
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


def settings_source(checkpoint: str | os.PathLike, base: str | None) -> str:
    """Who says how it wants to be run: an adapter that does so itself, else the checkpoint under it."""
    if base is None or (Path(checkpoint) / SETTINGS).is_file():
        return os.fspath(checkpoint)
    return base
