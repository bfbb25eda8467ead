"""Named ways to run an episode: ours, and one per variant of the published system.

A preset is what a score depends on besides the checkpoint: limits, how turns are read, what a bad call leads to,
how the first turn is laid out, how the answer is taken out. Wording comes from the prompt set (see
`vilavt_core.prompts`). Source of the facts: `docs/protocol.md`, table "Presets".

Whatever the preset, an episode of one turn is offered no zoom, as no call could be carried out. The published variants
have more turns; with one they would go on offering it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal, get_args, get_type_hints

from .errors import EpisodeError
from .failures import quoted
from .protocol import Rules
from .regions import MIN_PIXELS
from .spelling import did_you_mean, meant

FULL_PIXELS = 8192 * 28 * 28
"""6 422 528: the pixel budget that the published training and evaluation scripts pass."""


def described(default: Any, help: str, *, per_request: bool = False, **bounds: float) -> Any:
    """A field of `Limits` or `Sampling`, described here once.

    What takes such a value from outside (a request, a server flag, a host's settings, a YAML or JSON file) is made from
    these fields, so that a new one is one edit.

    Args:
        default: None where there may be none.
        help: what it is, as a phrase.
        per_request: whether one request to a server may set it; a limit may be tightened only.
        bounds: ``ge``, ``gt``, ``le``: what the value may be, as pydantic's `Field` takes it.
    """
    return field(default=default, metadata={"help": help, "per_request": per_request, "bounds": bounds})


@dataclass(frozen=True)
class Limits:
    """Budgets of one episode; all are checked before anything is appended to the conversation."""

    max_turns: int = described(5, "assistant turns of a conversation, the answer included", ge=1, per_request=True)
    max_images: int = described(52, "images of a conversation, crops included", ge=1, per_request=True)
    max_new_tokens_per_turn: int = described(2048, "tokens the model may sample in a turn", ge=1, per_request=True)
    max_answer_tokens: int | None = described(
        None, "tokens the model may sample for an answer, all turns together; none: unlimited", ge=1, per_request=True
    )
    max_context: int | None = described(
        None, "tokens of a whole conversation, sampled ones included; none: unlimited", ge=1, per_request=True
    )
    max_pixels: float = described(
        FULL_PIXELS,
        "pixels of an original as the encoder sees it, or of all originals together if the preset splits the budget",
        gt=0,
        per_request=True,
    )
    crop_max_pixels: float | None = described(
        None, "pixels of a crop as the encoder sees it; none: as of an original, not split", gt=0, per_request=True
    )
    min_pixels: float = described(MIN_PIXELS, "smaller images are enlarged to this", ge=0)
    max_total_pixels: float | None = described(
        None,
        "pixels of all images of a conversation as the encoder sees them; none: unlimited; counts as an image limit",
        ge=1,
        per_request=True,
    )
    max_inquiry_images: int | None = described(
        None, "regions of one zoom, which are encoded together; none: unlimited", ge=1, per_request=True
    )
    max_inquiry_pixels: float | None = described(
        None,
        "pixels of what is encoded together, an original or all crops of a zoom, as the encoder sees it; none: "
        "unlimited",
        gt=0,
        per_request=True,
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value, least = getattr(self, f.name), f.metadata["bounds"].get("ge", 0)
            if value is None and f.default is None:
                continue
            unlimited = ", or None for unlimited" if f.default is None else ""
            counts = str(f.type).startswith("int")
            if isinstance(value, bool) or not isinstance(value, Integral if counts else Real) or value != value:
                kind = "whole number" if counts else "number"
                raise EpisodeError(f"Limits.{f.name} is {quoted(repr(value))}, it must be a {kind}{unlimited}")
            if value < least:
                raise EpisodeError(f"Limits.{f.name} is {quoted(value)}, it must be at least {least}{unlimited}")
        for name in ("max_pixels", "crop_max_pixels", "max_inquiry_pixels"):
            if (value := getattr(self, name)) is not None and value < self.min_pixels:
                raise EpisodeError(
                    f"Limits.{name} is {value}, below min_pixels {self.min_pixels}; raise the first or lower the second"
                )

    def with_caps_of(self, backend: Limits) -> Limits:
        """These limits, with a backend's caps on an inquiry where these name none: no request lifts what an encoder can
        take.
        """
        images, pixels = self.max_inquiry_images, self.max_inquiry_pixels
        if pixels is None and backend.max_inquiry_pixels is not None:
            pixels = max(self.min_pixels, backend.max_inquiry_pixels)
        return replace(self, max_inquiry_images=images or backend.max_inquiry_images, max_inquiry_pixels=pixels)

    @classmethod
    def per_request(cls) -> tuple[str, ...]:
        """Names of the limits that one request to a server may tighten."""
        return tuple(f.name for f in fields(cls) if f.metadata["per_request"])


@dataclass(frozen=True)
class Sampling:
    """How an engine should draw tokens."""

    temperature: float = described(0.0, "0 is greedy", ge=0, le=2, per_request=True)
    top_p: float = described(1.0, "nucleus sampling", gt=0, le=1, per_request=True)
    top_k: int = described(0, "0 is off", ge=0, per_request=True)
    repetition_penalty: float = described(1.0, "1 is off", gt=0, per_request=True)


def value_type(kind: type, name: str) -> type:
    """``int`` or ``float``: the type of a field of `Limits` or `Sampling`, whether or not it may be None."""
    hint = get_type_hints(kind)[name]
    found: type = next(t for t in get_args(hint) or (hint,) if t is not type(None))
    return found


def optional_fields(kind: type, *, per_request: bool = False) -> dict[str, Any]:
    """The fields of `Limits` or `Sampling` for `pydantic.create_model`, each with its type, bounds and help text.

    All may be left out: None, whatever the field's own default.

    Args:
        kind: which.
        per_request: only those that a request may set.
    """
    from pydantic import Field

    return {
        f.name: (
            value_type(kind, f.name) | None,
            Field(None, description=f.metadata["help"], **f.metadata["bounds"]),
        )
        for f in fields(kind)
        if f.metadata["per_request"] or not per_request
    }


@dataclass(frozen=True)
class Preset:
    """One way to run an episode."""

    name: str
    limits: Limits = field(default_factory=Limits)
    sampling: Sampling = field(default_factory=Sampling)
    rules: Rules = "strict"
    """How a turn is read."""
    bad_call: Literal["feedback", "final", "end"] = "feedback"
    """A turn that cannot be carried out: say what was wrong and go on; say so and ask for the answer; or end the
    episode."""
    image_overflow: Literal["final", "truncate", "end"] = "final"
    """Crops beyond ``max_images``: show none and ask for the answer; show those that fit and ask for the answer; or
    end the episode."""
    inquiry_overflow: Literal["shrink", "refuse"] = "shrink"
    """Crops of one zoom beyond ``max_inquiry_pixels``: show them smaller, the largest first, until they fit; or treat
    the call as a bad one. One that names more than ``max_inquiry_images`` regions is a bad call in any case, and so is
    one whose crops do not even fit at ``min_pixels``."""
    budget_split: Literal["per_image", "total"] = "per_image"
    """Whether ``Limits.max_pixels`` is each original's, or is divided by their number."""
    query_prefix: str = ""
    """Put before every non-blank query by the processor; an inquiry's ``query`` stays bare."""
    sizes: Literal["true", "first", "last", "lines", "lines_if_many"] = "true"
    """Which sizes the first turn states: the common one, or each if they differ; the first or last image's for all;
    or each image's on its own line (always, or if there are several)."""
    question_block: Literal["user", "user_reduced", "user_raw_if_many"] = "user"
    """Which template holds the question."""
    interleave: bool = False
    """Whether ``<image>`` marks in the question of a several-image episode are replaced by the images, if their
    numbers agree."""
    close_tag_ends: bool = False
    """Whether ``</answer>`` alone ends the episode, even if no ``<answer>`` comes before it."""
    forced_answer: bool = False
    """Whether `Episode.fallback` offers a fresh conversation without zoom when no answer came."""
    unbox_answer: bool = False
    r"""Whether ``\boxed{…}`` around an answer is taken off."""

    def with_limits(self, **changes: Any) -> Preset:
        """The same preset with some limits changed.

        Raises:
            EpisodeError: an unknown limit, or a value that cannot be one.
        """
        known = [f.name for f in fields(Limits)]
        if unknown := sorted(set(changes) - set(known)):
            raise EpisodeError(
                f"unknown limits {quoted(', '.join(unknown))}; known are {', '.join(known)}{meant(unknown, known)}"
            )
        return replace(self, limits=replace(self.limits, **changes))


_DEFAULT = Preset("default")
"""The protocol the published model was trained with, with its accidents removed: strict reading, feedback on a bad
call, true sizes."""

_RL = Preset(
    "rl",
    limits=Limits(max_turns=5, max_images=52, max_new_tokens_per_turn=2048),
    sampling=Sampling(temperature=1.0),
    rules="published",
    bad_call="end",
    image_overflow="end",
    sizes="first",
    unbox_answer=True,
)
"""Variant A, the rollout of the published RL training.

Not reproduced: one sample that outlives its own step count because another of its batch still runs; the tool call
of the very last step being carried out though nobody reads its crops; the text being decoded and tokenised anew
every turn (we keep sampled tokens).
"""

_EVAL_VLLM = Preset(
    "eval-vllm",
    limits=Limits(max_turns=10, max_images=50, max_new_tokens_per_turn=16384),
    sampling=Sampling(temperature=0.75, top_p=0.9),
    rules="published",
    bad_call="final",
    image_overflow="truncate",
    budget_split="total",
    sizes="last",
)
"""Variant B, the published vLLM evaluation, the closest to training.

Not reproduced: the answer being cut out of a Python repr (backslash-n before it counted as wrong); the exact text
of its error messages and their doubled prefix; its unseeded sampling; a failed worker's turn being sampled again; the
suffix after questions that ask for a letter themselves (ERQA), which belongs to the benchmark, not to the protocol.
"""

_EVAL_HF = Preset(
    "eval-hf",
    limits=Limits(max_turns=2, max_images=10_000, max_new_tokens_per_turn=2048),
    sampling=Sampling(temperature=0.01, top_p=0.001, top_k=1),
    rules="published",
    bad_call="final",
    budget_split="total",
    query_prefix="Query: ",
    sizes="lines_if_many",
    question_block="user_raw_if_many",
    interleave=True,
    close_tag_ends=True,
    forced_answer=True,
    unbox_answer=True,
)
"""Variant C, the published transformers evaluation with the RL class.

Not reproduced: its several-image layout states the rules in an unformatted, indented block (doubled braces; ours is
the template ``user_raw``); the fallback's empty queries leaving one visible end token; float16; the fixed sentence
it returns for a missing answer tag.
"""

_VLMEVALKIT = Preset(
    "vlmevalkit",
    limits=Limits(max_turns=5, max_images=10_000, max_new_tokens_per_turn=4096),
    sampling=Sampling(temperature=0.01, top_p=0.001, top_k=1),
    rules="published",
    bad_call="final",
    sizes="lines",
    question_block="user_reduced",
    close_tag_ends=True,
    forced_answer=True,
    unbox_answer=True,
)
"""Variant E, the published VLMEvalKit model (its RL class; 2048 tokens per turn in its SFT class).

Not reproduced: its data-set specific question texts (they belong to the toolkit, not to the protocol), the doubled
error prefix, and what `eval-hf` lists. The SFT class words the index lines of originals as if they were crops; here
they are ``original_sized``.
"""

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {p.name: p for p in (_DEFAULT, _RL, _EVAL_VLLM, _EVAL_HF, _VLMEVALKIT)}
)
"""All presets by name. What the published ones cannot reproduce is said beside each in this module and in
`docs/protocol.md`."""


def get_preset(preset: str | Preset) -> Preset:
    """A preset by name; a preset is returned as it is.

    Raises:
        EpisodeError: unknown name.
    """
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise EpisodeError(
            f"no preset {quoted(repr(preset))}; known are {', '.join(PRESETS)}{did_you_mean(preset, PRESETS)}"
        )
    return PRESETS[preset]


__all__ = [
    "FULL_PIXELS",
    "PRESETS",
    "Limits",
    "Preset",
    "Sampling",
    "described",
    "get_preset",
    "optional_fields",
    "value_type",
]
