"""What raters preferred: win rates, Bradley-Terry strengths, agreement and biases, with 95 % intervals over items.

One rating is the set of preferred systems of one rater on one item. A preferred system beats each one that is not; two
preferred ones tie, and so do all where none is preferred; two that are both passed over say nothing of each other.
Ties are half a win each. Systems whose answers to an item are the same text are preferred together.
"""

import itertools
import math

import numpy as np

from common.human import agreement
from common.log import UserError
from common.stats import binomial_p, percentile_interval, wilson

MAX_FAILED = 1  # the rule fixed before: a rater who fails more checks than this is excluded
PRIOR = 0.5  # wins added each way to every pair of systems: Jeffreys' prior where there are two (Firth 1993)
SCORES = ("harmless_1_5", "helpful_1_5", "faithful_1_5")


def analyse(key, ratings, draws=2000, seed=0):
    """What the ratings say, as a dict that JSON can hold (None: not defined, with a reason beside it).

    key: manifest.read_key's; ratings: manifest.read_ratings' with that key. A rater's later rating of an item replaces
    the earlier. Raters who preferred the shuffled answer in more than MAX_FAILED checks, alone or in a tie, are left
    out of everything but the table of raters. Checks never count; of a duplicated item only its first showing does.
    Strengths are fitted with PRIOR; where the raters' data alone would make one infinite they have no interval.
    UserError if no rating is left, or if one is of an item that the key lacks.
    """
    stray = next((rating["item_id"] for rating in ratings if rating["item_id"] not in key), None)
    if stray is not None:
        raise UserError(f"item_id {stray!r:.80} is not in the key: analyse ratings with the key of their own study")
    latest = {(rating["rater_id"], rating["item_id"]): rating for rating in ratings}
    raters = _raters(key, latest)
    excluded = [row["rater_id"] for row in raters if row["failed"] > MAX_FAILED]
    kept = [r for r in latest.values() if r["rater_id"] not in excluded]
    counted = [r for r in kept if key[r["item_id"]]["kind"] == "item"]
    if not counted:
        raise UserError(f"no rating is left to analyse: {len(ratings)} read, {len(excluded)} raters excluded")
    systems = sorted({name for entry in key.values() for name in entry["systems"].values()})
    items = {item: i for i, item in enumerate(sorted({r["item_id"] for r in counted}))}
    chosen = [(items[r["item_id"]], _preferred(key, r)) for r in counted]
    weights = np.random.default_rng(seed).multinomial(len(items), np.full(len(items), 1 / len(items)), size=draws)
    trusted = [row for row in raters if row["rater_id"] not in excluded]
    return {
        "systems": systems,
        "items": len(items),
        "ratings": len(counted),
        "replaced": len(ratings) - len(latest),
        "raters": raters,
        "excluded": excluded,
        "self_consistency": _share(sum(row["same"] for row in trusted), sum(row["twice"] for row in trusted)),
        **_strengths(chosen, systems, len(items), weights),
        "agreement": _agreement(chosen, {r["rater_id"] for r in counted}, weights),
        "position_bias": _position_bias(key, counted),
        "length_bias": _length_bias(key, counted),
        "scores": _scores(key, counted),
        "half_width": float(np.diff(wilson(len(items) / 2, len(items)))[0] / 2),
    }


def _preferred(key, rating):
    """The systems that the rating prefers: a preferred answer's equals are preferred with it."""
    entry = key[rating["item_id"]]
    texts = {entry["digests"][slot] for slot in rating["preferred"]}
    return frozenset(entry["systems"][slot] for slot in entry["slots"] if entry["digests"][slot] in texts)


def _raters(key, latest):
    """One row a rater: items, checks and how many failed, duplicates rated twice and how many alike."""
    rows = {}
    for (rater, item), rating in latest.items():
        row = rows.setdefault(rater, {"rater_id": rater, "items": 0, "checks": 0, "failed": 0, "twice": 0, "same": 0})
        entry = key[item]
        if entry["kind"] == "check":
            row["checks"] += 1
            row["failed"] += entry["trap"] in rating["preferred"]
        elif entry["kind"] == "item":
            row["items"] += 1
        elif (first := latest.get((rater, entry["original"]))) is not None:
            row["twice"] += 1
            row["same"] += _preferred(key, first) == _preferred(key, rating)
    return [rows[rater] for rater in sorted(rows)]


def _share(successes, n):
    """{"share", "low", "high", "n"}; the interval is Wilson's and takes the n for independent."""
    low, high = wilson(successes, n) if n else (None, None)
    return {"share": successes / n if n else None, "low": low, "high": high, "n": n}


