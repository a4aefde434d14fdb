"""What raters preferred: win rates, Bradley-Terry strengths, agreement and biases, with 95 % intervals over items.

One rating is the set of preferred systems of one rater on one item. A preferred system beats each one that is not; two
preferred ones tie, and so do all where none is preferred; two that are both passed over say nothing of each other.
Ties are half a win each. Systems whose answers to an item are the same text are preferred together.
"""

import itertools
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
from markupsafe import Markup

from common import log
from common.human import study
from common.human.ratings import SCORES
from common.log import UserError
from common.stats import binomial_p, percentile_interval, wilson

MAX_FAILED = 1  # the rule fixed before: a rater who fails more checks than this is excluded
PRIOR = 0.5  # wins added each way to every pair of systems: Jeffreys' prior where there are two (Firth 1993)


def analyse(key, ratings, draws=2000):
    """What the ratings say, as a dict that JSON can hold (None: not defined, with a reason beside it).

    key: study.read_key's; ratings: read_ratings' with that key. Raters who preferred the shuffled answer in more than
    MAX_FAILED checks, alone or in a tie, are left out of everything but the table of raters, "replaced" and "skipped".
    Strengths are fitted with PRIOR; where the raters' data alone would make one infinite they have no interval.
    UserError if no rating is left, or if one is of an item that the key lacks.
    """
    counted, raters = _counted(key, ratings)
    trusted = [row for row in raters if row["failed"] <= MAX_FAILED]
    if not counted:
        left_out = f"{len(raters) - len(trusted)} of {len(raters)} raters failed more than {MAX_FAILED} check"
        raise UserError(f"no rating is left to analyse: {len(ratings)} were read, and {left_out}")
    systems = sorted({name for entry in key.values() for name in entry["systems"].values()})
    items = {item: i for i, item in enumerate(sorted({rating["item_id"] for rating in counted}))}
    chosen = [(items[rating["item_id"]], _preferred(key, rating)) for rating in counted]
    weights = np.random.default_rng(0).multinomial(len(items), np.full(len(items), 1 / len(items)), size=draws)
    answered = [(rating["rater_id"], rating["item_id"]) for rating in ratings if rating["preferred"] is not None]
    return {
        "systems": systems,
        "items": len(items),
        "ratings": len(counted),
        "replaced": len(answered) - len(set(answered)),
        "skipped": sum(row["skipped"] for row in raters),
        "raters": raters,
        "excluded": [row["rater_id"] for row in raters if row not in trusted],
        "self_consistency": _share(sum(row["same"] for row in trusted), sum(row["twice"] for row in trusted)),
        **_strengths(chosen, systems, len(items), weights),
        "agreement": _agreement(chosen, {rating["rater_id"] for rating in counted}, weights),
        "position_bias": _position_bias(key, counted),
        "length_bias": _length_bias(key, counted),
        "scores": _scores(key, counted),
        "half_width": float(np.diff(wilson(len(items) / 2, len(items)))[0] / 2),
    }


def _counted(key, ratings):
    """(the ratings that count, a row of numbers for each rater): each rater's last rating of an item, no checks or
    duplicates, by raters who failed at most MAX_FAILED checks. UserError for an item that the key lacks."""
    stray = next((rating["item_id"] for rating in ratings if rating["item_id"] not in key), None)
    if stray is not None:
        raise UserError(f"item_id {stray!r:.80} is not in the key: analyse ratings with the key of their own study")
    last = {(r["rater_id"], r["item_id"]): r for r in ratings if r["preferred"] is not None}
    counts = ("items", "skipped", "checks", "failed", "twice", "same")
    names = sorted({rating["rater_id"] for rating in ratings})
    rows = {name: {"rater_id": name, **dict.fromkeys(counts, 0)} for name in names}
    for rater, item in {(rating["rater_id"], rating["item_id"]) for rating in ratings}:
        row, entry, rating = rows[rater], key[item], last.get((rater, item))
        first = last.get((rater, entry["original"]))
        if rating is None:
            row["skipped"] += 1
        elif entry["kind"] == "item":
            row["items"] += 1
        elif entry["kind"] == "check":
            row["checks"] += 1
            row["failed"] += entry["trap"] in rating["preferred"]
        elif first is not None:
            row["twice"] += 1
            row["same"] += _preferred(key, first) == _preferred(key, rating)
    of_items = [rating for (_, item), rating in last.items() if key[item]["kind"] == "item"]
    return [rating for rating in of_items if rows[rating["rater_id"]]["failed"] <= MAX_FAILED], list(rows.values())


