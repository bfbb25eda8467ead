"""Which conversation does a request continue? Clients resend the whole history; we keep its token stream."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from vilavt_core.driver import Driver

from .requests import Exchange, SentPicture, SentVideo

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class History:
    """The last finished questions, found again by everything the client has sent and received up to there.

    A follow-up that is found continues the token stream the model really wrote, so vLLM's caches hold all of it.

    Args:
        capacity: questions kept; the one used longest ago goes first.
        max_bytes: of their decoded pictures, crops included; a picture that several questions share counts for each.
    """

    def __init__(self, capacity: int, max_bytes: int) -> None:
        self.capacity, self.max_bytes, self.bytes = capacity, max_bytes, 0
        self._drivers: OrderedDict[str, tuple[Driver, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._drivers)

    def find(self, exchanges: Sequence[Exchange], lora: LoRARequest | None = None) -> Driver | None:
        """The driver that answered the last of these exchanges, with the adapter or without one."""
        key = _key(exchanges, lora)
        if key not in self._drivers:
            return None
        self._drivers.move_to_end(key)
        return self._drivers[key][0]

    def keep(self, exchanges: Sequence[Exchange], driver: Driver, lora: LoRARequest | None = None) -> None:
        """Remember a finished question under its exchanges, the answer included."""
        key = _key(exchanges, lora)
        _, before = self._drivers.pop(key, (None, 0))
        self._drivers[key] = driver, driver.picture_bytes
        self.bytes += driver.picture_bytes - before
        while len(self._drivers) > self.capacity or (self.bytes > self.max_bytes and self._drivers):
            _, (_, size) = self._drivers.popitem(last=False)
            self.bytes -= size


def _shown(image: SentPicture | SentVideo) -> list[Any]:
    """A picture or a video, and what was said of it."""
    if isinstance(image, SentPicture):
        return [hashlib.sha256(image.url.encode()).hexdigest(), *astuple(image.bounds)]
    urls = [hashlib.sha256(url.encode()).hexdigest() for url in image.urls]
    return [urls, image.is_frames, image.frames, image.fps, image.rule, *astuple(image.bounds)]


def _key(exchanges: Sequence[Exchange], lora: LoRARequest | None) -> str:
    """Of who was asked, and of what was shown and said. Blanks in an answer do not count: clients strip and wrap what
    they show.
    """
    data = [
        [
            [_shown(image) for image in exchange.images],
            exchange.question,
            None if exchange.answer is None else exchange.answer.split(),
        ]
        for exchange in exchanges
    ]
    return hashlib.sha256(json.dumps([lora and lora.lora_name, data]).encode()).hexdigest()
