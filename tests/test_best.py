"""What picks best/ of online RL: the task's truth, a judge, or the reward with a warning; a hacked run; resume."""

import functools
import json
import shutil

import pytest

import train_rl
from common import config, prompts
from common.log import UserError
from common.run import Run
from common.runtime import checkpoint
from tests import checks, inputs, processes
from tests.faults import inject, trainers

MAIN = train_rl.main
train, run, refused = (functools.partial(each, MAIN) for each in (processes.train, processes.run, processes.refused))
judge = trainers.judge
# An answer is right if about a third of it is vowels. The reward pays for each vowel: too many of them hack it.
TASK = """
from common.tasks import Metric, Part, Task, question

def vowels(text):
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))

def synthetic(split, count, seed):
    asked = [f"{split} {i}?" for i in range(count)]
    return [{"id": text, "prompt": question(text), "response": "ok", "rejected": None, "reference": "ok"}
            for text in asked]

TASK = Task(
    name="balance",
    parts={"vowels": Part(1.0, "share of vowels")},
    reward=lambda prompt, completion, reference: {"vowels": vowels(completion)},
    metrics={"balance": Metric("share of answers with about as many vowels as a text has", 1, "rate")},
    statistics=lambda record, text: {"balance": (float(0.25 < vowels(text) < 0.45), 1.0)},
    headline=("balance",),
    synthetic=synthetic,
)
"""


def vowels(text):
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


@pytest.fixture(scope="module")
def settings(tmp_path_factory, micro_folder):
    file = tmp_path_factory.mktemp("task") / "balance.py"
    file.write_text(TASK)
    sizes = ["--rl.rollout_size", 8, "--rl.group_size", 8, "--rl.max_new_tokens", 8, "--rl.minibatches", 1]
    sizes += ["--evaluation.max_new_tokens", 8, "--evaluation.max_items", 32, "--evaluation.draws", 100]
    sizes += ["--rl.max_steps", 20, "--training.eval_interval", 4, "--training.save_interval", 50]
    rates = ["--rl.learning_rate", 3e-2, "--training.schedule", "constant", "--rl.kl_coef", 0]
    rates += ["--rl.missing_stop_penalty", 0, "--training.mode", "rl", "--rl.algorithm", "grpo"]
    rates += ["--reward.type", "heuristic"]

    def flags(folder, *more):
        where = ["--model.base_checkpoint", micro_folder, "--logging.output_dir", folder, "--logging.run_name", "run"]
        return ["--debug", "--task", file, *sizes, *rates, *where, *more]

    return flags


@pytest.fixture(scope="module")
def hacked(tmp_path_factory, settings):
    """{rule: run folder} of one hacked run, by the task's truth and by the reward."""
    folders = {}
    for rule in ("null", "reward"):
        out = tmp_path_factory.mktemp(f"hacked-{rule}")
        train(out, settings(out, "--evaluation.best_metric", rule))
        folders[rule] = out / "run"
    return folders


def truth_by_step(run_dir):
    """{step: mean over the held-out answers}, by hand."""
    by_step = {}
    for line in checks.samples(run_dir, "held_out"):
        by_step.setdefault(line["step"], []).append(0.25 < vowels(line["completion"]) < 0.45)
    return {step: sum(values) / len(values) for step, values in by_step.items()}


def best_step(run_dir):
    return checkpoint.verify(run_dir / "best")["step"]


def test_of_a_hacked_run_the_reward_keeps_the_worst(hacked):
    by_truth, by_reward = hacked["null"], hacked["reward"]
    truth = truth_by_step(by_truth)
    assert truth == truth_by_step(by_reward)  # one run, but for what picks best/
    rewards = {line["step"]: line["eval/reward"] for line in checks.lines(by_reward) if "eval/reward" in line}
    assert best_step(by_reward) == max(rewards, key=rewards.get)
    assert truth[best_step(by_reward)] < truth[0]  # the old rule: a checkpoint that is worse than no training
    assert truth[best_step(by_truth)] == max(truth.values()) > truth[best_step(by_reward)] + 0.3
    assert truth[best_step(by_reward)] <= min(truth.values()) + 0.1
    for line in checks.lines(by_truth):
        if "eval/reward" in line:
            assert line["eval/balance"] == pytest.approx(truth[line["step"]], abs=1e-9)
    assert checks.lines(by_truth)[-1]["best_eval_balance"] == pytest.approx(max(truth.values()))


def test_the_reward_picks_with_one_warning(hacked):
    for rule, told in (("null", 0), ("reward", 1)):
        report = json.loads((hacked[rule] / "report.json").read_text())
        assert report["best_metric"] == {"null": "eval/balance", "reward": "eval/reward"}[rule]
        assert report.get("warning", "").count("best/ is picked by the reward") == told
        said = [line["step"] for line in checks.lines(hacked[rule]) if "best/ is picked" in line.get("warning", "")]
        assert said == [0] * told


