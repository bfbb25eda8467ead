"""Requests and responses of ``/v1/chat/completions`` when the loop runs inside the server.

A request is an ordinary chat completion. Fields that this endpoint cannot honour are refused by name instead of being
ignored. The response is an ordinary chat completion with one more field, ``vilavt``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from vilavt_core.presets import Limits, Sampling, optional_fields

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


class ChatMessage(BaseModel):
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
    messages: list[ChatMessage] = Field(min_length=1)
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


def exchanges(messages: list[ChatMessage]) -> list[Exchange]:
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


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
