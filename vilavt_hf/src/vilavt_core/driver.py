"""One question on its way through an engine, without the engine: images in, requests out, sampled tokens in, events
and a result out.

Chat, vLLM (offline, async, server), verl, EasyR1, replays and the renderer of training data drive the same object, so
they run the same conversations. An adapter of an engine does this, for as many drivers at once as it likes::

    events = driver.start()
    while (request := driver.request) is not None:
        tokens = engine.generate(request)                    # all at once, or a few at a time
        events = driver.take(tokens.ids, tokens.logprobs, tokens.finish)
    driver.result

What goes wrong in a conversation ends that conversation: the error is in its result, `start` and `take` raise nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from PIL import Image

from .conversation import Inquiry, Request, Tokenizer, decode_turn, encode_text, is_whole_text
from .episode import Episode
from .errors import EngineError
from .images import HELD_BYTES, ImageLimits, load_image
from .presets import Limits, Preset, Sampling
from .prompts import PromptSet
from .protocol import Region
from .regions import CropPlan, Gallery, Picture, PixelBounds
from .results import (
    BilledTokens,
    ChatResult,
    Event,
    Finished,
    Intervention,
    Provenance,
    Sample,
    TextDelta,
    Work,
    turn_events,
)
from .settings import fitting_limits
from .sources import ImageSource, Video, source_name
from .versions import versions
from .video import VideoLimits, read_frames

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConversationSettings:
    """What all conversations of a backend share."""

    tokenizer: Tokenizer
    prompts: PromptSet
    preset: Preset
    limits: Limits
    sampling: Sampling
    seed: int | None = None
    """A sample without a seed of its own gets one made from this and its id or place; None: a fresh one, if it draws at
    all."""
    image_limits: ImageLimits = ImageLimits()  # noqa: RUF009 (frozen)
    video_limits: VideoLimits = VideoLimits()  # noqa: RUF009 (frozen)
    allow_urls: bool = False
    """Whether an image may be an http(s) URL."""
    checkpoint: str | None = None
    """Where the model came from; this and the rest is for the record."""
    fingerprint: str | None = None
    dtype: str = ""
    device: str = ""
    attention: str = ""
    fits: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `fitting_limits` for this model; empty: unknown."""
    packages: tuple[str, ...] = ()
    """Distributions, beside those of `versions`, that decide a result."""

    @classmethod
    def fitting(
        cls,
        preset: Preset,
        *,
        tokenizer: Tokenizer,
        image_size: Mapping[str, int | None],
        context: int,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        prompts: PromptSet | str | None = None,
        own_prompts: PromptSet | None = None,
        **more: Any,
    ) -> ConversationSettings:
        """Settings that fit a model.

        Args:
            preset: how episodes run.
            tokenizer: the language model's.
            image_size: ``shortest_edge`` and ``longest_edge`` of its image processor, in pixels of area.
            context: tokens it was made for.
            limits: budgets as they are. None: the preset's, with these pixel bounds where they are tighter, and this
                context where the preset names none.
            sampling: None: the preset's.
            prompts: a set, or its name or folder. None: the checkpoint's own, else the built-in ``default``.
            own_prompts: those of the checkpoint.
            more: other fields.

        Raises:
            PromptError: unknown prompt set.
        """
        named = PromptSet.load(prompts) if isinstance(prompts, str) else prompts
        return cls(
            tokenizer=tokenizer,
            prompts=named or own_prompts or PromptSet.load("default"),
            preset=preset,
            limits=limits or fitting_limits(preset.limits, image_size, context),
            sampling=sampling or preset.sampling,
            fits={"image_size": dict(image_size), "context": context},
            **more,
        )

    def varied(
        self, preset: Preset | None, limits: Mapping[str, Any], sampling: Mapping[str, Any]
    ) -> ConversationSettings:
        """These settings under another preset (None: this one), and with some limits and sampling changed.

        Raises:
            EpisodeError: a limit cannot have this value.
        """
        base = self
        if preset is not None:
            fitted = fitting_limits(preset.limits, **self.fits) if self.fits else preset.limits
            fitted = fitted.with_caps_of(self.limits)  # what the engine's encoder takes
            base = replace(self, preset=preset, limits=fitted, sampling=preset.sampling)
        return replace(base, limits=replace(base.limits, **limits), sampling=replace(base.sampling, **sampling))

    def provenance(
        self, seed: int | None, limits: Limits | None = None, sampling: Sampling | None = None
    ) -> Provenance:
        """What a result with this seed depends on; None is what these settings say."""
        return Provenance(
            preset=self.preset.name,
            limits=limits or self.limits,
            sampling=sampling or self.sampling,
            seed=seed,
            prompts=self.prompts.name,
            prompts_sha256=self.prompts.sha256,
            checkpoint=self.checkpoint,
            fingerprint=self.fingerprint,
            dtype=self.dtype,
            device=self.device,
            attention=self.attention,
            versions=versions(*self.packages),
        )

    def load(self, images: Sequence[ImageSource | Picture], bounds: Sequence[PixelBounds] = ()) -> list[Picture]:
        """Images, decoded as the preset says, and the frames of videos.

        Args:
            images: images and videos; a `Picture` is loaded already.
            bounds: on the pixels of each, of a video's every frame; empty: none.

        Raises:
            ImageError: one cannot be loaded.
        """
        pictures: list[Picture] = []
        for source, bound in zip(images, bounds or [PixelBounds()] * len(images), strict=True):
            if isinstance(source, Picture):
                pictures.append(replace(source, bounds=bound) if bounds else source)
            elif isinstance(source, Video):
                frames = read_frames(source, self.video_limits, allow_urls=self.allow_urls)
                pictures += [replace(frame, bounds=bound) for frame in frames]
            else:
                image = load_image(source, self.image_limits, allow_urls=self.allow_urls, rules=self.preset.rules)
                pictures.append(Picture(image, source_name(source), bounds=bound))
        return pictures

    def episode(
        self,
        images: Sequence[Image.Image | Picture],
        question: str,
        *,
        limits: Limits | None = None,
        sample_id: str | None = None,
        gallery: Gallery | None = None,
    ) -> Episode:
        """A new episode about loaded images; see `Episode.start`."""
        return Episode.start(
            images,
            question,
            tokenizer=self.tokenizer,
            prompts=self.prompts,
            preset=self.preset,
            limits=limits or self.limits,
            sample_id=sample_id,
            gallery=gallery,
        )


