"""What the scores of a run amount to: overall, by category and group, with intervals, over several seeds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from vilavt_core.errors import BenchmarkError

from .definition import Report
from .result_file import differences
from .scores import SEED_IN_NAME, ScoredFile, Scorer
from .statistics import RESAMPLES, Interval, mean_interval, mean_of_means, spread

logger = logging.getLogger(__name__)

_SEEDS = ("seed", "provenance.seed")
_VERSIONS = "provenance.versions."


class FigureKind(StrEnum):
    """What a figure is about."""

    OVERALL = "overall"
    """As the benchmark puts it together."""
    ALL = "all questions"
    """The plain mean of all rows, where that is something else."""
    CIRCULAR = "circular"
    """Questions of which every rotated copy is answered right."""
    GROUP = "group"
    CATEGORY = "category"
    ROTATION = "rotation"
    TYPE = "type"


@dataclass(frozen=True)
class Figure:
    """A mean score, 0 to 1."""

    kind: FigureKind
    name: str
    questions: int
    """How many; copies and seeds of a question count once."""
    score: float
    """Mean of the seeds' means."""
    interval: Interval
    """95 %, over questions; see `vilavt_eval.statistics`."""
    per_seed: tuple[float, ...]
    spread: float | None
    """Standard deviation over the seeds; None for one seed."""
    other: float
    """The same under the other scorer."""
    counted: bool = True
    """Whether it is part of the overall score."""


@dataclass(frozen=True)
class Summary:
    """The figures of one setting: files that differ in their seed only."""

    name: str
    benchmark: str | None
    scorer: Scorer
    files: tuple[str, ...]
    seeds: tuple[int | None, ...]
    rows: int
    figures: tuple[Figure, ...]
    flaws: Mapping[str, int]
    finishes: Mapping[str, int]
    """Why conversations ended -> how many; empty if the files do not say."""
    disagreements: int
    """Rows that the two scorers disagree about."""
    upstream_aborts: int
    """Rows at which the published program would have ended with an error; they score 0 here."""

    @property
    def overall(self) -> Figure:
        """The first figure."""
        return self.figures[0]


@dataclass(frozen=True)
class Rows:
    """Rows of all files of a setting as arrays, each ``(rows,)``."""

    run: np.ndarray
    """Which seed it is of, counted from 0; shards of one seed are one run."""
    unit: np.ndarray
    category: np.ndarray
    """Index into `categories`; -1: none."""
    scores: np.ndarray
    other: np.ndarray
    categories: tuple[str, ...]

    @classmethod
    def of(cls, files: Sequence[ScoredFile], scorer: Scorer) -> Rows:
        """Of scored files; questions are the same if their ids are, and copies of one another belong together."""
        units: dict[str | bytes, int] = {}
        names: dict[str | None, int] = {None: -1}
        rows = [row for file in files for row in file.rows]
        return cls(
            run=np.repeat(_runs(files), [len(file.rows) for file in files]),
            unit=np.array([units.setdefault(row.unit or row.question_id, len(units)) for row in rows]),
            category=np.array([names.setdefault(row.category, len(names) - 1) for row in rows]),
            scores=np.array([row.score(scorer) for row in rows]),
            other=np.array([row.score(other_scorer(scorer)) for row in rows]),
            categories=tuple(name for name in names if name is not None),
        )

    def select(self, mask: np.ndarray) -> Rows:
        """The rows of a mask."""
        return Rows(
            self.run[mask],
            self.unit[mask],
            self.category[mask],
            self.scores[mask],
            self.other[mask],
            self.categories,
        )

    def units(self) -> tuple[np.ndarray, np.ndarray]:
        """Sum and number of the scores of each unit that there is, as `mean_interval` takes them."""
        sizes = np.bincount(self.unit)
        sums = np.bincount(self.unit, weights=self.scores)
        return sums[sizes > 0], sizes[sizes > 0]

    def seeds(self) -> Iterator[Rows]:
        """The rows of each seed that has any."""
        return (self.select(self.run == number) for number in np.unique(self.run))


def other_scorer(scorer: Scorer) -> Scorer:
    """The other scorer."""
    return "published" if scorer == "strict" else "strict"


