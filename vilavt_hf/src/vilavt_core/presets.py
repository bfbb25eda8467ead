"""Named ways to run an episode: ours, and one per variant of the published system.

A preset is what a score depends on besides the checkpoint: limits, how turns are read, what a bad call leads to,
how the first turn is laid out, how the answer is taken out. Wording comes from the prompt set (see
:mod:`vilavt_core.prompts`). Source of the facts: `docs/protocol.md`, table "Presets".

Whatever the preset, an episode of one turn is offered no zoom, as no call could be carried out. The published variants
have more turns; with one they would go on offering it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from .errors import EpisodeError
from .protocol import Rules
from .regions import MIN_PIXELS

FULL_PIXELS = 8192 * 28 * 28
"""6 422 528: the pixel budget that the published training and evaluation scripts pass."""


@dataclass(frozen=True)
class Limits:
    """Budgets of one episode; all are checked before anything is appended to the conversation."""

    max_turns: int = 5
    """Assistant turns, the answer included."""
    max_images: int = 52
    """Images in the conversation, originals and crops."""
    max_new_tokens_per_turn: int = 2048
    """Tokens the model may sample in one turn."""
    max_context: int | None = None
    """Tokens of the whole conversation, sampled ones included; None: unlimited."""
    max_pixels: float = FULL_PIXELS
    """Pixels of one original, or of all originals together if the preset splits the budget."""
    crop_max_pixels: float | None = None
    """Pixels of one crop; None: as ``max_pixels``, not split."""
    min_pixels: float = MIN_PIXELS
    """Smaller images are enlarged to at least this."""
    max_total_pixels: float | None = None
    """Pixels of all images of the conversation as shown; None: unlimited. Counts as an image limit."""

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_images", "max_new_tokens_per_turn"):
            if getattr(self, name) < 1:
                raise EpisodeError(f"Limits.{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("max_context", "max_total_pixels"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise EpisodeError(f"Limits.{name} is {value}, it must be at least 1, or None for unlimited")
        for name in ("max_pixels", "crop_max_pixels"):
            if (value := getattr(self, name)) is not None and value < self.min_pixels:
                raise EpisodeError(
                    f"Limits.{name} is {value}, below min_pixels {self.min_pixels}; raise the first or lower the second"
                )


@dataclass(frozen=True)
class Sampling:
    """How an engine should draw tokens; ``temperature`` 0 is greedy, ``top_k`` 0 is off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


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
    """Whether :meth:`Episode.fallback` offers a fresh conversation without zoom when no answer came."""
    unbox_answer: bool = False
    r"""Whether ``\boxed{…}`` around an answer is taken off."""

    def with_limits(self, **changes: Any) -> Preset:
        """The same preset with some limits changed."""
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
        raise EpisodeError(f"no preset {preset!r}; known are {', '.join(PRESETS)}")
    return PRESETS[preset]


__all__ = ["FULL_PIXELS", "PRESETS", "Limits", "Preset", "Sampling", "get_preset"]
