"""Trackers: what they are sent, that a run goes on at them where it did here, and that their failures end no run."""

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_sft
from common import config, log
from common.log import UserError
from common.runtime import checkpoint, tracker
from tests import checks, inputs, processes
from tests.faults import inject, trainers

few, settings, straight = trainers.fixtures("sft")


def fake_wandb(calls, login=True, failing=()):
    """A module of the name that notes what is called, in `calls`, and fails in the functions named."""
    module = ModuleType("wandb")

    def call(name, result):
        def function(*arguments, **more):
            calls.append((name, arguments, more))
            if name in failing:
                raise RuntimeError(f"{name} failed")
            return result

        return function

    module.login = call("login", login)
    module.init = call("init", SimpleNamespace(log=call("log", None), finish=call("finish", None)))
    return module


def logging(**changes):
    return config.load_config(None, {f"logging.{key}": value for key, value in changes.items()}).logging


def test_none_sends_nothing(tmp_path):
    tracker.check(logging())
    tracker.Tracker(logging(), tmp_path, 0, None, {}).send({"step": 1, "loss": 2.0})
    assert not any(tmp_path.iterdir())


def test_the_old_key_still_works(tmp_path):
    path = tmp_path / "old.yml"
    path.write_text("logging:\n  wandb: true\n")
    cfg = config.load_config(path)
    assert (cfg.logging.tracker, cfg.logging.wandb) == ("wandb", False)
    assert config.load_config(path, {"logging.tracker": "none"}).logging.tracker == "none"
    path.write_text("logging:\n  wandb: false\n  tracker: tensorboard\n")
    assert config.load_config(path).logging.tracker == "tensorboard"


def test_wandb_gets_the_numbers_and_goes_on_with_its_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))

    @log.command
    def main(argv):
        sent = tracker.Tracker(logging(tracker="wandb", project="mine"), tmp_path / "run", 3, "abc", {"seed": 1})
        sent.send({"step": 3, "loss": 2.0, "warning": "odd", "eval/loss": None})

    main()
    init = ("init", (), {"project": "mine", "name": "run", "id": "abc", "resume": "allow", "config": {"seed": 1}})
    assert calls == [init, ("log", ({"loss": 2.0},), {"step": 3}), ("finish", (), {})]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_failing_tracker_warns_once(tmp_path, monkeypatch, capsys, failing):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls, failing=(failing,)))

    @log.command
    def main(argv):
        sent = tracker.Tracker(logging(tracker="wandb"), tmp_path, 0, "abc", {})
        for step in range(3):
            sent.send({"step": step, "loss": 2.0})

    main()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith(f"warning: logging.tracker: RuntimeError: {failing} failed"), out
    assert [name for name, *_ in calls].count("log") == {"init": 0, "log": 1, "finish": 3}[failing]


def test_not_logged_in_is_one_line_before_the_model(tmp_path, monkeypatch, settings):
    """D16, in a whole run: whether login says no or raises; offline nobody asks."""
    for login, failing, mode, refused in ((False, (), None, 2), (True, ("login",), None, 2), (False, (), "offline", 0)):
        monkeypatch.setitem(sys.modules, "wandb", fake_wandb([], login, failing))
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if mode:
            monkeypatch.setenv("WANDB_MODE", mode)
        argv = settings(tmp_path, "--logging.wandb", "true", "--training.max_steps", 1)
        status, out, err = processes.run(train_sft.main, tmp_path, argv)
        assert status == refused, err
        if refused:
            assert err.startswith("error: logging.tracker: not logged in to wandb") and err.count("\n") == 1, err
            assert "WANDB_MODE=offline" in err and "parameters" not in out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("asks", [input, lambda: sys.stdin.isatty() and input()])
def test_no_key_is_asked_for_on_a_terminal(tmp_path, monkeypatch, asks):
    """wandb's login waits there for a key: a run begun over ssh would hang."""
    module = fake_wandb([])
    module.login = lambda: asks() and True
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    ours, theirs = os.openpty()  # nobody types
    with open(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        with pytest.raises(UserError, match="not logged in to wandb"):
            tracker.check(logging(tracker="wandb"))
        assert sys.stdin is terminal
    os.close(ours)


def test_what_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logging\.tracker: wandb is not installed: pip install wandb"):
        tracker.check(logging(tracker="wandb"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        tracker.check(logging(tracker="tensorboard"))


def test_tensorboard_holds_the_records_of_a_resumed_run(tmp_path, settings, straight):
    """Stopped and gone on: its file, read back, has every number of metrics.jsonl once, and the run is the same."""
    argv = settings(tmp_path, "--logging.tracker", "tensorboard")
    assert processes.run(train_sft.main, tmp_path, argv, inject.at_step(7, processes.terminate))[0] == 1
    processes.train(train_sft.main, tmp_path, argv)
    written = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    records = checks.lines(tmp_path / "run")
    for name in ("loss", "eval/loss", "lr", "tokens_seen"):
        sent = [(event.step, event.value) for event in written.Scalars(name)]
        kept = [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in records if name in record]
        assert sent == kept and len(sent) > 2, name
    assert checks.records(tmp_path / "run") == checks.records(straight())
    weights = [
        checkpoint.sha256(folder / "final" / inputs.WEIGHTS["lora"]) for folder in (tmp_path / "run", straight())
    ]
    assert weights[0] == weights[1]


def test_the_id_is_kept_with_the_run(tmp_path, monkeypatch, settings):
    """A run that goes on names the id that it had; logging.run_id names another."""
    calls = tmp_path / "calls"
    module = fake_wandb([])
    module.init = lambda **more: calls.open("a").write(more["id"] + "\n") and SimpleNamespace(log=print, finish=print)
    monkeypatch.setitem(sys.modules, "wandb", module)
    argv = settings(tmp_path, "--logging.tracker", "wandb")
    assert processes.run(train_sft.main, tmp_path, argv, inject.at_step(7, processes.terminate))[0] == 1
    processes.train(train_sft.main, tmp_path, argv)
    first, second = calls.read_text().split()
    assert first == second and len(first) == 12
    processes.train(train_sft.main, tmp_path, [*argv, "--logging.run_id", "mine", "--training.max_steps", 13])
    assert calls.read_text().split()[2:] == ["mine"]
