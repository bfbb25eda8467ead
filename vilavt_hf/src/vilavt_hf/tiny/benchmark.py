"""The scenes of the tiny model as questions: a fixed set per split, and files that ``vilavt eval`` takes."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .scenes import Card, QuestionKind, Scene, SceneQuestion, Split, examples

NAME = "vilavt-tiny"

COUNTS = {
    QuestionKind.ONE: 110,
    QuestionKind.PAIR: 150,
    QuestionKind.NESTED: 110,
    QuestionKind.SUM: 110,
    QuestionKind.LARGER: 80,
}
"""Questions of each kind in the full set: 560."""

SEED = 2024


@dataclass(frozen=True)
class SceneTask:
    """One question, with what interventions and scoring need."""

    scene: Scene
    question: SceneQuestion
    other: Card | None = None
    """Pair questions whose digits differ: the other card of the cell."""


def tasks(split: Split = "heldout", limit: int | None = None) -> list[SceneTask]:
    """The fixed question set of a split, kinds interleaved; `limit` keeps that many, in the same proportions."""
    counts = dict(COUNTS)
    if limit is not None:
        total = sum(COUNTS.values())
        counts = {kind: max(1, round(n * limit / total)) for kind, n in COUNTS.items()}
    out = []
    for scene, question in examples(SEED, split, counts):
        other = None
        if question.kind is QuestionKind.PAIR:
            (card,) = question.targets
            other = next(c for c in scene.in_cell(card) if c is not card)
            other = other if other.digit != card.digit else None
        out.append(SceneTask(scene, question, other))
    order = np.random.default_rng(SEED).permutation(len(out))
    return [out[i] for i in order]


def write_benchmark(folder: Path, limit: int | None = None, split: Split = "heldout") -> Path:
    """Write ``benchmark.yaml``, ``questions.json`` and the pictures.

    Args:
        folder: made if missing.
        limit: questions; None: all 560.
        split: whose scans.

    Returns:
        Path of the definition, which ``vilavt eval`` takes. Question i is number i of `tasks`.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    todo = tasks(split, limit)
    for number, task in enumerate(todo):
        task.scene.image.save(pictures / f"{number}.png", compress_level=1)
    title = f"{split} scenes of vilavt-tiny: digits that cannot be read at the first look"
    records = (_record(number, task, task.question.answer) for number, task in enumerate(todo))
    return _write(folder / "benchmark.yaml", NAME, title, folder / "questions.json", records)


def write_swapped(folder: Path, limit: int | None = None, split: Split = "heldout") -> Path:
    """Write ``swapped.yaml`` and ``swapped.json`` beside the files of `write_benchmark`, whose pictures they show.

    The questions are those about a cell with two different digits, under the same numbers. The other card's digit is
    what an answer must be that follows the query of the other card.

    Returns:
        Path of the definition.
    """
    title = f"{split} scenes of vilavt-tiny, asked about one card while the encoder is asked for the other"
    numbered = [(number, task, task.other) for number, task in enumerate(tasks(split, limit))]
    records = (_record(number, task, str(other.digit)) for number, task, other in numbered if other is not None)
    return _write(folder / "swapped.yaml", f"{NAME}-swapped", title, folder / "swapped.json", records)


def _record(number: int, task: SceneTask, answer: str) -> dict[str, Any]:
    return {
        "question_id": number,
        "question": task.question.text,
        "answer": answer,
        "images": [f"pictures/{number}.png"],
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
        "report": {"category": "kind"},
    }
    questions.write_text(json.dumps(list(records), indent=1) + "\n", encoding="utf-8")
    definition.write_text(yaml.safe_dump(rules, sort_keys=False), encoding="utf-8")
    return definition
