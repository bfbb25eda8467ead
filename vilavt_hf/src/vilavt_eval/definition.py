"""What a benchmark is: one YAML file. ``benchmarks/`` holds those known by name; one of your own works by its path."""

import functools
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from vilavt_core.errors import BenchmarkError
from vilavt_core.failures import quoted
from vilavt_core.sources import Rule, Video
from vilavt_core.spelling import did_you_mean
from vilavt_core.validation import problems
from vilavt_core.yaml_config import merged, read_keys

from .metrics import find_metric, is_function

FOLDER = Path(__file__).parent / "benchmarks"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Keys(_Part):
    """Where a record keeps what."""

    id: str | None = Field(
        default="question_id", description="key of the question's id; null: records are numbered from 0"
    )
    question: str = Field(default="question", description="key of the question's text")
    answer: str = Field(default="answer", description="key of the right answer")
    images: str | None = Field(
        default="images", description="key of the image paths: a list, or one path; null: there are none, only videos"
    )
    options: str | None = Field(default="options", description="key of the list of options; null: there is none")
    type: str | None = Field(
        default="problem_type", description="key of the question type; a record without it has default_type"
    )


class Videos(_Part):
    """Where the video of a question is, and which of its frames are shown; behind the images, if there are some."""

    path: str = Field(
        description="from the folder of images, with keys of the record in braces: {dataset}/{scene_name}.mp4; a key "
        "alone, as {videos}, may hold a list"
    )
    frames: int | None = Field(
        default=None, ge=1, description="frames, uniform in time; default: 32, unless fps is set"
    )
    fps: float | None = Field(default=None, gt=0, description="instead, frames per second")
    rule: Rule = Field(default="ends", description="ends: the first and the last frame are among them; centres: not")

    @model_validator(mode="after")
    def _usable(self) -> "Videos":
        self.video("")
        if not self.keys or any(not key.isidentifier() for key in self.keys):
            raise ValueError(f"path: {self.path!r} must hold keys of a record in braces, as {{video}}")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """Of a record, that the path is made of."""
        try:
            return tuple(name for _, name, _, _ in string.Formatter().parse(self.path) if name is not None)
        except ValueError as error:
            raise ValueError(f"path: {self.path!r}: {error}") from None

    def named(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the path is made of, for each video of a record; unchecked."""
        values = {key: record.get(key) for key in self.keys}
        (first, *_) = values
        if isinstance(listed := values[first], list) and self.path == f"{{{first}}}":
            return [{first: value} for value in listed] or [{first: None}]
        return [values]

    def video(self, path: str | Path) -> Video:
        """A file and which of its frames are shown."""
        return Video(path, self.frames, self.fps, self.rule)


class TypeRule(_Part):
    """How questions of one type are asked and scored."""

    metric: str = Field(
        description="a question type of vilavt_core.scoring, or, if functions are allowed, package.module:function"
    )
    suffix: str = Field(default="", description="put after question and options, on a line of its own; empty: nothing")

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        if is_function(value) and not (info.context or {}).get("functions"):
            raise BenchmarkError(
                f"metric {quoted(repr(value))} is a function, which would be imported and run; if you trust the file, "
                "name it with --allow-functions (functions=True in Python)"
            )
        find_metric(value)
        return value


class Report(_Part):
    """How scores are put together."""

    category: str | None = Field(default=None, description="key of a record that tables are split by")
    merged_suffixes: tuple[str, ...] = Field(
        default=(), description="endings taken off a category: a_easy and a_hard become a"
    )
    groups: dict[str, tuple[str, ...]] = Field(
        default={}, description="named sets of categories; a group's score is the mean over its questions"
    )
    ungrouped: Literal["kept", "dropped"] = Field(
        default="kept", description="whether categories in no group count in the overall score"
    )
    overall: Literal["questions", "categories"] = Field(
        default="questions",
        description="the overall score is the mean over questions (micro), or over the categories' means (macro)",
    )
    rotation: str | None = Field(
        default=None,
        description="key that numbers the copies of a question whose options are rotated; the circular score counts a "
        "question as right if all its copies are",
    )

    @model_validator(mode="after")
    def _groups(self) -> "Report":
        members = [name for group in self.groups.values() for name in group]
        if twice := sorted({name for name in members if members.count(name) > 1}):
            raise ValueError(f"groups: {', '.join(twice)} stand in more than one place")
        if self.ungrouped == "dropped" and not self.groups:
            raise ValueError("ungrouped: dropped needs groups, else nothing would be left")
        if self.category is None and (self.groups or self.overall == "categories"):
            raise ValueError("category: name the key; groups and overall: categories need it")
        return self


class Benchmark(_Part):
    """A benchmark: where its questions are, how they are asked, how answers are scored and put together."""

    name: str = Field(description="as the command line takes it and results record it", pattern=r"^[\w.\-]+$")
    title: str = Field(description="what it asks, in a line; for listings")
    version: int = Field(default=1, ge=1, description="raised whenever a change of this file changes prompts or scores")
    file: str = Field(description="name of its question file (.json list or .jsonl) under the data root")
    images: Path = Field(
        default=Path("."), description="folder that image paths start from, relative to the question file"
    )
    keys: Keys = Keys()
    default_type: str = Field(default="multiple choice", description="question type of records that state none")
    types: dict[str, TypeRule] = Field(
        min_length=1, description="question type -> how it is asked and scored; others are refused"
    )
    options: Literal["question", "list", "either"] = Field(
        description="where a multiple choice lists its options: in the question's text; in a list, which is put after "
        "it; or either, a list being put after it if the record has one"
    )
    answers: Literal["letter", "option"] = Field(
        default="letter", description="a multiple choice's answer is a letter, or the full text of one of the options"
    )
    image_marks: Literal["interleaved", "removed"] = Field(
        default="removed",
        description="<image> marks in a question: the images stand there, and there must be as many; or they are taken "
        "out and the images come first",
    )
    frames: int | None = Field(
        default=None, ge=1, description="frames of a video that a record lists as images, at most"
    )
    videos: Videos | None = Field(default=None, description="video files of the questions; null: there are none")
    hidden: tuple[str, ...] = Field(
        default=("thought",), description="keys that no prompt and no result file may hold, as a solution in words"
    )
    report: Report = Report()

    @model_validator(mode="after")
    def _consistent(self) -> "Benchmark":
        if self.default_type not in self.types:
            raise ValueError(f"default_type: {self.default_type!r} is not among types: {', '.join(self.types)}")
        shown = {
            value for value in (*self.keys.model_dump().values(), self.report.category, self.report.rotation) if value
        }
        if self.videos is None and self.keys.images is None:
            raise ValueError("keys: images is null, so videos must say where the videos are")
        if self.videos is not None and self.image_marks == "interleaved":
            raise ValueError("image_marks: interleaved cannot be had with videos, whose frames have no marks")
        shown |= set(() if self.videos is None else self.videos.keys)
        if leaks := sorted(shown & set(self.hidden)):
            raise ValueError(f"hidden: {', '.join(leaks)} cannot be hidden, keys or report use it")
        return self

    def rule(self, problem_type: str) -> TypeRule | None:
        """How a question type is asked and scored; case, ``-`` and ``_`` do not matter."""
        wanted = _plain(problem_type)
        return next((rule for name, rule in self.types.items() if _plain(name) == wanted), None)

    def category_of(self, record: Mapping[str, Any]) -> str | None:
        """The category of a record or of a row of results; None if it has none."""
        if self.report.category is None or record.get(self.report.category) is None:
            return None
        name = str(record[self.report.category])
        for suffix in self.report.merged_suffixes:
            if name.endswith(suffix) and name != suffix:
                return name.removesuffix(suffix)
        return name


def known_benchmarks() -> tuple[str, ...]:
    """Names of the benchmarks that come with the package."""
    return tuple(path.stem for path in sorted(FOLDER.glob("*.yaml"), key=lambda path: path.stem.lower()))


def load_benchmark(name_or_path: str | Path, *, functions: bool = False) -> Benchmark:
    """A benchmark by name, or by the path of a YAML file.

    A file may start from another benchmark: ``base: ERQA`` (a name, or a path relative to the file) takes everything
    from there, and what the file says itself replaces it, mappings key by key.

    Args:
        name_or_path: which.
        functions: whether its metrics may be functions: their modules are imported, which runs them.

    Raises:
        BenchmarkError: no such benchmark, or the file cannot be read or has wrong keys; names all of them.
    """
    path = _find(str(name_or_path))
    return read_benchmark(_values(path, ()), str(path), functions=functions)


def shipped_benchmark(name: str) -> Benchmark | None:
    """The benchmark that comes with the package under a name; None: there is none. A path is no name."""
    known = _shipped(name)
    return None if known is None else load_benchmark(known)


def read_benchmark(values: Any, where: str, *, functions: bool = False) -> Benchmark:
    """A benchmark from plain data.

    Args:
        values: the data.
        where: it stands, for errors.
        functions: whether metrics may be functions, whose modules are imported; not if the data may come from anybody.

    Raises:
        BenchmarkError: wrong keys; names all of them.
    """
    try:
        return Benchmark.model_validate(values, context={"functions": functions})
    except ValidationError as error:
        raise BenchmarkError(
            f"{where}: {problems(error, known=[*Benchmark.model_fields, *TypeRule.model_fields])}"
        ) from None
    except BenchmarkError as error:
        raise BenchmarkError(f"{where}: {error}") from None


def _find(name: str, home: Path = Path()) -> Path:
    if name.endswith((".yaml", ".yml")):
        return home / name
    known = _shipped(name)
    if known is None:
        raise BenchmarkError(
            f"no benchmark {name!r}; known are {', '.join(known_benchmarks())}, or the path of a YAML file"
            f"{did_you_mean(name, known_benchmarks())}"
        )
    return FOLDER / f"{known}.yaml"


def _shipped(name: str) -> str | None:
    """How the package spells a name that it knows."""
    return next((known for known in known_benchmarks() if _plain(known) == _plain(name)), None)


def _values(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    values = read_keys(path, BenchmarkError)
    base = values.pop("base", None)
    if base is None:
        return values
    try:
        if path.resolve() in seen:
            raise BenchmarkError(f"{base} leads back to {path}")
        return merged(_values(_find(str(base), path.parent), (*seen, path.resolve())), values)
    except BenchmarkError as error:
        raise BenchmarkError(f"{path}: base: {error}") from None


@functools.lru_cache(maxsize=1024)
def _plain(name: str) -> str:
    """Spellings of one name become the same: ``V*``, ``vstar_bench``, ``VStarBench``."""
    return re.sub(r"[\s_\-]+", "", name.replace("*", "star")).lower().removesuffix("bench")
