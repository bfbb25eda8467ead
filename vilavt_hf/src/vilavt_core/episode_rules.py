"""What presets differ in: how an episode words its first turn, reads a last one, and treats what cannot be done.

`EpisodeRules` is the default; the published variants are in `published_rules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from .presets import Preset
from .prompts import PromptPart, PromptSet

Sizes = Mapping[int, tuple[int, int]]
"""Width and height in pixels of every image, by its place in the conversation."""
Times = Mapping[int, float]
"""Seconds of the images that are frames of a video, by their place in the conversation."""


class EpisodeRules:
    """The default rules: each image its own pixel budget, true sizes, feedback on what cannot be done.

    Args:
        preset: of the episode.
        prompts: its wording.
    """

    def __init__(self, preset: Preset, prompts: PromptSet) -> None:
        self.preset, self.prompts = preset, prompts
        self.times: Times = {}
        """Of the images that are to be shown next; the episode says them before it asks for a turn."""

    # ------------------------------------------------------------------ the first turn

    def image_budget(self, max_pixels: float, count: int) -> float:
        """Pixels of each of `count` originals."""
        return max_pixels

    def first_turn(self, indices: Sequence[int], question: str, sizes: Sizes, *, no_zoom: bool) -> list[PromptPart]:
        """The first user turn: images, then their sizes and the question.

        Args:
            indices: places of the images in the conversation.
            question: the user's text.
            sizes: of all images so far.
            no_zoom: whether the answer must come at once.
        """
        return self._turn(indices, question, sizes, "user_no_zoom" if no_zoom else "user")

    def follow_up_turn(self, indices: Sequence[int], question: str, sizes: Sizes) -> list[PromptPart]:
        """The first user turn of a further question."""
        lines = self._lines(indices, sizes, sized=self._sizes_differ(indices, sizes))
        return [*(part for line in lines for part in line), *self.prompts.render("follow_up", question=question)]

    def fallback_turn(self, indices: Sequence[int], question: str) -> list[PromptPart]:
        """The user turn of a forced answer."""
        images: list[PromptPart] = list(indices)
        return [*images, *self.prompts.render("fallback_user", question=question)]

    def _turn(self, indices: Sequence[int], question: str, sizes: Sizes, template: str) -> list[PromptPart]:
        sized = self._sizes_differ(indices, sizes)
        lines = self._lines(indices, sizes, sized=sized)
        body = self.prompts.render(template, images=self._intro(indices, sizes, sized=sized), question=question)
        return [*(part for line in lines for part in line), *self._without_gap(indices, body)]

    @staticmethod
    def _sizes_differ(indices: Sequence[int], sizes: Sizes) -> bool:
        return len({sizes[i] for i in indices}) > 1

    def _lines(self, indices: Sequence[int], sizes: Sizes, *, sized: bool) -> list[tuple[PromptPart, ...]]:
        """What stands for each image, with its size or without, and with its time if it is a frame."""
        lines = []
        for i in indices:
            kind, time = ("original", {}) if i not in self.times else ("frame", {"time": f"{self.times[i]:.2f}"})
            template = f"{kind}_sized" if sized else kind
            width, height = sizes[i]
            lines.append(self.prompts.render(template, image=i, index=i, width=width, height=height, **time))
        return lines

    def _intro(self, indices: Sequence[int], sizes: Sizes, *, sized: bool, of: int = 0) -> str:
        """How many images there are and, if their lines do not say it, how large image number `of` of them is."""
        count = len(indices)
        if not count or (sized and count == 1):
            return ""
        width, height = sizes[indices[of]]
        name = "images_one" if count == 1 else "images_many_unsized" if sized else "images_many"
        return self.prompts.text(name, count=count, last=indices[-1], width=width, height=height)

    @staticmethod
    def _without_gap(indices: Sequence[int], body: tuple[PromptPart, ...]) -> tuple[PromptPart, ...]:
        """A question without images begins at the top."""
        if not indices and body and isinstance(body[0], str):
            return (body[0].lstrip("\n"), *body[1:])
        return body

    # ------------------------------------------------------------------ sampled turns

    def answer(self, text: str) -> str:
        """The answer, out of what stands between its tags."""
        return text

    def ending_problem(self, text: str) -> str | None:
        """Why a turn without an answer ends the episode all the same; None: it does not."""
        return None

    @property
    def on_bad_call(self) -> Literal["feedback", "final", "end"]:
        """What a turn that cannot be carried out is met with: the problem, the problem and a request for the answer, or
        the end.
        """
        return "feedback"

    def on_overflow(self, *, asked_to_finish: bool) -> Literal["final", "truncate", "end"]:
        """What crops beyond the limits are met with: none and a request for the answer, those that fit, or the end.

        Args:
            asked_to_finish: whether the model was asked for its answer before.
        """
        return "end" if asked_to_finish else "final"
