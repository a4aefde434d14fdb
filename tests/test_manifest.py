"""Blind files, ratings and their analysis: blinding, balance, simulated raters of known strengths, refusals."""

import csv
import json
import math
import os
import re
import stat
from collections import Counter

import numpy as np
import pytest

import evaluate
import serve
from common.human import analysis as human
from common.human import manifest, ratings
from common.log import UserError
from tests import runs

NAMES = ("sft", "rl", "staged")
WORDS = "the visit note says that a patient with mild fever was told to rest and drink more water today".split()


def answers(n, seed=0, words=10):
    rng = np.random.default_rng(seed)
    return [f"{i} {' '.join(rng.choice(WORDS, words))}" for i in range(n)]


def study(tmp_path, n=60, systems=NAMES, **options):
    """Write a study; (its blind file, its key, both read)."""
    path = tmp_path / "study.csv"
    items = [{"prompt": f"=prompt {i}", "reference": f"reference {i}", "task": "clinical"} for i in range(n)]
    manifest.write(items, {name: answers(n, seed) for seed, name in enumerate(systems)}, path, **options)
    return manifest.read_manifest(path), manifest.read_key(tmp_path / "study.key.csv")


def made_key(n, systems=NAMES, checks=0):
    """A key as read_key gives it, without files: n items, then checks with their trap in slot A."""
    slots, rng, found = "ABCD"[: len(systems)], np.random.default_rng(0), {}
    for i in range(n + checks):
        order = [str(name) for name in rng.permutation(systems)]
        found[f"i{i}"] = {"slots": slots, "kind": "item" if i < n else "check", "original": "", "source": i,
                          "trap": None if i < n else "A", "systems": dict(zip(slots, order)), "seed": "0",
                          "characters": dict.fromkeys(slots, 10), "digests": {s: f"{i}{s}" for s in slots}}  # fmt: skip
    return found


def rated(key, item, *preferred, rater="r", order=None, **scores):
    """A rating that prefers these systems."""
    slots = tuple(slot for slot, name in key[item]["systems"].items() if name in preferred)
    return {
        "rater_id": rater,
        "item_id": item,
        "preferred": slots,
        "order": order,
        **dict.fromkeys(human.SCORES),
        **scores,
    }


def test_the_blind_file_and_its_key(tmp_path):
    items, key = study(tmp_path, n=300, num_samples=200, seed=3)
    kinds = Counter(entry["kind"] for entry in key.values())
    assert kinds == {"item": 200, "duplicate": 20, "check": 10} and list(items) == list(key)
    texts = {name: answers(300, seed) for seed, name in enumerate(NAMES)}
    for name, entry in key.items():
        shown, i = items[name], entry["source"]
        assert (shown["prompt"], shown["reference"], shown["task"]) == (f"=prompt {i}", f"reference {i}", "clinical")
        for slot, system in entry["systems"].items():
            if slot != entry["trap"]:
                assert shown["answers"][slot] == texts[system][i]
            assert entry["characters"][slot] == len(shown["answers"][slot]) and entry["seed"] == "3"
    sources = [entry["source"] for entry in key.values() if entry["kind"] == "item"]
    checked = {entry["source"] for entry in key.values() if entry["kind"] == "check"}
    assert len(set(sources)) == 200 and not checked & set(sources)  # checks are of other items while there are any


def test_slots_are_balanced_and_duplicates_move_every_answer(tmp_path):
    _, key = study(tmp_path, n=200, seed=1)
    counts = Counter((name, slot) for e in key.values() if e["kind"] == "item" for slot, name in e["systems"].items())
    assert set(counts.values()) <= set(range(64, 70))  # 200 / 3, give or take one block of six orders
    places, moved = list(key), 0
    for name, entry in key.items():
        if entry["kind"] == "duplicate":
            first = key[entry["original"]]
            assert first["source"] == entry["source"] and places.index(entry["original"]) < places.index(name)
            assert all(first["systems"][slot] != system for slot, system in entry["systems"].items())
            moved += 1
    assert moved == 20


