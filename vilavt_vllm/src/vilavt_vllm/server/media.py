"""Pictures of a request: fetched as vLLM's flags allow, capped before they are decoded."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from vllm.multimodal.media import MediaConnector, MediaIO

from vilavt_core.errors import ImageError
from vilavt_core.images import ImageLimits, load_image, plain_base64
from vilavt_core.protocol import Rules
from vilavt_core.regions import Picture
from vilavt_core.sources import Video
from vilavt_core.video import VideoLimits, read_frames

from ..errors import RequestError
from .options import NO_DOMAINS
from .requests import SentPicture, SentVideo

_LIMIT = re.compile(r"VideoLimits\.(\w+)")
_FLAGS = {
    "max_bytes": "--max-video-bytes",
    "max_frames": "--max-images",
    "max_pixels": "--max-image-pixels",
    "max_total_pixels": "--max-video-pixels",
    "max_seconds": "--max-video-seconds",
}
"""Field of `VideoLimits` -> what raises it here."""


class PictureIO(MediaIO[Image.Image]):
    """Turns what vLLM's connector fetched into a picture."""

    def __init__(self, limits: ImageLimits, rules: Rules) -> None:
        self.limits, self.rules = limits, rules

    def get_max_bytes(self) -> int:
        """At which a download is cut off."""
        return self.limits.max_bytes

    def load_bytes(self, data: bytes) -> Image.Image:
        """From an encoded file.

        Raises:
            ImageError: too large, too many pixels, or not a picture.
        """
        return load_image(data, self.limits, rules=self.rules)

    def load_base64(self, media_type: str, data: str) -> Image.Image:
        """From a data URL."""
        return self.load_bytes(_decoded(data, self.limits.max_bytes, "--max-image-bytes"))

    def load_file(self, filepath: Path) -> Image.Image:
        """From a local file that the connector has allowed."""
        return load_image(filepath, self.limits, rules=self.rules)


class VideoIO(MediaIO[list[Picture]]):
    """Turns what vLLM's connector fetched into the frames of a video.

    Args:
        video: which frames; its source is not read.
        limits: caps.
    """

    def __init__(self, video: Video, limits: VideoLimits) -> None:
        self.video, self.limits = video, limits

    def get_max_bytes(self) -> int:
        """At which a download is cut off."""
        return self.limits.max_bytes

    def load_bytes(self, data: bytes) -> list[Picture]:
        """From an encoded file.

        Raises:
            ImageError: it is no video, damaged, or breaks a cap.
        """
        return read_frames(replace(self.video, source=data), self.limits, allow_paths=False)

    def load_base64(self, media_type: str, data: str) -> list[Picture]:
        """From a data URL."""
        return self.load_bytes(_decoded(data, self.limits.max_bytes, "--max-video-bytes"))

    def load_file(self, filepath: Path) -> list[Picture]:
        """From a local file that the connector has allowed."""
        return read_frames(replace(self.video, source=filepath), self.limits)


def _decoded(data: str, most: int, flag: str) -> bytes:
    """What a data URL holds, once its size is known to be allowed."""
    try:
        plain = plain_base64(data)
    except ValueError as error:
        raise ImageError(f"a data URL is not valid base64 ({error})") from None
    size = len(plain) * 3 // 4
    if size > most + 3:
        raise ImageError(f"a data URL holds {size} bytes, at most {most} are allowed; raise it with {flag}")
    try:
        return base64.b64decode(plain, validate=True)
    except binascii.Error as error:
        raise ImageError(f"a data URL is not valid base64 ({error})") from None


class Pictures:
    """Loads the pictures and videos of requests.

    Args:
        model_config: vLLM's, for ``--allowed-media-domains`` and ``--allowed-local-media-path``.
        limits: pixels and bytes of one file.
        rules: of the preset.
        video_limits: caps on the videos of a request.
    """

    def __init__(
        self, model_config: Any, limits: ImageLimits, rules: Rules, video_limits: VideoLimits | None = None
    ) -> None:
        self._io, self.video_limits = PictureIO(limits, rules), video_limits or VideoLimits()
        self._connector = MediaConnector(
            allowed_local_media_path=model_config.allowed_local_media_path,
            allowed_media_domains=model_config.allowed_media_domains,
        )
        self._flags = {
            "http": (
                "--allowed-media-domains",
                model_config.allowed_media_domains and model_config.allowed_media_domains != NO_DOMAINS,
            ),
            "file": ("--allowed-local-media-path", model_config.allowed_local_media_path),
        }

    async def load(self, url: str) -> Image.Image:
        """One picture, RGB.

        Raises:
            ImageError: it is too large, or not a picture.
            ValueError: the URL is not allowed, or cannot be fetched.
        """
        return await self._load(url, self._io, "picture")

    async def load_all(self, sent: Sequence[SentPicture | SentVideo], most: int) -> list[Picture]:
        """All of a question, in order; of a video its frames.

        Args:
            sent: the pictures and videos.
            most: images that there may be.

        Raises:
            ImageError: one cannot be used, or there are too many frames or pixels.
            ValueError: as `load`.
        """
        out: list[Picture] = []
        pixels = self.video_limits.max_total_pixels
        for place, one in enumerate(sent):
            room = most - len(out) - (len(sent) - place - 1)
            if isinstance(one, SentPicture):
                shown = [Picture(await self.load(one.url))]
            elif one.is_frames:
                shown = [
                    Picture(await self.load(url), time=None if one.fps is None else i / one.fps)
                    for i, url in enumerate(one.urls)
                ]
            else:
                shown = await self._frames(one, room, pixels)
                pixels -= sum(frame.image.width * frame.image.height for frame in shown)
            out += [replace(picture, bounds=one.bounds) for picture in shown]
        return out

    async def _frames(self, sent: SentVideo, most: int, pixels: int) -> list[Picture]:
        (url,) = sent.urls
        video = Video(b"", sent.frames, sent.fps, sent.rule, name="" if url[:5].lower() == "data:" else url[:200])
        limits = replace(self.video_limits, max_frames=most, max_total_pixels=pixels)
        try:
            frames: list[Picture] = await self._load(url, VideoIO(video, limits), "video")
        except ImageError as error:
            raise ImageError(_LIMIT.sub(lambda found: _FLAGS.get(found[1], found[0]), str(error))) from None
        return frames

    async def _load(self, url: str, io: MediaIO[Any], kind: str) -> Any:
        flag, allowed = self._flags.get(url[:4].lower(), ("", True))
        if not allowed:
            raise RequestError(
                f"{url[:100]}: this server fetches no such URL; send the {kind} as a data URL, or start the "
                f"server with {flag}"
            )
        try:
            return await self._connector.load_from_url_async(url, io)
        except ValueError:
            raise
        except Exception as error:  # whatever the network or the file system says, it is about this URL
            raise RequestError(f"{url[:100]}: cannot be fetched: {error or type(error).__name__}") from error
