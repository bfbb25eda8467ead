"""Intervals and paired tests, seeded and vectorised.

The unit is a question: its answers under several seeds, and its rotated copies, are drawn together, so that repeating
an answer makes no interval narrower. A unit is a pair (sum of scores, number of scores), and a mean is the sum of sums
over the sum of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
PERMUTATIONS = 20_000
_MANY = 256
"""Distinct units up to which resamples are drawn as counts of them."""
_CELLS = 4_000_000
"""Numbers drawn at a time."""
_DRAWS = 100_000_000
"""Numbers drawn for one test; when that is not enough, fewer permutations are."""


@dataclass(frozen=True)
class Interval:
    """Ends of an interval."""

    low: float
    high: float


def resampled_means(
    sums: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> np.ndarray:
    """Means of resamples of the units, drawn with replacement (the bootstrap of Efron 1979).

    Args:
        sums: ``(units,)``, sum of the scores of each unit.
        sizes: ``(units,)``, how many scores each has, at least 1.
        rng: where the draws come from.
        resamples: how many.

    Returns:
        ``(resamples,)``.
    """
    units, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    number = len(sums)
    if len(units) <= _MANY:  # the same draws, counted: most scores are 0 or 1, or tenths
        drawn = rng.multinomial(number, counts / number, size=resamples)
        totals = drawn @ units
        return totals[:, 0] / totals[:, 1]
    means = np.empty(resamples)
    step = max(1, _CELLS // number)
    for start in range(0, resamples, step):
        rows = rng.integers(number, size=(min(step, resamples - start), number))
        means[start : start + step] = sums[rows].sum(axis=1) / sizes[rows].sum(axis=1)
    return means


def percentile_interval(replicates: np.ndarray, level: float = LEVEL) -> Interval:
    """The interval between the outer quantiles of replicates."""
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds (with k - 1); None for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test: the discordant pairs against a fair coin (McNemar 1947).

    By hand, because evaluation needs nothing else of scipy.

    Args:
        only_first: pairs of which the first alone is right.
        only_second: pairs of which the second alone is right.
    """
    number, fewer = only_first + only_second, min(only_first, only_second)
    if number == 0:
        return 1.0
    at = np.arange(fewer + 1)
    # log of n choose i, by adding up the logarithms of its factors
    binomials = np.concatenate([[0.0], np.cumsum(np.log((number - at[:-1]) / (at[:-1] + 1)))])
    return min(1.0, 2 * float(np.exp(binomials - number * math.log(2)).sum()))


def sign_flip(differences: np.ndarray, rng: np.random.Generator, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p-value of the sum of paired differences under random signs (Fisher's randomisation test).

    Args:
        differences: ``(units,)``, each already weighted as it enters the statistic.
        rng: where the signs come from.
        permutations: how many, at most; the smallest p-value is 1 / (permutations + 1).
    """
    magnitudes = np.abs(differences[np.abs(differences) > 1e-12])
    if len(magnitudes) == 0:
        return 1.0
    distinct, counts = np.unique(magnitudes.round(12), return_counts=True)
    permutations = max(999, min(permutations, _DRAWS // len(distinct)))
    observed, hits = abs(float(differences.sum())), 0
    step = max(1, _CELLS // len(distinct))
    for start in range(0, permutations, step):
        size = (min(step, permutations - start), len(distinct))
        sums = (2 * rng.binomial(counts, 0.5, size=size) - counts) @ distinct
        hits += int((np.abs(sums) >= observed - 1e-9).sum())
    return (hits + 1) / (permutations + 1)
