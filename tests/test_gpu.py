"""benchmarks/gpu.py on the CPU at tiny shapes: every row's code runs, and a row that goes wrong costs no other."""

import importlib.util
import time

import pytest

from benchmarks import gpu

pytestmark = pytest.mark.usefixtures("one_thread", "no_reports")


@pytest.fixture
def no_reports(monkeypatch):
    """As on a machine without scipy and matplotlib, which is also quicker."""
    find_spec = importlib.util.find_spec
    missing = {"scipy", "matplotlib", "bitsandbytes", "trl", "pytest"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    for module, name in ((gpu.prompts, "report"), (gpu.pairs, "report"), (gpu.train_reward, "report")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back after the test
    monkeypatch.setattr(gpu.train_reward, "write_report", gpu.train_reward.write_report)
    monkeypatch.setattr(gpu.log, "save_picture", gpu.log.save_picture)


def rehearse(tmp_path, *more):
    """(exit status, {row: result} as printed, the report)"""
    report = tmp_path / "report.md"
    status = gpu.main(["--device", "cpu", "--small", "--report", str(report), *more])
    return status, report.read_text()


def test_every_row_runs(tmp_path, capsys, monkeypatch):
    """With one trainer in place of all, and without the server."""
    monkeypatch.setattr(gpu, "ALGORITHMS", ("grpo",))
    monkeypatch.setattr(gpu, "KILLED", ("sft",))
    rows = gpu.all_rows
    monkeypatch.setattr(gpu, "all_rows", lambda setting: [row for row in rows(setting) if row.name != "serving"])
    status, text = rehearse(tmp_path)
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    missing = {name: result for name, result in said.items() if not result.startswith("done")}
    beside_trl = {"trl-sft", "trl-dpo", "trl-grpo"}
    assert status == 0 and set(missing) == {"micro-sft-qlora", "tests"} | beside_trl, text
    assert all("not installed" in result for result in missing.values())
    assert text.count("| equal |") == 1 and "different" not in text and "exceeded" not in text
    assert len([line for line in text.splitlines() if line.startswith("| micro ")]) == 2 + 4 + 2 + 2
    assert not list(tmp_path.glob("report.work/base-*"))


def test_a_failing_row_costs_no_other(tmp_path, capsys, monkeypatch):
    def broken(setting):
        """Fails."""
        raise ZeroDivisionError("on purpose")

    def hanging(setting):
        """Hangs."""
        time.sleep(60)

    titled = [
        ("Bases", gpu.make_bases, 60),
        ("Broken", broken, 9),
        ("Hanging", hanging, 0.3),
        ("Machine", gpu.machine, 9),
    ]
    monkeypatch.setattr(gpu, "all_rows", lambda _: [gpu.Row(t, t.lower(), limit, f) for t, f, limit in titled])
    status, text = rehearse(tmp_path)
    said = capsys.readouterr().out
    assert status == 1 and "broken: failed" in said and "hanging: not within 2 s" in said and "machine: done" in said
    assert "ZeroDivisionError: on purpose" in text and "GB/s" in text