@pytest.mark.parametrize("systems", [("x", "y"), NAMES, ("a", "b", "c", "d")])
def test_a_check_shows_an_answer_and_its_shuffled_words(tmp_path, systems):
    items, key = study(tmp_path, systems=systems)
    checks = [name for name, entry in key.items() if entry["kind"] == "check"]
    assert len(checks) == 3
    for name in checks:
        shown, trap = items[name]["answers"], key[name]["trap"]
        twin = [slot for slot in shown if slot != trap and key[name]["systems"][slot] == key[name]["systems"][trap]]
        assert len(twin) == 1 and len(shown) == len(systems)
        assert shown[trap] != shown[twin[0]] and sorted(shown[trap].split()) == sorted(shown[twin[0]].split())


def test_nothing_in_the_blind_file_names_a_system(tmp_path):
    (tmp_path / "outputs").mkdir()
    names = {name: answers(50, seed) for seed, name in enumerate(("sft_lora", "grpo_rl", "staged_run"))}
    items = [{"prompt": f"question {i}"} for i in range(50)]
    path = tmp_path / "outputs" / "human.csv"
    manifest.write(items, names, path)
    text = path.read_text(encoding="utf-8-sig")
    for word in (*names, "lora", "staged", "outputs", str(tmp_path), "duplicate", "check", "trap"):
        assert word not in text
    assert sorted(file.name for file in path.parent.iterdir()) == ["human.csv", "human.key.csv"]
    assert stat.S_ISREG(path.stat().st_mode) and not (hasattr(os, "listxattr") and os.listxattr(path))
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, strict=True))
    assert rows[0] == ["item_id", "prompt", "reference", "response_A", "response_B", "response_C"]
    mark = rows[1][0][:6]
    assert [row[0] for row in rows[1:]] == [f"{mark}-item-{i:02d}" for i in range(1, len(rows))]


def test_the_seed_makes_the_files_and_is_drawn_if_none(tmp_path):
    files = []
    for name, seed in (("a", 5), ("b", 5), ("c", None), ("d", None)):
        manifest.write([{"prompt": "p"}] * 20, {n: answers(20) for n in NAMES}, tmp_path / f"{name}.csv", 20, seed)
        files.append((tmp_path / f"{name}.key.csv").read_bytes())
    assert files[0] == files[1] and files[2] != files[3]
    seed = int(next(iter(manifest.read_key(tmp_path / "c.key.csv").values()))["seed"])
    manifest.write([{"prompt": "p"}] * 20, {n: answers(20) for n in NAMES}, tmp_path / "e.csv", 20, seed)
    assert (tmp_path / "e.key.csv").read_bytes() == files[2]


def test_generate_manifest_takes_the_readmes_call(tmp_path, capsys):
    texts = [answers(8, seed) for seed in range(3)]
    prompts, references = ["=1+1", "'tis", *"cdefgh"], ["", "\n", *"cdefgh"]
    made = manifest.generate_manifest(prompts, references, *texts, output_path=str(tmp_path / "h.csv"), num_samples=200)
    assert {name: made[name] for name in ("items", "duplicates", "checks")} == {
        "items": 8,
        "duplicates": 1,
        "checks": 2,
    }
    assert "200 items wanted, all 8 taken" in capsys.readouterr().out
    key = manifest.read_key(tmp_path / "h.key.csv")
    for name, item in manifest.read_manifest(tmp_path / "h.csv").items():
        i = key[name]["source"]
        assert (item["prompt"], item["reference"]) == (prompts[i], references[i])
    assert {name for entry in key.values() for name in entry["systems"].values()} == {"sft", "rl", "staged"}


