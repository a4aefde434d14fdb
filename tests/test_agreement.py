"""Agreement, Bradley-Terry and the binomial test against published numbers, other packages and enumeration."""

import itertools
import math

import numpy as np
import pytest

from common.human import agreement

OBSERVERS = (  # Krippendorff 2011, section C: four observers, twelve units, some missing; nominal alpha 0.743
    (1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3),
    (0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0),
)
FLEISS = (  # ten subjects, fourteen raters, five labels: kappa 0.210
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
)  # fmt: skip


def count(labels, most):
    """(raters, units) of labels 1..most, 0 missing -> (units, most) counts."""
    return np.array([[(column == label).sum() for label in range(1, most + 1)] for column in np.array(labels).T])


def test_alpha_of_krippendorffs_example():
    assert agreement.krippendorff_alpha(count(OBSERVERS, 5)) == pytest.approx(0.743, abs=5e-4)


def test_alpha_equals_evalica():
    evalica, pandas = pytest.importorskip("evalica"), pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.integers(1, 5, (3, 15)) * (rng.random((3, 15)) < 0.8)
        frame = pandas.DataFrame(np.where(labels, labels, np.nan))
        expected = evalica.alpha(frame, distance="nominal").alpha
        assert agreement.krippendorff_alpha(count(labels, 4)) == pytest.approx(expected, abs=1e-9)


def test_alpha_with_weights_is_that_of_repeated_units():
    counts, rng = count(OBSERVERS, 5), np.random.default_rng(1)
    weights = rng.multinomial(12, np.full(12, 1 / 12), size=50)
    found = agreement.krippendorff_alpha(counts, weights)
    assert found == pytest.approx([agreement.krippendorff_alpha(np.repeat(counts, w, axis=0)) for w in weights])


def test_kappa_by_hand_and_by_statsmodels():
    assert agreement.fleiss_kappa(FLEISS) == pytest.approx(0.210, abs=5e-4)
    other = pytest.importorskip("statsmodels.stats.inter_rater")
    counts = np.random.default_rng(0).multinomial(4, (0.5, 0.3, 0.2), size=40)
    assert agreement.fleiss_kappa(counts) == pytest.approx(other.fleiss_kappa(counts), abs=1e-12)


def test_agreement_that_is_not_defined_is_no_number():
    assert math.isnan(agreement.krippendorff_alpha([[3, 0], [2, 0]]))  # one label only
    assert math.isnan(agreement.krippendorff_alpha([[1, 0], [0, 1]]))  # nobody shares a unit
    assert math.isnan(agreement.fleiss_kappa([[1, 0]])) and math.isnan(agreement.fleiss_kappa([[3, 0]]))
    assert math.isnan(agreement.raw_agreement([[1, 0]]))
    assert agreement.raw_agreement([[2, 1], [0, 1]]) == pytest.approx(1 / 3)
    assert agreement.krippendorff_alpha([[2, 0], [0, 2]]) == agreement.fleiss_kappa([[2, 0], [0, 2]]) == 1.0


def random_wins(rng, k=4):
    return rng.integers(1, 30, (k, k)) * (1 - np.eye(k)) / 2  # halves: ties


def test_bradley_terry_is_the_maximum_likelihood():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    for _ in range(5):
        wins = random_wins(rng)
        lost = lambda s: (wins * np.logaddexp(0, s[None, :] - s[:, None])).sum()  # noqa: B023, E731
        best = optimize.minimize(lost, np.zeros(4), tol=1e-12).x
        assert agreement.bradley_terry(wins) == pytest.approx(best - best.mean(), abs=1e-4)


def test_bradley_terry_equals_evalica():
    evalica = pytest.importorskip("evalica")
    rng = np.random.default_rng(0)
    games = [(*rng.choice(list("abcd"), 2, replace=False), rng.choice(3)) for _ in range(300)]
    winners = [(evalica.Winner.X, evalica.Winner.Y, evalica.Winner.Draw)[w] for *_, w in games]
    scores = evalica.bradley_terry([g[0] for g in games], [g[1] for g in games], winners, tolerance=1e-12, limit=10_000)
    wins = np.zeros((4, 4))
    for first, second, outcome in games:
        i, j = "abcd".index(first), "abcd".index(second)
        wins[i, j] += (1, 0, 0.5)[outcome]
        wins[j, i] += (0, 1, 0.5)[outcome]
    expected = np.log(scores.scores[list("abcd")].to_numpy())
    assert agreement.bradley_terry(wins) == pytest.approx(expected - expected.mean(), abs=1e-4)


def test_bradley_terry_of_two_is_the_log_odds_and_batches():
    assert agreement.bradley_terry([[0, 30], [10, 0]]) == pytest.approx([math.log(3) / 2, -math.log(3) / 2])
    assert agreement.bradley_terry([[0, 30], [0, 0]], prior=0.5) == pytest.approx([math.log(61) / 2, -math.log(61) / 2])
    many = np.stack([random_wins(np.random.default_rng(seed)) for seed in range(5)])
    assert agreement.bradley_terry(many) == pytest.approx(np.stack([agreement.bradley_terry(wins) for wins in many]))


def test_bradley_terry_settles_on_lopsided_wins():
    wins = np.array([[0, 5000, 9000, 14999], [3, 0, 7000, 14000], [2, 1, 0, 15000], [0.5, 0, 0.5, 0]])
    strengths = agreement.bradley_terry(wins)
    chance = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    assert ((wins + wins.T) * chance).sum(1) - np.diag(wins + wins.T) / 2 == pytest.approx(wins.sum(1), rel=1e-6)
    with pytest.raises(ValueError, match="connected"), np.errstate(all="ignore"):
        agreement.bradley_terry([[0, 5], [0, 0]], most=50)


def test_connected_is_every_way_of_splitting_the_systems():
    rng = np.random.default_rng(0)
    for _ in range(200):
        wins = (rng.random((4, 4)) < 0.3) * (1 - np.eye(4))
        splits = (set(part) for size in (1, 2, 3) for part in itertools.combinations(range(4), size))
        expected = all(any(wins[i, j] for i in part for j in set(range(4)) - part) for part in splits)
        assert agreement.connected(wins) == expected


def test_binomial_test_equals_scipy_and_enumeration():
    assert agreement.binomial_test(5, 5, 0.5) == pytest.approx(2 / 32)
    assert agreement.binomial_test(0, 0, 0.5) == 1.0
    scipy_stats = pytest.importorskip("scipy.stats")
    for n, rate in ((1, 0.5), (10, 1 / 3), (57, 0.25), (3000, 0.5)):
        for k in {0, n // 4, n // 3, n // 2, n}:
            assert agreement.binomial_test(k, n, rate) == pytest.approx(
                scipy_stats.binomtest(k, n, rate).pvalue, rel=1e-6
            )
