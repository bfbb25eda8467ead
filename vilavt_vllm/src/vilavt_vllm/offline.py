"""`VilavtLLM`: many conversations through one vLLM engine, each at its own pace."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm import LLM
from vllm.lora.request import LoRARequest

from vilavt_core.asking import DrivenBackend, refuse_intervention
from vilavt_core.driver import Driver
from vilavt_core.errors import EngineError
from vilavt_core.failures import loading
from vilavt_core.images import ImageLimits
from vilavt_core.presets import Limits, Preset, Sampling
from vilavt_core.prompts import PromptSet
from vilavt_core.results import Event, Intervention
from vilavt_core.video import VideoLimits

from .checkpoints import require_servable
from .episodes import (
    adapted,
    lora_arguments,
    lora_of,
    require_lora,
    sampling_params,
    settings_of_engine,
    take,
    to_prompt,
)

logger = logging.getLogger(__name__)

_NUMBERS = itertools.count()


class VilavtLLM(DrivenBackend):
    """Asks a ViLaVT about images, offline, with vLLM's batching and caches; see `vilavt_core.backends.Backend`.

    Every conversation advances as soon as its own turn is sampled; none waits for another.

    Args:
        model: checkpoint folder or hub id, or a `vllm.LLM` that serves one already.
        limits: budgets of a conversation. None: the preset's, made to fit the engine.
        limit_changes: fields of `Limits` that shall differ from those.
        preset: None: what the checkpoint asks for, else ``default``.
        sampling: None: the preset's (the default preset is greedy).
        seed: for sampling, of samples that bring none. None: a fresh one for each.
        prompts: wording. None: the checkpoint's own.
        concurrency: conversations in flight. None: vLLM's ``max_num_seqs``.
        image_limits, video_limits: caps on files.
        allow_urls: whether an image may be an http(s) URL.
        adapter: folder of a LoRA adapter of the language model, which then answers.
        engine_args: for `vllm.LLM`, e.g. ``tensor_parallel_size=2``; none if `model` is one already.

    Raises:
        EngineError: arguments for an engine that runs already, or an adapter for one without LoRA.
        VilavtError: the checkpoint cannot be used, its settings are wrong, or vLLM refuses an argument.
    """

    def __init__(
        self,
        model: str | Path | LLM,
        *,
        limits: Limits | None = None,
        limit_changes: Mapping[str, Any] | None = None,
        preset: str | Preset | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        prompts: PromptSet | str | None = None,
        concurrency: int | None = None,
        image_limits: ImageLimits = ImageLimits(),  # noqa: B008 (frozen)
        video_limits: VideoLimits = VideoLimits(),  # noqa: B008 (frozen)
        allow_urls: bool = False,
        adapter: str | Path | None = None,
        **engine_args: Any,
    ) -> None:
        self.lora = None if adapter is None else lora_of(adapter)
        if isinstance(model, LLM):
            if engine_args:
                raise EngineError(f"{', '.join(engine_args)}: the LLM that was given runs already; pass it to vllm.LLM")
            self.llm = model
        else:
            require_servable(str(model), engine_args)
            with loading(str(model)):
                self.llm = LLM(model=str(model), **{**lora_arguments(self.lora), **engine_args})
        config: Any = self.llm.llm_engine.vllm_config
        require_lora(self.lora, config)
        settings = settings_of_engine(
            config.model_config,
            preset=preset,
            limits=limits,
            changes=limit_changes,
            sampling=sampling,
            prompts=prompts,
            seed=seed,
            image_limits=image_limits,
            video_limits=video_limits,
            allow_urls=allow_urls,
            device=str(config.device_config.device_type),
        )
        self.settings = adapted(settings, self.lora)
        self.concurrency = concurrency or config.scheduler_config.max_num_seqs

    def _session(self, intervention: Intervention | None = None) -> LLMSession:
        refuse_intervention(intervention, "VilavtLLM")
        return LLMSession(self.llm, self.concurrency, self.lora)


class LLMSession:
    """vLLM at work on some conversations; see `vilavt_core.asking.Session`. What vLLM keeps of them is in its own
    caches, found again by content.

    Args:
        llm: the engine.
        concurrency: conversations in flight.
        lora: the adapter that answers.
    """

    def __init__(self, llm: LLM, concurrency: int, lora: LoRARequest | None = None) -> None:
        self.llm, self.concurrency, self.lora = llm, concurrency, lora

    def run(self, drivers: Iterator[Driver]) -> Generator[tuple[Driver, Event], None, None]:
        """Carry out conversations; leaving the loop early aborts what is running."""
        engine: Any = self.llm.llm_engine
        active: dict[str, Driver] = {}

        def send(driver: Driver) -> Iterator[tuple[Driver, Event]]:
            """Send a conversation's next request, if there is one."""
            if driver.request is None:
                return
            name = f"vilavt-{next(_NUMBERS)}"
            try:
                (prompt,) = self.llm.renderer.render_cmpl([to_prompt(driver.request)])  # type: ignore[list-item]
                engine.add_request(name, prompt, sampling_params(driver), lora_request=self.lora)
            except Exception as error:
                logger.debug("sample %s was refused", driver.name, exc_info=True)
                yield driver, driver.fail(error)
                return
            active[name] = driver

        try:
            while True:
                while len(active) < self.concurrency and (driver := next(drivers, None)) is not None:
                    yield from ((driver, event) for event in driver.start())
                    yield from send(driver)
                if not active:
                    return
                for output in engine.step():
                    driver = active.get(output.request_id)
                    if driver is None or not (output.finished or driver.stream):
                        continue
                    if output.finished:
                        del active[output.request_id]
                    yield from ((driver, event) for event in take(driver, output))
                    if output.finished:
                        yield from send(driver)
                    elif driver.request is None:  # its tokens could not be used
                        del active[output.request_id]
                        engine.abort_request([output.request_id])
        finally:
            if active:
                engine.abort_request(list(active))

    def follow(self, before: Driver, after: Driver) -> None:
        """Nothing is kept here."""

    def release(self, driver: Driver) -> None:
        """Nothing is kept here."""

    def close(self) -> None:
        """Nothing is kept here."""