def test_nothing_is_cut_without_a_mark(tmp_path):
    long, items = {"x": ["a" * 5000] * 4, "y": ["b" * 10] * 4}, [{"prompt": "p" * 9000}] * 4
    manifest.write(items, long, tmp_path / "whole.csv")
    assert {len(a) for i in manifest.read_manifest(tmp_path / "whole.csv").values() for a in i["answers"].values()} == {
        5000,
        10,
    }
    manifest.write(items, long, tmp_path / "cut.csv", limit=1000)
    shown = {a for i in manifest.read_manifest(tmp_path / "cut.csv").values() for a in i["answers"].values()}
    assert shown == {"b" * 10, "a" * 1000 + "\n[... cut, 1000 of 5000 characters shown]"}
    assert {len(i["prompt"]) for i in manifest.read_manifest(tmp_path / "cut.csv").values()} == {9000}


def test_answers_too_short_to_shuffle_are_said(tmp_path, capsys):
    made = manifest.write([{"prompt": "p"}] * 9, {"x": ["yes"] * 9, "y": ["no"] * 9}, tmp_path / "a.csv", 9)
    assert made["checks"] == 0 and "0 of 2 checks" in capsys.readouterr().out


def test_prompts_without_references_are_refused(tmp_path):
    with pytest.raises(UserError, match="2 prompts, but 1 references"):
        manifest.generate_manifest(["a", "b"], ["c"], *[answers(2)] * 3, output_path=tmp_path / "h.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"systems": {"x": ["a"]}}, "two to four named systems"),
        ({"systems": {"x": ["a"], "y": ["b"]}}, "2 items, but 1 answers of x"),
        ({"systems": {"x": ["a", None], "y": ["b", "c"]}}, "item 1, answer of x: no text"),
        ({"systems": {"x": ["a", "\ud83d"], "y": ["b", "c"]}}, "item 1, answer of x: no text"),
        ({"items": [{"prompt": "p"}, {}]}, "item 1, prompt: no text"),
        ({"items": []}, "needs items"),
        ({"num_samples": 0}, "at least 1, not 0"),
        ({"limit": 0}, "at least 1"),
        ({"path": "study.txt"}, "named NAME.csv"),
        ({"path": "study.key.csv"}, "named NAME.csv"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, change, message):
    given = {"items": [{"prompt": "p"}] * 2, "systems": {"x": ["a", "b"], "y": ["c", "d"]}, "path": "a.csv", **change}
    with pytest.raises(UserError, match=message) as caught:
        manifest.write(**{**given, "path": tmp_path / given["path"]})
    assert "\n" not in str(caught.value) and given["path"] in str(caught.value) and not list(tmp_path.iterdir())


def test_a_file_that_may_have_been_rated_is_never_replaced(tmp_path):
    study(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match="may have been rated"):
        study(tmp_path)
    (tmp_path / "study.csv").unlink()
    with pytest.raises(UserError, match=r"study\.key\.csv exists"):
        study(tmp_path)
    assert (tmp_path / "study.key.csv").read_bytes() == before["study.key.csv"]


def test_a_stop_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path)
    assert not list(tmp_path.iterdir())


