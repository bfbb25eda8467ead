"""Requests and responses of ``/v1/chat/completions`` when the loop runs inside the server.

A request is an ordinary chat completion. What this endpoint cannot honour is refused by name or reported as ignored:
`fields` has the rule. The response is an ordinary chat completion with one more field, ``vilavt``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    create_model,
    field_validator,
    model_validator,
)

from vilavt_core.presets import Limits, Sampling, optional_fields
from vilavt_core.regions import PixelBounds

from ..errors import LimitError, RequestError
from . import fields
from .fields import Refusal

TEXT_KINDS, IMAGE_KINDS = ("text", "input_text", "output_text", "refusal"), ("image_url", "input_image")
"""Values of a part's `type`: of Chat Completions, and what the Responses API calls the same."""
_PICTURE = 'send a picture as {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}'
_VIDEO = "videos are not supported yet by this route; send frames as image_url parts"
_OTHER_KINDS = {
    **dict.fromkeys(("image", "image_pil", "image_embeds"), _PICTURE),
    **dict.fromkeys(("video_url", "video", "input_video"), _VIDEO),
    **dict.fromkeys(("input_audio", "audio_url", "audio", "audio_embeds"), "the model does not hear; send text"),
    **dict.fromkeys(("file", "input_file", "document"), "send pages as image_url parts, or their text"),
    **dict.fromkeys(("tool_use", "tool_result", "tool_call"), "the loop calls no functions; send text"),
    **dict.fromkeys(("thinking", "redacted_thinking", "reasoning"), "leave it out: thoughts are not sent back"),
}
"""Kinds of parts that clients send and this route cannot use, and what to send instead."""
MAX_SEED = 2**63
MOST_IGNORED = 100
"""Fields that a response lists as ignored."""


def place(location: tuple[int | str, ...]) -> str:
    """Where a value stands in a request, as ``messages[0].content[1].text``; marks of alternatives are left out."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{fields.short(step)}" for step in location if not _mark(step)]
    return "".join(steps).removeprefix(".") or "body"


def _mark(step: int | str) -> bool:
    return isinstance(step, str) and step.startswith("<")


class Extended(BaseModel):
    """An object that clients extend by fields of their own; see `fields`."""

    model_config = ConfigDict(extra="allow")
    refused: ClassVar[Mapping[str, Refusal]] = {}

    def unused(self, place: str) -> Iterator[tuple[str, str | None]]:
        """See `fields.unused`."""
        yield from fields.unused(place, self.model_extra, self.refused, type(self).model_fields)


class TextPart(Extended):
    """Text of a message."""

    refused = fields.TEXT_PART
    type: str
    text: str

    @model_validator(mode="before")
    @classmethod
    def _normal(cls, value: Any) -> Any:
        """A refusal that an assistant sent is its text."""
        if isinstance(value, str):
            return {"type": "text", "text": value}
        if isinstance(value, dict) and value.get("type") == "refusal" and "refusal" in value:
            value = {**value, "text": value["refusal"]}
            del value["refusal"]
        return {**value, "type": "text"} if isinstance(value, dict) else value


class Bounds(Extended):
    """Bounds on the area of a picture as the encoder sees it, in pixels; Qwen's clients write them."""

    refused = fields.IMAGE_PART
    min_pixels: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_pixels: float | None = Field(None, gt=0, allow_inf_nan=False)


class ImageUrl(Bounds):
    """Where a picture is."""

    url: str


