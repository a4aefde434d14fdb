"""R15, R18, R19 of train_rl.py with GRPO and PPO, as whole runs."""

import functools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train_rl
from common import chat, data, model, reward_model, rollouts
from tests import checks, processes
from tests.checks import lines
from tests.faults import trainers
from tests.faults.inject import spying
from tests.inputs import mine
from tests.test_train_online import caught

MAIN = train_rl.main
BOTH = pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
train, run, refused = (functools.partial(each, MAIN) for each in (processes.train, processes.run, processes.refused))
few, settings, _ = trainers.fixtures("online")
judge, start = trainers.judge, trainers.start


@BOTH
@pytest.mark.parametrize("kind", ["lora", "adapter", "none", "bfloat16", "qlora", "single"])
def test_R19_b4_b34_ratio_is_1_and_kl_is_0_to_the_bit_at_first(tmp_path, settings, start, algorithm, kind):
    if kind == "qlora":
        import bitsandbytes  # noqa: F401
    more = {"bfloat16": ["--model.dtype", "bfloat16"], "single": ["--rl.minibatches", 1]}
    more["adapter"] = ["--model.adapter", start]
    found = []

    def keep(step, name, args, result):
        if name == "policy_loss":
            found.append((step, torch.equal(args[0].detach(), args[1]), args[0].requires_grad))

    def body(main, argv):
        spying(keep)(main, argv)
        print("FOUND " + json.dumps(found))

    flags = ["--training.max_steps", 3, *more.get(kind, [])]
    peft = {"qlora": "qlora", "none": "none", "bfloat16": "none"}.get(kind, "lora")
    status, out, err = run(tmp_path, settings(algorithm)(tmp_path, *flags, peft=peft), body)
    assert status == 0, err
    calls = json.loads(out.rpartition("FOUND ")[2])
    equal = {step: [same for at, same, _ in calls if at == step] for step, *_ in calls}
    assert all(same[0] for same in equal.values()), equal  # before a rollout's first update
    assert kind == "single" or not all(same[-1] for same in equal.values()), equal  # and not after it
    assert all(gradient for *_, gradient in calls)
    log = lines(tmp_path / "run")
    assert log[0]["kl"] == log[0]["eval/kl"] == 0 and log[2]["kl"] != 0
    assert algorithm == "grpo" or log[1]["kl"] == 0  # one step of the critic alone


@BOTH
def test_R15_nan_ends_the_run_before_the_update(tmp_path, settings, algorithm):
    """In the passes before the updates, and, where there is but one update, in that one."""
    names, check = "synthetic-safety-train-", functools.partial(checks.check_nan, MAIN)
    flags = settings(algorithm, "--rl.minibatches", 1)
    check(tmp_path / "a", flags, names, model, "sequence_logprobs", "log-probs or values are not", 8)
    if algorithm == "grpo":  # a group of equals is not computed, so not all eight have to be named
        flags = settings(algorithm, "--rl.minibatches", 1, "--rl.num_ppo_epochs", 1, "--rl.kl_coef", 0)
        check(tmp_path / "b", flags, names, model, "sequence_logprobs", "loss nan", None)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return float('nan')", ("returned nan", "synthetic-safety-")),
        ("return float('inf')", ("returned inf", "synthetic-safety-")),
        ("return 1 / 0", ("ZeroDivisionError", "synthetic-safety-")),
        ("return 'good'", ("returned 'good' for synthetic-safety-", "expected a number")),
        ("return -1e39", ("returned -1e+39 for synthetic-safety-", "beyond float32")),
        ("exec('exit()'); return 1.0", ("reward.function called exit() on synthetic-safety-",)),
    ],
)
def test_R18_a_reward_that_fails_ends_the_run(tmp_path, settings, body, words):
    flags = settings("grpo")(tmp_path, *mine(tmp_path, body))
    refused(tmp_path, flags, *words)


def test_R18_a_reward_that_is_interrupted_is_no_refusal(tmp_path, settings):
    status, _, err = run(tmp_path, settings("grpo")(tmp_path, *mine(tmp_path, "raise KeyboardInterrupt")))
    assert status == 70 and err.rstrip().endswith("KeyboardInterrupt") and "error: " not in err, (status, err)


def test_R18_a_reward_file_that_exits_when_imported_is_named(tmp_path, settings):
    flags = mine(tmp_path, "return 1.0")
    with open(tmp_path / "mine.py", "a") as file:
        file.write("exit()\n")
    refused(tmp_path, settings("grpo")(tmp_path, *flags), f"{tmp_path}/mine.py called exit() when it was imported")


@pytest.mark.parametrize("pairs", [[], ["--rl.algorithm", "dpo", "--rl.pairs", "sampled"]], ids=["online", "pairs"])
def test_R18_a_reward_that_exits_on_one_rank_ends_both(tmp_path, settings, pairs):
    code = "import os; os.environ['RANK'] == '1' and exit(); return len(completion)"
    flags = settings("grpo")(tmp_path, *mine(tmp_path, code), *pairs)
    for status, _, err in processes.ranks(MAIN, tmp_path, flags):
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, (status, err)
        assert "reward.function called exit() on synthetic-safety-" in err, err
    assert not (tmp_path / "run" / "final").exists()


