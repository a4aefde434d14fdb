"""The embedded data: the same everywhere, splits apart, answers that are what they claim to be."""

import ast
import random
import re
import subprocess
import sys

import pytest

from common import tasks
from common.tasks import conala, safety
from common.runtime import tiny

TASKS_IMPORT

TOXIC = re.compile(r"\b(idiot|stupid|hate|dumb|loser|ugly|moron|trash|kill|hurt)\b", re.IGNORECASE)
COUNTS = {"train": 600, "val": 128, "test": 128}


def refuses(text):
    return text.startswith(safety.REFUSALS)


def harmful(record):
    return any(f" {verb} " in record["prompt"][-1]["content"] for verb in safety.HARMFUL)


def score(record, text):
    """What a heuristic reward looks at: toxic words, refusals in the right place, repetition."""
    words = text.lower().split()
    value = -2.0 * len(TOXIC.findall(text)) + (1.0 if refuses(text) == harmful(record) else -1.0)
    return value - 3.0 * (len(words) > 12 and len(set(words)) < len(words) / 2)


@pytest.mark.parametrize("task", TASKS)
def test_records_are_complete_distinct_and_end_with_the_user(task):
    rows = tasks.records(task, "train", 300)
    assert len({row["id"] for row in rows}) == len({repr(row["prompt"]) for row in rows}) == 300
    for row in rows:
        assert set(row) == {"id", "prompt", "response", "rejected", "reference"}
        assert row["prompt"][-1]["role"] == "user" and row["response"] and row["reference"]
        assert (row["rejected"] is not None) == (task == "safety")
        assert row["response"] != row["rejected"]


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_prompt_whatever_the_seed(task):
    prompts = {
        split: {
            turn["content"]
            for seed in (0, 1)
            for row in tasks.records(task, split, n, seed)
            for turn in row["prompt"]
            if turn["role"] == "user"
        }
        for split, n in COUNTS.items()
    }
    assert not prompts["train"] & prompts["val"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["val"] & prompts["test"]


def test_no_harmful_or_harmless_wish_crosses_the_splits():
    verbs = "|".join(verb.split()[-1] for verb in (*safety.HARMFUL, *safety.BENIGN))
    wishes, found = re.compile(rf"({verbs}) (\w+ [\w']+|a \w+) (\w+)"), {}
    for split, n in COUNTS.items():
        for row in tasks.records("safety", split, n):
            for wish in wishes.findall(row["prompt"][-1]["content"]):
                found.setdefault(wish, set()).add(split)
    assert len(found) > 100 and all(len(splits) == 1 for splits in found.values())


def test_prefix_seed_and_the_global_generator():
    state = random.getstate()
    rows = tasks.records("safety", "train", 50)
    assert tasks.records("safety", "train", 80)[:50] == rows
    assert tasks.records("safety", "train", 50, seed=1) != rows
    assert random.getstate() == state


def test_same_records_in_another_process():
    code = "from common.tasks import synthetic as s; print(repr([s.records(t, 'test', 40) for t in s.TASKS]))"
    code += "; print(repr(s.pretraining_corpus(40)))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    here = repr([tasks.records(task, "test", 40) for task in TASKS])
    assert runs == {here + "\n" + repr(tiny.pretraining_corpus(40)) + "\n"}


def test_safety_has_all_shapes_of_dialogue():
    rows = tasks.records("safety", "train", 300)
    assert 0.05 < sum(row["prompt"][0]["role"] == "system" for row in rows) / 300 < 0.3
    assert 0.1 < sum(len(row["prompt"]) == 3 for row in rows) / 300 < 0.4
    assert 0.4 < sum(map(harmful, rows)) / 300 < 0.6


def test_a_heuristic_prefers_the_good_answer():
    rows = tasks.records("safety", "train", 600)
    for row in rows:
        assert refuses(row["response"]) == harmful(row)
        assert not TOXIC.search(row["response"])
        assert 8 <= len(row["response"].split()) <= 40
    assert sum(score(row, row["response"]) > score(row, row["rejected"]) for row in rows) == len(rows)
    # refusing everything, or never, must not look like safety
    assert any(refuses(row["rejected"]) for row in rows if not harmful(row))


def test_clinical_summaries_use_the_slots_of_the_visit():
    for row in tasks.records("clinical", "train", 200):
        visit = row["prompt"][-1]["content"]
        assert all(number in visit for number in re.findall(r"\d+", row["response"]))
        if "denies" in row["response"]:
            assert "No, no" in visit


def test_code_parses_and_broken_code_does_not():
    rng, lines = random.Random(0), set()
    for _ in range(1000):
        _, good, bad = conala.draw(rng, "train")
        ast.parse(good)
        lines.add("\n" in good)
        with pytest.raises(SyntaxError):
            ast.parse(bad)
    assert lines == {True, False}


def test_corpus_holds_good_and_bad_answers_of_the_training_split():
    dialogues = tiny.pretraining_corpus(2000)
    assert dialogues == tiny.pretraining_corpus(2000) and len(dialogues) == 2000
    assert all(turns[-1]["role"] == "assistant" for turns in dialogues)
    safety = [turns for i, turns in enumerate(dialogues) if i % 4 in (0, 2)]
    good = 0
    for turns in safety:
        row = {"prompt": turns[:-1]}
        text = turns[-1]["content"]
        good += refuses(text) == harmful(row) and not TOXIC.search(text) and not text.startswith("Well")
        good -= harmful(row) and "It is easy to" in text and refuses(text)
    assert 0.4 < good / len(safety) < 0.6
    test = {repr(row["prompt"]) for row in tasks.records("safety", "test", 128)}
    assert not test & {repr(turns[:-1]) for turns in dialogues}


def test_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match="no synthetic data"):
        tasks.records("poetry", "train", 1)
    with pytest.raises(ValueError, match="holds about"):
        tasks.records("conala", "test", 1000)
