"""Asks a backend the questions of a benchmark and writes down what it says, one row per question.

A run is one benchmark with one preset, one seed and at most one ablation; it has one file of results (see
`vilavt_eval.result_file`). Questions are read when they are asked, rows are written when they are known:
memory does not grow with the benchmark, except for the ids of its questions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vilavt_core.backends import Backend, BackendOptions, open_backend
from vilavt_core.client import PER_REQUEST
from vilavt_core.errors import EvaluationError
from vilavt_core.presets import PRESETS
from vilavt_core.progress import counting
from vilavt_core.protocol import IMAGE_MARK
from vilavt_core.results import ChatResult, Provenance, Sample

from .ablation import Ablation
from .evaluation_preset import EvaluationPreset
from .questions import Question, Questions, Selection
from .result_file import RunFiles
from .sharding import Shard

logger = logging.getLogger(__name__)

SECRETS = ("hf_token", "token", "use_auth_token")
"""Engine options that no file of results may hold."""

MAX_FAILURES = 20
"""Questions in a row that may end in an error before the run stops: the engine is broken then, not a question."""

ResultRow = dict[str, Any]
Ask = Callable[[Sequence[Question]], Iterator[ResultRow]]
"""Questions, read one after another, to rows in the order they are answered."""


@dataclass(frozen=True)
class Setting:
    """What answers: a model behind a backend, and how. Plain data, so that another process can open the same."""

    model: str
    backend: str
    preset: EvaluationPreset
    ablation: Ablation = Ablation()  # noqa: RUF009 (frozen)
    concurrency: int | None = None
    """Conversations side by side; None: the backend's choice."""
    device: str = "auto"
    engine: tuple[tuple[str, Any], ...] = ()
    """For what computes; see `BackendOptions.engine`."""

    @property
    def recorded_engine(self) -> dict[str, Any]:
        """Engine options as results hold them: without secrets. Those for a server only say how to reach it: none."""
        return {} if self.backend == "server" else {k: v for k, v in self.engine if k not in SECRETS}

    def open(self) -> Backend:
        """The backend, made to follow the preset.

        Raises:
            EvaluationError: it cannot, or not with this ablation.
            VilavtError: the checkpoint cannot be loaded, or the server does not answer.
        """
        self.ablation.check(self.backend)
        preset, more = self.preset, {"concurrency": self.concurrency, "engine": dict(self.engine)}
        if self.backend == "server":
            return self._reach_server(preset.options(**more))
        backend = open_backend(self.model, self.backend, preset.options(device=self.device, **more))
        return self._checked(backend)

    def _reach_server(self, options: BackendOptions) -> Backend:
        """A server loaded its weights, its prompts and its preset already: they are compared, limits are tightened."""
        preset, rules = self.preset, PRESETS[self.preset.episode]
        if preset.query_prefix != rules.query_prefix:
            raise EvaluationError(
                f"{self.model} puts its own preset's {rules.query_prefix!r} before queries, the preset {preset.name} "
                f"asks for {preset.query_prefix!r}; use --backend vllm or hf"
            )
        options = replace(options, dtype="auto", limits={})
        offered = open_backend(self.model, "server", options).provenance(0)
        if preset.precision not in ("auto", offered.dtype):
            raise EvaluationError(
                f"{self.model} computes in {offered.dtype}, the preset {preset.name} asks for {preset.precision}; "
                f"start the server with --dtype {preset.precision}, or pass --set precision={offered.dtype}"
            )
        tighter = {}
        for name in PER_REQUEST:
            wanted, allowed = getattr(preset.limits, name), getattr(offered.limits, name)
            if wanted is not None and (allowed is None or wanted < allowed):
                tighter[name] = wanted
            elif wanted is not None and wanted > allowed and name in preset.set_limits:
                raise EvaluationError(
                    f"{self.model} allows {name}={allowed}, --set asks for {wanted}; restart the server with it"
                )
        return self._checked(open_backend(self.model, "server", replace(options, limits=tighter)))

    def _checked(self, backend: Backend) -> Backend:
        told = backend.provenance(0)
        wanted = self.preset.prompts_sha256
        if wanted not in (None, told.prompts_sha256):
            raise EvaluationError(
                f"{self.model} is asked with the prompts {told.prompts!r} of hash {told.prompts_sha256}, the preset "
                f"{self.preset.name} wants {wanted}; name the right ones with --set prompts=…"
            )
        for name, value in asdict(self.preset.limits).items():
            if (actual := getattr(told.limits, name)) != value:
                logger.info("%s: %s is %s, the preset %s says %s", self.model, name, actual, self.preset.name, value)
        return backend


@dataclass(frozen=True)
class Outcome:
    """How a run stands."""

    files: RunFiles
    complete: bool
    """Whether every question has a row, and all are merged; others may still be asking."""
    asked: int
    """Questions that this process asked."""
    failed: int
    """Those of them that ended in an error; the same run asks them again."""

    @property
    def path(self) -> Path:
        """The merged file; it is there if `complete`."""
        return self.files.merged