HEADER = "item_id,slot,system,kind,trap,original,source,characters,digest,seed\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,slot\n", "line 1: a key's columns"),
        (HEADER + "i,A,x,item,,,zero,1,d,0\n", "line 2: source 'zero': a whole number"),
        (HEADER + "i,A,x,item,,,0,1,d,0\ni,C,y,item,,,0,1,d,0\n", "line 3: slot 'C'"),
        (HEADER + "i,A,x,item,,,0,1,d,0\ni,B,y,check,,,0,1,d,0\n", "line 3: item_id 'i' is empty, or differs"),
        (HEADER + "i,A,x,thing,,,0,1,d,0\n", "line 2: slot 'A' .*kind 'thing'"),
        (HEADER + "i,A,x,item,,,0,1,d,0\n", "i has slots A"),
        (HEADER + "i,A,x,check,,,0,1,d,0\ni,B,y,check,,,0,1,d,0\n", "trap None"),
        (HEADER + "i,A,x,check,1,,0,1,d,0\ni,B,y,check,1,,0,1,d,0\n", "line 3: trap '1'"),
        (HEADER + "i,A,x,duplicate,,j,0,1,d,0\ni,B,y,duplicate,,j,0,1,d,0\n", "original 'j'"),
    ],
)
def test_a_damaged_key_is_refused(tmp_path, text, message):
    path = tmp_path / "a.key.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        manifest.read_key(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,prompt,response_A,response_B\n", "line 1: no blind file's columns"),
        ("item_id,prompt,reference,response_A\n", "line 1: no blind file's columns"),
        ("item_id,prompt,reference,response_B,response_A\n", "line 1"),
        ("item_id,prompt,reference,response_A,response_B\ni,p,r,a,b\ni,p,r,a,b\n", "line 3: item_id 'i'"),
    ],
)
def test_a_damaged_blind_file_is_refused(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        manifest.read_manifest(path)


def test_ratings_are_read_from_csv_and_jsonl_alike(tmp_path):
    key = made_key(2)
    (tmp_path / "a.csv").write_text(
        "\ufeffrater_id,item_id,preferred,order,harmless_1_5,comment,seconds\r\n"
        'ann,i0,A,,5,"\'=two\nlines",3.5\r\nann,i1, c / a ,b/A/C,,,\r\n', encoding="utf-8", newline="")  # fmt: skip
    rows = [{"rater_id": "bob", "item_id": "i0", "preferred": "none", "seconds": 2, "harmless_1_5": 1,
             "comment": "=x\u2028y"},
            {"rater_id": "bob", "item_id": "i1", "preferred": "A", "order": None}]  # fmt: skip
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    first, second, third, fourth = manifest.read_ratings([tmp_path / "a.csv", tmp_path / "b.jsonl"], key)
    assert first["preferred"] == ("A",) and first["harmless_1_5"] == 5 and first["seconds"] == 3.5
    assert first["comment"] == "=two\nlines" and first["order"] is None and first["helpful_1_5"] is None
    assert second["preferred"] == ("A", "C") and second["order"] == ("B", "A", "C")
    assert third["preferred"] == () and third["harmless_1_5"] == 1 and third["comment"] == "=x\u2028y"
    assert fourth["order"] is None and fourth["seconds"] is None
    assert manifest.read_ratings(tmp_path / "b.jsonl", key) == [third, fourth]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"item_id": "i9"}, "item_id 'i9' is no item"),
        ({"preferred": "D"}, "preferred 'D': slots of A/B/C"),
        ({"preferred": "A/A"}, "preferred 'A/A'"),
        ({"preferred": ""}, "preferred ''"),
        ({"preferred": ["A"]}, "preferred"),
        ({"rater_id": " "}, "rater_id is empty"),
        ({"order": "A/B"}, "order 'A/B': all of A/B/C"),
        ({"harmless_1_5": 6}, "harmless_1_5 '6': a whole number from 1 to 5"),
        ({"helpful_1_5": 2.5}, "helpful_1_5 '2.5'"),
        ({"faithful_1_5": True}, "faithful_1_5 'true'"),
        ({"seconds": -1}, "seconds '-1'"),
        ({"seconds": "nan"}, "seconds 'nan'"),
        ({"seconds": "long"}, "seconds 'long'"),
        ({"mood": "good"}, "unknown column 'mood'"),
    ],
)
def test_bad_ratings_are_refused_by_line(tmp_path, changed, message):
    good, path = {"rater_id": "ann", "item_id": "i0", "preferred": "A"}, tmp_path / "r.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **changed}) + "\n")
    with pytest.raises(UserError, match=rf"r\.jsonl, line 2: .*{message}") as caught:
        manifest.read_ratings([path], made_key(1))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_ratings_are_refused(tmp_path):
    for name, text, message in (("a.jsonl", '{"rater_id": \n', "line 1: no valid JSON"),
                                ("a.txt", "", "a .csv or a .jsonl"),
                                ("b.jsonl", "[]\n", "line 1: a rating is an object"),
                                ("a.csv", "rater_id,item_id,preferred,mood\nann,i0,A,x\n", "line 2: unknown column"),
                                ("b.csv", "rater_id,item_id\nann,i0\n", "line 2: preferred ''")):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            manifest.read_ratings([tmp_path / name], made_key(1))


