"""What goes into a conversation and what comes out of it: samples, interventions, events, results."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral
from typing import Any, Literal

from .attention import AttentionPicture
from .conversation import Inquiry, Record, Result, ShownImage, Thoughts, Turn
from .errors import EngineError
from .presets import Limits, Sampling
from .protocol import Answer, Region, ToolCall
from .regions import Picture, PixelBounds, View
from .sources import ImageSource, image_list, type_name

Images = ImageSource | Picture | Sequence[ImageSource | Picture]
"""What a question may be about: one image or several, in any form; a `Picture` is loaded already."""


def sample_images(images: Images) -> list[ImageSource | Picture]:
    """One image or several as a list; see `vilavt_core.sources.image_list`.

    Raises:
        ImageError: it is neither an image nor an ordered collection; names its type.
    """
    return [images] if isinstance(images, Picture) else list(image_list(images))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Sample:
    """One question about some images."""

    images: Sequence[ImageSource | Picture]
    """One image is taken for a list of one; what an image may be, says `vilavt_core.sources`. A `Picture` is loaded
    already."""
    question: str
    id: str | None = None
    """Named in errors and results; also varies the seed."""
    seed: int | None = None
    """Drives this sample's sampling alone; None: made from the backend's and `id`, else its place among those asked
    together; drawn anew if the backend has none."""
    limits: Limits | None = None
    """Instead of the chat's, e.g. ``max_turns=1`` for an answer without zoom."""
    bounds: Sequence[PixelBounds] = ()
    """Of each image, on its pixels as the encoder sees it, within the limits; empty: those of each `Picture`, else the
    limits alone."""
    data: Any = None
    """Anything; not read here, handed to the hooks of an `Intervention`."""

    def __post_init__(self) -> None:
        """Raise what cannot be a sample.

        Raises:
            ImageError: `images` is neither an image nor a list of images.
            EngineError: question, limits or seed are of another type, or there are bounds for some images only.
        """
        where = "" if self.id is None else f"sample {self.id}: "
        if not isinstance(self.question, str):
            raise EngineError(f"{where}the question is a {type_name(self.question)}, it must be text; check the order")
        if not (self.limits is None or isinstance(self.limits, Limits)):
            raise EngineError(
                f"{where}limits are a {type_name(self.limits)}; change those of the backend: "
                "dataclasses.replace(backend.provenance(0).limits, max_turns=1)"
            )
        if not (self.seed is None or isinstance(self.seed, Integral)):
            raise EngineError(f"{where}the seed is a {type_name(self.seed)}, it must be a whole number")
        object.__setattr__(self, "images", sample_images(self.images))
        if self.bounds and len(self.bounds) != len(self.images):
            raise EngineError(
                f"{where}{len(self.bounds)} bounds for {len(self.images)} images; give one for each, or none"
            )

    @classmethod
    def of(cls, entry: Sample | tuple[Any, str]) -> Sample:
        """A sample as it is, or a pair of image or images and question.

        Raises:
            EngineError: it is something else.
        """
        if isinstance(entry, Sample):
            return entry
        if not isinstance(entry, tuple | list) or len(entry) != 2:
            size = f" of {len(entry)}" if isinstance(entry, tuple | list) else ""
            raise EngineError(
                f"a sample is a Sample or a pair (images, question), not a {type_name(entry)}{size}; id, seed and "
                "limits go into Sample(images, question, id=…, seed=…, limits=…)"
            )
        return cls(*entry)

    def seed_from(self, base: int, place: int = 0) -> int:
        """This sample's seed: its own, else made from a `base` seed and its id, else from the base and its place.

        Args:
            base: of the backend or the run.
            place: among the samples that are asked together, counted from 0; the first one draws from the base itself.
        """
        if self.seed is not None:
            return self.seed
        if self.id is None and place == 0:
            return base
        # A NUL keeps a place apart from every id that people write.
        name = f"\0{place}" if self.id is None else self.id
        return int.from_bytes(hashlib.sha256(f"{base}:{name}".encode()).digest()[:6], "big")

    def drawing_seed(self, base: int | None, sampling: Sampling, place: int = 0) -> int:
        """The seed that this sample is drawn with: as `seed_from`, and a fresh one if there is no base and the sampling
        draws at all. Greedy decoding draws nothing; its seed counts from 0, so that equal questions have equal records.
        """
        if base is None and self.seed is None and sampling.temperature > 0:
            return secrets.randbits(48)
        return self.seed_from(base or 0, place)


