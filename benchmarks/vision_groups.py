"""How encoding scales with the number of groups: G equal groups should cost G times one group.

    python benchmarks/vision_groups.py [--small] [--repeats 3] [--json FILE]

One group is two regions (24 x 24 and 20 x 28 patches) under a query of 20 tokens, through the vision encoder of
`multi_turn.py` (fp32, one thread). Seconds are process CPU seconds, the minimum of interleaved repeats. ``ratio_16`` is
the time of 16 groups over 16 times the time of one; 1.00 is linear.

By default glibc hands every block above 32 MB back to the kernel and gets it anew, zeroed, one page fault per 4 kB.
That hits the larger batches only (a million faults at 16 groups) and says nothing about the encoder, so the process is
told to keep freed memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import time
from pathlib import Path
from typing import Any

import torch
from multi_turn import PATCH, SMALL, VOCABULARY, Clock, Size, random_model
from rich.console import Console
from rich.table import Table

GROUPS = (1, 4, 16)


def keep_freed_memory() -> None:
    """Tell glibc's malloc not to return memory to the kernel; elsewhere nothing happens."""
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**31 - 1)


def inputs(size: Size, groups: int) -> dict[str, torch.Tensor]:
    """Random patches and queries of `groups` equal groups."""
    generator = torch.Generator().manual_seed(groups)
    grid = torch.tensor([[1, rows, columns] for rows, columns in size.regions] * groups)
    return {
        "pixel_values": torch.randn(int(grid.prod(-1).sum()), PATCH, generator=generator),
        "image_grid_thw": grid,
        "query_ids": torch.randint(10, VOCABULARY, (groups, size.query), generator=generator),
        "query_attention_mask": torch.ones(groups, size.query, dtype=torch.long),
        "images_per_query": torch.full((groups,), len(size.regions)),
    }


def scaling(model: Any, size: Size, repeats: int, now: Clock = time.process_time) -> dict[str, Any]:
    """Seconds per number of groups, and how far from linear they are.

    Args:
        model: a `VilavtModel`, on the device that is measured.
        size: of the groups.
        repeats: of every number of groups.
        now: what is measured.
    """
    batches = {
        groups: {name: value.to(model.device) for name, value in inputs(size, groups).items()} for groups in GROUPS
    }
    seconds: dict[int, list[float]] = {groups: [] for groups in GROUPS}
    with torch.inference_mode():
        for groups in (GROUPS[-1], 1):
            model.get_image_features(**batches[groups])  # takes the memory that later runs reuse
        for _ in range(repeats):
            for groups, batch in batches.items():
                # One group is too short to time alone: as many runs as there are groups in the largest batch.
                runs = GROUPS[-1] // groups
                began = now()
                for _ in range(runs):
                    model.get_image_features(**batch)
                seconds[groups].append((now() - began) / runs)
    best = {groups: min(values) for groups, values in seconds.items()}
    return {
        **{f"ratio_{groups}": best[groups] / (groups * best[1]) for groups in GROUPS[1:]},
        "seconds": {str(groups): value for groups, value in best.items()},
        "patches_per_group": sum(rows * columns for rows, columns in size.regions),
        "repeats": repeats,
    }


def benchmark(size: Size, repeats: int) -> dict[str, Any]:
    """`scaling` on one thread of this machine's processor."""
    keep_freed_memory()
    torch.set_num_threads(1)
    return scaling(random_model(size).model, size, repeats)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a model for CI")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    figures = benchmark(SMALL if args.small else Size(), args.repeats)
    table = Table(title=f"groups of {figures['patches_per_group']} patches, fp32, one thread")
    for column in ("groups", "CPU s", "CPU s per group", "against linear"):
        table.add_column(column, justify="right")
    for groups, seconds in figures["seconds"].items():
        ratio = figures.get(f"ratio_{groups}", 1.0)
        table.add_row(groups, f"{seconds:.3f}", f"{seconds / int(groups):.3f}", f"{ratio:.2f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
