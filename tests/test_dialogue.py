"""Dialogue: own data of any kind, with and without a reference; nothing is assumed of it."""

import json

import pytest

from common import data, rewards, tasks
from common.evaluation import metrics
from common.log import UserError

ASKED = tasks.question("How are you?")


def test_reward_with_and_without_a_reference():
    forty, twenty = " ".join(f"w{i}" for i in range(40)), " ".join(f"w{i}" for i in range(20))
    score = lambda text, reference=None: rewards.heuristic_reward("dialogue", ASKED, text, reference)[1]  # noqa: E731
    assert score(forty) == {"length": 1, "repetition": 1} and score(twenty)["length"] == pytest.approx(0.5)
    assert score(twenty, twenty)["length"] == 1 and score("") == {"length": 0, "repetition": 0}
    assert score("a b c d " * 10)["repetition"] < 0.2


def test_it_needs_data_and_no_reference(tmp_path):
    for debug in (True, False):
        with pytest.raises(UserError, match="dialogue has no generated records: name your data with --dataset_path"):
            data.load("dialogue", None, "train", debug, 0)
    row = {"id": "a", "prompt": ASKED, "response": "Fine."}
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    [record] = data.load("dialogue", tmp_path, "train", True, 0)
    assert record == row | {"rejected": None, "reference": None}
    counts = metrics.score("dialogue", [record], ["Fine, thank you."])
    assert set(counts) == {"empty", "repetition", "distinct_starts", "distinct_1", "distinct_2"}
    assert tasks.load("dialogue").headline[0] in metrics.ANY_TASK
