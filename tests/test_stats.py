"""Intervals, calibration and matching against scipy, hand numbers and simulation."""

import itertools
import math

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


def test_paired_bootstrap_equals_scipys_percentile_interval():
    bootstrap = pytest.importorskip("scipy.stats").bootstrap
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.3, 1, 80), rng.normal(0, 1, 80)
    mean, low, high, p = stats.paired_bootstrap(a, b, 20000)
    theirs = bootstrap((a - b,), np.mean, n_resamples=20000, method="percentile", rng=2).confidence_interval
    assert mean == pytest.approx((a - b).mean()) and 0 < p < 1
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


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
    assert stats.paired_bootstrap([2.0] * 5, [1.0] * 5, 1000) == (1.0, 1.0, 1.0, 0.001)
    assert stats.paired_bootstrap([1.0] * 5, [1.0] * 5, 1000) == (0.0, 0.0, 0.0, 1.0)
    a, b = np.arange(10.0), np.arange(10.0)[::-1]
    assert stats.paired_bootstrap(a, b, seed=3) == stats.paired_bootstrap(a, b, seed=3)
    forward, back = stats.paired_bootstrap(a + 2, b, 4000), stats.paired_bootstrap(b, a + 2, 4000)
    assert forward[0] == -back[0] and forward[3] == back[3]
    for wrong in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="same items"):
            stats.paired_bootstrap(*wrong)


def ratio(sums):
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def means(x):
    """Scores (n,) or (seeds, n) as statistics of a mean (seeds, n, 2)."""
    x = np.atleast_2d(np.asarray(x, dtype=np.float64))
    return np.stack([x, np.ones_like(x)], -1)


def test_resample_draws_the_same_items_for_every_seed():
    seeds, n = 3, 7
    marks = np.eye(seeds * n).reshape(seeds, n, seeds * n)  # the sums then say how often each (seed, item) was drawn
    for drawn in stats.resample(marks, 200, seed=1).reshape(200, seeds, n):
        by_seed, by_item = drawn.sum(1) / n, drawn.sum(0) / seeds
        assert by_seed.sum() == seeds and by_item.sum() == n and np.array_equal(drawn, np.outer(by_seed, by_item))
    alone = stats.resample(marks[:1, :, :n], 5000)
    assert (alone.sum(1) == n).all() and alone.mean(0) == pytest.approx(np.ones(n), abs=0.06)
    assert alone.var(0) == pytest.approx(np.full(n, (n - 1) / n), abs=0.1)  # binomial(n, 1 / n)


def test_resample_is_the_textbook_loop(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (4, 1)) + rng.normal(0, 2, 30) + rng.normal(0, 1, (4, 30))
    loop = []
    for _ in range(5000):
        items = rng.integers(0, 30, 30)
        loop.append(np.mean([x[seed, items].mean() for seed in rng.integers(0, 4, 4)]))
    ours = ratio(stats.resample(means(x), 5000, seed=1))
    assert ours.mean() == pytest.approx(np.mean(loop), abs=0.05) and ours.std() == pytest.approx(np.std(loop), rel=0.05)
    assert np.array_equal(ours, ratio(stats.resample(means(x), 5000, seed=1)))
    monkeypatch.setattr(stats, "_chunks", lambda draws, n: [1] * draws)  # whatever is made at a time
    assert ratio(stats.resample(means(x), 3000, seed=1)).std() == pytest.approx(ours.std(), rel=0.06)
    assert sum(stats._chunks(10_000, 2312)) == sum(stats._chunks(10_000, 10**8)) == 10_000


def test_interval_equals_scipys():
    bootstrap = pytest.importorskip("scipy.stats").bootstrap
    rng = np.random.default_rng(1)
    top, bottom = rng.gamma(2, 1, 70), rng.gamma(5, 1, 70)
    for data, ours in (((top, np.ones(70)), means(top)), ((top, bottom), np.stack([top, bottom], -1)[None])):
        pooled = lambda x, y, axis: x.sum(axis) / y.sum(axis)  # noqa: E731
        theirs = bootstrap(data, pooled, paired=True, n_resamples=20000, method="percentile", rng=2).confidence_interval
        estimate, low, high = stats.interval(ours, ratio, 20000)
        assert estimate == pytest.approx(data[0].sum() / data[1].sum())
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_interval_covers():
    rng, inside, several = np.random.default_rng(0), [], []
    for i in range(300):
        bottom = rng.poisson(8, 80) + 1.0
        inside.append((0.3 * bottom + rng.normal(0, 1, 80), bottom))
        _, low, high = stats.interval(np.stack(inside.pop(), -1)[None], ratio, 400, seed=i)
        inside.append(low <= 0.3 <= high)
        x = rng.normal(0, 0.5, (10, 1)) + rng.normal(0, 1, 40) + rng.normal(0, 1, (10, 40))  # ten seeds
        _, low, high = stats.interval(means(x), ratio, 400, seed=i)
        several.append(low <= 0 <= high)
    assert 0.91 < np.mean(inside) < 0.98 and 0.89 < np.mean(several) < 0.98