@dataclass(frozen=True)
class Intervention:
    """Changes to what really happens, behind the back of the text: for ablations. Every hook is optional.

    No zoom is not a hook: give the sample ``Limits(max_turns=1)``, and the prompt set says so in its own words.
    """

    transform_regions: Callable[[Sample, Sequence[Region], Sequence[View]], Sequence[Region]] | None = None
    """Before cropping; the views are the images shown so far. The stream keeps the call the model wrote. (Random box.)
    """
    transform_inquiry: Callable[[Sample, Inquiry], Sequence[Inquiry]] | None = None
    """Before encoding; the images must stay, in order, the query and the grouping may change. (No query, swapped
    query, no joint.)
    """
    forced_turns: Callable[[Sample, int], str | Sequence[int] | None] | None = None
    """Assistant turn number i (from 0) as text or token ids, instead of sampling it; None: sample it. (Teacher
    boxes.)
    """
    reencode: bool = True
    """False: a crop is not encoded. Its features are those of its original, as it was encoded at the start, where the
    crop lies on it, interpolated to the crop's size: no new detail, no query, no joint encoding. Conversation and
    number of tokens stay as they are.
    """


@dataclass
class Work:
    """What a row has cost so far; the ratios are 1.00 if nothing was done twice."""

    patches_encoded: int = 0
    """14 x 14 patches that went through the vision encoder."""
    distinct_patches: int = 0
    """Patches of the row's images, each counted once."""
    tokens_prefilled: int = 0
    """Tokens of prompts, images, tool responses and forced turns that went through the language model."""
    tokens_decoded: int = 0
    """Sampled tokens that were fed back one by one."""
    distinct_tokens: int = 0
    """Tokens of the stream whose keys and values are cached."""

    def __add__(self, other: Work) -> Work:
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})

    @property
    def patches_ratio(self) -> float:
        """Patches encoded per distinct patch."""
        return self.patches_encoded / self.distinct_patches if self.distinct_patches else 1.0

    @property
    def tokens_ratio(self) -> float:
        """Tokens sent through the language model per distinct token."""
        return (self.tokens_prefilled + self.tokens_decoded) / self.distinct_tokens if self.distinct_tokens else 1.0


