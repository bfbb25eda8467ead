"""``python -m vilavt_vlmeval.tiny_benchmark``: the held-out scenes of the tiny model as a benchmark of the toolkit.

Then ``--data VilavtTinyHeldout --model ViLaVT-Tiny --judge exact_matching`` scores what ``vilavt tiny eval`` scores.
Needs ``vilavt-hf[tiny]``.
"""

from __future__ import annotations

import argparse
import csv
import os
import string
from pathlib import Path

from .messages import TINY_BENCHMARK


def options(answer: str) -> list[str]:
    """Options among which the toolkit's exact matching reads a number as itself, and as nothing else.

    It takes an answer for the one option whose text it contains. So beside a one-digit answer stand all digits, and 11,
    which would be read as 1; beside a two-digit one (a sum, at most 18) all others of its kind. No cell is empty: a
    column with gaps would be read as floating-point numbers.
    """
    if len(answer) == 1:
        return [*map(str, range(10)), "11"]
    return [*map(str, range(10, 19)), "another number", "no number"]


def write(folder: Path, limit: int | None = None) -> Path:
    """Write ``VilavtTinyHeldout.tsv`` and its images into the toolkit's data folder.

    Args:
        folder: the toolkit's, ``$LMUData``.
        limit: questions; None: all 560.

    Returns:
        Path of the table.
    """
    from vilavt_hf.tiny.benchmark import tasks

    pictures = folder.absolute() / "images" / TINY_BENCHMARK
    pictures.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_uppercase[:11]
    table = folder / f"{TINY_BENCHMARK}.tsv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", *letters, "answer", "category", "image_path"])
        for index, task in enumerate(tasks("heldout", limit)):
            picture = pictures / f"{index}.png"
            task.scene.image.save(picture, compress_level=1)
            texts = options(task.question.answer)
            right = letters[texts.index(task.question.answer)]
            writer.writerow([index, task.question.text, *texts, right, str(task.question.kind), picture])
    return table


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m vilavt_vlmeval.tiny_benchmark", description=__doc__)
    default = os.environ.get("LMUData") or Path.home() / "LMUData"  # noqa: SIM112 (the toolkit's name)
    parser.add_argument("--out", type=Path, default=default, help="default: $LMUData, else ~/LMUData")
    parser.add_argument("--limit", type=int, help="questions; default: all 560")
    arguments = parser.parse_args()
    print(write(arguments.out, arguments.limit))


if __name__ == "__main__":
    main()
