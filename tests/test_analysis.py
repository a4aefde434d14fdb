"""What raters said: by hand, by simulated raters of known strengths, against published numbers and other packages."""

import itertools
import json
import math
import re
from collections import Counter

import evalica
import krippendorff
import numpy as np
import pandas
import pytest
from scipy import optimize

from common.human import analysis as human
from common.human import study
from common.human.ratings import read_ratings
from common.log import UserError
from tests.studies import NAMES, made_key, rate_all, rated, two_studies


def test_wins_and_ties_by_hand():
    key = made_key(3)
    ratings = [rated(key, "i0", "sft"), rated(key, "i1", "sft", "rl"), rated(key, "i2")]  # the last: none preferred
    found = human.analyse(key, ratings, draws=50)
    assert found["systems"] == ["rl", "sft", "staged"]
    # i0: sft beats both; i1: sft and rl tie, both beat staged; i2: all tie
    assert found["wins"] == [[0, 1, 1.5], [2, 0, 2.5], [0.5, 0.5, 0]]
    assert (found["items"], found["ratings"], found["replaced"], found["excluded"]) == (3, 3, 0, [])
    assert found["agreement"]["alpha"] is None and "two raters" in found["agreement"]["reason"]
    assert "needs two raters" in human.report(found)


def test_equal_answers_are_preferred_together():
    key = made_key(1)
    key["i0"]["digests"] = {
        slot: "same" if name != "staged" else "other" for slot, name in key["i0"]["systems"].items()
    }
    assert human.analyse(key, [rated(key, "i0", "rl")], draws=10)["wins"] == [[0, 0.5, 1], [0.5, 0, 1], [0, 0, 0]]


def test_the_latest_rating_counts_and_duplicates_do_not():
    key = made_key(4)
    key["i2"] |= {"kind": "duplicate", "original": "i0"}
    key["i3"] |= {"kind": "duplicate", "original": "i1"}
    ratings = [rated(key, "i0", "rl"), rated(key, "i0", "sft"), rated(key, "i1", "sft")]
    ratings += [
        rated(key, "i2", "sft"),
        rated(key, "i3", "rl"),
    ]  # the first alike though in other slots, the second not
    found = human.analyse(key, ratings, draws=10)
    assert found["replaced"] == 1 and found["ratings"] == 2 and found["wins"][1][0] == 2
    assert (found["self_consistency"]["share"], found["self_consistency"]["n"]) == (0.5, 2)


def test_raters_who_fail_two_checks_are_excluded_by_name():
    key = made_key(5, checks=3)
    ratings = [rated(key, f"i{i}", "sft", rater="good") for i in range(5)]
    ratings += [rated(key, f"i{i}", "rl", rater="b|d") for i in range(5)]
    wrong = [rated(key, f"i{i}", key[f"i{i}"]["systems"]["A"]) for i in (5, 6, 7)]
    ratings += [{**wrong[0], "rater_id": "good"}, {**wrong[0], "rater_id": "b|d"}, {**wrong[1], "rater_id": "b|d"}]
    found = human.analyse(key, ratings, draws=20)
    assert found["excluded"] == ["b|d"] and found["ratings"] == 5 and found["wins"][0] == [0, 0, 0]
    assert [(row["failed"], row["checks"]) for row in found["raters"]] == [(2, 2), (1, 1)]
    assert r"b\|d (2 of 2 checks failed)" in human.report(found)
    with pytest.raises(UserError, match="no rating is left"):
        human.analyse(key, [rating for rating in ratings if rating["rater_id"] == "b|d"])
    with pytest.raises(UserError, match="no rating is left"):
        human.analyse(key, [])


def test_no_win_has_no_interval_and_all_ties_no_difference():
    key = made_key(10)
    found = human.analyse(key, [rated(key, f"i{i}", ("sft", "rl")[i % 2]) for i in range(10)], draws=50)
    assert not found["strengths_finite"] and found["bradley_terry"]["staged"]["low"] is None
    assert found["bradley_terry"]["staged"]["strength"] < found["bradley_terry"]["sft"]["strength"]
    rate = next(row for row in found["win_rates"] if (row["first"], row["second"]) == ("sft", "staged"))
    assert rate["rate"] == 1 and rate["low"] < 0.7 and rate["high"] == pytest.approx(1)  # Wilson of 5 of 5
    assert "no bound" in human.report(found)
    tied = human.analyse(key, [rated(key, f"i{i}", *NAMES, rater=r) for i in range(10) for r in "ab"], draws=50)
    assert {row["strength"] for row in tied["bradley_terry"].values()} == {0.0} and tied["strengths_finite"]
    assert tied["agreement"]["alpha"] is None and "all ratings are the same" in tied["agreement"]["reason"]
    assert tied["position_bias"]["n"] == 0 and tied["length_bias"]["n"] == 0
    for result in (found, tied):
        assert "nan" not in json.dumps(result, allow_nan=False) + human.report(result)


