"""A task is one file: its records, its heuristic reward and its metrics. `--task NAME`, or `--task FILE.py`.

The file ends with `TASK = Task(...)`; the fields below are the contract. docs/your_task.md writes one from nothing.
A record is {"id", "prompt": turns, "response", "rejected" or None, "reference" or None}, see common/data.py.

Task files import nothing but the standard library when they are loaded: the downloader and `--help` stay quick.
"""

import functools
import hashlib
import importlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from common import functions
from common.log import UserError, hint

NAMES = ("safety", "clinical", "conala", "gsm8k", "arithmetic", "dialogue")
SPLITS = ("train", "val", "test")
DEBUG_SIZES = {"train": 512, "val": 128, "test": 128}  # generated records
KINDS = ("mean", "rate", "ratio", "corpus")  # of a metric
MAX_TEXT_CHARS = 1_000_000  # of one text in a publisher's row


@dataclass(frozen=True)
class File:
    """A publisher's file; after `#` stands the member of an archive."""

    address: str
    sha256: str | None = None  # of the file as it is downloaded; None: recorded when it first arrives


@dataclass(frozen=True)
class Row:
    """A publisher's row as a record; `flag` is a reason to keep it out of train and val, and to count it in test."""

    id: str
    prompt: list[dict]
    response: str
    rejected: str | None = None
    reference: str | None = None  # None: the response
    flag: str | None = None


@dataclass(frozen=True)
class Part:
    """A component of the heuristic reward, in [0, 1]: `reward.heuristic.NAME` is its weight."""

    weight: float
    what: str


@dataclass(frozen=True)
class Option:
    """A setting of the task: `task_options.NAME`, given to `synthetic`."""

    default: object
    rule: str  # as in configs/defaults.yml: int, float, str with bounds, choices, or `list of 1 | 2 | 3`
    what: str


@dataclass(frozen=True)
class Metric:
    """A row of the tables: what it is, whether more is better, and how its value is made of per-item statistics.

    kind: `mean` and `rate` (0 or 1 for each item) and `ratio` have statistics (sum, count), see `counted`; `corpus` is
    BLEU's ten counts. A metric with `harm` belongs to the guard set: no verdict may hide that it got worse.
    """

    what: str
    better: int  # 1 is up, -1 is down, 0 is neither
    kind: str
    topic: str = "Answers"  # the fold of the report that it stands in
    digits: int = 3
    harm: str = ""  # what a system does whose value got worse, as a verdict says it; {now} is its value


@dataclass(frozen=True)
class Task:
    """What scripts ask of a task. `name`, `parts`, `reward` and `synthetic` (or data of the user's) are enough."""

    name: str
    # parts of the heuristic reward; reward(prompt, completion, reference) -> {part: value in [0, 1]} for each of them
    parts: dict[str, Part]
    reward: Callable[[list[dict], str, str | None], dict[str, float]]
    needs_reference: bool = True  # of a record, for the reward and the metrics

    # metrics; statistics(record, text) -> {metric: (sum, count)} of one answer; those that any task has come on top
    metrics: dict[str, Metric] = field(default_factory=dict)
    statistics: Callable[[dict, str], Mapping[str, Sequence[float]]] | None = None
    headline: tuple[str, ...] = ("judge", "reward", "loss_per_byte")  # the first of these that was measured decides
    # the metric, 0 or 1 for an item, that says whether an answer is right: pass@k, votes. The reward needs a part of
    # the same name, 1 for a right answer: RL's pass@G, the verdict of --explain and rejection sampling read that
    correct: str | None = None
    vote: Callable[[str], str | None] | None = None  # the final answer that a text gives, for majority votes
    library: str | None = None  # the package that scores, asked for before any work is done
    floors: Callable[[list[dict]], dict[str, list[str]]] | None = None  # answers that need no model, by name

    # generated records: synthetic(split, count, seed, **options); sizes: how many where there is no file to read
    synthetic: Callable[..., list[dict]] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    options: dict[str, Option] = field(default_factory=dict)

    # the publisher's files, {split: File}; read(row, where, index) -> a Row, or the reason why it is dropped
    files: dict[str, File] = field(default_factory=dict)
    read: Callable[[dict, str, int], Row | str] | None = None
    rows: str = "json"  # json (lines or one list) or csv
    licence: str = ""
    mirror: str = ""  # the folder of its files under --source

    # preference pairs: does the data have them; else samples are ordered by rank(completion, reference) -> float, which
    # is 1 for the reference itself
    has_pairs: bool = False
    rank: Callable[[str, str], float] | None = None
    pair_rules: dict[str, Callable[[str], float]] = field(default_factory=dict)  # {rule: score}: the higher is chosen
    plain: Callable[[list[dict]], bool] | None = None  # may this prompt be shown as an example?

    path: str | None = None  # the user's file that it was loaded from

    def weights(self) -> dict[str, float]:
        """Default weights of the reward's parts."""
        return {name: part.weight for name, part in self.parts.items()}


