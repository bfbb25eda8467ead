"""The methods of a backend (`vilavt_core.backends.Backend`), made of drivers and an engine's session: written once.

A backend of this process says how its engine carries out drivers (`Session`), and inherits the rest.
"""

from __future__ import annotations

import asyncio
import copy
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping
from contextlib import aclosing, closing
from dataclasses import replace
from typing import Any, Protocol, Self

from .driver import ConversationSettings, Driver
from .errors import EngineError
from .presets import Limits, Preset
from .progress import counting
from .results import (
    ChatResult,
    Event,
    Finished,
    Images,
    Intervention,
    Provenance,
    Sample,
    Timings,
    sample_images,
)


class Session(Protocol):
    """An engine at work on some conversations."""

    def run(self, drivers: Iterator[Driver]) -> Generator[tuple[Driver, Event], None, None]:
        """Carry out drivers, as many side by side as the backend allows, and give their events as they happen; the last
        of each is `Finished`. Leaving the loop early ends what is running.
        """
        ...

    def follow(self, before: Driver, after: Driver) -> None:
        """`after` continues the conversation of `before`: what the engine keeps of it is `after`'s now."""
        ...

    def release(self, driver: Driver) -> None:
        """Free what is kept for a finished driver."""
        ...

    def close(self) -> None:
        """Free what is kept."""
        ...