def test_wins_and_ties_by_hand():
    key = made_key(3)
    ratings = [rated(key, "i0", "sft"), rated(key, "i1", "sft", "rl"), rated(key, "i2")]  # the last: none preferred
    found = human.analyse(key, ratings, draws=50)
    assert found["systems"] == ["rl", "sft", "staged"]
    # i0: sft beats both; i1: sft and rl tie, both beat staged; i2: all tie
    assert found["wins"] == [[0, 1, 1.5], [2, 0, 2.5], [0.5, 0.5, 0]]
    assert (found["items"], found["ratings"], found["replaced"], found["excluded"]) == (3, 3, 0, [])
    assert found["agreement"]["alpha"] is None and "two raters" in found["agreement"]["reason"]
    assert "needs two raters" in manifest.report(found)


def test_equal_answers_are_preferred_together():
    key = made_key(1)
    key["i0"]["digests"] = {
        slot: "same" if name != "staged" else "other" for slot, name in key["i0"]["systems"].items()
    }
    assert human.analyse(key, [rated(key, "i0", "rl")], draws=10)["wins"] == [[0, 0.5, 1], [0.5, 0, 1], [0, 0, 0]]


def test_the_latest_rating_counts_and_duplicates_only_for_consistency():
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


def test_raters_who_fail_more_than_one_check_are_excluded_by_name():
    key = made_key(5, checks=3)
    ratings = [rated(key, f"i{i}", "sft", rater="good") for i in range(5)]
    ratings += [rated(key, f"i{i}", "rl", rater="b|d") for i in range(5)]
    wrong = [rated(key, f"i{i}", key[f"i{i}"]["systems"]["A"]) for i in (5, 6, 7)]
    ratings += [{**wrong[0], "rater_id": "good"}, {**wrong[0], "rater_id": "b|d"}, {**wrong[1], "rater_id": "b|d"}]
    found = human.analyse(key, ratings, draws=20)
    assert found["excluded"] == ["b|d"] and found["ratings"] == 5 and found["wins"][0] == [0, 0, 0]
    assert [(row["failed"], row["checks"]) for row in found["raters"]] == [(2, 2), (1, 1)]
    assert r"b\|d (2 of 2 checks failed)" in manifest.report(found)
    with pytest.raises(UserError, match="no rating is left"):
        human.analyse(key, [rating for rating in ratings if rating["rater_id"] == "b|d"])
    with pytest.raises(UserError, match="no rating is left"):
        human.analyse(key, [])


def test_a_system_that_never_wins_has_no_interval_and_all_ties_no_difference():
    key = made_key(10)
    found = human.analyse(key, [rated(key, f"i{i}", ("sft", "rl")[i % 2]) for i in range(10)], draws=50)
    assert not found["strengths_finite"] and found["bradley_terry"]["staged"]["low"] is None
    assert found["bradley_terry"]["staged"]["strength"] < found["bradley_terry"]["sft"]["strength"]
    rate = next(row for row in found["win_rates"] if (row["first"], row["second"]) == ("sft", "staged"))
    assert rate["rate"] == 1 and rate["low"] < 0.7 and rate["high"] == pytest.approx(1)  # Wilson of 5 of 5
    assert "no bound" in manifest.report(found)
    tied = human.analyse(key, [rated(key, f"i{i}", *NAMES, rater=r) for i in range(10) for r in "ab"], draws=50)
    assert {row["strength"] for row in tied["bradley_terry"].values()} == {0.0} and tied["strengths_finite"]
    assert tied["agreement"]["alpha"] is None and "all ratings are the same" in tied["agreement"]["reason"]
    assert tied["position_bias"]["n"] == 0 and tied["length_bias"]["n"] == 0
    for result in (found, tied):
        assert "nan" not in json.dumps(result, allow_nan=False) + manifest.report(result)


