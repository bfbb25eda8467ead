"""What one person asks about their own images: the state behind ``vilavt chat`` and the web app.

A `Dialogue` keeps the images as they were given, the conversation with the backend, and all results. It shows what
the model looks at from the regions alone, so that it does not matter whether the engine is in this process or behind a
server, which tells no pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from .backends import Backend, Conversation
from .client import ServerClient
from .conversation import ShownImage
from .errors import EngineError
from .images import load_image
from .presets import Preset, get_preset
from .protocol import Box
from .regions import WHOLE, Picture
from .results import ChatResult, CropsEvent, Event, Finished
from .settings import read_chat_settings
from .sources import ImageSource, Video, source_name
from .video import read_frames
from .watching import require_watched, with_attention

PREVIEW = 1280
"""Longest side of what is kept decoded of an image, in pixels."""


@dataclass(frozen=True)
class Wishes:
    """How questions are asked; what is left out is the backend's own."""

    preset: Preset | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Limits` that shall differ."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Sampling` that shall differ."""
    seed: int | None = None


@dataclass(frozen=True, eq=False)
class Given:
    """An image, or a frame of a video, as a person gave it."""

    label: str
    """Name of its file, and its time if it is a frame."""
    preview: Image.Image
    """RGB, at most `PREVIEW` pixels wide and high."""
    size: tuple[int, int]
    """Width and height in full."""
    source: int
    """Which entry of `Dialogue.sources`."""
    frame: int
    """Which of its frames; 0 of an image."""


@dataclass(frozen=True, eq=False)
class ShownCrop:
    """A region that the model asked for, where it lies, and what it got."""

    index: int
    """The crop's number in the conversation, counted from 0."""
    parent: int | None
    """Number of the image that it was cut from, if that is a crop; None: an original, which is `given`."""
    given: int
    """Which entry of `Dialogue.given` it comes from."""
    box: Box
    """``(x1, y1, x2, y2)`` as fractions of the parent's width and height."""
    image: Image.Image
    """RGB, as the encoder got it."""


