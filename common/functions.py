"""Functions from a user's own Python files: load a file, take a function of it, call that as the reward.

Whatever such a file does, a run ends with one line (UserError) that names the config key and the record. Ctrl-C alone
passes through. A caller on several ranks shares that error: log.refuse_together, or the end of the command.
"""

import asyncio
import contextlib
import copy
import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import math
import numbers
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from types import ModuleType
from typing import Any

from common.log import UserError, listed, warn

SHOWN = 200  # characters of a sample or of a value in an error message
LARGEST = 1e12  # size of a reward: sums of squares of such rewards, values and gradients still are float32
TRL_NAMES = {"completions", "completion_ids"}  # parameters by which TRL's form is known
NO_COLUMN = {"prompt", "text_prompt"}  # keys of a record that TRL's form does not get as columns

_loaded: dict[str, tuple[bytes, ModuleType]] = {}  # {file: its text, its module}


def load(spec: str, key: str) -> Callable:
    """`path/to/file.py:name` -> the function. key: of the config, for messages. UserError if there is none."""
    path, _, name = spec.rpartition(":")
    if not path:
        raise UserError(f"{key}: {spec}: expected path/to/file.py:name of a file that exists")
    module = load_module(path, key)
    function = getattr(module, name, None)
    if not callable(function):
        own = [each for each, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise UserError(f"{key}: {path} has no function {name!r}; it has {listed(own) or 'none'}")
    return function


def load_module(path: str | Path, key: str) -> ModuleType:
    """A user's Python file as a module, imported once for each text of it. UserError if it cannot be.

    It is registered as `import` would do it, so that dataclasses and worker processes find it, and files beside it can
    be imported. Its folder is the last one searched: a file random.py or common.py beside it hides no other module.
    """
    file = Path(os.path.abspath(path))  # a link keeps its own name, whatever it points to
    if file.suffix != ".py" or not file.is_file():
        raise UserError(f"{key}: {path}: expected a Python file that exists")
    text = file.read_bytes()
    if str(file) in _loaded and _loaded[str(file)][0] == text:
        return _loaded[str(file)][1]
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    importlib.invalidate_caches()
    name = module_name(file)
    spec: Any = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name], _loaded[str(file)] = module, (text, module)
    try:
        with one_line(f"{key}: {path} called exit() when it was imported", f"{key}: {path} cannot be imported"):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        del _loaded[str(file)]
        raise
    return module


def module_name(file: Path) -> str:
    """The name by which `import` finds this file; another one where that name belongs to another module.

    By the first one, a worker process that was spawned finds it too; by the other, only one that was forked.
    """
    name = file.stem
    if name not in sys.stdlib_module_names:
        spec = importlib.machinery.PathFinder.find_spec(name)
        origins = [spec and spec.origin, getattr(sys.modules.get(name), "__file__", str(file))]
        if all(origin and Path(origin).resolve() == file.resolve() for origin in origins):
            return name
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    return f"user_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}_{digest}"


def call(function: Callable, key: str, records: list[dict], texts: list[str], ids: list[list[int]]) -> list[float]:
    """A reward function's scores of completions -> n floats, NaN where it gave no score (None, in TRL's form alone).

    texts, ids: the completions, as text and as token ids. Ours is called as f(prompt, completion, reference) for each
    completion; TRL's, known by a parameter of TRL_NAMES, once for all of them. What it gets are copies. Either may be
    `async def`. UserError naming the record if it raises, exits, or returns anything but numbers up to LARGEST.
    """
    if TRL_NAMES.isdisjoint(parameters(function)):
        return [call_ours(function, key, record, text) for record, text in zip(records, texts, strict=True)]
    values = call_trl(function, key, records, texts, ids)
    return [
        math.nan if value is None else number(value, key, record["id"], text)
        for value, record, text in zip(values, records, texts, strict=True)
    ]


def call_ours(function: Callable, key: str, record: dict, text: str) -> float:
    """The score of one completion by f(prompt, completion, reference)."""
    exited, failed = f"{key} called exit() on {record['id']}", f"{key}: failed on {record['id']}"
    with one_line(exited, failed, f"; it says {text[:SHOWN]!r}"):
        value = awaited(function(copy.deepcopy(record["prompt"]), text, record["reference"]))
    return number(value, key, record["id"], text)


