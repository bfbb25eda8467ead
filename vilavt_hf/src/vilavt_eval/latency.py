"""How long answers take, and what the time goes into, at several numbers of conversations side by side.

Every level asks questions of its own, so that no cache is warm from the level before. What an engine does not tell is
None in the report, not guessed: only a local model (``hf``) splits its time and counts patches; vLLM counts tokens; a
server says how many prompt tokens it had cached if it was started with ``--enable-prompt-tokens-details``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, quantiles
from typing import Any

from vilavt_core.backends import Backend
from vilavt_core.errors import EvaluationError
from vilavt_core.markdown import markdown_table
from vilavt_core.progress import Advance, counting, waiting
from vilavt_core.results import ChatResult, Provenance

from .evaluation_preset import EvaluationPreset
from .questions import Question, Questions
from .runner import sample_of

LEVELS = (1, 8, 32)
"""Conversations side by side, by default."""


@dataclass(frozen=True)
class Spread:
    """Seconds."""

    mean: float
    median: float
    p95: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of nothing."""
        if not values:
            return None
        cuts = quantiles(values, n=20, method="inclusive") if len(values) > 1 else [values[0]] * 19
        return cls(fmean(values), cuts[9], cuts[18])


@dataclass(frozen=True)
class TimeSplit:
    """Seconds the engine spent on all questions of a level together."""

    encoder: float
    """Images to features."""
    prefill: float
    """Prompts, images and tool responses through the language model."""
    decode: float
    """Sampled tokens, one by one."""
    other: float
    """The rest of the wall time: reading, cropping and resizing images, tokenizing, sampling."""


@dataclass(frozen=True)
class Reuse:
    """Share of the work that asking every turn anew would do and that was not done again; 0 to 1."""

    tokens: float | None
    """Of prompt tokens that need no prefill, because an earlier turn left their keys and values."""
    patches: float | None
    """Of image patches that are not encoded again."""


@dataclass(frozen=True)
class Level:
    """What was measured at one number of conversations side by side."""

    concurrency: int
    questions: int
    failed: int
    turns: float | None
    """Mean number of turns of an answer."""
    seconds: float
    """Wall time of all questions."""
    answers_per_second: float
    per_answer: Spread | None
    per_turn: Spread | None
    """None: the backend does not tell."""
    split: TimeSplit | None
    reuse: Reuse


@dataclass(frozen=True)
class LatencyReport:
    """All levels, and what they depend on."""

    benchmark: str
    backend: str
    preset: str
    provenance: Provenance
    levels: tuple[Level, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self) | {"provenance": self.provenance.to_json()}

    def to_markdown(self) -> str:
        """A table, one row per level; ``?`` is what the backend does not tell."""
        head = (
            "side by side",
            "questions",
            "s per answer (median, p95)",
            "s per turn (median, p95)",
            "turns",
            "answers/s",
            "encoder / prefill / decode / other",
            "tokens reused",
            "patches reused",
        )
        lines = []
        for level in self.levels:
            split = "?"
            if level.split is not None:
                total = sum(asdict(level.split).values()) or 1.0
                split = " / ".join(f"{100 * part / total:.0f}%" for part in asdict(level.split).values())
            cells = [
                str(level.concurrency),
                str(level.questions) + (f" ({level.failed} failed)" if level.failed else ""),
                _seconds(level.per_answer),
                _seconds(level.per_turn),
                "?" if level.turns is None else f"{level.turns:.2f}",
                f"{level.answers_per_second:.2f}",
                split,
                _percent(level.reuse.tokens),
                _percent(level.reuse.patches),
            ]
            lines.append(cells)
        where = f"{self.provenance.dtype} on {self.provenance.device}"
        title = f"{self.benchmark}, backend {self.backend}, preset {self.preset}, {where}"
        return f"{title}\n\n{markdown_table(head, lines)}\n"


