"""Arithmetic: levels, answers that Python's own arithmetic agrees with, problems that stay in their split."""

import re
import subprocess
import sys

import pytest

import train_sft
from common import config, data, rewards, tasks
from common.log import UserError
from common.tasks import arithmetic
from tests import processes

SPLITS = {"train": 2000, "val": 200, "test": 200}


def problem(record):
    """(a, sign, b) of a question."""
    a, sign, b = re.search(r"(\d+) ([-+]) (\d+)", record["prompt"][0]["content"]).groups()
    return int(a), sign, int(b)


@pytest.mark.parametrize("levels", [("1",), ("2", "3"), ("1", "2", "3", "4")])
@pytest.mark.parametrize("split", [*SPLITS, "test_ood"])
def test_answers_are_right_and_numbers_have_the_level_s_digits(split, levels):
    count = 40 if levels == ("1",) and split != "test_ood" else 300
    if levels == ("1",):
        count = min(count, 40 if split == "train" else 20)
    rows = tasks.records("arithmetic", split, count, levels=levels)
    wanted = {max(map(int, levels)) + 1} if split == "test_ood" else set(map(int, levels))
    assert {row["level"] for row in rows} == wanted and len(rows) == count
    assert len({row["prompt"][0]["content"] for row in rows}) == len({row["id"] for row in rows}) == count
    signs = set()
    for row in rows:
        a, sign, b = problem(row)
        signs.add(sign)
        assert len(str(a)) == len(str(b)) == row["level"]
        assert row["response"] == row["reference"] == str(a + b if sign == "+" else a - b) and a >= b * (sign == "-")
        assert rewards.heuristic_reward("arithmetic", row["prompt"], row["response"], row["reference"])[0] == 1
        assert set(row) == {"id", "prompt", "response", "rejected", "reference", "level"}
    assert signs == {"+", "-"}


def test_levels_are_equally_often():
    rows = tasks.records("arithmetic", "train", 3000)
    for level in (1, 2, 3):
        assert level == 1 or 0.3 < sum(row["level"] == level for row in rows) / 3000 < 0.45, level
    rows = tasks.records("arithmetic", "train", 3000, levels=("2", "3", "4"))
    for level in (2, 3, 4):
        assert 0.28 < sum(row["level"] == level for row in rows) / 3000 < 0.39, level


def test_no_problem_above_one_digit_stands_in_two_splits():
    levels = ("2", "3")
    problems = {
        split: {problem(row) for seed in (0, 1) for row in tasks.records("arithmetic", split, n, seed, levels=levels)}
        for split, n in SPLITS.items()
    }
    assert not problems["train"] & (problems["val"] | problems["test"]) and not problems["val"] & problems["test"]
    questions = {split: {row["prompt"][0]["content"] for row in tasks.records("arithmetic", split, 60)}
                 for split in SPLITS}  # fmt: skip
    assert not questions["train"] & questions["test"]  # of one digit: not the same words


def test_reward_statistics_and_floors_by_hand():
    asked = tasks.question("What is 12 - 5?")
    parts = {text: rewards.heuristic_reward("arithmetic", asked, text, "7")[1] for text in ("7", " 7\n", "It is 7.")}
    assert parts["7"] == parts[" 7\n"] == {"exact": 1, "format": 1} and parts["It is 7."] == {"exact": 1, "format": 0}
    assert rewards.heuristic_reward("arithmetic", asked, "-7", "7")[1] == {"exact": 0, "format": 1}
    assert rewards.heuristic_reward("arithmetic", asked, "", "7")[0] == 0
    record = {"prompt": asked, "response": "7", "reference": None, "level": 2}
    assert arithmetic.statistics(record, "7")["exact_2"] == (1, 1) == arithmetic.statistics(record, "7")["exact"]
    for level in (1, 3, 4, 5):
        assert arithmetic.statistics(record, "7")[f"exact_{level}"] == (0, 0)
    assert arithmetic.statistics(record | {"level": 5}, "8")["exact_5"] == (0, 1)
    assert arithmetic.floors([record]) == {"last number of the question": ["5"]}


def test_the_same_in_another_process():
    code = (
        "from common import tasks; print(repr([tasks.records('arithmetic', s, 40, 7) for s in ('train', 'test_ood')]))"
    )
    here = repr([tasks.records("arithmetic", split, 40, 7) for split in ("train", "test_ood")]) + "\n"
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        assert run.stdout == here


def test_levels_reach_it_through_the_command_line(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text("task: arithmetic\ntask_options:\n  levels: [2]\n")
    for argv, levels in (
        (["--task", "arithmetic", "--task_options.levels", "4"], ["4"]),
        (["--task", "arithmetic", "--task_options.levels", "1,4"], ["1", "4"]),
        (["--task", "arithmetic"], ["1", "2", "3"]),
        (["--config", str(path)], ["2"]),
        (["--config", str(path), "--task_options.levels", "[3]"], ["3"]),
    ):
        cfg, _ = config.parse_args("train_sft.py", "doc", ("model", "training", "logging"), ("sft",), argv)
        assert cfg.task_options.levels == levels
    rows = data.load("arithmetic", None, "test", True, 0, cfg.task_options)
    assert {row["level"] for row in rows} == {3} and len(rows) == tasks.DEBUG_SIZES["test"]
    assert len(data.load("arithmetic", None, "train", False, 0, cfg.task_options)) == arithmetic.TASK.sizes["train"]
    small = ["--debug", "--training.max_steps", 1, "--logging.output_dir", tmp_path / "out"]
    for flags, words in (
        (["--task", "arithmetic", "--task_options.levels", "5"], ("task_options.levels", "5")),
        (["--task", "arithmetic", "--task_options.level", "2"], ("task_options.level",)),
        (["--task", "safety", "--task_options.levels", "2"], ("task_options.levels",)),
    ):
        processes.refused(train_sft.main, tmp_path, [*small, *flags], *words)


def test_a_run_asks_for_the_level_of_its_flags(tmp_path):
    """--explain shows the first batch."""
    argv = ["--debug", "--task", "arithmetic", "--task_options.levels", "4", "--explain"]
    status, out, err = processes.run(train_sft.main, tmp_path, [*argv, "--logging.output_dir", tmp_path / "out"])
    assert status == 0, err
    problems = re.findall(r"\b(\d+) ([-+]) (\d+)\b", out)
    assert len(problems) > 4 and all(len(a) == len(b) == 4 for a, _, b in problems)
    assert out.count("arithmetic-train-0-") == len(problems)


def test_a_split_that_it_has_not_is_named():
    with pytest.raises(UserError, match="task arithmetic has no generated records for split 'tests'"):
        tasks.records("arithmetic", "tests", 5)
