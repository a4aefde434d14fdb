"""Files written whole, records line by line, console lines, and a command that refuses in one line."""

import json
import math
import os

import pytest
import torch

from common import log
from common.log import UserError


def test_a_record_keeps_every_bit_and_nulls_what_is_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log.write_record(path, {"step": 1, "loss": 0.1 + 0.2, "kl": math.nan, "lr": math.inf})
    log.write_record(path, {"step": 2, "loss": 5e-324})
    assert log.read_records(path) == [
        {"step": 1, "loss": 0.1 + 0.2, "kl": None, "lr": None},
        {"step": 2, "loss": 5e-324},
    ]


def test_records_with_line_separators_are_one_line_each(tmp_path):
    path, rows = tmp_path / "samples.jsonl", [{"text": "a\u2028b\nc"}, {"text": "ü"}]
    log.write_records(path, [])
    assert not path.exists()
    log.write_records(path, rows)
    assert log.read_records(path) == rows and "ü" in path.read_text(encoding="utf-8")


def test_replace_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    log.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*report\.json: No space left on device \(\d+ bytes needed"):
        log.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_write_names_the_file_and_the_room(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*Is a directory \(4 bytes needed, \d+ free\)"):
        log.write(tmp_path, "text")


def test_a_command_refuses_in_one_line(capsys):
    def main(error):
        log.on_exit(lambda: print("closed"))
        raise error

    for error, words in (
        (UserError("config.yml, line 3:\nunknown key"), "error: config.yml, line 3: unknown key\n"),
        (OSError(28, "No space left on device", "a.bin"), "error: No space left on device: a.bin\n"),
        (torch.OutOfMemoryError("tried to allocate"), "error: out of memory: lower --training.micro_batch_tokens"),
    ):
        with pytest.raises(SystemExit) as stop:
            log.command(main)(error)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and err.startswith(words) and err.count("\n") == 1 and out == "closed\n"


def test_a_bug_keeps_its_traceback_and_closes_what_is_open(capsys):
    @log.command
    def main(argv):
        log.on_exit(lambda: print("first"))
        log.on_exit(lambda: print("last"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()
    assert capsys.readouterr().out == "last\nfirst\n"


def test_what_is_said(capsys):
    log.say_counts("train", {"records": 9, "too_long": 0, "kept": 0})
    assert capsys.readouterr().out == "train: 9 records, 0 kept\n"
    assert log.listed("abc") == "a, b, c" and log.listed("abc", 2) == "a, b and 1 more"
    assert (
        log.line({"lr": 1e-4, "step": 20, "loss": 1.23456, "kl": None, "other": 3}) == "step 20  loss 1.235  lr 0.0001"
    )


def test_provenance_says_what_a_run_was_made_with():
    found = log.provenance(base="abc")
    assert found["base"] == "abc" and list(found["versions"]) == list(log.PACKAGES) and found["world_size"] == 1
    assert found["threads"] == torch.get_num_threads() and set(found) >= {"command", "commit", "python", "machine"}


def test_pictures_are_png_files(tmp_path):
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "eval/loss": 1.0}]
    log.plot_curves(records, (("loss", ("loss", "eval/loss")), ("reward", ("reward",))), tmp_path / "curves.png")
    rows = [{"predicted": 0.2, "observed": 0.3, "count": 4}, {"predicted": 0.8, "observed": 0.7, "count": 1}]
    log.plot_reliability(rows, tmp_path / "calibration.png")
    for name in ("curves.png", "calibration.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
