"""Which of several data-parallel engines answers a conversation: the one that has answered it so far.

vLLM's client chooses an engine for every request by how busy each is, and each has caches of its own: a turn that goes
to another engine than the turns before it has all their tokens to compute and all their inquiries to encode again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from vilavt_core.driver import Driver

from .errors import RequestError

HEADER = "X-Data-Parallel-Rank"
"""Of a request that says which engine is to answer it, as vLLM's own routes take it."""


class Affinity:
    """Where conversations are at home.

    Args:
        engines: says how many engines there are now; vLLM may be told to start more while it runs.
    """

    def __init__(self, engines: Callable[[], int]) -> None:
        self._engines = engines
        self._running: Counter[int] = Counter()
        """Questions under way, by rank."""
        self._homes: WeakKeyDictionary[Driver, int] = WeakKeyDictionary()
        self._last = -1

    def check(self, rank: int) -> int:
        """A rank that somebody asks for.

        Raises:
            RequestError: there is no such engine.
        """
        count = self._engines()
        if not 0 <= rank < count:
            there = "is one engine, of rank 0" if count == 1 else f"are engines of the ranks 0 to {count - 1}"
            raise RequestError(f"{HEADER} is {rank}, and there {there}; name one, or leave the choice to the server")
        return rank

    def follow(self, before: Driver, after: Driver) -> None:
        """`after` continues the conversation of `before`."""
        if (rank := self._homes.get(before)) is not None:
            self._homes[after] = rank

    @contextmanager
    def home(self, driver: Driver, asked: int | None = None) -> Iterator[int | None]:
        """The rank for all requests of a question, which is under way within the block; None: there is one engine.

        Args:
            driver: the question.
            asked: the rank that its client wants; the conversation stays there. None: where its earlier questions were
                answered; for a new conversation, where fewest questions are under way.
        """
        count = self._engines()
        if count == 1:
            yield None
            return
        rank = self._homes.get(driver) if asked is None else self.check(asked)
        if rank is None or rank >= count:  # engines may have been taken away
            turns = ((self._last + step) % count for step in range(1, count + 1))
            rank = self._last = min(turns, key=lambda one: self._running[one])
        self._homes[driver] = rank
        self._running[rank] += 1
        try:
            yield rank
        finally:
            self._running[rank] -= 1
