"""benchmarks/laptop.py: a run ends at the first evaluation that reaches its target, and only updates count."""

import argparse
import json

import pytest

import train_sft
from benchmarks import laptop
from common import log

FLAGS = "--training.max_steps 4 --training.eval_interval 2 --training.batch_size 2"


@pytest.fixture
def event(tmp_path, monkeypatch, one_thread):
    """(result, records) of the SFT event with a target, where held-out losses are 3, 2 and 1."""
    monkeypatch.setattr(log, "save_picture", lambda path, draw: None)

    def run(target):
        held_out = [3.0, 2.0, 1.0]
        monkeypatch.setattr(train_sft, "evaluate", lambda *_: {"eval/loss": held_out.pop(0)})
        monkeypatch.setitem(laptop.TINY, "sft", ("train_sft", "sft_lora_270m", "eval/loss", target, FLAGS))
        work = tmp_path / str(target)
        args = argparse.Namespace(base=None, data=None, dtype=None, more=[], work=str(work))
        result = laptop.run_event("sft", args)
        return result, [json.loads(line) for line in (work / "sft" / "metrics.jsonl").read_text().splitlines()]

    return run


def test_a_run_ends_where_it_reaches_the_target(event):
    result, records = event(0.5)
    assert "steps" not in result and result["seconds"] is None and [r["step"] for r in records] == [0, 1, 2, 3, 4]
    assert [value for _, value in result["curve"]] == [3.0, 2.0, 1.0]
    assert result["curve"][2][0] == pytest.approx(sum(r.get("seconds", 0) for r in records), abs=0.1)

    result, records = event(2.0)
    assert result["steps"] == 2 and [record["step"] for record in records] == [0, 1, 2]
    assert result["seconds"] == pytest.approx(records[0]["seconds"] + records[1]["seconds"])
    assert result["peak_gb"] > 0.1
