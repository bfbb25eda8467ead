"""Ask a ViLaVT about pictures: episodes over a local model, one alone, several in a batch, streamed, or with follow-up
questions.

:class:`VilavtChat` ties the parts together: :mod:`vilavt_core.episode` decides what happens next,
:mod:`vilavt_hf.engine` computes it, each image and token once. A conversation that fails does not take the others of
its batch along.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vilavt_core.conversation import decode_turn, is_whole_text
from vilavt_core.episode import Episode, Inquiry, Request
from vilavt_core.errors import CheckpointError, EngineError
from vilavt_core.images import ImageLimits, load_image
from vilavt_core.presets import Limits, Preset, Sampling, get_preset
from vilavt_core.prompts import PromptSet
from vilavt_core.regions import View
from vilavt_core.results import (
    AnswerEvent,
    ChatResult,
    CropsEvent,
    Event,
    Finished,
    ImageSource,
    Intervention,
    Provenance,
    RefusedEvent,
    Sample,
    TextDelta,
    ToolCallEvent,
    turn_events,
)
from vilavt_core.settings import fitting_limits, is_hub_id, preset_of
from vilavt_core.versions import versions

from .engine import MAX_PREFILL_TOKENS, Engine, Reused, Row, Sampled, Sampler, Timings, Work

if TYPE_CHECKING:
    from .modeling_vilavt import VilavtForConditionalGeneration
    from .processing_vilavt import VilavtProcessor

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Run:
    """One conversation on its way."""

    sample: Sample
    seed: int
    row: Row
    intervention: Intervention
    stream: bool = False
    episode: Episode | None = None
    main: Episode | None = None
    """The episode that ended without an answer, while its fallback runs in `episode`."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    shown: int = 0
    """Sampled tokens of the turn whose text was streamed."""
    began: float = field(default_factory=time.perf_counter)
    asked: float = 0.0
    spent: Work = field(default_factory=Work)
    """Work on rows that were closed."""
    before: Work = field(default_factory=Work)


