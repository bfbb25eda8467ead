"""A short build of the tiny model, on as many ranks as it is started on. Not a test: `test_tiny_ranks.py` starts it."""

import dataclasses
import sys
from pathlib import Path

import torch

from vilavt_hf.tiny import build as building


class Twice(building.Lessons):
    """Every lesson twice in a row, so that both ranks have the same one: heads average over the lessons of a rank, and
    equal halves are where that average is the mean over both."""

    def __getitem__(self, i: int):
        return super().__getitem__(i // 2)


def main(folder: Path) -> None:
    """Build into `folder`; what it starts from is ``start``, its stages are in ``<folder>-work``."""
    torch.set_num_threads(1)
    building.PROBED = 1
    building.Lessons = Twice
    stages = tuple(
        dataclasses.replace(stage, steps=8, batch=2, warmup=2)
        for stage in building.STAGES
        if stage.name in ("read", "talk")
    )
    building.build(folder, stages=stages)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