def test_compare_equals_all_swaps_enumerated():
    rng = np.random.default_rng(3)
    for seeds, n, shift in ((1, 10, 0.0), (1, 8, 1.5), (3, 7, 0.8)):
        a = np.stack([rng.normal(shift, 1, (seeds, n)), rng.uniform(0.5, 2, (seeds, n))], -1)
        b = np.stack([rng.normal(0, 1, (seeds, n)), rng.uniform(0.5, 2, (seeds, n))], -1)
        gaps = []
        for swap in itertools.product((False, True), repeat=n):
            first, second = a.copy(), b.copy()
            first[:, swap], second[:, swap] = b[:, swap], a[:, swap]
            gaps.append(abs(ratio(first.sum((0, 1))) - ratio(second.sum((0, 1)))))
        exact = np.mean(np.array(gaps) >= gaps[0] - 1e-12)
        difference, low, high, p = stats.compare(a, b, ratio, 20000)
        assert abs(difference) == pytest.approx(gaps[0]) and low <= difference <= high
        room = 4 * math.sqrt(exact * (1 - exact) / 20000) + 1e-4
        if seeds == 1:
            assert p == pytest.approx(exact, abs=room)
        else:  # and never surer than the interval over seeds and items is
            assert p >= exact - room and (p < 0.05 or low <= 0 <= high)


def test_compare_agrees_with_the_bootstrap_and_is_antisymmetric():
    rng = np.random.default_rng(1)
    a = rng.normal(0.3, 1, 80)
    b = a - rng.normal(0.25, 1, 80)
    ours, known = stats.compare(means(a), means(b), ratio, 20000), stats.paired_bootstrap(a, b, 20000, seed=5)
    assert ours[0] == pytest.approx(known[0]) and ours[1:3] == pytest.approx(known[1:3], abs=0.015)
    assert ours[3] == pytest.approx(known[3], abs=0.02)
    back = stats.compare(means(b), means(a), ratio, 20000)
    assert back[0] == -ours[0] and back[1:3] == pytest.approx((-ours[2], -ours[1])) and back[3] == ours[3]
    assert stats.compare(means(a), means(a), ratio, 500) == (0.0, 0.0, 0.0, 1.0)
    assert stats.compare(means(np.ones(40)), means(np.zeros(40)), ratio, 500) == (1.0, 1.0, 1.0, 1 / 501)


def test_compare_p_is_flat_under_the_null_and_covers():
    rng, small, inside = np.random.default_rng(0), [], []
    for i in range(300):
        hard = rng.uniform(size=60)
        a, b = (rng.uniform(size=60) < hard for _ in range(2))
        _, low, high, p = stats.compare(means(a), means(b), ratio, 400, seed=i)
        small.append(p <= 0.05)
        inside.append(low <= 0 <= high)
    assert 0.01 < np.mean(small) < 0.08 and 0.91 < np.mean(inside) <= 0.985


def test_one_seed_meets_several():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, (3, 50)), rng.normal(0, 1, (1, 50))
    ours = stats.compare(means(a), means(b), ratio, 2000)
    assert ours == pytest.approx(stats.compare(means(a), means(np.repeat(b, 3, 0)), ratio, 2000))
    assert ours[0] == pytest.approx(a.mean() - b.mean())
    # seeds that differ widen the interval, and raise p, which swaps of items alone would not
    apart = a + np.array([[-1.0], [0.0], [1.0]])
    wide = stats.compare(means(apart), means(b), ratio, 2000)
    assert wide[2] - wide[1] > 1.5 * (ours[2] - ours[1])
    assert wide[3] > 0.05 > ours[3] and wide[1] < 0 < ours[1]