CONTRACT = {  # {field: what it is}, in the order in which a user's file is checked
    "name": "one word of letters, digits, _ and -",
    "parts": "{WORD: Part(weight, what it is)}",
    "metrics": "{WORD: Metric(what it is, better, kind)}, better 1, 0 or -1, kind mean, rate, ratio or corpus",
    "options": "{WORD: Option(default, rule, what it is)}",
    "files": "{split: File(address)}",
    "sizes": "{split: number of records}",
    "pair_rules": "{rule: function}",
    "headline": "a tuple of names of metrics",
    "correct": "the name of a metric of kind rate",
    "library": "the name of a package",
    **dict.fromkeys(("reward", "statistics", "vote", "floors", "synthetic", "read", "rank", "plain"), "a function"),
}
ROWS: dict[str, Callable] = {  # {field: is this one of its rows?}
    "parts": lambda row: isinstance(row, Part),
    "metrics": lambda row: isinstance(row, Metric) and row.better in (-1, 0, 1) and row.kind in KINDS,
    "options": lambda row: isinstance(row, Option) and _is_rule(row.rule),
    "files": lambda row: isinstance(row, File),
    "sizes": lambda row: type(row) is int and row > 0,
    "pair_rules": callable,
}


def load(task: str | Task) -> Task:
    """The task of that name, or that a file of the user's defines. UserError, naming the file, where it is none."""
    if isinstance(task, Task):
        return task
    if task in NAMES:
        return importlib.import_module(f"common.tasks.{task}").TASK
    if not task.endswith(".py"):
        known = f"{', '.join(NAMES)} or the path of a task's .py file"
        raise UserError(f"task: {task:.80}: expected {known}{hint(task, NAMES)}")
    return _task_of(functions.load_module(task, "task"), task)


@functools.cache
def _task_of(module, path):
    """The TASK of a user's file, with functions whose faults are one line that names it."""
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        raise UserError(f"task: {path}: expected TASK = Task(...) in it; docs/your_task.md shows one")
    for name, expected in CONTRACT.items():
        if not _keeps_contract(task, name):
            raise UserError(f"task: {path}: {name}: expected {expected}, got {getattr(task, name)!r:.80}")
    own = {entry.name: getattr(task, entry.name) for entry in fields(task)}
    guarded = {name: _guarded(path, name, function) for name, function in own.items() if callable(function)}
    rules = {rule: _guarded(path, rule, score) for rule, score in task.pair_rules.items()}
    return replace(task, path=path, pair_rules=rules, **guarded)


def _is_rule(rule):
    """Is it a text whose bounds (`float >= 0 and < 1`) are numbers?"""
    bounds = re.findall(r"[<>]=?(.*?)(?= and | \| |$)", rule) if isinstance(rule, str) else [""]
    return all(re.fullmatch(r" -?\d+(\.\d+)?(e-?\d+)?", bound) for bound in bounds)


