"""Ask a ViLaVT about images with a model in this process: one question or many, streamed, or with follow-ups.

`VilavtChat` is the backend ``hf``: conversations are `vilavt_core.driver.Driver`s, `vilavt_hf.engine`
computes them, each image and token once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from vilavt_core.asking import DrivenBackend
from vilavt_core.backends import Backend, BackendOptions
from vilavt_core.checkpoint import adapter_base, adapter_folder, require_vilavt, settings_source
from vilavt_core.checkpoint.companions import QUERY_TOKENIZER, has_tokenizer
from vilavt_core.checkpoint.hub import names_hub_id
from vilavt_core.conversation import Inquiry, Request
from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.episode import Episode
from vilavt_core.errors import EngineError
from vilavt_core.failures import loading
from vilavt_core.images import ImageLimits
from vilavt_core.presets import Limits, Preset, Sampling, get_preset
from vilavt_core.prompts import PromptSet
from vilavt_core.results import Event, Finished, Intervention, Timings, Work
from vilavt_core.settings import preset_of
from vilavt_core.tokenizer import SharedTokenizer
from vilavt_core.video import VideoLimits

from . import compat
from .adapters import adapted_fingerprint, bare_model, put_adapter
from .configuration_vilavt import VilavtConfig
from .engine import MAX_PREFILL_TOKENS, Choose, Engine, EngineRow, Sampler
from .reused_features import ReusedFeatures, reused

if TYPE_CHECKING:
    from vilavt_core.attention import AttentionPicture

    from .modeling_vilavt import VilavtForConditionalGeneration
    from .processing_vilavt import VilavtProcessor


LOADED_AHEAD = 2
"""Questions whose images are loaded while the engine is busy with those before, each in a thread of its own."""


class VilavtChat(DrivenBackend):
    """Asks a model in this process. See `vilavt_core.backends.Backend` for its methods.

    Args:
        model: in eval mode; a ``PeftModel`` is asked with its adapters.
        processor: its processor, with a query tokenizer.
        preset: how episodes run; see `vilavt_core.presets`.
        limits: budgets. None: the preset's, with the pixel bounds of the image processor where they are tighter, and
            the context the language model was made for.
        sampling: how tokens are chosen. None: the preset's (the default preset is greedy).
        seed: for sampling, of samples that bring none. None: a fresh one for each.
        prompts: wording. None: the checkpoint's own, else the built-in ``default``.
        concurrency: conversations that run side by side.
        max_prefill_tokens: new tokens of waiting conversations that are computed at once; lower it if memory is short.
        image_limits, video_limits: caps on files.
        allow_urls: whether an image may be an http(s) URL.
        checkpoint: where the model came from, for the record.
        fingerprint: of the checkpoint, for the record.

    All of it but `model`, `processor`, `concurrency` and `max_prefill_tokens` is in `settings`, which may be replaced
    between calls. What all its engines have spent is in `timings`, measured with `clock`; set that to one that waits
    for the device if the parts shall be exact on a GPU. `choose` picks tokens instead of the settings' sampling.
    """

    def __init__(
        self,
        model: VilavtForConditionalGeneration,
        processor: VilavtProcessor,
        *,
        preset: str | Preset = "default",
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        prompts: PromptSet | str | None = None,
        concurrency: int = 8,
        max_prefill_tokens: int = MAX_PREFILL_TOKENS,
        image_limits: ImageLimits = ImageLimits(),  # noqa: B008 (frozen)
        video_limits: VideoLimits = VideoLimits(),  # noqa: B008 (frozen)
        allow_urls: bool = False,
        checkpoint: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        model = bare_model(model)
        self.model, self.processor = model, processor
        self.settings = ConversationSettings.fitting(
            get_preset(preset),
            tokenizer=SharedTokenizer(processor.tokenizer),
            image_size=processor.image_processor.size,
            context=model.config.text_config.max_position_embeddings,
            limits=limits,
            sampling=sampling,
            prompts=prompts,
            own_prompts=processor.prompts,
            seed=seed,
            image_limits=image_limits,
            video_limits=video_limits,
            allow_urls=allow_urls,
            checkpoint=checkpoint,
            fingerprint=fingerprint,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(compat.input_device(model)),
            attention=str(model.config._attn_implementation),
        )
        self.concurrency, self.max_prefill_tokens = concurrency, max_prefill_tokens
        self.choose: Choose | None = None
        self.clock = time.perf_counter
        self._timings = Timings()

    @property
    def timings(self) -> Timings:
        """Seconds that its engines have spent so far."""
        return self._timings

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        attn_implementation: str | None = None,
        quantize: str | None = None,
        base: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> VilavtChat:
        """Load a checkpoint folder or hub id.

        Args:
            path: a folder in our format or of an adapter, or the hub id of either. Its ``vilavt_chat.json`` gives the
                defaults of `preset` and `limits`.
            dtype: ``auto`` is the checkpoint's own.
            device: ``auto`` is CUDA if there is one, else the CPU. Not with a ``device_map``, which says it by part.
            attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``; None: the library's choice.
            quantize: ``int8``, ``int4`` or ``fp8`` weights; see `vilavt_hf.quantization`.
            base: checkpoint under an adapter; None: the one that the adapter names.
            model_kwargs: for the model's `from_pretrained`, e.g. ``revision`` (of the adapter, if a hub id names one),
                ``device_map``, ``quantization_config``.
            settings: for the constructor.

        Raises:
            CheckpointError: it is no ViLaVT that can be asked, its settings file is wrong, or it cannot be loaded.
            EngineError: there is no such device, type or attention here, or an option that the model does not take.
        """
        from .modeling_vilavt import VilavtForConditionalGeneration
        from .processing_vilavt import VilavtProcessor

        name = str(path)
        kwargs = dict(model_kwargs or {})
        if attn_implementation is not None:
            kwargs["attn_implementation"] = attn_implementation
        hub: dict[str, Any] = {
            key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs
        }
        under = adapter_base(name, base, hub=hub)
        weights, folder = under or name, Path(name)
        asks = settings_source(name, under, hub=hub)
        if under is not None:
            folder = adapter_folder(name, hub) or folder
            if names_hub_id(name):
                hub.pop("revision", None)  # the adapter's; its base has others
                kwargs.pop("revision", None)
        require_vilavt(weights, hub=hub)
        dispatched = kwargs.get("device_map") is not None
        if dispatched and device != "auto":
            raise EngineError(
                f"device={device!s} and device_map={kwargs['device_map']!r} both say where it goes; pass one"
            )
        if dispatched and find_spec("accelerate") is None:
            raise EngineError("a device_map needs the package accelerate, which is not installed")
        device, dtype = compat.usable_device(device), compat.usable_dtype(dtype)
        if quantize is not None:
            if "quantization_config" in kwargs:
                raise EngineError(f"quantize={quantize} and quantization_config are two ways to say it; pass one")
            from .quantization import quantization_config

            config = VilavtConfig.from_pretrained(weights, **hub)
            kwargs["quantization_config"] = quantization_config(quantize, config, device)
            if not dispatched and device.type != "cpu":
                kwargs["device_map"] = {"": str(device)}  # quantised where it stays
        if isinstance(wanted := kwargs.get("attn_implementation"), str):
            compat.require_attention(wanted)
        if Path(weights).is_dir():
            from vilavt_core.checkpoint import fingerprint

            # Before loading: it reads the headers and names what is wrong with a broken checkpoint.
            found = fingerprint(weights)
            settings.setdefault("fingerprint", found if under is None else adapted_fingerprint(found, folder))
        settings["preset"] = preset_of(asks, settings.get("preset"), hub=hub)
        own = under is None or (has_tokenizer(folder) and has_tokenizer(folder / QUERY_TOKENIZER))
        with loading(weights):
            model: Any = VilavtForConditionalGeneration.from_pretrained(weights, dtype=dtype, **kwargs)
            processor = VilavtProcessor.from_pretrained(weights if under is None or not own else folder, **hub)
            if not dispatched and not getattr(model, "is_quantized", False):  # who placed them keeps their weights
                model = model.to(device)
        if under is not None:
            with loading(name):
                model = put_adapter(model, folder)
        model = model.eval()
        settings.setdefault("fingerprint", getattr(model.config, "_commit_hash", None))
        chat = cls(model, processor, checkpoint=name, **settings)
        if quantize is not None:
            chat.settings = replace(chat.settings, dtype=f"{chat.settings.dtype}, {quantize} weights")
        return chat

    @property
    def query_aware_blocks(self) -> list[int]:
        """Vision blocks that see the query, in order."""
        return sorted(self.model.config.vision_config.query_aware_blocks())

    def attention(
        self,
        inquiry: Inquiry,
        *,
        blocks: Sequence[int] | Literal["all"] | None = None,
        heads: Sequence[int] | Literal["all"] = (),
    ) -> AttentionPicture:
        """Where the patches of an inquiry look, images named by their places in the conversation; it is encoded once
        more. For all zooms of a result: `vilavt_core.watching.with_attention`.

        Args:
            inquiry: of a conversation's record.
            blocks: to watch; None: the query-aware ones.
            heads: shown one by one, beside the mean of all.

        Raises:
            AttentionError: a block or head that is not there, or no block is query-aware and none was named.
        """
        from .attention_maps import look, picture_of

        maps = look(self.model, self.processor.encode_inquiries([inquiry]), blocks=blocks, heads=heads)[0]
        return picture_of(maps, inquiry, self.processor)

    def _session(self, intervention: Intervention | None = None) -> LocalSession:
        engine = Engine(
            self.model,
            self.processor.encode_inquiries,
            choose=self.choose or Sampler(self.settings.sampling),
            max_batch_size=self.concurrency,
            max_prefill_tokens=self.max_prefill_tokens,
            clock=self.clock,
            n_tokens=len(self.processor.tokenizer),
        )
        engine.timings = self._timings
        return LocalSession(engine, reencode=intervention is None or intervention.reencode)


class LocalSession:
    """The engine at work on some conversations; see `vilavt_core.asking.Session`.

    Args:
        engine: of these conversations alone.
        reencode: False: crops get their features from their originals; see `Intervention.reencode`.
        ahead: questions whose images are loaded before the engine has room for them.
    """

    def __init__(self, engine: Engine, *, reencode: bool = True, ahead: int = LOADED_AHEAD) -> None:
        self.engine, self.reencode, self.ahead = engine, reencode, ahead
        if not reencode:
            engine.features = ReusedFeatures(engine.features)
        self._rows: dict[Driver, tuple[Episode, EngineRow]] = {}
        """The row of each driver's running episode: a fallback has a stream of its own."""
        self._waiting: dict[EngineRow, Driver] = {}
        """Rows that the engine computes."""
        self._spent: dict[Driver, Work] = {}
        """Work on rows that were closed."""

    def run(self, drivers: Iterator[Driver]) -> Generator[tuple[Driver, Event], None, None]:
        """Keep the engine full, and turn its tokens into events. Which conversations run side by side depends on their
        order alone, not on how long an image takes to load.
        """
        with closing(_loaded_ahead(drivers, self.ahead)) as loaded:
            yield from self._run(loaded)

    def _run(self, drivers: Iterator[Driver]) -> Generator[tuple[Driver, Event], None, None]:
        while True:
            while len(self._waiting) < self.engine.max_batch_size and (driver := next(drivers, None)) is not None:
                yield from self._carry_on(driver, driver.start())
            if not self.engine.busy:
                return
            for sampled in self.engine.step():
                driver = self._waiting[sampled.row]
                if sampled.finish is not None:
                    del self._waiting[sampled.row]
                    self._account(driver)
                if sampled.error is not None:
                    yield from self._carry_on(driver, [driver.fail(sampled.error)])
                    continue
                assert sampled.token_id is not None
                assert sampled.logprob is not None
                finish = None if sampled.finish is None else "length" if sampled.finish == "length" else "stop"
                events = driver.take([sampled.token_id], [sampled.logprob], finish)  # type: ignore[arg-type]
                if sampled.row in self._waiting and driver.request is not None:
                    yield from ((driver, event) for event in events)
                else:
                    yield from self._carry_on(driver, events)

    def follow(self, before: Driver, after: Driver) -> None:
        """The row of one question is the next one's."""
        assert after.episode is not None
        if before in self._rows:
            _, row = self._rows.pop(before)
            if after.seed != before.seed:  # one seed for a whole conversation goes on drawing where it was
                row.generator.manual_seed(after.seed)
            self._rows[after] = after.episode, row
            self._account(after)

    def release(self, driver: Driver) -> None:
        """Free the keys and values of a conversation that goes no further."""
        _, row = self._rows.pop(driver, (None, None))
        if row is not None:
            self._waiting.pop(row, None)
            self.engine.close(row)

    def close(self) -> None:
        """Free all rows."""
        for driver in list(self._rows):
            self.release(driver)

    def _carry_on(self, driver: Driver, events: list[Event]) -> Iterator[tuple[Driver, Event]]:
        """Give the events of a turn's end, and submit the next request if there is one."""
        yield from ((driver, event) for event in events)
        if driver.request is None:
            assert isinstance(events[-1], Finished)
            if events[-1].result.error is not None:
                self.release(driver)
            return
        try:
            row = self._row(driver)
            self.engine.submit(row, self._request(driver, driver.request))
        except Exception as error:
            yield driver, driver.fail(error)
            self.release(driver)
            return
        self._waiting[row] = driver

    def _row(self, driver: Driver) -> EngineRow:
        """The row of the episode that a driver is at; a fallback begins another one."""
        episode, row = self._rows.get(driver, (None, None))
        if row is not None and episode is driver.episode:
            return row
        if row is not None:
            self._spent[driver] = self._spent.get(driver, Work()) + row.work
            self.engine.close(row)
        assert driver.episode is not None
        row = self.engine.open(driver.seed, driver.name)
        self._rows[driver] = driver.episode, row
        return row

    def _request(self, driver: Driver, request: Request) -> Request:
        if self.reencode:
            return request
        assert driver.episode is not None
        views = driver.episode.views
        return replace(
            request, new_inquiries=tuple(reused(one, views, request.inquiries) for one in request.new_inquiries)
        )

    def _account(self, driver: Driver) -> None:
        """Cost of the whole conversation so far."""
        if driver in self._rows:
            driver.work = self._spent.get(driver, Work()) + self._rows[driver][1].work