class VilavtChat:
    """Runs episodes on a local model.

    Args:
        model: in eval mode.
        processor: its processor, with a query tokenizer.
        preset: how episodes run; see :mod:`vilavt_core.presets`.
        limits: budgets. None: the preset's, with the pixel bounds of the image processor where they are tighter, and
            the context the language model was made for.
        sampling: how tokens are chosen. None: the preset's (the default preset is greedy).
        seed: for sampling.
        prompts: wording. None: the checkpoint's own, else the built-in ``default``.
        max_batch_size: conversations that run side by side.
        max_prefill_tokens: new tokens of waiting conversations that are computed at once; lower it if memory is short.
        image_limits: caps on files.
        allow_urls: whether an image may be an http(s) URL.
        checkpoint: where the model came from, for the record.
        fingerprint: of the checkpoint, for the record.

    What all its engines have spent is in `timings`, measured with `clock`; set that to one that waits for the device if
    the parts shall be exact on a GPU.
    """

    def __init__(
        self,
        model: VilavtForConditionalGeneration,
        processor: VilavtProcessor,
        *,
        preset: str | Preset = "default",
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        prompts: PromptSet | str | None = None,
        max_batch_size: int = 8,
        max_prefill_tokens: int = MAX_PREFILL_TOKENS,
        image_limits: ImageLimits = ImageLimits(),  # noqa: B008 (frozen)
        allow_urls: bool = False,
        checkpoint: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.preset = get_preset(preset)
        self.limits = limits or fitting_limits(
            self.preset.limits, processor.image_processor.size, model.config.text_config.max_position_embeddings
        )
        self.sampling = sampling or self.preset.sampling
        self.seed = seed
        named = PromptSet.load(prompts) if isinstance(prompts, str) else prompts
        self.prompts = named or processor.prompts or PromptSet.load("default")
        self.max_batch_size, self.max_prefill_tokens = max_batch_size, max_prefill_tokens
        self.image_limits, self.allow_urls = image_limits, allow_urls
        self.checkpoint, self.fingerprint = checkpoint, fingerprint
        self.timings, self.clock = Timings(), time.perf_counter
        self._stops = frozenset(
            int(i) for i in processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        )

    @property
    def concurrency(self) -> int:
        """Conversations that run side by side: `max_batch_size`, by the name that all backends have for it."""
        return self.max_batch_size

    @concurrency.setter
    def concurrency(self, value: int) -> None:
        self.max_batch_size = value

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; may be set between conversations."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._sampling, self._choose = sampling, Sampler(sampling)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        attn_implementation: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> VilavtChat:
        """Load a checkpoint folder or hub id.

        Args:
            path: a folder in our format, or a hub id. Its ``vilavt_chat.json`` gives the defaults of `preset` and
                `limits`.
            dtype: ``auto`` is the checkpoint's own.
            device: ``auto`` is CUDA if there is one, else the CPU.
            attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``; None: the library's choice.
            model_kwargs: for the model's `from_pretrained`, e.g. ``revision``.
            settings: for the constructor.

        Raises:
            CheckpointError: no such folder, or its settings file is wrong.
        """
        from .modeling_vilavt import VilavtForConditionalGeneration
        from .processing_vilavt import VilavtProcessor

        folder = Path(path)
        if not folder.is_dir() and not is_hub_id(path):
            raise CheckpointError(f"{path}: no such folder, and not a hub id (owner/name); check the path")
        kwargs = dict(model_kwargs or {})
        if attn_implementation is not None:
            kwargs["attn_implementation"] = attn_implementation
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        name = str(path)
        if folder.is_dir():
            from vilavt_core.checkpoint import fingerprint

            # Before loading: it reads the headers and names what is wrong with a broken checkpoint.
            settings.setdefault("fingerprint", fingerprint(folder))
        hub: dict[str, Any] = {
            key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs
        }
        settings["preset"] = preset_of(path, settings.get("preset"), hub=hub)
        try:
            model: Any = VilavtForConditionalGeneration.from_pretrained(name, dtype=dtype, **kwargs)
            processor = VilavtProcessor.from_pretrained(name, **hub)
        except OSError as error:
            raise CheckpointError(f"{name}: cannot be loaded: {error}") from error
        settings.setdefault("fingerprint", getattr(model.config, "_commit_hash", None))
        return cls(model.to(device).eval(), processor, checkpoint=name, **settings)

    # ------------------------------------------------------------------ asking

    def ask(
        self,
        images: ImageSource | Sequence[ImageSource],
        question: str,
        *,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> ChatResult:
        """Ask one question.

        Raises:
            VilavtError: an image cannot be loaded, …: what `ask_many` would put in `ChatResult.error`.
        """
        result = self.ask_many([Sample(_several(images), question, seed=seed, limits=limits)])[0]
        if result.error is not None:
            raise result.error
        return result

    def ask_many(
        self,
        samples: Iterable[Sample | tuple[Any, str]],
        *,
        intervention: Intervention | None = None,
        progress: bool = False,
    ) -> list[ChatResult]:
        """Ask many questions, `max_batch_size` at a time.

        Args:
            samples: `Sample`, or pairs of (images, question).
            intervention: changes for ablations.
            progress: show a bar.

        Returns:
            One result per sample, in their order. One that failed has ``finish == "error"`` and the exception in
            ``error``.
        """
        samples = list(samples)
        results: dict[int, ChatResult] = {}
        bar = None
        if progress:
            from tqdm.auto import tqdm

            bar = tqdm(total=len(samples), unit="question")
        for index, result in self.iter_many(samples, intervention=intervention):
            results[index] = result
            if bar is not None:
                bar.update()
        if bar is not None:
            bar.close()
        return [results[i] for i in range(len(samples))]

    def iter_many(
        self, samples: Iterable[Sample | tuple[Any, str]], *, intervention: Intervention | None = None
    ) -> Iterator[tuple[int, ChatResult]]:
        """Like :meth:`ask_many`, but yields (place, result) as conversations end; images are loaded when their turn
        comes.
        """
        engine = self._engine(keep_features=intervention is not None and not intervention.reencode)
        places: dict[int, int] = {}

        def runs() -> Iterator[_Run]:
            for place, entry in enumerate(samples):
                sample = entry if isinstance(entry, Sample) else Sample(_several(entry[0]), entry[1])
                seed = self._seed_of(sample)
                run = _Run(sample, seed, engine.open(seed, sample.id or str(place)), intervention or Intervention())
                places[id(run)] = place
                yield run

        for run, event in self._drive(engine, runs()):
            if isinstance(event, Finished):
                engine.close(run.row)
                yield places.pop(id(run)), event.result

    def stream(
        self,
        images: ImageSource | Sequence[ImageSource],
        question: str,
        *,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> Iterator[Event]:
        """Ask one question and watch: text as it is sampled, zooms, crops, the answer; `Finished` comes last.

        Raises:
            VilavtError: as :meth:`ask`.
        """
        yield from self.conversation(images, seed=seed, limits=limits).stream(question)

    def conversation(
        self,
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> Conversation:
        """Start a conversation in which several questions can be asked; `limits` count anew for every question."""
        return Conversation(self, Sample(_several(images), "", seed=seed, limits=limits))

    # ------------------------------------------------------------------ running

    def _engine(self, *, keep_features: bool = False) -> Engine:
        engine = Engine(
            self.model,
            self.processor.encode_inquiries,
            choose=self._choose,
            max_batch_size=self.max_batch_size,
            max_prefill_tokens=self.max_prefill_tokens,
            clock=self.clock,
            keep_features=keep_features,
            n_tokens=len(self.processor.tokenizer),
        )
        engine.timings = self.timings
        return engine

    def _seed_of(self, sample: Sample) -> int:
        return sample.seed_from(self.seed)

    def _drive(self, engine: Engine, runs: Iterator[_Run]) -> Iterator[tuple[_Run, Event]]:
        """Keep the engine full, and turn its tokens into events."""
        active: dict[Row, _Run] = {}

        def carry_on(run: _Run, events: Callable[[], Iterator[Event]]) -> Iterator[tuple[_Run, Event]]:
            active.pop(run.row, None)
            finished = False
            for event in self._guard(run, events):
                finished = isinstance(event, Finished)
                yield run, event
            if not finished:
                active[run.row] = run  # another row than before if its fallback has begun

        while True:
            while len(active) < engine.max_batch_size and (run := next(runs, None)) is not None:
                yield from carry_on(run, partial(self._begin, engine, run))
            if not engine.busy:
                return
            for sampled in engine.step():
                run = active[sampled.row]
                yield from carry_on(run, partial(self._take, engine, run, sampled))

    def _guard(self, run: _Run, events: Callable[[], Iterator[Event]]) -> Iterator[Event]:
        """What goes wrong in one conversation ends that one, as its result."""
        try:
            yield from events()
        except Exception as error:
            logger.debug("sample %s failed", run.row.name, exc_info=True)
            yield Finished(self._result(run, error))

    def _begin(self, engine: Engine, run: _Run) -> Iterator[Event]:
        if run.episode is None:
            images = [
                load_image(source, self.image_limits, allow_urls=self.allow_urls, rules=self.preset.rules)
                for source in run.sample.images
            ]
            run.episode = Episode.start(
                images,
                run.sample.question,
                tokenizer=self.processor.tokenizer,
                prompts=self.prompts,
                preset=self.preset,
                limits=run.sample.limits or self.limits,
                sample_id=run.row.name or None,
            )
        yield from self._advance(engine, run)

    def _advance(self, engine: Engine, run: _Run) -> Iterator[Event]:
        """Submit the episode's next request, carry out forced turns, or finish."""
        assert run.episode is not None
        while (request := run.episode.next_request()) is not None:
            hooks, run.asked = run.intervention, time.perf_counter()
            inquiries = self._inquiries(run, request)
            forced = None if hooks.forced_turns is None else hooks.forced_turns(run.sample, request.turn)
            if forced is None:
                engine.submit(run.row, request, inquiries)
                return
            ids = self._encode_turn(forced) if isinstance(forced, str) else list(forced)
            engine.force(run.row, request, ids, inquiries)
            run.ids, run.logprobs = ids, []
            if run.stream:
                yield from self._text(run, whole=True)
            yield from self._fed(run, "stop")
        if run.main is None and (fallback := run.episode.fallback()) is not None:
            run.main, run.episode = run.episode, fallback
            run.spent += run.row.work
            engine.close(run.row)
            run.row = engine.open(run.seed, run.row.name)
            yield from self._advance(engine, run)
            return
        yield Finished(self._result(run))

    def _inquiries(self, run: _Run, request: Request) -> list[Inquiry] | None:
        change, reencode = run.intervention.transform_inquiry, run.intervention.reencode
        if change is None and reencode:
            return None
        if change is None:
            changed = [[inquiry] for inquiry in request.new_inquiries]
        else:
            changed = [list(change(run.sample, inquiry)) for inquiry in request.new_inquiries]
        for inquiry, parts in zip(request.new_inquiries, changed, strict=True):
            if [index for part in parts for index in part.image_indices] != list(inquiry.image_indices):
                raise EngineError(
                    f"sample {run.row.name}, turn {request.turn}: transform_inquiry returned other images than "
                    f"{list(inquiry.image_indices)}; it may change queries and grouping only"
                )
        inquiries = [part for parts in changed for part in parts]
        if not reencode:
            assert run.episode is not None
            inquiries = [_reused(inquiry, run.episode.views) for inquiry in inquiries]
        return inquiries

    def _take(self, engine: Engine, run: _Run, sampled: Sampled) -> Iterator[Event]:
        if sampled.error is not None:
            raise sampled.error
        assert sampled.token_id is not None
        assert sampled.logprob is not None
        run.ids.append(sampled.token_id)
        run.logprobs.append(sampled.logprob)
        if run.stream:
            yield from self._text(run, whole=sampled.finish is not None)
        if sampled.finish is not None:
            yield from self._fed(run, sampled.finish)
            yield from self._advance(engine, run)

    def _fed(self, run: _Run, finish: str) -> Iterator[Event]:
        """Give the episode a whole turn and say what came of it."""
        assert run.episode is not None
        seconds = time.perf_counter() - run.asked
        change, views = run.intervention.transform_call, run.episode.views
        turn = run.episode.feed(
            run.ids,
            logprobs=run.logprobs or None,
            finish="length" if finish == "length" else "stop",
            seconds=seconds,
            redirect=None if change is None else lambda call: change(run.sample, call, views),
        )
        run.ids, run.logprobs, run.shown = [], [], 0
        yield from turn_events(turn)

    def _text(self, run: _Run, *, whole: bool) -> Iterator[TextDelta]:
        """Text that was not streamed yet; an unfinished character (bytes of it are still missing) waits unless the
        turn ends.
        """
        assert run.episode is not None
        text = self._decode(run.ids[run.shown :])
        if text and (whole or is_whole_text(text)):
            run.shown = len(run.ids)
            yield TextDelta(len(run.episode.turns), text)

    def _decode(self, ids: Sequence[int]) -> str:
        return decode_turn(self.processor.tokenizer, ids, self._stops)

    def _encode_turn(self, text: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [*ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]

    def _result(self, run: _Run, error: Exception | None = None) -> ChatResult:
        main = run.main or run.episode
        fallback = run.episode if run.main is not None else None
        limits = run.sample.limits or self.limits
        return ChatResult(
            question=run.sample.question,
            sample_id=run.sample.id,
            episode=main.result if main is not None and main.finished and error is None else None,
            record=None if main is None else main.record,
            provenance=self.provenance(run.seed, limits),
            work=run.spent + run.row.work,
            seconds=time.perf_counter() - run.began,
            error=error,
            fallback=fallback.result if fallback is not None and fallback.finished else None,
        )

    def provenance(self, seed: int, limits: Limits | None = None) -> Provenance:
        """What a result of this chat depends on."""
        return Provenance(
            preset=self.preset.name,
            limits=limits or self.limits,
            sampling=self.sampling,
            seed=seed,
            prompts=self.prompts.name,
            prompts_sha256=self.prompts.sha256,
            checkpoint=self.checkpoint,
            fingerprint=self.fingerprint,
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=str(self.model.device),
            attention=str(self.model.config._attn_implementation),
            versions=versions(),
        )


class Conversation:
    """Several questions about the same images; later ones pay only for what they add. Made by
    `VilavtChat.conversation`.
    """

    def __init__(self, chat: VilavtChat, sample: Sample) -> None:
        self._chat = chat
        self._sample = sample
        self._engine = chat._engine()
        self._seed = chat._seed_of(sample)
        self._row = self._engine.open(self._seed)
        self._episode: Episode | None = None
        self._busy = False

    def ask(self, question: str, images: ImageSource | Sequence[ImageSource] = ()) -> ChatResult:
        """Ask the next question, about further `images` too if given; `ChatResult.episode.turns` are this question's.

        Raises:
            VilavtError: an image cannot be loaded, or an earlier question failed half-way.
        """
        for event in self._events(question, images, stream=False):
            if isinstance(event, Finished):
                return event.result
        raise EngineError("the conversation ended without a result")

    def stream(self, question: str, images: ImageSource | Sequence[ImageSource] = ()) -> Iterator[Event]:
        """Like :meth:`ask`, as events. Leaving the loop early ends the conversation."""
        return self._events(question, images, stream=True)

    def close(self) -> None:
        """Free the conversation's keys and values; further questions are refused."""
        self._engine.close(self._row)

    def _events(self, question: str, images: ImageSource | Sequence[ImageSource], stream: bool) -> Iterator[Event]:
        if self._busy:
            raise EngineError(
                "the previous question of this conversation is still being answered; finish its stream first"
            )
        chat = self._chat
        more = _several(images)
        if self._episode is None:
            sample = replace(self._sample, question=question, images=[*self._sample.images, *more])
            run = _Run(sample, self._seed, self._row, Intervention(), stream)
        else:
            loaded = [
                load_image(i, chat.image_limits, allow_urls=chat.allow_urls, rules=chat.preset.rules) for i in more
            ]
            sample = replace(self._sample, question=question, images=more)
            run = _Run(sample, self._seed, self._row, Intervention(), stream, self._episode.follow_up(question, loaded))
        self._busy, done = True, False
        try:
            for _, event in chat._drive(self._engine, iter([run])):
                if isinstance(event, Finished):
                    done = event.result.error is None
                    if event.result.error is not None:
                        raise event.result.error
                    episode = run.main or run.episode
                    # An episode that ended before its first turn left nothing to continue.
                    self._episode = episode if run.row.tokens else self._episode
                yield event
        finally:
            self._busy = False
            if not done and run.row.tokens:
                self._engine.close(run.row)


def _reused(inquiry: Inquiry, views: Sequence[View]) -> Inquiry:
    """A crop's inquiry with the places of its images on the originals they come from."""
    origins = []
    for index in inquiry.image_indices:
        view = views[index]
        if view.kind == "original":
            return inquiry
        original = next(i for i, v in enumerate(views) if v.kind == "original" and v.source == view.source)
        origins.append((original, view.region))
    return Reused(inquiry.images, inquiry.query, inquiry.image_indices, origins=tuple(origins))


def _several(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    return [images] if isinstance(images, str | Path | bytes | Image.Image) else list(images)


__all__ = [
    "AnswerEvent",
    "ChatResult",
    "Conversation",
    "CropsEvent",
    "Event",
    "Finished",
    "ImageSource",
    "Intervention",
    "Provenance",
    "RefusedEvent",
    "Sample",
    "TextDelta",
    "ToolCallEvent",
    "VilavtChat",
]
