"""Intervals, calibration and matching against scipy, hand numbers and simulation."""

import numpy as np
import pytest

from common import stats


@pytest.mark.parametrize(("wins", "n"), [(0, 5), (3, 10), (55, 100), (499, 499)])
def test_wilson_equals_scipy(wins, n):
    scipy_stats = pytest.importorskip("scipy.stats")
    low, high = scipy_stats.binomtest(wins, n).proportion_ci(method="wilson")
    assert stats.wilson(wins, n) == pytest.approx((low, high), abs=1e-6)


def test_wilson_by_hand():
    assert stats.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_wilson_covers():
    rng = np.random.default_rng(0)
    hits = [low <= 0.6 <= high for low, high in (stats.wilson(rng.binomial(200, 0.6), 200) for _ in range(1000))]
    assert 0.93 < np.mean(hits) < 0.97


def test_ties_count_half():
    accuracy, low, high = stats.preference_accuracy([1.0, -1.0, 0.0, 0.0])
    assert accuracy == 0.5 and low < 0.5 < high
    assert stats.preference_accuracy(np.zeros(100))[0] == 0.5


def test_calibration_of_an_honest_and_of_a_boastful_model():
    rng = np.random.default_rng(0)
    strength = rng.uniform(0.5, 1.0, 40_000)  # how sure it is of the one it prefers
    right = rng.uniform(size=strength.size) < strength
    honest = np.where(right, strength, 1 - strength)  # P(chosen wins)
    ece, rows = stats.calibration(honest)
    assert ece < 0.01 and sum(n for *_, n in rows) == 2 * len(honest)
    boastful = np.where(right, 0.99, 0.01)
    assert stats.calibration(boastful)[0] == pytest.approx(0.99 - right.mean(), abs=0.01)


def test_length_matched_and_correlation():
    assert stats.length_matched([1, 2, 3], [0, -5, 2], 2).tolist() == [1, 3]
    assert stats.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert stats.correlation([1, 1, 1], [2, 4, 6]) == 0.0


def test_mcnemar_is_the_exact_binomial():
    scipy = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.1, 0.4):
        first, second = rng.random(200) < 0.5 + shift, rng.random(200) < 0.5
        b, c, p = stats.mcnemar(first, second)
        assert (b, c) == (int((first & ~second).sum()), int((second & ~first).sum()))
        assert p == pytest.approx(scipy.binomtest(b, b + c).pvalue, rel=1e-9)
    assert stats.mcnemar([True, False], [True, False]) == (0, 0, 1.0)
    assert stats.mcnemar([True] * 6, [False] * 6)[2] == pytest.approx(2 / 64)