def call_trl(function: Callable, key: str, records: list[dict], texts: list[str], ids: list[list[int]]) -> list:
    """What a reward function of TRL's GRPOTrainer returns: a list, one value for each completion.

    It gets lists by keyword: prompts, completions, completion_ids and the records' columns, those that it accepts. A
    prompt that the data gave as plain text (record["text_prompt"]) is a string, and its completion too; any other
    prompt is a list of messages, and its completion a list of one message.
    """
    names = {name for record in records for name in record} - NO_COLUMN
    columns = {name: [record.get(name) for record in records] for name in sorted(names)}
    columns |= {"prompts": [], "completions": [], "completion_ids": ids}
    for record, text in zip(records, texts, strict=True):
        is_text = record.get("text_prompt")
        columns["prompts"].append(record["prompt"][-1]["content"] if is_text else record["prompt"])
        columns["completions"].append(text if is_text else [{"role": "assistant", "content": text}])
    accepted = parameters(function)
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in accepted.values()):
        columns = {name: column for name, column in columns.items() if name in accepted}
    # one by one: where two rows share a prompt, a copy of the whole list would share it too
    columns = {name: [copy.deepcopy(value) for value in column] for name, column in columns.items()}
    rows = listed(list(dict.fromkeys(record["id"] for record in records)))
    with one_line(f"{key} called exit() on {rows}", f"{key}: failed on {rows}"):
        values = awaited(function(**columns))
        if hasattr(values, "tolist"):  # a tensor or an array
            values = values.tolist()
    if not isinstance(values, list | tuple):
        raise UserError(f"{key}: returned {shown(values)} for {len(texts)} completions: expected a list of numbers")
    if len(values) != len(texts):
        raise UserError(f"{key}: returned {len(values)} values for {len(texts)} completions")
    return list(values)


def number(value: Any, key: str, record_id: str, text: str) -> float:
    """A user's number as a float: int, float or bool, numpy's too, or a tensor without dimensions. UserError if not."""
    if getattr(value, "ndim", None) == 0:  # of numpy or torch
        value = value.item()
    size: Any = abs(value) if isinstance(value, numbers.Real) else None
    if size is None:
        problem = ": expected a number"
    elif size <= LARGEST:
        return float(value)
    else:
        beyond = f": beyond float32, where sums of squares hold rewards up to {LARGEST:g}"
        problem = beyond if size < math.inf else ""  # NaN and infinity speak for themselves
    raise UserError(f"{key}: returned {shown(value)} for {record_id}{problem}; it says {text[:SHOWN]!r}")


def parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    """{name: parameter} of a function; none of a built-in that does not tell them."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def awaited(value: Any) -> Any:
    """A call's result, waited for where the function is `async def`."""
    if not inspect.isawaitable(value):
        return value
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return event_loop().run_until_complete(value)
    with futures.ThreadPoolExecutor(1) as thread:  # a notebook's own loop runs in this one
        return thread.submit(event_loop().run_until_complete, value).result()


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """One for all calls: a client that a user's file keeps open belongs to the loop of its first call.

    An error of a task that nobody waits for is one warning, not a traceback.
    """
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(_warn_of_task)
    return loop


def _warn_of_task(loop, context):
    error = context.get("exception")
    told = isinstance(error, SystemExit)  # it has ended the call
    if not told and not sys.is_finalizing():
        warn(f"a user's function: {context['message']}: {error!r}")


@contextlib.contextmanager
def one_line(exited: str, failed: str, ending: str = "") -> Iterator[None]:
    """Whatever the user's code inside raises, SystemExit too, becomes a UserError of these words; not so Ctrl-C.

    A user's file that has a model of its own may set the working folder, or torch's gradients, default type or device,
    for the whole process: they are put back.
    """
    torch, before, folder = sys.modules.get("torch"), None, os.getcwd()  # flags are checked before torch is imported
    if torch:
        before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    try:
        yield
    except KeyboardInterrupt:
        raise
    except SystemExit as error:  # it would end the run without a word
        raise UserError(f"{exited}: {error.code}" if isinstance(error.code, str) else exited) from error
    except BaseException as error:
        raise UserError(f"{failed}: {type(error).__name__}: {error}{line_of(error)}{ending}") from error
    finally:
        os.chdir(folder)
        if torch := sys.modules.get("torch"):
            gradients, dtype, device = before or (True, torch.float32, torch.device("cpu"))  # as it comes
            torch.set_grad_enabled(gradients)
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != device:
                torch.set_default_device(device)


def line_of(error: BaseException) -> str:
    """ " (mine.py, line 3)": the last line of a user's file that an error came through, if any."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in _loaded]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def shown(value: Any) -> str:
    """A value for a message; its type where it cannot be written down."""
    try:
        return repr(value)[:SHOWN]
    except Exception:  # a whole number of over 4,300 digits, an object of the user's
        return f"a value of type {type(value).__name__}"