class ImagePart(Bounds):
    """A picture of a message. Bounds may stand beside `image_url` or in it."""

    type: str
    image_url: ImageUrl

    @model_validator(mode="before")
    @classmethod
    def _normal(cls, value: Any) -> Any:
        """The URL may stand for the object."""
        if isinstance(value, dict) and isinstance(value.get("image_url"), str):
            value = {**value, "image_url": {"url": value["image_url"]}}
        return {**value, "type": "image_url"} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_bound(self) -> ImagePart:
        for name in ("min_pixels", "max_pixels"):
            beside, within = getattr(self, name), getattr(self.image_url, name)
            if None not in (beside, within) and beside != within:
                raise ValueError(f"{name} is {beside:g} beside image_url and {within:g} in it; say it once")
        low, high = self.bounds.min_pixels, self.bounds.max_pixels
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_pixels {low:g} is above max_pixels {high:g}; lower the first or raise the second")
        return self

    @property
    def bounds(self) -> PixelBounds:
        """What was said of its size."""
        return PixelBounds(
            self.image_url.min_pixels if self.min_pixels is None else self.min_pixels,
            self.image_url.max_pixels if self.max_pixels is None else self.max_pixels,
        )

    def unused(self, place: str) -> Iterator[tuple[str, str | None]]:
        """See `fields.unused`."""
        yield from super().unused(place)
        yield from self.image_url.unused(f"{place}.image_url")


def _kind_of_part(value: Any) -> str:
    if isinstance(value, str):
        return "<text>"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind is None and isinstance(value, dict):  # clients of vLLM leave it out
        kind = next((kind for kind in ("text", "image_url") if kind in value), None)
    return "<text>" if kind in TEXT_KINDS else "<image>" if kind in IMAGE_KINDS else "<other>"


def _refuse_part(value: Any) -> Any:
    """Name what is wrong with a part that is neither text nor a picture."""
    if not isinstance(value, dict):
        raise ValueError(f"a part is an object or a text, this is {_json_kind(value)}")
    kind = value.get("type")
    if kind is None:
        raise ValueError("type is missing, it must be text or image_url")
    if not isinstance(kind, str):
        raise ValueError(f"type is {_json_kind(kind)}, it must be text or image_url")
    instead = _OTHER_KINDS.get(kind, "known are text and image_url")
    raise ValueError(f"type {fields.short(repr(kind))} is not supported: {instead}")


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image>")]
    | Annotated[Any, BeforeValidator(_refuse_part), Tag("<other>")],
    Discriminator(_kind_of_part),
]


def _kind_of_content(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else "<other>"


def _refuse_content(value: Any) -> Any:
    raise ValueError(f"it is {_json_kind(value)}, it must be a text or a list of parts")


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[ContentPart], Tag("<parts>")]
    | Annotated[Any, BeforeValidator(_refuse_content), Tag("<other>")],
    Discriminator(_kind_of_content),
]

ROLES = ("system", "developer", "user", "assistant")


