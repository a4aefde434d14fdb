"""Intervals and tests of systems on the same items.

Statistics are arrays (seeds, n, k): k numbers of each of n items under each training seed. A metric is a function
`value` of their sum, (..., k) -> (...,), that must not depend on the sum's scale, as no ratio and no BLEU does.
scipy is imported where it is called: that takes most of a second.
"""

import numpy as np

from common.stats import percentile_interval, wilson

AT_A_TIME = 2**21  # random numbers made at once: they stay under 16 MB


def resample(stats, draws, seed=0):
    """Bootstrap of statistics (seeds, n, k) -> their sums in each draw (draws, k).

    A draw takes n items with replacement, the same for all seeds, and, of several, seeds with replacement: the
    hierarchical bootstrap of Davison and Hinkley 1997, section 3.8. ValueError: not three axes, or an empty one.
    """
    from scipy.stats import bootstrap

    stats = np.asarray(stats, dtype=np.float64)
    if stats.ndim != 3 or 0 in stats.shape:
        raise ValueError(f"expected statistics (seeds, items, k), got {stats.shape}")
    seeds, n, k = stats.shape
    rows = stats.transpose(1, 0, 2).reshape(n, seeds * k)

    def sums(items, picked, axis):  # by counts: gathering the items takes up to eight times as long
        by_seed = (_times_drawn(items, n) @ rows).reshape(-1, seeds, k)
        return np.einsum("ds,dsk->kd", _times_drawn(picked, seeds), by_seed)

    indices = [np.arange(max(2, size)) % size for size in (n, seeds)]  # scipy refuses a single one: the same one twice
    batch = max(1, AT_A_TIME // n)
    result = bootstrap(indices, sums, n_resamples=draws, batch=batch, vectorized=True, method="percentile", rng=seed)
    return result.bootstrap_distribution.T


def _times_drawn(picks, n):
    """(draws, n): how often each of n things was drawn, from their indices (draws, picks of a draw)."""
    picks = np.atleast_2d(picks)
    places = picks + n * np.arange(len(picks))[:, None]
    return np.bincount(places.ravel(), minlength=len(picks) * n).reshape(-1, n) * (n / picks.shape[1])


def interval(stats, value, draws, seed=0):
    """(estimate, low, high) of value(sums): 95 % percentile bootstrap over items, and over seeds if there are several.

    low and high are None where the bootstrap has no width: one item, or all equal. Draws without a value are left out.
    """
    return float(value(np.sum(stats, (0, 1)))), *percentile_interval(value(resample(stats, draws, seed)))


def compare(a, b, value, draws, seed=0):
    """(value(A) - value(B), low, high, two-sided p) of two systems on the same items; a, b: (seeds, n, k).

    Seeds are paired one to one; a single one meets every seed of the other. low and high are those of `interval`.
    p: in paired randomisation each item is swapped between the systems with probability 1/2, with all its seeds, as if
    it did not matter who answered (Noreen 1989; Riezler and Maxwell 2005). So p says something about these trained
    models only, not about the method that trained them. With several seeds p is at least that of the bootstrap, twice
    the smaller tail, so that luck with seeds is seldom taken for a difference; with three it still may be, as few seeds
    vary too little. A draw whose value is nan never counts as evidence of a difference.
    ValueError: other items, or seeds that cannot be paired.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 3 or a.shape[1:] != b.shape[1:] or (len(a) != len(b) and 1 not in (len(a), len(b))):
        raise ValueError(f"expected statistics (seeds, items, k) of the same items, got {a.shape} and {b.shape}")
    a, b = np.broadcast_arrays(a, b)
    sums_a, sums_b = np.split(resample(np.concatenate([a, b], -1), draws, seed), 2, axis=-1)
    sum_a, sum_b = a.sum((0, 1)), b.sum((0, 1))
    difference, drawn = float(value(sum_a) - value(sum_b)), value(sums_a) - value(sums_b)
    p = _randomisation_p((a - b).sum(0), sum_a, sum_b, value, draws, seed)
    if len(a) > 1:
        tail = min((~(drawn > 0)).mean(), (~(drawn < 0)).mean())  # a nan is never evidence
        p = max(p, float(min(1.0, 2 * tail)))
    return difference, *percentile_interval(drawn), p


def _randomisation_p(gaps, sum_a, sum_b, value, draws, seed):
    """Share of draws, the real one included, whose swaps leave a difference at least as large; gaps: A - B (n, k).

    Ours: scipy.stats.permutation_test(permutation_type="samples") gives the same p, but takes 0.5 s for 500 items and
    10,000 draws where this takes 0.03, for each pair and each metric: it draws the swaps item by item.
    """
    difference = abs(value(sum_a) - value(sum_b))
    rounding = 1e-9 * (abs(value(sum_a)) + abs(value(sum_b)))  # a draw that swaps nothing must count as equal
    rng, smaller, batch = np.random.default_rng(seed), 0, max(1, AT_A_TIME // len(gaps))
    for start in range(0, draws, batch):
        swapped = rng.integers(0, 2, (min(batch, draws - start), len(gaps)), dtype=np.int8)
        moved = swapped.astype(np.float64) @ gaps
        smaller += int((np.abs(value(sum_a - moved) - value(sum_b + moved)) < difference - rounding).sum())
    return (1 + draws - smaller) / (1 + draws)


def holm(ps):
    """p-values adjusted for their number by Holm 1979: those <= 0.05 may be called significant together."""
    ps = np.asarray(ps, dtype=np.float64)
    order = np.argsort(ps, kind="stable")
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(ps[order] * np.arange(len(ps), 0, -1)))
    return adjusted.tolist()


def win_rate(a, b, lengths_a, lengths_b):
    """How often a beats b: scores (n,) and lengths (n,) of the answers of two systems on the same items -> dict.

    wins, ties, losses; rate (ties half) with its Wilson interval low, high; controlled: the rate at equal length by
    length_controlled, None where the difference in length does not vary.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    longer = np.asarray(lengths_a, dtype=np.float64) - np.asarray(lengths_b, dtype=np.float64)
    same = a.shape == b.shape == longer.shape and a.ndim == 1 and len(a)
    if not same or not np.isfinite([a, b, longer]).all():
        shapes = a.shape, b.shape, longer.shape
        raise ValueError(f"expected finite scores and lengths of the same items, got shapes {shapes}")
    wins, ties = int((a > b).sum()), int((a == b).sum())
    low, high = wilson(wins + ties / 2, len(a))
    controlled = length_controlled((a > b) + 0.5 * (a == b), longer) if np.ptp(longer) else None
    outcome = {"wins": wins, "ties": ties, "losses": len(a) - wins - ties, "rate": (wins + ties / 2) / len(a)}
    return outcome | {"low": low, "high": high, "controlled": controlled}


def length_controlled(outcomes, longer):
    """P(win) at equal length: logistic regression of outcomes (n,) in [0, 1] on [1, longer / std], read at longer = 0.

    In the spirit of AlpacaEval 2.0 (Dubois et al. 2024, section 3), without its instruction terms and its tanh. The
    ridge of 0.01 (on sums over items) only keeps the weights finite where length, or either system, always wins.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    x = np.stack([np.ones(len(longer)), longer / longer.std()], 1)

    def loss_and_gradient(weights):
        logits = x @ weights
        loss = (np.logaddexp(0, logits) - outcomes * logits).sum() + 0.005 * weights @ weights
        return loss, x.T @ (expit(logits) - outcomes) + 0.01 * weights

    return float(expit(minimize(loss_and_gradient, np.zeros(2), jac=True, tol=1e-10).x[0]))
