"""Pictures of a request: fetched as vLLM's flags allow, capped before they are decoded."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from PIL import Image
from vllm.multimodal.media import MediaConnector, MediaIO

from vilavt_core.errors import ImageError
from vilavt_core.images import ImageLimits, load_image, plain_base64
from vilavt_core.protocol import Rules

from ..errors import RequestError
from .options import NO_DOMAINS


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

    def load_file(self, filepath: Path) -> Image.Image:
        """From a local file that the connector has allowed."""
        return load_image(filepath, self.limits, rules=self.rules)


class Pictures:
    """Loads the pictures of requests.

    Args:
        model_config: vLLM's, for ``--allowed-media-domains`` and ``--allowed-local-media-path``.
        limits: pixels and bytes of one file.
        rules: of the preset.
    """

    def __init__(self, model_config: Any, limits: ImageLimits, rules: Rules) -> None:
        self._io = PictureIO(limits, rules)
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
        flag, allowed = self._flags.get(url[:4].lower(), ("", True))
        if not allowed:
            raise RequestError(
                f"{url[:100]}: this server fetches no such URL; send the picture as a data URL, or start the "
                f"server with {flag}"
            )
        try:
            return await self._connector.load_from_url_async(url, self._io)
        except ValueError:
            raise
        except Exception as error:  # whatever the network or the file system says, it is about this URL
            raise RequestError(f"{url[:100]}: cannot be fetched: {error or type(error).__name__}") from error
