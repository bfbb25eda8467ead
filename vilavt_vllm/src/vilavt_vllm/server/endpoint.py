"""The plug-in that vLLM's OpenAI server loads (entry point group ``vllm.endpoint_plugins``).

vLLM lets a plug-in's route replace one of its own with the same path: ``POST /v1/chat/completions``, ``/v1/responses``
and ``/v1/messages`` become the loop (`dialects`), and vLLM's handlers move to ``/v1/raw/chat/completions`` and so on,
so that ``/v1/raw`` is the base URL of a client that loops itself. Other routes that would answer with a turn of the
model are refused by name and move there too. `gate` stands before all of them; everything else (models, health,
metrics, the end) stays vLLM's.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError

from vilavt_core.conversation import text_problem
from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.errors import VilavtError
from vilavt_core.failures import one_line
from vilavt_core.images import ImageLimits
from vilavt_core.pages import render
from vilavt_core.presets import Limits
from vilavt_core.protocol import Answer, FinishReason, format_turn, without_tags
from vilavt_core.regions import Picture
from vilavt_core.results import ChatResult, Event, Finished, Sample, TextDelta
from vilavt_core.settings import read_chat_settings
from vilavt_core.state import (
    AskedQuestion,
    ConversationState,
    SaidQuestion,
    check_count,
    check_replayed,
    check_said,
    replay,
    unsampled,
)
from vilavt_core.validation import problems
from vilavt_core.video import VideoLimits
from vilavt_core.wire import SETTINGS_PATH, settings_body

from .. import affinity, compat
from ..episodes import Handling, adapted, settings_of_engine
from ..errors import BusyError, EngineDiedError, EngineFailure, LimitError, ModelMissingError, RequestError
from ..online import AsyncVilavtLLM
from .budget import PictureBudget, Reservation
from .dialects import API, DIALECTS, RAW, Answering, Dialect, dialect_of
from .fields import short
from .gate import RETRY, Draining, DrainingEngine, Gate, path_of
from .history import History, Kept
from .media import Pictures
from .metrics import metrics, queued_turns
from .options import ServerOptions
from .requests import Exchange, LoopRequest, exchanges, place, whole_number
from .states import States

compat.require_server()  # `vllm serve` finds this module by itself, whatever its version
from vllm import envs  # noqa: E402
from vllm.exceptions import GracefulHTTPError, VLLMClientError  # noqa: E402
from vllm.tracing import extract_trace_headers  # noqa: E402

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.lora.request import LoRARequest
    from vllm.tasks import SupportedTask

logger = logging.getLogger(__name__)

SETTINGS, LOAD = f"/v1{SETTINGS_PATH}", "/load"
TURNS = ("/v1/chat/completions/batch", "/v1/completions", "/v1/systemone", "/invocations")
"""Routes of vLLM that answer with one turn of the model, or go to one that does: a client would take a zoom for an
answer."""
BESIDE = ("/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel", "/v1/messages/count_tokens")
"""Routes of vLLM about its own responses and messages: the loop's answers are not kept, and its prompts are others."""
PRIORITY = "X-Vllm-Priority"
"""Header that says a request's priority, before its field: vLLM's."""
STATUS_WITHIN = 1.0
"""Seconds that a stream waits for its first event, so that an error that is found at once still has a status code."""

_REMEDIES = {
    FinishReason.CONTEXT_LIMIT: "on the server, raise it with --max-model-len, and with --max-context if that is given",
    FinishReason.IMAGE_LIMIT: "on the server, raise them with --max-images or --max-total-pixels",
}
"""What raises the limit that a question without a turn broke."""
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, eq=False)
class Asked:
    """A request's question, ready to be carried out."""

    driver: Driver
    talk: list[Exchange]
    """The conversation; the last exchange is the question."""
    before: Sequence[AskedQuestion] = ()
    """Its earlier questions."""
    history: Literal["kept", "state", "rebuilt"] | None = None
    """Where those are from; None: there are none."""


