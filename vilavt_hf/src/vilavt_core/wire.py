"""What a server and its client say to each other beside OpenAI's chat completions: one module for both ends.

A request is an ordinary chat completion whose field ``vilavt`` holds tighter limits, and the state that came with the
last answer (`vilavt_core.state`). A response is an ordinary one with a field ``vilavt``: how the conversation ended,
its zooms as events, the fields of the request that had no effect, the state to send with the next question, and the
whole conversation as `ChatResult.to_json` writes it. A streamed response has the same events, one per chunk, while they
happen.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .conversation import ShownImage, Thoughts
from .protocol import Answer, FinishReason, Region, ToolCall
from .results import (
    AnswerEvent,
    ChatResult,
    CropsEvent,
    Event,
    Finished,
    Provenance,
    RefusedEvent,
    TextDelta,
    ToolCallEvent,
    turn_events,
)

FIELD = "vilavt"
"""Of requests, responses and chunks."""
STATE = "state"
"""Of `FIELD`, in requests and responses."""
SETTINGS_PATH = "/vilavt"
"""Below the API's base URL: `settings_body`."""
DONE = "data: [DONE]\n\n"
"""The end of a stream of chunks."""


# ---------------------------------------------------------------------- what a server says


def settings_body(
    model: str, provenance: Provenance, note: str = "", state: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What answers depend on besides the question, the checkpoint's note for people, and which states are read."""
    return {"model": model, "provenance": provenance.to_json(), "note": note, "state": dict(state or {})}


def event_json(event: Event) -> dict[str, Any] | None:
    """An event on the way as JSON; None for the text, the answer and the end, which have fields of their own."""
    if isinstance(event, ToolCallEvent):
        regions = [{"image": region.index, "box": list(region.box)} for region in event.call.regions]
        return {"type": "zoom", "turn": event.turn, "query": event.call.query, "regions": regions}
    if isinstance(event, CropsEvent):
        crops = [{"image": image.index, **image.to_json()} for image in event.images]
        return {"type": "crops", "turn": event.turn, "query": event.query, "crops": crops}
    if isinstance(event, RefusedEvent):
        return {"type": "refused", "turn": event.turn, "problem": event.problem}
    return None


def told(result: ChatResult, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """The field ``vilavt`` of a response; `ignored` are fields of the request that had no effect."""
    events = [data for turn in result.turns for event in turn_events(turn) if (data := event_json(event)) is not None]
    conversation = result.to_json()
    return {
        "finish": result.finish,
        "detail": "" if result.episode is None else result.episode.detail,
        "turns": len(result.turns),
        "images": len(result.images),
        "events": events,
        "ignored": list(ignored),
        "history": result.history,
        "state": result.state,
        "state_bytes": len(result.state or ""),
        "provenance": conversation.pop("provenance"),
        "conversation": conversation,
    }


def finish_reason(result: ChatResult) -> str:
    """``stop`` if there is an answer or nothing more was to come, ``length`` if a budget ended it."""
    budgets = (FinishReason.LENGTH, FinishReason.TURN_LIMIT, FinishReason.IMAGE_LIMIT, FinishReason.CONTEXT_LIMIT)
    return "length" if result.answer is None and result.finish in budgets else "stop"


def error_body(message: str, kind: str, code: int) -> dict[str, Any]:
    """An error as OpenAI's API words it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_line(message: str, kind: str, code: int) -> str:
    """An error in the middle of a stream, and its end."""
    return _line(error_body(message, kind, code)) + DONE


class Progress:
    """What a stream says of the events on the way: thoughts as their text arrives, zooms, crops, refusals.

    The answer is not among them: it is sent when it is certain, at the end.
    """

    def __init__(self) -> None:
        self._turn = -1
        self._thoughts = Thoughts()
        self._turns: list[int] = []

    def feed(self, event: Event) -> tuple[dict[str, Any], str] | None:
        """An event as JSON for the field ``vilavt``, and what it adds to the thoughts of all turns, a turn a line:
        together they are `ChatResult.thoughts`. None: there is nothing to say of it."""
        if not isinstance(event, TextDelta):
            data = event_json(event)
            return None if data is None else (data, "")
        if event.turn != self._turn:
            self._turn, self._thoughts = event.turn, Thoughts()
        text = self._thoughts.feed(event.text)
        if not text:
            return None
        data = {"type": "thought", "turn": event.turn, "text": text}
        if event.turn not in self._turns:
            self._turns.append(event.turn)
            text = "\n" * (len(self._turns) > 1) + text
        return data, text


class Reply:
    """A chat completion, whole or in chunks.

    Args:
        model: the name that the client knows.
        ignored: fields of the request that have no effect.
        name: of the request; None: one of its own.
        include_usage: whether chunks end with one that has the usage.
    """

    def __init__(
        self, model: str, ignored: Sequence[str] = (), name: str | None = None, *, include_usage: bool = False
    ) -> None:
        self.ignored, self.include_usage = tuple(ignored), include_usage
        self.id = f"chatcmpl-{name or uuid.uuid4().hex}"
        self.head = {"id": self.id, "created": int(time.time()), "model": model}
        self._progress = Progress()

    def whole(self, result: ChatResult) -> dict[str, Any]:
        """The response to a request that does not stream."""
        message = {"role": "assistant", "content": result.answer or "", **_thought(result.thoughts)}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason(result), "logprobs": None}
        body = {**self.head, "object": "chat.completion", "choices": [choice]}
        return body | {"usage": result.billed.to_json(), FIELD: told(result, self.ignored)}

    def begin(self) -> str:
        """The first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def progress(self, event: Event) -> str | None:
        """The chunk of an event on the way, if it has one; see `Progress`."""
        said = self._progress.feed(event)
        if said is None:
            return None
        data, thought = said
        return self._chunk(_thought(thought) if thought else {}, vilavt=data)

    def end(self, result: ChatResult) -> Iterator[str]:
        """The last chunks."""
        if result.answer is not None:
            yield self._chunk({"content": result.answer})
        yield self._chunk({}, finish_reason(result), vilavt={"type": "end", **told(result, self.ignored)})
        if self.include_usage:
            usage = result.billed.to_json()
            yield _line({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield DONE

    def failed(self, message: str, kind: str, code: int) -> str:
        """The last chunks of a stream that cannot go on."""
        return error_line(message, kind, code)

    def _chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _line({**self.head, "object": "chat.completion.chunk", "choices": [choice], **more})


def _thought(text: str) -> dict[str, str]:
    """Thoughts under both names that clients look for."""
    return {"reasoning": text, "reasoning_content": text}


def named_line(event: str, data: dict[str, Any]) -> str:
    """An event of a stream whose events have names."""
    return f"event: {event}\n{_line(data)}"


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


# ---------------------------------------------------------------------- what a client reads


def read_settings(body: Mapping[str, Any]) -> tuple[str, Provenance]:
    """Name of the model, and what answers depend on.

    Raises:
        KeyError, TypeError, ValueError: another server, or another version of ours.
    """
    return str(body["model"]), Provenance.from_json(body["provenance"])


def read_note(body: Mapping[str, Any]) -> str:
    """The checkpoint's note for people; empty: it has none, or the server is older."""
    return str(body.get("note") or "")


def read_told(data: Mapping[str, Any]) -> ChatResult:
    """The field ``vilavt`` of a response as a result.

    Raises:
        KeyError, TypeError, ValueError: as `read_settings`.
    """
    result = ChatResult.from_json({**data["conversation"], "provenance": data["provenance"]})
    # An older server tells neither of the last two.
    return replace(result, ignored=tuple(data["ignored"]), history=data.get("history"), state=data.get("state"))


def read_chunk(data: Mapping[str, Any]) -> Iterator[Event]:
    """The events of the field ``vilavt`` of a chunk; the text of a server is that of the thoughts.

    Raises:
        KeyError, TypeError, ValueError: as `read_settings`.
    """
    kind, turn = data["type"], data.get("turn", 0)
    if kind == "thought":
        yield TextDelta(turn, data["text"])
    elif kind == "zoom":
        regions = tuple(Region(one["image"], tuple(one["box"])) for one in data["regions"])
        yield ToolCallEvent(turn, ToolCall(regions, data["query"]))
    elif kind == "crops":
        yield CropsEvent(turn, tuple(map(ShownImage.from_json, data["crops"])), (), data["query"])
    elif kind == "refused":
        yield RefusedEvent(turn, data["problem"])
    elif kind == "end":
        result = read_told(data)
        if result.turns and isinstance(action := result.turns[-1].action, Answer):
            yield AnswerEvent(result.turns[-1].index, action.text, action.thought)
        yield Finished(result)
    else:
        raise ValueError(f"a chunk of kind {kind!r}")


def with_checkpoint(result: ChatResult, checkpoint: str | None) -> ChatResult:
    """The result as a client tells it: its checkpoint is the server."""
    return replace(result, provenance=replace(result.provenance, checkpoint=checkpoint))
