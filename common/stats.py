"""Statistics that a trainer or a human study needs; those that compare systems are in common/evaluation/statistics.py.

scipy.stats takes most of a second to import, so it is imported where it is used: a trainer starts without it.
"""

import math

import numpy as np


def wilson(successes, n):
    """95 % interval (low, high) of a rate: Wilson 1927, section 3.

    Ours, as a tie is half a success here: scipy's binomtest(...).proportion_ci(method="wilson") takes whole numbers.
    """
    rate, z = successes / n, 1.959964
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return float(centre - half), float(centre + half)


def preference_accuracy(margins):
    """(accuracy, low, high) of pairs from margins (n,): a tie counts half."""
    margins = np.asarray(margins, dtype=np.float64)
    wins = (margins > 0).sum() + 0.5 * (margins == 0).sum()
    return float(wins / len(margins)), *wilson(wins, len(margins))


def binomial_p(successes, n, rate=0.5):
    """Exact two-sided p of `successes` in n trials, 1 without a trial."""
    from scipy.stats import binomtest

    return float(binomtest(successes, n, rate).pvalue) if n else 1.0


def mcnemar(first, second):
    """(items only the first has right, only the second, exact two-sided p) of two bool arrays over the same items.

    Under the null each item on which they differ is a fair coin. McNemar 1947, by the binomial rather than chi-square.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    return b, c, binomial_p(b, b + c)


def pass_at_k(n, c, k):
    """Probability that one of k answers drawn from n, of which c are right, is right. Chen et al. 2021, equation 1."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def calibration(probabilities):
    """Reliability of P(chosen wins) for pairs shown both ways round -> (ECE, rows of (mean p, share right, count)).

    Each pair counts once as itself and once mirrored (1 - p, wrong), so a reward model that is sure and right 80 % of
    the time shows as over-confident. ECE: mean |p - share| weighted by counts (Naeini et al. 2015, eq. 3).
    """
    p, bins = np.asarray(probabilities, dtype=np.float64), 10
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


def percentile_interval(draws):
    """95 % interval (low, high) of bootstrapped values, those that are nan left out.

    (None, None) where none is left, or where all are equal: a bootstrap without width knows nothing.
    """
    draws = np.asarray(draws)[np.isfinite(draws)]
    if not len(draws) or np.allclose(draws, draws[0], rtol=1e-9, atol=1e-12):
        return None, None
    return tuple(np.quantile(draws, (0.025, 0.975)).tolist())


def paired_bootstrap(a, b, draws=10000, seed=0):
    """(mean of a - b, low, high, two-sided p) of scores (n,) on the same items: percentile_interval over items.

    p is that of a mean of zero: twice the smaller tail of the bootstrapped means, at least 1 / draws. Efron and
    Tibshirani 1993, ch. 13; Koehn 2004. ValueError if the two differ in length or are empty.
    """
    from scipy.stats import bootstrap

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"paired scores need the same items, got {a.shape} and {b.shape}")
    n, difference = len(a), a - b
    sample = np.resize(difference, max(2, n))  # scipy refuses a single item: the same one twice
    batch = max(1, 2**22 // n)  # draws at a time: memory stays small
    result = bootstrap((sample,), np.mean, n_resamples=draws, batch=batch, method="percentile", rng=seed)
    means = result.bootstrap_distribution
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return float(difference.mean()), *percentile_interval(means), float(min(1.0, max(2 * tail, 1 / draws)))
