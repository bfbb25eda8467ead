"""One run against another on the same questions: a paired test, which answers flipped, traces side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vilavt_core.errors import BenchmarkError
from vilavt_core.json_text import parse_json
from vilavt_core.pages import render
from vilavt_core.viewer import SCRIPT, Trace, shown_talk

from .definition import Benchmark, Report
from .pictures import PictureFolder, picture_roots
from .recordings import MALFORMED, ShownSizes, recording_of_row
from .scores import ScoredFile, ScoredRow, Scorer, read_lines
from .statistics import RESAMPLES, Interval, difference_interval, mcnemar, mean_of_means, sign_flip
from .summary import name_of, place_of

TEMPLATES = Path(__file__).parent / "templates"

SHOWN_FLIPS = 100
"""Questions on a page, unless the caller wants another number."""


@dataclass(frozen=True)
class Contrast:
    """Second minus first, over the questions that both answered."""

    name: str
    questions: int
    first: float
    second: float
    difference: float
    interval: Interval
    """95 %, paired over questions; see `vilavt_eval.statistics`."""
    better: int
    """Questions that the second scores higher on."""
    worse: int
    test: str
    p_value: float
    """Two-sided; not corrected for the number of rows in a table."""


@dataclass(frozen=True)
class Flip:
    """A question that the two score differently."""

    question_id: str
    category: str | None
    first: float
    second: float
    first_place: tuple[str, int]
    """File and line (from 1) of the first setting's first answer to it."""
    second_place: tuple[str, int]


@dataclass(frozen=True)
class Comparison:
    """Two settings on the same questions."""

    first: str
    second: str
    benchmark: str | None
    scorer: Scorer
    contrasts: tuple[Contrast, ...]
    """The overall score, then every category."""
    flips: tuple[Flip, ...]
    """Those that got worse first, by how much."""
    only_first: tuple[str, ...]
    """Ids of questions that the second did not answer; they are left out."""
    only_second: tuple[str, ...]
    other_targets: tuple[str, ...]
    """Ids of questions with another right answer in the other file: not the same question; they are left out."""

    @property
    def overall(self) -> Contrast:
        """The first contrast."""
        return self.contrasts[0]


@dataclass(frozen=True)
class _Pair:
    """A question in both settings; scores are means over the seeds."""

    unit: Any
    category: str | None
    first: float
    second: float


