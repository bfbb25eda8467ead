"""The backend ``server``: questions to a running ``vilavt-serve``, whose loop zooms and sends the final answer.

Everything goes through the official ``openai`` client (``pip install "vilavt-hf[server]"``). What a server answers
depends on how it was started; it says so under ``/v1/vilavt``, and results repeat it.
"""

from __future__ import annotations

import base64
import copy
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from typing import Any, Self

from . import wire
from .asking import AskingBackend, Talk, refuse_intervention
from .backends import BackendOptions
from .errors import EngineError, StateError, VilavtError
from .images import image_file
from .presets import Limits, Preset, Sampling, get_preset
from .regions import Picture, PixelBounds
from .results import (
    ChatResult,
    Event,
    Finished,
    Images,
    Intervention,
    Provenance,
    Sample,
    Timings,
    Work,
    sample_images,
)
from .sources import ImageSource, Video
from .video import video_file

logger = logging.getLogger(__name__)

PER_REQUEST = Limits.per_request()
"""Fields of `Limits` that a request may tighten."""


class ServerClient(AskingBackend):
    """Asks a server. See `vilavt_core.backends.Backend` for its methods.

    Args:
        url: of its API, e.g. ``http://127.0.0.1:8000/v1``.
        options: `limits` and `sampling` go with every request; `engine` are arguments of `openai.OpenAI`. The API key
            is ``engine["api_key"]``, else the environment's ``VILAVT_API_KEY``.

    Raises:
        EngineError: ``openai`` is not installed, no vilavt-serve answers there, or it runs another preset.
    """

    def __init__(self, url: str, options: BackendOptions = BackendOptions()) -> None:  # noqa: B008 (frozen)
        options.refuse("server", "prompts", "dtype", "device")
        _check_limits(options)
        try:
            import openai
        except ImportError:
            raise EngineError('the backend "server" needs the openai client: pip install "vilavt-hf[server]"') from None
        self.url = url.rstrip("/")
        self.concurrency = options.concurrency or 16
        arguments = {"api_key": os.environ.get("VILAVT_API_KEY") or "none", "max_retries": 6, "timeout": 3600.0}
        self._client = openai.OpenAI(base_url=self.url, **{**arguments, **options.engine})
        try:
            told: Any = self._client.with_options(max_retries=0, timeout=30).get(wire.SETTINGS_PATH, cast_to=object)
            self.model, server = wire.read_settings(told)
            self.note = wire.read_note(told)  # of its checkpoint, for people
        except (openai.OpenAIError, TypeError, KeyError, ValueError) as error:
            raise EngineError(
                f"{self.url}: no vilavt-serve of this version answers there ({type(error).__name__}: {error}); start "
                "one with `vilavt-serve CHECKPOINT`, and give its address with /v1"
            ) from None
        self._server = replace(server, checkpoint=f"{self.url} {self.model}")
        self._set(options)

    def _set(self, options: BackendOptions) -> None:
        """Ask as these options say from now on."""
        wanted, runs = getattr(options.preset, "name", options.preset), self._server.preset
        if wanted not in (None, runs):
            raise EngineError(
                f"{self.url} runs the preset {runs!r}, {wanted!r} was asked for; start it with --preset {wanted}"
            )
        _check_limits(options)
        self.options, self._limits = options, options.change_limits(self._server.limits)

    def varied(
        self,
        *,
        preset: Preset | None = None,
        limits: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Self:
        """See `vilavt_core.backends.Backend.varied`."""
        before, twin = self.options, copy.copy(self)
        options = replace(before, preset=preset or before.preset, limits={**before.limits, **(limits or {})})
        twin._set(replace(options, sampling={**before.sampling, **(sampling or {})}))
        return twin

    def provenance(self, seed: int | None, limits: Limits | None = None) -> Provenance:
        """What a result with this seed and these limits (None: the server's, tightened by the options) depends on."""
        sampling: Sampling = self.options.change_sampling(self._server.sampling)
        return replace(self._server, seed=seed, limits=limits or self._limits, sampling=sampling)

    @property
    def timings(self) -> Timings | None:
        """A server does not tell what its engine has spent."""
        return None

    def iter_many(
        self, samples: Iterable[Sample | tuple[Any, str]], *, intervention: Intervention | None = None
    ) -> Iterator[tuple[int, ChatResult]]:
        """See `vilavt_core.backends.Backend.iter_many`. May be called from several threads at once."""
        refuse_intervention(intervention, "a server")
        places: dict[Future[ChatResult], int] = {}
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            for place, entry in enumerate(samples):
                places[pool.submit(self._ask, Sample.of(entry), place)] = place
                if len(places) >= self.concurrency:
                    yield from _done(places)
            while places:
                yield from _done(places)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def stream(
        self,
        images: Images,
        question: str,
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> Iterator[Event]:
        """See `vilavt_core.backends.Backend.stream`; the text is that of the thoughts."""
        yield from self.conversation(images, id=id, seed=seed, limits=limits).stream(question)

    def conversation(
        self,
        images: Images = (),
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> ServedConversation:
        """See `vilavt_core.backends.Backend.conversation`."""
        return ServedConversation(self, Sample(sample_images(images), "", id, seed, limits))

    def _ask(self, sample: Sample, place: int) -> ChatResult:
        began = time.perf_counter()
        sample = replace(sample, seed=self._seed(sample, place))
        try:
            result = next(self._answers(sample, [], None, stream=False))
            assert isinstance(result, Finished)
            return replace(result.result, seconds=time.perf_counter() - began)
        except Exception as error:
            return ChatResult(
                question=sample.question,
                sample_id=sample.id,
                episode=None,
                record=None,
                provenance=self.provenance(sample.seed, sample.limits),
                work=Work(),
                seconds=time.perf_counter() - began,
                error=error if isinstance(error, VilavtError) else self._failure(sample, error),
            )

    def _answers(
        self, sample: Sample, before: Sequence[Mapping[str, Any]], state: str | None, *, stream: bool
    ) -> Iterator[Event]:
        """Events of one question; `Finished` comes last.

        Args:
            sample: the question; its images are the new ones.
            before: messages of the conversation so far.
            state: that came with the last answer; without it, a server that does not know the conversation any more
                rebuilds it from the messages, without the zooms.
            stream: whether events come as they happen, else `Finished` alone.

        Raises:
            EngineError: the server fails, or says something else than a result.
            ImageError: an image cannot be read.
        """
        limits = {**self.options.limits, **self._tighter(sample.limits)}
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [*before, self.message(sample)],
            "seed": self._seed(sample),
        }
        try:
            try:
                yield from self._attempt(
                    sample, request, limits if state is None else {**limits, wire.STATE: state}, stream
                )
            except Exception as error:
                if state is None or getattr(error, "type", None) != StateError.__name__:
                    raise
                logger.warning("%s: the conversation goes on without its zooms: %s", self.url, error)
                yield from self._attempt(sample, request, limits, stream)
        except VilavtError:
            raise
        except Exception as error:
            raise self._failure(sample, error) from error

    def _attempt(
        self, sample: Sample, request: Mapping[str, Any], field: Mapping[str, Any], stream: bool
    ) -> Iterator[Event]:
        """`_answers` of one request whose field ``vilavt`` is this."""
        said: dict[str, Any] = {**request, "extra_body": {**self.options.sampling, wire.FIELD: field}}
        if not stream:
            body: Any = self._client.chat.completions.create(**said).to_dict()
            yield Finished(self._result(sample, body[wire.FIELD]))
            return
        finished = False
        # Left early, the connection is closed, upon which the server ends the question.
        with self._client.chat.completions.create(**said, stream=True) as chunks:
            for chunk in chunks:
                data: Any = chunk.to_dict().get(wire.FIELD)
                if data is None:
                    continue
                if data["type"] == "end":
                    *events, _ = wire.read_chunk(data)
                    yield from events
                    finished = True
                    yield Finished(self._result(sample, data))
                else:
                    yield from wire.read_chunk(data)
        if not finished:
            raise EngineError("the stream ended without a result")

    def _seed(self, sample: Sample, place: int = 0) -> int:
        return sample.drawing_seed(self.options.seed, self.options.change_sampling(self._server.sampling), place)

    def _result(self, sample: Sample, data: Mapping[str, Any]) -> ChatResult:
        """What the server told, under the sample's id."""
        found = wire.with_checkpoint(wire.read_told(data), self._server.checkpoint)
        if found.ignored:
            logger.warning("%s: the server made no use of %s", self.url, ", ".join(found.ignored))
        return replace(found, question=sample.question, sample_id=sample.id)

    def _failure(self, sample: Sample, error: Exception) -> EngineError:
        where = "" if sample.id is None else f"sample {sample.id}: "
        return EngineError(f"{where}{self.url}: {type(error).__name__}: {error}")

    def message(self, sample: Sample) -> dict[str, Any]:
        """A question as a message."""
        own = [image.bounds if isinstance(image, Picture) else PixelBounds() for image in sample.images]
        bounds = sample.bounds or own
        parts = [self._part(image, bound) for image, bound in zip(sample.images, bounds, strict=True)]
        return {"role": "user", "content": [*parts, {"type": "text", "text": sample.question}]}

    def _tighter(self, limits: Limits | None) -> dict[str, Any]:
        if limits is None:
            return {}
        server = asdict(self._server.limits)
        changed = {name: value for name, value in asdict(limits).items() if value != server[name] and value is not None}
        if refused := sorted(set(changed) - set(PER_REQUEST)):
            raise EngineError(f"a request cannot limit {', '.join(refused)}; restart the server with it")
        return changed

    def _part(self, image: ImageSource | Picture, bounds: PixelBounds) -> dict[str, Any]:
        """An image or a video of a message."""
        if isinstance(image, Video):
            said = {"num_frames" if name == "frames" else name: value for name, value in image.wanted.items()}
            return {"type": "video_url", "video_url": {"url": self._video_url(image)}, **said, **_said(bounds)}
        if isinstance(image, Picture):
            if image.time is not None:
                raise EngineError(f"{image.name}: a frame with its time cannot be sent to a server; send the Video")
            image = image.image
        return {"type": "image_url", "image_url": {"url": self._data_url(image)}, **_said(bounds)}

    def _video_url(self, video: Video) -> str:
        """The file as it is, so that the server takes the frames that a local engine would."""
        if isinstance(video.source, str) and video.source.startswith(("data:", "http://", "https://")):
            return video.source
        return f"data:video/*;base64,{base64.b64encode(video_file(video, self.options.video_limits)).decode()}"

    def _data_url(self, image: ImageSource) -> str:
        """The image as it is stored, so that the server decodes what a local engine would; from memory, as PNG."""
        limits = self.options.image_limits
        if isinstance(image, str) and image.startswith(("data:", "http://", "https://")):
            return image
        data = image_file(image, limits, rules=get_preset(self._server.preset).rules)
        return f"data:image/*;base64,{base64.b64encode(data).decode()}"


class ServedConversation(Talk):
    """See `vilavt_core.backends.Conversation`; made by `ServerClient.conversation`."""

    def __init__(self, client: ServerClient, sample: Sample) -> None:
        super().__init__(sample)
        self._client = client
        self._messages: list[dict[str, Any]] = []
        self._state: str | None = None

    def ask(self, question: str, images: Images = ()) -> ChatResult:
        """See `vilavt_core.backends.Conversation.ask`."""
        (finished,) = self._events(question, images, stream=False)
        assert isinstance(finished, Finished)
        return finished.result

    def stream(self, question: str, images: Images = ()) -> Iterator[Event]:
        """See `vilavt_core.backends.Conversation.stream`; the text is that of the thoughts."""
        return self._events(question, images, stream=True)

    def close(self) -> None:
        """See `vilavt_core.backends.Conversation.close`."""
        self._closed = True

    def _events(self, question: str, images: Images, *, stream: bool) -> Iterator[Event]:
        self._check()
        first = () if self._messages else self._sample.images
        sample = replace(self._sample, question=question, images=[*first, *sample_images(images)])
        asked, whole, begun = self._client.message(sample), False, False
        self._busy = True
        try:
            for event in self._client._answers(sample, self._messages, self._state, stream=stream):
                begun = True
                if isinstance(event, Finished):
                    whole = True
                    if event.result.turns:  # else nothing is there to continue
                        answer = {"role": "assistant", "content": event.result.answer or ""}
                        self._messages += [asked, answer]
                        self._state = event.result.state
                yield event
        finally:
            self._busy = False
            if begun and not whole:
                self.close()


def _check_limits(options: BackendOptions) -> None:
    if unknown := sorted(set(options.limits) - set(PER_REQUEST)):
        raise EngineError(f"a request to a server cannot limit {', '.join(unknown)}; restart the server with it")


def open_server(url: str, options: BackendOptions) -> ServerClient:
    """The backend ``server``."""
    return ServerClient(url, options)


def _done(places: dict[Future[ChatResult], int]) -> Iterator[tuple[int, ChatResult]]:
    for future in wait(places, return_when=FIRST_COMPLETED).done:
        yield places.pop(future), future.result()


def _said(bounds: PixelBounds) -> dict[str, float]:
    return {name: value for name, value in asdict(bounds).items() if value is not None}