def _loaded_ahead(drivers: Iterator[Driver], ahead: int) -> Generator[Driver, None, None]:
    """The drivers in their order, their images loaded by threads while nobody asks for the next one."""
    loading: deque[tuple[Driver, Future[None]]] = deque()
    threads = ThreadPoolExecutor(max(1, ahead), "vilavt-images")
    try:
        while True:
            while len(loading) <= ahead and (driver := next(drivers, None)) is not None:
                loading.append((driver, threads.submit(driver.prepare)))
            if not loading:
                return
            driver, done = loading.popleft()
            done.result()
            yield driver
    finally:
        threads.shutdown(cancel_futures=True)


def open_local(model: str, options: BackendOptions) -> Backend:
    """The backend ``hf`` of `vilavt_core.backends`: what an evaluation opens by name."""
    engine = dict(options.engine)
    base = engine.pop("base", None)
    preset = options.preset_for(settings_source(model, adapter_base(model, base)))
    settings: dict[str, Any] = {} if options.concurrency is None else {"concurrency": options.concurrency}
    chat = VilavtChat.from_pretrained(
        model,
        dtype=options.dtype,
        device=options.device,
        quantize=engine.pop("quantize", None),
        base=base,
        model_kwargs=engine,
        preset=preset,
        sampling=options.change_sampling(preset.sampling),
        prompts=options.prompts,
        seed=options.seed,
        image_limits=options.image_limits,
        video_limits=options.video_limits,
        allow_urls=options.allow_urls,
        **settings,
    )
    chat.settings = replace(chat.settings, limits=options.change_limits(chat.settings.limits))
    return chat
