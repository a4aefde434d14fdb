"""Recordings: tables of them, with and without a judge that is good enough; what may not be compared is refused."""

import dataclasses
import gzip

import numpy as np
import pytest

from common.evaluation import report, results
from common.log import UserError
from common.runtime import cache
from tests.test_comparison import system
from tests.test_gate import counts_words, knows, made_pairs

FACTS = {"task": "safety", "items": "i", "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8, "samples": 1}
FACTS |= {"metric": None, "drift": False, "other_tasks": {}, "seed": 0, "code": "c", "scorers": {"judge": "j"}}
COST = {"tokens": 1000, "flops": 2e12, "seconds": 3.0, "peak_memory_gb": 1.0, "stages": []}


def of_system(name, shift, seed=0, cost=COST):
    lines = [
        line | {"reference": "r", "tokens_per_second": 5.0, "stats": line["stats"] | {"reward": [shift, 1.0]}}
        for line in system(seed, shift)
    ]
    head = {"of": "system", "name": name, "key": f"{name}{seed}{shift}", "four_bit": False, "notes": [], "cost": cost}
    return results.Recording(head | {"facts": FACTS}, lines)


def of_judge(judge):
    head = {"of": "judge", "key": "judge", "facts": FACTS, "cost": COST, "reliability": []}
    return results.Recording(head, made_pairs(judge))


def of_floors(below):
    """An answer that the judge puts so far below the data's."""
    lines = [line | {"stats": {"judge": [-below, 1.0]}, "scores": {"judge": -below}} for line in system(0, 0.0)]
    head = {"of": "floors", "key": "floors", "facts": FACTS, "cost": {}}
    return results.Recording(head, [["always refuse", lines], ["data's answer", lines]])


def build(judge, below=2.0, base=-3.0):
    recordings = [of_system("base", base, cost={}), of_system("sft", 1.0, 1), of_floors(below), of_judge(judge)]
    return results.build(recordings, 200)


def test_a_judge_that_is_good_enough_is_the_headline():
    tables = build(knows)
    assert tables["gate"]["passed"] and tables["headline"] == "judge"
    against = {row["against"] for row in tables["gate"]["checks"]}
    assert {"those of the base", '"always refuse"'} <= against and not any("data's answer" in name for name in against)
    assert tables["cells"]["judge"]["sft"]["value"] == pytest.approx(
        np.mean([line["scores"]["judge"] for line in system(1, 1.0)])
    )
    assert "won all" in report.judge_sentence(tables)[0] and tables["judge"]["pairs"] == 200


@pytest.mark.parametrize(
    ("judge", "below", "base", "words"),
    [
        (counts_words, 99.0, -99.0, 'the rule "shorter answer"'),
        (knows, -2.0, -3.0, '"always refuse"'),
        (knows, 2.0, 3.0, "those of the base"),
    ],
)
def test_a_judge_that_is_not_has_no_column_and_no_verdict(tmp_path, judge, below, base, words):
    tables = build(judge, below, base)
    assert not tables["gate"]["passed"] and tables["headline"] == "reward" == tables["item_score"]
    assert not any("judge" in tables[table] for table in ("cells", "pairs", "metrics", "by_seed"))
    (sentence,) = report.judge_sentence(tables)
    assert sentence.startswith("The judge was not good enough, so its scores are not shown and the verdicts go by")
    assert words in sentence and "the optimised reward" in sentence and "\n" not in sentence
    assert all("the judge (" not in verdict for verdict in report.verdicts(tables))
    assert any("train the judge on more pairs" in step for step in report.next_steps(tables))
    report.write(tmp_path, tables, {}, [])
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text().replace("&#34;", '"').replace("&#39;", "'")
        assert text.count("The judge was not good enough") == 1 and words in text
        assert "judge ↑" not in text and "judge <" not in text.replace("second reward model", "")


def test_without_its_pairs_a_judge_was_not_checked():
    tables = results.build([of_system("base", -3.0, cost={}), of_system("sft", 1.0, 1)], 200)
    assert not tables["gate"]["passed"] and tables["headline"] == "reward" and tables["judge"] is None
    assert "too few" in tables["gate"]["reasons"][0]


@pytest.mark.parametrize(("left_out", "words"), [("base", "those of the base"), ("floors", '"any fixed answer"')])
def test_a_judge_that_was_not_set_against_all_is_not_passed(left_out, words):
    """This judge passes where both are there."""
    recordings = [of_system("sft", 1.0, 1), of_judge(knows)]
    recordings += [of_floors(2.0)] if left_out == "base" else [of_system("base", -3.0, cost={})]
    tables = results.build(recordings, 200)
    assert tables["gate"]["reasons"] == [f"0 items are too few to set it against {words}"]
    assert not tables["gate"]["passed"] and tables["headline"] == "reward" and "judge" not in tables["cells"]


def test_a_headline_without_a_direction_has_no_wins(monkeypatch):
    """More words are neither better nor worse: no win rate of 0.5 from ties everywhere."""
    task = dataclasses.replace(results.tasks.load("safety"), headline=("length",))
    monkeypatch.setattr(results.tasks, "load", lambda name: task)
    recordings = [of_system("base", 0.0), of_system("sft", 1.0, 1)]
    for recording in recordings:
        for row in recording.rows:
            row["stats"] = row["stats"] | {"length": [float(row["tokens"]), 1.0]}
    found = results.build(recordings, 200)
    assert found["headline"] == "length" and found["wins"] == []


def test_speed_is_that_of_the_first_seed_as_cost_is():
    first, second = of_system("sft", 1.0, 1), of_system("sft", 1.0, 2)
    for row in second.rows:
        row["tokens_per_second"] = 9.0
    assert results.build([of_system("base", 0.0), first, second], 200)["speed"] == {"base": 5.0, "sft": 5.0}


def test_unequal_costs_are_said_with_all_units():
    cheap = COST | {"flops": 1e12}
    tables = results.build([of_system("sft", 1.0), of_system("rl", 2.0, 1, cheap)], 200)
    assert "sft 1,000 tokens, 2.0 TFLOP, 3 s; rl 1,000 tokens, 1.0 TFLOP, 3 s" in " ".join(tables["notes"])
    unknown = results.build([of_system("sft", 1.0), of_system("rl", 2.0, 1, COST | {"flops": None})], 200)
    assert not any("did not cost the same" in note for note in unknown["notes"])


# ---------------------------------------------------------------- files


def write(folder, recording, name, packed=False, **facts):
    path = folder / f"{name}.jsonl"
    head = recording.head | {"facts": FACTS | facts}
    cache.records(path, head["key"], lambda: recording.rows, needed=True, head=head)
    if not packed:
        return path
    (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    return folder / f"{name}.jsonl.gz"


def test_files_are_read_whole_and_each_once(tmp_path):
    sft = [of_system("sft", shift, seed) for seed, shift in ((1, 1.0), (2, 1.1))]
    paths = [write(tmp_path, sft[0], "a"), write(tmp_path, sft[1], "b", packed=True)]
    paths.append(write(tmp_path, of_system("base", -3.0, cost={}), "base"))
    judges = [write(tmp_path, of_judge(knows), name) for name in ("judge-0", "judge-1")]
    read = results.read([*paths, *judges, paths[0]])
    assert [(one.head["of"], one.head.get("name")) for one in read] == [
        ("system", "sft"),
        ("system", "sft"),
        ("system", "base"),
        ("judge", None),
    ]
    assert read[1].rows == sft[1].rows
    assert results.build(read, 100)["seeds"] == {"sft": 2, "base": 1}
    copy = results.Recording(read[2].head | {"name": "copy"}, read[2].rows)  # the same weights under another name
    read = results.read([paths[2], write(tmp_path, copy, "copy")])
    assert [one.head["name"] for one in read] == ["base", "copy"]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"items": "others"}, "it answers other items"),
        ({"temperature": 1.0}, "temperature 1.0 -> 0.0"),
        ({"code": "newer"}, "another version of the code scored it"),
        ({"items": "others", "seed": 3}, "it answers other items, seed 3 -> 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, facts, words):
    paths = [write(tmp_path, of_system("a", 0.0), "a", **facts), write(tmp_path, of_system("b", 1.0, 1), "b")]
    with pytest.raises(UserError, match=words) as refusal:
        results.read(paths)
    assert str(refusal.value).startswith(f"--items: {paths[1]} cannot be compared with {paths[0]}: ")


def test_files_that_are_none_are_refused(tmp_path):
    path = write(tmp_path, of_system("a", 0.0), "a")
    damaged, other, old = (tmp_path / name for name in ("damaged.jsonl", "other.jsonl", "old.jsonl"))
    damaged.write_text(path.read_text().replace('"item-3"', '"item-4"'))
    other.write_text("hello\n")
    cache.records(old, "key", lambda: [{"id": 1}])
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(path.read_bytes())[:-30])
    for wrong, words in (
        (damaged, "cannot be read"),
        (other, "cannot be read"),
        (cut, "cannot be read"),
        (tmp_path / "none", "No such file"),
        (old, "evaluate anew"),
        (write(tmp_path, of_judge(knows), "judge"), "none of these files holds a system's answers"),
    ):
        with pytest.raises(UserError, match=words):
            results.read([wrong])
    seeds = [of_system("a", 0.0, 0), of_system("a", 0.0, 1), *(of_system("b", 1.0, seed) for seed in (0, 1, 2))]
    with pytest.raises(UserError, match=r"\[2, 3\] seeds"):
        results.read([write(tmp_path, one, f"s{i}") for i, one in enumerate(seeds)])
