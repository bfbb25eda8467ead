"""Which samples make which micro-batch, in which order, on which rank.

The order is one list of micro-batches per epoch, the same on every rank, made from the seed alone. Rank r of w takes
entries r, r + w, r + 2w, …, so that one optimiser step uses w x accumulation consecutive entries. Where the list does
not divide evenly the last ranks get an empty micro-batch instead of a repeated one: an epoch visits every sample
exactly once.
"""

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from ..errors import TrainingError

WINDOW = 2048
"""Samples that are packed together; more would fill packs no better, and fewer would leave gaps."""


class Order(Protocol):
    """Micro-batches of every epoch; their number never changes."""

    def __len__(self) -> int:
        """Micro-batches of an epoch, over all ranks."""

    def epoch(self, number: int) -> Sequence[Sequence[int]]:
        """Micro-batches of one epoch as sample indices."""


class InOrder:
    """Samples 0, 1, 2, … in batches, every epoch: for generated data with a curriculum."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def epoch(self, number: int) -> Sequence[Sequence[int]]:
        """The same for every number."""
        return [range(i, min(i + self.size, self.count)) for i in range(0, self.count, self.size)]


class Shuffled:
    """Samples in batches, in a new order every epoch.

    Args:
        samples: indices of those that are trained on.
        size: samples of a batch.
        seed: of the orders.
    """

    def __init__(self, samples: np.ndarray, size: int, seed: int):
        self.samples, self.size, self.seed = samples, size, seed

    def __len__(self) -> int:
        return -(-len(self.samples) // self.size)

    def epoch(self, number: int) -> Sequence[Sequence[int]]:
        """A permutation that depends on seed and number."""
        order = np.random.default_rng([self.seed, number]).permutation(self.samples).tolist()
        return [order[i : i + self.size] for i in range(0, len(order), self.size)]


class Packed:
    """Samples in packs of at most a number of tokens; every epoch visits the same packs in a new order.

    Args:
        samples: indices of those that are trained on.
        lengths: tokens of every sample of the data set.
        budget: tokens of a pack.
        seed: of packs and orders.

    Raises:
        TrainingError: a sample is longer than a pack.
    """

    def __init__(self, samples: np.ndarray, lengths: np.ndarray, budget: int, seed: int):
        self.seed = seed
        longest = int(lengths[samples].max(initial=0))
        if longest > budget:
            raise TrainingError(
                f"a sample has {longest} tokens, a pack holds {budget}; raise batch.pack_tokens or lower "
                "data.max_length"
            )
        shuffled = np.random.default_rng([seed]).permutation(samples)
        self.packs = [
            pack
            for start in range(0, len(shuffled), WINDOW)
            for pack in best_fit(shuffled[start : start + WINDOW], lengths, budget)
        ]

    def __len__(self) -> int:
        return len(self.packs)

    def epoch(self, number: int) -> Sequence[Sequence[int]]:
        """The packs in an order that depends on seed and number."""
        order = np.random.default_rng([self.seed, number]).permutation(len(self.packs))
        return [self.packs[i] for i in order]


def best_fit(samples: np.ndarray, lengths: np.ndarray, budget: int) -> list[list[int]]:
    """Packs of at most `budget` tokens: the longest sample first, each into the fullest pack that has room."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), ascending
    for sample in samples[np.argsort(-lengths[samples], kind="stable")].tolist():
        needed = int(lengths[sample])
        at = bisect_left(room, (needed, -1))
        if at < len(room):
            free, pack = room.pop(at)
        else:
            free, pack = budget, len(packs)
            packs.append([])
        packs[pack].append(sample)
        insort(room, (free - needed, pack))
    return packs


def digest(order: Order) -> str:
    """Tells whether two orders have the same samples in the same micro-batches; 16 hex digits."""
    first = [list(batch) for batch in order.epoch(0)]
    return hashlib.sha256(json.dumps(first).encode()).hexdigest()[:16]


class RankShare:
    """A rank's micro-batches of the current epoch: a batch sampler for `torch.utils.data.DataLoader`.

    Args:
        order: of all ranks.
        rank: this process.
        world: number of processes.
        epoch: tells the number of the epoch that is about to begin. Asked, not told, because a resumed run skips into
            an epoch through a new loader that nobody tells.
    """

    def __init__(self, order: Order, rank: int, world: int, epoch: Callable[[], int]):
        self.order, self.rank, self.world, self.current_epoch = order, rank, world, epoch

    def __len__(self) -> int:
        return -(-len(self.order) // self.world)

    def __iter__(self) -> Iterator[Sequence[int]]:
        batches = self.order.epoch(self.current_epoch())
        for step in range(len(self)):
            at = step * self.world + self.rank
            yield batches[at] if at < len(batches) else []
