"""Who gets through to a route: whoever has the key, and nobody who comes while the server is being stopped.

vLLM's own check of keys knows four prefixes of paths, and its server stops the engine first thing after a signal, which
leaves a question of several turns without its next one. Here the rule is the other way round: every route is closed
except `OPEN`, and the engine is stopped when the last answer is out or the time for it is over.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import KeyMissingError, StoppingError
from .dialects import dialect_of

logger = logging.getLogger(__name__)

OPEN = ("/health", "/ping", "/metrics")
"""Routes that need no key and answer until the end: what watches a server asks them."""
SAYING, STOPPING, CLOSING = 2.0, 5.0, 2.0
"""Seconds beyond the time for running requests: to tell what is left why it ends, for the engine to end, and for
connections to close. Together below the 10 s after which those who run servers kill them."""
RETRY = "5"
"""Seconds after which another server may be expected to answer at this address."""


def path_of(scope: Scope) -> str:
    """The path of a request, without the root path."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def is_open(scope: Scope) -> bool:
    """Whether a request is for one of `OPEN`."""
    path = path_of(scope)
    return path in OPEN or path.startswith("/metrics/")


class Draining:
    """Whether the server is being stopped, and which requests are not finished."""

    def __init__(self) -> None:
        self.begun = False
        self.seconds = 0.0
        """That running requests get."""
        self._running: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._running)

    def enter(self, patience: asyncio.Timeout) -> None:
        """A request has begun, inside this time-out."""
        self._running.add(patience)
        self._idle.clear()

    def leave(self, patience: asyncio.Timeout) -> None:
        """It has ended."""
        self._running.discard(patience)
        if not self._running:
            self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Let no request begin any more, and return when all have ended; `seconds` from now they are ended."""
        self.begun, self.seconds = True, seconds
        logger.warning("stopping: %d requests are running, they have %g s", len(self), seconds)
        deadline = asyncio.get_running_loop().time() + seconds
        for patience in self._running:
            patience.reschedule(deadline)
        try:
            async with asyncio.timeout(seconds + SAYING):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("stopping: %d requests did not end after %g s", len(self), seconds)

    def reason(self) -> StoppingError:
        """Why a request that was running ends."""
        return StoppingError(
            f"this server is being stopped, and the request did not end within {self.seconds:g} s "
            "(--shutdown-timeout); send it again"
        )


class DrainingEngine:
    """An engine client that stops when the running requests have ended; everything else is the client's.

    vLLM's server calls `shutdown` of the client that it finds on its application's state, in a thread, once it is told
    to stop. It goes on to answer requests meanwhile.

    Args:
        engine: vLLM's client.
        draining: the requests.
        state: of the application; `serve_http` puts its ``server`` there.
    """

    def __init__(self, engine: Any, draining: Draining, state: Any) -> None:
        self._engine, self._draining, self._state = engine, draining, state
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def shutdown(self, timeout: float | None = None) -> None:
        """Wait at most `timeout` seconds for running requests, then stop the engine. Not for the loop's thread."""
        seconds, begun = float(timeout or 0), time.monotonic()
        server = getattr(self._state, "server", None)
        if server is not None and server.config.timeout_graceful_shutdown is None:
            server.config.timeout_graceful_shutdown = CLOSING  # else one client that does not read keeps it for ever
        asyncio.run_coroutine_threadsafe(self._draining.drain(seconds), self._loop).result()
        self._engine.shutdown(timeout=max(STOPPING, seconds - (time.monotonic() - begun)))


class Gate:
    """Middleware around all routes.

    Args:
        app: what it lets requests through to.
        draining: counts them.
        keys: one of them opens; none: no key is needed.
    """

    def __init__(self, app: ASGIApp, draining: Draining, keys: Sequence[str] = ()) -> None:
        self.app, self.draining, self.keys = app, draining, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS" or is_open(scope):
            await self.app(scope, receive, send)
        elif not self._has_key(scope):
            missing = KeyMissingError("this route needs a key of the server: Authorization: Bearer KEY (--api-key)")
            await _response(scope, missing, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        elif self.draining.begun:
            stopping = StoppingError("this server is being stopped; send the request again, to another one or later")
            await _response(scope, stopping, 503, {"Retry-After": RETRY})(scope, receive, send)
        else:
            await self._let_through(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        fits = [secrets.compare_digest(key, one) for one in self.keys]  # all of them: the time tells nothing
        return not fits or (scheme.lower() == b"bearer" and any(fits))

    async def _let_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carry a request out. If the time is over before it ends, it is cancelled and told why."""
        patience = asyncio.timeout(None)
        start, whole = None, False

        async def pass_on(message: Message) -> None:
            nonlocal start, whole
            if patience.expired():  # what a cancelled handler says is not the reason
                return
            await send(message)
            if message["type"] == "http.response.start":
                start = message
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            async with patience:
                self.draining.enter(patience)
                await self.app(scope, receive, pass_on)
        except Exception:
            if not patience.expired():
                raise
        finally:
            if patience.expired() and not whole and scope["type"] == "http":
                await self._end(start, scope, receive, send)
            self.draining.leave(patience)

    async def _end(self, start: Message | None, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell a request why it ends, after as much of its response as was sent."""
        reason = self.draining.reason()
        if start is None:
            await _response(scope, reason, 503, {"Retry-After": RETRY})(scope, receive, send)
        elif dict(start["headers"]).get(b"content-type", b"").startswith(b"text/event-stream"):
            last = dialect_of(path_of(scope)).error_line(str(reason), type(reason).__name__, 503)
            await send({"type": "http.response.body", "body": last.encode(), "more_body": False})


def _response(scope: Scope, error: Exception, status: int, headers: dict[str, str] | None = None) -> JSONResponse:
    body = dialect_of(path_of(scope)).error_body(str(error), type(error).__name__, status)
    return JSONResponse(body, status, headers)
