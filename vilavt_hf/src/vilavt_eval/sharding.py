"""Which questions of a benchmark one process asks, when several share it, and which of them is the last to end."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from vilavt_core.errors import EvaluationError

PATIENCE = 5.0
"""Seconds to wait for a lock that another process may hold for a moment."""


@dataclass(frozen=True)
class Shard:
    """Number `index` of `count` shares: the questions at places index, index + count, …

    By place and not in blocks, so that kinds of questions, which benchmarks keep together, are spread evenly.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise EvaluationError(
                f"shard {self.index}/{self.count}: the first number must be at least 0 and below the second; "
                f"shards of {self.count} are 0/{self.count} to {self.count - 1}/{self.count}"
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """``i/n``, i counted from 0.

        Raises:
            EvaluationError: it is not that.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None:
            raise EvaluationError(f"shard {text!r} is not i/n; the first of four is 0/4, the last 3/4")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of_launcher(cls, environment: MutableMapping[str, str] = os.environ) -> Self:
        """The share of this process among the ranks that ``torchrun`` started; everything without it."""
        return cls(int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1)))

    def places(self, count: int) -> range:
        """This shard's places among `count`."""
        return range(self.index, count, self.count)


class Presence:
    """That this process is at work on an evaluation which others may share; a context manager.

    A locked file per process: the system frees what a killed one held, so nobody is waited for in vain.

    Args:
        folder: of the results; made if missing.
        asked: what the processes that share the work have in common, plain JSON data.
        shard: this process's share.
    """

    def __init__(self, folder: Path, asked: Any, shard: Shard) -> None:
        self.folder, self.shard = folder, shard
        self._name = f".eval-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]}"
        self._own = folder / f"{self._name}.shard-{shard.index}-of-{shard.count}.lock"
        self._lock = FileLock(self._own)

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise EvaluationError(
                f"{self.folder}: another process is asking shard {self.shard} of the same; wait for it, or give each "
                "its own --shard"
            ) from None
        except OSError as error:
            raise EvaluationError(f"{self.folder}: cannot be made: {error.strerror}; name another --out") from None
        return self

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def leave(self) -> bool:
        """End being at work.

        Returns:
            Whether nobody else is at work: true for exactly one of several that leave, whose rows are all written.
        """
        with FileLock(self.folder / f"{self._name}.lock"):
            self._lock.release()
            return not any(_held(path) for path in self.folder.glob(f"{self._name}.shard-*.lock") if path != self._own)


def _held(path: Path) -> bool:
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


def take_own_gpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let this process see one GPU only, its own, if ``torchrun`` started several here; before anything uses CUDA.

    Any backend then takes it as its first.
    """
    if int(environment.get("LOCAL_WORLD_SIZE", 1)) > 1:
        rank, visible = int(environment["LOCAL_RANK"]), environment.get("CUDA_VISIBLE_DEVICES", "")
        names = [name for name in visible.split(",") if name] or [str(rank)]
        environment["CUDA_VISIBLE_DEVICES"] = names[rank % len(names)] if visible else names[0]