class Loop:
    """The state behind the route: an engine client, what is remembered, and what is allowed."""

    def __init__(self, engine: EngineClient, state: Any, options: ServerOptions) -> None:
        config: Any = engine.model_config
        self.options = options
        image_limits = ImageLimits(max_bytes=options.max_image_bytes, max_pixels=options.max_image_pixels)
        settings = settings_of_engine(
            config,
            preset=options.preset,
            changes=options.limits,
            prompts=options.prompts,
            seed=options.seed,
            image_limits=image_limits,
            device=str(getattr(getattr(getattr(state, "vllm_config", None), "device_config", None), "device_type", "")),
        )
        self.llm = AsyncVilavtLLM(engine, settings, threads=options.episode_threads)
        scheduler: Any = getattr(getattr(state, "vllm_config", None), "scheduler_config", None)
        self.by_priority = getattr(scheduler, "policy", "fcfs") == "priority"
        self.models = state.openai_serving_models
        self.vllm_config = getattr(state, "vllm_config", None)
        self.check_adapters()
        video_limits = VideoLimits(
            max_bytes=options.max_video_bytes,
            max_pixels=min(options.max_image_pixels, VideoLimits.max_pixels),
            max_total_pixels=options.max_video_pixels,
            max_seconds=options.max_video_seconds,
        )
        self.pictures = Pictures(config, image_limits, settings.preset.rules, options.max_body_bytes, video_limits)
        self.budget = PictureBudget(options.max_request_pixels, options.max_picture_memory)
        self.history = History(options.max_conversations, options.max_conversation_bytes)
        self.states = States(options)
        self.running = 0
        """Questions that are being answered."""
        self.preparing = 0
        """Of these, questions whose images are not ready yet."""
        found = read_chat_settings(config.model, hub={"revision": config.revision})
        self.note = found.note if found else ""

    def count_tokens(self, text: str) -> int:
        """How many tokens an answer has. Not for the event loop's thread."""
        return len(self.llm.settings.tokenizer.encode(text, split_special_tokens=True))

    def check_adapters(self) -> None:
        """Stop if questions to the model alone might get an adapter's answers; more may be loaded while it runs.

        Raises:
            UnsupportedError: see `compat.refuse_full_slots`.
        """
        compat.refuse_full_slots(self.vllm_config, len(getattr(self.models, "lora_requests", {})))

    def priority(self, request: LoopRequest, headers: Mapping[str, str]) -> tuple[int, list[str]]:
        """The priority of a request, its header's or else its field's, and which of the two has no effect here.

        Args:
            request: the body.
            headers: of the request.

        Raises:
            RequestError: the header is no number that vLLM takes.
        """
        field, said = request.priority, headers.get(PRIORITY)
        header = None if said is None else whole_number(PRIORITY, said)
        if not self.by_priority:
            return 0, [*(["priority"] if field else []), *([PRIORITY] if header else [])]
        if header is None:
            return field or 0, []
        return header, ["priority"] if field not in (None, header) else []

    def handling(self, request: LoopRequest, name: str, headers: Mapping[str, str]) -> Handling:
        """What the engine is told of a request, at each of its turns.

        Args:
            request: the body.
            name: of its requests in the engine's log.
            headers: of the request.

        Raises:
            ModelMissingError: no model or adapter has the name that the request asks for.
            RequestError: a header cannot be taken.
            UnsupportedError: see `check_adapters`.
        """
        self.check_adapters()
        lora, model = None, request.model
        if model is not None and not self.models.is_base_model(model):
            lora = getattr(self.models, "lora_requests", {}).get(model)
            if lora is None:
                raise ModelMissingError(f"no model {short(repr(model))} here; GET /v1/models lists them")
        priority, _ = self.priority(request, headers)
        said = headers.get(affinity.HEADER)
        rank = None if said is None else self.llm.affinity.check(whole_number(affinity.HEADER, said))
        return Handling(name, lora, priority, extract_trace_headers(headers) or None, rank, logprobs=False)

    async def answer(self, request: LoopRequest, handling: Handling) -> AsyncGenerator[Any, None]:
        """Carry a request out: yields its `Driver` as soon as that stands, then the question's events. Counts it, and
        remembers it for follow-up questions.

        Raises:
            BusyError: as many questions as allowed are being answered.
            VilavtError, ValueError: the request cannot be carried out.
        """
        if self.running >= self.options.max_episodes:
            raise BusyError(
                f"{self.running} questions are being answered, at most {self.options.max_episodes} may be; try again "
                "later, or raise it with --max-episodes"
            )
        self.running += 1
        self.preparing += 1
        metrics().running.inc()
        begun, speaks = time.monotonic(), False
        driver, finish, reservation = None, "aborted", self.budget.reservation()
        try:
            try:
                asked = await self._asked(request, handling.lora, reservation)
                driver = asked.driver
            except Exception:
                finish = "refused"
                raise
            finally:
                self.preparing -= 1
            metrics().preparation.observe(time.monotonic() - begun)
            yield driver
            async with aclosing(self.llm.events(driver, handling)) as events:
                async for event in events:
                    if isinstance(event, TextDelta) and not speaks:
                        speaks = True
                        metrics().first_thought.observe(time.monotonic() - begun)
                    if isinstance(event, Finished):
                        finish = event.result.finish
                        event = Finished(await self._remembered(event.result, asked, handling.lora))
                    yield event
        finally:
            reservation.release()
            self.running -= 1
            metrics().running.dec()
            metrics().finished(driver, finish, time.monotonic() - begun)

    async def _asked(self, request: LoopRequest, lora: LoRARequest | None, reservation: Reservation) -> Asked:
        """The question of a request, ready to be carried out, and the conversation it belongs to."""
        settings = await asyncio.to_thread(adapted, self.llm.settings, lora)
        limits, sampling = request.limits(settings.limits), request.sampling(settings.sampling)
        request.check_bounds(limits)
        talk = exchanges(request.placed(), request.frames)
        count = sum(image.least for exchange in talk for image in exchange.images)
        if count > limits.max_images:
            raise RequestError(f"the request has {count} images, at most {limits.max_images} are allowed")
        self._check_text(talk, limits)
        *past, last = talk
        state = None
        if request.state is not None:
            state = await asyncio.to_thread(self.states.read, request.state, settings)
            check_count(state, len(past))
        kept = self.history.find(past, lora) if past else None
        if kept is not None and state is not None and kept.state.stream != state.stream:
            kept = None  # the same words, which were sampled another way
        history: Literal["kept", "state", "rebuilt"] = "kept" if kept else "state" if state else "rebuilt"
        needed = talk if kept is None else [last]
        *earlier, shown = await self.pictures.load([one.images for one in needed], limits.max_images, reservation)
        sample = Sample(shown, last.question, seed=request.seed, limits=limits)
        stream = bool(request.stream)
        if not past:
            return Asked(Driver(sample, settings, name="request", stream=stream, sampling=sampling), talk)
        before: Driver
        questions: Sequence[AskedQuestion]
        if kept is not None:
            before, questions = kept.driver, kept.state.questions
        elif state is not None:
            before, questions = await self._replayed(state, past, settings, earlier), state.questions
        else:
            before, questions = await self._rebuilt(past, settings, limits, earlier)
        driver = await self.llm.follow_up(before, sample, stream=stream, sampling=sampling)
        metrics().follow_ups.labels(history).inc()
        return Asked(driver, talk, questions, history)

    async def _remembered(self, result: ChatResult, asked: Asked, lora: LoRARequest | None) -> ChatResult:
        """The result with its state; its conversation is kept for follow-up questions, if there is one to follow up."""
        result = replace(result, history=asked.history)
        if result.error is not None or not result.turns:
            return result
        state, text = await asyncio.to_thread(self.states.made, asked.driver, asked.before, result.answer)
        talk = [*asked.talk[:-1], replace(asked.talk[-1], answer=result.answer or "")]
        self.history.keep(talk, Kept(asked.driver, state), lora)
        return replace(result, state=text)

    def _check_text(self, talk: list[Exchange], limits: Limits) -> None:
        """Refuse by its length what cannot fit: encoding it would keep the thread of all conversations busy."""
        if limits.max_context is None:
            return
        characters = sum(len(one.question) + len(one.answer or "") for one in talk)
        if problem := text_problem(characters, limits.max_context, self.llm.settings.tokenizer):
            raise RequestError(
                f"the conversation: {problem}; send less, or start the server with a larger --max-model-len"
            )

    async def _replayed(
        self,
        state: ConversationState,
        past: Sequence[Exchange],
        settings: ConversationSettings,
        pictures: Sequence[Sequence[Picture]],
    ) -> Driver:
        """A conversation as its state tells it: the token stream and the crops that its client has seen."""
        said = [SaidQuestion(shown, one.question, one.answer or "") for one, shown in zip(past, pictures, strict=True)]
        await asyncio.to_thread(check_said, state, said)
        driver: Driver | None = None
        for asked, told in zip(state.questions, said, strict=True):
            driver = await self._in_worker(replay, driver, settings, asked, told, "request")
        assert driver is not None
        await asyncio.to_thread(check_replayed, state, driver)
        return driver

    async def _rebuilt(
        self,
        past: Sequence[Exchange],
        settings: ConversationSettings,
        limits: Limits,
        pictures: Sequence[Sequence[Picture]],
    ) -> tuple[Driver, list[AskedQuestion]]:
        """A conversation whose token stream was not kept: questions and answers as the client sent them, no zooms."""
        driver: Driver | None = None
        questions = []
        for exchange, shown in zip(past, pictures, strict=True):
            sample = Sample(shown, exchange.question, limits=unsampled(limits))
            driver = await self._in_worker(_told, driver, settings, sample, exchange)
            questions.append(await asyncio.to_thread(AskedQuestion.of, driver, exchange.answer, limits))
        assert driver is not None
        return driver, questions

    async def _in_worker(self, work: Callable[..., Driver], *arguments: Any) -> Driver:
        """What cuts images or encodes text, in a thread of the episodes."""
        return await asyncio.get_running_loop().run_in_executor(self.llm.worker, work, *arguments)


