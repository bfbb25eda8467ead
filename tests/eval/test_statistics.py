"""Intervals: one rule, held against scipy, hand-made sums and simulated truths."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilavt_eval.statistics import (
    FEW,
    Interval,
    difference_interval,
    mean_interval,
    mean_of_means,
    percentile_interval,
    resampled_means,
    spread,
    wilson,
)

UNITS = st.lists(st.integers(1, 4).flatmap(lambda n: st.tuples(st.floats(0, 1).map(lambda x: x * n), st.just(n))),
                 min_size=1, max_size=2 * FEW)  # fmt: skip
"""Sum and number of the scores of some questions."""


def interval_of(units, kind=mean_interval, resamples=400):
    sums, sizes = (np.array(column) for column in zip(*units, strict=True))
    return kind(sums, sizes, np.random.default_rng(0), resamples)


# ---------------------------------------------------------------------- right or wrong


def test_wilsons_interval_has_its_known_values():
    low, high = wilson(45, 50).low, wilson(45, 50).high
    assert (round(low, 3), round(high, 3)) == (0.786, 0.957)
    assert wilson(0, 0) == Interval(0, 1)
    assert wilson(1, 1) == Interval(pytest.approx(0.2065, abs=1e-4), 1.0)
    assert wilson(0, 1) == Interval(0.0, pytest.approx(0.7935, abs=1e-4))


@settings(deadline=None)  # the first call imports scipy
@given(st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilsons_interval_is_scipys(counts, level):
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with the tiny extra")
    theirs = stats.binomtest(*counts).proportion_ci(level, method="wilson")
    ours = wilson(*counts, level)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=50))
def test_right_or_wrong_answers_of_independent_questions_have_wilsons(scores):
    assert interval_of([(score, 1) for score in scores]) == wilson(sum(scores), len(scores))


def test_nothing_is_known_about_no_question():
    none, rng = np.array([]), np.random.default_rng(0)
    assert mean_interval(none, none, rng) == Interval(0, 1)
    assert difference_interval(none, none, rng) == Interval(-1, 1)


def test_the_interval_of_right_or_wrong_differences_is_bonett_and_prices():
    # by hand: 3 better, 1 worse, 1 equal; (3 + 1) / 7 and (1 + 1) / 7
    better, worse = 4 / 7, 2 / 7
    half = 1.959964 * math.sqrt((better + worse - (better - worse) ** 2) / 7)
    found = interval_of([(d, 1) for d in (1, 1, 1, -1, 0)], difference_interval)
    assert (found.low, found.high) == pytest.approx((better - worse - half, better - worse + half), abs=1e-6)


# ---------------------------------------------------------------------- all scores


@given(UNITS)
def test_an_interval_holds_the_mean_stays_on_the_scale_and_has_a_width(units):
    mean = sum(s for s, _ in units) / sum(n for _, n in units)
    found = interval_of(units)
    assert -1e-12 <= found.low <= mean + 1e-12
    assert mean - 1e-12 <= found.high <= 1 + 1e-12
    assert found.high - found.low > 0.5 / (len(units) + 4)


@given(UNITS, UNITS)
def test_so_does_one_of_differences(first, second):
    units = [(a / m * m - b / n * m, m) for (a, m), (b, n) in zip(first, second, strict=False)]
    mean = sum(s for s, _ in units) / sum(n for _, n in units)
    found = interval_of(units, difference_interval)
    assert -1 - 1e-12 <= found.low <= mean + 1e-12
    assert mean - 1e-12 <= found.high <= 1 + 1e-12
    assert found.high - found.low > 0.5 / (len(units) + 2)


def test_five_right_answers_to_one_question_say_less_than_right_answers_to_five():
    asked_again, questions = interval_of([(5, 5)]), interval_of([(1, 1)] * 5)
    assert asked_again == wilson(1, 1)
    assert questions == wilson(5, 5)


def share_covered(draw, truth, kind=mean_interval, repeats=1500):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(repeats):
        found = kind(*draw(rng), rng, 400)
        hits += found.low <= truth <= found.high
    return hits / repeats


@pytest.mark.parametrize("number", [2, 5, 10, FEW - 1, FEW, 80])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_intervals_of_questions_asked_three_times_cover_the_truth(number, share):
    """Half of the questions' luck is their own: their answers are correlated."""

    def draw(rng):
        own = rng.beta(share, 1 - share, size=number)
        return rng.binomial(3, own).astype(float), np.full(number, 3)

    assert share_covered(draw, share) >= 0.93