def _preferred(key, rating):
    """The systems that the rating prefers: a preferred answer's equals are preferred with it."""
    entry = key[rating["item_id"]]
    texts = {entry["digests"][slot] for slot in rating["preferred"]}
    return frozenset(entry["systems"][slot] for slot in entry["slots"] if entry["digests"][slot] in texts)


def _share(successes, n):
    """{"share", "low", "high", "n"}; the interval is Wilson's and takes the n for independent."""
    low, high = wilson(successes, n) if n else (None, None)
    return {"share": successes / n if n else None, "low": low, "high": high, "n": n}


# ---------------------------------------------------------------- wins and strengths


def _strengths(chosen, systems, n, weights):
    """Win matrix, win rates of each pair and Bradley-Terry strengths, with intervals over items."""
    from scipy.sparse.csgraph import connected_components

    k = len(systems)
    item_wins = np.zeros((n, k, k))
    for item, preferred in chosen:
        inside = np.array([name in preferred for name in systems])
        tie = np.outer(inside, inside) if preferred else np.ones((k, k))
        item_wins[item] += np.outer(inside, ~inside) + 0.5 * tie * (1 - np.eye(k))
    wins, drawn = item_wins.sum(0), (weights @ item_wins.reshape(n, -1)).reshape(-1, k, k)
    # finite strengths exist where every system beat (or tied) every other one, directly or through others
    finite = connected_components(wins > 0, connection="strong", return_labels=False) == 1
    strengths = bradley_terry(wins, PRIOR)
    resampled = bradley_terry(drawn, PRIOR).T if finite else [[]] * k
    table = {}
    for name, strength, column in zip(systems, strengths, resampled, strict=True):
        low, high = percentile_interval(column)
        table[name] = {"strength": float(strength), "low": low, "high": high}
    rates = [_win_rate(systems, pair, item_wins, drawn) for pair in itertools.combinations(range(k), 2)]
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


