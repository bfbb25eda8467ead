"""The grammar of one assistant turn: text in, one typed outcome out.

A turn is ``<think>…</think>`` followed by either a zoom request ``<tool>{"region": [{"index": int, "bbox_2d": [x1,
y1, x2, y2]}], "query": str}</tool>`` or a final ``<answer>…</answer>``. `parse_turn` never raises, whatever
the text: what cannot be read is a `Malformed` with a named reason. Two rule sets exist. ``strict`` (default)
refuses what the published system accepted by accident; ``published`` reads a turn as the published evaluators did,
so that a checkpoint's scores carry over. Only the shape of a call is checked here; whether a box fits its image is
checked by `vilavt_core.regions`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
TOOL_OPEN, TOOL_CLOSE = "<tool>", "</tool>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<tool_response>", "</tool_response>"

MAX_TOOL_CHARS = 65_536
"""Longest tool JSON that is read, in characters; a longer one is ``TOO_LONG`` under both rule sets."""
MAX_TOOL_DEPTH = 32
"""Deepest nesting of a tool JSON that is read; a call needs 3."""
MAX_NUMBER_CHARS = 32
"""Longest number literal in a tool JSON that is read; a longer one cannot be an index or a pixel."""

TAGS = (
    *(THINK_OPEN, THINK_CLOSE, TOOL_OPEN, TOOL_CLOSE),
    *(ANSWER_OPEN, ANSWER_CLOSE, RESPONSE_OPEN, RESPONSE_CLOSE),
)
"""All tags of the protocol."""
_LONGEST_TAG = max(map(len, TAGS))

IMAGE_MARK = "<image>"
"""Stands in the text of a question or of a training record where an image belongs."""

Box = tuple[float, float, float, float]
"""``(left, top, right, bottom)``; in which unit, its place says."""

Rules = Literal["strict", "published"]


class FinishReason(StrEnum):
    """Why an episode ended."""

    ANSWER = "answer"
    LENGTH = "length"
    MALFORMED = "malformed"
    BAD_REGION = "bad_region"
    TURN_LIMIT = "turn_limit"
    IMAGE_LIMIT = "image_limit"
    CONTEXT_LIMIT = "context_limit"
    NO_ACTION = "no_action"


class MalformedReason(StrEnum):
    """What is wrong with the shape of a turn."""

    UNCLOSED_TOOL = "unclosed_tool"
    UNCLOSED_ANSWER = "unclosed_answer"
    TOOL_AND_ANSWER = "tool_and_answer"
    SEVERAL_TOOL_CALLS = "several_tool_calls"
    SEVERAL_ANSWERS = "several_answers"
    NESTED_ANSWER = "nested_answer"
    """An answer opens inside an answer. Under ``strict`` only, as the next two."""
    THOUGHT_IN_ANSWER = "thought_in_answer"
    MARKUP_IN_ANSWER = "markup_in_answer"
    """Another tag of the protocol stands in the answer."""
    TOO_LONG = "too_long"
    TOO_DEEP = "too_deep"
    BAD_JSON = "bad_json"
    DUPLICATE_KEY = "duplicate_key"
    HUGE_NUMBER = "huge_number"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_REGION = "missing_region"
    BAD_REGION_LIST = "bad_region_list"
    EMPTY_REGION_LIST = "empty_region_list"
    BAD_INDEX = "bad_index"
    BAD_BOX = "bad_box"
    NOT_FINITE = "not_finite"
    MISSING_QUERY = "missing_query"
    BAD_QUERY = "bad_query"
    BLANK_QUERY = "blank_query"


@dataclass(frozen=True)
class Region:
    """A rectangle of an image the model has seen.

    ``index`` counts images over the whole conversation from 0; ``box`` is ``(x1, y1, x2, y2)`` in pixels of that
    image *as shown*.
    """

    index: int
    box: Box


@dataclass(frozen=True)
class ToolCall:
    """A zoom request: at least one region and one query for all of them; ``trailing`` is any text after the call."""

    regions: tuple[Region, ...]
    query: str
    thought: str = ""
    trailing: str = ""


@dataclass(frozen=True)
class Answer:
    """The final answer, stripped; ``trailing`` is any text after it."""

    text: str
    thought: str = ""
    trailing: str = ""


@dataclass(frozen=True)
class Malformed:
    """A turn that tried to act and cannot be read."""

    reason: MalformedReason
    detail: str


@dataclass(frozen=True)
class NoAction:
    """A turn with neither a tool call nor an answer."""

    thought: str = ""


Action = ToolCall | Answer | Malformed | NoAction


class _Refusal(Exception):
    """Carries a malformed outcome out of the readers below; never leaves this module."""

    def __init__(self, reason: MalformedReason, detail: str) -> None:
        super().__init__(detail)
        self.outcome = Malformed(reason, detail)


def parse_turn(text: str, rules: Rules = "strict") -> Action:
    """Read one assistant turn.

    Args:
        text: the decoded turn, without its ``<|im_end|>``.
        rules: ``strict`` or ``published``; `docs/protocol.md` lists every difference.

    Returns:
        Exactly one of the four outcomes. Never raises, for any text.
    """
    try:
        return _parse_published(text) if rules == "published" else _parse_strict(text)
    except _Refusal as refusal:
        return refusal.outcome


def _parse_strict(text: str) -> Action:
    body, thought = _split_thought(text)
    tool, answer = body.find(TOOL_OPEN), body.find(ANSWER_OPEN)
    if tool < 0 and answer < 0:
        return NoAction(thought or body.strip())
    if tool >= 0 and (answer < 0 or tool < answer):
        thought = thought or body[:tool].strip()
        payload, trailing = _tool_payload(body[tool + len(TOOL_OPEN) :])
        if ANSWER_OPEN in trailing:
            raise _Refusal(
                MalformedReason.TOOL_AND_ANSWER,
                "the turn holds both a tool call and an answer; it may hold one of them",
            )
        if TOOL_OPEN in trailing:
            raise _Refusal(
                MalformedReason.SEVERAL_TOOL_CALLS,
                "the turn holds more than one tool call; put all regions in one call",
            )
        regions, query = _read_call(payload, "strict")
        return ToolCall(regions, query, thought, trailing.strip())
    thought = thought or body[:answer].strip()
    content, closed, trailing = body[answer + len(ANSWER_OPEN) :].partition(ANSWER_CLOSE)
    if TOOL_OPEN in (trailing if closed else content):
        raise _Refusal(
            MalformedReason.TOOL_AND_ANSWER, "the turn holds both a tool call and an answer; it may hold one of them"
        )
    if not closed:
        raise _Refusal(MalformedReason.UNCLOSED_ANSWER, f"{ANSWER_OPEN} is not closed by {ANSWER_CLOSE}")
    _check_answer(content)
    if ANSWER_OPEN in trailing:
        raise _Refusal(MalformedReason.SEVERAL_ANSWERS, "the turn holds more than one answer")
    return Answer(content.strip(), thought, trailing.strip())


def _check_answer(content: str) -> None:
    """Refuse tags of the protocol inside an answer: which part of it is the answer, they leave open."""
    if ANSWER_OPEN in content:
        raise _Refusal(
            MalformedReason.NESTED_ANSWER,
            f"{ANSWER_OPEN} stands inside an answer; open it once, and close it once with {ANSWER_CLOSE}",
        )
    for tag in (THINK_OPEN, THINK_CLOSE):
        if tag in content:
            raise _Refusal(
                MalformedReason.THOUGHT_IN_ANSWER, f"{tag} stands inside the answer; think before {ANSWER_OPEN}"
            )
    for tag in (TOOL_OPEN, TOOL_CLOSE, RESPONSE_OPEN, RESPONSE_CLOSE):
        if tag in content:
            raise _Refusal(MalformedReason.MARKUP_IN_ANSWER, f"{tag} stands inside the answer; leave it out")


def _parse_published(text: str) -> Action:
    """The finish rule looks for both answer tags first; only a turn without them is read as a tool call, and the
    first call wins."""
    _, thought = _split_thought(text)
    if ANSWER_OPEN in text and ANSWER_CLOSE in text:
        before, _, rest = text.partition(ANSWER_OPEN)
        content, closed, trailing = rest.partition(ANSWER_CLOSE)
        if not closed:
            raise _Refusal(MalformedReason.UNCLOSED_ANSWER, f"{ANSWER_CLOSE} comes before {ANSWER_OPEN}")
        return Answer(content.strip(), thought or before.strip(), trailing.strip())
    if TOOL_OPEN in text:
        before, _, rest = text.partition(TOOL_OPEN)
        payload, closed, trailing = rest.partition(TOOL_CLOSE)
        if not closed:
            raise _Refusal(MalformedReason.UNCLOSED_TOOL, f"{TOOL_OPEN} is not closed by {TOOL_CLOSE}")
        regions, query = _read_call(payload, "published")
        return ToolCall(regions, query, thought or before.strip(), trailing.strip())
    if ANSWER_OPEN in text:
        raise _Refusal(MalformedReason.UNCLOSED_ANSWER, f"{ANSWER_OPEN} is not closed by {ANSWER_CLOSE}")
    return NoAction(thought or text.strip())


def _split_thought(text: str) -> tuple[str, str]:
    """Take the first closed think block out, if it opens before any action: tags a model merely thinks about are no
    action."""
    start = text.find(THINK_OPEN)
    if start < 0:
        return text, ""
    action = min((at for at in (text.find(TOOL_OPEN), text.find(ANSWER_OPEN)) if at >= 0), default=len(text))
    end = text.find(THINK_CLOSE, start)
    if start > action or end < 0:
        return text, ""
    return text[:start] + "\n" + text[end + len(THINK_CLOSE) :], text[start + len(THINK_OPEN) : end].strip()


def _tool_payload(rest: str) -> tuple[str, str]:
    """Split what follows ``<tool>`` into the JSON text and the text after ``</tool>``; a closing tag inside a JSON
    string is text."""
    in_string = False
    for match in re.finditer(r'\\.|"|</tool>', rest, re.DOTALL):
        token = match.group()
        if token == '"':
            in_string = not in_string
        elif token == TOOL_CLOSE and not in_string:
            return rest[: match.start()], rest[match.end() :]
    # A broken string can swallow the closing tag; the JSON reader then names the defect, so fall back to the first one.
    payload, closed, trailing = rest.partition(TOOL_CLOSE)
    if not closed:
        raise _Refusal(MalformedReason.UNCLOSED_TOOL, f"{TOOL_OPEN} is not closed by {TOOL_CLOSE}")
    return payload, trailing


def _read_call(payload: str, rules: Rules) -> tuple[tuple[Region, ...], str]:
    call = _read_json(payload, rules)
    if not isinstance(call, dict):
        raise _Refusal(MalformedReason.NOT_AN_OBJECT, f"the tool JSON must be an object, it is {_kind(call)}")
    if "region" not in call:
        raise _Refusal(MalformedReason.MISSING_REGION, 'the tool JSON has no "region"')
    entries = call["region"]
    if not isinstance(entries, list):
        raise _Refusal(MalformedReason.BAD_REGION_LIST, f'"region" must be a list of objects, it is {_kind(entries)}')
    # The published code took an empty list for a success without crops and then broke in the encoder; both rule sets
    # refuse it.
    if not entries:
        raise _Refusal(MalformedReason.EMPTY_REGION_LIST, '"region" is empty; name at least one region')
    regions = tuple(_read_region(i, entry, rules) for i, entry in enumerate(entries))
    if "query" not in call:
        raise _Refusal(MalformedReason.MISSING_QUERY, 'the tool JSON has no "query"')
    query = call["query"]
    if rules == "published":
        return regions, _clean(str(query))
    if not isinstance(query, str):
        raise _Refusal(MalformedReason.BAD_QUERY, f'"query" must be a string, it is {_kind(query)}')
    if not query.strip():
        raise _Refusal(MalformedReason.BLANK_QUERY, '"query" is blank; say what to look for')
    return regions, _clean(query)


def _read_region(i: int, entry: Any, rules: Rules) -> Region:
    if not isinstance(entry, dict):
        raise _Refusal(MalformedReason.BAD_REGION_LIST, f"region {i} must be an object, it is {_kind(entry)}")
    index = entry.get("index")
    if rules == "published" and isinstance(index, bool):
        index = int(index)
    if isinstance(index, bool) or not isinstance(index, int):
        raise _Refusal(MalformedReason.BAD_INDEX, f'region {i}: "index" must be a whole number, it is {_kind(index)}')
    box = entry.get("bbox_2d")
    if not isinstance(box, list) or len(box) != 4:
        found = f"a list of {len(box)}" if isinstance(box, list) else _kind(box)
        raise _Refusal(MalformedReason.BAD_BOX, f'region {i}: "bbox_2d" must be a list of 4 numbers, it is {found}')
    x1, y1, x2, y2 = (_read_coordinate(i, value, rules) for value in box)
    return Region(index, (x1, y1, x2, y2))


def _read_coordinate(i: int, value: Any, rules: Rules) -> float:
    number: float | None = None
    if isinstance(value, bool):
        number = float(value) if rules == "published" else None
    elif isinstance(value, int | float):
        number = float(value)
    elif isinstance(value, str) and len(value) <= MAX_NUMBER_CHARS:
        try:
            number = float(value)
        except ValueError:
            number = None
    if number is None:
        raise _Refusal(MalformedReason.BAD_BOX, f'region {i}: "bbox_2d" must hold numbers, it holds {_kind(value)}')
    if not math.isfinite(number):
        raise _Refusal(MalformedReason.NOT_FINITE, f'region {i}: "bbox_2d" holds {number}, coordinates must be finite')
    return number


def _read_json(payload: str, rules: Rules) -> Any:
    if len(payload) > MAX_TOOL_CHARS:
        detail = f"the tool JSON has {len(payload)} characters, at most {MAX_TOOL_CHARS} are read"
        raise _Refusal(MalformedReason.TOO_LONG, detail)
    depth = _json_depth(payload)
    if depth > MAX_TOOL_DEPTH:
        raise _Refusal(
            MalformedReason.TOO_DEEP, f"the tool JSON is nested {depth} deep, at most {MAX_TOOL_DEPTH} are read"
        )
    try:
        return json.loads(
            payload.strip(),
            parse_int=_read_int,
            parse_float=_read_float,
            object_pairs_hook=_read_object if rules == "strict" else None,
        )
    except json.JSONDecodeError as error:
        raise _Refusal(
            MalformedReason.BAD_JSON, f"the tool JSON cannot be read: {error.msg} at character {error.pos}"
        ) from None


def _json_depth(payload: str) -> int:
    """Deepest bracket nesting outside strings, by one linear pass; keeps deep text away from the recursive JSON
    reader."""
    depth = deepest = 0
    in_string = False
    for match in re.finditer(r'\\.|["\[\]{}]', payload, re.DOTALL):
        token = match.group()
        if token == '"':
            in_string = not in_string
        elif in_string:
            continue
        elif token in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif token in "]}":
            depth -= 1
    return deepest


def _read_int(literal: str) -> int:
    if len(literal) > MAX_NUMBER_CHARS:
        detail = f"the tool JSON holds a number of {len(literal)} characters, at most {MAX_NUMBER_CHARS} are read"
        raise _Refusal(MalformedReason.HUGE_NUMBER, detail)
    return int(literal)


def _read_float(literal: str) -> float:
    if len(literal) > 8 * MAX_NUMBER_CHARS:
        detail = f"the tool JSON holds a number of {len(literal)} characters, at most {8 * MAX_NUMBER_CHARS} are read"
        raise _Refusal(MalformedReason.HUGE_NUMBER, detail)
    return float(literal)


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise _Refusal(
                MalformedReason.DUPLICATE_KEY, f'the tool JSON names the key "{_clean(key[:40])}" twice in one object'
            )
        members[key] = value
    return members


def _clean(text: str) -> str:
    """Replace lone surrogates (a JSON ``\\ud800`` yields one): no tokenizer can encode them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a whole number",
        float: "a decimal number",
    }
    return names.get(type(value), "missing or null")