class ChatMessage(Extended):
    """One message; assistant messages may carry what we sent back with them."""

    refused = fields.MESSAGE
    role: str
    content: Content = ""

    @model_validator(mode="before")
    @classmethod
    def _normal(cls, value: Any) -> Any:
        """An assistant that said nothing has null, or no content."""
        if isinstance(value, dict) and value.get("role") == "assistant" and value.get("content") is None:
            return {**value, "content": ""}
        if isinstance(value, dict) and "role" in value and "content" not in value:
            return {**value, "content": None}
        return value

    @field_validator("role")
    @classmethod
    def _known(cls, role: str) -> str:
        if role in ROLES:
            return role
        if role in ("tool", "function"):
            instead = "the loop calls no functions; send what one returned as the user"
        else:
            instead = f"known are {', '.join(ROLES)}"
        raise ValueError(f"role {fields.short(repr(role))} is not supported: {instead}")

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content, always as a list."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """All text, parts on lines of their own."""
        return "\n".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> list[SentPicture]:
        """The pictures, in order."""
        return [SentPicture(part.image_url.url, part.bounds) for part in self.parts if isinstance(part, ImagePart)]

    def unused(self, place: str) -> Iterator[tuple[str, str | None]]:
        """See `fields.unused`."""
        yield from super().unused(place)
        for number, part in enumerate(self.parts):
            yield from part.unused(f"{place}.content[{number}]")


RequestLimits = create_model(
    "RequestLimits",
    __config__=ConfigDict(extra="forbid"),
    __doc__="Budgets of one request; each at most the server's.",
    **optional_fields(Limits, per_request=True),
)

_RequestSampling = create_model("_RequestSampling", **optional_fields(Sampling, per_request=True))


class StreamOptions(Extended):
    """`include_usage` asks for a last chunk with the usage."""

    include_usage: bool | None = None


class ChatRequest(_RequestSampling, Extended):  # type: ignore[valid-type, misc]
    """Body of ``POST /v1/chat/completions``: these fields and those of `Sampling`."""

    refused = fields.REQUEST
    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    """vLLM's clients say -1 for off."""
    seed: int | None = Field(None, ge=-MAX_SEED, lt=MAX_SEED)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    vilavt: RequestLimits | None = None  # type: ignore[valid-type]

    def ignored(self) -> tuple[str, ...]:
        """Fields that were accepted and have no effect: for ``vilavt.ignored`` of the response. See `fields`.

        Raises:
            RequestError: a field would change the answer and cannot be honoured; names it.
        """
        found: list[str] = []
        objects: list[tuple[str, Extended]] = [("", self)]
        objects += [(f"messages[{number}]", message) for number, message in enumerate(self.messages)]
        objects += [] if self.stream_options is None else [("stream_options", self.stream_options)]
        for place, one in objects:
            for name, refusal in one.unused(place):
                if refusal is not None:
                    raise RequestError(refusal)
                found.append(name)
        more = len(found) - MOST_IGNORED
        return (*found[:MOST_IGNORED], *([f"… and {more} more"] if more > 0 else []))

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

    def check_bounds(self, limits: Limits) -> None:
        """Hold the bounds of single pictures to those of the request.

        Raises:
            LimitError: one is outside; names it.
        """
        for number, message in enumerate(self.messages):
            for at, part in enumerate(message.parts):
                if not isinstance(part, ImagePart):
                    continue
                for name, value in asdict(part.bounds).items():
                    if value is not None and not limits.min_pixels <= value <= limits.max_pixels:
                        raise LimitError(
                            f"messages[{number}].content[{at}].{name} is {value:.0f}, this request allows "
                            f"{limits.min_pixels:.0f} to {limits.max_pixels:.0f}; ask for a value between them"
                        )


@dataclass(frozen=True)
class SentPicture:
    """A picture of a request, not loaded yet."""

    url: str
    bounds: PixelBounds = PixelBounds()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class Exchange:
    """One question of a conversation, and the answer the client says it got."""

    images: tuple[SentPicture, ...]
    question: str
    answer: str | None = None


def exchanges(messages: list[ChatMessage]) -> list[Exchange]:
    """The conversation as questions and answers; the last one has no answer yet.

    Messages in a row that belong to one side are joined, a blank line between them: everything between two answers is
    one question, and messages of an assistant in a row are one answer. System and developer messages are part of the
    question they stand before or in: the model's own instructions come from the checkpoint.

    Raises:
        RequestError: a question without a message of the user, a picture where there can be none, or nothing to answer.
    """
    out: list[Exchange] = []
    for is_answer, side in groupby(enumerate(messages), key=lambda item: item[1].role == "assistant"):
        numbers, said = zip(*side, strict=True)
        for number, message in zip(numbers, said, strict=True):
            if message.images and message.role != "user":
                raise RequestError(f"messages[{number}]: a message of the role {message.role} holds no image")
        text = "\n\n".join(message.text for message in said if message.text)
        if not is_answer:
            if all(message.role != "user" for message in said):
                raise RequestError(
                    f"messages[{numbers[-1]}] has the role {said[-1].role!r}, a message of the user must be beside it"
                )
            out.append(Exchange(tuple(image for message in said for image in message.images), text))
        elif out:
            out[-1] = replace(out[-1], answer=text)
        else:
            raise RequestError(f"messages[{numbers[0]}] has the role 'assistant', the first question is the user's")
    if out[-1].answer is not None:
        raise RequestError("the last message is the assistant's, it must be the user's")
    return out


def _json_kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
