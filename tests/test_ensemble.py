"""Ensembles of reward models on one base: their score, several seeds by one command, what is refused."""

import functools
import json
import os
import signal

import pytest

import evaluate
import train_reward
import train_rl
from common import config
from common.runtime import checkpoint
from tests import checks, inputs, processes
from tests.faults import inject, trainers

run, train, refused = processes.run, processes.train, processes.refused
few, settings, _ = trainers.fixtures("reward")


@pytest.fixture(scope="module")
def members(tmp_path_factory, micro_folder):
    folder = tmp_path_factory.mktemp("members")
    return [
        inputs.random_reward_model(folder / f"m{n}", micro_folder, seed=n, mean=0.2 * n, std=1.0 + n) for n in (1, 2, 3)
    ]


@pytest.fixture(scope="module")
def online(few, micro_folder):
    """A function (output folder, reward models, *flags) -> the flags of one step of GRPO."""
    flags = trainers.settings("grpo", micro_folder, few)

    def settings(folder, models, *more):
        folder.mkdir(exist_ok=True)
        checkpoints = ",".join(map(str, models))
        return flags(
            folder, "--reward.type", "trainable", "--reward.checkpoint", checkpoints, "--rl.max_steps", 1, *more
        )

    return settings


def scores(run_dir):
    """The reward model's part of every sample of step 0, by row."""
    return [row["parts"]["trained"] for row in checks.samples(run_dir) if row["step"] == 0]


def deviation(values):
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5


BY_HAND = {
    "mean": lambda values: sum(values) / len(values),
    "min": min,
    "mean_minus_std": lambda values: sum(values) / len(values) - deviation(values),
}


def test_its_score_is_the_members_by_hand(tmp_path, members, online):
    """Each member scores the same samples in a run of its own."""
    alone = []
    for number, member in enumerate(members):
        train(train_rl.main, tmp_path, online(tmp_path / f"alone-{number}", [member]))
        alone.append(scores(tmp_path / f"alone-{number}" / "run"))
    rows = list(zip(*alone, strict=True))
    assert len(rows) == 8 and all(deviation(row) > 0.01 for row in rows)
    for kind, by_hand in BY_HAND.items():
        out = tmp_path / kind
        train(train_rl.main, tmp_path, online(out, members, "--reward.ensemble", kind))
        assert scores(out / "run") == pytest.approx([by_hand(row) for row in rows], abs=1e-5), kind
    cfg = config.load_config(tmp_path / "min" / "run" / "config.yml")
    assert cfg.reward.checkpoint == [str(member) for member in members] and cfg.reward.ensemble == "min"


def test_it_resumes_with_its_members_and_their_rule(tmp_path, members, online):
    """Moved members are the same; another member, or another way to join their scores, is another run."""
    out = tmp_path / "out"
    train(train_rl.main, tmp_path, online(out, members[:2], "--reward.ensemble", "min"))
    moved = [member.rename(member.with_name(f"moved-{member.name}")) for member in members[:2]]
    try:
        more = ["--reward.ensemble", "min", "--rl.max_steps", 2]
        assert train(train_rl.main, tmp_path, online(out, moved, *more))["step"] == 2
        more[-1] = 3
        refused(train_rl.main, tmp_path, online(out, [moved[0], members[2]], *more), "cannot be resumed", "score")
        more[1] = "mean"
        refused(train_rl.main, tmp_path, online(out, moved, *more), "cannot be resumed", "reward.ensemble min -> mean")
    finally:
        for member, path in zip(members, moved, strict=False):
            path.rename(member)


def test_one_member_needs_no_rule(tmp_path, members, online):
    """A single reward model is what it was: its run goes on whatever reward.ensemble says."""
    out = tmp_path / "out"
    train(train_rl.main, tmp_path, online(out, members[:1]))
    more = ["--reward.ensemble", "min", "--rl.max_steps", 2]
    assert train(train_rl.main, tmp_path, online(out, members[:1], *more))["step"] == 2


