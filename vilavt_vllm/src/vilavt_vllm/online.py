"""`AsyncVilavtLLM`: conversations over vLLM's async engine, streamed, cancelled and continued one by one."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from vilavt_core.asking import AsyncDrivenBackend
from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.presets import Sampling
from vilavt_core.results import Event, Sample

from . import compat
from .affinity import Affinity
from .episodes import (
    Handling,
    adapted,
    gave_up,
    lora_arguments,
    lora_of,
    sampling_params,
    settings_of_engine,
    take,
    to_prompt,
)
from .errors import EngineDiedError

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.engine.protocol import EngineClient

_NUMBERS = itertools.count()
THREADS = 4
"""For the images of running questions, unless somebody says otherwise: a large one takes about 0.1 s of a core."""


def _hashed(driver: Driver, step: Callable[[], list[Event]]) -> list[Event]:
    """Go on with a question, and name what it shows next: else vLLM's one renderer thread hashed the pixels."""
    events = step()
    if driver.request is not None:
        for inquiry in driver.request.new_inquiries:
            inquiry.identities  # noqa: B018 (found here, and kept)
    return events


class AsyncVilavtLLM(AsyncDrivenBackend):
    """Asks a ViLaVT about images over an async engine. See `vilavt_core.backends.AsyncBackend` for its methods.

    Args:
        engine: vLLM's `AsyncLLM`, or the engine client of its API server.
        settings: see `settings_of_engine`.
        concurrency: conversations that `ask_many` and `iter_many` run side by side.
        handling: of questions for which `events` is told nothing else.
        threads: that load, cut and resize the images of running questions. Their settings' tokenizer must bear that,
            as that of `settings_of_engine` does.
    """

    def __init__(
        self,
        engine: EngineClient,
        settings: ConversationSettings,
        concurrency: int = 64,
        handling: Handling = Handling(),  # noqa: B008 (frozen)
        threads: int = THREADS,
    ) -> None:
        self.engine, self.settings, self.concurrency, self.handling = engine, settings, concurrency, handling
        self.affinity = Affinity(partial(compat.engines_behind, engine))
        # Images must not hold up the event loop. PIL and hashes let other threads run; the tokenizer has a lock.
        self.worker = ThreadPoolExecutor(threads, "vilavt-episodes")

    @classmethod
    def from_checkpoint(
        cls,
        model: str,
        *,
        engine_args: dict[str, Any] | None = None,
        adapter: str | Path | None = None,
        threads: int = THREADS,
        **settings: Any,
    ) -> AsyncVilavtLLM:
        """Start an engine for a checkpoint.

        Args:
            model: folder or hub id.
            engine_args: for `vllm.AsyncEngineArgs`.
            adapter: folder of a LoRA adapter of the language model, which then answers.
            threads: see the class.
            settings: for `settings_of_engine`: preset, limits, sampling, prompts, seed, …
        """
        lora = None if adapter is None else lora_of(adapter)
        arguments = {**lora_arguments(lora), **(engine_args or {})}
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(model), **arguments))
        config: Any = engine.vllm_config
        settings.setdefault("device", str(config.device_config.device_type))
        own = adapted(settings_of_engine(config.model_config, **settings), lora)
        return cls(engine, own, handling=Handling(lora=lora), threads=threads)

    async def follow_up(
        self, before: Driver, sample: Sample, *, stream: bool = False, sampling: Sampling | None = None
    ) -> Driver:
        """See `Driver.follow_up`."""
        following = partial(before.follow_up, sample, stream=stream, sampling=sampling)
        after = await asyncio.get_running_loop().run_in_executor(self.worker, following)
        self.affinity.follow(before, after)
        return after

    async def events(self, driver: Driver, handling: Handling | None = None) -> AsyncGenerator[Event, None]:
        """Carry out a question; `Finished` comes last, also if it failed. Cancelling the task, or closing the
        iterator, aborts the request in the engine.

        Args:
            driver: the question.
            handling: None: as of all questions.
        """
        threads = asyncio.get_running_loop()
        for event in await threads.run_in_executor(self.worker, _hashed, driver, driver.start):
            yield event
        if driver.request is None:
            return
        handling = handling or self.handling
        try:
            with self.affinity.home(driver, handling.rank) as rank:
                async with aclosing(self._turns(driver, replace(handling, rank=rank))) as events:
                    async for event in events:
                        yield event
        except EngineDeadError as error:
            died = EngineDiedError(
                "the engine of this server has died, and the question with it; send it again, to another server or "
                "later"
            )
            died.__cause__ = error
            yield driver.fail(died)
        except Exception as error:
            yield driver.fail(error)

    async def _turns(self, driver: Driver, handling: Handling) -> AsyncGenerator[Event, None]:
        """The events of all turns."""
        threads = asyncio.get_running_loop()
        while driver.request is not None:
            async with aclosing(self._outputs(driver, handling)) as outputs:
                async for output in outputs:
                    if output.finished:  # decodes, crops and resizes
                        step = partial(take, driver, output)
                        found = await threads.run_in_executor(self.worker, _hashed, driver, step)
                    else:
                        found = take(driver, output)
                    for event in found:
                        yield event
                    if driver.request is None:
                        break

    async def _outputs(self, driver: Driver, handling: Handling) -> AsyncGenerator[RequestOutput, None]:
        """What vLLM makes of the driver's request.

        The prompt is rendered here and not by `generate`: vLLM's cache of encoded images is made for one thread, the
        renderer's. A request that never reaches the engine, because its client has hung up, leaves that cache ahead of
        the engine's, and the next one about the same image fails: it is sent again, with the images.
        """
        assert driver.request is not None
        for last_try in (False, True):
            (prompt,) = await self.engine.renderer.render_cmpl_async(
                [to_prompt(driver.request)],  # type: ignore[list-item]
                skip_mm_cache=last_try,
            )
            outputs = self.engine.generate(
                prompt,
                sampling_params(driver, handling.logprobs),
                f"{handling.name}-{driver.request.turn}-{next(_NUMBERS)}",  # a client may use its name twice
                lora_request=handling.lora,
                trace_headers=handling.trace_headers,
                priority=handling.priority,
                data_parallel_rank=handling.rank,
            )
            async with aclosing(outputs):
                async for output in outputs:
                    if not last_try and gave_up(driver, output):
                        break
                    yield output
                else:
                    return

    def shutdown(self) -> None:
        """Stop the engine."""
        self.worker.shutdown(wait=False, cancel_futures=True)
        self.engine.shutdown()