def trl_form(folder, body):
    """Flags for a reward function of TRL's form; held-out answers, 5 of them, are scored by their number of tokens."""
    text = "def score(completion_ids, **columns):\n    lengths = [float(len(ids)) for ids in completion_ids]\n"
    text += f"    if len(lengths) == 5:\n        return lengths\n    {body}\n"
    (folder / "trl_form.py").write_text(text)
    return ["--reward.function", f"{folder}/trl_form.py:score", "--rl.missing_stop_penalty", 0]


def test_R18_a_wrong_length_on_one_rank_ends_both(tmp_path, settings):
    body = "import os; return lengths[int(os.environ['RANK']) :]"
    for status, _, err in processes.ranks(MAIN, tmp_path, settings("ppo")(tmp_path, *trl_form(tmp_path, body))):
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, (status, err)
        assert "reward.function: returned" in err and "values for" in err, err


def test_R18_no_score_is_no_row_of_grpo(tmp_path, settings):
    """None: out of the loss, of its divisor and of the group's mean; null in the log, where their share stands."""
    flags = trl_form(tmp_path, "return [None if i % 3 == 0 else i + n for i, n in enumerate(lengths)]")
    flags += ["--rl.group_size", 4, "--rl.num_ppo_epochs", 1, "--training.max_steps", 1]
    kept = caught(settings("grpo")(tmp_path, *flags), tmp_path)
    batch, right = kept["batch"], [row for row in range(16) if row % 3]
    assert sorted(row for part in kept["plan"] for cut in part for row in cut) == right
    lengths = batch["completion_tokens"].double()
    rewards = lengths + torch.arange(16)
    for start in range(0, 16, 4):
        rows = [row for row in range(start, start + 4) if row % 3]
        expected = (rewards[rows] - rewards[rows].mean()) / (rewards[rows].std() + 1e-4)
        assert torch.allclose(batch["advantages"][rows].sum(1).double() / lengths[rows], expected, atol=1e-5)
    for name in ("mask", "weight", "advantages"):
        assert (batch[name].abs().sum(1) > 0).nonzero()[:, 0].tolist() == right, name
    logged = [line["reward"] for line in checks.samples(tmp_path / "run")]
    assert logged == [None if row % 3 == 0 else rewards[row].item() for row in range(16)]
    first = lines(tmp_path / "run")[0]
    assert first["unscored_share"] == 6 / 16 and first["eval/unscored_share"] == 0
    assert first["reward"] == pytest.approx(rewards[right].mean().item())
    assert first["reward_std"] == pytest.approx(rewards[right].std().item())


def test_R18_no_score_is_no_row_of_ppo(tmp_path, few, tiny_folder):
    """To leave completions unscored that did not stop is to mask them: to the bit, in policy and critic."""
    flags = ["--rl.max_new_tokens", 24, "--training.max_steps", 3]
    ends = []
    for name, body, masked in (
        ("masked", "return lengths", "true"),
        (
            "unscored",
            "return [n if ids[-1] in STOP_TOKENS else None for n, ids in zip(lengths, completion_ids)]",
            "false",
        ),
    ):
        folder = tmp_path / name
        folder.mkdir()
        scored = trl_form(folder, f"from common.chat import STOP_TOKENS; {body}")
        settings = trainers.settings("ppo", tiny_folder, few)
        train(folder, settings(folder, *flags, *scored, "--rl.mask_truncated", masked))
        step = sorted((folder / "run").glob("step-*"))[-1]
        ends.append([load_file(path) for path in sorted(step.rglob("*.safetensors"))])
        shares = [line["unscored_share"] for line in lines(folder / "run")[:-1]]
        assert all(0 < share < 1 for share in shares) if name == "unscored" else shares == [0, 0, 0]
    assert len(ends[0]) >= 3  # policy, critic, optimizer
    for masked, unscored in zip(*ends, strict=True):
        assert all(torch.equal(masked[key], unscored[key]) for key in masked)


