"""Files written whole, records line by line, console lines, and a command that refuses in one line."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import chat, data, log, tasks
from common.log import UserError
from common.runtime import checkpoint

ROOT = Path(log.__file__).resolve().parents[1]


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


def test_a_last_record_that_a_kill_cut_off_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    assert log.read_records(path) == []
    log.write_record(path, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
    assert log.read_records(path) == [{"step": 1}]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: a line is no valid JSON"):
        log.read_records(path)


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


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO, errno.ENOSPC])
def test_a_disk_without_fsync_is_written_one_that_fails_is_not(tmp_path, monkeypatch, number):
    """D14: some network disks answer EINVAL."""

    def fail(fd):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if number in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
        log.write_json(tmp_path / "report.json", {"a": 1})
        checkpoint.fsync(tmp_path)
    else:
        with pytest.raises(UserError):
            log.write_json(tmp_path / "report.json", {"a": 1})
        with pytest.raises(OSError):
            checkpoint.fsync(tmp_path)


def test_write_names_the_file_and_the_room(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*Is a directory \(4 bytes needed, \d+ free\)"):
        log.write(tmp_path, "text")
    for write in (log.write, log.replace):
        with pytest.raises(UserError, match=r"cannot write .*a\.txt: No such file .* \(4 bytes needed, \d+ free\)"):
            write(tmp_path / "none" / "none" / "a.txt", "text")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), ZeroDivisionError])
def test_replace_that_is_stopped_leaves_no_draft(tmp_path, monkeypatch, error):
    def stop(*names):
        raise error

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises((KeyboardInterrupt, UserError, ZeroDivisionError)):
        log.replace(tmp_path / "a.txt", "text")
    assert not list(tmp_path.iterdir())


def test_replace_below_a_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*: Not a directory"):
        log.replace(tmp_path / "a.txt" / "b.txt", "text")


def test_replace_keeps_line_ends(tmp_path):
    log.replace(tmp_path / "a.csv", "a\r\nb\nc\r")
    assert (tmp_path / "a.csv").read_bytes() == b"a\r\nb\nc\r"


def out_of_memory():
    """A GPU's, the CPU allocator's own, that of mps, and Python's."""
    yield torch.OutOfMemoryError("tried to allocate")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert type(caught.value) is RuntimeError and "DefaultCPUAllocator" in str(caught.value)
    yield caught.value
    yield RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")
    yield MemoryError()


