"""How episodes of a run went, what it started from and what it was trained on, noted in its folder, for the checkpoints
that are made of its shards.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vilavt_core.checkpoint.build_info import PROVENANCE, public_name, write_build_info
from vilavt_core.checkpoint.layout import read_json
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
def note_settings(run: str, checkpoint: str, settings: str, data: tuple[str, ...] = (), command: str = "") -> None:
    """Write a run's settings into its folder, and where its checkpoints come from, once per process.

    Args:
        run: folder.
        checkpoint: that the run starts from.
        settings: JSON, see `run_settings`.
        data: files that it is trained on.
        command: that started it; empty: not known here.
    """
    folder = Path(run)
    folder.mkdir(parents=True, exist_ok=True)
    run_settings(read_chat_settings(checkpoint), json.loads(settings)).save(folder)
    details = {"made_by": "grpo", "base": public_name(checkpoint), "data": list(map(public_name, data))}
    write_build_info(folder, details, shlex.split(command))


def file_names(files: str | Iterable[str] | None) -> tuple[str, ...]:
    """A trainer's key for files: one, several or none."""
    return (files,) if isinstance(files, str) else tuple(map(str, files or ()))


def noted_settings(folder: Path) -> ChatSettings | None:
    """How the run that a checkpoint's folder lies in ran its episodes; None: `note_settings` was not there.

    Args:
        folder: ``RUN/global_step_N``, or up to two levels below it.
    """
    run = _run_of(folder)
    return None if run is None else read_chat_settings(run)


def noted_provenance(folder: Path) -> dict[str, Any] | None:
    """Where that run's checkpoints come from, as in a ``provenance.json``; None: it does not say."""
    run = _run_of(folder)
    return None if run is None or not (run / PROVENANCE).is_file() else read_json(run / PROVENANCE)


def _run_of(folder: Path) -> Path | None:
    above = [folder.absolute(), *folder.absolute().parents][:_LEVELS]
    step = next((place for place in above if place.name.startswith("global_step_")), None)
    return None if step is None else step.parent
