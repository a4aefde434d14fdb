"""A user's own functions: how a file is loaded, what a reward function gets, and what it may return."""

import asyncio
import copy
import inspect
import math
import multiprocessing
import random
import sys
import types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from common import functions
from common.log import UserError

KEY = "reward.function"
KIND = [{"role": "user", "content": "How do I bake bread?"}]
ROWS = [{"id": name, "prompt": KIND, "reference": None} for name in ("first", "second")]


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """write(text, name) -> the path of a user's file; what its import changes in the process is taken back."""
    others = str(tmp_path.parent)  # folders that other tests left on the path may hold a file of the same name
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.startswith(others)])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(functions, "_loaded", {})
    before = set(sys.modules)

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def call(function, rows=ROWS, texts=("a", "b"), ids=((1,), (2,))):
    return functions.call(function, KEY, rows, list(texts), [list(row) for row in ids])


# ---------------------------------------------------------------- loading


def test_user_function(user_file):
    file = user_file("def score(prompt, completion, reference):\n    return float(len(completion))\n")
    assert functions.load(f"{file}:score", KEY)(KIND, "four", None) == 4.0
    bad = [
        (f"{file}:absent", "no function 'absent'; it has score$"),
        ("nowhere.py:f", "exists"),
        ("plain", "expected"),
        (f"{file}:", "no fun"),
    ]
    for spec, reason in [*bad, (f"{file.parent}:f", "exists"), (f"{user_file('', 'x.txt')}:f", "exists")]:
        with pytest.raises(UserError, match=reason):
            functions.load(spec, KEY)
    for text, reason in (
        ("1 / 0\n", r"ZeroDivisionError: division by zero \(mine.py, line 1\)"),
        ("exit()\n", r"mine.py called exit\(\) when it was imported$"),
        ("import sys\nsys.exit('no key')\n", r"mine.py called exit\(\) when it was imported: no key$"),
        ("raise BaseException('odd')", "BaseException: odd"),
        ("def score(:", r"SyntaxError: .*\(mine.py, line 1\)"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match="evaluation.metric: .*" + reason):
            functions.load(f"{file}:score", "evaluation.metric")
        assert "mine" not in sys.modules
    file.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        functions.load(f"{file}:score", KEY)


def test_a_file_is_imported_once_for_each_text(user_file):
    """Two keys may name one file: its functions stay those that a worker process finds."""
    file = user_file("calls = []\ndef a(p, c, r): calls.append(c); return 1\ndef b(p, c, r): return len(calls)\n")
    call(functions.load(f"{file}:a", KEY))
    assert call(functions.load(f"{file}:b", "evaluation.metric")) == [2, 2]
    assert functions.load_module(file, "task") is sys.modules["mine"]
    file.write_text(file.read_text() + "# changed\n")
    assert call(functions.load(f"{file}:b", KEY)) == [0, 0]


def test_annotations_of_a_dataclass(user_file):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Part:\n    x: int\n"
    )
    file = user_file(text + "def score(prompt, completion, reference): return Part(3).x\n")
    assert call(functions.load(f"{file}:score", KEY)) == [3, 3]


def test_a_file_beside_it_can_be_imported(user_file):
    user_file("def size(text): return len(text)\n", "helper_beside.py")
    file = user_file("import helper_beside\ndef score(p, completion, r): return helper_beside.size(completion)\n")
    assert call(functions.load(f"{file}:score", KEY), texts=("a", "bcd")) == [1, 3]


POOL = """import multiprocessing
def size(text): return len(text)
def score(completions, **columns):
    with multiprocessing.get_context({method!r}).Pool(1) as pool:
        return pool.map(size, completions)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_of_processes(user_file, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("this system does not fork")
    function = functions.load(f"{user_file(POOL.format(method=method))}:score", KEY)
    rows = [row | {"text_prompt": True} for row in ROWS]
    assert call(function, rows, ("a", "bcd")) == [1, 3]


@pytest.mark.parametrize("stem", ["random", "common", "torch", "functions", "a.b", "my-reward", "sys"])
def test_names_of_other_modules(user_file, stem):
    """Python's, the project's and installed ones stay what they are, and one's own file works whatever its name."""
    file = user_file("def score(prompt, completion, reference): return 7\n", f"{stem}.py")
    before = dict(sys.modules)
    function = functions.load(f"{file}:score", KEY)
    assert call(function) == [7, 7] and sys.modules[function.__module__].score is function
    assert all(sys.modules[name] is module for name, module in before.items())
    import random as plain

    assert plain is random and sys.path.index(str(file.parent)) == len(sys.path) - 1
    assert (function.__module__ == stem) == (stem in ("functions", "my-reward"))


