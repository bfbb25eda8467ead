"""The questions of a benchmark: records of its file, checked, with the prompt built from each."""

from __future__ import annotations

import hashlib
import json
import os
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from vilavt_core.data.annotations import Annotations
from vilavt_core.errors import BenchmarkError, DataError, ScoringError
from vilavt_core.protocol import IMAGE_MARK
from vilavt_core.scoring import (
    QuestionType,
    bare_option,
    check_target,
    unwrapped_target,
    with_letters,
    without_delimiters,
)
from vilavt_core.sources import Video

from .definition import Benchmark, TypeRule
from .metrics import find_metric, is_choice, is_function

FIRST_MISSING = 3
"""Missing images that are named."""


@dataclass(frozen=True)
class Question:
    """One question, ready to be asked."""

    id: str | int
    record: Mapping[str, Any]
    """As in the file, without hidden keys."""
    images: tuple[Path, ...]
    """In conversation order; the image root is in them."""
    videos: tuple[Video, ...]
    """Shown after the images; the image root is in their paths."""
    text: str
    """The prompt: question, options, suffix; with one ``<image>`` per image if the benchmark interleaves them."""
    problem_type: str
    options: tuple[str, ...]
    """As shown, each with its letter; empty if the question lists them itself."""
    target: str
    """The right answer; of an option given by its text, the option as shown."""
    category: str | None


