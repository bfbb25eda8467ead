"""Checkpoints that are named by a hub id."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..failures import one_line
from ..settings import is_hub_id
from .layout import CONFIG, interrupted, no_checkpoint


def checkpoint_folder(checkpoint: str | os.PathLike) -> Path:
    """The folder of a checkpoint, for what no loader of transformers reads; a hub id is fetched, or found in the cache.

    Raises:
        CheckpointError: there is no such folder, and nothing to be had under that id.
    """
    name = os.fspath(checkpoint)
    if not names_hub_id(name):
        if not os.path.isdir(name):
            raise CheckpointError(no_checkpoint(Path(name)))
        return Path(name)
    return hub_folder(name, {})


def hub_folder(name: str, hub: Mapping[str, Any]) -> Path:
    """The folder of a hub id, fetched, or found in the cache.

    Args:
        name: the id.
        hub: how to reach the hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        CheckpointError: it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.pt", "*.pth"], **hub))  # states of an optimiser
    except (OSError, ValueError) as error:
        raise _unavailable(name, error) from None


def hub_file(name: str, file: str, hub: Mapping[str, Any]) -> Path | None:
    """One file of a hub id; None if it has none of that name, or, where the hub cannot be reached, if it is not in the
    cache. What is wrong with an id is said by who reads its `CONFIG`.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, **hub))
    except (OSError, ValueError):
        return None


def hub_config(name: str, hub: Mapping[str, Any]) -> Path:
    """``config.json`` of a hub id.

    Args:
        name: the id.
        hub: see `hub_folder`.

    Raises:
        CheckpointError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, CONFIG, **hub))
    except (OSError, ValueError) as error:
        raise _unavailable(name, error) from None


def names_hub_id(name: str) -> bool:
    """Whether a checkpoint is named by a hub id: it is written like one, and nothing here is called so."""
    return is_hub_id(name) and not os.path.lexists(name) and not interrupted(name)


def _unavailable(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{name}: no such folder, and no checkpoint under that hub id: {one_line(error)}; check the name, or the "
        "network"
    )
