"""Which questions of a benchmark one process asks, when several share it."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Self

from ..errors import EvaluationError


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
        """The share of this process among those that ``torchrun`` started; everything without it."""
        return cls(int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1)))

    def places(self, count: int) -> range:
        """This shard's places among `count`."""
        return range(self.index, count, self.count)


def take_own_gpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let this process see one GPU only, its own, if ``torchrun`` started several here; before anything uses CUDA.

    Any backend then takes it as its first.
    """
    if int(environment.get("LOCAL_WORLD_SIZE", 1)) > 1:
        rank, visible = int(environment["LOCAL_RANK"]), environment.get("CUDA_VISIBLE_DEVICES", "")
        names = [name for name in visible.split(",") if name] or [str(rank)]
        environment["CUDA_VISIBLE_DEVICES"] = names[rank % len(names)] if visible else names[0]
