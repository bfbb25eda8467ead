"""The protocols in which the loop is asked: what a request is in each, how it is answered, how an error is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from vilavt_core import wire
from vilavt_core.results import ChatResult, Event

from . import messages, responses
from .messages import MessagesReply, MessagesRequest
from .requests import ChatRequest, LoopRequest
from .responses import ResponsesReply, ResponsesRequest

API, RAW = "/v1/", "/v1/raw/"
"""Prefix of the protocols' routes, and that under which a client that runs the loop itself finds them as vLLM made
them."""


class Answering(Protocol):
    """Writes the response to one request, whole or as a stream: `vilavt_core.wire.Reply` and its siblings."""

    id: str

    def whole(self, result: ChatResult) -> dict[str, Any]:
        """The body of a response that is not streamed."""

    def begin(self) -> str:
        """The first lines of a stream."""

    def progress(self, event: Event) -> str | None:
        """Those of an event on the way, if it has any."""

    def end(self, result: ChatResult) -> Iterator[str]:
        """The last ones."""

    def failed(self, message: str, kind: str, code: int) -> str:
        """The last ones of a stream that cannot go on."""


@dataclass(frozen=True)
class Dialect:
    """One protocol."""

    path: str
    """Of its route."""
    request: type[LoopRequest]
    reply: Callable[[LoopRequest, str, Sequence[str], str, Callable[[str], int]], Answering]
    """Makes one of: the request, the model's name, ignored fields, the request's name, a counter of a text's tokens."""
    error_body: Callable[[str, str, int], dict[str, Any]]
    """Of: a message, its class, the status."""
    error_line: Callable[[str, str, int], str]
    """The same at the end of a stream of which nothing else is known."""


def _chat(
    request: LoopRequest, model: str, ignored: Sequence[str], name: str, count: Callable[[str], int]
) -> Answering:
    return wire.Reply(model, ignored, name, include_usage=cast(ChatRequest, request).include_usage)


def _responses(
    request: LoopRequest, model: str, ignored: Sequence[str], name: str, count: Callable[[str], int]
) -> Answering:
    return ResponsesReply(cast(ResponsesRequest, request), model, ignored, name, count)


def _messages(
    request: LoopRequest, model: str, ignored: Sequence[str], name: str, count: Callable[[str], int]
) -> Answering:
    return MessagesReply(model, ignored, name, count)


CHAT = Dialect("/v1/chat/completions", ChatRequest, _chat, wire.error_body, wire.error_line)
RESPONSES = Dialect("/v1/responses", ResponsesRequest, _responses, wire.error_body, responses.responses_error_event)
MESSAGES = Dialect("/v1/messages", MessagesRequest, _messages, messages.messages_error, messages.messages_error_event)
DIALECTS: Mapping[str, Dialect] = {one.path: one for one in (CHAT, RESPONSES, MESSAGES)}
"""By path."""


def dialect_of(path: str) -> Dialect:
    """In which one an error of a route is said: its own, that of the route it belongs to, or chat completions'.

    Args:
        path: of a request, without the root path.
    """
    path = path.replace(RAW, API, 1)
    return next((one for one in DIALECTS.values() if path == one.path or path.startswith(f"{one.path}/")), CHAT)