def test_agreement_of_raters_by_system_not_by_slot():
    key = made_key(40)
    alike = [rated(key, f"i{i}", NAMES[i % 3], rater=r) for i in range(40) for r in "abc"]
    found = human.analyse(key, alike, draws=100)["agreement"]
    assert found["alpha"] == found["raw"] == 1.0 and found["items"] == 40
    rng = np.random.default_rng(0)
    chance = [rated(key, f"i{i}", rng.choice(NAMES), rater=r) for i in range(40) for r in "abc"]
    found = human.analyse(key, chance, draws=200)["agreement"]
    assert found["low"] < found["alpha"] < found["high"] and abs(found["alpha"]) < 0.25


def test_raters_who_share_no_item_have_no_agreement():
    key = made_key(2)
    found = human.analyse(key, [rated(key, "i0", "rl", rater="a"), rated(key, "i1", "rl", rater="b")], draws=10)
    nothing = dict.fromkeys(("alpha", "low", "high", "raw"))
    assert found["agreement"] == nothing | {"items": 0, "reason": "no item was rated by two raters"}
    assert "Agreement: no item was rated by two raters.\n" in human.report(found)


def test_position_bias_is_found_in_the_slots_as_shown():
    key, rng = made_key(100), np.random.default_rng(0)
    first = [{**rated(key, f"i{i}"), "preferred": ("A" if rng.random() < 0.6 else "C",)} for i in range(100)]
    found = human.analyse(key, first, draws=20)["position_bias"]
    assert found["p"] < 1e-3 and found["low"] > found["expected"] == pytest.approx(1 / 3)
    fair = [{**rated(key, f"i{i}"), "preferred": ("ABC"[i % 3],)} for i in range(100)]
    assert human.analyse(key, fair, draws=20)["position_bias"]["p"] > 0.5
    shown = [{**row, "order": (row["preferred"][0], *(s for s in "ABC" if s != row["preferred"][0]))} for row in fair]
    found = human.analyse(key, shown, draws=20)["position_bias"]  # this rater's page showed its choice first each time
    assert found["share"] == 1.0 and found["p"] == pytest.approx(3.0**-100)


def test_length_bias_is_found():
    key = made_key(60)
    for entry in key.values():
        entry["characters"] = {slot: 10 * (i + 1) for i, slot in enumerate(entry["slots"])}  # C is the longest
    longest = [{**rated(key, f"i{i}"), "preferred": ("C",)} for i in range(60)]
    assert human.analyse(key, longest, draws=10)["length_bias"]["low"] > 0.9
    middle = human.analyse(key, [{**row, "preferred": ("B",)} for row in longest], draws=10)["length_bias"]
    assert middle["share"] == 0.5 and middle["n"] == 60
    key["i0"]["characters"]["B"] = 30  # as long as C: only A tells, and C is longer than A
    key["i1"]["characters"] = dict.fromkeys("ABC", 10)  # nothing to tell
    assert human.analyse(key, longest[:2], draws=10)["length_bias"]["n"] == 1
    assert human.analyse(key, longest[:2], draws=10)["length_bias"]["share"] == 1.0


def test_scores_and_power_are_reported():
    key = made_key(100)
    found = human.analyse(key, [rated(key, f"i{i}", "rl", helpful_1_5=4 + i % 2) for i in range(100)], draws=10)
    assert found["scores"] == {"rl": {"helpful_1_5": {"mean": 4.5, "n": 100}}}
    assert found["half_width"] == pytest.approx(1.96 * math.sqrt(0.25 / (100 + 1.96**2)), abs=1e-4)
    text = human.report(found)
    assert "known to ±9.6 points" in text and "4.50 (n = 100)" in text


def test_simulated_raters_are_recovered_with_honest_intervals():
    truth, rng, runs = np.array([0.5, 0.0, -0.5]), np.random.default_rng(0), 200
    systems, key = ("a", "b", "c"), made_key(60, ("a", "b", "c"))
    covered, ordered = 0, 0
    for _ in range(runs):
        picks = rng.choice(3, (60, 3), p=np.exp(truth) / np.exp(truth).sum())
        ratings = [rated(key, f"i{i}", systems[picks[i, r]], rater=str(r)) for i in range(60) for r in range(3)]
        found = human.analyse(key, ratings, draws=300)["bradley_terry"]
        ordered += found["a"]["strength"] > found["b"]["strength"] > found["c"]["strength"]
        covered += sum(found[name]["low"] <= value <= found[name]["high"] for name, value in zip(systems, truth))
    assert ordered >= 0.95 * runs
    assert 0.90 <= covered / (3 * runs) <= 0.99


