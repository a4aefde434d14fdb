"""The trainers as the fault tests and soak.py drive them: short runs with dropout and epoch edges."""

import functools

import pytest

import train_reward
import train_rl
import train_sft
import train_staged
from tests import inputs

KINDS = ("sft", "reward", "dpo", "grpo", "ppo")
MAINS = {"sft": train_sft.main, "reward": train_reward.main, "staged": train_staged.main}
PAIRS = ["--training.micro_batch_tokens", 256]
SIZES = ["--rl.rollout_size", 4, "--rl.group_size", 2, "--rl.max_new_tokens", 8, "--rl.minibatches", 2]
SIZES += ["--rl.num_ppo_epochs", 1, "--rl.critic_warmup", 1, "--evaluation.max_items", 5]
SIZES += ["--evaluation.max_new_tokens", 8, "--evaluation.draws", 100, "--reward.type", "heuristic"]
RATES = ["--rl.max_steps", "null", "--rl.learning_rate", "null"]


def main_of(kind):
    return MAINS.get(kind, train_rl.main)


def write_data(folder, kind):
    """Twenty records: with four a step, epochs begin at steps 5, 10, 15."""
    return inputs.write_data(folder, "conala" if kind == "sft" else "safety", train=20, val=6)


def settings(kind, base_folder, source, *more):
    """A function (output folder, *flags) -> the flags of a short run of a trainer, see inputs.settings."""
    if kind == "sft":
        return inputs.settings(base_folder, source, *more)
    if kind == "staged":
        return staged_settings(base_folder, source)
    if kind == "reward":
        return inputs.settings(base_folder, source, "--training.mode", "reward", *PAIRS, *more)
    flags = ["--training.mode", "rl", "--rl.algorithm", kind, *RATES]
    online = [*SIZES, "--rl.critic_learning_rate", 1e-3]
    return inputs.settings(base_folder, source, *flags, *(PAIRS if kind == "dpo" else online), *more)


def fixtures(kind):
    """(few, settings, straight) of a module whose tests are short runs of one trainer.

    few: the data; settings: the function above; straight: the folder of a run that nothing stopped, by peft_type. For
    `online`, which is GRPO and PPO, the last two are functions of the algorithm.
    """

    @pytest.fixture(scope="module")
    def few(tmp_path_factory):
        return write_data(tmp_path_factory.mktemp("data") / "few", kind)

    @pytest.fixture(scope="module")
    def flags(few, micro_folder):
        if kind == "online":
            return lambda algorithm, *more: settings(algorithm, micro_folder, few, *more)
        return settings(kind, micro_folder, few)

    @pytest.fixture(scope="module")
    def straight(request, tmp_path_factory):
        made = request.getfixturevalue("settings")
        if kind == "online":
            return functools.cache(lambda algorithm: inputs.straight(main_of(kind), tmp_path_factory, made(algorithm)))
        return inputs.straight(main_of(kind), tmp_path_factory, made)

    return few, flags, straight


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory, micro_folder):
    """No reference that another version left in the user's cache may take part; the base is built before."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_ALIGNMENT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory, micro_folder):
    return inputs.random_reward_model(tmp_path_factory.mktemp("judge") / "model", micro_folder)


@pytest.fixture(scope="module")
def start(tmp_path_factory, micro_folder):
    return inputs.random_start(tmp_path_factory.mktemp("start") / "final", micro_folder)


def staged_settings(base_folder, source):
    """The same for train_staged.py: SFT, then GRPO, three steps each."""

    def flags(folder, *more):
        sizes = [*SIZES, "--rl.algorithm", "grpo", "--rl.minibatches", 1, "--rl.max_steps", 3]
        sizes += ["--training.max_steps", 3, "--training.batch_size", 4, "--training.eval_interval", 50]
        where = ["--model.base_checkpoint", base_folder, "--dataset_path", source, "--logging.output_dir", folder]
        more = ["--training.save_interval", 2, "--logging.run_name", "run", *more]
        return ["--debug", "--training.mode", "staged", *sizes, *where, *more]

    return flags


def same_files(run_dir, other, names=("samples.jsonl", "held_out.jsonl", "report.json")):
    """What a run writes beside metrics and weights is the same to the byte, or in neither."""
    for name in names:
        found = [(folder / name).read_bytes() if (folder / name).exists() else None for folder in (run_dir, other)]
        assert found[0] == found[1], name
