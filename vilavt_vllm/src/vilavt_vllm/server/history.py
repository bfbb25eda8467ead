"""Which conversation does a request continue? Clients resend the whole history; we keep its token stream."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence

from ..episodes import EpisodeRun
from .protocol import Exchange


class History:
    """The last finished questions, found again by everything the client has sent and received up to there.

    A follow-up that is found continues the token stream the model really wrote, so vLLM's caches hold all of it.

    Args:
        capacity: questions kept; the one used longest ago goes first. Each holds its pictures.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._runs: OrderedDict[str, EpisodeRun] = OrderedDict()

    def __len__(self) -> int:
        return len(self._runs)

    def find(self, exchanges: Sequence[Exchange]) -> EpisodeRun | None:
        """The run that answered the last of these exchanges."""
        key = _key(exchanges)
        run = self._runs.get(key)
        if run is not None:
            self._runs.move_to_end(key)
        return run

    def keep(self, exchanges: Sequence[Exchange], run: EpisodeRun) -> None:
        """Remember a finished run under its exchanges, the answer included."""
        if self.capacity < 1:
            return
        self._runs[_key(exchanges)] = run
        self._runs.move_to_end(_key(exchanges))
        while len(self._runs) > self.capacity:
            self._runs.popitem(last=False)


def _key(exchanges: Sequence[Exchange]) -> str:
    data = [[[hashlib.sha256(url.encode()).hexdigest() for url in e.images], e.question, e.answer] for e in exchanges]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()
