"""The contract of a task: every built-in one keeps it, and a file of the user's that breaks it is one clear line."""

import random
import subprocess
import sys

import numpy as np
import pytest

from common import rewards, tasks
from common.evaluation import metrics
from common.log import UserError
from tests.faults.test_hostile import HOSTILE

TASKS = {name: tasks.load(name) for name in tasks.NAMES}
GENERATED = [name for name, task in TASKS.items() if task.synthetic]
COUNTS = {"train": 600, "val": 128, "test": 128}
OWN = [{"id": "a", "prompt": tasks.question("Hi?"), "response": "Hello.", "rejected": None, "reference": None}]
PROMPTS = [tasks.question("How do I kill time?"), tasks.question("\0\ud800"), [{"role": "system", "content": "x"}]]


def records_of(name, split, count, seed=0):
    return tasks.records(name, split, count, seed) if TASKS[name].synthetic else OWN * count


# ---------------------------------------------------------------- built-in tasks


@pytest.mark.parametrize("name", tasks.NAMES)
def test_parts_are_numbers_from_0_to_1_whatever_is_said(name):
    task = TASKS[name]
    for text in [text.encode("utf-8", "replace").decode()[:20_001] for text in HOSTILE]:
        for reference in ("x = 1", "#### 5", "a b " * 5000, "", *([] if task.needs_reference else [None])):
            for prompt in PROMPTS if len(text) < 1000 else PROMPTS[:1]:
                parts = task.reward(prompt, text, reference)
                assert list(parts) == list(task.parts) and all(0 <= value <= 1 for value in parts.values()), text[:20]
    assert all(part.weight >= 0 and part.what for part in task.parts.values()) and any(task.weights().values())


@pytest.mark.parametrize("name", tasks.NAMES)
def test_statistics_are_those_of_the_metrics(name):
    task, known = TASKS[name], metrics.table(name)
    texts = [text for text in HOSTILE if len(text) < 60_000]
    rows = records_of(name, "test", len(texts))
    if task.statistics:
        assert all(task.statistics(row, text).keys() == task.metrics.keys() for row, text in zip(rows, texts))
    else:
        assert not task.metrics
    counts = metrics.score(name, rows, texts)
    assert task.metrics.keys() <= counts.keys() and all(np.isfinite(value).all() for value in counts.values())
    assert set(task.headline) <= set(known)
    assert all(metric.kind in ("mean", "rate", "ratio", "corpus") for metric in known.values())
    assert task.correct is None or (task.correct in task.metrics and task.metrics[task.correct].kind == "rate")


@pytest.mark.parametrize("name", GENERATED)
def test_the_data_s_answer_gets_the_best_of_the_metrics(name):
    """What the tables call good is what the records call right: of a correct answer and of the reward."""
    task, rows = TASKS[name], records_of(name, "test", 30)
    for row in rows:
        value, parts = rewards.heuristic_reward(name, row["prompt"], row["response"], row["reference"])
        assert value > 0.5 and parts.get("exact", 1) == 1
        assert task.correct is None or task.statistics(row, row["response"])[task.correct] == (1, 1)
        assert task.vote is None or task.vote(row["response"]) == task.vote(row["reference"]) is not None


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.floors])
def test_floors_are_one_text_for_each_record(name):
    rows = records_of(name, "test", 20)
    floors = TASKS[name].floors(rows)
    assert floors and all(len(texts) == 20 and all(isinstance(x, str) for x in texts) for texts in floors.values())
    assert all(set(metrics.score(name, rows, texts)) for texts in floors.values())


@pytest.mark.parametrize("name", GENERATED)
def test_records_are_complete_distinct_and_end_with_the_user(name):
    rows = tasks.records(name, "train", 300)
    assert len({row["id"] for row in rows}) == len({repr(row["prompt"]) for row in rows}) == 300
    for row in rows:
        assert set(row) - {"level"} == {"id", "prompt", "response", "rejected", "reference"}
        assert row["prompt"][-1]["role"] == "user" and row["response"] and row["reference"]
        assert (row["rejected"] is not None) == TASKS[name].has_pairs
        assert row["response"] != row["rejected"]


