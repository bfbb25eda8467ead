"""The scenes of the tiny model as questions: a fixed set per split, and files that ``vilavt eval`` takes."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from .scenes import CLIP_KINDS, Card, QuestionKind, Scene, SceneQuestion, Split, ask_about, scene_about

NAME = "vilavt-tiny"

COUNTS = {
    QuestionKind.ONE: 80,
    QuestionKind.PAIR: 130,
    QuestionKind.NESTED: 90,
    QuestionKind.SUM: 80,
    QuestionKind.LARGER: 60,
    QuestionKind.SHARED: 120,
    QuestionKind.WHICH: 60,
    QuestionKind.SUM_ACROSS: 80,
    QuestionKind.LARGER_ACROSS: 60,
    QuestionKind.SHARED_ACROSS: 80,
    QuestionKind.FRAME: 60,
    QuestionKind.FIRST: 80,
}
"""Questions of each kind in the full set: 980."""

SEED = 2024


@dataclass(frozen=True)
class SceneTask:
    """One question, with what interventions and scoring need."""

    question: SceneQuestion
    draw: Callable[[], Scene]
    """Draws the scene it is about, the same every time: a thousand scenes would take gigabytes."""
    other: Card | None = None
    """Pair questions whose digits differ: the other card of the cell."""

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The images or frames it shows, drawn anew."""
        return self.draw().images


def make_task(
    split: Split, kind: QuestionKind, number: int, *, seed: int = SEED, pictures: int | None = None
) -> SceneTask:
    """Question `number` of a kind, about a scene of its own; `pictures` as in `scene_about`."""

    def made() -> tuple[Scene, SceneQuestion]:
        rng = np.random.default_rng([seed, list(QuestionKind).index(kind), number])
        scene = scene_about(rng, split, kind, pictures=pictures)
        return scene, ask_about(rng, scene, kind)

    scene, question = made()
    other = None
    if kind is QuestionKind.PAIR:
        (card,) = question.targets
        other = next(c for c in scene.in_cell(card) if c is not card)
        other = other if other.digit != card.digit else None
    return SceneTask(question, lambda: made()[0], other)


def tasks(
    split: Split = "heldout",
    limit: int | None = None,
    counts: Mapping[QuestionKind, int] = COUNTS,
    *,
    pictures: int | None = None,
) -> list[SceneTask]:
    """The fixed question set of a split, kinds interleaved.

    Args:
        split: whose scans and photographs.
        limit: questions, in the same proportions; None: all.
        counts: questions of each kind.
        pictures: of a scene of several, as in `scene_about`.
    """
    wanted = dict(counts)
    if limit is not None:
        total = sum(counts.values())
        wanted = {kind: max(1, round(n * limit / total)) for kind, n in counts.items()}
    out = [make_task(split, kind, i, pictures=pictures) for kind, n in wanted.items() for i in range(n)]
    order = np.random.default_rng(SEED).permutation(len(out))
    return [out[i] for i in order]


def write_benchmark(folder: Path, todo: Sequence[SceneTask], title: str = "scenes of vilavt-tiny") -> Path:
    """Write ``benchmark.yaml``, ``questions.json``, the images, and the clips as lossless videos.

    Args:
        folder: made if missing.
        todo: the questions; the id of each is its number.
        title: of the benchmark.

    Returns:
        Path of the definition, which ``vilavt eval`` takes.
    """
    records = []
    for number, task in enumerate(todo):
        shown = _write_shown(folder, number, task)
        records.append(_record(number, task, task.question.answer, shown))
    return _write(folder / "benchmark.yaml", NAME, title, folder / "questions.json", records)


def write_swapped(folder: Path, todo: Sequence[SceneTask]) -> Path:
    """Write ``swapped.yaml`` and ``swapped.json`` beside the files of `write_benchmark`, whose images they show.

    The questions are those about a cell with two different digits, under the same numbers. The other card's digit is
    what an answer must be that follows the query of the other card.

    Returns:
        Path of the definition.
    """
    title = "scenes of vilavt-tiny, asked about one card while the encoder is asked for the other"
    records = []
    for number, task in enumerate(todo):
        if task.other is not None:
            shown = {"images": [_picture(number, 0)], "videos": []}
            records.append(_record(number, task, str(task.other.digit), shown))
    return _write(folder / "swapped.yaml", f"{NAME}-swapped", title, folder / "swapped.json", records)


def _picture(number: int, index: int) -> str:
    return f"pictures/{number}-{index}.png"


def _write_shown(folder: Path, number: int, task: SceneTask) -> dict[str, list[str]]:
    """Write what a question shows; returns the keys of its record."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    images = task.images
    if task.question.kind in CLIP_KINDS:
        name = f"pictures/{number}.mkv"
        write_clip(folder / name, images)
        return {"images": [], "videos": [name]}
    names = [_picture(number, index) for index in range(len(images))]
    for name, image in zip(names, images, strict=True):
        image.save(folder / name, compress_level=1)
    return {"images": names, "videos": []}


def write_clip(path: Path, frames: Sequence[Image.Image]) -> None:
    """Write frames as a video of one frame per second, without loss: H.264 in RGB, Matroska."""
    import av

    with av.open(str(path), "w", format="matroska") as output:
        stream = output.add_stream("libx264rgb", rate=1, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "rgb24"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_image(frame)))
        output.mux(stream.encode())


def _record(number: int, task: SceneTask, answer: str, shown: dict[str, list[str]]) -> dict[str, Any]:
    return {
        "question_id": number,
        "question": task.question.text,
        "answer": answer,
        **shown,
        "problem_type": "numerical",
        "kind": str(task.question.kind),
    }


def _write(definition: Path, name: str, title: str, questions: Path, records: Iterable[dict[str, Any]]) -> Path:
    rules = {
        "name": name,
        "title": title,
        "file": questions.name,
        "options": "question",
        "default_type": "numerical",
        "types": {"numerical": {"metric": "numerical"}},
        "videos": {"path": "{videos}"},
        "report": {"category": "kind"},
    }
    questions.write_text(json.dumps(list(records), indent=1) + "\n", encoding="utf-8")
    definition.write_text(yaml.safe_dump(rules, sort_keys=False), encoding="utf-8")
    return definition
