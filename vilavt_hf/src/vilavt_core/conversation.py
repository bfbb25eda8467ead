"""The token stream of a conversation: the types an episode hands out and keeps.

Requests go to an engine, turns and the result to the user, the record to a trainer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

from PIL import Image

from .drawing import png_url
from .errors import EpisodeError
from .presets import Limits
from .prompts import PromptPart
from .protocol import Action, Answer, FinishReason, Malformed, MalformedReason, NoAction, Region, ToolCall
from .regions import FACTOR, Box, View

BAN = -100.0
"""Logit bias of a token that must not be sampled: the lowest that vLLM, like OpenAI's API, accepts."""


class Tokenizer(Protocol):
    """What an episode needs of a tokenizer; any transformers tokenizer with Qwen's special tokens has it."""

    def encode(self, text: str, *, add_special_tokens: bool = ..., split_special_tokens: bool = ...) -> list[int]:
        """Text to ids."""

    def decode(
        self, token_ids: Any, *, skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...
    ) -> str:
        """Ids to text."""

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        """Id of one token."""

    def get_vocab(self) -> dict[str, int]:
        """Ids of all tokens."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that structure the stream, looked up by name."""

    im_start: int
    im_end: int
    endoftext: int
    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> SpecialTokens:
        """Look the ids up.

        Raises:
            EpisodeError: the tokenizer lacks one of them.
        """
        unknown = getattr(tokenizer, "unk_token_id", None)
        ids: dict[str, int] = {}
        for name in cls.__dataclass_fields__:
            token_id = tokenizer.convert_tokens_to_ids(f"<|{name}|>")
            if token_id is None or token_id == unknown:
                raise EpisodeError(
                    f"the tokenizer has no token <|{name}|>; use the tokenizer of a Qwen2.5-VL checkpoint"
                )
            ids[name] = int(token_id)
        return cls(**ids)

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end a turn."""
        return (self.im_end, self.endoftext)

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that must not be sampled: they stand for image features."""
        return (self.vision_start, self.vision_end, self.image_pad, self.video_pad)


def decode_turn(tokenizer: Tokenizer, token_ids: Sequence[int], stops: Container[int]) -> str:
    """Text of sampled tokens, special tokens included, without the stop token at the end."""
    ids = list(token_ids[:-1] if token_ids and token_ids[-1] in stops else token_ids)
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


def is_whole_text(text: str) -> bool:
    """Whether decoded text ends between two characters: of an unfinished one, bytes are still missing."""
    return not text.endswith("\ufffd")


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


@dataclass(frozen=True, eq=False)
class Inquiry:
    """Images that the encoder sees together, and what it is asked about them."""

    images: tuple[Image.Image, ...]
    """Encoder-ready, in conversation order; an original is alone in its inquiry."""
    query: str
    """Without prefix; empty for an original."""
    image_indices: tuple[int, ...]
    """Places in the conversation, counted from 0."""
    query_prefix: str | None = None
    """Put before a non-blank query by every engine and trainer alike: the preset's; None takes the checkpoint's."""

    @cached_property
    def identities(self) -> tuple[str, ...]:
        """A name of each image that equal ones share: of its mode, size and pixels. An engine that asks for it at every
        turn, to find what it has encoded, looks at the pixels once.
        """
        heads = (f"{image.mode} {image.width} {image.height} ".encode() for image in self.images)
        return tuple(
            hashlib.sha256(head + image.tobytes()).hexdigest() for head, image in zip(heads, self.images, strict=True)
        )


@dataclass(frozen=True)
class ShownImage:
    """What an image of a conversation is, without its pixels."""

    index: int
    """Its place in the conversation, counted from 0."""
    kind: Literal["original", "crop"]
    width: int
    """Pixels, as the encoder gets it."""
    height: int
    source: int
    """Which source image, counted from 0."""
    region: Box
    """The part of the source, as fractions of its width and height."""
    parent: int | None
    """The image that it was cropped out of."""
    box: Box | None
    """Where, in pixels of that image."""
    query: str
    """What the encoder was asked about it."""
    name: str = ""
    """Of the source's file; empty: unknown."""
    time: float | None = None
    """Of the source within its video, in seconds; None: it is no frame."""

    @classmethod
    def of(cls, index: int, view: View, query: str) -> ShownImage:
        """A view of a conversation."""
        return cls(
            index,
            view.kind,
            view.image.width,
            view.image.height,
            view.source,
            view.region,
            view.parent,
            view.box,
            query,
            view.name,
            view.time,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShownImage:
        """Inverse of `to_json`; other keys are ignored."""
        given = {f.name: data[f.name] for f in fields(cls) if f.default is MISSING or f.name in data}
        box = None if given["box"] is None else tuple(given["box"])
        return cls(**{**given, "region": tuple(given["region"]), "box": box})


@dataclass(frozen=True, eq=False)
class Request:
    """What the engine has to do next."""

    new_token_ids: list[int]
    """Everything appended since, and without, the tokens the engine sampled last."""
    all_token_ids: list[int]
    """The whole stream so far."""
    new_inquiries: tuple[Inquiry, ...]
    """Inquiries whose placeholders are in ``new_token_ids``."""
    inquiries: tuple[Inquiry, ...]
    """All inquiries so far, in stream order."""
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]
    turn: int
    """Counted from 0 within this episode."""

    def logit_bias(self, *more: int) -> dict[int, float]:
        """The ban of `banned_token_ids` and `more` for engines with a ``logit_bias``: what is added to the logits."""
        return dict.fromkeys((*self.banned_token_ids, *more), BAN)