@BOTH
def test_R18_steps_without_a_score(tmp_path, settings, start, algorithm):
    """Nothing is learned from them, and it is said once; where no held-out answer has a score, there is no run."""
    flags = ["--model.adapter", start, "--training.max_steps", 3, *trl_form(tmp_path, "return [None] * len(lengths)")]
    status, out, err = run(tmp_path, settings(algorithm)(tmp_path, *flags))
    assert status == 0 and (out + err).count("gave no score (None) to any completion of a step") == 1, (out, err)
    log = lines(tmp_path / "run")
    assert [line["unscored_share"] for line in log[:-1]] == [1, 1, 1]
    assert all("loss" not in line and "reward" not in line and None not in line.values() for line in log[:-1])
    before, after = (load_file(at / "adapter_model.safetensors") for at in (start, tmp_path / "run" / "final"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    flags += ["--evaluation.max_items", 4]
    refused(tmp_path, settings(algorithm)(tmp_path / "b", *flags), "reward.function: gave no score", "held-out")


def test_R18_a_changed_prompt_is_logged_as_it_was(tmp_path, settings, few):
    body = "prompt[-1]['content'] += '!'; prompt.append(prompt[-1]); return len(completion)"
    train(tmp_path, settings("grpo")(tmp_path, *mine(tmp_path, body), "--training.max_steps", 2))
    asked = {record["id"]: record["prompt"][-1]["content"] for record in data.load_split(few, "train")}
    rows = checks.samples(tmp_path / "run")
    assert len(rows) == 16 and [row["prompt"] for row in rows] == [asked[row["id"]] for row in rows]


def test_R18_a_reward_with_a_pool_of_processes(tmp_path, settings):
    body = "from concurrent.futures import ProcessPoolExecutor as Pool\n    with Pool(1) as pool:\n        "
    body += "return [size + 0.5 for size in pool.map(size_of, completion_ids)]\n\ndef size_of(ids): return len(ids)"
    train(tmp_path, settings("grpo")(tmp_path, *trl_form(tmp_path, body), "--training.max_steps", 1))
    rows = checks.samples(tmp_path / "run")
    assert len(rows) == 8 and all(row["reward"] == row["tokens"] + 0.5 for row in rows)


@BOTH
def test_R18_the_largest_rewards_leave_losses_finite(tmp_path, settings, algorithm):
    flags = trl_form(tmp_path, "return [1e12 * (-1) ** i for i in range(len(lengths))]")
    flags += ["--rl.scale_rewards", "none", "--training.max_steps", 3]
    train(tmp_path, settings(algorithm)(tmp_path, *flags))
    for line in lines(tmp_path / "run")[:-1]:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float)), line
        assert None not in line.values() and line["reward_std"] > 9e11


def test_R18_a_reward_model_that_fails_is_named_with_its_sample(tmp_path, settings, judge):
    def body(main, argv):
        real = reward_model.score_completions

        def score(*args):
            found = real(*args)
            found[-1] = math.nan
            return found

        reward_model.score_completions = score
        processes.call(main, argv)

    flags = ["--reward.type", "trainable", "--reward.checkpoint", judge]
    status, _, err = run(tmp_path, settings("ppo")(tmp_path, *flags), body)
    assert status == 2 and err.count("\n") == 1 and "synthetic-safety-val-" in err and "nan" in err, err


@pytest.mark.parametrize("dynamic", ["false", "true"])
def test_R18_equal_rewards_cost_no_update(tmp_path, settings, start, dynamic):
    """Without a KL there is nothing to learn from equals, and the policy keeps its bits."""
    flags = [*mine(tmp_path, "return 1"), "--model.adapter", start, "--rl.missing_stop_penalty", 0, "--rl.kl_coef", 0]
    flags += ["--rl.dynamic_sampling", dynamic, "--training.max_steps", 3]

    def body(main, argv):
        def never(self, *args):
            raise AssertionError("a backward was run")

        torch.Tensor.backward = never
        processes.call(main, argv)

    train(tmp_path, settings("grpo")(tmp_path, *flags), body)
    log = lines(tmp_path / "run")
    assert [line["zero_advantage_share"] for line in log[:-1]] == [1, 1, 1] and "loss" not in log[0]
    before, after = (load_file(at / "adapter_model.safetensors") for at in (start, tmp_path / "run" / "final"))
    assert all(torch.equal(before[key], after[key]) for key in before)


# ---------------------------------------------------------------- R17: nothing was said


@BOTH
def test_R17_completions_that_are_empty(tmp_path, settings, algorithm):
    """The stop token comes first in every completion but one: no nan anywhere, lengths are counted, the run ends."""

    def body(main, argv):
        draw = rollouts.draw

        def stop_at_once(logits, uniforms, *more, **options):
            tokens, _ = draw(logits, uniforms, *more, **options)
            tokens[1:] = chat.END_OF_TURN
            return tokens, logits.float().log_softmax(1).gather(1, tokens[:, None])[:, 0]

        rollouts.draw = stop_at_once
        processes.call(main, argv)

    train(tmp_path, settings(algorithm)(tmp_path, "--training.max_steps", 3, "--training.eval_interval", 10), body)
    log = lines(tmp_path / "run")
    assert len(log) == 4 and all(1 <= line["length"] < 3 for line in log[:-1])
    for line in log:
        assert None not in line.values(), line
        assert all(math.isfinite(value) for value in line.values() if not isinstance(value, str)), line


def test_R17_prompts_that_fill_the_context_are_counted(tmp_path, settings, few):
    source = shutil.copytree(few, tmp_path / "odd")
    rows = data.load_split(few, "train")
    rows[3]["prompt"] = [{"role": "user", "content": "How do I fix my car? " * 60}]
    (source / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = run(tmp_path, settings("grpo")(tmp_path, "--dataset_path", source, "--training.max_steps", 1))
    (line,) = (line for line in out.splitlines() if line.startswith("train: "))
    assert status == 0 and "1 left out (prompt too long)" in line and "19 kept" in line, (line, err)
