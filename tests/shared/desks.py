"""A backend that answers by a script, slowly if wished: what the chat and the web app are tested with."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from PIL import Image

from vilavt_core.conversation import Result, ShownImage, Turn, Usage
from vilavt_core.images import load_image
from vilavt_core.presets import Limits, Sampling
from vilavt_core.protocol import Answer, FinishReason, Region, ToolCall, format_turn
from vilavt_core.regions import View
from vilavt_core.results import (
    AnswerEvent,
    ChatResult,
    CropsEvent,
    Finished,
    Provenance,
    TextDelta,
    ToolCallEvent,
    Work,
)
from vilavt_core.video import read_frames

SIZE = (280, 280)
BOX = (140.0, 70.0, 210.0, 140.0)
"""Of its one zoom, in pixels of the original as shown."""


class ScriptedBackend:
    """Zooms into `BOX` of the first picture, then answers with ``the mean colour is (r, g, b)`` of all its pictures.

    `pause` seconds pass before every word, `words` come before the zoom.
    """

    concurrency = 1
    timings = None

    def __init__(self) -> None:
        self.pause, self.words = 0.0, 5
        self.started = threading.Event()
        self.ended: list[str] = []
        """Of every question, ``whole`` or ``early``."""
        self.asked: list[dict] = []
        self._told = Provenance(
            "default", Limits(), Sampling(), 0, "default", "0" * 64, "scripted", None, "", "", "", {}
        )

    def provenance(self, seed, limits=None):
        return replace(self._told, seed=seed, limits=limits or self._told.limits)

    def varied(self, *, preset=None, limits=None, sampling=None):
        twin = object.__new__(type(self))
        twin.__dict__ = {**self.__dict__, "_told": self._told}
        told = self._told if preset is None else replace(
            self._told, preset=preset.name, limits=preset.limits, sampling=preset.sampling
        )  # fmt: skip
        twin._told = replace(
            told, limits=replace(told.limits, **limits or {}), sampling=replace(told.sampling, **sampling or {})
        )
        return twin

    def conversation(self, images=(), *, id=None, seed=None, limits=None):
        return ScriptedConversation(self, seed)


class ScriptedConversation:
    """See `vilavt_core.backends.Conversation`."""

    def __init__(self, backend: ScriptedBackend, seed) -> None:
        self.backend, self.seed, self.closed = backend, seed, False
        self.pictures: list[Image.Image] = []
        self.questions: list[str] = []

    def close(self) -> None:
        self.closed = True

    def stream(self, question, images=()) -> Iterator:
        assert not self.closed
        backend = self.backend
        for image in images:
            if hasattr(image, "fps"):
                self.pictures += [frame.image for frame in read_frames(image)]
            else:
                self.pictures.append(load_image(image))
        self.questions.append(question)
        told = backend.provenance(self.seed or 0)
        backend.asked.append({"questions": list(self.questions), "pictures": len(self.pictures), "told": told})
        backend.started.set()
        whole = False
        try:
            yield TextDelta(0, "<think>")
            for word in range(backend.words):
                time.sleep(backend.pause)
                yield TextDelta(0, f"word{word} ")
            yield TextDelta(0, "</think><tool>{…}</tool>")
            call = ToolCall((Region(0, BOX),), "the digit", "I look.")
            views = [View(one.resize(SIZE), place) for place, one in enumerate(self.pictures)]
            region = tuple(value / side for value, side in zip(BOX, (*SIZE, *SIZE), strict=True))
            views.append(View(views[0].image.crop(BOX).resize((140, 140)), 0, region, "crop", 0, BOX))
            shown = tuple(ShownImage.of(place, view, "the digit") for place, view in enumerate(views))
            yield ToolCallEvent(0, call)
            yield CropsEvent(0, shown[-1:], tuple(views[-1:]), "the digit")
            means = [one.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for one in self.pictures]
            answer = "the mean colours are " + ", ".join(map(str, means))
            yield TextDelta(1, f"<think>So.</think><answer>{answer}</answer>")
            yield AnswerEvent(1, answer, "So.")
            turns = (
                Turn(0, format_turn(call), call, 20, tuple(views[-1:]), (len(views) - 1,), feedback=""),
                Turn(1, answer, Answer(answer), 5),
            )  # fmt: skip
            episode = Result(
                answer, FinishReason.ANSWER, "", turns, shown, (), tuple(views), Usage(10, 25, 8, 2, 2), told.preset,
                told.limits, told.prompts, told.prompts_sha256, {}, None,
            )  # fmt: skip
            whole = True
            yield Finished(ChatResult(question, None, episode, None, told, Work(), 0.1))
        finally:
            backend.ended.append("whole" if whole else "early")
