"""How episodes of a run went, noted in its folder, for the checkpoints that are made of its shards."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vilavt_core.settings import ChatSettings, read_chat_settings

from .errors import HostError

INFERENCE_KEYS = ("preset", "limits")
_LEVELS = 4
"""From ``RUN/global_step_N/actor/huggingface`` up to the run."""


def run_settings(base: ChatSettings | None, settings: Mapping[str, Any]) -> ChatSettings:
    """How a checkpoint is run after training: as its episodes ran, unless the run names another way.

    Args:
        base: of the checkpoint that the run starts from.
        settings: of the run: ``preset``, ``limits``, and ``inference``, which has both again and wins.

    Raises:
        HostError: an unknown key in ``inference``.
    """
    later = settings.get("inference") or {}
    if unknown := sorted(set(later) - set(INFERENCE_KEYS)):
        raise HostError(f"unknown keys in inference: {', '.join(unknown)}; known are {', '.join(INFERENCE_KEYS)}")
    trained = (base or ChatSettings()).changed(settings.get("preset"), settings.get("limits"))
    return trained.changed(later.get("preset"), later.get("limits"))


@functools.lru_cache(maxsize=8)
def note_settings(run: str, checkpoint: str, settings: str) -> None:
    """Write a run's settings into its folder, once per process.

    Args:
        run: folder.
        checkpoint: that the run starts from.
        settings: JSON, see `run_settings`.
    """
    folder = Path(run)
    folder.mkdir(parents=True, exist_ok=True)
    run_settings(read_chat_settings(checkpoint), json.loads(settings)).save(folder)


def noted_settings(folder: Path) -> ChatSettings | None:
    """What `note_settings` wrote into the run that a checkpoint's folder lies in; None: nothing.

    Args:
        folder: ``RUN/global_step_N``, or up to two levels below it.
    """
    above = [folder.absolute(), *folder.absolute().parents][:_LEVELS]
    step = next((place for place in above if place.name.startswith("global_step_")), None)
    return None if step is None else read_chat_settings(step.parent)
