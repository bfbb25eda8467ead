"""Where a checkpoint or a result comes from: a cheap fingerprint of weights, and a record of how something was made."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..settings import is_hub_id
from ..versions import OURS, installed
from .layout import Checkpoint, TensorEntry
from .writing import file_range, write_json

PROVENANCE = "provenance.json"
_PACKAGES = (*OURS, "torch", "transformers", "safetensors", "numpy", "pillow")
_SAMPLE = 256


def fingerprint(folder: str | os.PathLike, exact: bool = False) -> str:
    """SHA-256 (hex) that identifies a checkpoint's model.

    It covers every tensor's published name, dtype and shape, three samples of 256 bytes of its data, and the settings
    of the vision tower that change the computation. So it costs milliseconds, is the same for the same weights however
    they are sharded, named (nested or flat) or flavoured, and changes with training. A change confined to bytes between
    the samples is only seen with `exact`, which reads everything.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = Checkpoint.open(folder).require_sound()
    digest = hashlib.sha256()
    vision = checkpoint.config.get("vision_config") or {}
    settings = {key: vision.get(key) for key in ("integration_point", "fullatt_block_indexes", "window_size")}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        for start, stop in [(tensor.start, tensor.stop)] if exact else _samples(tensor):
            for chunk in file_range(tensor.path, start, stop):
                digest.update(chunk)
    return digest.hexdigest()


def _samples(tensor: TensorEntry) -> list[tuple[int, int]]:
    if tensor.nbytes <= 3 * _SAMPLE:
        return [(tensor.start, tensor.stop)]
    middle = (tensor.start + tensor.stop - _SAMPLE) // 2
    starts = (tensor.start, middle, tensor.stop - _SAMPLE)
    return [(start, start + _SAMPLE) for start in starts]


@dataclass(frozen=True)
class BuildInfo:
    """How an artefact was made. What a *result* depends on is `vilavt_core.results.Provenance`."""

    command: str
    created: str
    """UTC, ISO 8601."""
    python: str
    platform: str
    packages: dict[str, str]
    git: dict[str, Any] | None
    """Commit and whether the working tree had changes, when the package runs from a git checkout."""
    details: dict[str, Any] = field(default_factory=dict)


def collect_build_info(details: Mapping[str, Any] | None = None, command: Sequence[str] | None = None) -> BuildInfo:
    """The record for something made now by this process.

    Args:
        details: anything worth knowing that is JSON (seeds, settings, source fingerprints).
        command: the command line, by default this process's.
    """
    return BuildInfo(
        command=command_line() if command is None else shlex.join(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages=installed(_PACKAGES),
        git=_git_state(),
        details=dict(details or {}),
    )


def command_line() -> str:
    """What this process was started as, the program by its name alone."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def public_name(checkpoint: str | os.PathLike) -> str:
    """A checkpoint as others may read its name: the hub id, or the last part of a path."""
    return str(checkpoint) if is_hub_id(os.fspath(checkpoint)) else Path(checkpoint).name


def write_build_info(
    folder: str | os.PathLike, details: Mapping[str, Any] | None = None, command: Sequence[str] | None = None
) -> Path:
    """Write ``provenance.json`` into a checkpoint or result folder and return its path; see `collect_build_info`."""
    path = Path(folder) / PROVENANCE
    write_json(path, asdict(collect_build_info(details, command)))
    return path


def _git_state() -> dict[str, Any] | None:
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # a venv inside some repository is not that repository
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
