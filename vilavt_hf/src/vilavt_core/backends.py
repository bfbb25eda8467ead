"""What answers the questions of a benchmark, by name: ``hf`` (a local model), ``vllm`` (a local vLLM engine),
``server`` (a running ``vilavt-serve``).

An evaluation asks a `Backend` and needs not know which one it is. A package adds a backend through the entry point
group ``vilavt.backends``: its name, and a function ``(model: str, options: BackendOptions) -> Backend``. So a host
package reaches another one's engine without importing it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import metadata
from typing import Any, Protocol

from .errors import EngineError
from .images import ImageLimits
from .presets import Limits, Preset, Sampling
from .prompts import PromptSet
from .results import ChatResult, Event, Images, Intervention, Provenance, Sample, Timings
from .settings import preset_of
from .spelling import did_you_mean, meant
from .video import VideoLimits

GROUP = "vilavt.backends"


class Conversation(Protocol):
    """Several questions about the same images; an engine computes of each only what it adds."""

    def ask(self, question: str, images: Images = ()) -> ChatResult:
        """Ask the next question, about further `images` too if given; the result's turns are this question's.

        Raises:
            VilavtError: an image cannot be loaded, the conversation was closed, or an earlier question failed half-way.
        """
        ...

    def stream(self, question: str, images: Images = ()) -> Iterator[Event]:
        """Like `ask`, as events; `Finished` comes last. Leaving the loop early closes the conversation."""
        ...

    def close(self) -> None:
        """Free what is kept for it; further questions are refused."""
        ...


class Backend(Protocol):
    """Asks a ViLaVT about images. `VilavtChat`, `VilavtLLM` and `ServerClient` have exactly these methods;
    `AsyncBackend` has their async twins.
    """

    concurrency: int
    """Conversations side by side; may be changed between calls."""

    @property
    def timings(self) -> Timings | None:
        """What the engine has spent; None if it does not tell."""
        ...

    def ask(
        self,
        images: Images,
        question: str,
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> ChatResult:
        """Ask one question.

        Args:
            images: one image or several.
            question: the user's text.
            id: named in errors and in the result.
            seed: for sampling. None: made from the backend's and `id`; if the backend has none, a fresh one, told in
                the result's provenance.
            limits: budgets. None: the backend's.

        Raises:
            VilavtError: an image cannot be loaded, …: what `ask_many` would put in `ChatResult.error`.
        """
        ...

    def ask_many(
        self,
        samples: Iterable[Sample | tuple[Any, str]],
        *,
        intervention: Intervention | None = None,
        progress: bool = False,
    ) -> list[ChatResult]:
        """Ask many questions, `concurrency` at a time.

        Args:
            samples: `Sample`, or pairs of (images, question).
            intervention: changes for ablations; only a local model takes them.
            progress: show a bar.

        Returns:
            One result per sample, in their order. One that failed has ``finish == "error"`` and the exception in
            ``error``.

        Raises:
            EngineError: the backend does not support interventions.
        """
        ...

    def iter_many(
        self, samples: Iterable[Sample | tuple[Any, str]], *, intervention: Intervention | None = None
    ) -> Iterator[tuple[int, ChatResult]]:
        """Like `ask_many`, but yields (place, result) as conversations end. Samples are drawn, and their images loaded,
        when their turn comes. Leaving the loop early ends what is running.
        """
        ...

    def stream(
        self,
        images: Images,
        question: str,
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> Iterator[Event]:
        """Ask one question and watch: text as it is sampled, zooms, crops, the answer; `Finished` comes last.

        Raises:
            VilavtError: as `ask`.
        """
        ...

    def conversation(
        self,
        images: Images = (),
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> Conversation:
        """Start a conversation in which several questions can be asked; `limits` count anew for every question."""
        ...

    def provenance(self, seed: int | None, limits: Limits | None = None) -> Provenance:
        """What the results of samples with this seed and these limits (None: the backend's) will say they depend on."""
        ...

    def varied(
        self,
        *,
        preset: Preset | None = None,
        limits: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Backend:
        """The same engine or server, asked in another way; this one stays as it is.

        Args:
            preset: how episodes run, with its own limits and sampling. None: as here.
            limits: fields of `Limits` that shall differ.
            sampling: fields of `Sampling` that shall differ.

        Raises:
            EngineError: a server runs another preset, or cannot be asked for such a limit.
            EpisodeError: a limit cannot have this value.
        """
        ...


class AsyncConversation(Protocol):
    """`Conversation` over an async engine."""

    async def ask(self, question: str, images: Images = ()) -> ChatResult:
        """See `Conversation.ask`."""
        ...

    def stream(self, question: str, images: Images = ()) -> AsyncIterator[Event]:
        """See `Conversation.stream`."""
        ...

    def close(self) -> None:
        """See `Conversation.close`."""
        ...


class AsyncBackend(Protocol):
    """`Backend` over an async engine: the same names, arguments, defaults and errors."""

    concurrency: int
    """Conversations that `ask_many` and `iter_many` run side by side."""

    @property
    def timings(self) -> Timings | None:
        """See `Backend.timings`."""
        ...

    async def ask(
        self,
        images: Images,
        question: str,
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> ChatResult:
        """See `Backend.ask`."""
        ...

    async def ask_many(
        self,
        samples: Iterable[Sample | tuple[Any, str]],
        *,
        intervention: Intervention | None = None,
        progress: bool = False,
    ) -> list[ChatResult]:
        """See `Backend.ask_many`."""
        ...

    def iter_many(
        self, samples: Iterable[Sample | tuple[Any, str]], *, intervention: Intervention | None = None
    ) -> AsyncIterator[tuple[int, ChatResult]]:
        """See `Backend.iter_many`."""
        ...

    def stream(
        self,
        images: Images,
        question: str,
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> AsyncIterator[Event]:
        """See `Backend.stream`."""
        ...

    def conversation(
        self,
        images: Images = (),
        *,
        id: str | None = None,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> AsyncConversation:
        """See `Backend.conversation`."""
        ...

    def provenance(self, seed: int | None, limits: Limits | None = None) -> Provenance:
        """See `Backend.provenance`."""
        ...

    def varied(
        self,
        *,
        preset: Preset | None = None,
        limits: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> AsyncBackend:
        """See `Backend.varied`."""
        ...


@dataclass(frozen=True)
class BackendOptions:
    """How a backend is set up; every default is the checkpoint's own wish, or the server's."""

    preset: str | Preset | None = None
    """How episodes run; None: what the checkpoint asks for. A server has its own: it is compared."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Limits` that shall differ."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Sampling` that shall differ."""
    prompts: str | PromptSet | None = None
    """Wording; None: the checkpoint's own, else the built-in ``default``. Not for a server."""
    seed: int | None = None
    """Of samples that bring none; None: a fresh one for each that samples."""
    concurrency: int | None = None
    """Conversations side by side; None: the backend's choice."""
    dtype: str = "auto"
    """Of the weights. Not for a server."""
    device: str = "auto"
    """Only for ``hf``."""
    image_limits: ImageLimits = ImageLimits()  # noqa: RUF009 (frozen)
    video_limits: VideoLimits = VideoLimits()  # noqa: RUF009 (frozen)
    allow_urls: bool = False
    """Whether an image may be an http(s) URL. A server decides by itself which ones it fetches."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """For what computes: keyword arguments of the model's ``from_pretrained``, of `vllm.LLM`, or of `openai.OpenAI`."""

    def __post_init__(self) -> None:
        for name, known in (("limits", Limits), ("sampling", Sampling)):
            names = {f.name for f in fields(known)}
            if unknown := sorted(set(getattr(self, name)) - names):
                raise EngineError(
                    f"unknown {name} {', '.join(unknown)}; known are {', '.join(sorted(names))}{meant(unknown, names)}"
                )

    def preset_for(self, model: str) -> Preset:
        """The preset for a checkpoint: the one named here, else the one it asks for; with the limits it asks for.

        Args:
            model: folder or hub id; of anything else, as a server's URL, nothing is known here.

        Raises:
            VilavtError: unknown preset, or the checkpoint's settings file is wrong.
        """
        return preset_of(model, self.preset)

    def change_limits(self, limits: Limits) -> Limits:
        """With the changes asked for here."""
        return replace(limits, **self.limits)

    def change_sampling(self, sampling: Sampling) -> Sampling:
        """With the changes asked for here."""
        return replace(sampling, **self.sampling)

    def refuse(self, backend: str, *names: str) -> None:
        """Stop if one of these options was given to a backend that does not support it.

        Raises:
            EngineError: names option and backend.
        """
        defaults = BackendOptions()
        for name in names:
            if (value := getattr(self, name)) != getattr(defaults, name):
                raise EngineError(f"the backend {backend!r} does not support {name}={value!r}; remove it")


Factory = Callable[[str, BackendOptions], Backend]


def backends() -> dict[str, metadata.EntryPoint]:
    """Installed backends by name."""
    return {entry.name: entry for entry in metadata.entry_points(group=GROUP)}


def names_server(model: str) -> bool:
    """Whether a model is named by the URL of a server."""
    return model.startswith(("http://", "https://"))


def open_backend(model: str, name: str | None = None, options: BackendOptions = BackendOptions()) -> Backend:
    """Load a checkpoint, or reach a server.

    Args:
        model: checkpoint folder or hub id; for ``server`` the URL of its API, e.g. ``http://127.0.0.1:8000/v1``.
        name: of the backend. None: ``server`` for a URL, else ``hf``.
        options: how.

    Raises:
        EngineError: no such backend, an option that it does not support, or the server does not answer.
        VilavtError: the checkpoint cannot be loaded.
    """
    name = name or ("server" if names_server(model) else "hf")
    found = backends()
    if name not in found:
        hint = "; pip install vilavt-vllm brings it" if name == "vllm" else ""
        raise EngineError(
            f"no backend {name!r} is installed, there are {', '.join(sorted(found))}{hint or did_you_mean(name, found)}"
        )
    if (name == "server") != names_server(model):
        raise EngineError(
            f"model {model!r} does not fit the backend {name!r}: `server` takes the URL of a running vilavt-serve, the "
            "others a checkpoint folder or hub id"
        )
    factory: Factory = found[name].load()
    return factory(model, options)