def summarise(
    files: Sequence[ScoredFile], scorer: Scorer = "strict", *, seed: int = 0, resamples: int = RESAMPLES
) -> Summary:
    """All figures of one setting.

    Args:
        files: one or several that differ in their seed only (see `settings_of`).
        scorer: whose scores.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    benchmark = files[0].benchmark
    rules = Report() if benchmark is None else benchmark.report
    rng = np.random.default_rng(seed)
    rows = Rows.of(files, scorer)
    if not counted_rows(rows, rules).any():
        logger.warning(
            "%s: no row has a category that counts (%s); the overall score is the plain mean of the rows",
            files[0].path,
            rules.category,
        )
    finishes = Counter(row.finish for file in files for row in file.rows if row.finish)
    flaws = Counter[str]()
    for file in files:
        flaws.update(file.flaws)
    return Summary(
        name=name_of(files[0]),
        benchmark=None if benchmark is None else benchmark.name,
        scorer=scorer,
        files=tuple(str(file.path) for file in files),
        seeds=tuple(dict(zip(_runs(files), (file.seed for file in files), strict=True)).values()),
        rows=len(rows.scores),
        figures=tuple(_figures(files, rows, rules, scorer, rng, resamples)),
        flaws=dict(flaws),
        finishes=dict(finishes.most_common()),
        disagreements=sum(len(file.differences) for file in files),
        upstream_aborts=sum(file.aborts for file in files),
    )


def settings_of(files: Sequence[ScoredFile]) -> list[tuple[ScoredFile, ...]]:
    """Files of one setting together, in the order given: what would continue one run, but for seed and versions.

    That is, everything their run lines say is the same (`result_file.differences`): the checkpoint by its fingerprint,
    wherever it was found, precision, limits, prompts, preset. Other package versions are warned about. Files that say
    nothing belong together if their names are the same but for ``seed_1``.

    Raises:
        BenchmarkError: two files answer a question in the same setting and with the same seed.
    """
    settings: list[list[ScoredFile]] = []
    for file in files:
        same = next((several for several in settings if not _apart(several[0], file)), None)
        if same is None:
            twin = next((several[0] for several in settings if _title(several[0]) == _title(file)), None)
            if twin is not None:
                logger.warning("%s is no seed of %s: %s", file.path, twin.path, _listed(_apart(twin, file)))
            settings.append([file])
        else:
            if versions := _other_versions(same[0], file):
                logger.warning("%s was made with other versions than %s: %s", file.path, same[0].path, versions)
            same.append(file)
    for several in settings:
        _refuse_overlap(several)
    return [tuple(several) for several in settings]


def _refuse_overlap(files: Sequence[ScoredFile]) -> None:
    """Files of one seed may be shards of a run; two answers to a question with one seed are a mistake."""
    seen: dict[tuple[int, str], ScoredFile] = {}
    for run, file in zip(_runs(files), files, strict=True):
        for row in file.rows:
            if (first := seen.setdefault((run, row.question_id), file)) is not file:
                raise BenchmarkError(
                    f"{first.path} and {file.path} both answer question {row.question_id} in the same setting and with "
                    f"the same seed ({file.seed}); name one of them"
                )


def _runs(files: Sequence[ScoredFile]) -> list[int]:
    """A number for each file, the same for files of one seed; a file that names no seed is a run of its own."""
    places: dict[int | str, int] = {}
    keys = (f"file {i}" if file.seed is None else file.seed for i, file in enumerate(files))
    return [places.setdefault(key, len(places)) for key in keys]


def name_of(file: ScoredFile) -> str:
    """A setting's name: model, preset and ablation, or of the file."""
    if file.run is None:
        return SEED_IN_NAME.sub("", file.path.stem) or file.path.stem
    preset = file.run.get("preset")
    parts = (
        str(file.run.get("model") or "").rstrip("/").rpartition("/")[2],
        preset.get("name") if isinstance(preset, Mapping) else preset,
        file.run.get("ablation"),
    )
    return " ".join(str(part) for part in parts if part) or file.path.stem


_Changes = list[tuple[str, Any, Any]]
"""Name, value in the first file, value in the second."""


def _apart(first: ScoredFile, second: ScoredFile) -> _Changes:
    """What makes two files two settings; empty: nothing."""
    changes = differences(_facts(first), _facts(second))
    return [change for change in changes if change[0] not in _SEEDS and not change[0].startswith(_VERSIONS)]


def _other_versions(first: ScoredFile, second: ScoredFile) -> str:
    changes = differences(_facts(first), _facts(second))
    return _listed([change for change in changes if change[0].startswith(_VERSIONS)])


def _facts(file: ScoredFile) -> dict[str, Any]:
    """What the answers of a file depend on."""
    scored_as = None if file.benchmark is None else file.benchmark.name
    said = {"folder": str(file.path.parent), "name": name_of(file)} if file.run is None else file.run
    return {**said, "scored as": scored_as}


def _title(file: ScoredFile) -> tuple[str | None, str]:
    return None if file.benchmark is None else file.benchmark.name, name_of(file)


def _listed(changes: _Changes) -> str:
    # as repr, cut: names and values are the files' and may be anything
    return "; ".join(f"{name!r:.60} is {new!r:.60}, there {old!r:.60}" for name, old, new in changes[:5])


