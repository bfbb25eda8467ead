"""Tells when all rewards of many batches are the same: then nothing is learned, and nothing else says so."""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterable

logger = logging.getLogger(__name__)

BATCHES = 10
"""So many batches in a row with one reward are worth a warning; twice as many are worth the next one."""
REWARDS = 32
"""At least so many rewards, too: where a process sees few of every batch, chance makes them equal."""


class EqualRewards:
    """Counts rewards that are the same, one after another. One per process; threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value: float | None = None
        self._rewards = self._batches = 0
        self._next = BATCHES
        self._batch: Hashable = self

    def see(self, rewards: Iterable[float], batch: Hashable) -> None:
        """Count some rewards, and log a warning if all of many batches were equal.

        Args:
            rewards: of trajectories.
            batch: which batch they are of, as the trainer counts; one after another. None: nobody knows, and every
                `REWARDS` rewards are one.
        """
        with self._lock:
            for reward in rewards:
                if reward != self._value:
                    self._value, self._rewards, self._batches, self._next = reward, 0, 0, BATCHES
                    self._batch = self
                current = ("of", self._rewards // REWARDS) if batch is None else batch
                self._rewards += 1
                if current != self._batch:
                    self._batch, self._batches = current, self._batches + 1
            if self._batches >= self._next and self._rewards >= REWARDS:
                self._next = 2 * self._batches
                self._warn()

    def _warn(self) -> None:
        cause = (
            "no answer was right: look at some with trace_every and vilavt-rl replay, whether they end in "
            "<answer>…</answer>, and whether question_type and answer of the rows are what the questions ask for"
            if self._value == 0
            else "answers do not differ in what is rewarded: the questions may be too easy, or the temperature too low"
        )
        logger.warning(
            "all %d rewards of the last %d batches are %g; a policy learns from differences only, so nothing was "
            "learned from them; %s",
            self._rewards,
            self._batches,
            self._value,
            cause,
        )


seen = EqualRewards()
"""Of this process: a trainer makes a new agent loop for every trajectory."""
