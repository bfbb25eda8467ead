"""What ``vilavt-serve`` is told beside vLLM's own flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vilavt_core.images import ImageLimits
from vilavt_core.presets import Limits, described, value_type

from ..errors import CommandError

NO_DOMAINS = ["none: the server was started without --allowed-media-domains"]
"""A list of allowed domains that allows none. vLLM takes an empty one for all of them; this is no host's name."""
VLLM_DEFAULTS: Mapping[str, Any] = {"host": "127.0.0.1", "allowed_media_domains": NO_DOMAINS}
"""Of vLLM's flags whose own defaults are open to everybody: it listens on all interfaces and fetches any URL."""


@dataclass(frozen=True)
class ServerOptions:
    """How the loop in the server runs; None is the checkpoint's or the preset's."""

    preset: str | None = described(
        None, "how episodes run (vilavt_core.presets); default: what the checkpoint asks for"
    )
    prompts: str | None = described(None, "prompt set, a name or a folder; default: the checkpoint's own")
    seed: int | None = described(None, "of requests that sample and bring none; default: a fresh one for each")
    max_image_bytes: int = described(ImageLimits.max_bytes, "bytes of an image as sent")
    max_image_pixels: int = described(
        ImageLimits.max_pixels, "pixels of an image as sent, checked before it is decoded"
    )
    max_video_bytes: int = described(256 * 1024 * 1024, "bytes of a video as sent")
    max_video_pixels: int = described(
        300_000_000, "pixels of all frames of a request's videos together, checked before they are decoded"
    )
    max_video_seconds: float = described(60.0, "that reading one video may take")
    max_request_pixels: int = described(200_000_000, "pixels of all images of a request as sent")
    max_picture_memory: int = described(
        8 * 1024**3,
        "bytes that the images of all running requests may take, decoding included; what does not fit gets 503",
    )
    max_body_bytes: int = described(256 * 1024 * 1024, "bytes of a request")
    max_episodes: int = described(256, "questions answered at the same time; more get 503")
    episode_threads: int = described(4, "threads that cut and resize images of questions, on as many cores")
    max_conversations: int = described(
        64, "finished questions kept, with their images, so that follow-ups continue them"
    )
    max_conversation_bytes: int = described(2 * 1024**3, "bytes of decoded images that those may hold")
    state_key_file: str | None = described(
        None,
        "file with the key that signs states, the same on all replicas; default: the environment's VILAVT_STATE_KEY, "
        "else a key of this process alone",
    )
    state_max_age: float | None = described(None, "seconds that a state may be old; default: any age")
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Limits` that shall differ from the preset's and the checkpoint's."""

    def __post_init__(self) -> None:
        if self.episode_threads < 1:
            raise CommandError(f"--episode-threads is {self.episode_threads}, at least one is needed")


@dataclass(frozen=True)
class Flag:
    """A flag of ``vilavt-serve``."""

    name: str
    """Of the field: of `ServerOptions`, or of `Limits` if it is one of its."""
    kind: type
    """str, int or float."""
    default: Any
    help: str
    is_limit: bool

    @property
    def option(self) -> str:
        """As it is typed."""
        return f"--{self.name.replace('_', '-')}"


def flags() -> list[Flag]:
    """One per option and per limit; a limit's default is None: the preset's and the checkpoint's."""
    out = []
    for owner, is_limit in ((ServerOptions, False), (Limits, True)):
        for f in fields(owner):
            if f.name != "limits":
                default = None if is_limit else f.default
                out.append(Flag(f.name, value_type(owner, f.name), default, f.metadata["help"], is_limit))
    return out


def options_of(given: Mapping[str, Any]) -> ServerOptions:
    """The options that flags say.

    Args:
        given: value by `Flag.name`; a limit that is None was not given.
    """
    own = {flag.name: given[flag.name] for flag in flags() if not flag.is_limit}
    limits = {flag.name: given[flag.name] for flag in flags() if flag.is_limit and given[flag.name] is not None}
    return ServerOptions(**own, limits=limits)
