"""R01, R09, R13 to R15 of train_reward.py, as whole runs."""

import functools
import json
import shutil

import train_reward
from common import reward_model
from tests import checks, inputs, processes
from tests.faults import trainers

MAIN = train_reward.main
train, run, refused = (functools.partial(each, MAIN) for each in (processes.train, processes.run, processes.refused))
few, settings, straight = trainers.fixtures("reward")


def test_R01_R13_sigterm_at_an_evaluation_and_resume(tmp_path, settings, straight):
    checks.check_sigterm(MAIN, tmp_path, settings, straight)
    reports = [(run_dir / "report.json").read_bytes() for run_dir in (tmp_path / "run", straight())]
    assert reports[0] == reports[1]


def test_R01_R14_crash_behind_a_save_and_resume(tmp_path, settings, straight):
    checks.check_crash(MAIN, tmp_path, settings, straight)


def test_R01_a_finished_run_started_again(tmp_path, straight, settings):
    shutil.copytree(straight(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "report.json").unlink()
    result = train(tmp_path, settings(tmp_path))
    checks.assert_same_run(tmp_path / "run", straight())
    assert (tmp_path / "run" / "report.json").read_bytes() == (straight() / "report.json").read_bytes()
    assert result["step"] == inputs.STEPS


def test_R02_R13_two_ranks_stop_together_and_resume(tmp_path, settings):
    checks.check_two_ranks(MAIN, tmp_path, settings)


def test_R09_resume_refusals(tmp_path, settings, straight, few, micro_folder):
    other = shutil.copytree(few, tmp_path / "other")
    lines = (few / "train.jsonl").read_text().splitlines(True)
    first = json.dumps(json.loads(lines[0]) | {"margin": 0.5}) + "\n"
    (other / "train.jsonl").write_text("".join([first, *lines[1:]]))
    changed = inputs.another_base(tmp_path / "base", micro_folder)
    checks.check_refusals(
        MAIN,
        tmp_path,
        settings,
        straight,
        (["--dataset_path", other], "dataset_path", "data "),
        (["--model.base_checkpoint", changed], "model.base_checkpoint", "model "),
        (["--reward.center_coefficient", 0.1], "reward.center_coefficient 0.01 -> 0.1"),
    )


def test_R09_what_may_change(tmp_path, settings, straight):
    checks.check_what_may_change(MAIN, tmp_path, settings, straight)


def test_R15_nan_ends_the_run_before_the_update(tmp_path, settings):
    checks.check_nan(MAIN, tmp_path, settings, "synthetic-safety-train-", reward_model, "scores")