def bradley_terry(wins, prior=0.0, tolerance=1e-9, most=10_000):
    """Log strengths (..., K), centred at 0, from `wins` (..., K, K): how often row beat column, ties half each.

    P(i beats j) = 1 / (1 + exp(s_j - s_i)), by Newman's iteration (2023, JMLR 24, 238). The maximum likelihood
    (prior 0) exists only if no group of systems won, or lost, everything against the rest; with a prior > 0 there
    always is one. ValueError if it does not settle.

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


# ---------------------------------------------------------------- agreement


def _agreement(chosen, raters, weights):
    """Alpha and raw agreement over the preferred systems, or why there is none."""
    labels = list(dict.fromkeys(preferred for _, preferred in chosen))
    counts = np.zeros((weights.shape[1], len(labels)))
    for item, preferred in chosen:
        counts[item, labels.index(preferred)] += 1
    sizes, alpha, reason = counts.sum(1), krippendorff_alpha(counts), None
    shared, pairs = int((sizes >= 2).sum()), (sizes * (sizes - 1)).sum()
    raw = float((counts * (counts - 1)).sum() / pairs) if shared else None  # of pairs of ratings of the same item
    if len(raters) < 2:
        reason = "agreement needs two raters"
    elif not shared:
        reason = "no item was rated by two raters"
    elif math.isnan(alpha):
        reason = "all ratings are the same: agreement beyond chance is not defined"
    low, high = (None, None) if reason else percentile_interval(krippendorff_alpha(counts, weights))
    return {"alpha": None if reason else alpha, "low": low, "high": high, "raw": raw, "items": shared, "reason": reason}


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


# ---------------------------------------------------------------- biases and scores


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
        sizes = {True: [], False: []}  # {is it preferred: characters}
        for slot in entry["slots"]:
            sizes[entry["systems"][slot] in preferred].append(entry["characters"][slot])
        longer = [won > lost for won, lost in itertools.product(sizes[True], sizes[False]) if won != lost]
        shares += [sum(longer) / len(longer)] if longer else []
    return _share(sum(shares), len(shares))


def _scores(key, ratings):
    """{system: {column: {"mean", "n"}}} over the ratings that preferred that one answer, which the scores speak of."""
    given = {}
    for rating, column in itertools.product(ratings, SCORES):
        if len(rating["preferred"]) == 1 and rating[column] is not None:
            name = key[rating["item_id"]]["systems"][rating["preferred"][0]]
            given.setdefault((name, column), []).append(rating[column])
    scores = {name: {} for name, _ in sorted(given)}
    for (name, column), values in given.items():
        scores[name][column] = {"mean": sum(values) / len(values), "n": len(values)}
    return scores


# ---------------------------------------------------------------- training pairs


def training_pairs(key, items, ratings):
    """Ratings as records of preferences (data.py) -> ([record], {why two answers make no pair: how many}).

    key, ratings: as for analyse, and the same ratings count; items: read_manifest's. Every two answers to an item that
    raters compared make a pair if more of them preferred the one. margin: the share of the raters who preferred it,
    minus the share who preferred the other, so 1 where all agree (as in Touvron et al. 2023, section 3.2.2); a tie is
    neither. UserError if a text is not the one that was rated.
    """
    counted, _ = _counted(key, ratings)
    votes = {}  # {(item, slot, slot): [1 | 0 | -1 of each rater: the first is better, they tie, the second]}
    for rating in counted:
        item, preferred = rating["item_id"], _preferred(key, rating)
        is_preferred = {slot: name in preferred for slot, name in key[item]["systems"].items()}
        for a, b in itertools.combinations(is_preferred, 2):
            if is_preferred[a] or is_preferred[b] or not preferred:
                votes.setdefault((item, a, b), []).append(is_preferred[a] - is_preferred[b])
    records, left_out = [], Counter()
    for (item, a, b), outcomes in votes.items():
        better, worse = (a, b) if sum(outcomes) > 0 else (b, a)
        answers, entry = items.get(item, {"answers": {}})["answers"], key[item]
        if any(study.digest(answers.get(slot, "")) != entry["digests"][slot] for slot in (a, b)):
            raise UserError(f"item {item}: the answers in the blind file are not those of the key: it was changed")
        if not sum(outcomes):
            left_out["as many raters preferred the other answer"] += 1
        else:
            record = {"id": f"{item}-{better}{worse}", "prompt": items[item]["prompt"]}
            record |= {"response": answers[better], "rejected": answers[worse]}
            record |= {"reference": items[item]["reference"] or None}
            record |= {"margin": abs(sum(outcomes)) / len(outcomes), "raters": len(outcomes)}
            records.append(record)
    return records, left_out


# ---------------------------------------------------------------- the report


def report(results):
    """analyse's dict -> Markdown text, for a reader who has not seen the code; its words are in human.md."""
    pages = log.templates(Path(__file__).parent, plain, figure=figure)
    left_out = [row for row in results["raters"] if row["rater_id"] in results["excluded"]]
    ranked = sorted(results["bradley_terry"].items(), key=lambda pair: -pair[1]["strength"])
    fixed = {"MAX_FAILED": MAX_FAILED, "PRIOR": PRIOR, "SCORES": SCORES}
    return pages.get_template("human.md").render(study=results, left_out=left_out, ranked=ranked, **fixed)


def plain(text):
    """A name that a user chose, as one line of plain text."""
    if isinstance(text, Markup):
        return text
    return Markup(re.sub(r"([\\|<>*`\[\]])", r"\\\1", " ".join(str(text).split())))


def figure(row, name, scale=1, shown=".3f", unit=""):
    """A figure with its interval."""
    if row[name] is None:
        return "-"
    bounds = "no interval" if row["low"] is None else f"{scale * row['low']:{shown}}, {scale * row['high']:{shown}}"
    return f"{scale * row[name]:{shown}}{unit} ({bounds})"