def run(
    setting: Setting,
    questions: Questions,
    out: Path,
    *,
    provenance: Provenance,
    ask: Ask,
    seed: int = 0,
    shard: Shard = Shard(),  # noqa: B008 (frozen)
    limit: int | None = None,
    progress: bool = False,
) -> Outcome:
    """Ask what is not answered yet, and merge the results if nothing is left.

    Args:
        setting: what answers.
        questions: of the benchmark.
        out: folder of all results; this run's are in ``OUT/BENCHMARK/PRESET-seedK[-ABLATION].jsonl``.
        provenance: of the opened backend, for this seed.
        ask: see `asking`; another one may ask in other processes.
        seed: of the run.
        shard: this process's share.
        limit: only that many of the first questions.
        progress: show a bar with the time that is left.

    Raises:
        EvaluationError: the results that are there belong to another run, another process is writing them, or too
            many questions in a row failed.
    """
    _check_image_places(setting, questions)
    files = run_files(setting, questions, out, provenance, seed)
    ids = questions.ids(limit)
    done, mine = files.answered(), shard.places(len(ids))
    todo = [place for place in mine if ids[place] not in done]
    failed = 0
    if todo:
        bar = counting(len(mine), files.name, "question", done=len(mine) - len(todo), shown=progress)
        with files.writer(shard) as writer, bar as advance:
            for row in _while_it_works(ask(Selection(questions, todo))):
                writer.write(row | {"seed": seed})
                failed += bool(row["error"])
                advance(1)
    return Outcome(files, files.merge(ids), len(todo), failed)


def _check_image_places(setting: Setting, questions: Questions) -> None:
    """A server shows images before the words, unless its episode preset interleaves."""
    preset, benchmark = setting.preset, questions.benchmark
    wanted = benchmark.image_marks == "interleaved" and preset.interleave
    if setting.backend == "server" and wanted and not PRESETS[preset.episode].interleave:
        raise EvaluationError(
            f"{benchmark.name} puts images between words, a server of the preset {preset.episode!r} shows them first; "
            "use --backend vllm or hf, or leave the marks in the text with --set interleave=false"
        )


def run_files(setting: Setting, questions: Questions, out: Path, provenance: Provenance, seed: int) -> RunFiles:
    """Where the results of a run are, and everything they depend on."""
    benchmark, preset, ablation = questions.benchmark, setting.preset, setting.ablation
    name = f"{preset.name}-seed{seed}" + (f"-{ablation}" if ablation.parts else "")
    described = {
        "benchmark": {
            "name": benchmark.name,
            "version": benchmark.version,
            "questions_sha256": questions.sha256,
            "definition": benchmark.model_dump(mode="json", exclude_unset=True),
        },
        "model": provenance.checkpoint or setting.model,
        "backend": setting.backend,
        "engine": setting.recorded_engine,
        "preset": preset.model_dump(mode="json") | {"prompts_sha256": provenance.prompts_sha256},
        "provenance": provenance.to_json(),
        "seed": seed,
        "ablation": str(ablation) if ablation.parts else None,
    }
    return RunFiles(out / benchmark.name, name, described)


def asking(backend: Backend, setting: Setting, seed: int) -> Ask:
    """Ask an opened backend in this process."""
    ablation = setting.ablation
    limits = ablation.limits(backend.provenance(seed).limits)

    def ask(questions: Sequence[Question]) -> Iterator[ResultRow]:
        waiting: dict[int, Question] = {}

        def samples() -> Iterator[Sample]:
            for place, question in enumerate(questions):
                waiting[place] = question
                yield replace(sample_of(question, setting.preset, seed), limits=limits)

        for place, result in backend.iter_many(samples(), intervention=ablation.intervention):
            yield row_of(waiting.pop(place), result)

    return ask


def sample_of(question: Question, preset: EvaluationPreset, seed: int) -> Sample:
    """A question as a backend takes it, in a run with this seed."""
    text = question.text
    if preset.interleave and len(question.images) == 1:  # an episode interleaves several; a single one comes first
        text = text.replace(IMAGE_MARK, "").strip()
    sample = Sample([*question.images, *question.videos], text, id=str(question.id))
    return replace(sample, seed=seed if preset.seeds == "per_run" else sample.seed_from(seed))


def row_of(question: Question, result: ChatResult) -> ResultRow:
    """A line of results, without the seed of its run."""
    head = {
        "question_id": question.id,
        "response": result.answer or "",
        "problem_type": question.problem_type,
        "answer": question.target,
    }
    own: dict[str, Any] = {
        "finish": result.finish,
        "error": None if result.error is None else f"{type(result.error).__name__}: {result.error}",
        "turns": [turn.text for turn in result.turns],
        "seconds": result.seconds,
        "turn_seconds": [turn.seconds for turn in result.turns],
        "work": asdict(result.work),
        "billed": asdict(result.billed),
    }
    if result.episode is not None:
        own["usage"] = asdict(result.episode.usage)
        own["shown"] = shown_of(result)
    return {**head, **{key: value for key, value in question.record.items() if key not in head}, **own}


def shown_of(result: ChatResult) -> dict[str, Any]:
    """What the model saw, without pixels: the sizes of the originals, in order, and every crop with its turn."""
    turn_of = {index: turn.index for turn in result.turns for index in turn.image_indices}
    return {
        "originals": [[image.width, image.height] for image in result.images if image.parent is None],
        "crops": [
            {"turn": turn_of.get(image.index), **image.to_json()} for image in result.images if image.parent is not None
        ],
    }


def _while_it_works(rows: Iterator[ResultRow]) -> Iterator[ResultRow]:
    in_a_row = 0
    for row in rows:
        yield row
        in_a_row = in_a_row + 1 if row["error"] else 0
        if in_a_row >= MAX_FAILURES:
            raise EvaluationError(
                f"{in_a_row} questions in a row ended in an error, the last one with {row['error']}. Results so "
                "far are saved; fix the cause and run the same command again"
            )
