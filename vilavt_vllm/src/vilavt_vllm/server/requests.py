"""Requests to the loop inside the server: what those of all protocols share, and those of ``/v1/chat/completions``.

What the server cannot honour is refused by name or reported as ignored: `fields` has the rule. A response is an
ordinary one of its protocol with one more field, ``vilavt``. The other protocols are `responses` and `messages`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from vilavt_core.sources import Rule

from ..errors import LimitError, RequestError
from . import fields
from .fields import Refusal

TEXT_KINDS, IMAGE_KINDS = ("text", "input_text", "output_text", "refusal"), ("image_url", "input_image")
VIDEO_KINDS = ("video_url", "video", "input_video")
"""Values of a part's `type`: of Chat Completions, and what the Responses API calls the same."""
_PICTURE = 'send an image as {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}'
_OTHER_KINDS = {
    **dict.fromkeys(("image", "image_pil", "image_embeds"), _PICTURE),
    **dict.fromkeys(("input_audio", "audio_url", "audio", "audio_embeds"), "the model does not hear; send text"),
    **dict.fromkeys(("file", "input_file", "document"), "send pages as image_url parts, or their text"),
    **dict.fromkeys(("tool_use", "tool_result", "tool_call"), "the loop calls no functions; send text"),
    **dict.fromkeys(("thinking", "redacted_thinking", "reasoning"), "leave it out: thoughts are not sent back"),
}
"""Kinds of parts that clients send and this route cannot use, and what to send instead."""
MAX_INTEGER = 2**63
"""Integers are below it, and not below its negative."""
MOST_IGNORED = 100
"""Fields that a response lists as ignored."""


FRAME_NAMES = ("num_frames", "nframes", "nframe")
"""Of vLLM's and Qwen's clients, for `Frames.frames`."""
JPEG_FRAMES = "data:video/jpeg;base64,"
"""Before the frames of a video as JPEG files in base64, commas between them: clients of vLLM send them so."""


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
        yield from fields.unused(place, self.model_extra, self.refused, self.known())

    @classmethod
    def known(cls) -> tuple[str, ...]:
        """Names of fields that are honoured."""
        return tuple(cls.model_fields)


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


class LeftOutPart(Extended):
    """A part that is accepted and not used: thoughts that come back from a client."""

    type: str

    def unused(self, place: str) -> Iterator[tuple[str, str | None]]:
        """See `fields.unused`: all of it."""
        yield place, None


class Bounds(Extended):
    """Bounds on the area of an image as the encoder sees it, in pixels; Qwen's clients write them."""

    refused = fields.IMAGE_PART
    min_pixels: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_pixels: float | None = Field(None, gt=0, allow_inf_nan=False)

    @property
    def bounds(self) -> PixelBounds:
        """What was said of its size."""
        return PixelBounds(self.min_pixels, self.max_pixels)

    def check_order(self) -> None:
        """Refuse bounds between which there is nothing.

        Raises:
            ValueError: the lower one is above the upper one.
        """
        low, high = self.bounds.min_pixels, self.bounds.max_pixels
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_pixels {low:g} is above max_pixels {high:g}; lower the first or raise the second")


class ShownPart(Bounds):
    """A part of a message that is an image or a video."""

    type: str

    def sent(self, default: Frames | None) -> SentPicture | SentVideo:
        """It, not loaded yet.

        Args:
            default: frames that are taken of a video of which nothing is said.
        """
        raise NotImplementedError


class ImageUrl(Bounds):
    """Where an image is."""

    url: str


class ImagePart(ShownPart):
    """An image of a message. Bounds may stand beside `image_url` or in it."""

    image_url: ImageUrl

    @model_validator(mode="before")
    @classmethod
    def _normal(cls, value: Any) -> Any:
        """The URL may stand for the object."""
        if isinstance(value, dict) and value.get("file_id") is not None and value.get("image_url") is None:
            raise ValueError(f"file_id is not supported: {fields.NO_FILES}")
        if isinstance(value, dict) and isinstance(value.get("image_url"), str):
            value = {**value, "image_url": {"url": value["image_url"]}}
        return {**value, "type": "image_url"} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_bound(self) -> ImagePart:
        for name in ("min_pixels", "max_pixels"):
            beside, within = getattr(self, name), getattr(self.image_url, name)
            if None not in (beside, within) and beside != within:
                raise ValueError(f"{name} is {beside:g} beside image_url and {within:g} in it; say it once")
        self.check_order()
        return self

    @property
    def bounds(self) -> PixelBounds:
        """What was said of its size."""
        return PixelBounds(
            self.image_url.min_pixels if self.min_pixels is None else self.min_pixels,
            self.image_url.max_pixels if self.max_pixels is None else self.max_pixels,
        )

    def sent(self, default: Frames | None) -> SentPicture:
        """See `ShownPart`."""
        return SentPicture(self.image_url.url, self.bounds)

    def unused(self, place: str) -> Iterator[tuple[str, str | None]]:
        """See `fields.unused`."""
        yield from super().unused(place)
        yield from self.image_url.unused(f"{place}.image_url")


