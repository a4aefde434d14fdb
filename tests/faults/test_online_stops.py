"""R01 to R04, R09, R13, R14 of train_rl.py with GRPO and PPO, as whole runs."""

import functools
import json
import shutil

import pytest

import train_rl
from tests import checks, inputs, processes
from tests.checks import lines, samples
from tests.faults import trainers

MAIN = train_rl.main
BOTH = pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
train, run, refused = (functools.partial(each, MAIN) for each in (processes.train, processes.run, processes.refused))
few, settings, straight = trainers.fixtures("online")
judge = trainers.judge


@BOTH
def test_R01_R13_R14_crash_behind_a_save_then_sigterm(tmp_path, settings, straight, algorithm):
    """One run meets both, each resumed."""
    checks.crash(MAIN, tmp_path, settings(algorithm)(tmp_path))
    checks.check_sigterm(MAIN, tmp_path, settings(algorithm), straight(algorithm))
    trainers.same_files(tmp_path / "run", straight(algorithm)())


@BOTH
def test_R03_kills_at_random_moments(tmp_path, settings, straight, algorithm):
    checks.check_kills(MAIN, tmp_path, settings(algorithm), straight(algorithm), 1 if algorithm == "grpo" else 2, 1.3)
    trainers.same_files(tmp_path / "run", straight(algorithm)())


@BOTH
def test_R04_kills_at_what_is_written(tmp_path, settings, algorithm):
    def argv(folder):
        sizes = ["--training.max_steps", 2, "--training.save_interval", 1, "--training.eval_interval", 1]
        sizes += ["--rl.num_ppo_epochs", 2]  # as many updates as it takes for a best step to be published
        return settings(algorithm)(folder, *sizes)

    checks.check_kill_points(MAIN, tmp_path, argv, 13 if algorithm == "ppo" else 22)


def test_R01_a_finished_run_started_again(tmp_path, straight, settings):
    shutil.copytree(straight("grpo")(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "report.json").unlink()
    assert train(tmp_path, settings("grpo")(tmp_path))["step"] == inputs.STEPS
    checks.assert_same_run(tmp_path / "run", straight("grpo")())
    trainers.same_files(tmp_path / "run", straight("grpo")())


def test_R01_resume_under_another_name_has_the_first_evaluation(tmp_path, settings, straight):
    start = straight("grpo")() / f"step-{inputs.STEPS:06d}"
    flags = ["--training.resume", start, "--logging.run_name", "other", "--training.max_steps", inputs.STEPS + 2]
    train(tmp_path, settings("grpo")(tmp_path, *flags))
    report = json.loads((tmp_path / "other" / "report.json").read_text())
    assert report["steps"] == [0, inputs.STEPS + 2]


def test_R09_resume_refusals(tmp_path, settings, straight, few, judge):
    other = shutil.copytree(few, tmp_path / "other")
    shutil.copyfile(few / "val.jsonl", other / "train.jsonl")
    checks.check_refusals(
        MAIN,
        tmp_path,
        settings("ppo"),
        straight("ppo"),
        (["--dataset_path", other], "dataset_path", "data "),
        (["--rl.gamma", 0.5], "rl.gamma 1.0 -> 0.5"),
        (["--rl.kl_coef", 0.5], "rl.kl_coef 0.05 -> 0.5"),
        (["--reward.type", "trainable", "--reward.checkpoint", judge], "reward.type heuristic -> trainable"),
        (["--rl.algorithm", "grpo"], "rl.algorithm ppo -> grpo"),
        (["--evaluation.temperature", 0.5], "evaluation.temperature 1.0 -> 0.5"),
    )


@pytest.mark.parametrize(("rate", "old"), [("training.learning_rate", 0.001), ("rl.critic_learning_rate", 0.001)])
def test_R09_what_may_change(tmp_path, settings, straight, rate, old):
    if rate.startswith("training"):
        return checks.check_what_may_change(MAIN, tmp_path, settings("grpo"), straight("grpo"), rate, old, "reward")
    shutil.copytree(straight("ppo")(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / f"step-{inputs.STEPS:06d}")
    argv = settings("ppo")(tmp_path, f"--{rate}", 5e-4)
    refused(tmp_path, argv, f"{rate} {old} -> 0.0005; add --training.resume_changed true")
    status, out, err = run(tmp_path, [*argv, "--training.resume_changed", "true"])
    assert status == 0 and f"{rate} {old} -> 0.0005" in out, err


@BOTH
def test_R02_R13_b1_b38_two_ranks_stop_resume_and_equal_one(tmp_path, settings, algorithm):
    keep = ["--training.keep_last", 10, "--training.save_interval", 1]
    keep += ["--rl.num_ppo_epochs", 2 if algorithm == "grpo" else 1]
    whole = checks.check_two_ranks(MAIN, tmp_path, lambda *args: settings(algorithm)(*args, *keep))
    one = tmp_path / "one"
    begin = ["--training.max_steps", 2, "--training.eval_interval", 3]  # as many as the critic's warm-up leaves one of
    train(tmp_path, settings(algorithm)(one, *begin, *keep))
    mine, theirs = samples(one / "run"), samples(whole)
    assert [row["row"] for row in theirs[:8]] == list(range(8)) and len({row["completion"] for row in theirs[:8]}) > 4
    for name in ("step", "row", "id", "completion", "tokens"):  # the same prompts and numbers, whoever draws them
        assert [row[name] for row in mine[:8]] == [row[name] for row in theirs[:8]], name
    now, then = lines(one / "run")[0], lines(whole)[0]
    assert now.pop("warning") == then["warning"]  # of what picks best/
    for key in now.keys() - checks.CLOCK - {"peak_memory_gb", "sampler_mean", "sampler_max"}:
        assert then[key] == pytest.approx(now[key], rel=1e-4, abs=1e-6), key