def test_a_command_refuses_in_one_line(capsys):
    def main(error):
        log.on_exit(lambda: print("closed"))
        raise error

    for error, words in (
        (UserError("config.yml, line 3:\nunknown key"), "error: config.yml, line 3: unknown key\n"),
        (OSError(28, "No space left on device", "a.bin"), "error: No space left on device: a.bin\n"),
        (OSError(28, "No space left on device"), "error: No space left on device\n"),
        *((error, "error: out of memory: lower --training.micro_batch_tokens") for error in out_of_memory()),
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


def test_counts_are_said_in_words(capsys):
    counts = {
        "records": 300,
        "empty_response": 0,
        "no_user_turn": 3,
        "truncated": 32,
        "system_folded": 1200,
        "kept": 246,
    }
    log.say_counts("train", counts, 128)
    log.say_counts("val", {"records": 9, "prompt_too_long": 9, "kept": 0})
    assert capsys.readouterr().out == (
        "train: 246 kept, 3 left out (no user turn), 32 cut at 128 tokens, "
        "1,200 system prompts merged into the user's turn\nval: 0 kept, 9 left out (prompt too long)\n"
    )
    assert log.listed("abc") == "a, b, c" and log.listed("abc", 2) == "a, b and 1 more"


def test_every_count_of_the_data_has_words(tokenizer):
    """No name of a count reaches the console as it is: what chat and data count of real dialogues has a text."""
    records = tasks.records("safety", "train", 200)
    _, counts = data.encode_records(records, tokenizer, 60)
    assert counts["system_folded"] and counts["truncated"] and {*chat.REPAIRS} <= {*log.COUNTS}


def test_a_table_is_aligned_under_one_header(capsys):
    table = log.Table()

    def said(record):
        table.say(record)
        return capsys.readouterr().out.splitlines()

    first = {"step": 0, "loss": 2.34567, "eval/loss": 2.0, "lr": 3.8234e-5, "tokens_per_second": 12345.6, "other": 3}
    header, row = said(first)
    assert header == " step      loss  val loss        lr  grad norm  tokens/s"
    assert row == "    0     2.346         2  3.82e-05                12346"
    (row,) = said({"step": 5, "loss": -1e-5, "eval/loss": None, "grad_norm": 0.25, "lr": 1e-4})
    assert row == "    5    -1e-05              0.0001       0.25"
    header, row = said({"step": 123456, "eval/accuracy": 0.5})
    assert "val loss  val accuracy        lr" in header and row.split() == ["123456", "0.5"]
    assert len(said(first)) == 1
    for value in (1.23456e-7, 999.96, 1e6, 0.0000123456, 12.3456, 0.123456):
        cell = log._cell(value)
        assert len(cell) <= 8 and float(cell) == pytest.approx(value, rel=5e-3)


def test_a_warning_is_said_once_a_command(capsys):
    @log.command
    def main(argv):
        for words in ("odd", "odd", "even", "odd"):
            log.warn(words)

    main()
    assert capsys.readouterr().out == "warning: odd\nwarning: even\n"
    main()
    assert capsys.readouterr().out.count("odd") == 1


def test_a_warning_that_nobody_saw_is_said_again(capsys):
    """As when train_staged.py times a step in silence, before the stage itself runs."""

    @log.command
    def main(argv):
        log.warn("before")
        with log.silent():
            log.say("unseen")
            log.warn("odd")
        for words in ("before", "odd"):
            log.warn(words)

    main()
    assert capsys.readouterr().out == "warning: before\nwarning: odd\n"


def test_a_system_that_counts_no_peak_ends_no_run(monkeypatch):
    def refused(path, text):
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(log.Path, "write_text", refused)
    log.reset_peak_memory()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("script", ["log", "data/download_datasets.py"])
def test_any_text_is_printed_on_any_console(encoding, script):
    """D18: what the console's encoding lacks is printed as an escape, on stdout and in the one line of a refusal."""
    if script == "log":
        lines = "log.say('中 ü'); raise log.UserError('no folder 中ü')"
        words = [sys.executable, "-c", f"from common import log; log.command(lambda argv: exec({lines!r}))()"]
        outs, errors = {"ascii": b"\\u4e2d \\xfc\n", "latin-1": b"\\u4e2d \xfc\n"}, "error: no folder \\u4e2d\\xfc"
    else:
        words, outs = [sys.executable, script, "--dataset", "conala", "--source", "中ü"], {"ascii": b"", "latin-1": b""}
        errors = "error: --source \\u4e2d\\xfc: expected a folder"
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=False
    )
    assert done.returncode == 2 and done.stdout == outs[encoding], done
    shown = done.stderr.decode(encoding).replace("ü", "\\xfc")
    assert shown.startswith(errors) and shown.count("\n") == 1, done


def test_provenance_says_what_a_run_was_made_with():
    found = log.provenance(base="abc")
    assert found["base"] == "abc" and list(found["versions"]) == list(log.PACKAGES) and found["world_size"] == 1
    assert found["threads"] == torch.get_num_threads() and set(found) >= {"command", "commit", "python", "machine"}


def test_pictures_are_png_files(tmp_path):
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "eval/loss": 1.0}]
    log.plot_curves(records, (("loss", ("loss", "eval/loss")), ("reward", ("reward",))), tmp_path / "curves.png")
    rows = [{"predicted": 0.2, "observed": 0.3, "count": 4}, {"predicted": 0.8, "observed": 0.7, "count": 1}]
    log.save_picture(tmp_path / "calibration.png", lambda: log.reliability_diagram(rows))
    for name in ("curves.png", "calibration.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_notebooks_backend_does_not_matter(tmp_path):
    """D10: matplotlib refuses the name of a notebook's backend, and pyplot, which belongs to it, stays out."""
    code = (
        "import sys; from common import log\n"
        "@log.command\ndef main(argv):\n"
        f"    log.plot_curves([{{'step': 1, 'loss': 2.0}}], (('loss', ('loss',)),), {str(tmp_path / 'curves.png')!r})\n"
        "main(); assert 'matplotlib.pyplot' not in sys.modules"
    )
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | notebook, capture_output=True, check=False
    )
    assert done.returncode == 0 and not done.stdout, done
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_picture_is_a_warning_once(tmp_path, capsys):
    path, records = tmp_path / "none" / "curves.png", [{"step": 1, "loss": 2.0}]

    @log.command
    def main(argv):
        for _ in range(3):
            log.plot_curves(records, (("loss", ("loss",)),), path)

    main()
    out = capsys.readouterr().out
    assert out.startswith(f"warning: {path} was not drawn: FileNotFoundError") and out.count("\n") == 1
    log.plot_curves(records, (("loss", ("loss",)),), tmp_path / "curves.png")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]  # no draft is left


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    versions = log.provenance()["versions"]
    assert "bitsandbytes" not in versions and versions["torch"].startswith("2.")