class Frames(Extended):
    """Which frames of a video are taken: vLLM's, Qwen's and our names mean the same."""

    refused = fields.PROCESSOR_KWARGS
    frames: int | None = Field(None, ge=1)
    fps: float | None = Field(None, gt=0, allow_inf_nan=False)
    rule: Rule | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        said = {name: value[name] for name in ("frames", *FRAME_NAMES) if value.get(name) is not None}
        if len(said) > 1:
            raise ValueError(f"the number of frames is said twice, as {' and '.join(said)}; say it once")
        return {
            **{name: one for name, one in value.items() if name not in FRAME_NAMES},
            "frames": next(iter(said.values()), None),
        }

    @model_validator(mode="after")
    def _one_choice(self) -> Frames:
        if self.frames is not None and self.fps is not None:
            raise ValueError(f"num_frames is {self.frames} and fps is {self.fps:g}; say one of the two")
        return self

    @classmethod
    def known(cls) -> tuple[str, ...]:
        """Those of vLLM's and Qwen's clients too."""
        return (*super().known(), *FRAME_NAMES)

    def over(self, other: Frames | None) -> Frames:
        """What is said here, else there."""
        if other is None:
            return self
        own = self.frames is not None or self.fps is not None
        one = self if own else other
        return Frames(frames=one.frames, fps=one.fps, rule=self.rule or other.rule)

    @property
    def said(self) -> bool:
        """Whether anything is."""
        return any(one is not None for one in (self.frames, self.fps, self.rule))


class ProcessorKwargs(Frames):
    """What is said of the videos of a whole request. It may say nothing else: a processor would use it."""

    def unused(self, place: str) -> Iterator[tuple[str, str | None]]:
        """See `fields.unused`."""
        others = dict.fromkeys(
            self.model_extra or (), Refusal(instead="say num_frames or fps of videos, or leave it out")
        )
        yield from fields.unused(place, self.model_extra, {**others, **self.refused}, self.known())


class VideoUrl(Frames, Bounds):
    """Where a video is."""

    refused = fields.VIDEO_PART
    url: str


class VideoPart(Frames, ShownPart):
    """A video of a message: its file, or the list of its frames.

    What is said of its frames, and bounds on the pixels of each, may stand beside `video_url` or in it.
    """

    refused = fields.VIDEO_PART
    video_url: VideoUrl | None = None
    video: list[str] | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _normal(cls, value: Any) -> Any:
        """The URL may stand for the object, and under `video`, where also a list of frames may; frames may be one URL
        of several images, as vLLM's clients write them."""
        if not isinstance(value, dict):
            return value
        value = {**value, "type": "video_url"}
        if isinstance(value.get("video"), str | dict) and value.get("video_url") is None:
            value["video_url"] = value.pop("video")
        if isinstance(value.get("video_url"), str):
            value["video_url"] = {"url": value["video_url"]}
        url = value["video_url"].get("url") if isinstance(value.get("video_url"), dict) else None
        if isinstance(url, str) and url[: len(JPEG_FRAMES)].lower() == JPEG_FRAMES and value.get("video") is None:
            value["video"] = [f"data:image/jpeg;base64,{one}" for one in url[len(JPEG_FRAMES) :].split(",")]
            for name, one in value.pop("video_url").items():
                if name != "url" and value.setdefault(name, one) != one:
                    raise ValueError(f"{name} is {value[name]} beside video_url and {one} in it; say it once")
        return value

    @model_validator(mode="after")
    def _whole(self) -> VideoPart:
        if (self.video_url is None) == (self.video is None):
            raise ValueError('it needs a file, {"video_url": {"url": …}}, or its frames, {"video": [url, …]}')
        within = self.video_url
        if within is not None:
            for name in ("frames", "fps", "rule", "min_pixels", "max_pixels"):
                beside, inside = getattr(self, name), getattr(within, name)
                if None not in (beside, inside) and beside != inside:
                    raise ValueError(f"{name} is {beside} beside video_url and {inside} in it; say it once")
        wanted = self.wanted(None)
        if self.video is not None and (wanted.frames, wanted.rule) != (None, None):
            raise ValueError(
                f"it comes as {len(self.video)} frames, of which all are taken; num_frames and rule have no effect, "
                "leave them out"
            )
        self.check_order()
        return self

    @property
    def bounds(self) -> PixelBounds:
        """What was said of the size of each frame."""
        within = self.video_url or self
        return PixelBounds(
            within.min_pixels if self.min_pixels is None else self.min_pixels,
            within.max_pixels if self.max_pixels is None else self.max_pixels,
        )

    def wanted(self, default: Frames | None) -> Frames:
        """Which frames are taken: what is said beside the file, in it, and for the whole request."""
        return self.over(self.video_url).over(default if self.video is None else None)

    def sent(self, default: Frames | None) -> SentVideo:
        """See `ShownPart`."""
        wanted = self.wanted(default)
        urls = (self.video_url.url,) if self.video_url is not None else tuple(self.video or ())
        return SentVideo(urls, self.video is not None, wanted.frames, wanted.fps, wanted.rule or "ends", self.bounds)

    def unused(self, place: str) -> Iterator[tuple[str, str | None]]:
        """See `fields.unused`."""
        yield from super().unused(place)
        if self.video_url is not None:
            yield from self.video_url.unused(f"{place}.video_url")