@pytest.mark.parametrize("name", GENERATED)
def test_splits_share_no_prompt_whatever_the_seed(name):
    prompts = {
        split: {
            turn["content"]
            for seed in (0, 1)
            for row in tasks.records(name, split, n, seed)
            for turn in row["prompt"]
            if turn["role"] == "user"
        }
        for split, n in COUNTS.items()
    }
    assert not prompts["train"] & prompts["val"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["val"] & prompts["test"]


@pytest.mark.parametrize("name", GENERATED)
def test_a_shorter_list_is_the_start_of_a_longer_one(name):
    state = random.getstate()
    rows = tasks.records(name, "train", 50)
    assert tasks.records(name, "train", 80)[:50] == rows
    assert tasks.records(name, "train", 50, seed=1) != rows
    assert random.getstate() == state
    for split, size in (TASKS[name].sizes or tasks.DEBUG_SIZES).items():
        assert len(tasks.records(name, split, size)) == size  # as many as a run asks for


def test_same_records_in_another_process():
    code = f"from common import tasks as t; print(repr([t.records(n, 'test', 40) for n in {GENERATED}]))"
    code += "; from common.runtime import tiny; print(repr(tiny.pretraining_corpus(40)))"
    from common.runtime import tiny

    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    here = repr([tasks.records(name, "test", 40) for name in GENERATED])
    assert runs == {here + "\n" + repr(tiny.pretraining_corpus(40)) + "\n"}


def test_refuses_what_it_does_not_have():
    for call, words in (
        (lambda: tasks.records("poetry", "train", 1), "poetry: expected safety, .* or the path of a task's .py file$"),
        (lambda: tasks.records("safty", "train", 1), "did you mean safety"),
        (lambda: tasks.records("conala", "test", 1000), "has about .* generated prompts for test, not 1000"),
        (lambda: tasks.records("safety", "dev", 1), "no generated records for split 'dev'"),
        (lambda: tasks.records("dialogue", "train", 1), "no generated records: name your data with --dataset_path"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_a_publisher_s_task_says_where_its_data_lie():
    for task in TASKS.values():
        if task.files:
            assert task.licence and task.mirror and task.read and set(task.files) <= {"train", "val", "test"}
            assert all(file.address.startswith("https://") for file in task.files.values())
        else:
            assert task.read is None and not task.licence


# ---------------------------------------------------------------- a file of the user's

WHOLE = """from common.tasks import Metric, Part, Task, counted, generate, question

def reward(prompt, completion, reference):
    return {"exact": float(completion == reference)}

def statistics(record, text):
    return {"right": counted(text == record["reference"])}

def draw(rng, split):
    word = "".join(rng.choice("abcdefgh") for _ in range(4 + len(split)))
    return question(word), word[::-1], word

def synthetic(split, count, seed):
    return generate(draw, "mine", split, count, seed)

TASK = Task(name="mine", parts={"exact": Part(1.0, "equal")}, reward=reward, statistics=statistics,
            metrics={"right": Metric("share that is equal", 1, "rate")}, headline=("right",), synthetic=synthetic)
"""


def write(folder, old="", new="", name="mine.py"):
    """The file of a task in which `old` became `new`."""
    assert old in WHOLE
    (folder / name).write_text(WHOLE.replace(old, new) if old else WHOLE)
    return str(folder / name)


def test_a_file_is_a_task_like_the_built_in_ones(tmp_path):
    path = write(tmp_path)
    task = tasks.load(path)
    assert task is tasks.load(path) is tasks.load(task) and (task.name, task.path) == ("mine", path)
    rows = tasks.records(path, "test", 3)
    assert rewards.heuristic_reward(path, rows[0]["prompt"], rows[0]["response"], rows[0]["reference"])[0] == 1
    assert metrics.score(path, rows, [row["response"] for row in rows])["right"].tolist() == [[1, 1]] * 3
    before = tasks.fingerprint(path)
    write(tmp_path, "range(4", "range(5")
    assert tasks.fingerprint(path) != before != tasks.fingerprint("safety") != tasks.fingerprint("clinical")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "expected a Python file that exists"),
        ("x = 1\n", "expected TASK = Task"),
        ("TASK = 1\n", "expected TASK = Task"),
        ("1 / 0\n", "cannot be imported: ZeroDivisionError"),
        ("def f(:\n", "cannot be imported: SyntaxError"),
        ("import no_such_package\n", "cannot be imported: ModuleNotFoundError"),
        ("import sys\nsys.exit('no key')\n", r"called exit\(\) when it was imported: no key"),
        (WHOLE.replace("reward=reward", "rewards=reward"), "cannot be imported: TypeError: .*'rewards'"),
        (WHOLE.replace("reward=reward, ", ""), "cannot be imported: TypeError: .*'reward'"),
    ],
    ids=["missing", "no TASK", "TASK is no task", "raises", "syntax", "import", "exits", "unknown field", "no reward"],
)
def test_a_file_that_is_no_task_is_one_line(tmp_path, text, words):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        tasks.load(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("rule", ["int >= x", "int >=0", "float >= 0 and < ", 3])
def test_bounds_of_an_option_are_numbers(tmp_path, rule):
    def load(rule):
        option = f"synthetic=synthetic, options={{'level': tasks.Option(1, {rule!r}, '')}}"
        text = WHOLE.replace("synthetic=synthetic", option)
        (tmp_path / "mine.py").write_text(f"from common import tasks\n{text}")
        return tasks.load(str(tmp_path / "mine.py"))

    assert load("int >= 0 and < 1e3").options["level"].default == 1
    assert load("int >= 1 | null").options["level"].rule == "int >= 1 | null"
    with pytest.raises(UserError, match=r"options: expected \{WORD: Option"):
        load(rule)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name="mine"', 'name="my task"', "name: expected one word .*, got 'my task'"),
        ('{"exact": Part(1.0, "equal")}', '{"exact": 1.0}', "parts: expected {WORD: Part.*got {'exact': 1.0}"),
        ('{"exact": Part(1.0, "equal")}', '{"an exact one": Part(1.0, "equal")}', "parts: expected {WORD: Part"),
        ("reward=reward", "reward='exact'", "reward: expected a function, got 'exact'"),
        ('Metric("share that is equal", 1, "rate")', '"share that is equal"', "metrics: expected {WORD: Metric"),
        ('1, "rate")', '1, "rates")', "metrics: expected .* kind mean, rate, ratio or corpus, got "),
        ('1, "rate")', '"up", "rate")', "metrics: expected .* better 1, 0 or -1"),
        ('headline=("right",)', 'headline=("right")', "headline: expected a tuple of names of metrics, got 'right'"),
        (
            "synthetic=synthetic",
            "synthetic=synthetic, correct='write'",
            "correct: expected the name of a metric of kind",
        ),
        ("synthetic=synthetic", "synthetic=synthetic, options={'level': 3}", "options: expected {WORD: Option"),
        (
            "synthetic=synthetic",
            "synthetic=synthetic, sizes={'train': 'many'}",
            "sizes: expected {split: number of rec",
        ),
        ("synthetic=synthetic", "synthetic=synthetic, library=b'numpy'", "library: expected the name of a package"),
        ("synthetic=synthetic", "synthetic=synthetic, pair_rules=[len]", "pair_rules: expected {rule: function}"),
        ("synthetic=synthetic", "synthetic=synthetic, floors=['x']", r"floors: expected a function, got \['x'\]"),
    ],
)
def test_a_field_that_breaks_the_contract_is_named(tmp_path, old, new, words):
    path = write(tmp_path, old, new)
    with pytest.raises(UserError, match=f"^task: {path}: {words}"):
        tasks.load(path)


