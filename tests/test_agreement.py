"""Agreement and Bradley-Terry against published numbers, other packages and enumeration."""

import itertools
import math

import evalica
import krippendorff
import numpy as np
import pandas
import pytest
from scipy import optimize

from common.human import agreement

OBSERVERS = (  # Krippendorff 2011, section C: four observers, twelve units, some missing; nominal alpha 0.743
    (1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3),
    (0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0),
)


def count(labels, most):
    """(raters, units) of labels 1..most, 0 missing -> (units, most) counts."""
    return np.array([[(column == label).sum() for label in range(1, most + 1)] for column in np.array(labels).T])


def test_alpha_of_krippendorffs_example():
    assert agreement.krippendorff_alpha(count(OBSERVERS, 5)) == pytest.approx(0.743, abs=5e-4)


def test_alpha_equals_evalica_and_krippendorff():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.integers(1, 5, (3, 15)) * (rng.random((3, 15)) < 0.8)
        frame = pandas.DataFrame(np.where(labels, labels, np.nan))
        expected = evalica.alpha(frame, distance="nominal").alpha
        assert agreement.krippendorff_alpha(count(labels, 4)) == pytest.approx(expected, abs=1e-9)
        other = krippendorff.alpha(value_counts=count(labels, 4), level_of_measurement="nominal")
        assert agreement.krippendorff_alpha(count(labels, 4)) == pytest.approx(other, abs=1e-9)


def test_alpha_with_weights_is_that_of_repeated_units():
    counts, rng = count(OBSERVERS, 5), np.random.default_rng(1)
    weights = rng.multinomial(12, np.full(12, 1 / 12), size=50)
    found = agreement.krippendorff_alpha(counts, weights)
    assert found == pytest.approx([agreement.krippendorff_alpha(np.repeat(counts, w, axis=0)) for w in weights])


def test_agreement_that_is_not_defined_is_no_number():
    assert math.isnan(agreement.krippendorff_alpha([[3, 0], [2, 0]]))  # one label only
    assert math.isnan(agreement.krippendorff_alpha([[1, 0], [0, 1]]))  # nobody shares a unit
    assert math.isnan(agreement.raw_agreement([[1, 0]]))
    assert agreement.raw_agreement([[2, 1], [0, 1]]) == pytest.approx(1 / 3)
    assert agreement.krippendorff_alpha([[2, 0], [0, 2]]) == 1.0


def random_wins(rng, k=4):
    return rng.integers(1, 30, (k, k)) * (1 - np.eye(k)) / 2  # halves: ties


def test_bradley_terry_is_the_maximum_likelihood():
    rng = np.random.default_rng(0)
    for _ in range(5):
        wins = random_wins(rng)
        lost = lambda s: (wins * np.logaddexp(0, s[None, :] - s[:, None])).sum()  # noqa: B023, E731
        best = optimize.minimize(lost, np.zeros(4), tol=1e-12).x
        assert agreement.bradley_terry(wins) == pytest.approx(best - best.mean(), abs=1e-4)


def test_bradley_terry_equals_evalica():
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
