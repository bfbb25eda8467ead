"""Requests and responses of ``/v1/chat/completions`` when the loop runs inside the server.

A request is an ordinary chat completion. Fields that this endpoint cannot honour are refused by name instead of being
ignored. The response is an ordinary chat completion with one more field, ``vilavt``.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from vilavt_core.conversation import Turn
from vilavt_core.presets import Limits, Sampling, optional_fields
from vilavt_core.protocol import FinishReason, ToolCall
from vilavt_core.results import (
    ChatResult,
    CropsEvent,
    Event,
    RefusedEvent,
    TextDelta,
    ToolCallEvent,
)

from ..errors import LimitError, RequestError


class TextPart(BaseModel):
    """Text of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    """Where a picture is; `detail` is accepted and has no effect."""

    model_config = ConfigDict(extra="forbid")
    url: str
    detail: str | None = None


class ImagePart(BaseModel):
    """A picture of a message."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    """One message; assistant messages may carry what we sent back with them."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart | ImagePart]

    @property
    def text(self) -> str:
        """All text, parts on lines of their own."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        """URLs of the pictures, in order."""
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


RequestLimits = create_model(
    "RequestLimits",
    __config__=ConfigDict(extra="forbid"),
    __doc__="Budgets of one request; each at most the server's.",
    **optional_fields(Limits, per_request=True),
)

_RequestSampling = create_model("_RequestSampling", **optional_fields(Sampling, per_request=True))


class StreamOptions(BaseModel):
    """`include_usage` asks for a last chunk with the usage."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class ChatRequest(_RequestSampling):  # type: ignore[valid-type, misc]
    """Body of ``POST /v1/chat/completions``: these fields and those of `Sampling`."""

    model_config = ConfigDict(extra="allow")
    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(None, ge=-1)
    """vLLM's clients say -1 for off."""
    seed: int | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    vilavt: RequestLimits | None = None  # type: ignore[valid-type]

    def refuse_unknown(self) -> None:
        """Fields that would change the answer and cannot be honoured.

        Raises:
            RequestError: names them.
        """
        harmless = {"user": None, "metadata": None, "store": False, "service_tier": None, "safety_identifier": None}
        defaults = {"n": 1, "logprobs": False, "stop": [], "presence_penalty": 0, "frequency_penalty": 0, "tools": []}
        defaults |= {"response_format": {"type": "text"}, "parallel_tool_calls": True, "tool_choice": "none"}
        for name, value in (self.model_extra or {}).items():
            if value is None or name in harmless or (name in defaults and value == defaults[name]):
                continue
            raise RequestError(
                f"{name}={_short(value)} is not supported here, where the server runs the model's zoom loop; leave it "
                "out, or run the loop yourself against /v1/raw/chat/completions"
            )

    def sampling(self, default: Sampling) -> Sampling:
        """The server's sampling with this request's changes."""
        wanted: dict[str, Any] = {name: getattr(self, name) for name in _RequestSampling.model_fields}
        changes = {name: value for name, value in wanted.items() if value is not None}
        if "top_k" in changes:
            changes["top_k"] = max(0, changes["top_k"])
        return replace(default, **changes)

    def limits(self, server: Limits) -> Limits:
        """The server's limits with this request's tighter ones.

        Raises:
            LimitError: one is above the server's.
        """
        wanted: dict[str, Any] = {} if self.vilavt is None else self.vilavt.model_dump(exclude_none=True)
        tokens = self.max_completion_tokens or self.max_tokens
        if tokens is not None:
            wanted.setdefault("max_new_tokens_per_turn", min(tokens, server.max_new_tokens_per_turn))
        for name, value in wanted.items():
            most = getattr(server, name)
            if most is None and name == "crop_max_pixels":
                most = server.max_pixels
            if most is not None and value > most:
                raise LimitError(f"vilavt.{name} is {value:.0f}, this server allows at most {most:.0f}; ask for less")
        return replace(server, **wanted)


@dataclass(frozen=True)
class Exchange:
    """One question of a conversation, and the answer the client says it got."""

    images: tuple[str, ...]
    question: str
    answer: str | None = None


def exchanges(messages: list[Message]) -> list[Exchange]:
    """The conversation as questions and answers; the last one has no answer yet.

    A system message stands in front of the first question: the model's own instructions come from the checkpoint.

    Raises:
        RequestError: not user and assistant in turn, ending with the user.
    """
    rest = list(messages)
    system = [rest.pop(0).text] if rest[0].role == "system" else []
    out: list[Exchange] = []
    for place, message in enumerate(rest):
        wanted = "user" if place % 2 == 0 else "assistant"
        if message.role != wanted:
            raise RequestError(
                f"message {place + len(system)} has role {message.role!r}, expected {wanted!r}: after an optional "
                "system message, user and assistant take turns"
            )
        if message.role == "user":
            out.append(
                Exchange(tuple(message.images), "\n\n".join([*system, message.text]) if not out else message.text)
            )
        elif message.images:
            raise RequestError(f"message {place + len(system)}: an assistant message holds no image")
        else:
            out[-1] = replace(out[-1], answer=message.text)
    if not out or out[-1].answer is not None:
        raise RequestError("the last message must be the user's")
    return out