def _figures(
    files: Sequence[ScoredFile],
    rows: Rows,
    rules: Report,
    scorer: Scorer,
    rng: np.random.Generator,
    resamples: int,
) -> Iterator[Figure]:
    def figure(kind: FigureKind, name: str, part: Rows, counted: bool = True) -> Figure:
        interval = mean_interval(*part.units(), rng, resamples)
        per_seed = tuple(float(seed.scores.mean()) for seed in part.seeds())
        other = float(np.mean([seed.other.mean() for seed in part.seeds()]))
        return _figure(kind, name, part, per_seed, interval, other, counted)

    counted = rows.select(counted_rows(rows, rules))
    if rules.overall == "categories" and len(counted.scores):
        yield _macro(counted, rng, resamples)
    else:
        yield figure(FigureKind.OVERALL, "overall", counted if len(counted.scores) else rows)
    if rules.overall == "categories" or len(counted.scores) < len(rows.scores):
        yield figure(FigureKind.ALL, "all questions", rows)
    if (circular := circular_rows(files, scorer)) is not None:
        yield figure(FigureKind.CIRCULAR, "all rotations right", circular)
    for name, members in rules.groups.items():
        part = rows.select(np.isin(rows.category, [i for i, c in enumerate(rows.categories) if c in members]))
        if len(part.scores):
            yield figure(FigureKind.GROUP, name, part)
    for number, name in sorted(enumerate(rows.categories), key=lambda item: place_of(item[1], rules)):
        part = rows.select(rows.category == number)
        yield figure(FigureKind.CATEGORY, name, part, counted=bool(np.isin(number, counted.category)))
    yield from (figure(FigureKind.ROTATION, name, part) for name, part in _parts(files, rows, "rotation"))
    if len(kinds := list(_parts(files, rows, "problem_type"))) > 1 or not rows.categories:
        yield from (figure(FigureKind.TYPE, name, part) for name, part in kinds if name)


def counted_rows(rows: Rows, rules: Report) -> np.ndarray:
    """``(rows,)`` bool: those that the overall score is made of."""
    grouped = {name for group in rules.groups.values() for name in group}
    if rules.ungrouped == "dropped":
        return np.isin(rows.category, [i for i, name in enumerate(rows.categories) if name in grouped])
    if rules.overall == "categories":
        return rows.category >= 0
    return np.ones(len(rows.scores), dtype=bool)


def macro_mean(rows: Rows, scores: np.ndarray) -> float:
    """Mean of the categories' means."""
    sizes = np.bincount(rows.category)
    sums = np.bincount(rows.category, weights=scores)
    return float((sums[sizes > 0] / sizes[sizes > 0]).mean())


def _macro(rows: Rows, rng: np.random.Generator, resamples: int) -> Figure:
    parts = [rows.select(rows.category == number) for number in np.unique(rows.category)]
    means = [float(part.scores.mean()) for part in parts]
    interval = mean_of_means(means, [mean_interval(*part.units(), rng, resamples) for part in parts])
    per_seed = tuple(macro_mean(seed, seed.scores) for seed in rows.seeds())
    other = float(np.mean([macro_mean(seed, seed.other) for seed in rows.seeds()]))
    return _figure(FigureKind.OVERALL, "overall", rows, per_seed, interval, other, True)


def _figure(
    kind: FigureKind,
    name: str,
    rows: Rows,
    per_seed: tuple[float, ...],
    interval: Interval,
    other: float,
    counted: bool,
) -> Figure:
    return Figure(
        kind=kind,
        name=name,
        questions=len(np.unique(rows.unit)),
        score=float(np.mean(per_seed)),
        interval=interval,
        per_seed=per_seed,
        spread=spread(per_seed),
        other=other,
        counted=counted,
    )


def circular_rows(files: Sequence[ScoredFile], scorer: Scorer) -> Rows | None:
    """One row per seed and question with rotated copies: 1 if every copy is there and right; None if there are none."""
    copies = {row.rotation for file in files for row in file.rows if row.unit is not None}
    counts: dict[tuple[int, bytes], list[int]] = {}
    for run, file in zip(_runs(files), files, strict=True):
        for row in file.rows:
            if row.unit is not None:
                both = counts.setdefault((run, row.unit), [0, 0])
                both[0] += row.score(scorer) > 1 - 1e-9
                both[1] += row.score(other_scorer(scorer)) > 1 - 1e-9
    if not counts:
        return None
    places: dict[bytes, int] = {}
    scores = np.array(list(counts.values())) == len(copies)
    return Rows(
        run=np.array([run for run, _ in counts]),
        unit=np.array([places.setdefault(unit, len(places)) for _, unit in counts]),
        category=np.full(len(counts), -1),
        scores=scores[:, 0].astype(np.float64),
        other=scores[:, 1].astype(np.float64),
        categories=(),
    )


def _parts(files: Sequence[ScoredFile], rows: Rows, attribute: str) -> Iterator[tuple[str, Rows]]:
    names: dict[str, int] = {}
    texts = (getattr(row, attribute) or "" for file in files for row in file.rows)
    places = np.array([names.setdefault(text, len(names)) for text in texts])
    for name in sorted(names):
        if name or attribute != "rotation":
            yield name, rows.select(places == names[name])


def place_of(category: str, rules: Report) -> tuple[int, str]:
    """Where a category stands in a table: as in the groups, then by name."""
    members = [name for group in rules.groups.values() for name in group]
    return (members.index(category), "") if category in members else (len(members), category)