@dataclass
class BilledTokens:
    """Tokens over all turns of a question, as an API bills them."""

    prompt: int = 0
    """Of all requests together: a turn's prompt holds the turns before it."""
    cached: int = 0
    """Of these, what the engine had in its cache."""
    sampled: int = 0

    def to_json(self) -> dict[str, Any]:
        """The ``usage`` of a chat completion."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.sampled,
            "total_tokens": self.prompt + self.sampled,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class Timings:
    """Seconds an engine has spent, by its clock."""

    encode: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Provenance:
    """What a result depends on besides the images and the question."""

    preset: str
    limits: Limits
    sampling: Sampling
    seed: int | None
    """Of the question; None: of a backend that draws a fresh one for every question, before one is asked."""
    prompts: str
    prompts_sha256: str
    checkpoint: str | None
    """Folder or hub id the model came from; None: a model made in this process."""
    fingerprint: str | None
    """`vilavt_core.checkpoint.fingerprint` of the folder, or the hub commit."""
    dtype: str
    device: str
    attention: str
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(replace(self, versions={})) | {"versions": dict(self.versions)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Provenance:
        """What `to_json` wrote.

        Raises:
            TypeError, KeyError: other fields than this version's.
        """
        nested = {"limits": Limits(**data["limits"]), "sampling": Sampling(**data["sampling"])}
        return cls(**{**data, **nested})


@dataclass(frozen=True, eq=False)
class ChatResult:
    """What came of one question."""

    question: str
    sample_id: str | None
    episode: Result | None
    """How the conversation ended, with all turns, images and inquiries; None if it failed."""
    record: Record | None
    """The token stream up to the end or the failure; a server does not tell it."""
    provenance: Provenance
    work: Work
    """Cost of the whole conversation so far; both ratios are 1.00."""
    seconds: float
    """Wall time from the first request to the end; in a batch it includes the others' share of the machine."""
    billed: BilledTokens = field(default_factory=BilledTokens)
    """Counted by engines that serve: vLLM and its server; 0 elsewhere."""
    error: Exception | None = None
    fallback: Result | None = None
    """The forced-answer conversation of presets that have one."""
    ignored: tuple[str, ...] = ()
    """Fields of the request that a server accepted and did not use."""
    history: Literal["kept", "state", "rebuilt"] | None = None
    """Where a server had the conversation from that this question continues: from its memory, from a state that the
    client sent back, or from the messages alone, without their zooms. None: it continues none."""
    state: str | None = None
    """With which any server of the same kind continues this conversation (`vilavt_core.state`)."""
    transcript: str = ""
    """Everything that the model saw and said, special tokens spelled out, an image as ``<image WxH>``."""
    attention: tuple[AttentionPicture, ...] = ()
    """Where the patches of each zoom look, if somebody measured it (`vilavt_core.watching.with_attention`)."""

    @property
    def answer(self) -> str | None:
        """The answer, or None."""
        for result in (self.episode, self.fallback):
            if result is not None and result.answer is not None:
                return result.answer
        return None

    @property
    def finish(self) -> str:
        """A `FinishReason`, or ``error``."""
        return "error" if self.episode is None else str(self.episode.finish)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Assistant turns; none if the conversation failed."""
        return () if self.episode is None else self.episode.turns

    @property
    def images(self) -> tuple[ShownImage, ...]:
        """All images as shown, in conversation order, without their pixels."""
        return () if self.episode is None else self.episode.images

    @property
    def views(self) -> tuple[View, ...]:
        """The images with their pixels; none from a server."""
        return () if self.episode is None else self.episode.views

    @property
    def thoughts(self) -> str:
        """The thoughts of all turns, one line each."""
        return "\n".join(thought for turn in self.turns if (thought := Thoughts().feed(turn.text)))

    def to_json(self, *, include_images: bool = False) -> dict[str, Any]:
        """Plain JSON data; with `include_images` every shown image as a PNG data URL."""
        out: dict[str, Any] = {
            "sample_id": self.sample_id,
            "question": self.question,
            "answer": self.answer,
            "finish": self.finish,
            "error": None if self.error is None else f"{type(self.error).__name__}: {self.error}",
        }
        if self.episode is not None:
            out |= {k: v for k, v in self.episode.to_json(include_images=include_images).items() if k not in out}
        if self.fallback is not None:
            out["fallback"] = self.fallback.to_json()
        ratios = {"patches_ratio": self.work.patches_ratio, "tokens_ratio": self.work.tokens_ratio}
        out["work"] = asdict(self.work) | ratios
        out["billed"] = asdict(self.billed)
        out["seconds"] = self.seconds
        out["provenance"] = self.provenance.to_json()
        out["transcript"] = self.transcript
        if self.attention:
            out["attention"] = [picture.to_json() for picture in self.attention]
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChatResult:
        """What `to_json` wrote of a conversation that did not fail: without the token stream and the pixels.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        fallback = data.get("fallback")
        own = None if fallback is None else {"answer": None}  # the answer is the fallback's
        work = {f.name: data["work"][f.name] for f in fields(Work)}
        return cls(
            question=data["question"],
            sample_id=data["sample_id"],
            episode=Result.from_json({**data, **(own or {})}),
            record=None,
            provenance=Provenance.from_json(data["provenance"]),
            work=Work(**work),
            seconds=data["seconds"],
            billed=BilledTokens(**data["billed"]),
            fallback=None if fallback is None else Result.from_json(fallback),
            transcript=data.get("transcript", ""),
            attention=tuple(map(AttentionPicture.from_json, data.get("attention", ()))),
        )


@dataclass(frozen=True)
class TextDelta:
    """A piece of the assistant's text, cut between characters, never inside one."""

    turn: int
    text: str


@dataclass(frozen=True)
class ToolCallEvent:
    """The turn asks for a zoom."""

    turn: int
    call: ToolCall


@dataclass(frozen=True, eq=False)
class CropsEvent:
    """The zoom was carried out: these images are shown next."""

    turn: int
    images: tuple[ShownImage, ...]
    views: tuple[View, ...]
    """The images with their pixels; none from a server."""
    query: str


@dataclass(frozen=True)
class RefusedEvent:
    """The turn could not be carried out."""

    turn: int
    problem: str


@dataclass(frozen=True)
class AnswerEvent:
    """The turn answers."""

    turn: int
    answer: str
    thought: str


@dataclass(frozen=True, eq=False)
class Finished:
    """Always the last event."""

    result: ChatResult


Event = TextDelta | ToolCallEvent | CropsEvent | RefusedEvent | AnswerEvent | Finished


def turn_events(turn: Turn) -> Iterator[Event]:
    """What a finished turn means: a zoom and its crops, an answer, a refusal."""
    if isinstance(turn.action, ToolCall):
        yield ToolCallEvent(turn.index, turn.action)
        if turn.views:
            shown = zip(turn.image_indices, turn.views, strict=True)
            images = tuple(ShownImage.of(index, view, turn.action.query) for index, view in shown)
            yield CropsEvent(turn.index, images, turn.views, turn.action.query)
    elif isinstance(turn.action, Answer):
        yield AnswerEvent(turn.index, turn.action.text, turn.action.thought)
    if turn.problem is not None:
        yield RefusedEvent(turn.index, turn.problem)
