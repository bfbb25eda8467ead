"""The held-out scenes of the tiny model as a benchmark of ``vilavt eval``: its definition, questions and pictures."""

import json
from pathlib import Path
from typing import Any

import yaml

from .evaluate import tasks

NAME = "vilavt-tiny"

DEFINITION: dict[str, Any] = {
    "name": NAME,
    "title": "held-out scenes of vilavt-tiny: digits that cannot be read at the first look",
    "file": "questions.json",
    "options": "question",
    "default_type": "numerical",
    "types": {"numerical": {"metric": "numerical"}},
    "report": {"category": "kind"},
}


def write_benchmark(folder: Path, limit: int | None = None) -> Path:
    """Write ``benchmark.yaml``, ``questions.json`` and the pictures.

    Args:
        folder: made if missing.
        limit: questions; None: all 560.

    Returns:
        Path of the definition, which ``vilavt eval`` takes.
    """
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    records = []
    for number, task in enumerate(tasks("heldout", limit)):
        picture = f"pictures/{number}.png"
        task.scene.image.save(folder / picture, compress_level=1)
        records.append(
            {
                "question_id": number,
                "question": task.question.text,
                "answer": task.question.answer,
                "images": [picture],
                "problem_type": "numerical",
                "kind": str(task.question.kind),
            }
        )
    (folder / DEFINITION["file"]).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    definition = folder / "benchmark.yaml"
    definition.write_text(yaml.safe_dump(DEFINITION, sort_keys=False), encoding="utf-8")
    return definition
