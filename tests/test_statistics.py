"""Tests and intervals of systems on the same items: against scipy, loops of the textbook, hand numbers, simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import bootstrap, permutation_test
from statsmodels.stats.multitest import multipletests

from common import stats
from common.evaluation import statistics


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
    for drawn in statistics.resample(marks, 200, seed=1).reshape(200, seeds, n):
        by_seed, by_item = drawn.sum(1) / n, drawn.sum(0) / seeds
        assert by_seed.sum() == seeds and by_item.sum() == n and np.array_equal(drawn, np.outer(by_seed, by_item))
    alone = statistics.resample(marks[:1, :, :n], 5000)
    assert (alone.sum(1) == n).all() and alone.mean(0) == pytest.approx(np.ones(n), abs=0.06)
    assert alone.var(0) == pytest.approx(np.full(n, (n - 1) / n), abs=0.1)  # binomial(n, 1 / n)


def test_resample_is_the_textbook_loop(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (4, 1)) + rng.normal(0, 2, 30) + rng.normal(0, 1, (4, 30))
    loop = []
    for _ in range(5000):
        items = rng.integers(0, 30, 30)
        loop.append(np.mean([x[seed, items].mean() for seed in rng.integers(0, 4, 4)]))
    ours = ratio(statistics.resample(means(x), 5000, seed=1))
    assert ours.mean() == pytest.approx(np.mean(loop), abs=0.05) and ours.std() == pytest.approx(np.std(loop), rel=0.05)
    assert np.array_equal(ours, ratio(statistics.resample(means(x), 5000, seed=1)))
    monkeypatch.setattr(statistics, "AT_A_TIME", 1)  # whatever is made at a time
    assert ratio(statistics.resample(means(x), 3000, seed=1)).std() == pytest.approx(ours.std(), rel=0.06)


def test_interval_equals_scipys():
    rng = np.random.default_rng(1)
    top, bottom = rng.gamma(2, 1, 70), rng.gamma(5, 1, 70)
    for data, ours in (((top, np.ones(70)), means(top)), ((top, bottom), np.stack([top, bottom], -1)[None])):
        pooled = lambda x, y, axis: x.sum(axis) / y.sum(axis)  # noqa: E731
        theirs = bootstrap(data, pooled, paired=True, n_resamples=20000, method="percentile", rng=2).confidence_interval
        estimate, low, high = statistics.interval(ours, ratio, 20000)
        assert estimate == pytest.approx(data[0].sum() / data[1].sum())
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_interval_covers():
    rng, inside, several = np.random.default_rng(0), [], []
    for i in range(300):
        bottom = rng.poisson(8, 80) + 1.0
        inside.append((0.3 * bottom + rng.normal(0, 1, 80), bottom))
        _, low, high = statistics.interval(np.stack(inside.pop(), -1)[None], ratio, 400, seed=i)
        inside.append(low <= 0.3 <= high)
        x = rng.normal(0, 0.5, (10, 1)) + rng.normal(0, 1, 40) + rng.normal(0, 1, (10, 40))  # ten seeds
        _, low, high = statistics.interval(means(x), ratio, 400, seed=i)
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
        difference, low, high, p = statistics.compare(a, b, ratio, 20000)
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
    ours, known = statistics.compare(means(a), means(b), ratio, 20000), stats.paired_bootstrap(a, b, 20000, seed=5)
    assert ours[0] == pytest.approx(known[0]) and ours[1:3] == pytest.approx(known[1:3], abs=0.015)
    assert ours[3] == pytest.approx(known[3], abs=0.02)
    back = statistics.compare(means(b), means(a), ratio, 20000)
    assert back[0] == -ours[0] and back[1:3] == pytest.approx((-ours[2], -ours[1])) and back[3] == ours[3]
    # equal in all items: the bootstrap has no width, so there is no interval (B7)
    assert statistics.compare(means(a), means(a), ratio, 500) == (0.0, None, None, 1.0)
    assert statistics.compare(means(np.ones(40)), means(np.zeros(40)), ratio, 500) == (1.0, None, None, 1 / 501)
    for seeds in (1, 3):
        ones = np.ones((seeds, 1))
        assert statistics.compare(means(ones), means(0 * ones), ratio, 500) == (1.0, None, None, 1.0)  # of one item
        assert statistics.interval(means(0.1 * ones), ratio, 500) == (pytest.approx(0.1), None, None)
    _, low, high = statistics.interval(means([[0.0], [1.0], [2.0]]), ratio, 2000)  # one item, seeds that differ
    assert (low, high) == (0.0, 2.0)


def test_compare_p_is_flat_under_the_null_and_covers():
    rng, small, inside = np.random.default_rng(0), [], []
    for i in range(300):
        hard = rng.uniform(size=60)
        a, b = (rng.uniform(size=60) < hard for _ in range(2))
        _, low, high, p = statistics.compare(means(a), means(b), ratio, 400, seed=i)
        small.append(p <= 0.05)
        inside.append(low <= 0 <= high)
    assert 0.01 < np.mean(small) < 0.08 and 0.91 < np.mean(inside) <= 0.985


def test_three_seeds_are_less_sure_than_swaps_alone():
    """One lucky seed of three: scipy's permutation_test says p = 0.02, seeds and items drawn anew say 0.43."""
    rng = np.random.default_rng(3)
    b, a = rng.normal(size=(3, 40)), rng.normal(size=(3, 40)) + np.array([[0.7], [0.07], [-0.14]])
    gaps, draws = (a - b).mean(0), []
    swaps = permutation_test((gaps,), np.mean, permutation_type="samples", n_resamples=10_000, rng=0).pvalue
    for _ in range(10_000):
        items = rng.integers(0, 40, 40)
        draws.append(np.mean([(a[s] - b[s])[items].mean() for s in rng.integers(0, 3, 3)]))
    by_seeds = 2 * min(np.mean(np.array(draws) <= 0), np.mean(np.array(draws) >= 0))
    p = statistics.compare(means(a), means(b), ratio, 10_000)[3]
    assert swaps < 0.03 and p > 0.4 and p == pytest.approx(by_seeds, abs=0.03)
    a, b = a[[2] * 3] + 0.5, b[[2] * 3]  # three times the same seed: no luck, and p is that of the swaps
    swaps = permutation_test(((a - b)[0],), np.mean, permutation_type="samples", n_resamples=10_000, rng=0).pvalue
    p = statistics.compare(means(a), means(b), ratio, 10_000)[3]
    assert 0.01 < swaps < 0.9 and p == pytest.approx(swaps, abs=0.02)


