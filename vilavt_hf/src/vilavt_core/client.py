"""The backend ``server``: questions to a running ``vilavt-serve``, whose loop zooms and sends the final answer.

Everything goes through the official ``openai`` client (``pip install "vilavt-hf[server]"``). What a server answers
depends on how it was started; it says so under ``/v1/vilavt``, and results repeat it.
"""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from .backends import BackendOptions
from .errors import EngineError, ImageError
from .images import ImageLimits, load_image
from .presets import Limits, Sampling, get_preset
from .results import ChatResult, ImageSource, Provenance, Sample, Work

PER_REQUEST = Limits.per_request()
"""Fields of `Limits` that a request may tighten."""


@dataclass(frozen=True, eq=False)
class ServedResult(ChatResult):
    """What a server answered. It keeps turns and pictures to itself; `reply` holds what it tells of them."""

    reply: Mapping[str, Any] = field(default_factory=dict)
    """The body of its response."""

    @property
    def answer(self) -> str | None:
        """The answer, or None."""
        return self._message.get("content") or None

    @property
    def finish(self) -> str:
        """A `FinishReason`, or ``error``."""
        return "error" if self.error is not None else str(self._told.get("finish"))

    @property
    def thoughts(self) -> str:
        """The thoughts of all turns, one line each."""
        return self._message.get("reasoning_content") or ""

    def to_json(self, *, include_images: bool = False) -> dict[str, Any]:
        """Plain JSON data: zooms and crops are in ``events``; the server sends no images."""
        told = {name: self._told.get(name) for name in ("detail", "turns", "images", "events")}
        return {**super().to_json(), "thoughts": self.thoughts, **told, "usage": self.reply.get("usage")}

    @property
    def _message(self) -> Mapping[str, Any]:
        return self.reply["choices"][0]["message"] if self.reply else {}

    @property
    def _told(self) -> Mapping[str, Any]:
        return self.reply.get("vilavt", {})