def _kind_of_part(value: Any) -> str:
    if isinstance(value, str):
        return "<text>"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind is None and isinstance(value, dict):  # clients of vLLM leave it out
        kind = next((kind for kind in ("text", "image_url", "video_url") if kind in value), None)
    kinds = {TEXT_KINDS: "<text>", IMAGE_KINDS: "<image>", VIDEO_KINDS: "<video>"}
    return next((mark for names, mark in kinds.items() if kind in names), "<other>")


def refuse_kind(value: Any, what: str, known: Sequence[str], others: Mapping[str, str]) -> Any:
    """Name what is wrong with a value that is of no kind that can be used.

    Args:
        value: of the request.
        what: a sentence that says what it should be.
        known: values of `type` that can be used.
        others: what to send instead of other kinds.

    Raises:
        ValueError: always.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{what}, this is {json_kind(value)}")
    kind = value.get("type")
    *first, last = known
    if kind is None:
        raise ValueError(f"type is missing, it must be {', '.join(first)} or {last}")
    if not isinstance(kind, str):
        raise ValueError(f"type is {json_kind(kind)}, it must be {', '.join(first)} or {last}")
    instead = others.get(kind, f"known are {', '.join(first)} and {last}")
    raise ValueError(f"type {fields.short(repr(kind))} is not supported: {instead}")


def _refuse_part(value: Any) -> Any:
    return refuse_kind(value, "a part is an object or a text", ("text", "image_url", "video_url"), _OTHER_KINDS)


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image>")]
    | Annotated[VideoPart, Tag("<video>")]
    | Annotated[Any, BeforeValidator(_refuse_part), Tag("<other>")],
    Discriminator(_kind_of_part),
]


def _kind_of_content(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else "<other>"


def _refuse_content(value: Any) -> Any:
    raise ValueError(f"it is {json_kind(value)}, it must be a text or a list of parts")


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
    def parts(self) -> Sequence[TextPart | ShownPart | LeftOutPart]:
        """The content, always as a list."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """All text, parts on lines of their own."""
        return "\n".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def shows(self) -> bool:
        """Whether it holds an image or a video."""
        return any(isinstance(part, ShownPart) for part in self.parts)

    def images(self, frames: Frames | None = None) -> list[SentPicture | SentVideo]:
        """The images and videos, in order.

        Args:
            frames: which are taken of a video of which its part says nothing.
        """
        return [part.sent(frames) for part in self.parts if isinstance(part, ShownPart)]

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


class RequestSettings(RequestLimits):  # type: ignore[valid-type, misc]
    """What a request says to the loop: its limits, and the conversation that it continues."""

    state: str | None = None
    """As it came with the last answer; see `vilavt_core.state`."""


_RequestSampling = create_model("_RequestSampling", **optional_fields(Sampling, per_request=True))


class MediaKwargs(Extended):
    """How media are read, by kind."""

    refused = fields.MEDIA_KWARGS
    video: ProcessorKwargs | None = None

    def unused(self, place: str) -> Iterator[tuple[str, str | None]]:
        """See `fields.unused`."""
        yield from super().unused(place)
        if self.video is not None:
            yield from self.video.unused(f"{place}.video")


class LoopRequest(_RequestSampling, Extended):  # type: ignore[valid-type, misc]
    """What requests of all protocols have: these fields and those of `Sampling`."""

    model: str | None = None
    stream: bool | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    """vLLM's clients say -1 for off."""
    seed: int | None = Field(None, ge=-MAX_INTEGER, lt=MAX_INTEGER)
    priority: int | None = Field(None, ge=-MAX_INTEGER, lt=MAX_INTEGER)
    """For an engine that schedules by it."""
    mm_processor_kwargs: ProcessorKwargs | None = None
    """Of videos; as vLLM's clients say it for a whole request."""
    media_io_kwargs: MediaKwargs | None = None
    """Likewise."""
    vilavt: RequestSettings | None = None

    def placed(self) -> list[tuple[str, ChatMessage]]:
        """The conversation: every message after the place where the client finds it."""
        raise NotImplementedError

    def bounds(self) -> dict[str, int | None]:
        """The request's bounds on tokens, by the name of the limit; above the server's, that holds."""
        raise NotImplementedError

    def described(self) -> Iterator[tuple[str, Extended]]:
        """Every object of the request that may have further fields, after its place."""
        yield "", self
        for name in ("mm_processor_kwargs", "media_io_kwargs"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    @model_validator(mode="after")
    def _one_place(self) -> LoopRequest:
        both = [one for one in (self.mm_processor_kwargs, self._of_media) if one is not None and one.said]
        if len(both) > 1 and both[0].model_dump() != both[1].model_dump():
            raise ValueError("mm_processor_kwargs and media_io_kwargs.video say different frames; say them once")
        return self

    @property
    def _of_media(self) -> ProcessorKwargs | None:
        return None if self.media_io_kwargs is None else self.media_io_kwargs.video

    @property
    def frames(self) -> Frames | None:
        """Which are taken of videos of which their parts say nothing."""
        return next((one for one in (self.mm_processor_kwargs, self._of_media) if one is not None and one.said), None)

    @property
    def state(self) -> str | None:
        """Of the conversation that it continues."""
        return None if self.vilavt is None else self.vilavt.state

    def ignored(self, without_effect: Sequence[str] = ()) -> tuple[str, ...]:
        """Fields that were accepted and have no effect: for ``vilavt.ignored`` of the response. See `fields`.

        Args:
            without_effect: honoured fields, and headers, that have none on this server.

        Raises:
            RequestError: a field would change the answer and cannot be honoured; names it.
        """
        found: list[str] = list(without_effect)
        for place, one in self.described():
            for name, refusal in one.unused(place):
                if refusal is not None:
                    raise RequestError(refusal)
                found.append(name)
        if self.frames is not None and not any(isinstance(p, VideoPart) for _, m in self.placed() for p in m.parts):
            found += [name for name in ("mm_processor_kwargs", "media_io_kwargs") if getattr(self, name) is not None]
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
        wanted: dict[str, Any] = (
            {} if self.vilavt is None else self.vilavt.model_dump(exclude_none=True, exclude={"state"})
        )
        for name, value in wanted.items():
            most = getattr(server, name)
            if most is None and name == "crop_max_pixels":
                most = server.max_pixels
            if most is not None and value > most:
                raise LimitError(f"vilavt.{name} is {value:.0f}, this server allows at most {most:.0f}; ask for less")
        limits = replace(server, **wanted)
        bounds = self.bounds().items()
        tighter = {name: min(most, getattr(limits, name) or most) for name, most in bounds if most is not None}
        return replace(limits, **tighter)

    def check_bounds(self, limits: Limits) -> None:
        """Hold the bounds of single images to those of the request.

        Raises:
            LimitError: one is outside; names it.
        """
        for place, message in self.placed():
            for at, part in enumerate(message.parts):
                if not isinstance(part, ShownPart):
                    continue
                for name, value in asdict(part.bounds).items():
                    if value is not None and not limits.min_pixels <= value <= limits.max_pixels:
                        raise LimitError(
                            f"{place}.content[{at}].{name} is {value:.0f}, this request allows "
                            f"{limits.min_pixels:.0f} to {limits.max_pixels:.0f}; ask for a value between them"
                        )


class StreamOptions(Extended):
    """`include_usage` asks for a last chunk with the usage."""

    include_usage: bool | None = None


class ChatRequest(LoopRequest):
    """Body of ``POST /v1/chat/completions``."""

    refused = fields.REQUEST
    messages: list[ChatMessage] = Field(min_length=1)
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    """Of a turn; above the server's bound, that holds."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """Of the answer, all its turns together: thoughts and zooms count, as OpenAI counts a reasoning model's."""

    def placed(self) -> list[tuple[str, ChatMessage]]:
        """See `LoopRequest`."""
        return [(f"messages[{number}]", message) for number, message in enumerate(self.messages)]

    def bounds(self) -> dict[str, int | None]:
        """See `LoopRequest`."""
        return {"max_new_tokens_per_turn": self.max_tokens, "max_answer_tokens": self.max_completion_tokens}

    def described(self) -> Iterator[tuple[str, Extended]]:
        """See `LoopRequest`."""
        yield from super().described()
        yield from self.placed()
        if self.stream_options is not None:
            yield "stream_options", self.stream_options

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


@dataclass(frozen=True)
class SentPicture:
    """An image of a request, not loaded yet."""

    url: str
    bounds: PixelBounds = PixelBounds()  # noqa: RUF009 (frozen)

    @property
    def least(self) -> int:
        """Images it is, as far as the request tells."""
        return 1


@dataclass(frozen=True)
class SentVideo:
    """A video of a request, not loaded yet."""

    urls: tuple[str, ...]
    """Of its file; or, if it `is_frames`, of each frame."""
    is_frames: bool = False
    frames: int | None = None
    fps: float | None = None
    """To take; of a list of frames, the rate at which they were taken."""
    rule: Rule = "ends"
    bounds: PixelBounds = PixelBounds()  # noqa: RUF009 (frozen)
    """Of each frame."""

    @property
    def least(self) -> int:
        """Images it is, as far as the request tells."""
        return len(self.urls)


@dataclass(frozen=True)
class Exchange:
    """One question of a conversation, and the answer the client says it got."""

    images: tuple[SentPicture | SentVideo, ...]
    question: str
    answer: str | None = None


def exchanges(talk: Sequence[tuple[str, ChatMessage]], frames: Frames | None = None) -> list[Exchange]:
    """The conversation as questions and answers; the last one has no answer yet.

    Messages in a row that belong to one side are joined, a blank line between them: everything between two answers is
    one question, and messages of an assistant in a row are one answer. System and developer messages are part of the
    question they stand before or in: the model's own instructions come from the checkpoint.

    Args:
        talk: see `LoopRequest.placed`.
        frames: see `ChatMessage.images`.

    Raises:
        RequestError: a question without a message of the user, an image where there can be none, or nothing to answer.
    """
    out: list[Exchange] = []
    for is_answer, side in groupby(talk, key=lambda item: item[1].role == "assistant"):
        places, said = zip(*side, strict=True)
        for place, message in zip(places, said, strict=True):
            if message.shows and message.role != "user":
                raise RequestError(f"{place}: a message of the role {message.role} holds no image")
        text = "\n\n".join(message.text for message in said if message.text)
        if not is_answer:
            if all(message.role != "user" for message in said):
                raise RequestError(
                    f"{places[-1]} has the role {said[-1].role!r}, a message of the user must be beside it"
                )
            out.append(Exchange(tuple(image for message in said for image in message.images(frames)), text))
        elif out:
            out[-1] = replace(out[-1], answer=text)
        else:
            raise RequestError(f"{places[0]} has the role 'assistant', the first question is the user's")
    if not out:
        raise RequestError("there is no message, one of the user is needed")
    if out[-1].answer is not None:
        raise RequestError("the last message is the assistant's, it must be the user's")
    return out


def whole_number(name: str, text: str) -> int:
    """The number that a header says.

    Args:
        name: of the header.
        text: its value.

    Raises:
        RequestError: it is none, or too large.
    """
    try:
        number = int(text)
    except ValueError:
        number = MAX_INTEGER
    if not -MAX_INTEGER <= number < MAX_INTEGER:
        raise RequestError(f"{name} is {fields.short(repr(text))}, it must be a whole number of at most 63 bits")
    return number


def json_kind(value: Any) -> str:
    """What a value of a request is, in JSON's words."""
    names = {type(None): "null", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
