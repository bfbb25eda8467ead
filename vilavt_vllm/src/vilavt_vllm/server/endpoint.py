"""The plug-in that vLLM's OpenAI server loads (entry point group ``vllm.endpoint_plugins``).

vLLM lets a plug-in's route replace one of its own with the same path: ``POST /v1/chat/completions`` becomes the loop,
and vLLM's handler moves to ``/v1/raw/chat/completions``, so that ``/v1/raw`` is the base URL of a client that loops
itself. Everything else (models, health, metrics, keys, shutdown) stays vLLM's.
"""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError

from vilavt_core.driver import Driver
from vilavt_core.errors import VilavtError
from vilavt_core.images import ImageLimits
from vilavt_core.pages import render
from vilavt_core.presets import Limits
from vilavt_core.protocol import Answer, format_turn
from vilavt_core.results import ChatResult, Event, Finished, Sample
from vilavt_core.settings import read_chat_settings
from vilavt_core.validation import dotted, problems
from vilavt_core.wire import SETTINGS_PATH, Reply, error_body, error_line, settings_body

from .. import compat
from ..episodes import settings_of_engine
from ..errors import BusyError, EngineFailure, RequestError
from ..online import AsyncVilavtLLM
from .history import History
from .media import Pictures
from .metrics import metrics
from .options import ServerOptions
from .requests import ChatRequest, Exchange, exchanges

compat.require_server()  # `vllm serve` finds this module by itself, whatever its version
from vllm.exceptions import GracefulHTTPError, VLLMClientError  # noqa: E402

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask

logger = logging.getLogger(__name__)

PATH, MODELS, SETTINGS = "/v1/chat/completions", "/v1/models", f"/v1{SETTINGS_PATH}"
TEMPLATES = Path(__file__).parent / "templates"
RAW = "/v1/raw/"
"""Prefix under which a client that runs the loop itself finds both as vLLM made them."""