class Driver:
    """One question on its way; see the module docstring.

    Args:
        sample: the question.
        settings: of the backend.
        name: named in errors if the sample has no id.
        place: of the sample among those asked together, counted from 0; varies its seed if it has no id.
        stream: whether `take` gives text as it arrives.
        sampling: instead of the settings'.
        intervention: changes for ablations.
        episode: that was started already, for the sample's question; its images are not loaded again.
        fallback: whether the forced-answer conversation of presets that have one may follow; trainers do without.
    """

    def __init__(
        self,
        sample: Sample,
        settings: ConversationSettings,
        *,
        name: str = "",
        place: int = 0,
        stream: bool = False,
        sampling: Sampling | None = None,
        intervention: Intervention | None = None,
        episode: Episode | None = None,
        fallback: bool = True,
    ) -> None:
        if sample.limits is not None:
            sample = replace(sample, limits=sample.limits.with_caps_of(settings.limits))
        self.sample, self.settings, self.stream = sample, settings, stream
        self.name, self.place = sample.id or name, place
        self.sampling = sampling or settings.sampling
        self.seed = sample.drawing_seed(settings.seed, self.sampling, place)
        self.intervention = intervention or Intervention()
        self.work, self.billed = Work(), BilledTokens()
        """What the engine did; its adapter counts."""
        self._crops_before = 0
        """Crops of the conversation that earlier questions made."""
        self.episode = episode
        """The one that `request` belongs to: the conversation, or its fallback."""
        self.request: Request | None = None
        """What the engine has to do next; None before `start`, and once the question has its result."""
        self.requests = 0
        """How many requests the engine was given."""
        self._may_fall_back = fallback
        self._main: Episode | None = None
        """The episode that ended without an answer, while its fallback runs in `episode`."""
        self._changed_inquiries: list[Inquiry] = []
        """Of the running episode, as an ablation has them."""
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._shown = 0
        self._began = self._asked = time.perf_counter()
        self._error: Exception | None = None
        self._preparing: float | None = None
        """Seconds that `prepare` took."""
        self._refused: Exception | None = None
        """What went wrong in `prepare`."""

    # ------------------------------------------------------------------ what an adapter calls

    def prepare(self) -> None:
        """Load the images and bring them to their size, ahead of `start`, which then only goes on, or tells what went
        wrong. May run in any thread, if the settings' tokenizer bears it (`vilavt_core.tokenizer.SharedTokenizer`).
        """
        began = time.perf_counter()
        try:
            self._open()
        except Exception as error:
            self._refused = error
        self._preparing = time.perf_counter() - began

    def start(self) -> list[Event]:
        """Load the images and prepare the first request; the events of turns that were forced."""
        if self._preparing is not None:  # the wait since then was for an engine that had other questions
            self._began = time.perf_counter() - self._preparing
        return self._guarded(self._start)

    def take(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float] | None = None,
        finish: Literal["stop", "length"] | None = "stop",
    ) -> list[Event]:
        """What the engine sampled for `request`, and what came of it.

        Args:
            token_ids: that are new.
            logprobs: one for each, or None.
            finish: why sampling ended; None: more will come.

        Returns:
            The events so far. The last one is `Finished` if the question has its result; else, unless `finish` is None,
            the next `request` stands.
        """
        return self._guarded(lambda: self._take(token_ids, logprobs, finish))

    def take_text(self, text: str) -> list[Event]:
        """A turn that is known, without the engine: as `take` of its tokens and ``<|im_end|>``."""
        return self.take(self._encoded(text))

    def fail(self, error: Exception) -> Finished:
        """End the question with an error of the engine."""
        self._error, self.request = error, None
        return Finished(self.result)

    def follow_up(self, sample: Sample, *, stream: bool = False, sampling: Sampling | None = None) -> Driver:
        """The next question of a finished conversation, about further images too if the sample has some.

        Raises:
            VilavtError: an image cannot be loaded, or this question is not finished.
        """
        before = self.conversation
        if before is None:
            raise EngineError(f"sample {self.name}: its first question never began, there is nothing to continue")
        images = self.settings.load(sample.images, sample.bounds)
        again = Driver(sample, self.settings, name=self.name, place=self.place, stream=stream, sampling=sampling)
        again._crops_before = _crops(before)
        again.episode = before.follow_up(sample.question, images, limits=again.sample.limits)
        return again

    # ------------------------------------------------------------------ what came of it

    @property
    def conversation(self) -> Episode | None:
        """The episode that a follow-up question continues: never the fallback."""
        return self._main or self.episode

    @property
    def sampled(self) -> int:
        """Tokens of the running turn so far."""
        return len(self._ids)

    @property
    def crops(self) -> int:
        """Crops that this question has made, whether or not it came to an end."""
        episode = self.conversation
        return 0 if episode is None else _crops(episode) - self._crops_before

    @property
    def picture_bytes(self) -> int:
        """Bytes of the decoded images that this conversation holds: sources and what was shown of them."""
        episode = self.conversation
        if episode is None:
            return 0
        shown = [view.image for view in episode.views]
        return sum(image.width * image.height * HELD_BYTES for image in (*episode.gallery.sources, *shown))

    @property
    def result(self) -> ChatResult:
        """What came of the question so far."""
        main = self.conversation
        fallback = self.episode if self._main is not None else None
        return ChatResult(
            question=self.sample.question,
            sample_id=self.sample.id,
            episode=main.result if main is not None and main.finished and self._error is None else None,
            record=None if main is None else main.record,
            provenance=self.settings.provenance(self.seed, self.sample.limits, self.sampling),
            work=replace(self.work),
            billed=replace(self.billed),
            seconds=time.perf_counter() - self._began,
            error=self._error,
            fallback=fallback.result if fallback is not None and fallback.finished else None,
            transcript="" if main is None else main.transcript,
        )

    # ------------------------------------------------------------------ parts

    def _guarded(self, events: Callable[[], Iterator[Event]]) -> list[Event]:
        """What goes wrong in one conversation ends that one, as its result."""
        out: list[Event] = []
        try:
            out.extend(events())
        except Exception as error:
            logger.debug("sample %s failed", self.name, exc_info=True)
            out.append(self.fail(error))
        return out

    def _start(self) -> Iterator[Event]:
        if self._refused is not None:
            raise self._refused
        self._open()
        yield from self._advance()

    def _open(self) -> None:
        """Begin the episode, unless there is one."""
        if self.episode is None:
            settings, change = self.settings, self.intervention.transform_regions
            limits = self.sample.limits or settings.limits
            self.episode = settings.episode(
                settings.load(self.sample.images, self.sample.bounds),
                self.sample.question,
                limits=limits,
                sample_id=self.name or None,
                gallery=None if change is None else _Redirected(limits.min_pixels, self.sample, change),
            )

    def _advance(self) -> Iterator[Event]:
        """Prepare the next request, carry out forced turns, or finish."""
        assert self.episode is not None
        while (request := self.episode.next_request()) is not None:
            self._asked = time.perf_counter()
            force = self.intervention.forced_turns
            forced = None if force is None else force(self.sample, request.turn)
            if forced is None:
                self.request = self._changed(request)
                self.requests += 1
                return
            self._ids = self._encoded(forced) if isinstance(forced, str) else list(forced)
            if self.stream:
                yield from self._text(whole=True)
            yield from self._feed("stop", computed=False)
        self.request = None
        fallback = self.episode.fallback() if self._may_fall_back and self._main is None else None
        if fallback is not None:
            self._main, self.episode, self._changed_inquiries = self.episode, fallback, []
            yield from self._advance()
            return
        yield Finished(self.result)

    def _changed(self, request: Request) -> Request:
        """The request with the inquiries that an ablation makes of its new ones."""
        change = self.intervention.transform_inquiry
        if change is None:
            return request
        changed: list[Inquiry] = []
        for inquiry in request.new_inquiries:
            parts = list(change(self.sample, inquiry))
            if [index for part in parts for index in part.image_indices] != list(inquiry.image_indices):
                raise EngineError(
                    f"sample {self.name}, turn {request.turn}: transform_inquiry returned other images than "
                    f"{list(inquiry.image_indices)}; it may change queries and grouping only"
                )
            changed += parts
        self._changed_inquiries += changed
        return replace(request, new_inquiries=tuple(changed), inquiries=tuple(self._changed_inquiries))

    def _take(
        self, token_ids: Sequence[int], logprobs: Sequence[float] | None, finish: Literal["stop", "length"] | None
    ) -> Iterator[Event]:
        if self.request is None:
            raise EngineError(f"sample {self.name}: tokens arrived, but nothing was asked for")
        self._ids += token_ids
        self._logprobs += logprobs or ()
        if self.stream:
            yield from self._text(whole=finish is not None)
        if finish is not None:
            yield from self._feed(finish)
            yield from self._advance()

    def _feed(self, finish: Literal["stop", "length"], *, computed: bool = True) -> Iterator[Event]:
        assert self.episode is not None
        turn = self.episode.feed(
            self._ids,
            logprobs=self._logprobs if self._logprobs and len(self._logprobs) == len(self._ids) else None,
            finish=finish,
            seconds=time.perf_counter() - self._asked,
            computed=computed,
        )
        self._ids, self._logprobs, self._shown = [], [], 0
        yield from turn_events(turn)

    def _text(self, *, whole: bool) -> Iterator[TextDelta]:
        """Text that was not given yet. An unfinished character (bytes of it are still missing) waits unless the turn
        ends.
        """
        assert self.episode is not None
        text = decode_turn(self.settings.tokenizer, self._ids[self._shown :], self.episode.special.stops)
        if text and (whole or is_whole_text(text)):
            self._shown = len(self._ids)
            yield TextDelta(len(self.episode.turns), text)

    def _encoded(self, text: str) -> list[int]:
        assert self.episode is not None
        special = self.episode.special
        return [*encode_text(text, self.settings.tokenizer, special), special.im_end]


def _crops(episode: Episode) -> int:
    return sum(view.kind == "crop" for view in episode.views)


class _Redirected(Gallery):
    """A gallery that crops other regions than it is asked for: for ablations, behind the back of the text."""

    def __init__(
        self,
        min_pixels: float,
        sample: Sample,
        change: Callable[[Sample, Sequence[Region], Sequence[Any]], Sequence[Region]],
    ) -> None:
        super().__init__(min_pixels=min_pixels)
        self._sample, self._change = sample, change

    def plan(self, regions: Iterable[Region], *args: Any) -> list[CropPlan]:
        """Plans of the regions that the ablation makes of these."""
        return super().plan(self._change(self._sample, tuple(regions), tuple(self.views)), *args)

    def fork(self) -> Gallery:
        """The same, with images of its own."""
        twin = _Redirected(self.min_pixels, self._sample, self._change)
        twin.sources, twin.views = list(self.sources), list(self.views)
        return twin