class Dialogue:
    """Questions of one person, with follow-ups, a way to stop, and everything that was said.

    A question that was stopped, or that failed half-way, leaves nothing to continue: the next one begins a new
    conversation about the same images. So does one that is asked with other wishes.

    Args:
        backend: answers; may be shared with other dialogues.
        allow_urls: whether an image may be an http(s) URL.
    """

    def __init__(self, backend: Backend, *, allow_urls: bool = False) -> None:
        self.backend, self.allow_urls = backend, allow_urls
        self.wishes = Wishes()
        """Of the next question."""
        self.sources: list[ImageSource] = []
        """All images and videos so far."""
        self.given: list[Given] = []
        """The images in them, in the order in which the model sees them."""
        self.results: list[ChatResult] = []
        """Of all questions that were answered, or ended without an answer."""
        self._conversation: Conversation | None = None
        self._under: Wishes | None = None
        """Wishes of the running conversation."""
        self._told = 0
        """Sources that the running conversation has."""
        self._crops: dict[int, ShownCrop] = {}
        self._regions: dict[int, Box] = {}
        """Of the crops of the running conversation, within their sources."""
        self._stop = threading.Event()
        self._busy = threading.Lock()
        self._closed = False
        self._decoded: tuple[int, list[Picture]] | None = None

    def add(self, *sources: ImageSource) -> list[Given]:
        """Show images, or the frames of videos, with the next question.

        Raises:
            ImageError: one cannot be loaded; nothing is added.
        """
        added = [
            _given(picture, place, frame)
            for place, source in enumerate(sources, len(self.sources))
            for frame, picture in enumerate(self._load(source))
        ]
        self.sources += sources
        self.given += added
        return added

    def ask(self, question: str) -> Iterator[Event]:
        """Ask about everything that was added; `Finished` comes last, unless it is stopped. Leaving the loop early, or
        an interrupt, ends the question in the engine too.

        Raises:
            EngineError: the question is blank, or an earlier one is still being answered.
            VilavtError: as `Backend.ask`.
        """
        if not question.strip():
            raise EngineError("the question is blank; say what you want to know")
        if not self._busy.acquire(blocking=False):
            raise EngineError("the previous question is still being answered; stop it, or wait for its answer")
        whole = False
        try:
            if self._conversation is not None and self._under != self.wishes:
                self._forget()
            if self._conversation is None:
                self._begin()
            assert self._conversation is not None
            new, self._told = self.sources[self._told :], len(self.sources)
            with closing(self._conversation.stream(question, new)) as events:  # type: ignore[type-var]
                for event in events:
                    if self._stop.is_set():
                        return
                    if isinstance(event, Finished):
                        self.results.append(event.result)
                        whole = bool(event.result.turns)
                    yield event
        finally:
            if not whole:
                self._forget()
            if self._closed:
                self.reset()
            self._busy.release()

    def watch(self) -> None:
        """Measure the attention of all zooms in `results` that have none yet.

        Raises:
            AttentionError: the backend gives no attention.
            EngineError: a question is being answered.
        """
        require_watched(self.backend)
        if not self._busy.acquire(blocking=False):
            raise EngineError("a question is still being answered; stop it, or wait for its answer")
        try:
            self.results = [with_attention(self.backend, result) for result in self.results]
        finally:
            if self._closed:
                self.reset()
            self._busy.release()

    def stop(self) -> None:
        """End the question that is being answered, or waits, from another thread; it ends at the engine's next token,
        or, of a server, at its next sign."""
        self._stop.set()

    def ready(self) -> None:
        """Let the next question run: what was stopped is over."""
        self._stop.clear()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called since `ready`."""
        return self._stop.is_set()

    @property
    def continues(self) -> bool:
        """Whether the next question will be a follow-up."""
        return self._conversation is not None and self._under == self.wishes

    def cuts(self, event: CropsEvent) -> list[ShownCrop]:
        """The crops of a zoom, with where they come from."""
        found = []
        for place, shown in enumerate(event.images):
            parent = self._crops.get(shown.parent) if shown.parent is not None else None
            image = event.views[place].image if event.views else self._cut(shown)
            box = _within(shown.region, WHOLE if parent is None else self._regions[parent.index])
            cut = ShownCrop(shown.index, None if parent is None else parent.index, shown.source, box, image)
            self._regions[shown.index] = shown.region
            found.append(cut)
        self._crops |= {cut.index: cut for cut in found}
        return found

    def crop(self, index: int) -> ShownCrop:
        """A crop of the running conversation by its number."""
        return self._crops[index]

    def reset(self) -> None:
        """Forget images, questions and answers."""
        self._forget()
        self.sources, self.given, self.results, self._decoded = [], [], [], None

    def close(self) -> None:
        """Forget everything, from any thread; a question that is being answered is stopped first."""
        self._closed = True
        self.stop()
        if self._busy.acquire(blocking=False):  # else the running question does it at its end
            self.reset()
            self._busy.release()

    # ------------------------------------------------------------------ parts

    def _begin(self) -> None:
        """Start a conversation with the present wishes."""
        wishes = self.wishes
        backend = self.backend
        if wishes.preset is not None or wishes.limits or wishes.sampling:
            backend = backend.varied(preset=wishes.preset, limits=wishes.limits, sampling=wishes.sampling)
        self._conversation, self._under = backend.conversation(seed=wishes.seed), wishes
        self._told = 0

    def _forget(self) -> None:
        conversation, self._conversation, self._told = self._conversation, None, 0
        self._crops, self._regions = {}, {}
        if conversation is not None:
            conversation.close()

    def _load(self, source: ImageSource) -> list[Picture]:
        if isinstance(source, Video):
            return read_frames(source, allow_urls=self.allow_urls)
        rules = get_preset(self.backend.provenance(0).preset).rules
        return [Picture(load_image(source, allow_urls=self.allow_urls, rules=rules), source_name(source))]

    def _cut(self, shown: ShownImage) -> Image.Image:
        """The pixels of a crop that a server only named."""
        given = self.given[shown.source]
        if self._decoded is None or self._decoded[0] != given.source:
            self._decoded = given.source, self._load(self.sources[given.source])
        image = self._decoded[1][given.frame].image
        x1, y1, x2, y2 = shown.region
        left, top = int(x1 * image.width), int(y1 * image.height)
        right, bottom = max(left + 1, int(x2 * image.width)), max(top + 1, int(y2 * image.height))
        return image.crop((left, top, right, bottom)).resize((shown.width, shown.height), Image.Resampling.BICUBIC)


def note_of(model: str, backend: Backend) -> str:
    """What people should know before they ask this model, by its own checkpoint; empty: nothing.

    Args:
        model: as it was named to `vilavt_core.backends.open_backend`.
        backend: what came of that.
    """
    if isinstance(backend, ServerClient):
        return backend.note
    found = read_chat_settings(model)
    return found.note if found else ""


def _given(picture: Picture, source: int, frame: int) -> Given:
    preview = picture.image.copy()
    preview.thumbnail((PREVIEW, PREVIEW), Image.Resampling.LANCZOS)
    label = picture.name or f"source image {source + 1}"
    if picture.time is not None:
        label += f", {picture.time:.1f} s"
    return Given(label, preview, picture.image.size, source, frame)


def _within(inner: Sequence[float], outer: Sequence[float]) -> Box:
    """A box as fractions of another one; both are fractions of the same image."""
    x1, y1, x2, y2 = outer
    width, height = x2 - x1, y2 - y1
    left, top, right, bottom = inner
    return (left - x1) / width, (top - y1) / height, (right - x1) / width, (bottom - y1) / height
