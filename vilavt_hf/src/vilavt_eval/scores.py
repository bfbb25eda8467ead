"""Scores of the rows of a result file, under both scorers at once. Pure: a file in, scores out; no row stops it.

The file may come from anybody: nothing that it says is imported, run, or opened as another file.

A row that cannot be scored scores 0, is counted under what is wrong with it, and is listed. So does one whose
question ended in an error, or whose answer is empty.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vilavt_core.errors import BenchmarkError, ScoringError
from vilavt_core.failures import quoted
from vilavt_core.json_text import MAX_DEPTH, parse_json
from vilavt_core.scoring import bare_option, known_options, unwrapped
from vilavt_core.scoring.published import evaluation_score

from .definition import Benchmark, Keys, TypeRule, known_benchmarks, read_benchmark, shipped_benchmark
from .metrics import find_metric, is_choice, type_metric

logger = logging.getLogger(__name__)

Scorer = Literal["strict", "published"]
SEED_IN_NAME = re.compile(r"[-_.]*seed[-_]?(\d+)")
"""As in the names of published result files."""
SHOWN = 200
"""Characters of a prediction or target that are kept for listings."""


class Flaw(StrEnum):
    """Why a row scores 0 whatever it says, or is not counted."""

    EMPTY = "empty answer"
    FAILED = "ended in an error"
    NOT_JSON = "not a JSON object"
    NO_RESPONSE = "no response"
    NO_TARGET = "no right answer"
    BAD_TYPE = "unknown question type"
    BAD_TARGET = "right answer cannot be read"
    BAD_METRIC = "the metric failed"
    DUPLICATE = "question answered twice"
    """Left out, as the next one; rows with the others count with 0."""
    CUT_OFF = "last line cut off"


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that is flawed."""

    line: int
    """In the file, from 1."""
    question_id: str
    flaw: Flaw
    detail: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A row that the two scorers disagree about."""

    line: int
    question_id: str
    problem_type: str
    prediction: str
    target: str
    strict: float
    published: float


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One answered question."""

    line: int
    """In the file, from 1."""
    question_id: str
    strict: float
    published: float
    aborted: bool
    """Whether the published program would have ended with an error here."""
    problem_type: str
    category: str | None
    rotation: str | None
    """Which of the rotated copies it is; None: there are none."""
    unit: bytes | None
    """What rotated copies of one question have in common."""
    finish: str
    target: str

    def score(self, scorer: Scorer) -> float:
        """0 to 1."""
        return self.strict if scorer == "strict" else self.published


@dataclass(frozen=True, eq=False)
class ScoredFile:
    """All scores of a file, in its order."""

    path: Path
    run: Mapping[str, Any] | None
    """What the file says its answers depend on; None: nothing, as in published files."""
    benchmark: Benchmark | None
    rows: tuple[ScoredRow, ...]
    problems: tuple[Problem, ...]
    differences: tuple[Difference, ...]

    @property
    def seed(self) -> int | None:
        """What the file says, or else its name (``…seed_42…``); None: neither does."""
        if self.run is not None:
            seed = self.run.get("seed")
            return seed if isinstance(seed, int) else None
        named = SEED_IN_NAME.search(self.path.stem)
        return int(named[1]) if named else None

    @property
    def aborts(self) -> int:
        """Rows at which the published program would have ended with an error."""
        return sum(row.aborted for row in self.rows)

    @property
    def flaws(self) -> dict[str, int]:
        """Flaw -> number of rows, in the order of `Flaw`."""
        counts = Counter(problem.flaw for problem in self.problems)
        return {str(flaw): counts[flaw] for flaw in Flaw if counts[flaw]}

    def scores(self, scorer: Scorer) -> np.ndarray:
        """``(rows,)``, 0 to 1."""
        return np.array([row.score(scorer) for row in self.rows], dtype=np.float64)


@dataclass
class _Collector:
    rows: dict[str, ScoredRow] = field(default_factory=dict)
    flaws: dict[str, Problem] = field(default_factory=dict)
    """Of the row that counts, by question."""
    left_out: list[Problem] = field(default_factory=list)
    differences: dict[str, Difference] = field(default_factory=dict)
    copies: Counter[tuple[bytes, str]] = field(default_factory=Counter)
    """How many questions of a wording there are in a rotation."""


