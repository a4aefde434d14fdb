"""Agreement between raters, and strengths from pairwise wins."""

import math

import numpy as np
from scipy.sparse.csgraph import connected_components


def krippendorff_alpha(counts, weights=None):
    """Nominal alpha (Krippendorff 2011) of `counts` (units, labels): how many raters gave a unit each label.

    weights (draws, units): how often each unit counts, for a bootstrap -> alphas (draws,); without, a float. Units with
    fewer than two ratings say nothing. nan where all labels left are the same, or none are: chance agreement is 1.
    """
    counts = np.asarray(counts, dtype=np.float64)
    raters = counts.sum(1)
    counts = counts * (raters >= 2)[:, None]
    observed = (counts * (raters[:, None] - counts)).sum(1) / np.maximum(raters - 1, 1)
    draws = np.ones((1, len(counts))) if weights is None else np.asarray(weights, dtype=np.float64)
    totals = draws @ counts
    n = totals.sum(1)
    expected = (totals * (n[:, None] - totals)).sum(1) / np.maximum(n - 1, 1)
    ratio = np.divide(draws @ observed, expected, out=np.full(len(n), np.nan), where=expected > 0)
    return float(1 - ratio[0]) if weights is None else 1 - ratio


def raw_agreement(counts):
    """Share of all pairs of ratings of the same unit that are the same label; nan without a pair."""
    counts = np.asarray(counts, dtype=np.float64)
    pairs = (counts.sum(1) * (counts.sum(1) - 1)).sum()
    return float((counts * (counts - 1)).sum() / pairs) if pairs else math.nan


def bradley_terry(wins, prior=0.0, tolerance=1e-9, most=10_000):
    """Log strengths (..., K), centred at 0, from `wins` (..., K, K): how often row beat column, ties half each.

    P(i beats j) = 1 / (1 + exp(s_j - s_i)), by Newman's iteration (2023, JMLR 24, 238). The maximum likelihood
    (prior 0) exists only if no group of systems won, or lost, everything against the rest (`connected`); with a
    prior > 0 there always is one. ValueError if it does not settle.

    Ours: scipy.optimize.minimize gives the same, but one by one: 2,000 draws of a bootstrap take 6 s, here 0.02.
    """
    wins = np.asarray(wins, dtype=np.float64)
    k = wins.shape[-1]
    wins, strength = (wins + prior) * (1 - np.eye(k)), np.ones(wins.shape[:-1])
    for _ in range(most):
        before = strength.copy()
        for i in range(k):
            sums = strength + strength[..., i, None]
            won = (wins[..., i, :] * strength / sums).sum(-1)
            strength[..., i] = won / (wins[..., :, i] / sums).sum(-1)
        strength /= np.exp(np.log(strength).mean(-1, keepdims=True))
        if np.abs(np.log(strength / before)).max() < tolerance:
            return np.log(strength)
    raise ValueError(f"Bradley-Terry strengths did not settle in {most} rounds: are the systems connected?")


def connected(wins):
    """True if every system beat (or tied) every other one directly or through others: finite strengths exist."""
    beaten = np.asarray(wins) > 0
    return connected_components(beaten, directed=True, connection="strong", return_labels=False) == 1