class VilavtEndpoint:
    """See vLLM's `EndpointPlugin`."""

    name = "vilavt_loop"
    required_tasks: tuple[SupportedTask, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Put the loop in place of vLLM's routes, vLLM's own beside it, and the gate before everything."""
        for route in [route for route in app.routes if isinstance(route, APIRoute)]:
            if route.path.startswith(API):
                raw = route.path.replace(API, RAW, 1)
                app.add_api_route(raw, route.endpoint, methods=[*route.methods], dependencies=route.dependencies)
            if route.path in (*TURNS, *BESIDE):
                app.add_api_route(route.path, refused, methods=[*route.methods], response_model=None)
        for path in DIALECTS:
            app.add_api_route(path, answered, methods=["POST"], response_model=None)
        app.add_api_route(SETTINGS, settings, methods=["GET"], response_model=None)
        app.add_api_route(LOAD, load, methods=["GET"], response_model=None)
        app.state.vilavt_draining = Draining()
        keys = getattr(getattr(app.state, "args", None), "api_key", None) or [envs.VLLM_API_KEY]
        app.add_middleware(Gate, draining=app.state.vilavt_draining, keys=[key for key in keys if key])
        if not any(getattr(route, "path", None) == "/" for route in app.routes):
            app.add_api_route("/", front_page, methods=["GET"], response_model=None, include_in_schema=False)

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Namespace) -> None:
        """Prepare the loop."""
        if engine_client is None:
            state.vilavt_loop = None
            return
        options = getattr(args, "vilavt", None) or ServerOptions()
        metrics()
        state.vilavt_loop = await asyncio.to_thread(Loop, engine_client, state, options)
        state.sse_keep_alive = float(getattr(args, "sse_keep_alive_interval", 0))
        state.engine_client = DrainingEngine(engine_client, state.vilavt_draining, state)


def _told(before: Driver | None, settings: ConversationSettings, sample: Sample, exchange: Exchange) -> Driver:
    """A question with the answer that the client says it got, without the model."""
    driver = Driver(sample, settings, name="request") if before is None else before.follow_up(sample)
    driver.start()
    if driver.request is not None:
        driver.take_text(format_turn(Answer(without_tags(exchange.answer or ""))))
    if driver.result.error is not None:
        raise driver.result.error
    if not driver.result.turns:
        raise _refusal(driver.result) or RequestError(
            f"an earlier question of the conversation cannot be asked here: {driver.result.finish}"
        )
    return driver


async def refused(raw: Request) -> Response:
    """Say where to go instead of a route that would answer with one turn, or about one."""
    path = raw.scope["route"].path
    there = f"; vLLM's own is at {path.replace(API, RAW, 1)}" if path.startswith(API) else ""
    dialect = dialect_of(path)
    message = f"{path} is not answered here, where the server runs the model's zoom loop: POST {dialect.path}{there}"
    return _error(raw, RequestError(message), 400)


async def settings(raw: Request) -> Response:
    """What answers depend on besides the question: evaluations record it, and compare it before they resume."""
    loop: Loop | None = raw.app.state.vilavt_loop
    if loop is None:
        return _error(raw, EngineFailure("this server has no engine"), 501)
    provenance = loop.llm.settings.provenance(loop.options.seed)
    return JSONResponse(settings_body(loop.models.model_name(), provenance, loop.note, loop.states.to_json()))


async def load(raw: Request) -> Response:
    """How busy the server is: for what shares requests among several.

    ``server_load`` is what vLLM's route says, every request under way, here questions and, if vLLM was told to count
    them (``--enable-server-load-tracking``), requests to its own routes. ``waiting`` are questions whose images are
    not ready or whose turn is in the engine's queue, ``running`` the others.
    """
    loop: Loop | None = raw.app.state.vilavt_loop
    others = getattr(raw.app.state, "server_load_metrics", 0)
    questions, preparing = (0, 0) if loop is None else (loop.running, loop.preparing)
    waiting = min(questions, preparing + queued_turns())
    return JSONResponse({"server_load": questions + others, "running": questions - waiting, "waiting": waiting})


async def front_page(raw: Request) -> Response:
    """What this server is, and how it is asked: for whoever opens its address in a browser."""
    loop: Loop | None = raw.app.state.vilavt_loop
    model, note = ("", "") if loop is None else (loop.models.model_name(), loop.note)
    url = f"{str(raw.base_url).rstrip('/')}/v1"
    return HTMLResponse(render("front.html", TEMPLATES, title="vilavt-serve", model=model, note=note, url=url))


async def answered(raw: Request) -> Response:
    """Answer a request of any of the protocols with the model's own zoom loop."""
    loop: Loop | None = raw.app.state.vilavt_loop
    if loop is None:
        return _error(raw, EngineFailure("this server has no engine"), 501)
    dialect = DIALECTS[raw.scope["route"].path]
    try:
        request = await _parsed(raw, loop.options, dialect)
        ignored = request.ignored(loop.priority(request, raw.headers)[1])
        model = request.model or loop.models.model_name()
        reply = dialect.reply(request, model, ignored, _name(raw), loop.count_tokens)
        answer = loop.answer(request, loop.handling(request, reply.id, raw.headers))
        if request.stream:
            first = await _unless_disconnected(raw, _begun(answer))
            if first is None:
                return Response(status_code=499)
            early = first.result() if first.done() else None
            if isinstance(early, Finished) and (refusal := _refusal(early.result)) is not None:  # still gets its status
                await answer.aclose()
                return _error(raw, refusal, _status(refusal))
            # Starlette closes it as soon as the client is gone.
            return StreamingResponse(
                compat.with_keep_alive(_stream(reply, answer, first), raw.app.state.sse_keep_alive),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        finished = await _unless_disconnected(raw, _last(answer))
    except BusyError as error:
        return _error(raw, error, 503)
    except ModelMissingError as error:
        return _error(raw, error, 404)
    except (VilavtError, ValueError) as error:
        return _error(raw, error, 400)
    if finished is None:
        return Response(status_code=499)  # nobody is there to read it
    if (refusal := _refusal(finished)) is not None:
        return _error(raw, refusal, _status(refusal))
    return JSONResponse(await asyncio.to_thread(reply.whole, finished))


async def _parsed(raw: Request, options: ServerOptions, dialect: Dialect) -> LoopRequest:
    kind = raw.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"Content-Type is {kind or 'missing'!r}, it must be application/json")
    body = bytearray()
    async for chunk in raw.stream():
        body += chunk
        if len(body) > options.max_body_bytes:
            raise RequestError(
                f"the body is larger than {options.max_body_bytes} bytes; send smaller images, or raise it with "
                "--max-body-bytes"
            )
    try:
        return dialect.request.model_validate_json(bytes(body))
    except ValidationError as error:
        raise RequestError(problems(error, name=place, most=1)) from None


async def _last(answer: AsyncGenerator[Any, None]) -> ChatResult:
    async with aclosing(answer):
        async for event in answer:
            if isinstance(event, Finished):
                return event.result
    raise EngineFailure("the question ended without a result")


async def _unless_disconnected(raw: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled when the client goes away; None then."""

    async def gone() -> None:
        while (await raw.receive())["type"] != "http.disconnect":
            pass

    answering, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        return await answering if answering.done() else None
    finally:
        await _cancelled(answering, watching)


async def _begun(answer: AsyncGenerator[Any, None]) -> asyncio.Future[Event]:
    """Begin a question: its first event, which may take a while. Errors of the request are raised."""
    await anext(answer)
    first = asyncio.ensure_future(anext(answer))
    try:
        await asyncio.wait({first}, timeout=STATUS_WITHIN)
    except asyncio.CancelledError:
        await _cancelled(first)
        raise
    return first


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what is not done yet, and wait until it has cleaned up."""
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _stream(
    reply: Answering, answer: AsyncGenerator[Any, None], first: asyncio.Future[Event]
) -> AsyncGenerator[str, None]:
    try:
        yield reply.begin()
        event: Event | None = await first
        while event is not None:
            if isinstance(event, Finished):
                error = event.result.error
                if error is not None:
                    yield reply.failed(_words(error), type(error).__name__, _status(error))
                else:
                    for chunk in await asyncio.to_thread(list, reply.end(event.result)):
                        yield chunk
            elif (progress := reply.progress(event)) is not None:
                yield progress
            event = await anext(answer, None)
    except Exception as error:  # the header is out: the reason has no other place
        logger.exception("a stream ended early")
        yield reply.failed(_words(error), type(error).__name__, _status(error))
    finally:
        await _cancelled(first)
        await answer.aclose()


def _words(error: Exception) -> str:
    """What an error says; never nothing."""
    return str(error) or type(error).__name__


def _refusal(result: ChatResult) -> Exception | None:
    """Why a question has no answer that could be sent; None: it has one, or the model was asked at least.

    A question that does not fit, so that nothing was ever sampled, is the client's to change.
    """
    episode = result.episode
    if result.error is not None or episode is None or result.turns or result.answer is not None:
        return result.error
    return LimitError(f"the question does not fit: {episode.detail}; {_REMEDIES[episode.finish]}")


def _status(error: Exception) -> int:
    if isinstance(error, GracefulHTTPError):  # vLLM's own queue is full, …
        return int(error.http_status)
    if isinstance(error, EngineDiedError):
        return 503
    return 400 if isinstance(error, ValueError | VLLMClientError) and not isinstance(error, EngineFailure) else 500


def _name(raw: Request) -> str:
    """What a request is called in the log and in the response: as the client says, or by a name of its own."""
    raw.state.vilavt_name = getattr(raw.state, "vilavt_name", None) or short(
        raw.headers.get("x-request-id") or uuid.uuid4().hex
    )
    return raw.state.vilavt_name


def _error(raw: Request, error: Exception, status: int) -> JSONResponse:
    """The response, and one line in the log: quoted, because a message has words of the client."""
    wait = RETRY if isinstance(error, EngineDiedError) else "1"
    headers = {"Retry-After": wait} if status == 503 else None
    cause = error if status >= 500 and not isinstance(error, BusyError) else None
    logger.warning("request %r: %d %r", _name(raw), status, one_line(error), exc_info=cause)
    metrics().refusals.labels(str(status)).inc()
    body = dialect_of(path_of(raw.scope)).error_body(_words(error), type(error).__name__, status)
    return JSONResponse(body, status, headers)
