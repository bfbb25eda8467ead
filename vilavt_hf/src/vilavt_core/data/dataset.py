"""The data set of a run: records of several sources as one sequence of samples, measured before the first step."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError
from ..failures import quoted_error
from ..json_text import parse_json
from ..outputs import whole_file
from .annotations import Annotations
from .example import Dropped, Example
from .parallel import in_processes
from .registry import DataSource
from .rendering import Rendered, Renderer
from .schema import read_record

logger = logging.getLogger(__name__)

OverLong = Literal["drop", "cut"]

FILE_PROBLEMS = ("missing file", "image")
"""Kinds of samples that are left out because of an image's file, and so may be sound at the next look."""


@dataclass(frozen=True)
class Measure:
    """What a sample will be, found out from its text and the headers of its images."""

    tokens: int
    """Of the stream as trained, so after a cut; 0 if the sample is dropped."""
    trained: int
    image_tokens: int
    images: int
    turns: int
    """Assistant turns."""
    cut_from: int = 0
    """Tokens before it was cut; 0 if it was not."""
    kind: str = ""
    """Why it is dropped, in a word or two; empty if it is not."""
    problem: str = ""
    """The same in a sentence."""
    pictures: int = 0
    """`SftDataset.picture_mark` when it was measured; 0 if a file failed: the measure is taken again."""