@dataclass(frozen=True)
class FedTurn:
    """One assistant turn as an engine gave it."""

    token_ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    """Why sampling ended."""


@dataclass(frozen=True, eq=False)
class Turn:
    """One assistant turn and what came of it."""

    index: int
    text: str
    """Decoded, without the stop token."""
    action: Action
    token_count: int
    """Sampled tokens, the stop token included."""
    views: tuple[View, ...] = ()
    """Crops that were shown in reply."""
    image_indices: tuple[int, ...] = ()
    """Their places in the conversation."""
    feedback: str | None = None
    """The tool response as text, a crop as ``<image WxH>``; None if the episode ended with this turn."""
    problem: str | None = None
    """Why the action was not carried out."""
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; crops are named by their places in the conversation."""
        return {
            "index": self.index,
            "text": self.text,
            "action": _action_json(self.action),
            "tokens": self.token_count,
            "images": list(self.image_indices),
            "feedback": self.feedback,
            "problem": self.problem,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Turn:
        """What `to_json` wrote, without the views."""
        return cls(
            index=data["index"],
            text=data["text"],
            action=_action_from_json(data["action"]),
            token_count=data["tokens"],
            image_indices=tuple(data["images"]),
            feedback=data["feedback"],
            problem=data["problem"],
            seconds=data["seconds"],
        )


@dataclass(frozen=True)
class Usage:
    """Counts over the whole stream."""

    prompt_tokens: int
    """Tokens that were not sampled, image tokens included."""
    sampled_tokens: int
    image_tokens: int
    images: int
    turns: int


@dataclass(frozen=True)
class ImageSpan:
    """Where an image's placeholders are: ``token_ids[start : start + length]``, all ``<|image_pad|>``."""

    start: int
    length: int
    image_index: int
    inquiry: int


@dataclass(frozen=True, eq=False)
class Record:
    """The stream, ready to train on. All per-token lists have one entry per token of ``token_ids``."""

    token_ids: list[int]
    loss_mask: list[int]
    """1 for sampled tokens, else 0."""
    logprobs: list[float | None]
    """As fed; None where nothing was sampled or no logprob was fed."""
    image_spans: tuple[ImageSpan, ...]
    inquiries: tuple[Inquiry, ...]


