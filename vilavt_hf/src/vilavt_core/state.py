"""A conversation as a signed text that its client keeps, so that any server with the same model can go on with it.

A client sends its messages and images again with every question. A state is what these do not tell: the tokens that
the model really sampled, under which limits, and what has to come out when they are gone through again. No image and
no word of the messages is in it, only their hashes.

`replay` carries every question out again, with the sampled tokens instead of the model, through the same `Driver` that
answered it. So crops are cut by the rule that cut them first, and nothing of a state is believed: its limits must be
within the server's, its questions and images must be those of the messages, and tokens, places and pixels that come
out must be those that it names. What disagrees is a `StateError` that says what.

The text is base64url, without padding, of a byte with the version, the name of the key, HMAC-SHA256 of everything else,
and zlib over JSON. Its length is looked at before it is decoded, the signature before anything is inflated, and no more
is inflated than `MAX_BYTES`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
import stat
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from .conversation import FedTurn
from .driver import ConversationSettings, Driver
from .episode import Episode
from .errors import StateError
from .failures import quoted, quoted_error
from .presets import Limits
from .protocol import Box
from .regions import Picture
from .results import Sample
from .validation import problems

VERSION = 1
"""Of the text and what is in it; another one is refused."""
MAX_CHARACTERS = 512 * 1024
"""Of a state."""
MAX_BYTES = 4 * 1024 * 1024
"""Of the JSON in it."""
KEY_BYTES = 32
"""That a key has at least."""
_MAX_KEY_FILE = 4096
_NAME, _MAC = 4, hashlib.sha256().digest_size
_HEAD = 1 + _NAME + _MAC
_ROWS = 256
"""Of an image that are hashed at once."""

REMEDY = "send the request without it: the conversation is then rebuilt from its messages, without the zooms"


@dataclass(frozen=True)
class Origin:
    """What a conversation depends on beside its messages, its limits and what was sampled."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    checkpoint: str
    """Fingerprint of the model, an adapter's included."""
    prompts: str
    """Hash of the prompt set."""
    preset: str
    """Its name."""
    rules: str
    """Hash of all that the preset says beside limits and sampling."""

    @classmethod
    def of(cls, settings: ConversationSettings) -> Origin:
        """Of a backend's conversations."""
        rules = {k: v for k, v in asdict(settings.preset).items() if k not in ("limits", "sampling")}
        return cls(
            checkpoint=settings.fingerprint or settings.checkpoint or "",
            prompts=settings.prompts.sha256,
            preset=settings.preset.name,
            rules=_sha256(json.dumps(rules, sort_keys=True).encode()),
        )


@dataclass(frozen=True)
class AskedQuestion:
    """One question of a conversation and what was sampled for it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    pictures: tuple[str, ...]
    """A hash of each; see `picture_hash`."""
    question: str
    """Hash of its text."""
    answer: str
    """Hash of the answer as its client got it, blanks apart: clients strip and wrap what they show."""
    limits: Limits
    turns: tuple[FedTurn, ...]
    told: bool = False
    """Whether the answer is what the messages said it was: nothing was sampled."""

    @classmethod
    def of(cls, driver: Driver, answer: str | None, told: Limits | None = None) -> AskedQuestion:
        """Of a finished question about loaded images.

        Args:
            driver: of the question.
            answer: as its client got it; None is an empty one.
            told: limits of the request, if nothing was sampled; see `unsampled`.
        """
        episode = driver.conversation
        assert episode is not None
        pictures = [one for one in driver.sample.images if isinstance(one, Picture)]
        assert len(pictures) == len(driver.sample.images), "they are loaded"
        return cls(
            pictures=tuple(map(picture_hash, pictures)),
            question=_sha256(_utf8(driver.sample.question)),
            answer=_answer_hash(answer),
            limits=told or episode.limits,
            turns=episode.fed,
            told=told is not None,
        )


Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""JSON has integers that no float holds; comparing one with a time would end in an error that names no state."""