def compare(
    first: Sequence[ScoredFile],
    second: Sequence[ScoredFile],
    scorer: Scorer = "strict",
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Test two settings against each other, question by question.

    Scores of 0 and 1 of one seed each are tested by McNemar's exact test; graded ones, means over seeds, rotated copies
    and means of categories by random signs of the differences.

    Args:
        first: files of one setting (see `summary.settings_of`).
        second: of the other.
        scorer: whose scores.
        seed: of bootstrap and signs.
        resamples: of the bootstrap.

    Raises:
        BenchmarkError: they are of different benchmarks, or have no question in common.
    """
    names = [None if files[0].benchmark is None else files[0].benchmark.name for files in (first, second)]
    if names[0] != names[1]:
        raise BenchmarkError(
            f"{first[0].path} is of {names[0] or 'no benchmark'}, {second[0].path} of {names[1] or 'no benchmark'}; "
            "only runs on the same questions can be compared (--benchmark names the one of files that do not)"
        )
    rules = Report() if first[0].benchmark is None else first[0].benchmark.report
    ours, theirs = _by_question(first), _by_question(second)
    both = [name for name in ours if name in theirs]
    moved = [name for name in both if ours[name][0][1].target != theirs[name][0][1].target]
    shared = [name for name in both if ours[name][0][1].target == theirs[name][0][1].target]
    if not shared:
        raise BenchmarkError(
            f"{first[0].path} and {second[0].path} have no question in common: {len(ours)} and {len(theirs)} ids, "
            f"{len(both)} in both, {len(moved)} of them with another right answer; compare runs on the same file"
        )
    pairs, flips = [], []
    for name in shared:
        (file, row), (other_file, other) = ours[name][0], theirs[name][0]
        before, after = (float(np.mean([r.score(scorer) for _, r in rows[name]])) for rows in (ours, theirs))
        pairs.append(_Pair(name if row.unit is None else row.unit, row.category, before, after))
        if abs(after - before) > 1e-9:
            flips.append(Flip(name, row.category, before, after, (file, row.line), (other_file, other.line)))
    return Comparison(
        first=name_of(first[0]),
        second=name_of(second[0]),
        benchmark=names[0],
        scorer=scorer,
        contrasts=tuple(_contrasts(pairs, rules, np.random.default_rng(seed), resamples)),
        flips=tuple(sorted(flips, key=lambda flip: flip.second - flip.first)),
        only_first=tuple(name for name in ours if name not in theirs),
        only_second=tuple(name for name in theirs if name not in ours),
        other_targets=tuple(moved),
    )


def _by_question(files: Sequence[ScoredFile]) -> dict[str, list[tuple[str, ScoredRow]]]:
    """Question id -> its rows with the files they stand in."""
    found: dict[str, list[tuple[str, ScoredRow]]] = {}
    for file in files:
        for row in file.rows:
            if row.target:  # else nobody knows which question it is
                found.setdefault(row.question_id, []).append((str(file.path), row))
    return found


def _contrasts(pairs: Sequence[_Pair], rules: Report, rng: np.random.Generator, resamples: int) -> Iterator[Contrast]:
    grouped = {name for group in rules.groups.values() for name in group}
    counted = [pair for pair in pairs if rules.ungrouped == "kept" or pair.category in grouped] or list(pairs)
    if rules.overall == "categories":
        counted = [pair for pair in counted if pair.category is not None] or counted
        parts = [[pair for pair in counted if pair.category == name] for name in {p.category: 0 for p in counted}]
    else:
        parts = [counted]
    yield _contrast("overall", parts, rng, resamples)
    found = {pair.category for pair in pairs if pair.category is not None}
    for category in sorted(found, key=lambda name: place_of(name, rules)):
        yield _contrast(category, [[pair for pair in pairs if pair.category == category]], rng, resamples)


def _contrast(name: str, parts: Sequence[Sequence[_Pair]], rng: np.random.Generator, resamples: int) -> Contrast:
    """Of the mean of the parts' means."""
    means = [[float(np.mean([getattr(pair, side) for pair in part])) for part in parts] for side in ("first", "second")]
    intervals, weighted = [], []
    for part in parts:
        places: dict[Any, int] = {}
        units = np.array([places.setdefault(pair.unit, len(places)) for pair in part])
        sums = np.bincount(units, weights=[pair.second - pair.first for pair in part])
        intervals.append(difference_interval(sums, np.bincount(units), rng, resamples))
        weighted.append(sums / (len(part) * len(parts)))
    differences = [second - first for first, second in zip(*means, strict=True)]
    pairs = [pair for part in parts for pair in part]
    better = sum(pair.second > pair.first + 1e-9 for pair in pairs)
    worse = sum(pair.first > pair.second + 1e-9 for pair in pairs)
    plain = len(parts) == 1 and len(weighted[0]) == len(pairs)
    if plain and all(score in (0.0, 1.0) for pair in pairs for score in (pair.first, pair.second)):
        test, p_value = "McNemar, exact", mcnemar(worse, better)
    else:
        test, p_value = "random signs", sign_flip(np.concatenate(weighted), rng)
    return Contrast(
        name=name,
        questions=len(pairs),
        first=float(np.mean(means[0])),
        second=float(np.mean(means[1])),
        difference=float(np.mean(means[1]) - np.mean(means[0])),
        interval=mean_of_means(differences, intervals),
        better=better,
        worse=worse,
        test=test,
        p_value=p_value,
    )


# ---------------------------------------------------------------------- side by side


def write_side_by_side(
    comparison: Comparison,
    path: str | Path,
    *,
    limit: int = SHOWN_FLIPS,
    benchmark: Benchmark | None = None,
    image_roots: Sequence[Path] = (),
) -> Path:
    """Write a page with the questions that flipped, every turn of both runs beside each other.

    Its images are in a folder beside it, as far as the files that the rows name are found: below `image_roots`, where
    the benchmark says, beside the result files, or in the current folder.

    Args:
        comparison: its files are read again.
        path: of the page.
        limit: questions that are shown, those that changed most first, from both directions in turn.
        benchmark: of the questions; says where their images are.
        image_roots: folders that image paths start from.

    Returns:
        `path`.
    """
    path = Path(path)
    flips = _most_changed(comparison.flips, limit)
    rows = _rows_at({place for flip in flips for place in (flip.first_place, flip.second_place)})
    overall = comparison.overall
    summary = [
        f"{comparison.first}: {100 * overall.first:.2f}. {comparison.second}: {100 * overall.second:.2f}. "
        f"Difference {100 * overall.difference:+.2f} [{100 * overall.interval.low:+.2f}, "
        f"{100 * overall.interval.high:+.2f}], p = {overall.p_value:.3g} ({overall.test}).",
        f"{len(comparison.flips)} questions are scored differently, {overall.better} of those that count better and "
        f"{overall.worse} worse; {len(flips)} are shown.",
    ]
    name = f"{path.stem}-pictures"
    folder = PictureFolder(path.with_name(name), f"{name}/")
    lines = {file: _run_of(file) for file, _ in rows}
    questions = []
    for number, flip in enumerate(flips):
        sides = (
            (comparison.first, flip.first, flip.first_place),
            (comparison.second, flip.second, flip.second_place),
        )
        traces = [
            _trace(rows[place], place, run, score, benchmark, folder, image_roots, lines[place[0]])
            for run, score, place in sides
        ]
        questions.append([shown_talk([trace], 2 * number + side) for side, trace in enumerate(traces)])
    if folder.missing:
        first, why = next(iter(folder.missing.items()))
        summary.append(f"{len(folder.missing)} images cannot be shown, first {first}: {why}.")
    page = render(
        "side_by_side.html",
        TEMPLATES,
        script=SCRIPT,
        pictures_at="beside",
        title=f"{comparison.first} against {comparison.second}",
        summary=summary,
        questions=questions,
    )
    path.write_text(page, encoding="utf-8")
    return path


def _most_changed(flips: Sequence[Flip], limit: int) -> list[Flip]:
    worse = [flip for flip in flips if flip.second < flip.first]
    better = [flip for flip in reversed(flips) if flip.second > flip.first]
    turns = [flip for i in range(max(len(worse), len(better))) for flip in (*worse[i : i + 1], *better[i : i + 1])]
    return turns[:limit]


def _rows_at(places: set[tuple[str, int]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """The rows at some lines of some files."""
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    for path in sorted({path for path, _ in places}):
        with open(path, "rb") as file:
            found |= {(path, n): parse_json(raw) for n, raw in enumerate(file, 1) if (path, n) in places}
    return found


def _run_of(file: str) -> Mapping[str, Any] | None:
    """What a result file says its answers depend on; None: nothing."""
    _, first = next(read_lines(Path(file)), (0, None))
    run = first.get("run") if isinstance(first, Mapping) else None
    return run if isinstance(run, Mapping) else None


def _trace(
    row: Mapping[str, Any],
    place: tuple[str, int],
    run: str,
    score: float,
    benchmark: Benchmark | None,
    folder: PictureFolder,
    image_roots: Sequence[Path],
    run_line: Mapping[str, Any] | None,
) -> Trace:
    """A row of a run as the viewer shows it; what is not of our shape in it is left out."""
    file, line = place
    try:
        recording = recording_of_row(row, line, benchmark, score)
        shown_talk([recording.trace])
    except MALFORMED:
        bare = {name: value for name, value in row.items() if name not in ("shown", "turn_seconds", "work")}
        recording = recording_of_row(bare, line, benchmark, score)
    roots = picture_roots(Path(file), benchmark, image_roots)
    recording = replace(recording, sizes=ShownSizes.of(run_line)).replayed(folder, roots)
    trace = recording.pictured(folder, roots)
    return replace(trace, run=f"{run}: {score:.2f}")