def test_what_does_not_count_is_no_evidence():
    rng = np.random.default_rng(0)
    a, b = means(rng.normal(0.4, 1, 40)), means(rng.normal(0, 1, 40))
    idle = np.zeros((1, 25, 2))
    plain = stats.compare(a, b, ratio, 4000)
    padded = stats.compare(np.concatenate([a, idle], 1), np.concatenate([b, idle], 1), ratio, 4000)
    assert padded[0] == pytest.approx(plain[0]) and padded[3] == pytest.approx(plain[3], abs=0.03)
    assert padded[1:3] == pytest.approx(plain[1:3], abs=0.1)
    nothing = stats.compare(idle, idle, ratio, 100)
    assert all(math.isnan(x) for x in nothing[:3]) and nothing[3] == 1.0
    one_sided = stats.compare(a, np.zeros_like(a), ratio, 100)
    assert math.isnan(one_sided[0]) and one_sided[3] == 1.0
    assert all(math.isnan(x) for x in stats.interval(idle, ratio, 100))
    rare = np.concatenate([means([1.0]), np.zeros((1, 3, 2))], 1)  # many draws miss the only item that counts
    assert stats.interval(rare, ratio, 500) == (1.0, 1.0, 1.0)
    # half of the swaps leave one side without an item that counts: they hold against a difference
    first, second = np.zeros((2, 1, 5, 2))
    first[0, 0], second[0, 1] = (1, 1), (0, 1)
    assert stats.compare(first, second, ratio, 500)[::3] == (1.0, 1.0)


def test_statistics_of_other_items_are_refused():
    for a, b in ((means([1, 2]), means([1, 2, 3])), (np.zeros((2, 4, 2)), np.zeros((3, 4, 2))), ([1.0], [2.0])):
        with pytest.raises(ValueError, match="same items"):
            stats.compare(a, b, ratio, 10)
    for wrong in (np.zeros((1, 0, 2)), np.zeros((3, 2))):
        with pytest.raises(ValueError, match="expected statistics"):
            stats.resample(wrong, 10)


def test_holm_by_hand_and_by_closed_testing():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0] and stats.holm([0.2]) == [0.2] and stats.holm([]) == []
    rng = np.random.default_rng(0)
    for _ in range(20):
        ps = rng.uniform(size=6) ** 3
        groups = [g for r in range(1, 7) for g in itertools.combinations(range(6), r)]
        closed = [max(min(1, len(g) * ps[list(g)].min()) for g in groups if i in g) for i in range(6)]
        assert stats.holm(ps) == pytest.approx(closed)


def test_holm_equals_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    ps = np.random.default_rng(1).uniform(size=12) ** 3
    assert stats.holm(ps) == pytest.approx(multitest.multipletests(ps, method="holm")[1])


def test_win_rate_by_hand():
    found = stats.win_rate([1, 2, 3, 4], [0, 2, 4, 1], [5, 5, 5, 5], [5, 5, 5, 5])
    assert (found["wins"], found["ties"], found["losses"], found["rate"]) == (2, 1, 1, 0.625)
    assert (found["low"], found["high"]) == stats.wilson(2.5, 4) and found["controlled"] is None
    for wrong in (([], [], [], []), ([1], [1, 2], [1], [1]), ([math.nan], [1], [1], [1])):
        with pytest.raises(ValueError, match="expected"):
            stats.win_rate(*wrong)


def test_length_control_takes_out_what_length_wins():
    rng, n = np.random.default_rng(0), 4000
    longer = rng.normal(30, 30, n)
    only_length, better = (rng.uniform(size=n) < 1 / (1 + np.exp(-longer / 30 - edge)) for edge in (0.0, 1.0))
    found = stats.win_rate(only_length, ~only_length, 100 + longer, np.full(n, 100))
    assert found["rate"] > 0.65 and found["controlled"] == pytest.approx(0.5, abs=0.04)
    found = stats.win_rate(better, ~better, 100 + longer, np.full(n, 100))
    assert found["controlled"] == pytest.approx(1 / (1 + math.exp(-1)), abs=0.04)
    back = stats.win_rate(~better, better, np.full(n, 100), 100 + longer)
    assert back["controlled"] == pytest.approx(1 - found["controlled"])
    always = stats.win_rate(np.ones(50), np.zeros(50), longer[:50], np.zeros(50))
    assert 0.95 < always["controlled"] < 1 and always["rate"] == 1.0


def test_length_control_equals_scipys_optimum():
    minimize = pytest.importorskip("scipy.optimize").minimize
    rng = np.random.default_rng(0)
    for draw in (rng.normal, rng.standard_cauchy):  # Cauchy: a few answers are longer by far
        longer, outcomes = 50 * draw(size=200) + 20, rng.choice([0, 0.5, 1], 200, p=[0.2, 0.1, 0.7])
        x = np.stack([np.ones(200), longer / longer.std()], 1)
        loss = lambda w: (np.logaddexp(0, x @ w) - outcomes * (x @ w)).sum() + 0.005 * w @ w  # noqa: B023, E731
        best = minimize(loss, np.zeros(2)).x
        assert stats.length_controlled(outcomes, longer) == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-4)