@dataclass(frozen=True)
class PlacedImage:
    """Where an image of a conversation has its tokens, and which part of which image it is."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    start: Whole
    """Place of its first token in the stream."""
    length: Whole
    inquiry: Whole
    source: Whole
    parent: Whole | None
    box: Box | None
    """In pixels of the parent."""
    width: Whole
    """Pixels, as shown."""
    height: Whole


@dataclass(frozen=True)
class ConversationState:
    """A conversation up to a finished question."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    origin: Origin
    questions: tuple[AskedQuestion, ...]
    images: tuple[PlacedImage, ...]
    pixels: str
    """Hash of all images as shown."""
    tokens: Whole
    """Of the stream."""
    stream: str
    """Hash of their ids."""
    issued: Whole = 0
    """Seconds since 1970."""

    @classmethod
    def of(cls, driver: Driver, questions: Sequence[AskedQuestion], issued: int = 0) -> ConversationState:
        """Of a finished question.

        Args:
            driver: of the last one.
            questions: all of them, the last one included.
            issued: see the field.
        """
        episode = driver.conversation
        assert episode is not None
        ids = episode.record.token_ids
        return cls(
            origin=Origin.of(driver.settings),
            questions=tuple(questions),
            images=_placed(episode),
            pixels=_sha256("".join(name for one in episode.inquiries for name in one.identities).encode()),
            tokens=len(ids),
            stream=_sha256(struct.pack(f"<{len(ids)}I", *ids)),
            issued=issued,
        )


@dataclass(frozen=True, eq=False)
class SaidQuestion:
    """An earlier question as the messages tell it."""

    pictures: Sequence[Picture]
    """Loaded; of a video its frames."""
    question: str
    answer: str


def unsampled(limits: Limits) -> Limits:
    """Limits for an answer that is not sampled here: bounds on sampling do not hold for it. Whether all of it fits into
    the context is seen where the next question is appended."""
    return replace(limits, max_new_tokens_per_turn=sys.maxsize, max_answer_tokens=None, max_context=None)


# ---------------------------------------------------------------------- what a state must agree with


def check_origin(state: ConversationState, settings: ConversationSettings) -> None:
    """Stop if a state belongs to another model or other settings.

    Raises:
        StateError: names the setting, with both values.
    """
    here = Origin.of(settings)
    for field in fields(Origin):
        theirs, ours = getattr(state.origin, field.name), getattr(here, field.name)
        if theirs != ours:
            name = {"prompts": "prompt set", "rules": f"version of the preset {here.preset}"}.get(
                field.name, field.name
            )
            raise StateError(
                f"vilavt.state was made with another {name}: {quoted(theirs)}, this server has {quoted(ours)}; send it "
                f"to a server that was started as the first one was, or {REMEDY}"
            )
    for number, asked in enumerate(state.questions):
        if problem := _limits_problem(asked.limits, settings.limits):
            raise StateError(
                f"vilavt.state, question {number}: it was asked with {problem}; start all replicas with the same "
                f"limits, or {REMEDY}"
            )


def check_said(state: ConversationState, said: Sequence[SaidQuestion]) -> None:
    """Stop if the messages tell another conversation. Reads every pixel of the images.

    Raises:
        StateError: names the question and what is different.
    """
    check_count(state, len(said))
    for number, (asked, told) in enumerate(zip(state.questions, said, strict=True)):
        where = f"vilavt.state does not belong to these messages: question {number}"
        if len(asked.pictures) != len(told.pictures):
            raise StateError(
                f"{where} had {len(asked.pictures)} images, now it has {len(told.pictures)}; send the messages of "
                f"that conversation, or {REMEDY}"
            )
        if asked.question != _sha256(_utf8(told.question)):
            raise StateError(f"{where} had another text; send the messages of that conversation, or {REMEDY}")
        if asked.answer != _answer_hash(told.answer):
            raise StateError(f"{where} had another answer; send the messages of that conversation, or {REMEDY}")
        for place, (before, picture) in enumerate(zip(asked.pictures, told.pictures, strict=True)):
            if before != (now := picture_hash(picture)):
                raise StateError(
                    f"{where} had another image {place} (SHA-256 {before[:12]}…, now {now[:12]}…); send the images "
                    f"of that conversation as they were, with the same bounds, or {REMEDY}"
                )


def check_count(state: ConversationState, count: int) -> None:
    """Stop if the messages have another number of questions before the last one.

    Raises:
        StateError: names both.
    """
    if len(state.questions) != count:
        raise StateError(
            f"vilavt.state is of a conversation of {len(state.questions)} questions, the messages have {count} before "
            f"the last one; send the state that came with the last answer, or {REMEDY}"
        )


