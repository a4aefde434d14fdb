"""The gate of a judge: judges that know, that only count words, that like refusals, that have too few pairs."""

import numpy as np
import pytest
import torch

from common import chat, config, data, tasks
from common.evaluation import gate, measure
from tests import inputs

DRAWS = 500


def made_pairs(judge, count=200, seed=0):
    """Rows of score_pairs: the better answer is shorter in 65 of 100. judge(rng, tokens, better) -> score."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        short, more = rng.integers(10, 40), rng.integers(0, 4 if i % 3 == 0 else 20)  # a third of about equal length
        tokens = [short, short + more] if rng.random() < 0.65 else [short + more, short]
        chosen, rejected = (judge(rng, n, better) for n, better in zip(tokens, (True, False)))
        floors = {"shorter answer": float(tokens[1] - tokens[0]), "refusal phrase": float(rng.integers(-1, 2))}
        row = {"id": f"item-{i}", "chosen": chosen, "rejected": rejected}
        rows.append(row | {"tokens": [int(n) for n in tokens], "floors": floors})
    return rows


def knows(rng, tokens, better):
    return better + 0.5 * rng.normal()


def counts_words(rng, tokens, better):
    return -float(tokens)


def rivals(pairs, below):
    """Scores of answers that lie `below` those of the data."""
    return {pair["id"]: pair["chosen"] - below for pair in pairs}


def decided(pairs, **others):
    return gate.decide(gate.checks(pairs, others, DRAWS))


def failed(verdict):
    return [(row["on"], row["against"]) for row in verdict["checks"] if row["low"] is None or row["low"] <= 0]


def test_a_judge_that_knows_passes():
    pairs = made_pairs(knows)
    verdict = decided(pairs, base=rivals(pairs, 0.4), refuse=rivals(pairs, 0.7))
    assert verdict["passed"] and verdict["reasons"] == [] and len(verdict["checks"]) == 6
    row = verdict["checks"][0]
    right = np.array([(pair["chosen"] > pair["rejected"]) for pair in pairs], float)
    short = np.array([np.sign(pair["floors"]["shorter answer"]) / 2 + 0.5 for pair in pairs])
    assert row["judge"] == pytest.approx(right.mean()) and row["other"] == pytest.approx(short.mean())
    half = 1.96 * (right - short).std() / len(pairs) ** 0.5  # the normal approximation
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.15)
    assert row["difference"] == pytest.approx((right - short).mean()) and row["low"] < row["difference"] < row["high"]


def test_a_judge_that_counts_words_fails_by_length():
    verdict = decided(made_pairs(counts_words))
    assert not verdict["passed"] and ("held-out pairs", "shorter answer") in failed(verdict)
    assert 'on held-out pairs it is not shown to beat the rule "shorter answer" (0.6' in verdict["reasons"][0]


def test_a_judge_that_knows_nothing_of_equal_lengths_fails_there():
    """It beats every rule on all pairs, but only by what lengths give away."""

    def judge(rng, tokens, better):
        return better * 5.0 + 0.5 * rng.normal()

    pairs = made_pairs(judge)
    assert decided(pairs)["passed"]
    rng = np.random.default_rng(1)
    for pair in pairs:
        if abs(pair["tokens"][0] - pair["tokens"][1]) <= gate.MATCHED:
            pair["chosen"], pair["rejected"] = rng.normal(size=2)
    on = {on for on, _ in failed(decided(pairs))}
    assert on == {"pairs of about equal length"}


def test_a_judge_that_likes_refusals_or_the_bases_answers_fails():
    pairs = made_pairs(knows)
    verdict = decided(pairs, base=rivals(pairs, 0.4), refuse=rivals(pairs, -0.2))
    assert failed(verdict) == [("the data's answers", "refuse")] and not verdict["passed"]
    (reason,) = verdict["reasons"]
    assert reason.startswith("it does not score the data's answers above refuse (") and "on 200 items" in reason
    assert failed(decided(pairs, base=rivals(pairs, 0.0))) == [("the data's answers", "base")]


def test_what_cannot_be_measured_is_not_passed():
    assert not decided([])["passed"] and "too few" in decided([])["reasons"][0]
    few = decided(made_pairs(knows, count=gate.FEWEST - 1))
    assert not few["passed"] and {row["low"] for row in few["checks"]} == {None}
    assert not gate.decide([])["passed"]
    pairs = made_pairs(knows)
    assert failed(decided(pairs, refuse={"another item": 1.0})) == [("the data's answers", "refuse")]
    for pair in pairs:
        pair["chosen"] = float("nan")
    assert not decided(pairs)["passed"]


def test_scores_and_floors_are_those_of_the_pairs(micro_model):
    _, tokenizer = micro_model
    records = tasks.records("safety", "test", 12)
    records[3] |= {"rejected": records[3]["response"]}  # no pair
    asked = []

    def score(rows, answers):
        asked.extend(zip((row["id"] for row in rows), answers, strict=True))
        return torch.tensor([float(len(ids)) for ids in answers])

    rows = gate.score_pairs(score, records, tokenizer, "safety", 512)
    pairs = data.encode_pairs(records, tokenizer, 512)[0]
    assert [row["id"] for row in rows] == [pair["id"] for pair in pairs] and len(rows) == 11
    for row, pair in zip(rows, pairs, strict=True):
        assert [row["chosen"], row["rejected"]] == row["tokens"]  # as the judge here counts tokens
        assert row["floors"]["shorter answer"] == row["tokens"][1] - row["tokens"][0]
        assert {"refusal phrase", "fewer toxic words", "shorter answer"} == set(row["floors"])
        texts = [chat.decode(tokenizer, ids) for name, ids in asked if name == row["id"]]
        assert texts == list(pair["texts"])
    assert gate.score_pairs(score, records[3:4], tokenizer, "safety", 512) == []


def test_the_items_own_pairs_come_first_and_those_of_val_last(tmp_path, micro_model):
    records = tasks.records("safety", "test", 40)
    items, _ = measure.items(records, micro_model[1], 100, 6, 0)
    records[0] |= {"rejected": None}
    cfg = config.load_config(None, {"dataset_path": str(tmp_path)})  # holds no val
    held_out = gate.held_out_records(items, records, cfg)
    assert {record["id"] for record in held_out[:6]} >= {item.id for item in items} - {records[0]["id"]}
    assert len({record["id"] for record in held_out}) == len(held_out) == 39
    folder = inputs.write_data(tmp_path / "data", "safety", val=7)
    for split, count in (("test", 46), ("val", 39)):
        cfg = config.load_config(None, {"dataset_path": str(folder), "evaluation.split": split})
        more = gate.held_out_records(items, records, cfg)
        assert more[:39] == held_out and len({record["id"] for record in more}) == len(more) == count