def test_two_files_of_one_name(user_file, tmp_path):
    functions_of = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        file = user_file(f"def score(prompt, completion, reference): return {number}\n", f"{number}/mine.py")
        functions_of.append(functions.load(f"{file}:score", KEY))
    assert [call(function) for function in functions_of] == [[1, 1], [2, 2]]
    assert len({function.__module__ for function in functions_of}) == 2


# ---------------------------------------------------------------- f(prompt, completion, reference)


def test_user_function_that_fails_names_the_record():
    assert call(lambda prompt, text, reference: len(text), texts=("a", "bcd")) == [1.0, 3.0]
    for function, words in (
        (lambda *_: 1 / 0, "failed on first: ZeroDivisionError"),
        (lambda *_: "x", "'x' for first: expected a number; it says 'a'"),
        (lambda *_: exec("exit()"), r"^reward.function called exit\(\) on first$"),
        (lambda prompt, text, reference: sys.exit("no key") if text == "b" else 1, r"exit\(\) on second: no key$"),
        (lambda prompt, text, reference: float("nan") if text == "b" else 1, "nan for second; it says 'b'$"),
        (lambda prompt, text, reference: -math.inf if text == "b" else 1, "-inf for second; it says 'b'$"),
        (lambda prompt, completion: 1, "failed on first: TypeError"),
    ):
        with pytest.raises(UserError, match=words):
            call(function)

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # Ctrl-C is no fault of the function
        call(interrupted)


CHANGES = """import os, torch
def change():
    os.chdir("/")
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
"""


@pytest.mark.parametrize("when", ["change()\n", ""], ids=["when it is imported", "when it is called"])
def test_what_it_sets_for_the_whole_process_is_put_back(user_file, when):
    """Else training would have no gradients, other types, and its files in another folder."""
    body = "def score(prompt, completion, reference):\n    change()\n    return completion == 'a' or 1 / 0\n"
    here, function = Path.cwd(), functions.load(f"{user_file(CHANGES + when + body)}:score", KEY)
    with pytest.raises(UserError, match="failed on second: ZeroDivisionError"):
        call(function)
    value = torch.ones(1, requires_grad=True) * 2
    assert (Path.cwd(), value.requires_grad, value.dtype, value.device.type) == (here, True, torch.float32, "cpu")


@pytest.mark.parametrize("kind", [BaseException, GeneratorExit, StopIteration, asyncio.CancelledError, UserError])
def test_every_exception_is_named(kind, user_file):
    def failing(*_):
        raise kind("odd")

    with pytest.raises(UserError, match=rf"^reward.function: failed on first: {kind.__name__}: odd; it says 'a'$"):
        call(failing)
    file = user_file("import json\ndef score(p, c, r):\n    x = c\n    return json.loads(x)\n")
    with pytest.raises(UserError, match=r"JSONDecodeError: .* \(mine.py, line 4\); it says 'a'"):
        call(functions.load(f"{file}:score", KEY))


class Broken:
    def __repr__(self):
        raise ValueError


NUMBERS = [True, 3, 0.5, Fraction(1, 2), np.float32(0.5), np.int64(3), np.bool_(True), np.array(2.0)]
NUMBERS += [torch.tensor(0.5), torch.tensor(3), torch.tensor(0.5, dtype=torch.bfloat16), -1e12]
NO_NUMBERS = [
    "0.5",
    b"1",
    None,
    1j,
    [1.0],
    (1,),
    {},
    torch.tensor([0.5]),
    np.array([0.5]),
    np.complex64(1),
    np.str_("1"),
]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_what_is_a_number(value):
    for returned in (call(lambda *_: value), call(lambda completions: [value] * 2)):
        assert returned == [float(value)] * 2 and all(type(each) is float for each in returned)


@pytest.mark.parametrize("value", [*NO_NUMBERS, Broken()], ids=lambda value: type(value).__name__)
def test_what_is_none(value):
    shown = "a value of type Broken" if isinstance(value, Broken) else ""
    functions_of = [lambda prompt, text, reference: value if text == "b" else 1, lambda completions: [1, value]]
    for function in functions_of if value is not None else functions_of[:1]:
        with pytest.raises(
            UserError, match=rf"^{KEY}: returned .*{shown}.* for second: expected a number; it says 'b'$"
        ):
            call(function)