def replay(
    before: Driver | None, settings: ConversationSettings, asked: AskedQuestion, said: SaidQuestion, name: str = ""
) -> Driver:
    """Carry a question out again, with what was sampled then.

    Args:
        before: of the question before it; None: it is the first.
        settings: of this backend.
        asked: the question.
        said: the same, as the messages tell it.
        name: of the new driver.

    Raises:
        StateError: it takes another course here.
    """
    limits = unsampled(asked.limits) if asked.told else asked.limits
    sample = Sample(said.pictures, said.question, limits=limits)
    driver = Driver(sample, settings, name=name) if before is None else before.follow_up(sample)
    driver.start()
    for turn in asked.turns:
        if driver.request is None or driver.episode is not driver.conversation:
            break
        driver.take(turn.token_ids, None, turn.finish)
    episode, error = driver.conversation, driver.result.error
    if error is not None:
        raise StateError(f"vilavt.state cannot be carried out again here: {error}; {REMEDY}") from error
    if episode is None or not episode.finished or len(episode.turns) != len(asked.turns):
        count = 0 if episode is None else len(episode.turns)
        course = "ends" if episode is not None and episode.finished else "goes on"
        raise StateError(
            f"vilavt.state cannot be carried out again here: a question of {len(asked.turns)} turns {course} after "
            f"{count}; start all replicas with the same version, or {REMEDY}"
        )
    return driver


def check_replayed(state: ConversationState, driver: Driver) -> None:
    """Stop if something else came out than the first time.

    Raises:
        StateError: names the image or the tokens.
    """
    again = ConversationState.of(driver, state.questions)
    remedy = f"start all replicas with the same versions of vilavt-hf, Pillow and the tokenizer, or {REMEDY}"
    if len(again.images) != len(state.images):
        raise StateError(
            f"vilavt.state has {len(state.images)} images, {len(again.images)} come out of it here; {remedy}"
        )
    for index, (now, then) in enumerate(zip(again.images, state.images, strict=True)):
        if now != then:
            raise StateError(f"vilavt.state has image {index} as {then}, here it comes out as {now}; {remedy}")
    if (again.tokens, again.stream) != (state.tokens, state.stream):
        raise StateError(
            f"vilavt.state is of a stream of {state.tokens} tokens ({state.stream[:12]}…), here it comes out as "
            f"{again.tokens} ({again.stream[:12]}…); {remedy}"
        )
    if again.pixels != state.pixels:
        raise StateError(f"vilavt.state: its images come out with other pixels here; {remedy}")


def picture_hash(picture: Picture) -> str:
    """SHA-256 (hex) of an image's pixels, and of what decides how it is shown: its bounds and its time."""
    image = picture.image
    head = [image.mode, *image.size, *asdict(picture.bounds).values(), picture.time]
    digest = hashlib.sha256(json.dumps(head).encode())
    for top in range(0, image.height, _ROWS):  # in strips: all of it as bytes would take as much memory again
        digest.update(image.crop((0, top, image.width, min(image.height, top + _ROWS))).tobytes())
    return digest.hexdigest()


def _placed(episode: Episode) -> tuple[PlacedImage, ...]:
    spans = {span.image_index: span for span in episode.record.image_spans}
    return tuple(
        PlacedImage(
            spans[index].start,
            spans[index].length,
            spans[index].inquiry,
            view.source,
            view.parent,
            view.box,
            *view.image.size,
        )
        for index, view in enumerate(episode.views)
    )


def _limits_problem(limits: Limits, allowed: Limits) -> str | None:
    """The first limit that a request to a backend with the `allowed` ones could not have asked for."""
    for field in fields(Limits):
        value, most = _effective(limits, field.name), _effective(allowed, field.name)
        fits = most is None or (value is not None and value <= most) if field.metadata["per_request"] else value == most
        if not fits:
            return f"{field.name} {'unlimited' if value is None else f'{value:.0f}'}, this server has {most:.0f}"
    return None


def _effective(limits: Limits, name: str) -> Any:
    value = getattr(limits, name)
    return limits.max_pixels if value is None and name == "crop_max_pixels" else value


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _answer_hash(answer: str | None) -> str:
    return _sha256(_utf8(" ".join((answer or "").split())))


# ---------------------------------------------------------------------- the text