def test_agreement_of_raters_by_system_not_by_slot():
    key = made_key(40)
    alike = [rated(key, f"i{i}", NAMES[i % 3], rater=r) for i in range(40) for r in "abc"]
    found = human.analyse(key, alike, draws=100)["agreement"]
    assert found["alpha"] == found["kappa"] == found["raw"] == 1.0 and found["items"] == 40
    rng = np.random.default_rng(0)
    chance = [rated(key, f"i{i}", rng.choice(NAMES), rater=r) for i in range(40) for r in "abc"]
    found = human.analyse(key, chance, draws=200)["agreement"]
    assert found["low"] < found["alpha"] < found["high"] and abs(found["alpha"]) < 0.25


def test_raters_who_share_no_item_have_no_agreement():
    key = made_key(2)
    found = human.analyse(key, [rated(key, "i0", "rl", rater="a"), rated(key, "i1", "rl", rater="b")], draws=10)
    assert found["agreement"] == {**dict.fromkeys(("alpha", "low", "high", "kappa", "raw")), "items": 0,
                                  "reason": "no item was rated by two raters"}  # fmt: skip
    assert "Agreement: no item was rated by two raters.\n" in manifest.report(found)


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
    text = manifest.report(found)
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


def test_a_whole_study_from_files(tmp_path):
    """Raters who read prefer the staged system's answers; the report says so, from the written files alone."""
    items, key = study(tmp_path, n=60, seed=2)
    wanted, path = set(answers(60, NAMES.index("staged"))), tmp_path / "ratings.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for rater in ("ann", "bob"):
            for name, item in items.items():  # a check may show no staged answer: then none is preferred
                best = [slot for slot, text in item["answers"].items() if text in wanted]
                file.write(
                    json.dumps({"rater_id": rater, "item_id": name, "preferred": "/".join(best) or "none"}) + "\n"
                )
    found = manifest.analyse(key, manifest.read_ratings([path], key), draws=100)
    assert found["excluded"] == [] and found["items"] == 60 and found["ratings"] == 120
    assert max(found["bradley_terry"], key=lambda name: found["bradley_terry"][name]["strength"]) == "staged"
    assert found["self_consistency"] == {
        "share": 1.0,
        "low": pytest.approx(0.757, abs=1e-3),
        "high": pytest.approx(1),
        "n": 12,
    }
    assert manifest.report(found).startswith("## Human evaluation\n\n60 items, 2 raters, 120 ratings counted")


# ---------------------------------------------------------------- two studies, and files without marks

NO_PORT = 99_999  # a server that is started where it should refuse ends at once, with another line


def two_studies(tmp_path):
    """The folders of two runs that compare the same two systems, each with a blind file and its key."""
    folders = []
    for name, seed in (("first", 1), ("second", 2)):
        (tmp_path / name).mkdir()
        items = [{"prompt": f"{name} prompt {i}"} for i in range(20)]
        systems = {"base": answers(20, seed), "tuned": answers(20, seed + 10)}
        manifest.write(items, systems, tmp_path / name / "human_eval.csv", seed=seed)
        folders.append(tmp_path / name)
    return folders