def test_ratings_read_with_one_key_are_not_analysed_with_another(tmp_path):
    first, second = two_studies(tmp_path)
    keys = [study.read_key(folder / "human_eval.key.csv") for folder in (first, second)]
    found = read_ratings(rate_all(first, tmp_path / "mine.csv"), keys[0])
    assert human.analyse(keys[0], found, draws=10)["ratings"] == 40
    with pytest.raises(UserError, match="is not in the key: analyse ratings with the key of their own study"):
        human.analyse(keys[1], found, draws=10)


def sheet(key):
    """The blind file of made_key's study: the text of slot A of item i0 is "i0 A"."""
    items = {}
    for name, entry in key.items():
        answers = {slot: f"{name} {slot}" for slot in entry["slots"]}
        entry["digests"] = {slot: study.digest(text) for slot, text in answers.items()}
        entry["characters"] = {slot: len(text) for slot, text in answers.items()}
        items[name] = {"prompt": f"prompt {name}", "reference": "", "answers": answers}
    return items


def test_pairs_and_their_margins_by_hand():
    key = made_key(3, ("x", "y"), checks=2)
    items = sheet(key)
    x, y = (
        {name: next(s for s in "AB" if entry["systems"][s] == system) for name, entry in key.items()} for system in "xy"
    )
    ratings = [rated(key, "i0", "x", rater=r) for r in "abc"]  # all agree
    ratings += [rated(key, "i1", "y", rater="a"), rated(key, "i1", "y", rater="b"), rated(key, "i1", "x", rater="c")]
    ratings += [rated(key, "i1", "y", rater="c")]  # replaces the one before
    ratings += [rated(key, "i1", "x", rater="d"), rated(key, "i1", "x", "y", rater="e"), rated(key, "i1", rater="f")]
    ratings += [rated(key, "i2", "x", rater="a"), rated(key, "i2", "y", rater="b"), rated(key, "i3", rater="a")]
    careless = [rated(key, f"i{i}", key[f"i{i}"]["systems"]["A"], rater="z") for i in (3, 4)]  # excluded
    records, left_out = human.training_pairs(key, items, [*ratings, *careless, rated(key, "i2", "x", rater="z")])
    assert [(row["response"], row["rejected"], row["margin"], row["raters"]) for row in records] == [
        (f"i0 {x['i0']}", f"i0 {y['i0']}", 1.0, 3),
        (f"i1 {y['i1']}", f"i1 {x['i1']}", (3 - 1) / 6, 6),
    ]
    assert records[0]["prompt"] == "prompt i0" and records[0]["reference"] is None
    assert left_out == {"as many raters preferred the other answer": 1}


def test_answers_both_passed_over_make_no_pair():
    key = made_key(1)
    items = sheet(key)
    slot = {name: place for place, name in key["i0"]["systems"].items()}
    records, left_out = human.training_pairs(key, items, [rated(key, "i0", "rl")])
    assert {row["id"] for row in records} == {f"i0-{slot['rl']}{slot['sft']}", f"i0-{slot['rl']}{slot['staged']}"}
    assert {row["rejected"] for row in records} == {f"i0 {slot['sft']}", f"i0 {slot['staged']}"} and not left_out


def test_pairs_are_of_the_texts_that_were_rated():
    key = made_key(2, ("x", "y"))
    items = sheet(key)
    ratings = [rated(key, "i0", "x"), rated(key, "i1", "y")]
    records, left_out = human.training_pairs(key, items, ratings)
    assert len(records) == 2 and not left_out
    items["i1"]["answers"]["B"] += " "
    with pytest.raises(UserError, match="item i1: the answers in the blind file are not those of the key"):
        human.training_pairs(key, items, ratings)


def test_the_human_report_has_every_table_and_escapes_names():
    key = made_key(6, ("a|b", "<i>c", "d"))
    ratings = [rated(key, f"i{i}", ("a|b", "d")[i % 2], rater=r, helpful_1_5=4) for i in range(6) for r in ("`x`", "y")]
    results = human.analyse(key, ratings, draws=50)
    text = human.report(results)
    tables = [block.split("\n") for block in text.strip().split("\n\n") if block.startswith("|")]
    assert [len(rows) for rows in tables] == [5, 5, 5, 4, 4]
    for rows in tables:  # every row has the columns of its head
        assert len({len(re.split(r"(?<!\\)\|", row)) for row in rows}) == 1 and rows[1].strip("|-") == ""
    assert r"a\|b" in text and r"\<i\>c" in text and r"\`x\`" in text and "<i>" not in text
    assert "6 items, 2 raters, 12 ratings counted" in text and "4.00 (n = 6)" in text
    assert "kappa" not in text and "\n\n\n" not in text and text.endswith("|\n")