class ServerClient:
    """Asks a server.

    Args:
        url: of its API, e.g. ``http://127.0.0.1:8000/v1``.
        options: `limits` and `sampling` go with every request; `engine` are arguments of `openai.OpenAI`. The API key
            is ``engine["api_key"]``, else the environment's ``VILAVT_API_KEY``.

    Raises:
        EngineError: ``openai`` is not installed, no vilavt-serve answers there, or it runs another preset.
    """

    def __init__(self, url: str, options: BackendOptions = BackendOptions()) -> None:  # noqa: B008 (frozen)
        options.refuse("server", "prompts", "dtype", "device")
        if unknown := sorted(set(options.limits) - set(PER_REQUEST)):
            raise EngineError(f"a request to a server cannot limit {', '.join(unknown)}; restart the server with it")
        try:
            import openai
        except ImportError:
            raise EngineError('the backend "server" needs the openai client: pip install "vilavt-hf[server]"') from None
        self.url, self.options = url.rstrip("/"), options
        self.concurrency = options.concurrency or 16
        arguments = {"api_key": os.environ.get("VILAVT_API_KEY") or "none", "max_retries": 6, "timeout": 3600.0}
        self._client = openai.OpenAI(base_url=self.url, **{**arguments, **options.engine})
        try:
            told: Any = self._client.with_options(max_retries=0, timeout=30).get("/vilavt", cast_to=object)
            self.model, server = str(told["model"]), Provenance.from_json(told["provenance"])
        except (openai.OpenAIError, TypeError, KeyError, ValueError) as error:
            raise EngineError(
                f"{self.url}: no vilavt-serve of this version answers there ({type(error).__name__}: {error}); start "
                "one with `vilavt-serve CHECKPOINT`, and give its address with /v1"
            ) from None
        wanted = getattr(options.preset, "name", options.preset)
        if wanted not in (None, server.preset):
            raise EngineError(
                f"{self.url} runs the preset {server.preset!r}, {wanted!r} was asked for; start it with "
                f"--preset {wanted}"
            )
        self._server = replace(server, checkpoint=f"{self.url} {self.model}")
        self._limits = options.change_limits(server.limits)

    def provenance(self, seed: int, limits: Limits | None = None) -> Provenance:
        """What a result with this seed and these limits (None: the server's, tightened by the options) depends on."""
        sampling: Sampling = self.options.change_sampling(self._server.sampling)
        return replace(self._server, seed=seed, limits=limits or self._limits, sampling=sampling)

    def iter_many(self, samples: Iterable[Sample]) -> Iterator[tuple[int, ChatResult]]:
        """Ask many questions, `concurrency` at a time, and yield (place, result) as they are answered. May be called
        from several threads at once.
        """
        places: dict[Future[ChatResult], int] = {}
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            for place, sample in enumerate(samples):
                places[pool.submit(self._ask, sample)] = place
                if len(places) >= self.concurrency:
                    yield from _done(places)
            while places:
                yield from _done(places)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, sample: Sample) -> ChatResult:
        began, seed = time.perf_counter(), sample.seed_from(self.options.seed)
        provenance, reply, failure = self.provenance(seed, sample.limits), {}, None
        try:
            reply = self._complete(sample, seed)
            provenance = replace(
                Provenance.from_json(reply["vilavt"]["provenance"]), checkpoint=self._server.checkpoint
            )
        except Exception as error:
            where = "" if sample.id is None else f"sample {sample.id}: "
            failure = EngineError(f"{where}{self.url}: {type(error).__name__}: {error}")
        return ServedResult(
            question=sample.question,
            sample_id=sample.id,
            episode=None,
            record=None,
            provenance=provenance,
            work=Work(),
            seconds=time.perf_counter() - began,
            error=failure,
            reply=reply if failure is None else {},
        )

    def _complete(self, sample: Sample, seed: int) -> dict[str, Any]:
        limits = {**self.options.limits, **self._tighter(sample.limits)}
        parts: list[Any] = [
            {"type": "image_url", "image_url": {"url": self._data_url(image)}} for image in sample.images
        ]
        response = self._client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": [*parts, {"type": "text", "text": sample.question}]}],
            seed=seed,
            extra_body={**self.options.sampling, "vilavt": limits},
        )
        return response.to_dict()

    def _tighter(self, limits: Limits | None) -> dict[str, Any]:
        if limits is None:
            return {}
        server = asdict(self._server.limits)
        changed = {name: value for name, value in asdict(limits).items() if value != server[name] and value is not None}
        if refused := sorted(set(changed) - set(PER_REQUEST)):
            raise EngineError(f"a request cannot limit {', '.join(refused)}; restart the server with it")
        return changed

    def _data_url(self, image: ImageSource) -> str:
        """The picture as it is stored, so that the server decodes what a local engine would; from memory, as PNG."""
        limits = self.options.image_limits
        if isinstance(image, str) and image.startswith(("data:", "http://", "https://")):
            return image
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            load_image(image, limits, rules=get_preset(self._server.preset).rules).save(buffer, "PNG")
            data = buffer.getvalue()
        else:
            data = image if isinstance(image, bytes) else _read(Path(image), limits)
        return f"data:image/*;base64,{base64.b64encode(data).decode()}"


def open_server(url: str, options: BackendOptions) -> ServerClient:
    """The backend ``server``."""
    return ServerClient(url, options)


def _done(places: dict[Future[ChatResult], int]) -> Iterator[tuple[int, ChatResult]]:
    for future in wait(places, return_when=FIRST_COMPLETED).done:
        yield places.pop(future), future.result()


def _read(path: Path, limits: ImageLimits) -> bytes:
    try:
        size = path.stat().st_size
        if size > limits.max_bytes:
            raise ImageError(
                f"{path}: {size} bytes, at most {limits.max_bytes} are allowed; raise ImageLimits.max_bytes"
            )
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from None