def score_file(path: str | Path, benchmark: Benchmark | None = None) -> ScoredFile:
    """Score a result file of ours or of the published program, whole or not.

    Args:
        path: JSON Lines. Of several rows of a question, the last one without an error counts.
        benchmark: its definition; None: the one that the file names, and if it names none, question types speak for
            themselves and there are no categories. One that the file holds may not call functions (`TypeRule.metric`).

    Raises:
        BenchmarkError: the file cannot be opened, holds no row that answers anything, or names a benchmark that is not
            known or whose definition in it cannot be used.
    """
    path = Path(path)
    run: Mapping[str, Any] | None = None
    found = _Collector()
    for line, data in read_lines(path):
        if isinstance(data, Mapping) and isinstance(data.get("run"), Mapping):
            if run is None:
                run = data["run"]
                benchmark = benchmark or _named(path, run)
            continue
        _take(found, line, data, benchmark)
    if not found.rows:
        raise BenchmarkError(f"{path}: there is no answered question in it; is it a result file?")
    if run is None and all(
        name in found.flaws and found.flaws[name].flaw in (Flaw.NOT_JSON, Flaw.NO_RESPONSE) for name in found.rows
    ):
        raise BenchmarkError(
            f"{path}: not one of its {len(found.rows)} lines is an answered question (JSON with `response` and "
            "`answer`); it is no result file"
        )
    problems = sorted([*found.flaws.values(), *found.left_out], key=lambda problem: problem.line)
    if cut := next((p for p in problems if p.flaw is Flaw.CUT_OFF), None):
        logger.warning("%s: line %d is cut off and left out; the run was interrupted", path, cut.line)
    return ScoredFile(
        path, run, benchmark, tuple(found.rows.values()), tuple(problems), tuple(found.differences.values())
    )


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number from 1 and what the line holds: parsed JSON, or its flaw if it cannot be parsed.

    Raises:
        BenchmarkError: the file cannot be opened.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read: {error.strerror}; check the path") from None
    with file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                yield number, parse_json(raw)
            except ValueError:
                yield number, Flaw.NOT_JSON if raw.endswith(b"\n") else Flaw.CUT_OFF


def response_of(row: Mapping[str, Any]) -> Any:
    """The answer of a row: ``response``, or ``response.response`` as some published files have it."""
    response = row.get("response")
    return response.get("response") if isinstance(response, Mapping) else response


def question_id_of(row: Mapping[str, Any], line: int) -> str:
    """The id of a row's question as text; of a row without one, where it stands."""
    value = row.get("question_id")
    return f"line {line}" if value is None else str(value)


def _named(path: Path, run: Mapping[str, Any]) -> Benchmark | None:
    """The benchmark of a run: the definition that the run wrote down, else the one known by its name."""
    named = run.get("benchmark")
    said = named if isinstance(named, Mapping) else {"name": named}
    name, version, written = said.get("name"), said.get("version"), said.get("definition")
    if not isinstance(name, str):
        return None
    shipped = shipped_benchmark(name)
    if written is not None:
        try:
            own = read_benchmark(written, f"{path}, definition of {quoted(repr(name))}")
        except BenchmarkError as error:
            choice = "FILE.yaml" if shipped is None else f"{shipped.name} (the package's), or FILE.yaml"
            raise BenchmarkError(f"{error}; name the definition with --benchmark {choice}") from None
        if shipped is not None and _rules(own) != _rules(shipped):
            logger.warning(
                "%s: scored by the definition that it holds (version %d), which is not the package's (version %d); "
                "--benchmark %s takes the latter",
                path,
                own.version,
                shipped.version,
                shipped.name,
            )
        return own
    if shipped is None:
        raise BenchmarkError(
            f"{path}: no benchmark {quoted(repr(name))} is known ({', '.join(known_benchmarks())}), and the file does "
            "not hold its definition; name one with --benchmark FILE.yaml"
        )
    if version is not None and version != shipped.version:
        logger.warning(
            "%s: made with version %r of %s, scored with version %d", path, version, shipped.name, shipped.version
        )
    return shipped


def _rules(benchmark: Benchmark) -> dict[str, Any]:
    return benchmark.model_dump(exclude={"title"})


def _take(found: _Collector, line: int, data: Any, benchmark: Benchmark | None) -> None:
    if data is Flaw.CUT_OFF:
        detail = "the run was interrupted while writing it"
        found.left_out.append(Problem(line, f"line {line}", Flaw.CUT_OFF, detail))
        return
    if not isinstance(data, Mapping):
        name = f"line {line}"
        detail = f"it is a {type(data).__name__}"
        if data is Flaw.NOT_JSON:
            detail = f"it cannot be parsed, or is nested deeper than {MAX_DEPTH}"
        found.flaws[name] = Problem(line, name, Flaw.NOT_JSON, detail)
        found.rows[name] = ScoredRow(line, name, 0.0, 0.0, True, "", None, None, None, "", "")
        return
    question_id = question_id_of(data, line)
    if question_id in found.rows:
        if data.get("error") is not None:
            return
        before = found.flaws.pop(question_id, None)
        if before is None or before.flaw is not Flaw.FAILED:
            detail = "this row counts, the one before it does not"
            found.left_out.append(Problem(line, question_id, Flaw.DUPLICATE, detail))
        found.differences.pop(question_id, None)
    _score(found, line, question_id, data, benchmark)