class SftDataset:
    """Samples of all sources, in their order.

    Args:
        sources: from `Registry.find`; names must differ.
        renderer: makes the token streams.
        max_length: tokens of a sample.
        over_long: what happens to longer ones: dropped, or cut behind the last assistant turn that fits.
        seed: draws the records of sources whose rate is below 1, the same on every rank.

    Raises:
        DataError: a source cannot be read, or there is none.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        renderer: Renderer,
        *,
        max_length: int,
        over_long: OverLong = "drop",
        seed: int = 0,
    ):
        names = [source.name for source in sources]
        if not sources or len(set(names)) < len(names):
            raise DataError(f"data sets {names}: name at least one, and none twice", "registry")
        self.sources, self.renderer = tuple(sources), renderer
        self.max_length, self.over_long, self.seed = max_length, over_long, seed
        self.annotations = [Annotations(source.annotations) for source in sources]
        self.records = [_drawn(len(a), s, seed) for s, a in zip(sources, self.annotations, strict=True)]
        self.ends = np.cumsum([len(records) for records in self.records])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _locate(self, i: int) -> tuple[int, int]:
        source = int(np.searchsorted(self.ends, i, side="right"))
        before = int(self.ends[source - 1]) if source else 0
        return source, int(self.records[source][i - before])

    def name(self, i: int) -> str:
        """What reports call a sample: its data set and the place of its record there."""
        source, record = self._locate(i)
        return f"{self.sources[source].name}[{record}]"

    def source_of(self, i: int) -> str:
        """Name of the data set of a sample."""
        return self.sources[self._locate(i)[0]].name

    def image_root(self, i: int) -> Path:
        """Where the relative image paths of a sample start."""
        return self.sources[self._locate(i)[0]].image_root

    def record(self, i: int) -> Any:
        """A sample's record as it stands in its file."""
        source, record = self._locate(i)
        return self.annotations[source][record]

    def __getitem__(self, i: int) -> Example | Dropped:
        """The sample with its images decoded, or why it cannot be used."""
        try:
            return self._render(i, decode=True)[0].example
        except DataError as error:
            return Dropped(self.name(i), error.kind, str(error))

    def measure(self, i: int) -> Measure:
        """A sample's lengths without decoding an image; a sample that cannot be used says why."""
        mark = self.picture_mark(i)  # taken first: an image that changes meanwhile is measured again
        try:
            rendered, full = self._render(i, decode=False)
        except DataError as error:
            kept = 0 if error.kind in FILE_PROBLEMS else mark
            return Measure(0, 0, 0, 0, 0, kind=error.kind, problem=str(error), pictures=kept)
        example = rendered.example
        tokens = len(example.input_ids)
        image_tokens = sum((i.width // 28) * (i.height // 28) for g in example.groups for i in g.images)
        return Measure(
            tokens=tokens,
            trained=rendered.trained,
            image_tokens=image_tokens,
            images=sum(len(g.images) for g in example.groups),
            turns=len(rendered.cuts),
            cut_from=full if full > tokens else 0,
            pictures=mark,
        )

    def picture_mark(self, i: int) -> int:
        """Changes with the size or the time of any image of a sample; never 0. Opens no image."""
        try:
            record = read_record(self.record(i), self.name(i))
        except DataError:
            files = []  # the annotations alone decide
        else:
            root = self.image_root(i)
            files = [root / name for name in record.images]
            files += [Path(video.label) for video in self.renderer.videos(record, root)]
        stats = [_size_and_time(path) for path in files]
        return 1 + int.from_bytes(hashlib.blake2b(repr(stats).encode(), digest_size=7).digest())

    def _render(self, i: int, decode: bool) -> tuple[Rendered, int]:
        """The sample as it is trained, and its tokens before any cut."""
        source, _ = self._locate(i)
        name = self.name(i)
        data = read_record(self.record(i), name)
        name = name if data.id is None else f"{name} ({data.id})"
        place = self.sources[source]
        rendered = self.renderer.render(data, name, place.image_root, place.crops, decode=decode)
        length = len(rendered.example.input_ids)
        if length <= self.max_length:
            return rendered, length
        shorter = rendered.within(self.max_length) if self.over_long == "cut" else None
        if shorter is None:
            cut = "; no assistant turn ends before that" if self.over_long == "cut" else ""
            raise DataError(f"{name}: {length} tokens, at most {self.max_length} are trained on{cut}", "too long")
        return shorter, length

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes measures, but for images: annotations count by their size and time."""
        files = []
        for source in self.sources:
            stat = source.annotations.stat()
            files.append([source.model_dump(mode="json"), stat.st_size, stat.st_mtime_ns])
        renderer = self.renderer
        vocabulary = sorted(renderer.tokenizer.get_vocab().items())
        parts: list[Any] = [
            files,
            asdict(renderer.settings),
            asdict(renderer.preset),
            renderer.prompts.sha256,
            hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest(),
            [self.max_length, self.over_long, self.seed],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns


def _drawn(count: int, source: DataSource, seed: int) -> np.ndarray:
    """Indices of the records that are used, ascending."""
    if source.rate >= 1:
        return np.arange(count)
    name = int.from_bytes(hashlib.sha256(source.name.encode()).digest()[:4], "big")
    return np.sort(np.random.default_rng([seed, name]).choice(count, int(count * source.rate), replace=False))


@dataclass(frozen=True)
class Lengths:
    """Measures of all samples of a data set, as arrays."""

    tokens: np.ndarray
    """(n,) int64; 0 where a sample is dropped."""
    trained: np.ndarray
    image_tokens: np.ndarray
    images: np.ndarray
    turns: np.ndarray
    cut_from: np.ndarray
    pictures: np.ndarray
    problems: dict[int, tuple[str, str]]
    """Sample -> kind and sentence, for every dropped one."""

    @classmethod
    def of(cls, measures: Sequence[Measure]) -> "Lengths":
        """From one measure per sample."""
        columns = {name: np.array([getattr(m, name) for m in measures], np.int64) for name in _COLUMNS}
        return cls(**columns, problems={i: (m.kind, m.problem) for i, m in enumerate(measures) if m.kind})

    def measure(self, i: int) -> Measure:
        """Those of one sample."""
        kind, problem = self.problems.get(i, ("", ""))
        return Measure(**{name: int(getattr(self, name)[i]) for name in _COLUMNS}, kind=kind, problem=problem)

    @property
    def kept(self) -> np.ndarray:
        """Indices of the samples that are trained on."""
        return np.flatnonzero(self.tokens)

    @property
    def dropped(self) -> Counter[str]:
        """Number of dropped samples by kind."""
        return Counter(kind for kind, _ in self.problems.values())

    @property
    def digest(self) -> str:
        """Tells whether two runs have the same samples, as far as their lengths show it."""
        return hashlib.sha256(np.stack([self.tokens, self.trained, self.images]).tobytes()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write to an ``.npz`` file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            np.savez_compressed(
                file, problems=np.array(json.dumps(self.problems)), **{name: getattr(self, name) for name in _COLUMNS}
            )

    @classmethod
    def load(cls, path: Path) -> "Lengths":
        """What `save` wrote.

        Raises:
            DataError: it is damaged, or something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                problems = {int(i): (kind, text) for i, (kind, text) in parse_json(str(file["problems"])).items()}
                columns = {name: file[name] for name in _COLUMNS}
                if any(one.shape != columns["tokens"].shape or one.dtype.kind not in "iu" for one in columns.values()):
                    raise ValueError("its columns are no whole numbers, one for each sample")
        except Exception as error:  # numpy, its zip reader and its headers have errors of their own
            if isinstance(error, MemoryError):
                raise
            raise DataError(f"{path}: no lengths of samples: {quoted_error(error)}", "lengths") from None
        return cls(**columns, problems=problems)


_COLUMNS = ("tokens", "trained", "image_tokens", "images", "turns", "cut_from", "pictures")


def measure(
    dataset: SftDataset,
    indices: Sequence[int] | None = None,
    *,
    known: Lengths | None = None,
    workers: int = 0,
    progress: bool = False,
) -> dict[int, Measure]:
    """Measures of samples that differ from the known ones.

    Args:
        dataset: what to measure.
        indices: which samples; None: all.
        known: of all samples, from an earlier start; a sample whose images kept their size and time is left out.
        workers: processes.
        progress: show a bar.
    """
    which = range(len(dataset)) if indices is None else indices
    found = in_processes(partial(_measure, dataset, known), which, workers=workers, title="measuring samples",
                         progress=progress)  # fmt: skip
    return {i: one for i, one in zip(which, found, strict=True) if one is not None}


def _measure(dataset: SftDataset, known: Lengths | None, i: int) -> Measure | None:
    kept = 0 if known is None else int(known.pictures[i])
    return None if kept and kept == dataset.picture_mark(i) else dataset.measure(i)
