"""configs/defaults.yml < --config FILE < --debug < flags, resolved into one nested namespace.

`configs/defaults.yml` is the only schema: types, choices, bounds, help and flags all come from its lines, so a new key
is one line there. A value is read by the type that its key wants, never by YAML's own guess (to YAML `5e-5` is text,
`no` is false and `010` is 8). Every mistake is a UserError of one line that says where, what was expected and why.
"""

import argparse
import difflib
import functools
import json
import math
import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from common import tasks
from common.log import UserError, command, hint

# Every config once listed the parts of these three tasks, whatever its own was. Where a file has some of each, those of
# the other tasks are skipped.
THREE_TASKS = [
    {f"reward.heuristic.{part}" for part in parts.split()}
    for parts in ("toxicity refusal length repetition", "overlap facts", "bleu exact parse")
]
PARTS_OF_OLD = set().union(*THREE_TASKS)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SCRIPTS = {"sft": "train_sft.py", "reward": "train_reward.py", "rl": "train_rl.py", "staged": "train_staged.py"}
NAME_RULE = "a NAME has letters, digits, '_', '-' and '.', and begins with none of the last two"
MAX_BYTES, MAX_EVENTS, MAX_DEPTH = 64 * 1024, 1000, 4  # PyYAML reads this within a second even if made to be slow
NUMBERS = {"int": r"[+-]?(0|[1-9]\d{0,17})", "float": r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"}  # no 010, no .inf
EXPLAINED = "show the first batch as it would be trained, the memory it takes and how long the run will take, then exit"
EXPLAIN = ("--explain", {"action": "store_true", "help": EXPLAINED})
PARADIGMS = ("base", "sft", "rft", "dpo", "grpo", "ppo", "rl", "staged", "half")  # in the order of training
SEEDS = ("--seeds", {"metavar": "N,N", "help": "one run for each of these seeds, in a folder of its own"})
WORDS = {"null": None, "~": None, "true": True, "false": False}
BOUNDS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def load_config(path: Path | str | None = None, overrides: dict[str, Any] | None = None) -> SimpleNamespace:
    """Return defaults < YAML file at `path` < `overrides` ({dotted key: value}) as nested namespaces.

    Raises UserError on an unreadable or hostile file, an unknown or repeated key, a wrong type or a value out of range.
    """
    entries, given = _entries(path), overrides or {}
    leaves, headings = _schema(_named_task(entries, given, "override "))
    return _resolve(leaves, headings, entries, given, "override ")


def parse_args(
    script: str,
    description: str,
    sections: Sequence[str],
    modes: Sequence[str],
    argv: list[str] | None = None,
    jobs: Sequence[tuple[str, dict]] = (),
) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Read a script's command line; returns (cfg, job).

    Top-level keys and those of `sections` are flags of the same dotted spelling, and `flags` in `job` is {key: text} of
    those given; `jobs`, (flag, kwargs) of argparse, come back in `job` too, next to `config`. Without --config
    `training.mode` is the first of `modes`. Raises UserError as load_config does, for every mistake in the flags, and
    for a `training.mode` outside `modes` unless that is empty.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # the task has flags of its own
    first.error = _refuse  # type: ignore[method-assign]  # its own ends the process
    for flag in ("--config", "--task"):
        first.add_argument(flag, type=expand_home)
    early = first.parse_known_args(argv)[0]
    entries, named = _entries(early.config), {} if early.task is None else {"task": early.task}
    task = _named_task(entries, named, "--")
    leaves, headings = _schema(task)
    parser = argparse.ArgumentParser(script, "%(prog)s [--config FILE] [--debug] [--section.key VALUE]...", description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev, parser.error = False, _refuse  # type: ignore[method-assign]  # its own ends the process
    parser.add_argument(
        "--config", metavar="FILE", type=expand_home, help="YAML file of what differs from configs/defaults.yml"
    )
    parser.add_argument("--debug", action="store_true", help=f"{leaves['debug'].help}: configs/debug.yml over FILE")
    for flag, kwargs in jobs:
        parser.add_argument(flag, **kwargs)
    for section in ("", *["task_options"] * bool(task.options), *sections):
        group = parser.add_argument_group(section or "top level", headings.get(section))
        for key, leaf in leaves.items():
            if key != "debug" and key.rpartition(".")[0].partition(".")[0] == section:
                words = f"{leaf.help} [{leaf.rule}; default {leaf.text}]".replace("%", "%%")
                group.add_argument(f"--{key}", metavar="VALUE", help=words)
    args, unknown = parser.parse_known_args(argv)
    args = vars(args)
    if unknown:
        name = unknown[0].partition("=")[0].lstrip("-")
        near = f"{script} does not read it" if name in leaves else f"did you mean --{_nearest(name, [*args, 'help'])}?"
        _refuse(f"unknown argument {unknown[0]!r:.80}; {near}")

    entries += _entries(CONFIGS / "debug.yml") if args["debug"] else []
    flags = {key: text for key, text in args.items() if key in leaves and key != "debug" and text is not None}
    if modes and not early.config:  # a config says which script it is for
        entries.append((script, "training.mode", modes[0]))
    cfg = _resolve(leaves, headings, entries, flags, "--")
    if modes and cfg.training.mode not in modes:
        _refuse(f"training.mode {cfg.training.mode} is run by {SCRIPTS[cfg.training.mode]}, not by {script}")
    return cfg, SimpleNamespace(flags=flags, **{name: value for name, value in args.items() if name not in leaves})


def check_flags(**flags: Any) -> None:
    """Answer --help and mistakes on the command line as parse_args does; `flags` are its arguments, without argv."""
    command(lambda argv: parse_args(**flags, argv=argv))()


def expand_home(text: str) -> str:
    """A path on the command line with `~` as the home: a shell expands it at the start of a word only."""
    return os.path.expanduser(text)


def seeds(text: str) -> list[int]:
    """The numbers of `--seeds 0,1,2`. UserError unless they are different ones that `seed` takes."""
    leaf = _schema()[0]["seed"]
    numbers = [_convert(leaf, word.strip(), "--seeds") for word in text.split(",")]
    if len({*numbers}) < len(numbers):
        _refuse(f"--seeds: expected different seeds, got {text!r:.80}")
    return numbers


def paths(setting: str | list | None) -> list:
    """A setting of kind `paths` as a list: of none, one or several."""
    return setting if isinstance(setting, list) else [] if setting is None else [setting]


def named_checkpoint(argument: str) -> tuple[str, str]:
    """NAME=CHECKPOINT -> (name, checkpoint), or ("", the whole) where no name stands in front; see NAME_RULE."""
    name, sign, source = argument.partition("=")
    named = sign and re.fullmatch(r"\w[\w.-]*", name)
    return (name, expand_home(source)) if named else ("", expand_home(argument))


def plain(cfg: SimpleNamespace) -> Any:
    """Return a config, or a section of one, as nested dicts."""
    return json.loads(json.dumps(cfg, default=vars))


def dump(cfg: SimpleNamespace) -> str:
    """Return the config as YAML text that load_config reads back to the same values, in the order of defaults.yml."""
    return yaml.safe_dump(plain(cfg), sort_keys=False, width=110)


def flatten(cfg: SimpleNamespace, above: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of a config, in the order of defaults.yml."""
    flat = {}
    for name, value in vars(cfg).items():
        flat |= flatten(value, f"{above}{name}.") if isinstance(value, SimpleNamespace) else {above + name: value}
    return flat


def run_name(cfg: SimpleNamespace, path: Path | str | None, fallback: str) -> str:
    """Return the name of the run's folder: the one asked for, else that of the config file at `path`, else `fallback`.

    A debug run without a name of its own is set apart, so that it never resumes, or blocks, the run of the same file.
    """
    return cfg.logging.run_name or (Path(path).stem if path else fallback) + "-debug" * cfg.debug


def _entries(path):
    """[(path:line: key, dotted key, value)] of a config file; empty for None."""
    lines = [] if path is None else _walk(path)
    return [(f"{path}:{line}: {ascii(key)[1:-1]:.80}", key, value) for line, key, value in lines]


def _resolve(leaves, headings, entries, given, label):
    """Lay entries, then `given` ({dotted key: text or Python value}), over the defaults; returns nested namespaces."""
    flat = {key: leaf.default for key, leaf in leaves.items()}
    if all(any(key in parts for _, key, _ in entries) for parts in THREE_TASKS):
        entries = [entry for entry in entries if entry[1] in leaves or entry[1] not in PARTS_OF_OLD]
    for where, key, value in [*entries, *((label + key, key, value) for key, value in given.items())]:
        if key in leaves:
            flat[key] = _convert(leaves[key], value, where)
            if key == "logging.wandb" and flat[key]:
                flat |= {key: False, "logging.tracker": "wandb"}
        elif key not in headings:
            _refuse(f"{where}: unknown key; the nearest known one is {_nearest(key, [*leaves, *headings])}")
        elif value != {}:
            _refuse(f"{where}: expected keys, indented, on the lines below, got {value!r:.80}")
    root = SimpleNamespace()
    for key, value in flat.items():
        node, (*above, name) = root, key.split(".")
        for section in above:
            node = vars(node).setdefault(section, SimpleNamespace())
        setattr(node, name, value)
    for heading in headings:  # a section may be empty, if the task has no options
        node = root
        for section in heading.split("."):
            node = vars(node).setdefault(section, SimpleNamespace())
    return root


def _named_task(entries, given, label):
    """The task that entries of config files or flags name; the last one counts."""
    leaf = _schema()[0]["task"]
    named = [(where, value) for where, key, value in entries if key == "task"]
    named += [(f"{label}task", given["task"])] if "task" in given else []
    where, task = named[-1] if named else ("task", leaf.default)
    if not isinstance(task, str) or (task not in tasks.NAMES and not task.endswith(".py")):
        _refuse(f"{where}: expected {leaf.rule}, got {str(task)!r:.80} ({leaf.help}){hint(str(task), tasks.NAMES)}")
    return tasks.load(task)


def _schema(task=None):
    """Read configs/defaults.yml; returns ({dotted key: leaf}, {dotted section: its comment}), with the task's own keys.

    A line is `key: default  # rule; help` or `section:  # help`. A rule is a type (`int`, `float`, `str`) with bounds
    (`float >= 0 and < 1`), `path` (a text whose `~` is the home), `paths` (one, or several with commas or as a list),
    choices (`a | b`; PATH is a path), each with `| null`, or `list` (some of the default).
    """
    path, leaves, headings = CONFIGS / "defaults.yml", {}, {}
    own = _of_task(task) if task else {}
    for line, key, value, text in _defaults(path):
        comment = text.partition(" # ")[2].strip()
        rule, _, words = comment.partition("; ")
        if value == {}:
            headings[key] = comment
            leaves |= own.get(key, {})
        else:
            rule = f"list of {' | '.join(value)}" if rule == "list" else rule
            leaves[key] = SimpleNamespace(text=str(value).replace("'", ""), rule=rule, help=words)
            leaves[key].default = _convert(leaves[key], value, f"{path}:{line}: {key}")
    return leaves, headings


@functools.cache  # a third of a short command's time
def _defaults(path):
    """[(line, dotted key, value, text of the line)] of configs/defaults.yml."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(line, key, value, lines[line - 1]) for line, key, value in _walk(path)]


def _of_task(task):
    """{section: {dotted key: leaf}} of the settings that a task has of its own."""
    weights = {name: tasks.Option(part.weight, "float >= 0", part.what) for name, part in task.parts.items()}
    own = {}
    for section, options in (("task_options", task.options), ("reward.heuristic", weights)):
        own[section] = {}
        for name, option in options.items():
            text = str(option.default).replace("'", "")
            leaf = SimpleNamespace(text=text, rule=option.rule, help=f"{task.name}: {option.what}")
            leaf.default = _convert(leaf, option.default, f"task: {task.path or task.name}: {section}.{name}")
            own[section][f"{section}.{name}"] = leaf
    return own


def _convert(leaf, value, where):
    """Return `value`, a text or a Python value, in the type that the leaf's rule names."""
    kind, names = leaf.rule.partition(" ")[0], leaf.rule.removeprefix("list of ").split(" | ")
    text = "null" if value is None else "" if isinstance(value, list | tuple | dict) else str(value)
    listed = [str(item) for item in value] if isinstance(value, list | tuple) else None
    if kind == "paths" and (listed or "," in text):
        items = [expand_home(item.strip()) for item in listed or text.split(",")]
        if all(items) and len({*items}) == len(items):
            return items if len(items) > 1 else items[0]
    elif kind == "list":
        items = text.strip("[] ").replace(",", " ").split() if listed is None else listed
        if items and all(item in names and items.count(item) == 1 for item in items):
            return [*items]
    elif kind in NUMBERS and re.fullmatch(NUMBERS[kind], text):
        number = int(text) if kind == "int" else float(text)
        bounds = [BOUNDS[sign](number, float(limit)) for sign, limit in re.findall(r"([<>]=?) (\S+)", leaf.rule)]
        if math.isfinite(number) and all(bounds):
            return number
    elif text.lower() in WORDS:  # never a text, so that `null` or `true` cannot become a folder's name
        if text.lower().replace("~", "null") in names:
            return WORDS[text.lower()]
    elif text in names or (text and "str" in names):
        return text
    elif text and {"path", "paths", "PATH"} & {*names}:
        return expand_home(text)
    raise UserError(f"{where}: expected {leaf.rule}, got {str(value)!r:.80} ({leaf.help})")


def _walk(path, mapping=None, above="", seen=None):
    """Yield (line, dotted key, its text, list of texts, or {} for a section) of a YAML file, or a mapping in it."""
    seen = {} if seen is None else seen
    for name, node in (mapping or _tree(path)).value:
        line, key = name.start_mark.line + 1, above + _word(name)
        if key in seen:
            _refuse(f"{path}:{line}: {ascii(key)[1:-1]:.80} is set twice, first in line {seen[key]}; keep one of them")
        seen[key] = line
        if isinstance(node, yaml.MappingNode):
            yield line, key, {}
            yield from _walk(path, node, f"{key}.", seen)
        else:
            many = isinstance(node, yaml.SequenceNode)
            yield line, key, [_word(item) for item in node.value] if many else node.value or "null"


def _word(node):
    return node.value if isinstance(node, yaml.ScalarNode) else "[...]"


def _tree(path):
    """Parse a YAML file to a mapping of text nodes; refuses, before building any, what no config needs."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            _refuse(f"{path}: expected a YAML config file of at most {MAX_BYTES // 1024} KiB, got more")
        text, depth = raw.decode("utf-8-sig", "surrogateescape"), 0  # YAML refuses the escapes, and knows their line
        for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            line = event.start_mark.line + 1
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            loaded = getattr(event, "anchor", None) or getattr(event, "tag", None) is not None
            if loaded or depth > MAX_DEPTH or count > MAX_EVENTS:
                what = "plain values, no YAML tags, anchors or aliases" if loaded else "short lists and few levels"
                got = " ".join(text.splitlines()[line - 1 : line]).strip()
                _refuse(f"{path}:{line}: expected {what}, got {got!r:.80}")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a YAML config file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = (mark.line if mark else text.count("\n", 0, error.position)) + 1
        problem = f"{error.context or ''} {error.problem}" if mark else "control character or invalid UTF-8"
        raise UserError(f"{path}:{line}: not valid YAML: {problem}") from None
    if not isinstance(tree, yaml.MappingNode) or not tree.value:
        _refuse(f"{path}:1: expected sections and keys as in configs/defaults.yml, got none")
    return tree


def _nearest(key, known):
    """The known key that was meant: alike in spelling or abbreviated (`lr`), and rather one of the same section."""
    above, _, name = key[-60:].rpartition(".")  # comparing is slow, and the key may be hostile

    def likeness(other):
        section, _, leaf = other.rpartition(".")
        short = "".join(word[:1] for word in leaf.split("_"))
        return max(difflib.SequenceMatcher(None, name, leaf).ratio(), name == short), section == above

    return max(known, key=likeness)


def _refuse(message):
    raise UserError(message)