class StateKey:
    """Signs states and knows its own.

    Args:
        secret: at least `KEY_BYTES` bytes that nobody can guess, the same on all replicas.

    Raises:
        StateError: too few.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) < KEY_BYTES:
            raise StateError(
                f"a key for states has {len(secret)} bytes, it must have at least {KEY_BYTES}; make one: "
                "openssl rand -hex 32"
            )
        self._secret = secret
        self._name = hmac.digest(secret, b"name of a vilavt.state key", "sha256")[:_NAME]

    @property
    def name(self) -> str:
        """By which two replicas see whether they have the same key; tells nothing about it."""
        return self._name.hex()

    @classmethod
    def fresh(cls) -> StateKey:
        """One that no other process has."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> StateKey:
        """What a file holds, blanks around it apart.

        Raises:
            StateError: it cannot be read, or holds no key.
        """
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise StateError(f"{path} is no file; name one that holds a key for states")
            with Path(path).open("rb") as file:
                secret = file.read(_MAX_KEY_FILE + 1).strip()
        except OSError as error:
            raise StateError(f"{path}: cannot be read: {quoted_error(error)}") from None
        if len(secret) > _MAX_KEY_FILE:
            raise StateError(f"{path} has more than {_MAX_KEY_FILE} bytes, it is no key for states")
        try:
            return cls(secret)
        except StateError as error:
            raise StateError(f"{path}: {error}") from None

    def sign(self, state: ConversationState) -> str:
        """The state as a text.

        Raises:
            StateError: it is larger than one may be.
        """
        data = _adapter().dump_json(state)
        payload = zlib.compress(data, 9)
        head = bytes([VERSION]) + self._name
        text = base64.urlsafe_b64encode(head + self._mac(head, payload) + payload).rstrip(b"=").decode()
        if len(data) > MAX_BYTES or len(text) > MAX_CHARACTERS:
            raise StateError(
                f"the conversation's state has {len(text)} characters ({len(data)} bytes of JSON), at most "
                f"{MAX_CHARACTERS} ({MAX_BYTES}) are sent; begin a new conversation"
            )
        return text

    def read(self, text: str, *, max_age: float | None = None, now: float = 0.0) -> ConversationState:
        """The state that a text holds.

        Args:
            text: from a client.
            max_age: seconds that it may be old; None: any age.
            now: seconds since 1970.

        Raises:
            StateError: it is none, is of another version or key, was changed, or is too old.
        """
        data = _unpacked(text)
        head, mac, payload = data[: 1 + _NAME], data[1 + _NAME : _HEAD], data[_HEAD:]
        if head[0] != VERSION:
            raise StateError(f"vilavt.state has version {head[0]}, this server reads version {VERSION}; {REMEDY}")
        if not hmac.compare_digest(head[1:], self._name):
            raise StateError(
                f"vilavt.state was signed with another key ({head[1:].hex()}, this server has {self.name}): by another "
                "server, or by this one before it was started again; give all replicas one key (--state-key-file), or "
                f"{REMEDY}"
            )
        if not hmac.compare_digest(mac, self._mac(head, payload)):
            raise StateError(
                f"vilavt.state was changed on its way: its signature does not fit; send it as it came, or {REMEDY}"
            )
        try:
            state: ConversationState = _adapter().validate_json(_inflated(payload), strict=True)
        except ValidationError as error:
            raise StateError(f"vilavt.state cannot be read: {problems(error, most=1)}; {REMEDY}") from None
        if max_age is not None and not -max_age <= now - state.issued <= max_age:
            raise StateError(
                f"vilavt.state is {now - state.issued:.0f} s old, at most {max_age:.0f} are allowed "
                f"(--state-max-age); {REMEDY}"
            )
        return state

    def _mac(self, head: bytes, payload: bytes) -> bytes:
        return hmac.digest(self._secret, b"vilavt.state\0" + head + payload, "sha256")


def _unpacked(text: str) -> bytes:
    """The bytes of a state: of its only spelling, so that none is taken for another."""
    if len(text) > MAX_CHARACTERS:
        raise StateError(
            f"vilavt.state has {len(text)} characters, at most {MAX_CHARACTERS} are read; send it as it came, or "
            f"{REMEDY}"
        )
    try:
        data = base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except (UnicodeEncodeError, binascii.Error):
        data = b""
    if len(data) <= _HEAD or base64.urlsafe_b64encode(data).rstrip(b"=").decode() != text:
        raise StateError(f"vilavt.state is none: it is no base64url of a state; send it as it came, or {REMEDY}")
    return data


def _inflated(payload: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(payload, MAX_BYTES)
    except zlib.error as error:
        raise StateError(f"vilavt.state cannot be read: {error}; {REMEDY}") from None
    if not inflater.eof or inflater.unused_data:
        raise StateError(f"vilavt.state cannot be read: it does not end within {MAX_BYTES} bytes; {REMEDY}")
    return data


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[ConversationState]:
    return TypeAdapter(ConversationState)
