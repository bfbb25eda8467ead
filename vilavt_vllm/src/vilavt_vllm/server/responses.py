"""Requests and responses of ``/v1/responses``, OpenAI's Responses API, when the loop runs inside the server.

Nothing is kept for it: a client sends the earlier input and output with its next question, as with ``store=False``, and
``vilavt.state`` if it shall continue the same tokens. The thoughts of all turns are one item of the kind ``reasoning``,
the answer is a message after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from vilavt_core.results import BilledTokens, ChatResult, Event
from vilavt_core.wire import (
    FIELD,
    Progress,
    error_body,
    finish_reason,
    named_line,
    told,
)

from . import fields
from .requests import ChatMessage, Extended, LeftOutPart, LoopRequest, json_kind, refuse_kind

_NO_CALLS = "the loop calls no functions; send what one returned as the user"
_OTHER_ITEMS = {
    **dict.fromkeys(
        ("function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"), _NO_CALLS
    ),
    **dict.fromkeys(("mcp_call", "mcp_list_tools", "web_search_call", "file_search_call", "computer_call"), _NO_CALLS),
    "item_reference": "this server keeps no answers; send the item itself",
    "compaction": "send the messages themselves",
}
"""Kinds of items that clients send and this route cannot use, and what to send instead."""


class InputMessage(ChatMessage):
    """A message; one of the assistant as it came, or shorter."""

    type: str | None = None
    id: str | None = None
    status: str | None = None


class ReasoningItem(LeftOutPart):
    """Thoughts as they came. They are not sent back to the model: what it wrote is kept, or in ``vilavt.state``."""


def _kind_of_item(value: Any) -> str:
    kind = value.get("type") or "message" if isinstance(value, dict) else None
    return f"<{kind}>" if kind in ("message", "reasoning") else "<other>"


def _refuse_item(value: Any) -> Any:
    return refuse_kind(value, "an item of input is an object", ("message", "reasoning"), _OTHER_ITEMS)


InputItem = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[Any, BeforeValidator(_refuse_item), Tag("<other>")],
    Discriminator(_kind_of_item),
]


def _kind_of_input(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<items>" if isinstance(value, list) else "<other>"


def _refuse_input(value: Any) -> Any:
    raise ValueError(f"it is {json_kind(value)}, it must be a text or a list of items")


Input = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[InputItem], Field(min_length=1), Tag("<items>")]
    | Annotated[Any, BeforeValidator(_refuse_input), Tag("<other>")],
    Discriminator(_kind_of_input),
]


class TextSettings(Extended):
    """What the answer shall look like: it is text."""

    refused = fields.RESPONSES_TEXT


class ResponsesRequest(LoopRequest):
    """Body of ``POST /v1/responses``."""

    refused = fields.RESPONSES_REQUEST
    input: Input
    instructions: str | None = None
    """Before the first message, as one of the system."""
    max_output_tokens: int | None = Field(None, ge=1)
    """Of the answer, all its turns together: thoughts and zooms count."""
    metadata: dict[str, str] | None = None
    """Sent back with the answer."""
    text: TextSettings | None = None

    def placed(self) -> list[tuple[str, ChatMessage]]:
        """See `LoopRequest`."""
        before = []
        if self.instructions:
            before.append(("instructions", ChatMessage(role="system", content=self.instructions)))
        if isinstance(self.input, str):
            return [*before, ("input", ChatMessage(role="user", content=self.input))]
        items = enumerate(self.input)
        return before + [(f"input[{number}]", item) for number, item in items if isinstance(item, ChatMessage)]

    def bounds(self) -> dict[str, int | None]:
        """See `LoopRequest`."""
        return {"max_answer_tokens": self.max_output_tokens}

    def described(self) -> Iterator[tuple[str, Extended]]:
        """See `LoopRequest`."""
        yield from super().described()
        if self.text is not None:
            yield "text", self.text
        if not isinstance(self.input, str):
            yield from ((f"input[{number}]", item) for number, item in enumerate(self.input))


class ResponsesReply:
    """A response, whole or as events.

    Args:
        request: that is answered.
        model: the name that the client knows.
        ignored: fields of the request that have no effect.
        name: of the request.
        count: tells how many tokens a text has.
    """

    def __init__(
        self, request: ResponsesRequest, model: str, ignored: Sequence[str], name: str, count: Callable[[str], int]
    ) -> None:
        self.request, self.model, self.ignored, self.count = request, model, tuple(ignored), count
        self.id = f"resp_{name}"
        self._reasoning, self._message = f"rs_{name}", f"msg_{name}"
        self._created = int(time.time())
        self._number = 0
        self._progress = Progress()
        self._thoughts = ""
        self._thinks = False

    def whole(self, result: ChatResult) -> dict[str, Any]:
        """The response to a request that does not stream."""
        ended = finish_reason(result) == "length"
        about = told(result, self.ignored)
        output = [self._message_item(result.answer or "", "incomplete" if ended else "completed")]
        if result.thoughts or about["events"]:
            output.insert(0, self._reasoning_item(result.thoughts))
        return self._response(
            status="incomplete" if ended else "completed",
            incomplete_details={"reason": "max_output_tokens"} if ended else None,
            output=output,
            usage=_usage(result.billed, self.count(result.answer or "")),
            **{FIELD: about},
        )

    def begin(self) -> str:
        """The first events."""
        begun = self._response(status="in_progress")
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def progress(self, event: Event) -> str | None:
        """The events of one on the way, if it has any; see `Progress`."""
        said = self._progress.feed(event)
        if said is None:
            return None
        data, thought = said
        begun = "" if self._thinks else self._begun(self._reasoning_item(), _reasoning_text())
        self._thinks = True
        self._thoughts += thought
        place = {"item_id": self._reasoning, "output_index": 0, "content_index": 0}
        return begun + self._event("response.reasoning_text.delta", **place, delta=thought, **{FIELD: data})

    def end(self, result: ChatResult) -> Iterator[str]:
        """The last events."""
        response = self.whole(result)
        if self._thinks:
            text, item = self._thoughts, self._reasoning_item(self._thoughts)
            yield self._done("response.reasoning_text.done", item, _reasoning_text(text), text=text)
        *_, item = response["output"]
        answer = result.answer or ""
        yield self._begun({**item, "status": "in_progress", "content": []}, _output_text())
        if answer:
            place = self._place(item)
            yield self._event("response.output_text.delta", **place, delta=answer, logprobs=[])
        yield self._done("response.output_text.done", item, _output_text(answer), text=answer, logprobs=[])
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, message: str, kind: str, code: int) -> str:
        """The last event of a stream that cannot go on."""
        return responses_error_event(message, kind, code, self._next())

    def _response(self, **more: Any) -> dict[str, Any]:
        """The object, with what is said of it."""
        request = self.request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "model": self.model,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
            **more,
        }

    def _reasoning_item(self, text: str | None = None) -> dict[str, Any]:
        """The thoughts; None: they are only begun."""
        content = [] if text is None else [_reasoning_text(text)]
        status = "in_progress" if text is None else "completed"
        return {"id": self._reasoning, "type": "reasoning", "summary": [], "content": content, "status": status}

    def _message_item(self, text: str, status: str) -> dict[str, Any]:
        content = [_output_text(text)]
        return {"id": self._message, "type": "message", "role": "assistant", "status": status, "content": content}

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        """Of the text of an item."""
        index = int(self._thinks and item["type"] == "message")
        return {"item_id": item["id"], "output_index": index, "content_index": 0}

    def _begun(self, item: dict[str, Any], part: dict[str, Any]) -> str:
        """An item begins, and its text."""
        place = self._place(item)
        added = self._event("response.output_item.added", output_index=place["output_index"], item=item)
        return added + self._event("response.content_part.added", **place, part=part)

    def _done(self, name: str, item: dict[str, Any], part: dict[str, Any], **more: Any) -> str:
        """The text of an item is whole, and then the item."""
        place = self._place(item)
        done = self._event(name, **place, **more) + self._event("response.content_part.done", **place, part=part)
        return done + self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _event(self, kind: str, **data: Any) -> str:
        return named_line(kind, {"type": kind, "sequence_number": self._next(), **data})

    def _next(self) -> int:
        self._number += 1
        return self._number - 1


def responses_error_event(message: str, kind: str, code: int, number: int | None = None) -> str:
    """An error in the middle of a stream, and its end.

    Args:
        message: why.
        kind: of error.
        code: of its status.
        number: of the event; None: it is not known how many there were.
    """
    numbered = {} if number is None else {"sequence_number": number}
    flat = {"type": "error", **numbered, "code": kind, "message": message, "param": None}
    return named_line("error", flat | error_body(message, kind, code))


def _reasoning_text(text: str = "") -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _output_text(text: str = "") -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(billed: BilledTokens, answer: int) -> dict[str, Any]:
    """Tokens as the API names them.

    Args:
        billed: over all turns.
        answer: how many the answer has: what was sampled beside it is reasoning.
    """
    return {
        "input_tokens": billed.prompt,
        "input_tokens_details": {"cached_tokens": billed.cached, "cache_write_tokens": 0},
        "output_tokens": billed.sampled,
        "output_tokens_details": {"reasoning_tokens": max(0, billed.sampled - answer)},
        "total_tokens": billed.prompt + billed.sampled,
    }