def format_tool_call(call: ToolCall) -> str:
    """Canonical ``<tool>…</tool>`` text of a call: compact JSON, whole coordinates without ``.0``;
    `parse_turn` reads it back."""
    region = [
        {"index": r.index, "bbox_2d": [int(v) if float(v).is_integer() else float(v) for v in r.box]}
        for r in call.regions
    ]
    body = json.dumps({"region": region, "query": _clean(call.query)}, ensure_ascii=False, separators=(",", ":"))
    # "<\/tool>" is the same JSON string as "</tool>" and cannot close the tag early.
    return f"{TOOL_OPEN}{body.replace('</', '<' + chr(92) + '/')}{TOOL_CLOSE}"


def without_tags(text: str) -> str:
    """Text without the protocol's tags, so that it can stand in a turn as the answer of somebody who knows none; nor is
    one left that the text around another makes, as in ``<an<answer>swer>``.
    """
    kept: list[str] = []
    for piece in re.findall("[^>]*>|[^>]+", text):
        kept += piece
        end = "".join(kept[-_LONGEST_TAG:])
        del kept[len(kept) - max((len(tag) for tag in TAGS if end.endswith(tag)), default=0) :]
    return "".join(kept)


def format_answer(text: str) -> str:
    """``<answer>…</answer>`` around a bare answer."""
    return f"{ANSWER_OPEN}{text}{ANSWER_CLOSE}"


def format_turn(action: ToolCall | Answer) -> str:
    """The assistant text of an action, its thought in a think block first if it has one."""
    thought = f"{THINK_OPEN}{action.thought}{THINK_CLOSE}" if action.thought else ""
    return thought + (format_tool_call(action) if isinstance(action, ToolCall) else format_answer(action.text))


def unbox(answer: str) -> str:
    r"""Content of the last ``\boxed{…}`` up to its balanced brace, or the answer itself if there is none or it is
    not closed."""
    start = answer.rfind("\\boxed{")
    if start < 0:
        return answer
    depth, begin = 1, start + len("\\boxed{")
    for at in range(begin, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[at], 0)
        if depth == 0:
            return answer[begin:at].strip()
    return answer


VIDEO_MARK = "<video>"
"""In a user turn of a published training record, where the frames of the next of its videos stand."""
