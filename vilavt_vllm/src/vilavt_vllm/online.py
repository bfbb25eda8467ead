"""`AsyncVilavtLLM`: conversations over vLLM's async engine, streamed, cancelled and continued one by one."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from vilavt_core.presets import Sampling
from vilavt_core.results import ChatResult, Event, Finished, Sample

from .episodes import EpisodeRun, Settings
from .errors import EngineFailure

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.engine.protocol import EngineClient

_NUMBERS = itertools.count()


class AsyncVilavtLLM:
    """Asks a ViLaVT about pictures over an async engine; as many conversations at once as there are tasks.

    Args:
        engine: vLLM's `AsyncLLM`, or the engine client of its API server.
        settings: see `Settings.of_engine`.
    """

    def __init__(self, engine: EngineClient, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        # Pictures must not hold up the event loop; one thread, because tokenizers must not be shared by two.
        self.worker = ThreadPoolExecutor(1, "vilavt-episodes")

    @classmethod
    def from_checkpoint(
        cls, model: str, *, engine_args: dict[str, Any] | None = None, **settings: Any
    ) -> AsyncVilavtLLM:
        """Start an engine for a checkpoint.

        Args:
            model: folder or hub id.
            engine_args: for `vllm.AsyncEngineArgs`.
            settings: for `Settings.of_engine`: preset, limits, sampling, prompts, seed, …
        """
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(model), **(engine_args or {})))
        config: Any = engine.vllm_config
        settings.setdefault("device", str(config.device_config.device_type))
        return cls(engine, Settings.of_engine(config.model_config, **settings))

    def run(self, sample: Sample, *, stream: bool = False, sampling: Sampling | None = None) -> EpisodeRun:
        """A question for :meth:`events`; keep it to ask :meth:`EpisodeRun.follow_up` questions."""
        return EpisodeRun(sample, self.settings, stream=stream, sampling=sampling)

    async def ask(self, sample: Sample) -> ChatResult:
        """Ask one question. What goes wrong with it is in ``ChatResult.error``."""
        run = self.run(sample)
        async for event in self.events(run):
            if isinstance(event, Finished):
                return event.result
        raise EngineFailure(f"sample {run.name}: the conversation ended without a result")

    async def events(self, run: EpisodeRun) -> AsyncGenerator[Event, None]:
        """Carry out a question; `Finished` comes last, also if it failed. Cancelling the task, or closing the
        iterator, aborts the request in the engine.
        """
        threads = asyncio.get_running_loop()
        try:
            while (request := await threads.run_in_executor(self.worker, run.next_request)) is not None:
                outputs = self.engine.generate(
                    run.prompt(request),  # type: ignore[arg-type]
                    run.sampling_params(request),
                    f"vilavt-{next(_NUMBERS)}",
                )
                async for output in outputs:
                    if output.finished:  # decodes, crops and resizes
                        events = await threads.run_in_executor(self.worker, _all, run, output)
                    else:
                        events = _all(run, output)
                    for event in events:
                        yield event
        except Exception as error:
            yield run.fail(error)
            return
        yield run.finished

    def shutdown(self) -> None:
        """Stop the engine."""
        self.worker.shutdown(wait=False, cancel_futures=True)
        self.engine.shutdown()


def _all(run: EpisodeRun, output: RequestOutput) -> list[Event]:
    return list(run.take(output))