def test_it_resumes_to_the_same_best(tmp_path, settings, hacked):
    argv = settings(tmp_path)
    assert run(tmp_path, argv, inject.at_step(14, processes.terminate))[0] == 1
    train(tmp_path, argv)
    checks.assert_same_records(tmp_path / "run", hacked["null"])
    weights = [
        checkpoint.sha256(folder / "best" / inputs.WEIGHTS["lora"]) for folder in (tmp_path / "run", hacked["null"])
    ]
    assert weights[0] == weights[1] and best_step(tmp_path / "run") == best_step(hacked["null"])


def before_there_was_a_choice(body):
    """A body in which the reward picks best/, as it did before there was evaluation.best_metric."""

    def patched(main, argv):
        start = Run.start

        def without_best(self, *how, best, **more):
            return start(self, *how, **more)

        Run.start = without_best
        body(main, argv)

    return patched


def test_a_run_of_before_goes_on_by_its_reward(tmp_path, settings, hacked):
    argv = settings(tmp_path)
    stopped = before_there_was_a_choice(inject.at_step(14, processes.terminate))
    assert run(tmp_path, argv, stopped)[0] == 1
    end = train(tmp_path, argv)
    assert best_step(tmp_path / "run") == best_step(hacked["reward"]) and "best_eval_reward" in end
    assert end["best_eval_reward"] == checks.lines(hacked["reward"])[-1]["best_eval_reward"]


def test_a_judge_picks_where_the_task_has_no_truth(tmp_path, micro_folder, judge):
    """Each rank scores its share; another judge is another run, as best/ would be a mixture."""
    source = trainers.write_data(tmp_path / "few", "grpo")
    flags = trainers.settings("grpo", micro_folder, source)
    argv = flags(tmp_path, "--evaluation.reward_checkpoint", judge, "--rl.max_steps", 4)
    train(tmp_path, argv)
    records = [line for line in checks.lines(tmp_path / "run") if "eval/judge" in line]
    assert [line["step"] for line in records] == [0, 4]
    best = max(line["eval/judge"] for line in records)
    assert checks.lines(tmp_path / "run")[-1]["best_eval_judge"] == best
    assert (tmp_path / "run" / "best").exists() == (records[0]["eval/judge"] < best)
    assert not any("best/ is picked" in line.get("warning", "") for line in checks.lines(tmp_path / "run"))
    (tmp_path / "two").mkdir()
    ranks = flags(tmp_path / "two", "--evaluation.reward_checkpoint", judge, "--rl.max_steps", 4)
    assert [status for status, *_ in processes.ranks(MAIN, tmp_path / "two", ranks)] == [0, 0]
    assert checks.lines(tmp_path / "two" / "run")[0]["eval/judge"] == pytest.approx(records[0]["eval/judge"], abs=1e-5)
    same = shutil.copytree(judge, tmp_path / "same")  # as it is written again where its base was moved
    path = same / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "elsewhere"}))
    train(tmp_path, flags(tmp_path, "--evaluation.reward_checkpoint", same, "--rl.max_steps", 4))
    other = inputs.random_reward_model(tmp_path / "other", micro_folder, seed=3)
    more = ["--evaluation.reward_checkpoint", other, "--rl.max_steps", 8]
    refused(tmp_path, flags(tmp_path, *more), "cannot be resumed", "judge")


def rule(task="safety", records=({"reference": "1", "response": "1"},), **evaluation):
    flags = {f"evaluation.{key}": value for key, value in evaluation.items()} | {"task": task}
    val = [prompts.Prompt("a", [2], record) for record in records]
    return prompts.best_metric(config.load_config(None, flags), val)


def test_the_rule():
    assert rule("arithmetic") == rule("gsm8k") == ("eval/exact", 1)
    assert rule("conala") == ("eval/bleu", 1) and rule("clinical") == ("eval/rougeL", 1)
    assert rule("arithmetic", reward_checkpoint="x") == ("eval/exact", 1)
    assert rule("safety") == ("eval/reward", 1) and rule("safety", reward_checkpoint="x") == ("eval/judge", 1)
    assert rule("safety", best_metric="toxicity") == ("eval/toxicity", -1)
    assert rule("arithmetic", best_metric="reward") == ("eval/reward", 1)
    alone = [{"reference": None, "response": ""}]  # nothing to compare with: the task cannot say what is right
    assert rule("arithmetic", alone) == ("eval/reward", 1)
    for name, words in (("exakt", "did you mean exact?"), ("judge", "judge needs evaluation.reward_checkpoint")):
        with pytest.raises(UserError, match=rf"evaluation.best_metric: .*{words[:20]}"):
            rule("arithmetic", best_metric=name)


def test_a_metric_of_no_held_out_record_is_refused(tmp_path, micro_folder):
    flags = trainers.settings("grpo", micro_folder, inputs.write_data(tmp_path / "few", "arithmetic", train=20, val=6))
    argv = flags(tmp_path, "--task", "arithmetic", "--evaluation.best_metric", "exact_5")
    refused(tmp_path, argv, "evaluation.best_metric: eval/exact_5 has no value")
