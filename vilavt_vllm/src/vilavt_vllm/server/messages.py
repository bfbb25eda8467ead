"""Requests and responses of ``/v1/messages``, Anthropic's Messages API, when the loop runs inside the server.

The thoughts of all turns are one block of the kind ``thinking``, the answer is a block of text after it. ``max_tokens``
bounds the whole answer, as it does there: thoughts, zooms and answer together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from vilavt_core.protocol import FinishReason
from vilavt_core.results import BilledTokens, ChatResult, Event
from vilavt_core.wire import FIELD, Progress, finish_reason, named_line, told

from . import fields
from .requests import (
    ChatMessage,
    Extended,
    Frames,
    LeftOutPart,
    LoopRequest,
    SentPicture,
    ShownPart,
    TextPart,
    json_kind,
    refuse_kind,
)

_NO_CALLS = "the loop calls no functions; send what one returned as text"
_IMAGE = 'send an image as {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": …}}'
_OTHER_BLOCKS = {
    **dict.fromkeys(("tool_use", "tool_result", "server_tool_use", "web_search_tool_result"), _NO_CALLS),
    **dict.fromkeys(("document", "search_result", "container_upload"), "send pages as image blocks, or their text"),
    **dict.fromkeys(("image_url", "input_image"), _IMAGE),
    **dict.fromkeys(("video", "video_url"), "send its frames as image blocks, or ask /v1/chat/completions"),
}
"""Kinds of blocks that clients send and this route cannot use, and what to send instead."""


class BlockSource(Extended):
    """Where an image is: in it, or at a URL."""

    refused = fields.IMAGE_BLOCK
    type: str
    media_type: str | None = None
    data: str | None = None
    url: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> BlockSource:
        if self.type == "file":
            raise ValueError(f"type 'file' is not supported: {fields.NO_FILES}")
        needed = {"base64": ("media_type", "data"), "url": ("url",)}.get(self.type)
        if needed is None:
            raise ValueError(f"type {fields.short(repr(self.type))} is not supported: known are base64 and url")
        for name in ("media_type", "data", "url"):
            if (getattr(self, name) is None) == (name in needed):
                problem = "is missing" if name in needed else "has no place"
                raise ValueError(f"{name} {problem} in a source of the type {self.type}")
        return self

    @property
    def address(self) -> str:
        """The image as a URL."""
        return self.url if self.url is not None else f"data:{self.media_type};base64,{self.data}"


class ImageBlock(ShownPart):
    """An image of a message. Bounds on its pixels may stand beside `source`."""

    refused = fields.IMAGE_BLOCK
    source: BlockSource

    @model_validator(mode="after")
    def _ordered(self) -> ImageBlock:
        self.check_order()
        return self

    def sent(self, default: Frames | None) -> SentPicture:
        """See `ShownPart`."""
        return SentPicture(self.source.address, self.bounds)

    def unused(self, place: str) -> Iterator[tuple[str, str | None]]:
        """See `fields.unused`."""
        yield from super().unused(place)
        yield from self.source.unused(f"{place}.source")


class ThinkingBlock(LeftOutPart):
    """Thoughts as they came. They are not sent back to the model: what it wrote is kept, or in ``vilavt.state``."""


def _kind_of_block(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    kinds = {("text",): "<text>", ("image",): "<image>", ("thinking", "redacted_thinking"): "<thinking>"}
    return next((mark for names, mark in kinds.items() if kind in names), "<other>")


def _refuse_block(value: Any) -> Any:
    return refuse_kind(value, "a block is an object", ("text", "image", "thinking"), _OTHER_BLOCKS)


Block = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[Any, BeforeValidator(_refuse_block), Tag("<other>")],
    Discriminator(_kind_of_block),
]


def _kind_of_content(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<blocks>" if isinstance(value, list) else "<other>"


def _refuse_content(value: Any) -> Any:
    raise ValueError(f"it is {json_kind(value)}, it must be a text or a list of blocks")


BlockContent = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[Block], Tag("<blocks>")]
    | Annotated[Any, BeforeValidator(_refuse_content), Tag("<other>")],
    Discriminator(_kind_of_content),
]


class BlockMessage(ChatMessage):
    """A message of blocks."""

    content: BlockContent = ""


class MessagesOutput(Extended):
    """How the answer shall be made."""

    refused = fields.OUTPUT_CONFIG


class MessagesRequest(LoopRequest):
    """Body of ``POST /v1/messages``."""

    refused = fields.MESSAGES_REQUEST
    messages: list[BlockMessage] = Field(min_length=1)
    system: BlockContent | None = None
    """Before the first message."""
    max_tokens: int | None = Field(None, ge=1)
    """Of the answer, all its turns together: thoughts and zooms count."""
    output_config: MessagesOutput | None = None

    def placed(self) -> list[tuple[str, ChatMessage]]:
        """See `LoopRequest`."""
        said = BlockMessage.model_construct(role="system", content=self.system or "")  # it is validated already
        before = [("system", said)] if self.system else []
        return [*before, *((f"messages[{number}]", message) for number, message in enumerate(self.messages))]

    def bounds(self) -> dict[str, int | None]:
        """See `LoopRequest`."""
        return {"max_answer_tokens": self.max_tokens}

    def described(self) -> Iterator[tuple[str, Extended]]:
        """See `LoopRequest`."""
        yield from super().described()
        yield from ((f"messages[{number}]", message) for number, message in enumerate(self.messages))
        if not isinstance(self.system, str | None):
            yield from ((f"system[{number}]", block) for number, block in enumerate(self.system))
        if self.output_config is not None:
            yield "output_config", self.output_config


class MessagesReply:
    """A message in answer, whole or as events.

    Args:
        model: the name that the client knows.
        ignored: fields of the request that have no effect.
        name: of the request.
        count: tells how many tokens a text has.
    """

    def __init__(self, model: str, ignored: Sequence[str], name: str, count: Callable[[str], int]) -> None:
        self.model, self.ignored, self.count = model, tuple(ignored), count
        self.id = f"msg_{name}"
        self._progress = Progress()
        self._thinks = False

    def whole(self, result: ChatResult) -> dict[str, Any]:
        """The response to a request that does not stream."""
        about = told(result, self.ignored)
        content = [_text(result.answer or "")]
        if result.thoughts or about["events"]:
            content.insert(0, _thinking(result.thoughts))
        usage = _usage(result.billed, self.count(result.answer or ""))
        return self._message(content=content, stop_reason=_stop_reason(result), usage=usage, **{FIELD: about})

    def begin(self) -> str:
        """The first event: how many tokens there are is told at the end, over all turns."""
        return _event("message_start", message=self._message(usage={"input_tokens": 0, "output_tokens": 0}))

    def progress(self, event: Event) -> str | None:
        """The events of one on the way, if it has any; see `Progress`."""
        said = self._progress.feed(event)
        if said is None:
            return None
        data, thought = said
        begun = "" if self._thinks else _event("content_block_start", index=0, content_block=_thinking(""))
        self._thinks = True
        delta = {"type": "thinking_delta", "thinking": thought}
        return begun + _event("content_block_delta", index=0, delta=delta, **{FIELD: data})

    def end(self, result: ChatResult) -> Iterator[str]:
        """The last events."""
        whole = self.whole(result)
        if self._thinks:
            yield _event("content_block_stop", index=0)
        index = int(self._thinks)
        yield _event("content_block_start", index=index, content_block=_text(""))
        if result.answer:
            yield _event("content_block_delta", index=index, delta={"type": "text_delta", "text": result.answer})
        yield _event("content_block_stop", index=index)
        about = {"type": "end", **whole[FIELD]}
        delta = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
        yield _event("message_delta", delta=delta, usage=whole["usage"], **{FIELD: about})
        yield _event("message_stop")

    def failed(self, message: str, kind: str, code: int) -> str:
        """The last event of a stream that cannot go on."""
        return messages_error_event(message, kind, code)

    def _message(self, **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            **more,
        }


_ERRORS = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}
"""By status, what the API calls them; others are the request's below 500, and the server's from there on."""


def messages_error(message: str, kind: str, code: int) -> dict[str, Any]:
    """An error as the Messages API words it; `code` says its kind as the other routes do."""
    named = _ERRORS.get(code, "invalid_request_error" if code < 500 else "api_error")
    return {"type": "error", "error": {"type": named, "message": message, "code": kind}}


def messages_error_event(message: str, kind: str, code: int) -> str:
    """An error in the middle of a stream, and its end."""
    return named_line("error", messages_error(message, kind, code))


def _stop_reason(result: ChatResult) -> str:
    if finish_reason(result) != "length":
        return "end_turn"
    return "model_context_window_exceeded" if result.finish == FinishReason.CONTEXT_LIMIT else "max_tokens"


def _thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": ""}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _usage(billed: BilledTokens, answer: int) -> dict[str, Any]:
    """Tokens as the API names them: what was in the cache is not among the input.

    Args:
        billed: over all turns.
        answer: how many the answer has: what was sampled beside it is thinking.
    """
    return {
        "input_tokens": billed.prompt - billed.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": billed.cached,
        "output_tokens": billed.sampled,
        "output_tokens_details": {"thinking_tokens": max(0, billed.sampled - answer)},
    }


def _event(name: str, **data: Any) -> str:
    return named_line(name, {"type": name, **data})