class AskingBackend(ABC):
    """`ask` and `ask_many` of a backend that has `iter_many`."""

    def ask(
        self,
        images: Images,
        question: str,
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> ChatResult:
        """See `vilavt_core.backends.Backend.ask`."""
        (result,) = self.ask_many([Sample(sample_images(images), question, id, seed, limits)])
        if result.error is not None:
            raise result.error
        return result

    def ask_many(
        self,
        samples: Iterable[Sample | tuple[Any, str]],
        *,
        intervention: Intervention | None = None,
        progress: bool = False,
    ) -> list[ChatResult]:
        """See `vilavt_core.backends.Backend.ask_many`."""
        samples = list(samples)
        results: dict[int, ChatResult] = {}
        with counting(len(samples), "asking", "question", shown=progress) as advance:
            for place, result in self.iter_many(samples, intervention=intervention):
                results[place] = result
                advance(1)
        return [results[place] for place in range(len(samples))]

    @abstractmethod
    def iter_many(
        self, samples: Iterable[Sample | tuple[Any, str]], *, intervention: Intervention | None = None
    ) -> Iterator[tuple[int, ChatResult]]:
        """See `vilavt_core.backends.Backend.iter_many`."""


class DrivenBackend(AskingBackend):
    """A backend whose engine is in this process."""

    settings: ConversationSettings
    """What its conversations share; may be replaced between calls."""
    concurrency: int

    @abstractmethod
    def _session(self, intervention: Intervention | None = None) -> Session:
        """The engine, for some conversations.

        Raises:
            EngineError: it does not support interventions.
        """

    @property
    def timings(self) -> Timings | None:
        """See `vilavt_core.backends.Backend.timings`."""
        return None

    def provenance(self, seed: int | None, limits: Limits | None = None) -> Provenance:
        """See `vilavt_core.backends.Backend.provenance`."""
        return self.settings.provenance(seed, limits)

    def varied(
        self,
        *,
        preset: Preset | None = None,
        limits: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Self:
        """See `vilavt_core.backends.Backend.varied`."""
        twin = copy.copy(self)
        twin.settings = self.settings.varied(preset, limits or {}, sampling or {})
        return twin

    def iter_many(
        self, samples: Iterable[Sample | tuple[Any, str]], *, intervention: Intervention | None = None
    ) -> Iterator[tuple[int, ChatResult]]:
        """See `vilavt_core.backends.Backend.iter_many`."""
        places: dict[Driver, int] = {}

        def drivers() -> Iterator[Driver]:
            for place, entry in enumerate(samples):
                sample = Sample.of(entry)
                driver = Driver(sample, self.settings, name=str(place), place=place, intervention=intervention)
                places[driver] = place
                yield driver

        session = self._session(intervention)
        with closing(session), closing(session.run(drivers())) as events:
            for driver, event in events:
                if isinstance(event, Finished):
                    session.release(driver)
                    yield places.pop(driver), event.result

    def stream(
        self,
        images: Images,
        question: str,
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> Iterator[Event]:
        """See `vilavt_core.backends.Backend.stream`."""
        with self.conversation(images, id=id, seed=seed, limits=limits) as talk:
            yield from talk.stream(question)

    def conversation(
        self,
        images: Images = (),
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> DrivenConversation:
        """See `vilavt_core.backends.Backend.conversation`."""
        return DrivenConversation(self.settings, self._session(), Sample(sample_images(images), "", id, seed, limits))


class Talk:
    """Whether the next question of a conversation may be asked."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        """Images, id, seed and limits of the conversation."""
        self._busy = self._closed = False

    def _check(self) -> None:
        """Stop if no question may be asked now.

        Raises:
            EngineError: why not.
        """
        if self._closed:
            raise EngineError(
                "the conversation was closed, or an earlier question failed half-way; start another conversation"
            )
        if self._busy:
            raise EngineError(
                "the previous question of this conversation is still being answered; finish its stream first"
            )


class _DrivenTalk(Talk):
    """A conversation whose questions are drivers."""

    def __init__(self, settings: ConversationSettings, sample: Sample) -> None:
        super().__init__(sample)
        self._settings = settings
        self._last: Driver | None = None

    def _first(self, question: str, images: Images, stream: bool) -> Driver:
        """The driver of the first question."""
        sample = replace(self._sample, question=question, images=[*self._sample.images, *sample_images(images)])
        return Driver(sample, self._settings, stream=stream)

    def _following(self, question: str, images: Images) -> Sample:
        return replace(self._sample, question=question, images=sample_images(images))

    def _ended(self, driver: Driver, error: Exception | None) -> None:
        """Remember a finished question. One that ended before its first turn left nothing to continue."""
        if error is not None:
            raise error
        if driver.result.turns:
            self._last = driver


class DrivenConversation(_DrivenTalk):
    """See `vilavt_core.backends.Conversation`; made by `DrivenBackend.conversation`."""

    def __init__(self, settings: ConversationSettings, session: Session, sample: Sample) -> None:
        super().__init__(settings, sample)
        self._session = session

    def ask(self, question: str, images: Images = ()) -> ChatResult:
        """See `vilavt_core.backends.Conversation.ask`."""
        for event in self._events(question, images, stream=False):
            if isinstance(event, Finished):
                return event.result
        raise EngineError("the conversation ended without a result")

    def stream(self, question: str, images: Images = ()) -> Iterator[Event]:
        """See `vilavt_core.backends.Conversation.stream`."""
        return self._events(question, images, stream=True)

    def close(self) -> None:
        """See `vilavt_core.backends.Conversation.close`."""
        self._closed = True
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _events(self, question: str, images: Images, *, stream: bool) -> Iterator[Event]:
        self._check()
        if self._last is None:
            driver = self._first(question, images, stream)
        else:
            driver = self._last.follow_up(self._following(question, images), stream=stream)
            self._session.follow(self._last, driver)
        self._busy, whole = True, False
        try:
            with closing(self._session.run(iter([driver]))) as events:
                for _, event in events:
                    if isinstance(event, Finished):
                        whole = event.result.error is None
                        self._ended(driver, event.result.error)
                    yield event
        finally:
            self._busy = False
            if not whole and driver.requests:  # the engine holds half a question
                self.close()


class AsyncDrivenBackend(ABC):
    """An async backend whose engine is in this process."""

    settings: ConversationSettings
    """What its conversations share; may be replaced between calls."""
    concurrency: int

    @abstractmethod
    def events(self, driver: Driver) -> AsyncGenerator[Event, None]:
        """Carry out a question; `Finished` comes last, also if it failed. Cancelling the task, or closing the iterator,
        ends it in the engine.
        """

    @abstractmethod
    async def follow_up(self, before: Driver, sample: Sample, *, stream: bool = False) -> Driver:
        """The next question of a conversation; see `Driver.follow_up`."""

    @property
    def timings(self) -> Timings | None:
        """See `vilavt_core.backends.Backend.timings`."""
        return None

    def provenance(self, seed: int | None, limits: Limits | None = None) -> Provenance:
        """See `vilavt_core.backends.Backend.provenance`."""
        return self.settings.provenance(seed, limits)

    def varied(
        self,
        *,
        preset: Preset | None = None,
        limits: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Self:
        """See `vilavt_core.backends.Backend.varied`."""
        twin = copy.copy(self)
        twin.settings = self.settings.varied(preset, limits or {}, sampling or {})
        return twin

    async def ask(
        self,
        images: Images,
        question: str,
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> ChatResult:
        """See `vilavt_core.backends.Backend.ask`."""
        (result,) = await self.ask_many([Sample(sample_images(images), question, id, seed, limits)])
        if result.error is not None:
            raise result.error
        return result

    async def ask_many(
        self,
        samples: Iterable[Sample | tuple[Any, str]],
        *,
        intervention: Intervention | None = None,
        progress: bool = False,
    ) -> list[ChatResult]:
        """See `vilavt_core.backends.Backend.ask_many`."""
        samples = list(samples)
        results: dict[int, ChatResult] = {}
        with counting(len(samples), "asking", "question", shown=progress) as advance:
            async for place, result in self.iter_many(samples, intervention=intervention):
                results[place] = result
                advance(1)
        return [results[place] for place in range(len(samples))]

    async def iter_many(
        self, samples: Iterable[Sample | tuple[Any, str]], *, intervention: Intervention | None = None
    ) -> AsyncGenerator[tuple[int, ChatResult], None]:
        """See `vilavt_core.backends.Backend.iter_many`."""
        refuse_intervention(intervention, type(self).__name__)
        waiting = enumerate(samples)
        running: set[asyncio.Task[tuple[int, ChatResult]]] = set()
        try:
            while True:
                while len(running) < self.concurrency and (entry := next(waiting, None)) is not None:
                    running.add(asyncio.ensure_future(self._result(*entry)))
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)  # each ends in the engine

    async def _result(self, place: int, entry: Sample | tuple[Any, str]) -> tuple[int, ChatResult]:
        driver = Driver(Sample.of(entry), self.settings, name=str(place), place=place)
        async with aclosing(self.events(driver)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return place, event.result
        raise EngineError(f"sample {driver.name}: the conversation ended without a result")

    async def stream(
        self,
        images: Images,
        question: str,
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> AsyncGenerator[Event, None]:
        """See `vilavt_core.backends.Backend.stream`."""
        async with aclosing(self.conversation(images, id=id, seed=seed, limits=limits).stream(question)) as events:
            async for event in events:
                yield event

    def conversation(
        self,
        images: Images = (),
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> AsyncDrivenConversation:
        """See `vilavt_core.backends.Backend.conversation`."""
        return AsyncDrivenConversation(self, Sample(sample_images(images), "", id, seed, limits))


class AsyncDrivenConversation(_DrivenTalk):
    """See `vilavt_core.backends.AsyncConversation`; made by `AsyncDrivenBackend.conversation`."""

    def __init__(self, backend: AsyncDrivenBackend, sample: Sample) -> None:
        super().__init__(backend.settings, sample)
        self._backend = backend

    async def ask(self, question: str, images: Images = ()) -> ChatResult:
        """See `vilavt_core.backends.Conversation.ask`."""
        async with aclosing(self._events(question, images, stream=False)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event.result
        raise EngineError("the conversation ended without a result")

    def stream(self, question: str, images: Images = ()) -> AsyncGenerator[Event, None]:
        """See `vilavt_core.backends.Conversation.stream`."""
        return self._events(question, images, stream=True)

    def close(self) -> None:
        """See `vilavt_core.backends.Conversation.close`."""
        self._closed = True

    async def _events(self, question: str, images: Images, *, stream: bool) -> AsyncGenerator[Event, None]:
        self._check()
        if self._last is None:
            driver = self._first(question, images, stream)
        else:
            driver = await self._backend.follow_up(self._last, self._following(question, images), stream=stream)
        self._busy, whole = True, False
        try:
            async with aclosing(self._backend.events(driver)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        whole = event.result.error is None
                        self._ended(driver, event.result.error)
                    yield event
        finally:
            self._busy = False
            if not whole and driver.requests:
                self.close()


def refuse_intervention(intervention: Intervention | None, backend: str) -> None:
    """Stop if an intervention was given to a backend that runs the model as it is.

    Raises:
        EngineError: names the backend and the remedy.
    """
    if intervention is not None:
        raise EngineError(f"{backend} does not support interventions; ask a local model (VilavtChat)")