class Thoughts:
    """The text between ``<think>`` and ``</think>`` of one turn, as it arrives."""

    OPEN, CLOSE = "<think>", "</think>"

    def __init__(self) -> None:
        self._text = ""
        self._inside = False
        self._done = False

    def feed(self, text: str) -> str:
        """What the new text adds to the thoughts; the beginning of a tag is kept back."""
        if self._done:
            return ""
        self._text += text
        if not self._inside:
            start = self._text.find(self.OPEN)
            if start < 0:
                return ""
            self._inside, self._text = True, self._text[start + len(self.OPEN) :]
        end = self._text.find(self.CLOSE)
        if end >= 0:
            self._done = True
            return self._text[:end]
        keep = next((n for n in range(len(self.CLOSE) - 1, 0, -1) if self._text.endswith(self.CLOSE[:n])), 0)
        out, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
        return out


def thoughts_of(turns: tuple[Turn, ...]) -> str:
    """Thoughts of all turns, one line each."""
    return "\n".join(thought for turn in turns if (thought := Thoughts().feed(turn.text)))


def finish_reason(result: ChatResult) -> str:
    """``stop`` if there is an answer or nothing more was to come, ``length`` if a budget ended it."""
    budgets = (FinishReason.LENGTH, FinishReason.TURN_LIMIT, FinishReason.IMAGE_LIMIT, FinishReason.CONTEXT_LIMIT)
    return "length" if result.answer is None and result.finish in budgets else "stop"


def call_json(turn: int, call: ToolCall) -> dict[str, Any]:
    """A zoom request."""
    regions = [{"image": region.index, "box": list(region.box)} for region in call.regions]
    return {"type": "zoom", "turn": turn, "query": call.query, "regions": regions}


def crops_json(turn: int, views: Any, indices: Any) -> dict[str, Any]:
    """The images that a zoom showed: their size in pixels, and which part of which source they are (0 to 1)."""
    crops = [
        {
            "image": index,
            "width": view.image.width,
            "height": view.image.height,
            "source": view.source,
            "region": [round(v, 6) for v in view.region],
        }
        for view, index in zip(views, indices, strict=True)
    ]
    return {"type": "crops", "turn": turn, "crops": crops}


def event_json(event: Event) -> dict[str, Any] | None:
    """What a stream chunk's ``vilavt`` field says about an event; None for the others."""
    if isinstance(event, ToolCallEvent):
        return call_json(event.turn, event.call)
    if isinstance(event, CropsEvent):
        return crops_json(event.turn, event.views, event.image_indices)
    if isinstance(event, RefusedEvent):
        return {"type": "refused", "turn": event.turn, "problem": event.problem}
    return None


def summary(result: ChatResult) -> dict[str, Any]:
    """The ``vilavt`` field of a response: how it ended, and what was looked at."""
    events: list[dict[str, Any]] = []
    for turn in result.turns:
        if isinstance(turn.action, ToolCall):
            events.append(call_json(turn.index, turn.action))
            if turn.views:
                events.append(crops_json(turn.index, turn.views, turn.image_indices))
        if turn.problem is not None:
            events.append({"type": "refused", "turn": turn.index, "problem": turn.problem})
    episode = result.episode
    return {
        "finish": result.finish,
        "detail": "" if episode is None else episode.detail,
        "turns": len(result.turns),
        "images": len(result.views),
        "events": events,
        "provenance": result.provenance.to_json(),
    }


@dataclass(frozen=True)
class Usage:
    """Tokens over all turns of a question."""

    prompt: int
    cached: int
    sampled: int

    def to_json(self) -> dict[str, Any]:
        """As the API names them."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.sampled,
            "total_tokens": self.prompt + self.sampled,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Reply:
    """Builds the response, whole or in chunks."""

    def __init__(self, model: str) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._turn = -1
        self._thoughts = Thoughts()
        self._thought_turns: list[int] = []

    def whole(self, result: ChatResult, usage: Usage) -> dict[str, Any]:
        """The response to a request that does not stream."""
        message = {"role": "assistant", "content": result.answer or "", "reasoning_content": thoughts_of(result.turns)}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason(result), "logprobs": None}
        body = {**self.head, "object": "chat.completion", "choices": [choice]}
        return body | {"usage": usage.to_json(), "vilavt": summary(result)}

    def begin(self) -> str:
        """The first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def progress(self, event: Event) -> str | None:
        """The chunk of an event on the way, if it has one: thoughts as their text arrives, zooms, crops, refusals.

        The answer is not among them: it is sent by :meth:`end`, when it is certain.
        """
        if not isinstance(event, TextDelta):
            data = event_json(event)
            return None if data is None else self._chunk({}, vilavt=data)
        if event.turn != self._turn:
            self._turn, self._thoughts = event.turn, Thoughts()
        text = self._thoughts.feed(event.text)
        if not text:
            return None
        if event.turn not in self._thought_turns:
            self._thought_turns.append(event.turn)
            text = "\n" * (len(self._thought_turns) > 1) + text
        return self._chunk({"reasoning_content": text})

    def end(self, result: ChatResult, usage: Usage, *, include_usage: bool) -> Iterator[str]:
        """The last chunks."""
        if result.answer is not None:
            yield self._chunk({"content": result.answer})
        yield self._chunk({}, finish_reason(result), vilavt={"type": "end", **summary(result)})
        if include_usage:
            yield _event({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage.to_json()})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event({**self.head, "object": "chat.completion.chunk", "choices": [choice], **more})


def error_json(message: str, kind: str, code: int) -> dict[str, Any]:
    """An error as OpenAI's API words it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_event(message: str, kind: str, code: int) -> str:
    """An error in the middle of a stream."""
    return _event(error_json(message, kind, code))


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