def _keeps_contract(task, name):
    """Is the task's field `name` what CONTRACT says?"""
    value = getattr(task, name)
    if name == "name":
        return isinstance(value, str) and re.fullmatch(r"\w[\w-]*", value)
    if name == "headline":
        return isinstance(value, tuple | list) and all(isinstance(metric, str) for metric in value)
    if name == "correct":
        rates = [metric for metric, how in task.metrics.items() if how.kind == "rate"]
        return value is None or value in rates
    if name == "library":
        return value is None or isinstance(value, str)
    if name in ROWS:
        is_table = isinstance(value, dict) and all(str(key).isidentifier() or name == "pair_rules" for key in value)
        return is_table and all(map(ROWS[name], value.values()))
    return callable(value) or (value is None and name != "reward")


def _guarded(path, name, function):
    """The function of a user's file; what it raises becomes one line that names the file."""

    @functools.wraps(function)
    def call(*arguments, **options):
        with functions.one_line(f"task: {path}: {name} called exit()", f"task: {path}: {name} failed"):
            return function(*arguments, **options)

    return call


def fingerprint(task: str) -> str:
    """SHA-256 of the file that defines a task, wherever it lies."""
    path = Path(__file__).with_name(f"{task}.py") if task in NAMES else Path(task)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def records(task: str | Task, split: str, count: int, seed: int = 0, **options: object) -> list[dict]:
    """`count` generated records with distinct prompts. UserError where the task has none for this split."""
    task = load(task)
    if task.synthetic is None:
        raise UserError(f"task {task.name} has no generated records: name your data with --dataset_path")
    return task.synthetic(split, count, seed, **options)


def generate(draw: Callable, name: str, split: str, count: int, seed: int, pairs: bool = False) -> list[dict]:
    """`count` records with distinct prompts from draw(rng, split) -> (prompt, good answer, bad answer).

    The first n of a longer list are the list of n. Bad answers are kept only where the task has pairs.
    """
    if split not in SPLITS:
        raise UserError(f"task {name} has no generated records for split {split!r}")
    rng, kept, draws = random.Random(f"{seed}/{name}/{split}"), {}, 0
    while len(kept) < count:
        draws += 1
        if draws > 20 * count + 1000:
            raise UserError(f"task {name} has about {len(kept)} generated prompts for {split}, not {count}")
        prompt, good, bad = draw(rng, split)
        record = {"id": f"synthetic-{name}-{split}-{seed}-{len(kept)}", "prompt": prompt, "response": good}
        record |= {"rejected": bad if pairs else None, "reference": good}
        kept.setdefault(repr(prompt), record)
    return list(kept.values())


def split_of(text: str) -> str:
    """The split that a generated combination belongs to, whatever the seed: 80 % train, 10 % val, 10 % test."""
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return "train" if bucket < 8 else SPLITS[bucket - 7]


def prompt_hash(record: dict) -> str:
    """SHA-256 of a prompt, equal for prompts that differ in case or white space only."""
    text = "\n".join(f"{turn['role']}: {' '.join(turn['content'].lower().split())}" for turn in record["prompt"])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def right_answer(record: dict) -> str:
    """What an answer is compared with: the record's reference, else its response."""
    return record["reference"] or record["response"]


def counted(value: float, counts: bool = True) -> tuple[float, float]:
    """An item's statistics of a metric of kind `mean` or `rate`; an item that does not count adds nothing."""
    return (float(value), 1.0) if counts else (0.0, 0.0)


def question(text: str) -> list[dict]:
    """A prompt of one user turn."""
    return [{"role": "user", "content": text}]


def text_of(row: dict, key: str, where: str) -> str:
    """row[key] of a publisher's row, if it is a text that can be trained on and written back."""
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}:{key}: expected text, found {type(value).__name__ if key in row else 'no such key'}")
    if len(value) > MAX_TEXT_CHARS or re.search("[\0\ud800-\udfff]", value):
        raise UserError(f"{where}:{key}: holds a NUL, half a surrogate pair or more than {MAX_TEXT_CHARS:,} characters")
    return value