BEYOND = {"tiny": -1e39, "bound": 1e13, "whole": 10**400, "no_repr": -(10**5000), "numpy": np.float64(-1e39)}


@pytest.mark.parametrize("value", BEYOND.values(), ids=list(BEYOND))
def test_a_bound_beyond_which_a_reward_is_refused(value):
    with pytest.raises(UserError, match=r"^reward.function: returned .* for first: beyond float32"):
        call(lambda *_: value)
    if value == -1e39:
        with pytest.raises(UserError, match=r"returned -1e\+39 for second: beyond float32"):
            call(lambda completions: [0, value])


def test_each_call_gets_its_own_copy():
    """What a function does to its prompt reaches neither the records nor its next call."""
    rows = [record | {"tags": ["x"]} for record in [ROWS[0]] * 2]
    before, seen = copy.deepcopy(rows), []

    def ours(prompt, completion, reference):
        seen.append(len(prompt))
        prompt.append({"role": "assistant", "content": completion})
        prompt[0]["content"] = "?"
        return 1

    def trls(prompts, completions, completion_ids, tags):
        for prompt, ids, tag in zip(prompts, completion_ids, tags, strict=True):
            seen.append((len(prompt), ids[:], tag[:]))
            prompt[0]["content"] += "?"
            prompt.append("more")
            ids.append(9)
            tag.append("y")
        return [0] * len(prompts)

    call(ours, rows)
    assert seen == [1, 1] and rows == before
    seen.clear()
    answers = [[1], [2]]
    functions.call(trls, KEY, rows, ["a", "b"], answers)
    assert seen == [(1, [1], ["x"]), (1, [2], ["x"])] and rows == before and answers == [[1], [2]]


# ---------------------------------------------------------------- TRL's form


def test_what_trls_form_gets():
    caught = {}

    def everything(completions, **columns):
        caught.update(columns, completions=completions)
        return [1, 2, None]

    turns = [*KIND, {"role": "assistant", "content": "Slowly."}, {"role": "user", "content": "How?"}]
    rows = [
        {"id": "a", "prompt": turns, "reference": "r", "response": "s", "level": 3},
        {"id": "b", "prompt": KIND, "reference": None, "response": "t", "text_prompt": True},
        {"id": "c", "prompt": KIND, "reference": None, "response": "u", "completions": "not this"},
    ]
    scores = call(everything, rows, ("x", "y", "z"), ((1,), (2, 3), ()))
    assert scores[:2] == [1, 2] and math.isnan(scores[2])
    assert caught == {
        "prompts": [turns, KIND[0]["content"], KIND],
        "completions": [[{"role": "assistant", "content": "x"}], "y", [{"role": "assistant", "content": "z"}]],
        "completion_ids": [[1], [2, 3], []],
        "id": ["a", "b", "c"],
        "reference": ["r", None, None],
        "response": ["s", "t", "u"],
        "level": [3, None, None],
    }
    assert call(lambda completions, level: [level[0]] * 3, rows, "xyz", [[]] * 3) == [3, 3, 3]
    assert call(lambda completion_ids, **_: [len(each) for each in completion_ids], rows, "xyz", [[], [1], []]) == [
        0,
        1,
        0,
    ]
    assert call(lambda *, completions, trainer_state=None: [4] * 3, rows, "xyz", [[]] * 3) == [4, 4, 4]
    with pytest.raises(UserError, match=r"failed on a, b, c: TypeError: .*'trainer_state'"):
        call(lambda completions, trainer_state: [1] * 3, rows, "xyz", [[]] * 3)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("is_text", [False, True])
