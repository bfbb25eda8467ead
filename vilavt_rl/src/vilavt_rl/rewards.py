"""Rewards of whole trajectories: accuracy, format, and what is made of them. Pure functions, the same in every host.

``overall = 0.5 * accuracy + 0.5 * format`` if the accuracy is above 0, else 0: form alone earns nothing. What counts as
accurate is `vilavt_core.scoring`'s business. ``strict`` (default) also asks that the trajectory ends in an answer
of the assistant, and that every call could be carried out; ``published`` is the published reward bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vilavt_core.conversation import Result
from vilavt_core.protocol import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    TOOL_CLOSE,
    TOOL_OPEN,
    Answer,
    Rules,
    ToolCall,
    parse_turn,
    unbox,
)
from vilavt_core.scoring import ScorerVersion, score_answer
from vilavt_core.scoring.published import tagged_answer

from .errors import RewardError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a trajectory."""

    role: Role
    text: str
    problem: str | None = None
    """Why an assistant's turn was not carried out, as the episode found: index, bounds, budgets. None: it was."""


@dataclass(frozen=True)
class Trajectory:
    """What a reward looks at."""

    messages: tuple[Message, ...]
    """From the first assistant turn on."""
    sampled_tokens: int = 0

    @classmethod
    def of(cls, result: Result) -> Trajectory:
        """The trajectory of a finished episode."""
        messages = []
        for turn in result.turns:
            messages.append(Message("assistant", turn.text, turn.problem))
            if turn.feedback is not None:
                messages.append(Message("user", turn.feedback))
        return cls(tuple(messages), result.usage.sampled_tokens)

    @classmethod
    def read(cls, text: str, *, sampled_tokens: int = 0) -> Trajectory:
        """The trajectory of a decoded response that begins inside an assistant turn.

        Turns are told apart by ``<|im_start|>`` and ``<|im_end|>``, so decode with special tokens. Without an episode
        nobody checked whether regions fit their images: ``problem`` is None throughout.
        """
        messages: list[Message] = []
        for i, part in enumerate(re.split(r"<\|im_start\|>", text)):
            role, _, body = ("assistant", "", part) if i == 0 else part.partition("\n")
            body = body.partition("<|im_end|>")[0]
            if role in ("system", "user", "assistant") and (body or i):
                messages.append(Message(role, body))  # type: ignore[arg-type]
        return cls(tuple(messages), sampled_tokens)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data, for the way between processes."""
        return [{"role": m.role, "text": m.text, "problem": m.problem} for m in self.messages]

    @classmethod
    def from_json(cls, messages: Sequence[Mapping[str, Any]], *, sampled_tokens: int = 0) -> Trajectory:
        """Inverse of `to_json`."""
        return cls(tuple(Message(m["role"], m["text"], m.get("problem")) for m in messages), sampled_tokens)


@dataclass(frozen=True)
class Task:
    """What was asked, as far as a reward cares."""

    answer: Any
    """The right answer; text, as in the data."""
    question_type: str
    data_type: str = ""
    """Prefix of metrics."""
    options: tuple[str, ...] = ()
    """Of a multiple choice, all of them with their letters; empty: not known. ``strict`` only."""


@dataclass(frozen=True)
class RewardSettings:
    """How a reward is composed. The two shaping terms are off by default; both apply to right answers only."""

    version: ScorerVersion = "strict"
    tool_bonus: float = 0.0
    """Added if at least one zoom was carried out and the accuracy is above 0."""
    length_penalty: float = 0.0
    """Taken off at ``length_limit`` sampled tokens and beyond; grows linearly over the last ``length_buffer``. A right
    answer keeps at least the 0 of a wrong one."""
    length_limit: int | None = None
    length_buffer: int = 512

    def __post_init__(self) -> None:
        if self.version not in ("strict", "published"):
            raise RewardError(f"reward version {self.version!r}: it must be strict or published")
        if self.length_penalty and (self.length_limit is None or self.length_buffer < 1):
            raise RewardError(
                f"length_penalty={self.length_penalty} needs length_limit (it is {self.length_limit}) and a "
                f"length_buffer of at least 1 (it is {self.length_buffer})"
            )


@dataclass(frozen=True)
class Reward:
    """What a trajectory earned, and why."""

    overall: float
    """What is trained on."""
    accuracy: float
    """0 to 1."""
    format: float
    """0 or 1."""
    zooms: int
    """Tool calls that were carried out."""
    turns: int
    """Of the assistant."""

    @property
    def zoomed(self) -> bool:
        """Whether there was a zoom at all: its mean over a batch is the share of episodes that zoom."""
        return self.zooms > 0

    def metrics(self, data_type: str = "") -> dict[str, float]:
        """Numbers for a trainer's log; with a data type also ``{data_type}_accuracy`` and ``{data_type}_format``."""
        out = {
            "overall": self.overall,
            "accuracy": self.accuracy,
            "format": self.format,
            "zooms": float(self.zooms),
            "zoomed": float(self.zoomed),
            "turns": float(self.turns),
        }
        if data_type:
            out |= {f"{data_type}_accuracy": self.accuracy, f"{data_type}_format": self.format}
        return out