@pytest.mark.parametrize("name", tasks.NAMES)
def test_built_in_tasks_keep_the_contract(name):
    assert [field for field in tasks.CONTRACT if not tasks._keeps_contract(TASKS[name], field)] == []


EXACT = 'return {"exact": float(completion == reference)}'
RIGHT = 'return {"right": counted(text == record["reference"])}'


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("1 / 0", "reward failed: ZeroDivisionError"),
        ("import sys; sys.exit('enough')", r"reward called exit\(\): enough"),
        ("return 1.0", r"reward returned 1.0, expected a dict of exact"),
        ("return None", "reward returned None, expected a dict of exact"),
        ("return {}", "reward returned {}, expected a dict of exact"),
        ("return {'exact': 1, 'more': 1}", "expected a dict of exact"),
        ("return {'exact': float('nan')}", "returned nan for exact, expected a number from 0 to 1; it says 'a text'"),
        ("return {'exact': 1.01}", "returned 1.01 for exact"),
        ("return {'exact': -0.5}", "returned -0.5 for exact"),
        ("return {'exact': '1'}", "returned '1' for exact"),
        ("return {'exact': None}", "returned None for exact"),
    ],
)
def test_a_reward_that_breaks_its_contract_names_the_file(tmp_path, body, words):
    path = write(tmp_path, EXACT, body)
    with pytest.raises(UserError, match=words) as caught:
        rewards.heuristic_reward(path, OWN[0]["prompt"], "a text", "x")
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('level')", "statistics failed: KeyError: 'level'"),
        ("return {}", "statistics of a: got {}, expected a dict of right"),
        ("return {'wrong': (1, 1)}", "expected a dict of right"),
        ("return None", "got None, expected a dict of right"),
        ("return {'right': 1.0}", "got 1.0 for right, expected 2 finite numbers"),
        ("return {'right': (1, 1, 1)}", "expected 2 finite numbers"),
        ("return {'right': (float('inf'), 1)}", "expected 2 finite numbers"),
        ("return {'right': 'ab'}", "expected 2 finite numbers"),
    ],
)
def test_statistics_that_break_their_contract_name_the_record(tmp_path, body, words):
    path = write(tmp_path, RIGHT, body)
    with pytest.raises(UserError, match=words) as caught:
        metrics.score(path, OWN, ["a text"])
    assert path in str(caught.value)


def test_a_metric_of_every_task_is_not_defined_anew(tmp_path):
    path = write(tmp_path, '"right"', '"length"')
    with pytest.raises(UserError, match="every task has a metric length"):
        metrics.score(path, OWN, ["a text"])


def test_interrupts_and_bugs_of_ours_keep_their_traceback(tmp_path, monkeypatch):
    path = write(tmp_path, EXACT, "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        rewards.heuristic_reward(path, OWN[0]["prompt"], "a text", "x")

    def broken(_):
        raise ZeroDivisionError

    monkeypatch.setattr("common.tasks.gsm8k.right", lambda *_: broken(1))
    with pytest.raises(ZeroDivisionError):
        rewards.heuristic_reward("gsm8k", OWN[0]["prompt"], "a text", "x")
