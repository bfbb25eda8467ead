"""Rows of RL data: ``rl_data.jsonl`` of the published project as it is, JSON lists, and Parquet."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vilavt_core.data.annotations import Annotations
from vilavt_core.errors import DataError, ImageError, ScoringError
from vilavt_core.images import image_size
from vilavt_core.protocol import VIDEO_MARK
from vilavt_core.scoring import QuestionType, check_target, known_options
from vilavt_core.sources import ImageSource, Video

from .errors import RowError
from .rewards import Task


@dataclass(frozen=True)
class Row:
    """One question about some images, and its right answer."""

    question: str
    answer: str
    """Without an answer tag or a box around it."""
    images: tuple[str, ...]
    """Files or data URLs; also the sources of every crop, so every rollout worker must be able to read the files."""
    question_type: str
    """See `vilavt_core.scoring.QuestionType`."""
    data_type: str = ""
    """Where it comes from: the prefix of metrics, and verl's ``data_source``."""
    max_turns: int | None = None
    """None: the setting of the run."""
    max_pixels: int | None = None
    """Of each image and crop, at most the run's setting; None: that setting."""
    id: str = ""
    options: tuple[str, ...] = ()
    """Of a multiple choice, with their letters: those of the key ``options``, else those that the question lists."""
    videos: tuple[Mapping[str, Any], ...] = ()
    """Video files, shown after the images, as `vilavt_core.sources.Video.of` takes them."""

    @property
    def sources(self) -> list[ImageSource]:
        """Images, then videos: what an episode shows."""
        return [*self.images, *map(Video.of, self.videos)]

    @property
    def task(self) -> Task:
        """What a reward needs of it."""
        return Task(self.answer, self.question_type, self.data_type, self.options)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the way between processes."""
        lists = {"images": list(self.images), "options": list(self.options), "videos": [dict(v) for v in self.videos]}
        return asdict(self) | lists

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Inverse of `to_json`."""
        lists = {name: tuple(data.get(name, ())) for name in ("images", "options", "videos")}
        return cls(**{**data, **lists})


def read_rows(files: str | Path | Sequence[str | Path]) -> list[Row]:
    """All rows of some files, checked: also that the strict reward can pay for each answer, which it would otherwise
    refuse in the middle of training.

    Keys: ``question``, ``answer``, ``image_path`` or ``images``, ``question_type``, and optionally ``data_type``,
    ``max_num_steps`` (0 or null: not set), ``max_pixels``, ``id``, ``options`` (of a multiple choice: a list of texts,
    or an object from A, B, … to texts). Images are a list; each is a path (one that does not exist as it is counts from
    the file's folder) or holds the image itself: a data URL, its bytes, or, as `datasets` writes it, ``{"bytes",
    "path"}``. Images that rows hold stay in memory, encoded. ``videos`` are a list of files, or of
    ``{"path", "frames" or "fps", "rule"}`` (verl's ``video`` and ``nframes`` mean the same), shown after the images.

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
        elif path.suffix in (".json", ".jsonl"):
            yield from enumerate(Annotations(path), 1)
        else:
            raise RowError(f"{path}: the name must end in .jsonl, .json or .parquet")
    except DataError as error:
        raise RowError(str(error)) from None
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
    keys = [key for key in ("image_path", "images") if record.get(key) is not None] or ["image_path"]
    if len(keys) > 1:
        raise RowError(f"{where}: it has both 'image_path' and 'images'; keep the one that holds the images")
    videos = record.get("videos") or ()
    if isinstance(videos, str) or not isinstance(videos, Sequence):
        raise RowError(f"{where}: 'videos' must be a list, it is {type(videos).__name__}")
    if videos and VIDEO_MARK in question:
        raise RowError(f"{where}: the question holds {VIDEO_MARK}; videos are shown before it, leave the mark out")
    images = record.get(keys[0], [] if videos else None)
    images = [] if images is None and videos else images
    if not isinstance(images, list | tuple):
        raise RowError(f"{where}: {keys[0]!r} must be a list of files, it is {type(images).__name__}")
    return Row(
        question=question,
        answer=answer,
        images=tuple(_image(image, path, f"{where}, image {i}") for i, image in enumerate(images)),
        videos=tuple(_video(video, path, f"{where}, video {i}") for i, video in enumerate(videos)),
        question_type=str(record["question_type"]),
        data_type=str(record.get("data_type") or ""),
        max_turns=_whole(record, "max_num_steps", where),
        max_pixels=_whole(record, "max_pixels", where),
        id=sample_id,
        options=options,
    )


def _image(image: Any, path: Path, where: str) -> str:
    """An image of a row as a file or a data URL."""
    if isinstance(image, Mapping):
        if unknown := sorted(set(image) - {"bytes", "path"}):
            raise RowError(f"{where}: it has the keys {', '.join(unknown)}; an image has bytes, path, or both")
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return _embedded(f"data:image/*;base64,{base64.b64encode(image).decode()}", image, where)
    if not isinstance(image, str):
        raise RowError(f"{where}: it is {type(image).__name__}, it must be a file, a data URL, or bytes of an image")
    if image[:5].lower() == "data:":
        return _embedded(image, image, where)
    return _file(image, path, f"{where}: no image")


def _video(entry: Any, path: Path, where: str) -> dict[str, Any]:
    """A video of a row, its file found."""
    try:
        video = Video.of(entry)
    except ImageError as error:
        raise RowError(f"{where}: {error}") from None
    return {"path": _file(str(video.source), path, f"{where}: no video"), **video.wanted}


def _file(name: str, path: Path, problem: str) -> str:
    for candidate in (Path(name), path.parent / name):
        if os.path.isfile(candidate):  # Path.is_file raises for a very long name
            return str(candidate.absolute())
    raise RowError(f"{problem} {name[:200]!r}, neither as it is nor beside {path.name}")


def _embedded(url: str, source: str | bytes, where: str) -> str:
    """An image that a row holds, once its header was read."""
    try:
        image_size(source, name="the image in it")
    except ImageError as error:
        raise RowError(f"{where}: {error}") from None
    return url


def _whole(record: Mapping[str, Any], key: str, where: str) -> int | None:
    value = record.get(key)
    if not value:
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise RowError(f"{where}: {key!r} must be a whole number, it is {value!r}") from None