def _score(found: _Collector, line: int, question_id: str, row: Mapping[str, Any], benchmark: Benchmark | None) -> None:
    kind, rule = _kind(row, benchmark)
    response, target = response_of(row), row.get("answer")
    target = str(target) if isinstance(target, int | float) and not isinstance(target, bool) else target
    flaw, detail, strict = _strict(row, response, target, kind, rule, Keys() if benchmark is None else benchmark.keys)
    # Where the published program would have ended, there is no score.
    readable = isinstance(response, str) and isinstance(target, str)
    upstream = evaluation_score(str(response), str(target), kind) if readable else None
    published = upstream or 0.0
    known = found.rows.get(question_id)
    rotation, unit = (known.rotation, known.unit) if known else _rotation(found, row, benchmark)
    category = None if benchmark is None else benchmark.category_of(row)
    found.rows[question_id] = ScoredRow(
        line=line,
        question_id=question_id,
        strict=strict,
        published=published,
        aborted=upstream is None,
        problem_type=sys.intern(kind),
        category=None if category is None else sys.intern(category),
        rotation=rotation,
        unit=unit,
        finish=sys.intern(str(row.get("finish") or "")),
        target=str(target)[:SHOWN],
    )
    if flaw is not None:
        found.flaws[question_id] = Problem(line, question_id, flaw, detail[:SHOWN])
    if abs(strict - published) > 1e-9:
        found.differences[question_id] = Difference(
            line, question_id, kind, str(response)[:SHOWN], str(target)[:SHOWN], strict, published
        )


def _kind(row: Mapping[str, Any], benchmark: Benchmark | None) -> tuple[str, TypeRule | None]:
    """A row's question type, and the benchmark's rule for it."""
    kind = row.get("problem_type")
    if kind is None and benchmark is not None:
        kind = benchmark.default_type
    if not isinstance(kind, str):
        return "" if kind is None else str(kind), None
    return kind, None if benchmark is None else benchmark.rule(kind)


def _strict(
    row: Mapping[str, Any], response: Any, target: Any, kind: str, rule: TypeRule | None, keys: Keys
) -> tuple[Flaw | None, str, float]:
    """What is wrong with a row, in words, and its strict score."""
    if row.get("error") is not None:
        return Flaw.FAILED, str(row["error"]), 0.0
    if not isinstance(response, str):
        return Flaw.NO_RESPONSE, f"its response is {_found(response)}, not a text", 0.0
    if not isinstance(target, str) or not target.strip():
        return Flaw.NO_TARGET, f"its answer is {_found(target)}, not a text", 0.0
    prediction, wanted = unwrapped(response), unwrapped(target)
    if prediction == "":
        return Flaw.EMPTY, "", 0.0
    # What leaves open where its answer is goes to the metric as it is.
    sides: list[Any] = [text if bare is None else bare for text, bare in ((response, prediction), (target, wanted))]
    try:
        measure = type_metric(kind) if rule is None else find_metric(rule.metric)
    except (BenchmarkError, ScoringError) as error:
        return Flaw.BAD_TYPE, str(error), 0.0
    try:
        if is_choice(kind if rule is None else rule.metric):
            sides.append(_options(row, keys, target))
        score = float(measure(*sides))
    except ScoringError as error:
        return Flaw.BAD_TARGET, str(error), 0.0
    except Exception as error:  # a metric of the user's own may do anything, and one row must not lose the others
        return Flaw.BAD_METRIC, f"{type(error).__name__}: {error}", 0.0
    if not 0 <= score <= 1:
        return Flaw.BAD_METRIC, f"it gave {score}; scores are 0 to 1", 0.0
    return None, "", score


def _options(row: Mapping[str, Any], keys: Keys, target: str) -> tuple[str, ...]:
    """The options of a row's question; none if the row holds something else under their key."""
    given, question = row.get(keys.options or ""), str(row.get(keys.question, ""))
    try:
        return known_options(given, question, target)
    except ScoringError:
        return known_options(None, question, target)


def _rotation(
    found: _Collector, row: Mapping[str, Any], benchmark: Benchmark | None
) -> tuple[str | None, bytes | None]:
    """Which rotated copy a row is, and of what: copies have question and options in common, whatever their order.

    Different questions may be worded alike. Then the first copy of one rotation belongs to the first copies of the
    others, the second to the second.
    """
    key = None if benchmark is None else benchmark.report.rotation
    if benchmark is None or key is None or row.get(key) is None:
        return None, None
    rotation = sys.intern(str(row[key]))
    options = row.get(benchmark.keys.options or "")
    bare = sorted(bare_option(str(option)) for option in options) if isinstance(options, list) else []
    wording = json.dumps([row.get(benchmark.keys.question), bare], default=str)
    digest = hashlib.blake2b(wording.encode(), digest_size=16).digest()
    nth = found.copies[digest, rotation]
    found.copies[digest, rotation] += 1
    return rotation, digest + nth.to_bytes(4, "big")


def _found(value: Any) -> str:
    return "missing or null" if value is None else "blank" if isinstance(value, str) else f"a {type(value).__name__}"
