"""Recordings: tables of them, with and without a judge that is good enough."""

import numpy as np
import pytest

from common.evaluation import report, results
from tests.test_comparison import system
from tests.test_gate import counts_words, knows, made_pairs

FACTS = {"task": "safety", "items": "i", "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8, "samples": 1}
FACTS |= {"metric": None, "seed": 0, "code": "c", "scorers": {"judge": "j"}}
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
    assert "won all" in report.instrument(tables)[0] and tables["judge"]["pairs"] == 200


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
    (sentence,) = report.instrument(tables)
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