def test_compare_equals_scipys_permutation_test():
    rng = np.random.default_rng(0)
    for seeds, n, shift in ((1, 9, 0.6), (1, 60, 0.15), (1, 200, 0.1)):
        a, b = rng.gamma(2, 1, (2, seeds, n, 2))
        a[..., 0] += shift
        gaps, sum_a, sum_b = (a - b).sum(0), a.sum((0, 1)), b.sum((0, 1))

        def difference(signs, axis, gaps=gaps, sum_a=sum_a, sum_b=sum_b):  # -1: the item is swapped
            moved = (1 - signs) / 2 @ gaps
            return ratio(sum_a - moved) - ratio(sum_b + moved)

        theirs = permutation_test(
            (np.ones(n),), difference, permutation_type="samples", n_resamples=20_000, vectorized=True, batch=500, rng=1
        ).pvalue
        ours = statistics.compare(a, b, ratio, 20_000)[3]
        assert 0.01 < theirs < 0.9 and ours == pytest.approx(theirs, abs=4 * math.sqrt(theirs / 20_000) + 1e-4)


def test_one_seed_meets_several():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, (3, 50)), rng.normal(0, 1, (1, 50))
    ours = statistics.compare(means(a), means(b), ratio, 2000)
    assert ours == pytest.approx(statistics.compare(means(a), means(np.repeat(b, 3, 0)), ratio, 2000))
    assert ours[0] == pytest.approx(a.mean() - b.mean())
    # seeds that differ widen the interval, and raise p, which swaps of items alone would not
    apart = a + np.array([[-1.0], [0.0], [1.0]])
    wide = statistics.compare(means(apart), means(b), ratio, 2000)
    assert wide[2] - wide[1] > 1.5 * (ours[2] - ours[1])
    assert wide[3] > 0.05 > ours[3] and wide[1] < 0 < ours[1]


def test_what_does_not_count_is_no_evidence():
    rng = np.random.default_rng(0)
    a, b = means(rng.normal(0.4, 1, 40)), means(rng.normal(0, 1, 40))
    idle = np.zeros((1, 25, 2))
    plain = statistics.compare(a, b, ratio, 4000)
    padded = statistics.compare(np.concatenate([a, idle], 1), np.concatenate([b, idle], 1), ratio, 4000)
    assert padded[0] == pytest.approx(plain[0]) and padded[3] == pytest.approx(plain[3], abs=0.03)
    assert padded[1:3] == pytest.approx(plain[1:3], abs=0.1)
    nothing = statistics.compare(idle, idle, ratio, 100)
    assert math.isnan(nothing[0]) and nothing[1:] == (None, None, 1.0)
    one_sided = statistics.compare(a, np.zeros_like(a), ratio, 100)
    assert math.isnan(one_sided[0]) and one_sided[3] == 1.0
    estimate, low, high = statistics.interval(idle, ratio, 100)
    assert math.isnan(estimate) and low is high is None
    rare = np.concatenate([means([1.0]), np.zeros((1, 3, 2))], 1)  # many draws miss the only item that counts
    assert statistics.interval(rare, ratio, 500) == (1.0, None, None)
    # half of the swaps leave one side without an item that counts: they hold against a difference
    first, second = np.zeros((2, 1, 5, 2))
    first[0, 0], second[0, 1] = (1, 1), (0, 1)
    assert statistics.compare(first, second, ratio, 500)[::3] == (1.0, 1.0)