def measure_latency(
    backend: Backend,
    name: str,
    preset: EvaluationPreset,
    questions: Questions,
    *,
    levels: Sequence[int] = LEVELS,
    count: int | None = None,
    warm_up: int = 4,
    progress: Callable[[str], None] | None = None,
) -> LatencyReport:
    """Ask questions at every level and report.

    Args:
        backend: opened.
        name: of the backend.
        preset: it was opened with.
        questions: of the benchmark.
        levels: conversations side by side.
        count: questions per level; None: as many as there are for each.
        warm_up: questions before the measured ones.
        progress: called with a line after every level; meanwhile a bar counts its questions.

    Raises:
        EvaluationError: too few questions, or the backend's concurrency cannot be changed.
    """
    each = (len(questions) - warm_up) // len(levels)
    if (count is not None and count > each) or each < 1:
        raise EvaluationError(
            f"{len(levels)} levels of {count or 1} questions and {warm_up} to warm up need "
            f"{len(levels) * (count or 1) + warm_up}, {questions.benchmark.name} has {len(questions)}; ask for fewer"
        )
    each = count or each
    if not hasattr(backend, "concurrency"):
        raise EvaluationError(f"the backend {name!r} has no `concurrency` to set; measure another one")
    engine: Any = backend
    if str(backend.provenance(0).device).startswith("cuda") and hasattr(engine, "clock"):
        engine.clock = _clock_of_gpu
    places = iter(range(len(questions)))
    with waiting("warming up", shown=progress is not None):
        list(_ask(backend, preset, (questions[i] for i in itertools.islice(places, warm_up))))
    measured = []
    for concurrency in levels:
        engine.concurrency = concurrency
        asked = [questions[i] for i in itertools.islice(places, each)]
        with counting(each, f"{concurrency} side by side", "question", shown=progress is not None) as advance:
            measured.append(_level(backend, preset, asked, concurrency, advance))
        if progress is not None:
            progress(f"{concurrency} side by side: {measured[-1].answers_per_second:.2f} answers/s")
    return LatencyReport(questions.benchmark.name, name, preset.name, backend.provenance(0), tuple(measured))


def _level(
    backend: Backend, preset: EvaluationPreset, asked: Sequence[Question], concurrency: int, advance: Advance
) -> Level:
    timings = backend.timings
    before = None if timings is None else dict(vars(timings))
    answers, turns, counts, failed = [], [], [], 0
    reuse = _ReuseCount()
    began = time.perf_counter()
    for result in _ask(backend, preset, asked):
        advance(1)
        if result.error is not None:
            failed += 1
            continue
        answers.append(result.seconds)
        turns += [turn.seconds for turn in result.turns if turn.seconds is not None]
        counts.append(len(result.turns))
        reuse.add(result)
    seconds = time.perf_counter() - began
    split = None
    if timings is not None and before is not None:
        encode, prefill, decode = (getattr(timings, part) - before[part] for part in ("encode", "prefill", "decode"))
        split = TimeSplit(encode, prefill, decode, other=max(0.0, seconds - encode - prefill - decode))
    return Level(
        concurrency=concurrency,
        questions=len(asked),
        failed=failed,
        turns=fmean(counts) if counts else None,
        seconds=seconds,
        answers_per_second=len(answers) / seconds,
        per_answer=Spread.of(answers),
        per_turn=Spread.of(turns),
        split=split,
        reuse=reuse.rates(),
    )


def _ask(
    backend: Backend, preset: EvaluationPreset, asked: Sequence[Question] | Iterator[Question]
) -> Iterator[ChatResult]:
    for _, result in backend.iter_many(sample_of(question, preset, seed=0) for question in asked):
        yield result


class _ReuseCount:
    """Sums over conversations: what every turn asked anew would cost, and what was spent."""

    def __init__(self) -> None:
        self.tokens, self.prefilled, self.patches, self.encoded = 0, 0, 0, 0

    def add(self, result: ChatResult) -> None:
        """Count a conversation; what a server billed if it does not tell the token stream."""
        if result.record is None:
            self.tokens += result.billed.prompt
            self.prefilled += result.billed.prompt - result.billed.cached
            return
        mask, spans = result.record.loss_mask, result.record.image_spans
        starts = [at for at in range(1, len(mask)) if mask[at] and not mask[at - 1]]
        self.tokens += sum(starts)
        self.prefilled += result.work.tokens_prefilled
        self.patches += 4 * sum(span.length for start in starts for span in spans if span.start < start)
        self.encoded += result.work.patches_encoded

    def rates(self) -> Reuse:
        """As shares; None where nothing was told."""
        return Reuse(
            1 - self.prefilled / self.tokens if self.tokens else None,
            1 - self.encoded / self.patches if self.patches and self.encoded else None,
        )


def _clock_of_gpu() -> float:
    """Seconds, after what was launched on the GPU is done."""
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def _seconds(spread: Spread | None) -> str:
    return "?" if spread is None else f"{spread.mean:.3f} ({spread.median:.3f}, {spread.p95:.3f})"


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.0f}%"