def rate_all(folder, path, system="tuned", raters=("ann", "bob")):
    """Write a file of ratings in which all raters prefer `system` wherever it is shown."""
    rows = [
        {"rater_id": rater, "item_id": item, "preferred": "/".join(slots) or "none"}
        for rater in raters
        for item, entry in manifest.read_key(folder / "human_eval.key.csv").items()
        for slots in [[s for s, name in entry["systems"].items() if name == system and s != entry["trap"]]]
    ]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def take_marks_off(*paths):
    """Turn files into what the version before marks wrote."""
    for path in paths:
        path.write_bytes(re.sub(rb"[0-9a-f]{6}-(item-[0-9]+)", rb"\1", path.read_bytes()))


def results_of(folder, *files):
    """evaluate.py --human_results of these files with the key of the run in `folder`."""
    where = ["--logging.output_dir", folder.parent, "--logging.run_name", folder.name, "--evaluation.draws", 100]
    return evaluate.main([str(word) for word in [*where, "--human_results", *files]])


def refusal(capsys, folder, *files):
    """The one line with which the command refuses these files."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        results_of(folder, *files)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    return line


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_ratings_of_another_study_are_refused_by_the_command(tmp_path, capsys, kind):
    first, second = two_studies(tmp_path)
    mine = rate_all(first, tmp_path / f"mine.{kind}")
    found = results_of(first, mine)
    assert found["win_rates"][0]["rate"] == 0.0 and found["systems"] == ["base", "tuned"]
    assert found["self_consistency"]["share"] == 1.0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    item = next(iter(manifest.read_key(first / "human_eval.key.csv")))
    line = refusal(capsys, second, mine)
    assert f"mine.{kind}, line {2 if kind == 'csv' else 1}: item_id '{item}' is of another study" in line
    assert str(second / "human_eval.key.csv") in line and "--logging.run_name" in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (second / "human_results.json").exists()


def test_one_foreign_file_or_line_among_good_ones_is_refused_by_name(tmp_path, capsys):
    first, second = two_studies(tmp_path)
    mine, theirs = rate_all(first, tmp_path / "mine.csv"), rate_all(second, tmp_path / "theirs.jsonl")
    assert "theirs.jsonl, line 1: item_id" in refusal(capsys, first, mine, theirs)
    good = rate_all(first, tmp_path / "good.jsonl").read_text()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(good + theirs.read_text())
    line = refusal(capsys, first, mixed)
    assert f"mixed.jsonl, line {good.count(chr(10)) + 1}: item_id" in line and "another study" in line


def test_files_without_marks_are_read_with_their_own_key_only(tmp_path, capsys):
    first, second = two_studies(tmp_path)
    marked = rate_all(first, tmp_path / "marked.csv")
    take_marks_off(first / "human_eval.csv", first / "human_eval.key.csv")
    old = rate_all(first, tmp_path / "old.csv")
    assert "item-01" in old.read_text().split(",") and list(manifest.read_manifest(first / "human_eval.csv"))
    capsys.readouterr()
    assert results_of(first, old)["win_rates"][0]["rate"] == 0.0
    assert "human_eval.key.csv: its items carry no study mark" in capsys.readouterr().out
    line = refusal(capsys, second, old)
    assert "old.csv, line 2: item_id 'item-01' is of another study (its mark is missing" in line
    line = refusal(capsys, first, marked)  # a new rating, and the key of an old study
    assert "marked.csv, line 2: item_id" in line and "that of this study is missing" in line


def test_a_slip_in_an_item_id_is_not_called_another_study(tmp_path):
    first, _ = two_studies(tmp_path)
    key = manifest.read_key(first / "human_eval.key.csv")
    mark = ratings.mark_of(next(iter(key)))
    for wrong in (f"{mark}-item-99", f"{mark}-item-01 ", f"{mark.upper()}-item-99"):
        with pytest.raises(ValueError, match="is no item of this evaluation"):
            ratings.parse_rating({"rater_id": "ann", "item_id": wrong, "preferred": "A"}, key)
    with pytest.raises(ratings.ForeignItem, match="of another study"):
        ratings.parse_rating({"rater_id": "ann", "item_id": "item-01", "preferred": "A"}, key)


def test_the_mark_is_a_function_of_all_that_the_study_is(tmp_path):
    items, systems = [{"prompt": f"p{i}"} for i in range(12)], {"x": answers(12, 0), "y": answers(12, 1)}
    given = {"items": items, "systems": systems, "num_samples": 10, "seed": 5}
    changes = {
        "same": {},
        "again": {},
        "seed": {"seed": 6},
        "size": {"num_samples": 11},
        "shown": {"limit": 20},
        "prompt": {"items": [{"prompt": f"q{i}"} for i in range(12)]},
        "answer": {"systems": {**systems, "y": [*answers(12, 1)[:-1], "another one"]}, "num_samples": 12},
        "whole": {"num_samples": 12},
        "names": {"systems": {"x": systems["x"], "z": systems["y"]}},
    }
    marks = {}
    for name, change in changes.items():
        manifest.write(path=tmp_path / f"{name}.csv", **{**given, **change})
        found = {ratings.mark_of(item) for item in manifest.read_key(tmp_path / f"{name}.key.csv")}
        assert len(found) == 1 and "" not in found
        marks[name] = found.pop()
    assert marks.pop("again") == marks["same"] and len(set(marks.values())) == len(marks)


def test_a_file_with_the_items_of_two_studies_is_refused(tmp_path):
    first, second = two_studies(tmp_path)
    for name, read in (("human_eval.csv", manifest.read_manifest), ("human_eval.key.csv", manifest.read_key)):
        rows = (second / name).read_text("utf-8-sig").split("\n", 1)[1]
        (tmp_path / name).write_text((first / name).read_text("utf-8-sig") + rows)
        with pytest.raises(UserError, match=rf"{name}: .* are items of two studies") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_ratings_read_with_one_key_are_not_analysed_with_another(tmp_path):
    first, second = two_studies(tmp_path)
    keys = [manifest.read_key(folder / "human_eval.key.csv") for folder in (first, second)]
    found = manifest.read_ratings(rate_all(first, tmp_path / "mine.csv"), keys[0])
    assert manifest.analyse(keys[0], found, draws=10)["ratings"] == 40
    with pytest.raises(UserError, match="is not in the key: analyse ratings with the key of their own study"):
        manifest.analyse(keys[1], found, draws=10)


def test_saved_ratings_of_another_study_are_refused_and_stay_as_they_are(tmp_path):
    first, second = two_studies(tmp_path)
    saved = rate_all(first, second / "human_eval.ratings.jsonl")
    saved.write_text(saved.read_text() + '{"rater_id": "ann", "it')  # cut off by a crash
    before = saved.read_bytes()
    items = manifest.read_manifest(second / "human_eval.csv")
    with pytest.raises(UserError, match=r"line 1: item_id .* another study .*: move this file away") as caught:
        ratings.reopen(saved, items)
    assert str(saved) in str(caught.value) and saved.read_bytes() == before
    flags = ["--checkpoint", "tiny", "--port", NO_PORT, "--human_eval", second / "human_eval.csv"]
    runs.refused(serve.main, tmp_path, flags, "human_eval.ratings.jsonl, line 1: item_id")
    assert saved.read_bytes() == before


def test_a_blind_file_beside_another_study_s_key_is_not_served(tmp_path):
    first, second = two_studies(tmp_path)
    os.replace(first / "human_eval.key.csv", second / "human_eval.key.csv")
    flags = ["--checkpoint", "tiny", "--port", NO_PORT, "--human_eval", second / "human_eval.csv"]
    runs.refused(serve.main, tmp_path, flags, "they are of two studies, put the blind file beside its own key")
    flags = ["--logging.output_dir", tmp_path, "--logging.run_name", "second", "--human_eval"]
    flags += ["--checkpoints", "base=tiny", "tuned=tiny"]
    runs.refused(evaluate.main, tmp_path, flags, "they are of two studies, put the blind file beside its own key")
