"""Stages on the disk: what makes one finished, and what may change after that."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import train_staged
from common import config, tasks
from common.runtime import base, checkpoint, stages
from tests import inputs

SETTINGS = {"training.mode": "staged", "reward.type": "heuristic", "training.learning_rate": 1e-3}


@pytest.fixture
def study(tmp_path, micro_folder):
    """A function (folder, changes of the config) -> Study of SFT and RL, in a folder where both are finished."""
    few = inputs.write_data(tmp_path / "few", "safety", train=4, val=2)
    out = tmp_path / "run"
    for name in ("sft", "rl"):
        (out / name).mkdir(parents=True)
        inputs.random_start(out / name / "final", micro_folder)
        with checkpoint.commit(out / name / "final", {"step": 1}, 0) as temp:
            shutil.copytree(out / name / "final", temp, dirs_exist_ok=True)

    def make(folder=out, **changes):
        given = {key.replace("__", "."): value for key, value in changes.items()}
        places = {"model.base_checkpoint": str(micro_folder), "dataset_path": str(few)}
        cfg = config.load_config(None, SETTINGS | places | given)
        digest = base.fingerprint(Path(cfg.model.base_checkpoint))
        return stages.Study(cfg, train_staged.stages(cfg, None, folder), folder, digest)

    first = make()
    for stage in first.plan:
        first.note(stage, first.settings(stage))
    return make


def finished(study):
    return [study.finished(stage) for stage in study.plan]


def test_a_stage_is_finished_until_what_it_reads_changes(study, micro_folder, tmp_path):
    assert finished(study()) == [True, True]
    assert finished(study(evaluation__max_items=3, logging__log_interval=1)) == [True, True]
    assert finished(study(rl__max_steps=9)) == finished(study(reward__alpha=0.5)) == [True, False]
    assert finished(study(training__learning_rate=1e-4)) == finished(study(seed=1)) == [False, False]
    other = inputs.another_base(tmp_path / "other", micro_folder)
    assert finished(study(model__base_checkpoint=str(other))) == [False, False]


def test_base_data_and_folder_may_move(study, micro_folder, tmp_path):
    moved = shutil.copytree(micro_folder, tmp_path / "Y")
    assert finished(study(model__base_checkpoint=str(moved))) == [True, True]
    data = shutil.copytree(tmp_path / "few", tmp_path / "data")
    assert finished(study(dataset_path=str(data))) == [True, True]
    (tmp_path / "run").rename(tmp_path / "away")
    assert finished(study(tmp_path / "away")) == [True, True]
    path = data / "train.jsonl"
    path.write_text(path.read_text().replace("How", "Why"))
    assert finished(study(tmp_path / "away", dataset_path=str(data))) == [False, False]


def test_rl_is_not_finished_where_its_start_has_changed(study, tmp_path, micro_folder):
    final = tmp_path / "run" / "sft" / "final"
    path = final / "adapter_config.json"
    text = path.read_text()
    for key, value, right in (("base_model_name_or_path", "elsewhere", True), ("lora_alpha", 99, False)):
        path.write_text(json.dumps(json.loads(text) | {key: value}))
        now = study()
        assert now.finished(now.plan[1]) is right, key


def test_an_edited_reward_or_task_is_another(study, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the task's folder comes onto it
    reward, task = tmp_path / "own_reward.py", tmp_path / "own_task.py"
    reward.write_text("def score(prompt, completion, reference):\n    return 1.0\n")
    task.write_text((Path(tasks.__file__).with_name("safety.py")).read_text())
    for key, value in (("reward__function", f"{reward}:score"), ("task", str(task))):
        changed = {key: value}
        for stage in study(**changed).plan:
            study(**changed).note(stage, study(**changed).settings(stage))
        assert finished(study(**changed)) == [True, True]
        settings = study(**changed).settings(study(**changed).plan[1])
        path = Path(value.partition(":")[0])
        path.write_text(path.read_text() + "# edited\n")
        assert finished(study(**changed)) == [key != "task", False], key  # SFT reads no reward
        now = study(**changed).settings(study(**changed).plan[1])
        assert not set(stages.sampling_keys(now)) & set(stages.sampling_keys(settings)), key


def test_without_its_files_a_stage_is_not_finished(study, tmp_path):
    shutil.rmtree(tmp_path / "run" / "rl" / "final")
    assert finished(study()) == [True, False]
    (tmp_path / "run" / "stages.json").write_text('{"sft": {')
    assert finished(study()) == [False, False]


def test_samples_of_an_earlier_version_are_known_by_its_key(study):
    """It hashed paths too; a run that it began goes on, and a moved base is no other samples."""
    now = study()
    settings = now.settings(now.plan[1])
    earlier = {key: value for key, value in settings.items() if key not in ("start", "training.budget_tokens")}
    earlier.pop("training.budget_flops")
    keys = stages.sampling_keys(settings)
    earlier.pop("score_effect")
    assert stages.resume.fingerprint(earlier) in keys
    assert stages.sampling_keys(settings | {"model.base_checkpoint": "elsewhere"})[0] in keys
    assert not set(stages.sampling_keys(settings | {"rl.temperature": 0.5})) & set(keys)
