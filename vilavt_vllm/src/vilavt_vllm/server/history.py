"""Which conversation does a request continue? Clients resend the whole history; we keep its token stream."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from vilavt_core.driver import Driver
from vilavt_core.state import ConversationState

from .requests import Exchange, SentPicture, SentVideo

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


@dataclass(frozen=True, eq=False)
class Kept:
    """A finished question, ready to be followed up."""

    driver: Driver
    state: ConversationState


class History:
    """The last finished questions, found again by everything the client has sent and received up to there.

    A follow-up that is found continues the token stream the model really wrote, so vLLM's caches hold all of it.

    Args:
        capacity: questions kept; the one used longest ago goes first.
        max_bytes: of their decoded images, crops included; an image that several questions share counts for each.
    """

    def __init__(self, capacity: int, max_bytes: int) -> None:
        self.capacity, self.max_bytes, self.bytes = capacity, max_bytes, 0
        self._kept: OrderedDict[str, tuple[Kept, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, exchanges: Sequence[Exchange], lora: LoRARequest | None = None) -> Kept | None:
        """The last of these exchanges as it was answered, with the adapter or without one."""
        key = _key(exchanges, lora)
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def keep(self, exchanges: Sequence[Exchange], kept: Kept, lora: LoRARequest | None = None) -> None:
        """Remember a finished question under its exchanges, the answer included."""
        key, size = _key(exchanges, lora), kept.driver.picture_bytes
        _, before = self._kept.pop(key, (None, 0))
        self._kept[key] = kept, size
        self.bytes += size - before
        while len(self._kept) > self.capacity or (self.bytes > self.max_bytes and self._kept):
            _, (_, size) = self._kept.popitem(last=False)
            self.bytes -= size


def _shown(image: SentPicture | SentVideo) -> list[Any]:
    """An image or a video, and what was said of it."""
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
