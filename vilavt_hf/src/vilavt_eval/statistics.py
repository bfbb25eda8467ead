"""Intervals and paired tests, seeded and vectorised: the only place that makes them.

The unit is a question: its answers under several seeds, and its rotated copies, are drawn together, so that repeating
an answer makes no interval narrower. A unit is a pair (sum of scores, number of scores), and a mean is the sum of sums
over the sum of numbers.

One rule for all tables:

- scores of 0 and 1, one per question: `wilson`; their paired differences: Bonett and Price's interval;
- other scores (graded, several seeds, rotated copies): the percentile bootstrap over questions, with a few added
  questions at the ends of the scale, so that equal scores do not make an interval of no width. Of less than `FEW`
  questions a bootstrap says too little: they get the formulas above, as if each question had one score, which are
  cautious, since no scores of the same mean are further apart than 0 and 1;
- means of categories' means: the intervals of the categories put together (`mean_of_means`).

The formulas are short and evaluation needs nothing else of scipy, so they stand here; tests hold them against scipy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
PERMUTATIONS = 20_000
FEW = 30
"""Questions from which on graded or repeated scores are resampled."""
_MANY = 256
"""Distinct units up to which resamples are drawn as counts of them."""
_CELLS = 4_000_000
"""Numbers drawn at a time."""
_DRAWS = 100_000_000
"""Numbers drawn for one test; when that is not enough, fewer permutations are."""
_SCORE_ENDS = (0.0, 0.0, 1.0, 1.0)
"""Mean scores of the questions added to a bootstrap: two of each end, as Agresti and Coull (1998, "Approximate is
better than exact for interval estimation of binomial proportions") add two successes and two failures, which brings a
plain interval close to Wilson's."""
_DIFFERENCE_ENDS = (-1.0, 1.0)
"""The same for paired differences: one of each end, as Bonett and Price (2012) add."""


@dataclass(frozen=True)
class Interval:
    """Ends of an interval."""

    low: float
    high: float


def wilson(right: float, number: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share (Wilson 1927), without continuity correction.

    Args:
        right: how many of the answers are right; the sum of graded ones.
        number: of answers; of none, nothing is known: 0 to 1.
        level: of confidence.
    """
    if number == 0:
        return Interval(0.0, 1.0)
    z, share = _quantile(level), min(1.0, right / number)
    middle = share + z * z / (2 * number)
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    scale = 1 + z * z / number
    # a share of 0 or 1 is an end of its own interval, whatever rounding says
    return Interval(0.0 if share == 0 else (middle - half) / scale, 1.0 if share == 1 else (middle + half) / scale)


def mean_interval(
    sums: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Interval:
    """Interval of a mean score.

    Args:
        sums: ``(units,)``, sum of the scores of each unit; scores are 0 to 1.
        sizes: ``(units,)``, how many scores each has, at least 1.
        rng: where the draws of a bootstrap come from.
        resamples: of a bootstrap.

    Returns:
        Wilson's if every unit has one score and all are 0 or 1, or if the units are few, else a bootstrap's; 0 to 1 of
        no unit.
    """
    number = len(sums)
    if number < FEW or ((sizes == 1).all() and np.isin(sums, (0, 1)).all()):
        return wilson(number * float(sums.sum() / max(1, sizes.sum())), number)
    return _bootstrap(sums, sizes, _SCORE_ENDS, rng, resamples)


def difference_interval(
    sums: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Interval:
    """Interval of a mean paired difference of scores.

    Args:
        sums: ``(units,)``, sum of the differences of each unit; differences are -1 to 1.
        sizes: ``(units,)``, how many differences each has, at least 1.
        rng: where the draws of a bootstrap come from.
        resamples: of a bootstrap.

    Returns:
        If every unit has one difference and all are -1, 0 or 1, or if the units are few, that of Bonett and Price
        (2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data"), else
        a bootstrap's; -1 to 1 of no unit.
    """
    number = len(sums)
    if number < FEW or ((sizes == 1).all() and np.isin(sums, (-1, 0, 1)).all()):
        weighted = number * sums / max(1, sizes.sum())  # a unit's share of the mean, 1 for a single difference
        better, worse = ((float(np.maximum(sign * weighted, 0).sum()) + 1) / (number + 2) for sign in (1, -1))
        middle = better - worse
        half = _quantile(LEVEL) * math.sqrt((better + worse - middle**2) / (number + 2))
        return Interval(max(-1.0, middle - half), min(1.0, middle + half))
    return _bootstrap(sums, sizes, _DIFFERENCE_ENDS, rng, resamples)


def mean_of_means(means: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Interval of the plain mean of independent means, made of their intervals.

    The distances from the means to the ends of their intervals add up as standard errors do (Zou, Huang and Zhang 2009,
    "A note on confidence interval estimation for a linear function of binomial proportions"). So it stays on the scale,
    and it is that of the only mean if there is one.
    """
    middle, number = float(np.mean(means)), len(means)
    pairs = list(zip(means, intervals, strict=True))
    below = math.sqrt(sum(max(0.0, mean - interval.low) ** 2 for mean, interval in pairs)) / number
    above = math.sqrt(sum(max(0.0, interval.high - mean) ** 2 for mean, interval in pairs)) / number
    return Interval(middle - below, middle + above)


def _quantile(level: float) -> float:
    """Of the normal law, two-sided: 1.96 for 0.95."""
    return NormalDist().inv_cdf((1 + level) / 2)


def _bootstrap(
    sums: np.ndarray, sizes: np.ndarray, ends: Sequence[float], rng: np.random.Generator, resamples: int
) -> Interval:
    """Percentile interval over the units and some more of a middling size, whose means are the ends of the scale."""
    added = np.full(len(ends), sizes.mean())
    every = np.concatenate([sums, np.asarray(ends) * added])
    return percentile_interval(resampled_means(every, np.concatenate([sizes, added]), rng, resamples))


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