def _strengths(chosen, systems, n, weights):
    """Win matrix, win rates of each pair and Bradley-Terry strengths, with intervals over items."""
    k = len(systems)
    item_wins = np.zeros((n, k, k))
    for item, preferred in chosen:
        inside = np.array([name in preferred for name in systems])
        tie = np.outer(inside, inside) if preferred else np.ones((k, k))
        item_wins[item] += np.outer(inside, ~inside) + 0.5 * tie * (1 - np.eye(k))
    wins, drawn = item_wins.sum(0), (weights @ item_wins.reshape(n, -1)).reshape(-1, k, k)
    rates = [_win_rate(systems, pair, item_wins, drawn) for pair in itertools.combinations(range(k), 2)]
    finite, strengths = agreement.connected(wins), agreement.bradley_terry(wins, PRIOR)
    resampled = agreement.bradley_terry(drawn, PRIOR).T if finite else [[]] * k
    bounds = [percentile_interval(column) for column in resampled]
    table = {s: {"strength": float(v), "low": b[0], "high": b[1]} for s, v, b in zip(systems, strengths, bounds)}
    return {"wins": wins.tolist(), "win_rates": rates, "bradley_terry": table, "strengths_finite": finite}


def _win_rate(systems, pair, item_wins, drawn):
    """Share of the comparisons of systems a and b that a won. Where resampled items all agree: Wilson's over items."""
    a, b = pair
    compared, many = item_wins[:, a, b] + item_wins[:, b, a], drawn[:, a, b] + drawn[:, b, a]
    row = {"first": systems[a], "second": systems[b], "n": float(compared.sum())}
    if not compared.any():
        return row | {"rate": None, "low": None, "high": None}
    rate, n = float(item_wins[:, a, b].sum() / compared.sum()), int((compared > 0).sum())
    low, high = percentile_interval(np.divide(drawn[:, a, b], many, out=np.full(len(many), np.nan), where=many > 0))
    low, high = wilson(rate * n, n) if low is None else (low, high)
    return row | {"rate": rate, "low": low, "high": high}


def _agreement(chosen, raters, weights):
    """Alpha and raw agreement over the preferred systems, or why there is none."""
    labels = sorted({tuple(sorted(preferred)) for _, preferred in chosen})
    counts = np.zeros((weights.shape[1], len(labels)))
    for item, preferred in chosen:
        counts[item, labels.index(tuple(sorted(preferred)))] += 1
    shared, reason = int((counts.sum(1) >= 2).sum()), None
    alpha = agreement.krippendorff_alpha(counts)
    if len(raters) < 2:
        reason = "agreement needs two raters"
    elif not shared:
        reason = "no item was rated by two raters"
    elif math.isnan(alpha):
        reason = "all ratings are the same: agreement beyond chance is not defined"
    low, high = (None, None) if reason else percentile_interval(agreement.krippendorff_alpha(counts, weights))
    raw = agreement.raw_agreement(counts) if shared else None
    alpha = None if reason else alpha
    return {"alpha": alpha, "low": low, "high": high, "raw": raw, "items": shared, "reason": reason}


def _position_bias(key, ratings):
    """How often the one preferred slot was the first shown, against 1 / slots."""
    single = [rating for rating in ratings if len(rating["preferred"]) == 1]
    first = sum(r["preferred"][0] == (r["order"] or key[r["item_id"]]["slots"])[0] for r in single)
    expected = 1 / len(next(iter(key.values()))["slots"])
    return _share(first, len(single)) | {"expected": expected, "p": binomial_p(first, len(single), expected)}


def _length_bias(key, ratings):
    """Share of preferences for the longer answer: a rating counts once, as the share of its passed-over answers (of
    another length) that are shorter than a preferred one; 0.5 is no bias."""
    shares = []
    for rating in ratings:
        entry, preferred = key[rating["item_id"]], _preferred(key, rating)
        size = [(entry["characters"][slot], entry["systems"][slot] in preferred) for slot in entry["slots"]]
        pairs = [a > b for a, won in size for b, other in size if won and not other and a != b]
        shares += [sum(pairs) / len(pairs)] if pairs else []
    return _share(sum(shares), len(shares))


def _scores(key, ratings):
    """{system: {column: {"mean", "n"}}} over the ratings that preferred that one answer, which the scores speak of."""
    scores = {}
    for rating in ratings:
        if len(rating["preferred"]) == 1:
            name = key[rating["item_id"]]["systems"][rating["preferred"][0]]
            for column in SCORES:
                if rating[column] is not None:
                    scores.setdefault(name, {}).setdefault(column, []).append(rating[column])
    return {
        s: {c: {"mean": sum(v) / len(v), "n": len(v)} for c, v in columns.items()}
        for s, columns in sorted(scores.items())
    }
