"""One rank and two at the same global batch: gradients, losses, prompts and random numbers (B-1, B-14, B-38, B-41).

Both begin at the same weights with the same rows, so all that may differ is the order of fp32 sums.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import train_reward
import train_rl
import train_sft
import train_staged
from common import dist, rollouts
from common.runtime import base
from tests import checks, inputs, processes
from tests.checks import lines, records

SIZES = ["--rl.group_size", 2, "--rl.max_new_tokens", 8, "--rl.num_ppo_epochs", 1, "--evaluation.max_items", 5]
SIZES += ["--rl.critic_warmup", 0, "--rl.rollout_size", 4, "--rl.minibatches", 1, "--rl.max_steps", "null"]
SIZES += ["--rl.learning_rate", "null", "--evaluation.max_new_tokens", 8, "--evaluation.draws", 100]
SIZES += ["--reward.type", "heuristic", "--training.mode", "rl", "--rl.algorithm"]
CASES = {
    "sft": (train_sft.main, []),
    "reward": (train_reward.main, ["--training.mode", "reward"]),
    "dpo": (train_rl.main, [*SIZES, "dpo"]),
    "grpo": (train_rl.main, [*SIZES, "grpo"]),
    "ppo": (train_rl.main, [*SIZES, "ppo"]),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory, micro_folder):
    few = inputs.write_data(tmp_path_factory.mktemp("data") / "few", "safety", train=13, val=5)
    return inputs.settings(micro_folder, few, "--model.peft_dropout", 0, "--training.batch_size", 5)


def recording(main, argv):
    """A body that leaves behind the first gradient of each role, summed over ranks, and every row's random numbers."""
    folder, init, real, draw = (
        argv[argv.index("--logging.output_dir") + 1],
        dist.init,
        dist.sum_gradients,
        rollouts.uniforms,
    )
    ranks, grads, drawn = [], {}, {}

    def remember_rank(*args):
        init(*args)
        ranks.append(dist.rank())

    def sum_gradients(parameters):
        real(parameters)
        grads.setdefault(str(id(parameters[0])), torch.cat([p.grad.flatten() for p in parameters]))

    def uniforms(seed, step, rows, limit):
        found = draw(seed, step, rows, limit)
        for row, numbers in zip(rows, found.tolist()):
            assert drawn.setdefault(f"{step}/{row}", numbers) == numbers
        return found

    dist.init, dist.sum_gradients, rollouts.uniforms = remember_rank, sum_gradients, uniforms
    processes.call(main, argv)
    save_file({str(i): grad for i, grad in enumerate(grads.values())}, folder / f"grads-{ranks[0]}.safetensors")
    (folder / f"drawn-{ranks[0]}.json").write_text(json.dumps(drawn))


