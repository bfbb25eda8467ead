"""Eight rows in the format of each benchmark of the README's table, written where the toolkit looks for the real one.

Rows 0 to 5 will be answered rightly, row 6 wrongly, row 7 not at all. Every question names its row.
"""

import base64
import csv
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROWS = 8
RIGHT, WRONG = range(6), 6


@dataclass(frozen=True)
class StandIn:
    """One benchmark: its table, and what is right."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple, ...]
    answers: tuple[str, ...]
    images: tuple[int, ...]
    """Images of every row."""
    instruction: str
    """Part of what the benchmark tells the model, beside question and options."""

    @property
    def word(self) -> str:
        """With which its questions begin."""
        return self.rows[0][1].replace("<image> ", "").split()[0]

    def told(self, row: int) -> list[str]:
        """What the text of a row's prompt must hold."""
        numeric = self.answers[row] not in "ABCD"
        return [question(self.word, row)] + ([] if numeric else [*self.options, self.instruction])

    @property
    def options(self) -> tuple[str, ...]:
        """Texts of the options that stand in the table."""
        return () if self.word == "SparBench" else TEXTS

    def reply(self, row: int) -> str | None:
        """What the stub says to a row."""
        if row in RIGHT:
            return self.answers[row]
        wrong = {"A": "B", "B": "C", "C": "D", "D": "A"}.get(self.answers[row], "9999")
        return wrong if row == WRONG else None


def picture(seed: int) -> str:
    """A small picture as base64."""
    rng = random.Random(seed)
    image = Image.new("RGB", (64 + 4 * rng.randrange(8), 64), tuple(rng.randrange(256) for _ in range(3)))
    buffer = io.BytesIO()
    image.putpixel((rng.randrange(60), rng.randrange(60)), (0, 0, 0))
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def pictures(count: int, seed: int) -> str:
    """A cell that holds several."""
    return picture(seed) if count == 1 else json.dumps([picture(seed * 10 + i) for i in range(count)])


def cells(text: str) -> list[Image.Image]:
    """The pictures of a cell."""
    several = json.loads(text) if text.startswith("[") else [text]
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in several]


LETTERS = tuple("ABCDABCD")
TEXTS = ("left of it", "right of it", "above it", "below it")


def question(name: str, row: int) -> str:
    return f"{name} row {row}: where is the lamp?"


def hrbench() -> StandIn:
    rows = [
        (i, question("HRBench4K", i), *TEXTS, LETTERS[i], ("single", "cross")[i % 2], i // 4, picture(i))
        for i in range(ROWS)
    ]
    columns = ("index", "question", "A", "B", "C", "D", "answer", "category", "cycle_category", "image")
    return StandIn(
        "HRBench4K", columns, tuple(rows), LETTERS, (1,) * ROWS, "Answer with the letter of the right option only."
    )


def embspatial() -> StandIn:
    sources = ("mp3d", "ai2thor", "scannet")
    rows = [
        (i, question("EmbSpatialBench", i), json.dumps(TEXTS), LETTERS[i], sources[i % 3], picture(10 + i))
        for i in range(ROWS)
    ]
    columns = ("index", "question", "options", "answer", "data_source", "image")
    return StandIn("EmbSpatialBench", columns, tuple(rows), LETTERS, (1,) * ROWS, "The best answer is:")


def sparbench() -> StandIn:
    tasks = ("position_matching",) * 4 + ("depth_prediction_oc",) * 4
    answers = (*LETTERS[:4], "2.5", "3.0", "1.2", "4.0")
    counts = (2, 2, 1, 1, 1, 2, 3, 1)
    rows = [(i, question("SparBench", i), tasks[i], answers[i], pictures(counts[i], 20 + i)) for i in range(ROWS)]
    return StandIn(
        "SparBench",
        ("index", "question", "task", "answer", "image"),
        tuple(rows),
        answers,
        counts,
        "normalized to a 0-1000 scale",
    )


def vsibench() -> StandIn:
    kinds = ("object_rel_distance",) * 4 + ("object_counting",) * 4
    answers = (*LETTERS[:4], "4", "2", "7", "3")
    candidates = str([f"{letter}. {text}" for letter, text in zip("ABCD", TEXTS, strict=True)])
    rows = [
        (i, question("VSI-Bench", i), kinds[i], candidates if i < 4 else "", answers[i], "scene.mp4")
        for i in range(ROWS)
    ]
    columns = ("index", "question", "question_type", "candidates", "answer", "video")
    return StandIn("VSI-Bench", columns, tuple(rows), answers, (FRAMES,) * ROWS, "These are frames of a video.")


FRAMES = 16


def erqa() -> StandIn:
    counts = (1, 2, 2, 3, 1, 2, 2, 1)
    rows = []
    for i, count in enumerate(counts):
        text = question("ERQA", i)
        shown = "<image> " + text if count == 1 else text + "".join(f" Frame {n}: <image>" for n in range(count))
        options = " ".join(f"{letter}. {text}" for letter, text in zip("ABCD", TEXTS, strict=True))
        rows.append((i, f"{shown} Choices: {options}", LETTERS[i], "Task Reasoning", pictures(count, 40 + i)))
    return StandIn(
        "ERQA", ("index", "question", "answer", "category", "image"), tuple(rows), LETTERS, counts, "Choices: A. left"
    )


def mmsi() -> StandIn:
    counts = (2, 3, 2, 2, 4, 2, 2, 2)
    kinds = ("MSR", "Motion-Cam")
    rows = [
        (i, question("MMSIBench", i), *TEXTS, LETTERS[i], kinds[i % 2], pictures(counts[i], 60 + i))
        for i in range(ROWS)
    ]
    columns = ("index", "question", "A", "B", "C", "D", "answer", "category", "image")
    return StandIn("MMSIBench_wo_circular", columns, tuple(rows), LETTERS, counts, "Answer with the option's letter")


STANDINS = (hrbench(), embspatial(), sparbench(), vsibench(), erqa(), mmsi())


def write(data: Path, hub: Path) -> None:
    """All tables below `data` (the toolkit's LMUData), VSI-Bench's video in a copy of the hub's cache below `hub`."""
    data.mkdir(parents=True, exist_ok=True)
    for standin in STANDINS:
        with (data / f"{standin.name}.tsv").open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(standin.columns)
            writer.writerows(standin.rows)
    repository = hub / "datasets--nyu-visionx--VSI-Bench"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / ".vsibench_extracted").write_text("done")
    video(snapshot / "scene.mp4")


def video(path: Path) -> None:
    """Twenty-four frames, each of another grey."""
    import cv2
    import numpy as np

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 8, (64, 64))
    for i in range(24):
        writer.write(np.full((64, 64, 3), 10 * i, np.uint8))
    writer.release()