class Loop:
    """The state behind the route: an engine client, what is remembered, and what is allowed."""

    def __init__(self, engine: EngineClient, state: Any, options: ServerOptions) -> None:
        config: Any = engine.model_config
        self.options = options
        image_limits = ImageLimits(max_bytes=options.max_image_bytes, max_pixels=options.max_image_pixels)
        settings = settings_of_engine(
            config,
            preset=options.preset,
            prompts=options.prompts,
            seed=options.seed,
            image_limits=image_limits,
            device=str(getattr(getattr(getattr(state, "vllm_config", None), "device_config", None), "device_type", "")),
        )
        settings = replace(settings, limits=replace(settings.limits, **options.limits))
        self.llm = AsyncVilavtLLM(engine, settings)
        self.models = state.openai_serving_models
        self.pictures = Pictures(config, image_limits, settings.preset.rules)
        self.history = History(options.max_conversations, options.max_conversation_bytes)
        self.running = 0
        found = read_chat_settings(config.model, hub={"revision": config.revision})
        self.note = found.note if found else ""

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Any, None]:
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
        metrics().running.inc()
        driver, finish = None, "aborted"
        try:
            try:
                driver, talk = await self._driver(request)
            except Exception:
                finish = "refused"
                raise
            yield driver
            async with aclosing(self.llm.events(driver)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        finish = event.result.finish
                        if event.result.answer is not None:
                            self.history.keep([*talk[:-1], replace(talk[-1], answer=event.result.answer)], driver)
                    yield event
        finally:
            self.running -= 1
            metrics().running.dec()
            metrics().finished(driver, finish)

    async def _driver(self, request: ChatRequest) -> tuple[Driver, list[Exchange]]:
        """The question of a request, ready to be carried out, and the conversation it belongs to."""
        request.refuse_unknown()
        settings = self.llm.settings
        limits, sampling = request.limits(settings.limits), request.sampling(settings.sampling)
        talk = exchanges(request.messages)
        count = sum(len(exchange.images) for exchange in talk)
        if count > limits.max_images:
            raise RequestError(f"the request has {count} images, at most {limits.max_images} are allowed")
        *past, last = talk
        before = self.history.find(past) if past else None
        if past:
            metrics().follow_ups.labels("rebuilt" if before is None else "kept").inc()
        if past and before is None:
            before = await self._rebuild(past, limits)
        images = [await self.pictures.load(url) for url in last.images]
        sample = Sample(images, last.question, seed=request.seed, limits=limits)
        if before is None:
            return Driver(sample, settings, name="request", stream=request.stream, sampling=sampling), talk
        return await self.llm.follow_up(before, sample, stream=request.stream, sampling=sampling), talk

    async def _rebuild(self, past: list[Exchange], limits: Limits) -> Driver:
        """A conversation whose token stream was not kept: questions and answers as the client sent them, no zooms."""
        driver: Driver | None = None
        for exchange in past:
            images = [await self.pictures.load(url) for url in exchange.images]
            sample = Sample(images, exchange.question, limits=limits)
            driver = await asyncio.get_running_loop().run_in_executor(
                self.llm.worker, self._replay, driver, sample, exchange
            )
        assert driver is not None
        return driver

    def _replay(self, before: Driver | None, sample: Sample, exchange: Exchange) -> Driver:
        """A question with the answer that the client says it got, without the model."""
        settings = self.llm.settings
        driver = Driver(sample, settings, name="request") if before is None else before.follow_up(sample)
        driver.start()
        if driver.request is not None:
            driver.take_text(format_turn(Answer(exchange.answer or "")))
        if driver.result.error is not None:
            raise driver.result.error
        if not driver.result.turns:
            raise RequestError(f"an earlier question of the conversation cannot be asked here: {driver.result.finish}")
        return driver


class VilavtEndpoint:
    """See vLLM's `EndpointPlugin`."""

    name = "vilavt_loop"
    required_tasks: tuple[SupportedTask, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Put the loop in place of vLLM's chat completions, and theirs beside it."""
        for route in list(app.routes):
            if isinstance(route, APIRoute) and route.path in (PATH, MODELS):
                raw = route.path.replace("/v1/", RAW, 1)
                app.add_api_route(raw, route.endpoint, methods=[*route.methods], dependencies=route.dependencies)
        app.add_api_route(PATH, chat_completions, methods=["POST"], response_model=None)
        app.add_api_route(SETTINGS, settings, methods=["GET"], response_model=None)
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


async def settings(raw: Request) -> Response:
    """What answers depend on besides the question: evaluations record it, and compare it before they resume."""
    loop: Loop | None = raw.app.state.vilavt_loop
    if loop is None:
        return _error(EngineFailure("this server has no engine"), 501)
    provenance = loop.llm.settings.provenance(loop.options.seed)
    return JSONResponse(settings_body(loop.models.model_name(), provenance, loop.note))


async def front_page(raw: Request) -> Response:
    """What this server is, and how it is asked: for whoever opens its address in a browser."""
    loop: Loop | None = raw.app.state.vilavt_loop
    model, note = ("", "") if loop is None else (loop.models.model_name(), loop.note)
    url = f"{str(raw.base_url).rstrip('/')}/v1"
    return HTMLResponse(render("front.html", TEMPLATES, title="vilavt-serve", model=model, note=note, url=url))


async def chat_completions(raw: Request) -> Response:
    """Answer a chat completion with the model's own zoom loop."""
    loop: Loop | None = raw.app.state.vilavt_loop
    if loop is None:
        return _error(EngineFailure("this server has no engine"), 501)
    try:
        request = await _parsed(raw, loop.options)
        if request.model is not None and not loop.models.is_base_model(request.model):
            return _error(RequestError(f"no model {request.model!r} here; GET /v1/models lists them"), 404)
        reply = Reply(request.model or loop.models.model_name())
        answer = loop.answer(request)
        if request.stream:
            await anext(answer)
            first = await anext(answer)
            if isinstance(first, Finished) and first.result.error is not None:  # still gets a status code
                await answer.aclose()
                return _error(first.result.error, _status(first.result.error))
            usage = bool(request.stream_options and request.stream_options.include_usage)
            return StreamingResponse(
                _stream(raw, reply, answer, first, usage),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        finished = await _unless_disconnected(raw, _last(answer))
    except BusyError as error:
        return _error(error, 503, {"Retry-After": "1"})
    except (VilavtError, ValueError) as error:
        return _error(error, 400)
    if finished is None:
        return Response(status_code=499)  # nobody is there to read it
    if finished.error is not None:
        return _error(finished.error, _status(finished.error))
    return JSONResponse(reply.whole(finished))


async def _parsed(raw: Request, options: ServerOptions) -> ChatRequest:
    kind = raw.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"Content-Type is {kind or 'missing'!r}, it must be application/json")
    body = bytearray()
    async for chunk in raw.stream():
        body += chunk
        if len(body) > options.max_body_bytes:
            raise RequestError(
                f"the body is larger than {options.max_body_bytes} bytes; send smaller pictures, or raise it with "
                "--max-body-bytes"
            )
    try:
        return ChatRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        raise RequestError(problems(error, name=lambda place: dotted(place) or "body", most=1)) from None


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
        for task in (answering, watching):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _stream(
    raw: Request, reply: Reply, answer: AsyncGenerator[Any, None], first: Event, include_usage: bool
) -> AsyncIterator[str]:
    async with aclosing(answer):
        event: Event | None = first
        yield reply.begin()
        while event is not None:
            if isinstance(event, Finished):
                error = event.result.error
                if error is not None:
                    yield error_line(str(error), type(error).__name__, _status(error))
                    yield "data: [DONE]\n\n"
                else:
                    for chunk in reply.end(event.result, include_usage=include_usage):
                        yield chunk
            elif (progress := reply.progress(event)) is not None:
                yield progress
            if await raw.is_disconnected():
                return
            event = await anext(answer, None)


def _status(error: Exception) -> int:
    if isinstance(error, GracefulHTTPError):  # vLLM's own queue is full, …
        return int(error.http_status)
    return 400 if isinstance(error, ValueError | VLLMClientError) and not isinstance(error, EngineFailure) else 500


def _error(error: Exception, status: int, headers: dict[str, str] | None = None) -> JSONResponse:
    if status >= 500:
        logger.error("%s: %s", type(error).__name__, error, exc_info=error)
    return JSONResponse(error_body(str(error), type(error).__name__, status), status, headers)
