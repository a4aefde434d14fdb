"""Intervals and calibration in numpy; each function is a few lines of a textbook and tested against another library."""

import math

import numpy as np


def wilson(successes, n, z=1.959964):
    """95 % interval (low, high) of a rate: Wilson 1927, eq. in section 3. `successes` may hold half ties."""
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return float(centre - half), float(centre + half)


def preference_accuracy(margins):
    """(accuracy, low, high) of pairs from margins (n,): a tie counts half."""
    margins = np.asarray(margins, dtype=np.float64)
    wins = (margins > 0).sum() + 0.5 * (margins == 0).sum()
    return float(wins / len(margins)), *wilson(wins, len(margins))


def mcnemar(first, second):
    """(items only the first has right, only the second, exact two-sided p) of two bool arrays over the same items.

    Under the null each item on which they differ is a fair coin. McNemar 1947, by the binomial rather than chi-square.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    return b, c, min(1.0, 2 * tail)


def calibration(probabilities, bins=10):
    """Reliability of P(chosen wins) for pairs shown both ways round -> (ECE, rows of (mean p, share right, count)).

    Each pair counts once as itself and once mirrored (1 - p, wrong), so a reward model that is sure and right 80 % of
    the time shows as over-confident. ECE: mean |p - share| weighted by counts (Naeini et al. 2015, eq. 3).
    """
    p = np.asarray(probabilities, dtype=np.float64)
    p, right = np.concatenate([p, 1 - p]), np.concatenate([np.ones(len(p)), np.zeros(len(p))])
    index = np.minimum((p * bins).astype(int), bins - 1)
    rows = [(p[index == b].mean(), right[index == b].mean(), int((index == b).sum())) for b in np.unique(index)]
    return float(sum(n * abs(a - b) for a, b, n in rows) / len(p)), [(float(a), float(b), n) for a, b, n in rows]


def length_matched(margins, differences, tolerance):
    """Margins of the pairs whose lengths differ by at most `tolerance`: there, length cannot tell which is chosen."""
    margins, differences = np.asarray(margins), np.asarray(differences)
    return margins[np.abs(differences) <= tolerance]


def correlation(x, y):
    """Pearson's r, or 0 where one side does not vary."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def paired_bootstrap(a, b, draws=10000, seed=0):
    """(mean of a - b, low, high, two-sided p) of scores (n,) on the same items: 95 % percentile interval over items.

    p is that of a mean of zero: twice the smaller tail of the bootstrapped means, at least 1 / draws. Efron and
    Tibshirani 1993, ch. 13; Koehn 2004. ValueError if the two differ in length or are empty.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"paired scores need the same items, got {a.shape} and {b.shape}")
    difference, rng = a - b, np.random.default_rng(seed)
    many = max(1, 2**22 // len(a))  # draws at a time: memory stays small
    means = np.concatenate([difference[rng.integers(0, len(a), (min(many, draws - start), len(a)))].mean(1)
                            for start in range(0, draws, many)])  # fmt: skip
    low, high = np.quantile(means, (0.025, 0.975))
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return float(difference.mean()), float(low), float(high), float(min(1.0, max(2 * tail, 1 / draws)))


def resample(stats, draws, seed=0):
    """Bootstrap of summed statistics: (seeds, n, k) of n items under one or more training seeds -> (draws, k).

    A draw takes n items with replacement, the same for all seeds, and, of several, seeds with replacement: the
    hierarchical bootstrap of Davison and Hinkley 1997, section 3.8. The sums are over all, so what is read from them
    must not depend on their scale, as no ratio and no BLEU does. ValueError: not three axes, or an empty one.
    """
    stats = np.asarray(stats, dtype=np.float64)
    if stats.ndim != 3 or 0 in stats.shape:
        raise ValueError(f"expected statistics (seeds, items, k), got {stats.shape}")
    (seeds, n, k), rng, rows = stats.shape, np.random.default_rng(seed), stats.transpose(1, 0, 2)
    sums = []
    for many in _chunks(draws, n):
        by_seed = (_counts(rng, many, n) @ rows.reshape(n, seeds * k)).reshape(many, seeds, k)
        weights = _counts(rng, many, seeds) if seeds > 1 else np.ones((many, 1))
        sums.append(np.einsum("ds,dsk->dk", weights, by_seed))
    return np.concatenate(sums)


def _chunks(draws, n):
    """How many draws to make at a time: their (many, n) weights stay under 16 MB."""
    many = max(1, 2**21 // n)
    return [min(many, draws - start) for start in range(0, draws, many)]


def _counts(rng, many, n):
    """(many, n): how often each of n things occurs in n draws with replacement."""
    picks = rng.integers(0, n, (many, n)) + n * np.arange(many)[:, None]
    return np.bincount(picks.ravel(), minlength=many * n).reshape(many, n).astype(np.float64)


def interval(stats, value, draws, seed=0):
    """(estimate, low, high) of value(sums): 95 % percentile bootstrap over items, and over seeds if there are several.

    stats (seeds, n, k); value maps (..., k) to (...,). Draws without a value (0/0) are left out, nan if none has one.
    """
    drawn = value(resample(stats, draws, seed))
    return float(value(np.asarray(stats, dtype=np.float64).sum((0, 1)))), *_percentiles(drawn)


def _percentiles(values):
    values = values[np.isfinite(values)]
    return tuple(np.quantile(values, (0.025, 0.975)).tolist()) if len(values) else (math.nan, math.nan)


def compare(a, b, value, draws, seed=0):
    """(value(A) - value(B), low, high, two-sided p) of two systems on the same items; a, b: (seeds, n, k).

    Seed s of one is paired with seed s of the other; a system with one seed meets every seed of the other. The 95 %
    interval is the percentile bootstrap of the difference, both with the same draws: it speaks of new items and seeds.
    p is that of paired approximate randomisation, which swaps an item between the systems with probability 1/2, all its
    seeds together (Noreen 1989; Riezler and Maxwell 2005), and counts itself among the draws, so p >= 1 / (1 + draws):
    it speaks of these trained models. With several seeds p is at least that of the bootstrap, twice the smaller tail,
    so that luck with seeds is seldom taken for a difference; with three it still may be, as few seeds vary too little.
    A difference that is nan, or a draw where it is, is never evidence.
    ValueError: other items, or seeds that cannot be paired.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 3 or a.shape[1:] != b.shape[1:] or (len(a) != len(b) and 1 not in (len(a), len(b))):
        raise ValueError(f"expected statistics (seeds, items, k) of the same items, got {a.shape} and {b.shape}")
    a, b = np.broadcast_arrays(a, b)
    both = resample(np.concatenate([a, b], -1), draws, seed)
    drawn = value(both[:, : a.shape[2]]) - value(both[:, a.shape[2] :])
    low, high = _percentiles(drawn)
    gap, sum_a, sum_b = (a - b).sum(0), a.sum((0, 1)), b.sum((0, 1))
    difference = float(value(sum_a) - value(sum_b))
    rounding = 1e-9 * (abs(value(sum_a)) + abs(value(sum_b)))  # a draw that swaps nothing must count as equal
    rng, within = np.random.default_rng(seed), 0
    for many in _chunks(draws, len(gap)):
        moved = rng.integers(0, 2, (many, len(gap)), dtype=np.int8).astype(np.float64) @ gap
        within += int((np.abs(value(sum_a - moved) - value(sum_b + moved)) < abs(difference) - rounding).sum())
    p = (1 + draws - within) / (1 + draws)
    if len(a) > 1:
        tail = min((~(drawn > 0)).mean(), (~(drawn < 0)).mean())  # a nan is never evidence
        p = max(p, float(min(1.0, 2 * tail)))
    return difference, low, high, p


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
    if not a.shape == b.shape == longer.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"expected scores and lengths of the same items, got {a.shape}, {b.shape}, {longer.shape}")
    if not np.isfinite([a, b, longer]).all():
        raise ValueError("expected finite scores and lengths")
    wins, ties = int((a > b).sum()), int((a == b).sum())
    low, high = wilson(wins + ties / 2, len(a))
    outcome = {"wins": wins, "ties": ties, "losses": len(a) - wins - ties, "rate": (wins + ties / 2) / len(a)}
    controlled = length_controlled((a > b) + 0.5 * (a == b), longer) if np.ptp(longer) else None
    return outcome | {"low": low, "high": high, "controlled": controlled}


def length_controlled(outcomes, longer):
    """P(win) at equal length: logistic regression of outcomes (n,) in [0, 1] on [1, longer / std], read at longer = 0.

    In the spirit of AlpacaEval 2.0 (Dubois et al. 2024, section 3), without its instruction terms and its tanh. The
    ridge of 0.01 (on sums over items) only keeps the weights finite where length, or either system, always wins.
    """
    x, weights = np.stack([np.ones(len(longer)), longer / longer.std()], 1), np.zeros(2)
    for _ in range(100):
        p = 0.5 + 0.5 * np.tanh(x @ weights / 2)  # the logistic function, without its overflow
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 0.01 * np.eye(2)
        step = np.linalg.solve(hessian, x.T @ (outcomes - p) - 0.01 * weights)
        weights += step / max(1.0, np.abs(step).max())  # at most 1: far from the optimum Newton's step may overshoot
    return float(1 / (1 + np.exp(-weights[0])))