# ---------------------------------------------------------------- agreement and Bradley-Terry


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
    assert human.krippendorff_alpha(count(OBSERVERS, 5)) == pytest.approx(0.743, abs=5e-4)


def test_alpha_equals_evalica_and_krippendorff():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.integers(1, 5, (3, 15)) * (rng.random((3, 15)) < 0.8)
        frame = pandas.DataFrame(np.where(labels, labels, np.nan))
        expected = evalica.alpha(frame, distance="nominal").alpha
        assert human.krippendorff_alpha(count(labels, 4)) == pytest.approx(expected, abs=1e-9)
        other = krippendorff.alpha(value_counts=count(labels, 4), level_of_measurement="nominal")
        assert human.krippendorff_alpha(count(labels, 4)) == pytest.approx(other, abs=1e-9)


def test_alpha_with_weights_is_that_of_repeated_units():
    counts, rng = count(OBSERVERS, 5), np.random.default_rng(1)
    weights = rng.multinomial(12, np.full(12, 1 / 12), size=50)
    found = human.krippendorff_alpha(counts, weights)
    assert found == pytest.approx([human.krippendorff_alpha(np.repeat(counts, w, axis=0)) for w in weights])


def test_agreement_that_is_not_defined_is_no_number():
    assert math.isnan(human.krippendorff_alpha([[3, 0], [2, 0]]))  # one label only
    assert math.isnan(human.krippendorff_alpha([[1, 0], [0, 1]]))  # nobody shares a unit
    assert human.krippendorff_alpha([[2, 0], [0, 2]]) == 1.0
    key = made_key(2)
    ratings = [rated(key, "i0", name, rater=r) for r, name in (("a", "rl"), ("b", "rl"), ("c", "sft"))]
    ratings += [rated(key, "i1", "sft", rater="a")]
    assert human.analyse(key, ratings, draws=10)["agreement"]["raw"] == pytest.approx(1 / 3)
    assert human.analyse(key, ratings[2:], draws=10)["agreement"]["raw"] is None


def random_wins(rng, k=4):
    return rng.integers(1, 30, (k, k)) * (1 - np.eye(k)) / 2  # halves: ties


def test_bradley_terry_is_the_maximum_likelihood():
    rng = np.random.default_rng(0)
    for _ in range(5):
        wins = random_wins(rng)
        lost = lambda s: (wins * np.logaddexp(0, s[None, :] - s[:, None])).sum()  # noqa: B023, E731
        best = optimize.minimize(lost, np.zeros(4), tol=1e-12).x
        assert human.bradley_terry(wins) == pytest.approx(best - best.mean(), abs=1e-4)


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
    assert human.bradley_terry(wins) == pytest.approx(expected - expected.mean(), abs=1e-4)


def test_bradley_terry_of_two_is_the_log_odds_and_batches():
    assert human.bradley_terry([[0, 30], [10, 0]]) == pytest.approx([math.log(3) / 2, -math.log(3) / 2])
    assert human.bradley_terry([[0, 30], [0, 0]], prior=0.5) == pytest.approx([math.log(61) / 2, -math.log(61) / 2])
    many = np.stack([random_wins(np.random.default_rng(seed)) for seed in range(5)])
    assert human.bradley_terry(many) == pytest.approx(np.stack([human.bradley_terry(wins) for wins in many]))


def test_bradley_terry_settles_on_lopsided_wins():
    wins = np.array([[0, 5000, 9000, 14999], [3, 0, 7000, 14000], [2, 1, 0, 15000], [0.5, 0, 0.5, 0]])
    strengths = human.bradley_terry(wins)
    chance = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    assert ((wins + wins.T) * chance).sum(1) - np.diag(wins + wins.T) / 2 == pytest.approx(wins.sum(1), rel=1e-6)
    with pytest.raises(ValueError, match="connected"), np.errstate(all="ignore"):
        human.bradley_terry([[0, 5], [0, 0]], most=50)


def test_strengths_are_finite_unless_the_systems_can_be_split():
    rng, key, found = np.random.default_rng(0), made_key(9, tuple("wxyz")), Counter()
    for _ in range(200):
        ratings = [
            rated(key, f"i{i}", *rng.choice(list("wxyz"), rng.integers(1, 4))) for i in range(rng.integers(2, 9))
        ]
        results = human.analyse(key, ratings, draws=1)
        wins = np.array(results["wins"])
        splits = (set(part) for size in (1, 2, 3) for part in itertools.combinations(range(4), size))
        expected = all(any(wins[i, j] for i in part for j in set(range(4)) - part) for part in splits)
        assert results["strengths_finite"] == expected
        found[expected] += 1
    assert min(found[True], found[False]) > 40, found