def test_it_gets_what_trl_gives(is_async, is_text):
    """The same call by GRPOTrainer's own method."""
    from trl import GRPOTrainer

    calls = []

    def plain(prompts, completions, completion_ids, answer, **more):
        calls.append((prompts, completions, completion_ids, answer, more["id"]))
        return [float(len(ids)) if ids else None for ids in completion_ids]

    async def waiting(prompts, completions, completion_ids, answer, **more):
        await asyncio.sleep(0)
        return plain(prompts, completions, completion_ids, answer, **more)

    function = waiting if is_async else plain
    prompts = ["How?" if is_text else [{"role": "user", "content": "How?"}]] * 3
    completions = [text if is_text else [{"role": "assistant", "content": text}] for text in "abc"]
    ids = [[5], [], [6, 7]]
    inputs = [{"prompt": prompt, "id": name, "answer": 4} for prompt, name in zip(prompts, "xyz", strict=True)]
    loop = asyncio.new_event_loop()
    trainer = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device="cpu", is_main_process=False),
        state=types.SimpleNamespace(global_step=0),
        _log_completion_extra=None,
        _log_metric=None,
        environments=None,
        reward_funcs=[function],
        reward_processing_classes=[None],
        reward_func_names=["f"],
        args=types.SimpleNamespace(report_to=[]),
        is_in_train=True,
        async_loop=loop,
    )
    import threading

    import trl.trainer.grpo_trainer as module

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "gather", lambda values: values)
        patch.setattr(module, "logger", types.SimpleNamespace(warning=lambda words: None))
        theirs = GRPOTrainer._calculate_rewards(trainer, inputs, prompts, completions, ids)[:, 0]
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    turns = [{"role": "user", "content": "How?"}]
    rows = [{"id": name, "prompt": turns, "answer": 4, "text_prompt": is_text} for name in "xyz"]
    ours = torch.tensor(functions.call(function, KEY, rows, list("abc"), ids))
    assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1)) and ours.isnan().tolist() == [False, True, False]
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1, 2, 3], "^reward.function: returned 3 values for 2 completions$"),
        ([], "returned 0 values for 2 completions$"),
        (None, "returned None for 2 completions: expected a list of numbers$"),
        ("ab", "returned 'ab' for 2"),
        ({"a": 1, "b": 2}, "for 2 completions: expected a list"),
        (1.0, "returned 1.0 for 2"),
        (torch.tensor(1.0), "returned 1.0 for 2"),
        (torch.ones(2, 1), r"returned \[1.0\] for first: expected a number"),
        ([1, math.nan], "returned nan for second"),
    ],
)
def test_what_trls_form_may_not_return(values, words):
    with pytest.raises(UserError, match=words):
        call(lambda completions: values)


@pytest.mark.parametrize("values", [(1, 2), torch.tensor([1.0, 2.0]), np.array([1, 2])])
def test_lists_tensors_and_arrays(values):
    assert call(lambda completions: values) == [1, 2]


def test_trls_form_that_fails_names_its_records():
    rows = [ROWS[0], ROWS[0], ROWS[1]]
    for function, words in (
        (lambda completions: 1 / 0, "^reward.function: failed on first, second: ZeroDivisionError"),
        (lambda completions: sys.exit("no key"), r"^reward.function called exit\(\) on first, second: no key$"),
    ):
        with pytest.raises(UserError, match=words):
            call(function, rows, "abc", [[]] * 3)


def test_async_functions():
    """Either form; clients that a file keeps belong to one loop; SystemExit in a task is named too."""
    loops = []

    async def ours(prompt, completion, reference):
        loops.append(asyncio.get_running_loop())
        return len(completion)

    async def leaving(completions):
        await asyncio.gather(*(asyncio.to_thread(sys.exit, "no key") for _ in completions))

    async def waiting(completions):
        raise TimeoutError("too slow")

    assert call(ours, texts=("a", "bcd")) == [1, 3] and loops[0] is loops[1]
    with pytest.raises(UserError, match=r"^reward.function called exit\(\) on first, second: no key$"):
        call(leaving)
    functions.event_loop.cache_clear()  # its other task would end the next call
    with pytest.raises(UserError, match=r"^reward.function: failed on first, second: TimeoutError: too slow$"):
        call(waiting)


def test_async_functions_in_a_notebook():
    """It runs a loop of its own in the thread that calls main."""

    async def score(prompt, completion, reference):
        await asyncio.sleep(0)
        return 2.0

    async def cell():
        return [functions.awaited(score("", "", "")), functions.awaited(3)]

    assert asyncio.run(cell()) == [2.0, 3]


def test_a_task_that_nobody_waits_for(capsys, caplog):
    """Its error is one warning, told once; SystemExit has ended the call."""

    async def failing():
        raise ValueError("odd")

    async def careless(completions):
        task = asyncio.ensure_future(failing())
        await asyncio.sleep(0)
        assert task.done()
        return [1] * len(completions)

    for _ in range(2):
        assert call(careless) == [1, 1]
    said = "warning: a user's function: Task exception was never retrieved: ValueError('odd')"
    functions.event_loop().call_exception_handler({"message": "never retrieved", "exception": SystemExit(1)})
    assert capsys.readouterr().out.splitlines() == [said] and not caplog.records


def test_functions_that_do_not_tell_their_parameters():
    with pytest.raises(ValueError, match="no signature"):
        inspect.signature(max)
    with pytest.raises(UserError, match="failed on first: TypeError"):
        call(max)