def test_statistics_of_other_items_are_refused():
    for a, b in ((means([1, 2]), means([1, 2, 3])), (np.zeros((2, 4, 2)), np.zeros((3, 4, 2))), ([1.0], [2.0])):
        with pytest.raises(ValueError, match="same items"):
            statistics.compare(a, b, ratio, 10)
    for wrong in (np.zeros((1, 0, 2)), np.zeros((3, 2))):
        with pytest.raises(ValueError, match="expected statistics"):
            statistics.resample(wrong, 10)


def test_holm_by_hand_and_by_closed_testing():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0] and statistics.holm([0.2]) == [0.2] and statistics.holm([]) == []
    rng = np.random.default_rng(0)
    for _ in range(20):
        ps = rng.uniform(size=6) ** 3
        groups = [g for r in range(1, 7) for g in itertools.combinations(range(6), r)]
        closed = [max(min(1, len(g) * ps[list(g)].min()) for g in groups if i in g) for i in range(6)]
        assert statistics.holm(ps) == pytest.approx(closed)


def test_holm_equals_statsmodels():
    ps = np.random.default_rng(1).uniform(size=12) ** 3
    assert statistics.holm(ps) == pytest.approx(multipletests(ps, method="holm")[1])


def test_win_rate_by_hand():
    found = statistics.win_rate([1, 2, 3, 4], [0, 2, 4, 1], [5, 5, 5, 5], [5, 5, 5, 5])
    assert (found["wins"], found["ties"], found["losses"], found["rate"]) == (2, 1, 1, 0.625)
    assert (found["low"], found["high"]) == stats.wilson(2.5, 4) and found["controlled"] is None
    for wrong in (([], [], [], []), ([1], [1, 2], [1], [1]), ([math.nan], [1], [1], [1])):
        with pytest.raises(ValueError, match="expected"):
            statistics.win_rate(*wrong)


def test_length_control_takes_out_what_length_wins():
    rng, n = np.random.default_rng(0), 4000
    longer = rng.normal(30, 30, n)
    only_length, better = (rng.uniform(size=n) < 1 / (1 + np.exp(-longer / 30 - edge)) for edge in (0.0, 1.0))
    found = statistics.win_rate(only_length, ~only_length, 100 + longer, np.full(n, 100))
    assert found["rate"] > 0.65 and found["controlled"] == pytest.approx(0.5, abs=0.04)
    found = statistics.win_rate(better, ~better, 100 + longer, np.full(n, 100))
    assert found["controlled"] == pytest.approx(1 / (1 + math.exp(-1)), abs=0.04)
    back = statistics.win_rate(~better, better, np.full(n, 100), 100 + longer)
    assert back["controlled"] == pytest.approx(1 - found["controlled"])
    always = statistics.win_rate(np.ones(50), np.zeros(50), longer[:50], np.zeros(50))
    assert 0.95 < always["controlled"] < 1 and always["rate"] == 1.0


def test_length_control_equals_scipys_and_newtons_optimum():
    rng = np.random.default_rng(0)
    for draw in (rng.normal, rng.standard_cauchy):  # Cauchy: a few answers are longer by far
        longer, outcomes = 50 * draw(size=200) + 20, rng.choice([0, 0.5, 1], 200, p=[0.2, 0.1, 0.7])
        x = np.stack([np.ones(200), longer / longer.std()], 1)
        loss = lambda w: (np.logaddexp(0, x @ w) - outcomes * (x @ w)).sum() + 0.005 * w @ w  # noqa: B023, E731
        best = minimize(loss, np.zeros(2)).x
        assert statistics.length_controlled(outcomes, longer) == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-4)
        weights = np.zeros(2)  # and Newton's steps, of at most 1
        for _ in range(100):
            p = 0.5 + 0.5 * np.tanh(x @ weights / 2)
            hessian = (x * (p * (1 - p))[:, None]).T @ x + 0.01 * np.eye(2)
            step = np.linalg.solve(hessian, x.T @ (outcomes - p) - 0.01 * weights)
            weights += step / max(1.0, np.abs(step).max())
        assert statistics.length_controlled(outcomes, longer) == pytest.approx(1 / (1 + np.exp(-weights[0])), abs=1e-6)
