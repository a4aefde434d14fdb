"""Intervals, calibration and matching against scipy, hand numbers and simulation."""

import itertools

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.proportion import proportion_confint

from common import stats


@pytest.mark.parametrize(("wins", "n"), [(0, 5), (3, 10), (55, 100), (499, 499)])
def test_wilson_equals_scipy(wins, n):
    low, high = scipy.stats.binomtest(wins, n).proportion_ci(method="wilson")
    assert stats.wilson(wins, n) == pytest.approx((low, high), abs=1e-6)


def test_wilson_of_half_wins_equals_statsmodels():
    assert stats.wilson(5.5, 12) == pytest.approx(proportion_confint(5.5, 12, method="wilson"), abs=1e-7)


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
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.1, 0.4):
        first, second = rng.random(200) < 0.5 + shift, rng.random(200) < 0.5
        b, c, p = stats.mcnemar(first, second)
        assert (b, c) == (int((first & ~second).sum()), int((second & ~first).sum()))
        assert p == pytest.approx(scipy.stats.binomtest(b, b + c).pvalue, rel=1e-9)
    assert stats.mcnemar([True, False], [True, False]) == (0, 0, 1.0)
    assert stats.mcnemar([True] * 6, [False] * 6)[2] == pytest.approx(2 / 64)


def test_binomial_test_equals_scipy_and_enumeration():
    assert stats.binomial_p(5, 5) == pytest.approx(2 / 32)
    assert stats.binomial_p(0, 0) == 1.0
    for n, rate in ((1, 0.5), (10, 1 / 3), (57, 0.25), (3000, 0.5)):
        likely = scipy.stats.binom.pmf(np.arange(n + 1), n, rate)
        for k in {0, n // 4, n // 3, n // 2, n}:
            as_unlikely = likely[likely <= likely[k] * (1 + 1e-7)].sum()
            assert stats.binomial_p(k, n, rate) == pytest.approx(as_unlikely, rel=1e-6)


def test_an_interval_without_width_is_none():
    assert stats.percentile_interval([]) == stats.percentile_interval([np.nan]) == (None, None)
    assert stats.percentile_interval([2.0, np.nan, 2.0 + 1e-12]) == (None, None)
    assert stats.percentile_interval([1e6, 1e6 + 1e-9]) == (None, None)
    assert stats.percentile_interval([0.0, 1e-6]) == pytest.approx((0.025e-6, 0.975e-6))
    draws = np.arange(1001.0)
    assert stats.percentile_interval([*draws, np.nan, np.inf]) == pytest.approx((25, 975))


def test_paired_bootstrap_is_the_textbook_loop():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.3, 1, 80), rng.normal(0, 1, 80)
    mean, low, high, p = stats.paired_bootstrap(a, b, 20000)
    means = np.array([rng.choice(a - b, 80).mean() for _ in range(20000)])
    assert mean == pytest.approx((a - b).mean()) and 0 < p < 1
    assert (low, high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.01)
    assert p == pytest.approx(2 * (means <= 0).mean(), abs=0.01)


def test_paired_bootstrap_covers_and_p_is_flat_under_the_null():
    rng = np.random.default_rng(0)
    shift, inside, small = rng.normal(0, 1, 100), [], []
    for _ in range(400):
        a, b = shift + rng.normal(0.2, 0.5, 100), shift + rng.normal(0, 0.5, 100)  # pairing removes the shift
        _, low, high, _ = stats.paired_bootstrap(a, b, 500, seed=int(rng.integers(2**31)))
        inside.append(low <= 0.2 <= high)
        small.append(stats.paired_bootstrap(a - 0.2, b, 500)[3] < 0.05)
    assert 0.91 < np.mean(inside) < 0.98 and 0.02 < np.mean(small) < 0.09


def test_paired_bootstrap_by_hand():
    assert stats.paired_bootstrap([2.0] * 5, [1.0] * 5, 1000) == (1.0, None, None, 0.001)
    assert stats.paired_bootstrap([1.0] * 5, [1.0] * 5, 1000) == (0.0, None, None, 1.0)
    assert stats.paired_bootstrap([3.0], [1.0], 1000) == (2.0, None, None, 0.001)
    a, b = np.arange(10.0), np.arange(10.0)[::-1]
    assert stats.paired_bootstrap(a, b, seed=3) == stats.paired_bootstrap(a, b, seed=3)
    forward, back = stats.paired_bootstrap(a + 2, b, 4000), stats.paired_bootstrap(b, a + 2, 4000)
    assert forward[0] == -back[0] and forward[3] == back[3]
    for wrong in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="same items"):
            stats.paired_bootstrap(*wrong)


def test_pass_at_k_is_the_mean_over_all_draws_of_k():
    for n, c in itertools.product((1, 4, 6), (0, 1, 3, 6)):
        answers = [i < c for i in range(n)]
        for k in range(1, n + 1):
            draws = [any(draw) for draw in itertools.combinations(answers, k)]
            assert stats.pass_at_k(n, min(c, n), k) == pytest.approx(sum(draws) / len(draws))
