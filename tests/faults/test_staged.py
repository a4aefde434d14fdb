"""R01, R03, R13 of train_staged.py: stopped or killed in any stage, it goes on to the same bits."""

import contextlib
import functools
import os
import signal
from pathlib import Path

import pytest

import train_staged
from common.runtime import checkpoint
from tests import checks, processes
from tests.faults import trainers

MAIN = train_staged.main
train, run = (functools.partial(each, MAIN) for each in (processes.train, processes.run))


@pytest.fixture(scope="module")
def settings(tmp_path_factory, micro_folder):
    few = trainers.write_data(tmp_path_factory.mktemp("data") / "few", "staged")
    return trainers.settings("staged", micro_folder, few)


def in_stage(name, act):
    """A body that calls act() after the first checkpoint of a stage."""

    def body(main, argv):
        real, left = checkpoint.commit, [name]

        @contextlib.contextmanager
        def commit(final, *more):
            with real(final, *more) as temp:
                yield temp
            if final.parent.name in left and final.name.startswith("step-"):
                left.clear()  # the save that a signal brings must not send another
                act()

        checkpoint.commit = commit
        processes.call(main, argv)

    return body


def before_the_note(main, argv):
    """A body that dies when the first stage is done but not yet noted as done."""
    real = os.replace

    def replace(source, target):
        if Path(target).name == "stages.json":
            os._exit(9)
        real(source, target)

    os.replace = replace
    processes.call(main, argv)


def test_R01_R03_R13_stopped_and_killed_in_every_stage(tmp_path, settings):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    train(whole, settings(whole))
    argv = settings(cut)
    status, _, err = run(cut, argv, in_stage("sft", processes.terminate))
    assert status == 1 and "run the same command again" in err, err
    assert run(cut, argv, in_stage("sft", lambda: os.kill(os.getpid(), signal.SIGKILL)))[0] == -signal.SIGKILL
    assert run(cut, argv, before_the_note)[0] == 9
    status, out, _ = run(cut, argv, in_stage("rl", lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert status == -signal.SIGKILL and not (cut / "run" / "rl" / "final").exists()
    status, out, err = run(cut, argv)
    assert status == 0 and not err and out.count("finished before") == 1, (out, err)
    for name in ("sft", "rl"):
        checks.assert_same_run(cut / "run" / name, whole / "run" / name)
        assert "resuming" in out or name == "sft"
    trainers.same_files(cut / "run" / "rl", whole / "run" / "rl")
    assert not [*(cut / "run").rglob("*.tmp*")]


def test_R09_a_finished_stage_takes_no_other_settings(tmp_path, settings):
    out, argv = tmp_path / "run", settings(tmp_path)
    train(tmp_path, argv)
    before = checks.snapshot(out)
    words = f"{out}/sft finished with training.learning_rate ", ", now 1e-05: choose another --logging.run_name"
    processes.refused(MAIN, tmp_path, [*argv, "--training.learning_rate", 1e-5], *words)
    assert checks.snapshot(out) == before
    status, text, err = run(tmp_path, [*argv, "--training.resume_changed", "true"])  # free, and nothing to do
    assert status == 0 and text.count("finished before") == 2, (text, err)
    before, text = checks.snapshot(out / "rl"), (out / "config.yml").read_text()
    status, _, err = run(tmp_path, [*argv, "--rl.learning_rate", 1e-5])
    assert status == 2 and f"error: {out}/rl finished with rl.learning_rate " in err and err.count("\n") == 1, err
    assert checks.snapshot(out / "rl") == before and (out / "config.yml").read_text() == text
    assert not [*out.glob(".tmp*")]