@pytest.mark.parametrize("number", [2, 5, 10, FEW - 1, FEW, 300])
def test_intervals_of_graded_scores_cover_the_truth(number):
    def draw(rng):
        return rng.choice([0.0, 0.3, 1.0], p=[0.1, 0.1, 0.8], size=number), np.ones(number)

    assert share_covered(draw, 0.83) >= 0.93


@pytest.mark.parametrize("number", [2, 5, 10, FEW - 1, FEW, 300])
@pytest.mark.parametrize("worth", [1.0, 0.5], ids=["right or wrong", "graded"])
def test_intervals_of_paired_differences_cover_the_truth(number, worth):
    def draw(rng):
        return worth * rng.choice([-1.0, 0.0, 1.0], p=[0.05, 0.75, 0.2], size=number), np.ones(number)

    assert share_covered(draw, worth * 0.15, difference_interval) >= 0.93


def test_many_graded_scores_have_the_bootstraps_interval():
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with the tiny extra")
    scores = np.random.default_rng(1).choice([0.0, 0.1, 0.9, 1.0], size=3000)
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(2))
    ours = mean_interval(scores, np.ones(3000), np.random.default_rng(3), 9999)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.0015)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.0015)


# ---------------------------------------------------------------------- means of means


def test_the_interval_of_a_mean_of_one_mean_is_its_own():
    found = mean_of_means([0.9], [wilson(9, 10)])
    assert (found.low, found.high) == pytest.approx((wilson(9, 10).low, wilson(9, 10).high), abs=1e-12)


def test_the_distances_of_several_means_add_up_as_standard_errors_do():
    found = mean_of_means([0.5, 0.9], [Interval(0.2, 0.7), Interval(0.5, 1.0)])
    assert found.low == pytest.approx(0.7 - math.hypot(0.3, 0.4) / 2, abs=1e-12)
    assert found.high == pytest.approx(0.7 + math.hypot(0.2, 0.1) / 2, abs=1e-12)


@given(st.lists(st.integers(1, 20).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1))
def test_the_interval_of_a_mean_of_means_stays_on_the_scale_and_has_a_width(counts):
    means = [right / number for right, number in counts]
    found = mean_of_means(means, [wilson(*pair) for pair in counts])
    assert -1e-12 <= found.low <= np.mean(means) + 1e-12
    assert np.mean(means) - 1e-12 <= found.high <= 1 + 1e-12
    assert found.high > found.low


def test_means_of_few_questions_per_category_are_covered_as_often_as_they_say():
    rng, hits, shares = np.random.default_rng(0), 0, np.array([0.5, 0.8, 0.95, 0.99, 0.7])
    for _ in range(1500):
        right = rng.binomial(6, shares)
        found = mean_of_means(right / 6, [wilson(int(r), 6) for r in right])
        hits += found.low <= shares.mean() <= found.high
    assert hits / 1500 >= 0.93


# ---------------------------------------------------------------------- the bootstrap


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        scores = rng.choice([0.0, 0.3, 1.0], p=[0.4, 0.3, 0.3], size=80)
        interval = percentile_interval(resampled_means(scores, np.ones(80), rng, 400))
        hits += interval.low <= 0.39 <= interval.high
    assert 0.91 <= hits / 400 <= 0.98


@pytest.mark.parametrize("distinct", [2, 1000])
def test_bootstrap_intervals_are_those_of_the_normal_law_for_many_rows(distinct):
    rng = np.random.default_rng(0)
    scores = rng.integers(distinct, size=2000) / (distinct - 1)
    interval = percentile_interval(resampled_means(scores, np.ones(2000), rng, 4000))
    error = 1.96 * scores.std() / math.sqrt(2000)
    assert interval.low == pytest.approx(scores.mean() - error, abs=0.05 * error)
    assert interval.high == pytest.approx(scores.mean() + error, abs=0.05 * error)


def test_bootstrap_intervals_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with the tiny extra")
    scores = np.random.default_rng(1).choice([0.0, 0.1, 0.9, 1.0], size=300)
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(2))
    ours = percentile_interval(resampled_means(scores, np.ones(300), np.random.default_rng(3), 9999))
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.004)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.004)


def test_repeating_every_answer_makes_no_interval_narrower():
    rng = np.random.default_rng(0)
    scores = rng.integers(2, size=200).astype(float)
    once = percentile_interval(resampled_means(scores, np.ones(200), np.random.default_rng(1), 4000))
    tenfold = percentile_interval(resampled_means(10 * scores, np.full(200, 10), np.random.default_rng(1), 4000))
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high), abs=1e-9)


def test_the_spread_is_the_sample_standard_deviation():
    assert spread([1, 2, 4]) == pytest.approx(math.sqrt(7 / 3))
    assert spread([1]) is None
