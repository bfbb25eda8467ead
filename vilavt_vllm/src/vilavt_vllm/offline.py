"""`VilavtLLM`: many conversations through one vLLM engine, each at its own pace."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vllm import LLM

from vilavt_core.images import ImageLimits
from vilavt_core.presets import Limits, Preset, Sampling
from vilavt_core.prompts import PromptSet
from vilavt_core.results import ChatResult, Provenance, Sample

from .episodes import EpisodeRun, Settings

logger = logging.getLogger(__name__)

_NUMBERS = itertools.count()


class VilavtLLM:
    """Asks a ViLaVT about pictures, offline, with vLLM's batching and caches.

    Every conversation advances as soon as its own turn is sampled; none waits for another. One that fails has its
    error in its result.

    Args:
        model: checkpoint folder or hub id, or a `vllm.LLM` that serves one already.
        limits: budgets of a conversation. None: the preset's, made to fit the engine.
        preset: None: what the checkpoint asks for, else ``default``.
        sampling: None: the preset's (the default preset is greedy).
        seed: for sampling.
        prompts: wording. None: the checkpoint's own.
        max_concurrent: conversations in flight. None: vLLM's ``max_num_seqs``.
        image_limits: caps on files.
        allow_urls: whether an image may be an http(s) URL.
        engine_args: for `vllm.LLM`, e.g. ``tensor_parallel_size=2``.

    Raises:
        VilavtError: the checkpoint's settings are wrong.
        ValueError: vLLM refuses an argument.
    """

    def __init__(
        self,
        model: str | Path | LLM,
        *,
        limits: Limits | None = None,
        preset: str | Preset | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        prompts: PromptSet | str | None = None,
        max_concurrent: int | None = None,
        image_limits: ImageLimits = ImageLimits(),  # noqa: B008 (frozen)
        allow_urls: bool = False,
        **engine_args: Any,
    ) -> None:
        self.llm = LLM(model=str(model), **engine_args) if not isinstance(model, LLM) else model
        config: Any = self.llm.llm_engine.vllm_config
        self.settings = Settings.of_engine(
            config.model_config,
            preset=preset,
            limits=limits,
            sampling=sampling,
            prompts=prompts,
            seed=seed,
            image_limits=image_limits,
            allow_urls=allow_urls,
            device=str(config.device_config.device_type),
        )
        self.max_concurrent = max_concurrent or config.scheduler_config.max_num_seqs

    @property
    def concurrency(self) -> int:
        """Conversations in flight: `max_concurrent`, by the name that all backends have for it."""
        return self.max_concurrent

    @concurrency.setter
    def concurrency(self, value: int) -> None:
        self.max_concurrent = value

    def ask(self, samples: Iterable[Sample | tuple[Any, str]], *, progress: bool = True) -> list[ChatResult]:
        """Ask many questions.

        Args:
            samples: `Sample`, or pairs of (images, question).
            progress: show a bar.

        Returns:
            One result per sample, in their order. One that failed has ``finish == "error"`` and the exception in
            ``error``.
        """
        samples = list(samples)
        results: dict[int, ChatResult] = {}
        from tqdm.auto import tqdm

        with tqdm(total=len(samples), unit="question", disable=not progress) as bar:
            for place, result in self.iter_many(samples):
                results[place] = result
                bar.update()
        return [results[place] for place in range(len(samples))]

    def iter_many(self, samples: Iterable[Sample | tuple[Any, str]]) -> Iterator[tuple[int, ChatResult]]:
        """Like :meth:`ask`, but yields (place, result) as conversations end; images are loaded when their turn comes.
        Leaving the loop early aborts what is running.
        """
        places: dict[EpisodeRun, int] = {}

        def runs() -> Iterator[EpisodeRun]:
            for place, entry in enumerate(samples):
                run = EpisodeRun(_sample(entry), self.settings, name=str(place))
                places[run] = place
                yield run

        for run in drive(self.llm, runs(), self.max_concurrent):
            yield places.pop(run), run.result

    def provenance(self, seed: int, limits: Limits | None = None) -> Provenance:
        """What a result with this seed and these limits (None: the engine's) depends on."""
        return self.settings.provenance(seed, limits)


def drive(llm: LLM, runs: Iterator[EpisodeRun], max_concurrent: int) -> Iterator[EpisodeRun]:
    """Carry out conversations, at most `max_concurrent` at a time, and yield each as it ends, well or not.

    Leaving the loop early aborts what is running.
    """
    engine = llm.llm_engine
    active: dict[str, EpisodeRun] = {}

    def send(run: EpisodeRun) -> bool:
        """Send a conversation's next request; False if it has ended."""
        try:
            request = run.next_request()
            if request is None:
                return False
            name = f"vilavt-{next(_NUMBERS)}"
            engine.add_request(name, run.prompt(request), run.sampling_params(request))  # type: ignore[arg-type]
        except Exception as error:
            logger.debug("sample %s failed", run.name, exc_info=True)
            run.fail(error)
            return False
        active[name] = run
        return True

    try:
        while True:
            while len(active) < max_concurrent and (started := next(runs, None)) is not None:
                if not send(started):
                    yield started
            if not active:
                return
            for output in engine.step():
                if not output.finished or output.request_id not in active:
                    continue
                run = active.pop(output.request_id)
                try:
                    list(run.take(output))  # type: ignore[arg-type]
                except Exception as error:
                    logger.debug("sample %s failed", run.name, exc_info=True)
                    run.fail(error)
                    yield run
                    continue
                if not send(run):
                    yield run
    finally:
        if active:
            engine.abort_request(list(active))


def _sample(entry: Sample | tuple[Any, str]) -> Sample:
    if isinstance(entry, Sample):
        return entry
    images, question = entry
    several = images if isinstance(images, (list, tuple)) else [images]
    return Sample(several, question)