def one_and_two(folder, settings, case, *flags, **kind):
    """Run on one rank and on two -> [the folder of each]; both ranks of the two have the same summed gradients."""
    (main, own), folders = CASES[case], [folder / "one", folder / "two"]
    for each in folders:
        each.mkdir()
    one, two = (settings(each, *own, *flags, **kind) for each in folders)
    processes.train(main, folder, one, recording)
    done = processes.ranks(main, folder, two, (recording, recording))
    assert [status for status, *_ in done] == [0, 0], done
    first, second = (load_file(folders[1] / f"grads-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return folders


def assert_same_gradients(one, two, roles=1):
    one, two = (load_file(folder / "grads-0.safetensors") for folder in (one, two))
    assert one.keys() == two.keys() and len(one) == roles
    for key in one:
        a, b = one[key].double(), two[key].double()
        assert a.norm() > 1e-3 and (a - b).norm() <= 1e-6 * a.norm(), (key, a.norm(), (a - b).norm() / a.norm())


def assert_same_draws(one, two):
    """Every row drew the same numbers, on whichever rank; no two rows and no two ranks drew the same ones."""
    alone = json.loads((one / "drawn-0.json").read_text())
    first, second = (json.loads((two / f"drawn-{rank}.json").read_text()) for rank in (0, 1))
    assert first and second and not first.keys() & second.keys() and first | second == alone
    assert len({tuple(numbers) for numbers in alone.values()}) == len(alone)


@pytest.mark.parametrize("case", ["sft", "reward", "dpo"])
def test_b1_b41_twenty_steps(tmp_path, settings, case):
    """Five ragged rows a step, two or three to a rank, five held-out ones, seven epoch edges."""
    flags = ["--training.max_steps", 20, "--training.eval_interval", 10, "--training.save_interval", 50]
    one, two = one_and_two(tmp_path, settings, case, *flags)
    assert_same_gradients(one, two)
    checks.assert_same_numbers(one / "run", two / "run", rel=1e-4, near_zero=1e-6)
    assert len(records(one / "run")) == 21


def test_b1_gradient_of_full_fine_tuning(tmp_path, settings):
    one, two = one_and_two(tmp_path, settings, "sft", "--training.max_steps", 1, peft="none")
    assert_same_gradients(one, two)


@pytest.mark.parametrize("case", ["grpo", "ppo"])
def test_b1_b14_b38_gradients_and_random_numbers_of_rl(tmp_path, settings, case):
    """PPO's advantages are whitened over both ranks: with means of a rank its gradient would be another."""
    one, two = one_and_two(tmp_path, settings, case, "--training.max_steps", 3, "--training.eval_interval", 2)
    assert_same_gradients(one, two, 2 if case == "ppo" else 1)
    assert_same_draws(one, two)
    mine, theirs = ([json.loads(line) for line in (folder / "run" / "samples.jsonl").open()] for folder in (one, two))
    prompts = [[(row["step"], row["row"], row["id"]) for row in rows] for rows in (mine, theirs)]
    assert prompts[0] == prompts[1] and len(prompts[0]) == 3 * 8
    assert [row["completion"] for row in mine[:8]] == [row["completion"] for row in theirs[:8]]


@pytest.mark.parametrize("case", CASES)
def test_a_rank_without_rows_waits_for_nobody(tmp_path, settings, case):
    """One row a step; in RL two minibatches of one prompt each. The other rank adds zeros."""
    flags = ["--training.max_steps", 2, "--training.batch_size", 1, "--training.timeout", 20]
    if case in ("grpo", "ppo"):  # with a price on entropy, so that equal rewards have a gradient too
        flags += ["--rl.rollout_size", 2, "--rl.minibatches", 2, "--rl.entropy_coeff", 0.01]
    one, two = one_and_two(tmp_path, settings, case, *flags)
    assert_same_gradients(one, two, 2 if case == "ppo" else 1)
    assert len(lines(two / "run")) == 3


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--training.patience", 2, "--training.eval_interval", 1, "--training.learning_rate", 1], range(2, 19)),
        (["--training.budget_tokens", 1500], range(2, 19)),
    ],
)
def test_patience_and_budget_end_one_rank_and_two_alike(tmp_path, settings, flags, steps):
    one, two = one_and_two(tmp_path, settings, "sft", "--training.max_steps", 20, *flags)
    ends = [lines(folder / "run")[-1]["step"] for folder in (one, two)]
    assert ends[0] == ends[1] and ends[0] in steps, ends


def test_an_attempt_has_a_name_no_dead_one_left_in_the_store():
    store, names = torch.distributed.HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            others = [pool.submit(dist._agree, store, rank, 3, 10) for rank in (1, 2)]
            time.sleep(0.2)  # they read the name of the dead rank 0 first
            names.append(dist._agree(store, 0, 3, 10))
            assert {other.result() for other in others} == {names[-1]}
    assert len(set(names)) == 3
    with pytest.raises(RuntimeError, match="a rank is missing"):
        dist._agree(store, 2, 3, 0.2)


def test_slow_work_is_done_before_the_group_forms(tmp_path, settings, micro_folder, monkeypatch):
    """What may download, convert or build a base comes before dist.init, whose clock is training.timeout."""
    calls = []

    class Formed(Exception):
        pass

    def resolve(checkpoint):
        calls.append("resolve")
        return micro_folder

    def init(*args):
        calls.append("init")
        raise Formed

    monkeypatch.setattr(base, "resolve", resolve)
    monkeypatch.setattr(dist, "init", init)
    staged = settings(tmp_path, "--training.mode", "staged", "--rl.algorithm", "dpo")
    asked = ["--debug", "--checkpoints", "base=tiny", f"sft={micro_folder}", "--logging.output_dir", tmp_path]
    jobs = [(main, settings(tmp_path, *own)) for main, own in CASES.values()]
    for main, argv in [*jobs, (train_staged.main, staged), (evaluate.main, asked)]:
        calls.clear()
        with pytest.raises(Formed):
            main([str(word) for word in argv])
        assert len(calls) > 1 and calls.index("init") == len(calls) - 1, (main, calls)