@dataclass(frozen=True, eq=False)
class Result:
    """How an episode ended."""

    answer: str | None
    finish: FinishReason
    detail: str
    """For every finish but ``answer``: what happened, both numbers, and what to change."""
    turns: tuple[Turn, ...]
    images: tuple[ShownImage, ...]
    """All images as shown, in conversation order."""
    inquiries: tuple[Inquiry, ...]
    """With their pixels; none in a result that a server told."""
    views: tuple[View, ...]
    """The images with their pixels; none in a result that a server told."""
    usage: Usage
    preset: str
    limits: Limits
    prompts: str
    prompts_sha256: str
    versions: Mapping[str, str]
    sample_id: str | None = None

    def to_json(self, *, include_images: bool = False) -> dict[str, Any]:
        """Plain JSON data; with ``include_images`` every shown image as a PNG data URL."""
        inquiry_of = {index: number for number, inquiry in enumerate(self.inquiries) for index in inquiry.image_indices}
        images = []
        for image in self.images:
            entry = {**image.to_json(), "inquiry": inquiry_of.get(image.index)}
            if include_images and self.views:
                entry["png"] = png_url(self.views[image.index].image)
            images.append(entry)
        return {
            "sample_id": self.sample_id,
            "answer": self.answer,
            "finish": self.finish.value,
            "detail": self.detail,
            "turns": [turn.to_json() for turn in self.turns],
            "images": images,
            "usage": asdict(self.usage),
            "preset": self.preset,
            "limits": asdict(self.limits),
            "prompts": {"name": self.prompts, "sha256": self.prompts_sha256},
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """What `to_json` wrote, without pixels.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(
            answer=data["answer"],
            finish=FinishReason(data["finish"]),
            detail=data["detail"],
            turns=tuple(map(Turn.from_json, data["turns"])),
            images=tuple(map(ShownImage.from_json, data["images"])),
            inquiries=(),
            views=(),
            usage=Usage(**data["usage"]),
            preset=data["preset"],
            limits=Limits(**data["limits"]),
            prompts=data["prompts"]["name"],
            prompts_sha256=data["prompts"]["sha256"],
            versions=dict(data["versions"]),
            sample_id=data["sample_id"],
        )


@dataclass
class TokenStream:
    """Parallel lists over the tokens of the conversation; only ever appended to."""

    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    spans: list[ImageSpan] = field(default_factory=list)
    inquiries: list[Inquiry] = field(default_factory=list)
    transcript: list[str] = field(default_factory=list)
    sent: int = 0
    """Tokens the engine knows: those it was given and those it sampled."""
    sent_inquiries: int = 0

    def fork(self) -> TokenStream:
        """A copy whose lists grow on their own."""
        return TokenStream(
            list(self.tokens),
            list(self.mask),
            list(self.logprobs),
            list(self.spans),
            list(self.inquiries),
            list(self.transcript),
            self.sent,
            self.sent_inquiries,
        )


@dataclass(frozen=True)
class Chunk:
    """Tokens about to be appended; spans are relative to its start, as (start, length, image index)."""

    tokens: list[int]
    spans: list[tuple[int, int, int]]
    text: str


@dataclass(frozen=True)
class Mark:
    """A structural token among the pieces of a turn."""

    token_id: int


def compose(
    parts: Sequence[PromptPart | Mark],
    sizes: Mapping[int, tuple[int, int]],
    tokenizer: Tokenizer,
    special: SpecialTokens,
) -> Chunk:
    """Tokens of a piece of conversation; neighbouring texts are joined before they are encoded, as a chat template
    would.

    Args:
        parts: texts, structural tokens, and images by their index.
        sizes: width and height in pixels of every image, multiples of 28.
        tokenizer: encodes the texts; whatever they hold, none becomes a structural token.
        special: its structural tokens.
    """
    tokens: list[int] = []
    spans: list[tuple[int, int, int]] = []
    transcript: list[str] = []
    text = ""
    for part in [*parts, Mark(-1)]:
        if isinstance(part, str):
            text += part
            continue
        if text:
            tokens += encode_text(text, tokenizer, special)
            transcript.append(text)
            text = ""
        if isinstance(part, int):
            width, height = sizes[part]
            count = (width // FACTOR) * (height // FACTOR)
            tokens.append(special.vision_start)
            spans.append((len(tokens), count, part))
            tokens += [special.image_pad] * count
            tokens.append(special.vision_end)
            transcript.append(f"<image {width}x{height}>")
        elif part.token_id >= 0:
            tokens.append(part.token_id)
            transcript.append("<|im_start|>" if part.token_id == special.im_start else "<|im_end|>")
    return Chunk(tokens, spans, "".join(transcript))


def encode_text(text: str, tokenizer: Tokenizer, special: SpecialTokens) -> list[int]:
    """Text to ids such that no text becomes a structural token."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    if {special.im_start, *special.stops, *special.banned}.isdisjoint(ids):
        return ids
    # The tokenizer ignores split_special_tokens: cut every "<|" in two, so that it recognises no special token.
    pieces = text.replace("<|", "<\0|").split("\0") if "\0" not in text else list(text)
    return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]


_LONGEST: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token: no text of more than this times n characters fits into n tokens."""
    if (known := _LONGEST.get(tokenizer)) is None:
        known = _LONGEST[tokenizer] = max(map(len, tokenizer.get_vocab()), default=1)
    return known


def text_problem(characters: int, room: int, tokenizer: Tokenizer) -> str | None:
    """Why a text cannot fit, told from its length alone: encoding takes seconds per million characters.

    Args:
        characters: of the text.
        room: tokens that it may take.
        tokenizer: would encode it.

    Returns:
        None: it may fit; only encoding it tells.
    """
    if characters <= room:  # a token has at least one character: the vocabulary need not be read
        return None
    most = max(0, room) * longest_token(tokenizer)
    if characters <= most:
        return None
    return f"the text has {characters} characters, at most {most} can fit into the {max(0, room)} tokens that are left"


def _action_json(action: Action) -> dict[str, Any]:
    if isinstance(action, ToolCall):
        regions = [{"index": region.index, "box": list(region.box)} for region in action.regions]
        called = {"type": "tool_call", "thought": action.thought, "regions": regions, "query": action.query}
        return {**called, "trailing": action.trailing}
    if isinstance(action, Answer):
        return {"type": "answer", "thought": action.thought, "text": action.text, "trailing": action.trailing}
    if isinstance(action, Malformed):
        return {"type": "malformed", "reason": action.reason.value, "detail": action.detail}
    return {"type": "no_action", "thought": action.thought}


def _action_from_json(data: Mapping[str, Any]) -> Action:
    if data["type"] == "tool_call":
        regions = tuple(Region(one["index"], tuple(one["box"])) for one in data["regions"])
        return ToolCall(regions, data["query"], data["thought"], data["trailing"])
    if data["type"] == "answer":
        return Answer(data["text"], data["thought"], data["trailing"])
    if data["type"] == "malformed":
        return Malformed(MalformedReason(data["reason"]), data["detail"])
    return NoAction(data["thought"])