def reward(trajectory: Trajectory, task: Task, settings: RewardSettings = RewardSettings()) -> Reward:
    """The reward of one trajectory.

    Raises:
        ScoringError: the task's type is unknown or its answer does not fit (``strict`` only).
    """
    right = accuracy(trajectory, task, settings.version)
    formed = format_score(trajectory, settings.version)
    zooms = sum(map(_zoomed, trajectory.messages[:-1]))
    total = overall(right, formed)
    if right > 0:
        total += settings.tool_bonus * (zooms > 0)
        total -= settings.length_penalty * _overlong(trajectory.sampled_tokens, settings)
        total = max(0.0, total)  # what a wrong answer gets
    turns = sum(message.role == "assistant" for message in trajectory.messages)
    return Reward(total, right, formed, zooms, turns)


def _zoomed(message: Message) -> bool:
    """Whether a turn is a call that was carried out. Episodes read turns by either rules and note what failed; decoded
    text notes nothing, so that a call must at least parse."""
    if message.role != "assistant" or message.problem is not None:
        return False
    return any(isinstance(parse_turn(message.text, rules), ToolCall) for rules in get_args(Rules))


def overall(accuracy: float, format: float) -> float:
    """Half each, and nothing without accuracy."""
    return 0.5 * accuracy + 0.5 * format if accuracy > 0 else 0.0


def accuracy(trajectory: Trajectory, task: Task, version: ScorerVersion = "strict") -> float:
    """How right the last turn is, 0 to 1.

    ``strict``: the last turn must be an assistant's and hold exactly one closed answer. ``published``: whatever comes
    last, its first answer tag or, without one, all of it.
    """
    if not trajectory.messages:
        return 0.0
    last = trajectory.messages[-1]
    if version == "published":
        # a target of 0 (the number, not the text) is falsy and can never be met
        return (
            score_answer(_published_answer(last.text), str(task.answer), task.question_type, version=version)
            if (task.answer)
            else 0.0
        )
    action = parse_turn(last.text) if last.role == "assistant" else None
    found = action.text if isinstance(action, Answer) and last.problem is None else None
    return score_answer(found, str(task.answer), task.question_type, options=task.options)


def format_score(trajectory: Trajectory, version: ScorerVersion = "strict") -> float:
    """1.0 if every assistant turn keeps the protocol, else 0.0.

    ``strict``: each turn is one think block and then either one tool call that was carried out or, in the last turn,
    one answer. ``published``: think tags balance; a tool call parses and its boxes are not empty; an answer closes.
    """
    turns = [m for m in trajectory.messages if m.role == "assistant"]
    if not turns or (version == "strict" and trajectory.messages[-1].role != "assistant"):
        return 0.0
    if version == "published":
        return float(all(_published_form(turn.text) for turn in turns))
    *calls, last = turns
    return float(all(_strict_form(turn, ToolCall) for turn in calls) and _strict_form(last, Answer))


def _strict_form(turn: Message, wanted: type) -> bool:
    text = turn.text.strip()
    action = parse_turn(text)
    return (
        turn.problem is None
        and isinstance(action, wanted)
        and not getattr(action, "trailing", "")
        and text.startswith(THINK_OPEN)
        and text.count(THINK_OPEN) == text.count(THINK_CLOSE) == 1
    )


def _overlong(tokens: int, settings: RewardSettings) -> float:
    if settings.length_limit is None:
        return 0.0
    begin = settings.length_limit - settings.length_buffer
    return min(1.0, max(0.0, (tokens - begin) / settings.length_buffer))


# ---------------------------------------------------------------------- the published reward


def _published_answer(text: str) -> str:
    return unbox(tagged_answer(text).strip())


def _published_form(text: str) -> bool:
    if not _balanced(text):
        return False
    _, opened, rest = text.partition(TOOL_OPEN)
    if opened:
        call, closed, _ = rest.partition(TOOL_CLOSE)
        return bool(closed) and _published_call(call)
    return ANSWER_OPEN not in text or ANSWER_CLOSE in text.partition(ANSWER_OPEN)[2]


def _balanced(text: str) -> bool:
    """At least one think block, every one closed."""
    depth, seen = 0, False
    for tag in re.findall(f"{THINK_OPEN}|{THINK_CLOSE}", text):
        depth += 1 if tag == THINK_OPEN else -1
        seen = True
        if depth < 0:
            return False
    return seen and depth == 0


def _published_call(payload: str) -> bool:
    """Shape only: neither the index nor the bounds of a region are looked at."""
    try:
        call = json.loads(payload.strip())
    except (ValueError, RecursionError):
        return False
    if not isinstance(call, dict) or not isinstance(call.get("region"), list) or not call["region"]:
        return False
    query = call.get("query")
    return isinstance(query, str) and bool(query.strip()) and all(map(_published_region, call["region"]))


def _published_region(region: Any) -> bool:
    if not isinstance(region, dict) or "index" not in region:
        return False
    box = region.get("bbox_2d")
    if not isinstance(box, list) or len(box) != 4:
        return False
    try:
        x1, y1, x2, y2 = (float(value) for value in box)
    except (TypeError, ValueError, OverflowError):  # the last: an integer of 400 digits, which ended the published run
        return False
    return x1 < x2 and y1 < y2
