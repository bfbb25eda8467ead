"""Images of a request: fetched as vLLM's flags allow, capped before they are decoded."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from vllm.multimodal.media import MediaConnector, MediaIO

from vilavt_core.download import shown_url
from vilavt_core.errors import ImageError
from vilavt_core.failures import quoted_error
from vilavt_core.images import ImageLimits, decoding_cost, image_file, load_image, plain_base64
from vilavt_core.protocol import Rules
from vilavt_core.regions import Picture
from vilavt_core.sources import Video
from vilavt_core.video import VideoLimits, read_frames

from ..errors import BusyError, LimitError, RequestError
from .budget import Reservation
from .options import NO_DOMAINS
from .requests import SentPicture, SentVideo

_SCHEME = re.compile(r"data:|[a-zA-Z][a-zA-Z0-9+.-]*://", re.IGNORECASE)
_DATA_URLS = {"image": "data:image/png;base64,…", "video": "data:video/mp4;base64,…"}
_LIMIT = re.compile(r"VideoLimits\.(\w+)")
_FLAGS = {
    "max_bytes": "--max-video-bytes",
    "max_frames": "--max-images",
    "max_pixels": "--max-image-pixels",
    "max_total_pixels": "--max-video-pixels",
    "max_seconds": "--max-video-seconds",
}
"""Field of `VideoLimits` -> what raises it here."""


class PictureIO(MediaIO[bytes]):
    """The file of an image as vLLM's connector fetched it, not decoded."""

    def __init__(self, limits: ImageLimits) -> None:
        self.limits = limits

    def get_max_bytes(self) -> int:
        """At which a download is cut off."""
        return self.limits.max_bytes

    def load_bytes(self, data: bytes) -> bytes:
        """Of an encoded file.

        Raises:
            ImageError: too large.
        """
        return image_file(data, self.limits)

    def load_base64(self, media_type: str, data: str) -> bytes:
        """From a data URL."""
        return self.load_bytes(_decoded(data, self.limits.max_bytes, "--max-image-bytes"))

    def load_file(self, filepath: Path) -> bytes:
        """Of a local file that the connector has allowed."""
        return image_file(filepath, self.limits)


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
    """Loads the images and videos of requests.

    Args:
        model_config: vLLM's, for ``--allowed-media-domains`` and ``--allowed-local-media-path``.
        limits: pixels and bytes of one file.
        rules: of the preset.
        max_bytes: of the image files of one request together.
        video_limits: caps on the videos of a request.
    """

    def __init__(
        self,
        model_config: Any,
        limits: ImageLimits,
        rules: Rules,
        max_bytes: int,
        video_limits: VideoLimits = VideoLimits(),  # noqa: B008 (frozen)
    ) -> None:
        self.limits, self.rules, self.max_bytes, self.video_limits = limits, rules, max_bytes, video_limits
        self._io = PictureIO(limits)
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

    async def load(
        self, sent: Sequence[Sequence[SentPicture | SentVideo]], most: int, reservation: Reservation
    ) -> list[list[Picture]]:
        """The images of every question of a request, in order; of a video its frames.

        No image is decoded before all are fetched and their sizes are known. The frames of video files are outside
        the reservation: `VideoLimits` bounds them.

        Args:
            sent: the images and videos of each question.
            most: images that one question may have.
            reservation: of the request.

        Raises:
            ImageError: one is too large, or not an image; or there are too many frames or pixels.
            LimitError: together they are too large.
            BusyError: there is no memory for them now.
            ValueError: a URL is not allowed, or cannot be fetched.
        """
        stills = [one for question in sent for one in question if isinstance(one, SentPicture) or one.is_frames]
        urls = [url for one in stills for url in ([one.url] if isinstance(one, SentPicture) else one.urls)]
        pictures = await self.decode(urls, reservation)
        return [await self._shown(question, most, pictures) for question in sent]

    async def decode(self, urls: Iterable[str], reservation: Reservation) -> dict[str, Image.Image]:
        """Images by URL, RGB; errors as `load`."""
        files: dict[str, bytes] = {}
        for url in urls:
            if url in files:
                continue
            files[url] = await self._fetch(url, self._io, "image")
            held = sum(map(len, files.values()))
            if held > self.max_bytes:
                raise LimitError(
                    f"the first {len(files)} images of the request have {held} bytes, at most {self.max_bytes} are "
                    "allowed; send smaller ones, or raise it with --max-body-bytes"
                )
        costs = [await asyncio.to_thread(decoding_cost, data, self.limits) for data in files.values()]
        reservation.take(costs, sum(map(len, files.values())))
        pictures: dict[str, Image.Image] = {}
        for url in list(files):
            try:
                pictures[url] = await asyncio.to_thread(load_image, files.pop(url), self.limits, rules=self.rules)
            except MemoryError as error:
                raise BusyError(f"{error}; try again later, or send a smaller image") from error
        reservation.decoded(costs)
        return pictures

    async def _shown(
        self, sent: Sequence[SentPicture | SentVideo], most: int, pictures: dict[str, Image.Image]
    ) -> list[Picture]:
        out: list[Picture] = []
        pixels = self.video_limits.max_total_pixels
        for place, one in enumerate(sent):
            if isinstance(one, SentPicture):
                shown = [Picture(pictures[one.url])]
            elif one.is_frames:
                times = [None if one.fps is None else i / one.fps for i in range(len(one.urls))]
                shown = [Picture(pictures[url], time=time) for url, time in zip(one.urls, times, strict=True)]
            else:
                shown = await self._frames(one, most - len(out) - (len(sent) - place - 1), pixels)
                pixels -= sum(frame.image.width * frame.image.height for frame in shown)
            out += [replace(picture, bounds=one.bounds) for picture in shown]
        return out

    async def _frames(self, sent: SentVideo, most: int, pixels: int) -> list[Picture]:
        (url,) = sent.urls
        video = Video(b"", sent.frames, sent.fps, sent.rule, name="" if url[:5].lower() == "data:" else shown_url(url))
        limits = replace(self.video_limits, max_frames=most, max_total_pixels=pixels)
        try:
            frames: list[Picture] = await self._fetch(url, VideoIO(video, limits), "video")
        except ImageError as error:
            raise ImageError(_LIMIT.sub(lambda found: _FLAGS.get(found[1], found[0]), str(error))) from None
        return frames

    async def _fetch(self, url: str, io: MediaIO[Any], kind: str) -> Any:
        if not _SCHEME.match(url):
            # A long one is the file itself, which does not belong into a message or a log.
            said = repr(url) if len(url) <= 60 else f"{url[:12]!r}… of {len(url)} characters"
            raise RequestError(
                f"{said} is no URL; send the {kind} as a data URL, {_DATA_URLS[kind]}, or an http(s) URL where this "
                "server fetches it"
            )
        flag, allowed = self._flags.get(url[:4].lower(), ("", True))
        if not allowed:
            raise RequestError(
                f"{shown_url(url)}: this server fetches no such URL; send the {kind} as a data URL, or start the "
                f"server with {flag}"
            )
        try:
            return await self._connector.load_from_url_async(url, io)
        except ImageError:
            raise
        except Exception as error:  # whatever the network or the file system says, it is about this URL
            if url[:5].lower() == "data:":  # what was raised may quote what it holds
                raise RequestError(
                    f"{shown_url(url)} cannot be read; write a {kind}'s data URL as {_DATA_URLS[kind]}"
                ) from None
            raise RequestError(f"{shown_url(url)}: cannot be fetched: {quoted_error(error)}") from error
