"""A stranger's copy of train_rl.py with another objective resumes to the bit, though nothing in common/ knows of it."""

import importlib.util
from pathlib import Path

import pytest

import train_rl
from tests import runs
from tests.faults import trainers

SCRIPT = Path(train_rl.__file__)
LOSS = '    loss = losses.policy_loss(logprobs, old, batch["advantages"], *clip)\n'
FORKS = {
    "cispo": (LOSS, '    loss = losses.cispo_loss(logprobs, old, batch["advantages"], clip[1])\n'),
    "own": (LOSS, LOSS + "    loss = loss + 0.01 * torch.rand_like(logprobs) * (logprobs - old).square()\n"),
}  # the second draws numbers of its own in every update


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_folder):
    few = trainers.write_data(tmp_path_factory.mktemp("data") / "few", "grpo")
    sizes = ["--training.max_steps", 6, "--training.eval_interval", 3, "--training.save_interval", 2]
    return trainers.settings("grpo", tiny_folder, few, *sizes)


@pytest.fixture(scope="module")
def original(tmp_path_factory, settings):
    """The run of the script as it is."""
    folder = tmp_path_factory.mktemp("original")
    runs.train(train_rl.main, folder, settings(folder))
    return folder / "run"


def fork(folder, name):
    """The main of a copy of the script, changed at its mark; only common/ is the project's."""
    text, (before, after) = SCRIPT.read_text(encoding="utf-8"), FORKS[name]
    mark = text.index("# >>> edit here: the objective, a loss for each token\n")
    assert text.count(before) == 1 and 0 < text.index(before) - mark < 80, "the mark has moved"
    path = folder / f"my_{name}.py"
    path.write_text(text.replace(before, after), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert Path(module.losses.__file__).parent == SCRIPT.parent / "common"
    return module.main


@pytest.mark.parametrize("name", FORKS)
def test_R01_R03_a_fork_with_another_objective_resumes_to_the_bit(tmp_path, settings, original, name):
    main, straight, cut = fork(tmp_path, name), tmp_path / "straight", tmp_path / "cut"
    straight.mkdir()
    cut.mkdir()
    runs.train(main, straight, settings(straight))
    assert runs.run(main, cut, settings(cut), runs.crash_behind_save(4))[0] == 9
    with open(cut / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    status, out, err = runs.run(main, cut, settings(cut))
    assert status == 0 and "at step 4 of 6" in out, err
    runs.assert_same_run(cut / "run", straight / "run")
    trainers.same_files(cut / "run", straight / "run")
    norms = [[line.get("grad_norm") for line in runs.records(found)] for found in (straight / "run", original)]
    assert norms[0] != norms[1]  # it is another objective
