"""Pictures of a request: fetched as vLLM's flags allow, capped before they are decoded."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from vllm.multimodal.media import MediaConnector, MediaIO

from vilavt_core.download import shown_url
from vilavt_core.errors import ImageError
from vilavt_core.failures import quoted_error
from vilavt_core.images import ImageLimits, decoding_cost, image_file, load_image, plain_base64
from vilavt_core.protocol import Rules

from ..errors import BusyError, LimitError, RequestError
from .budget import Reservation


class PictureIO(MediaIO[bytes]):
    """The file of a picture as vLLM's connector fetched it, not decoded."""

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
        try:
            plain = plain_base64(data)
        except ValueError as error:
            raise ImageError(f"a data URL is not valid base64 ({error})") from None
        size = len(plain) * 3 // 4
        if size > self.limits.max_bytes + 3:
            raise ImageError(
                f"a data URL holds {size} bytes, at most {self.limits.max_bytes} are allowed; raise it with "
                "--max-image-bytes"
            )
        try:
            return self.load_bytes(base64.b64decode(plain, validate=True))
        except binascii.Error as error:
            raise ImageError(f"a data URL is not valid base64 ({error})") from None

    def load_file(self, filepath: Path) -> bytes:
        """Of a local file that the connector has allowed."""
        return image_file(filepath, self.limits)


class Pictures:
    """Loads the pictures of requests.

    Args:
        model_config: vLLM's, for ``--allowed-media-domains`` and ``--allowed-local-media-path``.
        limits: pixels and bytes of one file.
        rules: of the preset.
        max_bytes: of the files of one request together.
    """

    def __init__(self, model_config: Any, limits: ImageLimits, rules: Rules, max_bytes: int) -> None:
        self.limits, self.rules, self.max_bytes = limits, rules, max_bytes
        self._io = PictureIO(limits)
        self._connector = MediaConnector(
            allowed_local_media_path=model_config.allowed_local_media_path,
            allowed_media_domains=model_config.allowed_media_domains,
        )
        self._flags = {
            "http": ("--allowed-media-domains", model_config.allowed_media_domains),
            "file": ("--allowed-local-media-path", model_config.allowed_local_media_path),
        }

    async def load(self, urls: Iterable[str], reservation: Reservation) -> dict[str, Image.Image]:
        """Pictures of a request, RGB, by URL. None is decoded before all are fetched and their sizes are known.

        Raises:
            ImageError: one is too large, or not a picture.
            LimitError: together they are too large.
            BusyError: there is no memory for them now.
            ValueError: a URL is not allowed, or cannot be fetched.
        """
        files: dict[str, bytes] = {}
        for url in urls:
            if url in files:
                continue
            files[url] = await self._fetch(url)
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
                raise BusyError(f"{error}; try again later, or send a smaller picture") from error
        reservation.decoded(costs)
        return pictures

    async def _fetch(self, url: str) -> bytes:
        flag, allowed = self._flags.get(url[:4].lower(), ("", True))
        if not allowed:
            raise RequestError(
                f"{shown_url(url)}: this server fetches no such URL; send the picture as a data URL, or start the "
                f"server with {flag}"
            )
        try:
            return await self._connector.load_from_url_async(url, self._io)
        except ImageError:
            raise
        except Exception as error:  # whatever the network or the file system says, it is about this URL
            raise RequestError(f"{shown_url(url)}: cannot be fetched: {quoted_error(error)}") from error