class Questions(Sequence[Question]):
    """The questions of a file, read when they are asked for: only offsets are held in memory (see `Annotations`).

    All are checked once when they are opened, so that a run does not end at a record in the middle.

    Args:
        benchmark: its definition.
        path: the file, or the folder (data root) that holds it under the name that the benchmark gives it.
        image_root: folder that image paths start from; None: what the benchmark says.

    Raises:
        BenchmarkError: the file cannot be read, or a record is wrong; names file, record, field, and what to do.
    """

    def __init__(self, benchmark: Benchmark, path: str | Path, image_root: str | Path | None = None):
        self.benchmark = benchmark
        path = Path(path)
        self.path = path / benchmark.file if path.is_dir() else path
        self.image_root = self.path.parent / benchmark.images if image_root is None else Path(image_root)
        try:
            self._records = Annotations(self.path)
        except DataError as error:
            raise BenchmarkError(f"{benchmark.name}: {error}") from None
        self.sha256 = self._check()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"question {i} of {len(self)}")
        return self._read(i % len(self))

    def __iter__(self) -> Iterator[Question]:
        return (self._read(i) for i in range(len(self)))

    def ids(self, limit: int | None = None) -> list[str | int]:
        """Ids in order; with a limit, of so many of the first questions."""
        return [question.id for question in islice(self, limit)]

    def require_images(self) -> None:
        """Make sure that every image and video file is there, before a model is loaded.

        Raises:
            BenchmarkError: how many questions lack files, and which are the first that are missing.
        """
        is_file = lru_cache(4096)(os.path.isfile)  # frames and images are shared by neighbouring questions
        lacking, first = 0, dict[str, str | int]()
        for question in self:
            files = (*map(str, question.images), *(str(video.source) for video in question.videos))
            missing = [path for path in files if not is_file(path)]
            lacking += bool(missing)
            for path in missing[: FIRST_MISSING - len(first)]:
                first.setdefault(path, question.id)
        if lacking:
            kind = "images" if self.benchmark.videos is None else "videos or images"
            named = ", ".join(f"{path} (question {id_})" for path, id_ in first.items())
            raise BenchmarkError(
                f"{self.path}: {kind} of {lacking} of {len(self)} questions are missing, first {named}; say where they "
                "are with --image-root"
            )

    def _check(self) -> str:
        """Read everything once; the hash of what is asked and of the right answers, the same for any order of keys."""
        digest, places = hashlib.sha256(), dict[str, int]()
        for i in range(len(self)):
            question = self._read(i)
            # 1 and "1" would be one question to whoever resumes by id
            if (first := places.setdefault(str(question.id), i)) != i:
                raise self._wrong(i, "id", f"{question.id!r} is also the id of record {first}; ids must differ")
            paths = (*self._images(i, question.record), *self._videos(i, question.record))
            shown: list[Any] = [question.id, question.text, question.problem_type, question.target, paths]
            digest.update(json.dumps(shown, ensure_ascii=True).encode() + b"\n")
        if not places:
            raise BenchmarkError(f"{self.path}: there is no question in it")
        return digest.hexdigest()

    def _read(self, i: int) -> Question:
        try:
            record = self._records[i]
        except DataError as error:
            raise BenchmarkError(str(error)) from None
        if not isinstance(record, dict):
            raise self._wrong(i, "record", f"it is a {type(record).__name__}; it must be a JSON object")
        benchmark, keys = self.benchmark, self.benchmark.keys
        record = {key: value for key, value in record.items() if key not in benchmark.hidden}
        problem_type, rule = self._type(i, record)
        text = self._text(i, record, keys.question)
        target = self._text(i, record, keys.answer)
        paths, videos = self._images(i, record), self._videos(i, record)
        options = self._options(i, record) if is_choice(rule.metric) else ()
        try:
            target = self._target(rule, target, options)
        except ScoringError as error:
            raise self._wrong(i, keys.answer, f"{error} (question {self._id(i, record)!r})") from None
        if benchmark.image_marks == "removed":
            text = text.replace(IMAGE_MARK, "").strip()
        elif (marks := text.count(IMAGE_MARK)) != len(paths):
            raise self._wrong(
                i,
                keys.question,
                f"it holds {marks} {IMAGE_MARK}, {keys.images} lists {len(paths)} images; they must be as many, or set "
                "image_marks: removed",
            )
        listed = () if benchmark.options == "question" else options
        if any(IMAGE_MARK in option for option in listed):
            raise self._wrong(i, str(keys.options), f"an option holds {IMAGE_MARK}; images can stand in questions only")
        category = benchmark.category_of(record)
        if benchmark.report.category is not None and category is None:
            raise self._wrong(
                i, benchmark.report.category, "it is missing; set report.category to the key that there is"
            )
        return Question(
            id=self._id(i, record),
            record=record,
            images=tuple(self.image_root / path for path in paths),
            videos=tuple(self._video(path) for path in videos),
            text="\n".join(part for part in (text, *listed, rule.suffix) if part),
            problem_type=problem_type,
            options=listed,
            target=target,
            category=category,
        )

    def _id(self, i: int, record: Mapping[str, Any]) -> str | int:
        key = self.benchmark.keys.id
        if key is None:
            return i
        value = record.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self._wrong(
                i, key, f"it is {_kind(value)}; it must be a text or a whole number, or set keys.id: null"
            )
        return value

    def _type(self, i: int, record: Mapping[str, Any]) -> tuple[str, TypeRule]:
        benchmark = self.benchmark
        value = record.get(benchmark.keys.type) if benchmark.keys.type else None
        name = benchmark.default_type if value is None else value
        rule = benchmark.rule(name) if isinstance(name, str) else None
        if rule is None:
            known = ", ".join(benchmark.types)
            raise self._wrong(
                i,
                str(benchmark.keys.type),
                f"{name!r} is none of the types of {benchmark.name} ({known}); add it to types",
            )
        return name, rule

    def _text(self, i: int, record: Mapping[str, Any], key: str) -> str:
        value = record.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and key == self.benchmark.keys.answer:
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            found = "blank" if isinstance(value, str) else _kind(value)
            raise self._wrong(i, key, f"it is {found}; it must be a text, or set keys to the key that holds it")
        return value

    def _images(self, i: int, record: Mapping[str, Any]) -> tuple[str, ...]:
        key, frames = self.benchmark.keys.images, self.benchmark.frames
        if key is None or (self.benchmark.videos is not None and record.get(key) is None):
            return ()
        paths = _paths(record.get(key))
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise self._wrong(i, key, f"it is {_kind(record.get(key))}; it must be a path or a list of at least one")
        if frames is not None and len(paths) > frames:
            raise self._wrong(
                i,
                key,
                f"it lists {len(paths)} frames, {self.benchmark.name} has {frames}; use a file of {frames} frames, or "
                f"a definition with frames: {len(paths)}",
            )
        return paths

    def _videos(self, i: int, record: Mapping[str, Any]) -> tuple[str, ...]:
        """Paths, relative to the image root."""
        videos = self.benchmark.videos
        if videos is None:
            return ()
        each = videos.named(record)
        for one in each:
            for key, value in one.items():
                if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
                    raise self._wrong(i, key, f"it is {_kind(value)}; videos.path {videos.path!r} needs a name there")
        return tuple(videos.path.format(**one) for one in each)

    def _video(self, path: str) -> Video:
        videos = self.benchmark.videos
        assert videos is not None
        return videos.video(self.image_root / path)

    def _options(self, i: int, record: Mapping[str, Any]) -> tuple[str, ...]:
        """The list of a record, each with its letter; empty if it has none and may have none."""
        benchmark = self.benchmark
        key = benchmark.keys.options
        value = record.get(key) if key else None
        if value is None and benchmark.options != "list":
            return ()
        if not isinstance(value, list) or len(value) < 2 or not all(isinstance(o, str) and o.strip() for o in value):
            raise self._wrong(
                i, str(key), f"it is {_kind(value)}; it must be a list of at least 2 texts, or set options: question"
            )
        if len(value) > len(string.ascii_uppercase):
            raise self._wrong(
                i, str(key), f"it lists {len(value)} options, there are {len(string.ascii_uppercase)} letters"
            )
        return with_letters(value)

    def _target(self, rule: TypeRule, target: str, options: Sequence[str]) -> str:
        """The right answer, checked, without a tag or box around it; an option's text as it is shown, with its
        letter.

        Raises:
            ScoringError: no answer could meet it.
        """
        if is_function(rule.metric):
            find_metric(rule.metric)("", target)
            return target
        if not is_choice(rule.metric):
            find_metric(rule.metric)("", target)  # a package may be missing
            return check_target(QuestionType.read(rule.metric), target)
        target = unwrapped_target(target)
        if self.benchmark.answers == "letter":
            letters = string.ascii_uppercase[: len(options) or None]
            letter = without_delimiters(target).upper()
            if len(letter) != 1 or letter not in letters:
                raise ScoringError(
                    f"{target!r} is none of the letters {letters[0]} to {letters[-1]}; if answers are the options' "
                    "texts, set answers: option"
                )
            return target
        shown = next((option for option in options if _same(target, option)), None)
        if options and shown is None:
            raise ScoringError(
                f"{target!r} is none of its {len(options)} options; if it is a letter, set answers: letter"
            )
        return target if shown is None else shown

    def _wrong(self, i: int, field: str, problem: str) -> BenchmarkError:
        return BenchmarkError(f"{self.path}, record {i}, {field}: {problem}")


class Selection(Sequence[Question]):
    """Some of the questions, by their places; like all of them read when they are asked for."""

    def __init__(self, questions: Sequence[Question], places: Sequence[int]) -> None:
        self.questions, self.places = questions, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return Selection(self.questions, self.places[i])
        return self.questions[self.places[i]]


def _paths(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()


def _same(target: str, option: str) -> bool:
    """Whether a target is an option, with or without the letter before it."""
    return target.strip() in (option.strip(), bare_option(option))


def _kind(value: Any) -> str:
    if value is None:
        return "missing or null"
    return f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
