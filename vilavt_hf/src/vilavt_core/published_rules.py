"""The rules of presets that reproduce published variants. Source of the facts: `docs/protocol.md`, table "Presets"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Literal

from .episode_rules import EpisodeRules, Sizes
from .presets import Preset
from .prompts import PromptPart, PromptSet, join
from .protocol import ANSWER_CLOSE, IMAGE_MARK, unbox
from .regions import share_budget

COMMON = ("name", "limits", "sampling", "rules", "inquiry_overflow", "query_prefix")
"""Fields of `Preset` that the default rules know, too."""


def rules_of(preset: Preset, prompts: PromptSet) -> EpisodeRules:
    """The rules of a preset: the default ones if it is a variant of nothing."""
    variant = any(getattr(preset, f.name) != f.default for f in fields(Preset) if f.name not in COMMON)
    return PublishedRules(preset, prompts) if variant else EpisodeRules(preset, prompts)


class PublishedRules(EpisodeRules):
    """Rules by the fields of a preset."""

    def image_budget(self, max_pixels: float, count: int) -> float:
        """Pixels of each of `count` originals: `max_pixels`, or its share."""
        return share_budget(max_pixels, count, self.preset.budget_split)

    def first_turn(self, indices: Sequence[int], question: str, sizes: Sizes, *, no_zoom: bool) -> list[PromptPart]:
        """The first user turn as the preset words it; see the parent's."""
        preset, several = self.preset, len(indices) > 1
        sized = self._sized(indices, sizes)
        lines = self._lines(indices, sizes, sized=sized)
        intro = self._intro(indices, sizes, sized=sized, of=-1 if preset.sizes == "last" else 0)
        asked: str | tuple[PromptPart, ...] = question
        if preset.interleave and several:
            pieces = question.split(IMAGE_MARK)
            if len(pieces) == len(indices) + 1:
                parts = [part for piece, line in zip(pieces, lines, strict=False) for part in (piece, *line)]
                asked, lines = join([*parts, pieces[-1]]), []
            else:
                asked = "".join(pieces)
        body = self.prompts.render("user_no_zoom" if no_zoom else self._template(several), images=intro, question=asked)
        return [*(part for line in lines for part in line), *self._without_gap(indices, body)]

    def follow_up_turn(self, indices: Sequence[int], question: str, sizes: Sizes) -> list[PromptPart]:
        """The first user turn of a further question; see the parent's."""
        lines = self._lines(indices, sizes, sized=self._sized(indices, sizes))
        return [*(part for line in lines for part in line), *self.prompts.render("follow_up", question=question)]

    def _template(self, several: bool) -> str:
        block = self.preset.question_block
        if block == "user_raw_if_many":
            return "user_raw" if several else "user"
        return block

    def _sized(self, indices: Sequence[int], sizes: Sizes) -> bool:
        """Whether every image says its size on its own line."""
        choice = self.preset.sizes
        if choice == "lines":
            return True
        if choice == "lines_if_many":
            return len(indices) > 1
        return choice == "true" and self._sizes_differ(indices, sizes)

    def answer(self, text: str) -> str:
        """The answer, out of its box if the preset says so."""
        return unbox(text) if self.preset.unbox_answer else text

    def ending_problem(self, text: str) -> str | None:
        """A closing tag alone ends the episode if the preset says so."""
        if self.preset.close_tag_ends and ANSWER_CLOSE in text:
            return f"the turn holds {ANSWER_CLOSE} without an answer before it"
        return None

    @property
    def on_bad_call(self) -> Literal["feedback", "final", "end"]:
        """See the parent's."""
        return self.preset.bad_call

    def on_overflow(self, *, asked_to_finish: bool) -> Literal["final", "truncate", "end"]:
        """See the parent's."""
        choice = self.preset.image_overflow
        return "end" if choice == "final" and asked_to_finish else choice
