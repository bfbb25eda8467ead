"""Rows of RL data: ``rl_data.jsonl`` of the published project as it is, JSON lists, and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vilavt_core.errors import ScoringError
from vilavt_core.scoring import QuestionType, check_target, known_options

from .errors import RowError
from .rewards import Task


@dataclass(frozen=True)
class Row:
    """One question about some images, and its right answer."""

    question: str
    answer: str
    """Without an answer tag or a box around it."""
    images: tuple[str, ...]
    """Files; also the sources of every crop, so every rollout worker must be able to read them."""
    question_type: str
    """See :class:`vilavt_core.scoring.QuestionType`."""
    data_type: str = ""
    """Where it comes from: the prefix of metrics, and verl's ``data_source``."""
    max_turns: int | None = None
    """None: the setting of the run."""
    max_pixels: int | None = None
    """Of each image and crop, at most the run's setting; None: that setting."""
    id: str = ""
    options: tuple[str, ...] = ()
    """Of a multiple choice, with their letters: those of the key ``options``, else those that the question lists."""

    @property
    def task(self) -> Task:
        """What a reward needs of it."""
        return Task(self.answer, self.question_type, self.data_type, self.options)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the way between processes."""
        return asdict(self) | {"images": list(self.images), "options": list(self.options)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Inverse of :meth:`to_json`."""
        return cls(**{**data, "images": tuple(data["images"]), "options": tuple(data.get("options", ()))})


def read_rows(files: str | Path | Sequence[str | Path]) -> list[Row]:
    """All rows of some files, checked: also that the strict reward can pay for each answer, which it would otherwise
    refuse in the middle of training.

    Keys: ``question``, ``answer``, ``image_path`` (a list; a path that does not exist as it is counts from the file's
    folder), ``question_type``, and optionally ``data_type``, ``max_num_steps`` (0 or null: not set), ``max_pixels``,
    ``id``, ``options`` (of a multiple choice: a list of texts, or an object from A, B, … to texts).

    Raises:
        DataError: a file cannot be read, there is no row, or a row lacks something; names file, row and remedy.
    """
    paths = [Path(file) for file in ([files] if isinstance(files, (str, Path)) else files)]
    rows = [_row(record, path, number) for path in paths for number, record in _records(path)]
    if not rows:
        raise RowError(f"{', '.join(map(str, paths))}: there are no rows")
    return rows


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, record) of a file."""
    if not path.is_file():
        raise RowError(f"{path}: no such file")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        elif path.suffix == ".json":
            yield from enumerate(json.loads(path.read_text(encoding="utf-8")), 1)
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield number, json.loads(line)
        else:
            raise RowError(f"{path}: the name must end in .jsonl, .json or .parquet")
    except (ValueError, OSError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError(f"{path}: cannot be read: {error}") from error


def _row(record: Any, path: Path, number: int) -> Row:
    where = f"{path}, row {number}"
    if not isinstance(record, dict):
        raise RowError(f"{where}: it is {type(record).__name__}, it must be an object")
    sample_id = str(record.get("id") or f"{path.stem}-{number}")
    where += f" (sample {sample_id})"
    for key in ("question", "answer", "question_type"):
        if record.get(key) is None or not str(record[key]).strip():
            raise RowError(f"{where}: {key!r} is missing or blank")
    question = str(record["question"])
    try:
        kind, answer = QuestionType.read(str(record["question_type"])), str(record["answer"])
        choice = kind is QuestionType.MULTIPLE_CHOICE
        options = known_options(record.get("options"), question, answer) if choice else ()
        answer = check_target(kind, answer, options)
    except ScoringError as error:
        raise RowError(f"{where}: {error}") from None
    images = record.get("image_path")
    if isinstance(images, str) or not isinstance(images, list | tuple):
        raise RowError(f"{where}: 'image_path' must be a list of files, it is {type(images).__name__}")
    return Row(
        question=question,
        answer=answer,
        images=tuple(_image(str(image), path, where) for image in images),
        question_type=str(record["question_type"]),
        data_type=str(record.get("data_type") or ""),
        max_turns=_whole(record, "max_num_steps", where),
        max_pixels=_whole(record, "max_pixels", where),
        id=sample_id,
        options=options,
    )


def _image(image: str, path: Path, where: str) -> str:
    for candidate in (Path(image), path.parent / image):
        if candidate.is_file():
            return str(candidate.absolute())
    raise RowError(f"{where}: no image {image!r}, neither as it is nor beside {path.name}")


def _whole(record: Mapping[str, Any], key: str, where: str) -> int | None:
    value = record.get(key)
    if not value:
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise RowError(f"{where}: {key!r} must be a whole number, it is {value!r}") from None