def test_members_are_checked(tmp_path, members, online):
    twice = [members[0], tmp_path / "copy"]
    inputs.shutil.copytree(members[0], twice[1])
    refused(train_rl.main, tmp_path, online(tmp_path / "a", twice), "reward.checkpoint: the same model twice")
    gone = [members[0], tmp_path / "gone"]
    refused(train_rl.main, tmp_path, online(tmp_path / "b", gone), "reward.checkpoint", str(gone[1]))
    doubled = online(tmp_path / "c", [members[0], members[0]])
    refused(train_rl.main, tmp_path, doubled, "--reward.checkpoint: expected paths")
    judge = ["--evaluation.reward_checkpoint", members[1]]
    refused(train_rl.main, tmp_path, online(tmp_path / "d", members, *judge), "a judge must be another one")


def test_a_comparison_scores_by_the_ensemble(tmp_path, members, micro_folder, few):
    """evaluate.py: the reward of an answer is the members' worst, item by item."""

    def compare(name, models, *more):
        argv = ["--debug", "--dataset_path", few, "--checkpoints", f"base={micro_folder}", "--evaluation.split", "val"]
        argv += ["--evaluation.max_new_tokens", 8, "--evaluation.draws", 100, "--reward.type", "trainable", *more]
        argv += ["--logging.output_dir", tmp_path, "--logging.run_name", name]
        argv += ["--reward.checkpoint", ",".join(map(str, models))]
        train(evaluate.main, tmp_path, argv)
        items = next((tmp_path / name / "items").glob("base-0.jsonl*")).read_text().splitlines()
        rows = [json.loads(line) for line in items]
        return [row["scores"]["reward"] for row in rows if "scores" in row]

    alone = [compare(f"alone-{number}", [member]) for number, member in enumerate(members[:2])]
    assert len(alone[0]) == 6
    worst = [min(row) for row in zip(*alone, strict=True)]
    assert compare("both", members[:2], "--reward.ensemble", "min") == pytest.approx(worst, abs=1e-5)


# ---------------------------------------------------------------- several seeds by one command


def test_several_seeds_are_runs_of_their_own(tmp_path, settings):
    """Killed in the second, they go on: each is what one command with its seed gives. Both fit one ensemble."""
    short = ["--training.max_steps", 6, "--training.eval_interval", 3]
    argv = settings(tmp_path, "--seeds", "0,1", *short)

    def body(main, argv):
        def in_the_second():
            if (tmp_path / "run-seed0" / "final").is_dir():
                os.kill(os.getpid(), signal.SIGKILL)

        inject.at_step(4, in_the_second)(main, argv)

    assert run(train_reward.main, tmp_path, argv, body)[0] == -9
    assert not (tmp_path / "run-seed1" / "final").exists()
    status, out, err = run(train_reward.main, tmp_path, argv)
    assert status == 0, err
    used = f"--reward.checkpoint {tmp_path}/run-seed0/final,{tmp_path}/run-seed1/final"
    assert used in out
    for seed in (0, 1):
        alone = settings(tmp_path / f"alone-{seed}", "--seed", seed, *short)
        train(train_reward.main, tmp_path, alone)
        folders = [tmp_path / f"run-seed{seed}", tmp_path / f"alone-{seed}" / "run"]
        checks.assert_same_records(*folders)
        weights = [checkpoint.sha256(folder / "final" / inputs.WEIGHTS["lora"]) for folder in folders]
        assert weights[0] == weights[1]


def test_bad_seeds_are_refused(tmp_path, settings):
    refuse = functools.partial(refused, train_reward.main, tmp_path)
    refuse(settings(tmp_path, "--seeds", "0,x"), "--seeds: expected int >= 0", "'x'")
    refuse(settings(tmp_path, "--seeds", "1,1"), "--seeds: expected different seeds")
    assert not list(tmp_path.glob("run*"))
