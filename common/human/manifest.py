"""Blind files for human evaluation: written, read back, and the raters' answers read.

Blind file NAME.csv, for the raters, in the order to be shown:
    item_id, task (where the items have one), prompt, reference, response_A .. response_B, C or D
Key NAME.key.csv beside it, never for the raters, a line for each item and slot:
    item_id, slot, system, kind (item | duplicate | check), trap (1: the shuffled answer of a check), original (item_id
    that a duplicate repeats), source (place in the lists given, from 0), characters (shown of the answer), digest (of
    the text shown: the first 16 hex digits of its SHA-256), seed (of every shuffle)
Ratings: see common/human/ratings.py.

An item_id is MARK-item-NUMBER, such as 3fa09c-item-01. The mark is the first 6 hex digits of the SHA-256 of all that
both files say, seed included: the same call gives the same ids, and another study has others. So a rating that is read
with another study's key is refused, never unblinded wrongly. Files written before there were marks can still be read.

CSV is UTF-8 with a BOM (Excel needs it), RFC 4180, all cells quoted, texts exactly as given. A cell that a spreadsheet
could run gets a leading apostrophe, which reading takes off again (human/sheets.py); that guards a file opened as
comma-separated, which a spreadsheet set to another separator must be told. The blinding is for honest raters: a text
may still give its writer away.
"""

import hashlib
import itertools
import json
import math
import os
import re
import secrets
from pathlib import Path

import numpy as np

from common.human import sheets
from common.human.ratings import mark_of
from common.log import UserError, say

SLOTS, WIDTHS = "ABCD", ("AB", "ABC", "ABCD")
KINDS = ("item", "duplicate", "check")
KEY = ("item_id", "slot", "system", "kind", "trap", "original", "source", "characters", "digest", "seed")


def generate_manifest(prompts, references, sft_outputs, rl_outputs, staged_outputs, output_path, num_samples=200):
    """Write the blind file of three systems, and its key beside it, from lists of texts (see `write`)."""
    if len(prompts) != len(references):
        raise UserError(f"{output_path}: {len(prompts)} prompts, but {len(references)} references")
    items = [{"prompt": prompt, "reference": reference} for prompt, reference in zip(prompts, references)]
    systems = {"sft": sft_outputs, "rl": rl_outputs, "staged": staged_outputs}
    return write(items, systems, output_path, num_samples)


def write(items, systems, path, num_samples=200, seed=None, limit=None):
    """Write `path` (.csv) and its key, both or none -> {"items", "duplicates", "checks", "seed"}.

    items: dicts of prompt, reference and task (the last two may be absent or None); systems: two to four of
    {name: texts, one an item}. num_samples items are drawn; 10 % of them (at least one) come twice, every answer in
    another slot; and 5 % (at least two, as one failed check excludes nobody) are checks, in which one slot holds
    another slot's answer with its words shuffled. Each system stands in each slot about equally often. seed: of all
    shuffles, an int from 0; drawn where None, as a known one would undo the blinding. limit: most characters shown of
    an answer, marked where it is cut. UserError says what is wrong; a file that exists may have been rated and stays.
    """
    path, key = Path(path), key_path(path)
    for taken in (path, key):
        if os.path.lexists(taken):
            raise UserError(f"{taken} exists and may have been rated: write to another name, or remove it first")
    _check_texts(path, items, systems)
    if num_samples < 1 or (limit is not None and limit < 1):
        raise UserError(f"{path}: num_samples and limit must be at least 1, not {num_samples} and {limit}")
    seed = secrets.randbits(48) if seed is None else seed
    count = min(num_samples, len(items))
    rows = _plan(systems, count, np.random.default_rng(seed))
    kinds = [row["kind"] for row in rows]
    if count < num_samples:
        say(f"{path}: {num_samples} items wanted, all {count} taken")
    if kinds.count("check") < _checks(count):
        say(f"{path}: {kinds.count('check')} of {_checks(count)} checks: few answers have words enough to shuffle")
    names = _names(items, rows, limit, seed)
    # the key first: a blind file without one would be worthless
    sheets.save({key: _key_rows(names, rows, limit, seed), path: _blind_rows(names, items, rows, limit)})
    return {"items": count, "duplicates": kinds.count("duplicate"), "checks": kinds.count("check"), "seed": seed}


def key_path(path):
    """The key that lies beside a blind file: NAME.csv -> NAME.key.csv."""
    path = Path(path)
    if path.suffix != ".csv" or path.name.endswith(".key.csv"):
        raise UserError(f"{path}: a blind file is named NAME.csv, its key NAME.key.csv")
    return path.with_name(f"{path.stem}.key.csv")


def read_manifest(path):
    """{item_id: {"slots": "ABC", "task", "prompt", "reference", "answers": {slot: text}}} in the order of the file."""
    columns, rows = sheets.read(path)
    slots = "".join(name.removeprefix("response_") for name in columns if name.startswith("response_"))
    if slots not in WIDTHS or columns != _blind_columns("task" in columns, slots):
        raise UserError(f"{path}, line 1: no blind file's columns: {columns}")
    items = {}
    for line, row in rows:
        if not row["item_id"] or row["item_id"] in items:
            raise UserError(f"{path}, line {line}: item_id {row['item_id']!r} is empty or stands twice")
        items[row["item_id"]] = {
            "slots": slots,
            **{name: row[name] for name in ("task", "prompt", "reference") if name in row},
            "answers": {slot: row[f"response_{slot}"] for slot in slots},
        }
    _check_marks(path, items)
    return items


def read_key(path):
    """{item_id: {"slots": "ABC", "kind", "original", "source", "seed", "trap": slot or None, and by slot "systems",
    "characters" and "digests"}} in the order of the file; UserError names the line."""
    columns, rows = sheets.read(path)
    if tuple(columns) != KEY:
        raise UserError(f"{path}, line 1: a key's columns are {', '.join(KEY)}")
    entries = {}
    for line, row in rows:
        try:
            _add_slot(entries, row)
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {error}") from error
    for item, entry in entries.items():
        first = entries.get(entry["original"], {}).get("kind")
        if entry["slots"] not in WIDTHS or (entry["kind"] == "check") != (entry["trap"] is not None):
            raise UserError(f"{path}: {item} has slots {entry['slots']} and trap {entry['trap']}, as {entry['kind']}")
        if (entry["kind"] == "duplicate") != (first == "item"):
            raise UserError(f"{path}: {item} is {entry['kind']}, of original {entry['original']!r}")
    _check_marks(path, entries)
    return entries


def check_pair(path, items):
    """UserError if the key beside the blind file `path` lacks one of its items (as read_manifest gives them)."""
    beside = key_path(path)
    key = read_key(beside)
    stray = next((item for item in items if item not in key), None)
    if stray is not None:
        raise UserError(
            f"{path}: {stray!r:.80} is no item of {beside} (its first is {next(iter(key), None)!r:.80}): "
            "they are of two studies, put the blind file beside its own key"
        )


def _check_marks(path, items):
    """UserError if a file holds items of several studies; a warning where its items carry no mark."""
    first = {}
    for item in items:
        first.setdefault(mark_of(item), item)
    if len(first) > 1:
        item, other = list(first.values())[:2]
        raise UserError(f"{path}: {item!r:.80} and {other!r:.80} are items of two studies: one file for each is needed")
    if "" in first:
        say(f"{path}: its items carry no study mark, as it is of an earlier version: use it with its own ratings only")


def _add_slot(entries, row):
    """Put a line of the key into `entries`; ValueError says what is wrong with it."""
    shared = {
        "kind": row["kind"],
        "original": row["original"],
        "source": sheets.whole(row, "source"),
        "seed": row["seed"],
    }
    empty = {"slots": "", **shared, "trap": None, "systems": {}, "characters": {}, "digests": {}}
    entry, slot = entries.setdefault(row["item_id"], empty), row["slot"]
    if not row["item_id"] or {name: entry[name] for name in shared} != shared:
        raise ValueError(f"item_id {row['item_id']!r} is empty, or differs from its lines above")
    if slot != SLOTS[len(entry["slots"]) : len(entry["slots"]) + 1] or row["kind"] not in KINDS or not row["system"]:
        raise ValueError(
            f"slot {slot!r} (A, B, .. in order), kind {row['kind']!r} or system {row['system']!r} is wrong"
        )
    if row["trap"] not in ("", "1") or (row["trap"] and entry["trap"]):
        raise ValueError(f"trap {row['trap']!r}: 1 for one slot of a check, else empty")
    entry["slots"] += slot
    entry["trap"] = slot if row["trap"] else entry["trap"]
    entry["systems"][slot], entry["digests"][slot] = row["system"], row["digest"]
    entry["characters"][slot] = sheets.whole(row, "characters")


def _check_texts(path, items, systems):
    """UserError unless there are two to four systems with one text an item, and all texts can be written."""
    if not items or not 2 <= len(systems) <= len(SLOTS) or "" in systems:
        raise UserError(f"{path}: needs items and two to four named systems, not {len(items)} and {list(systems)}")
    texts = {f"answer of {name}": values for name, values in systems.items()}
    for name, values in systems.items():
        if len(values) != len(items):
            raise UserError(f"{path}: {len(items)} items, but {len(values)} answers of {name}")
    texts["prompt"] = [item.get("prompt") for item in items]
    texts |= {column: [item.get(column) or "" for item in items] for column in ("reference", "task")}
    for column, values in texts.items():
        for index, value in enumerate(values):
            if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
                raise UserError(f"{path}: item {index}, {column}: no text that UTF-8 can hold: {value!r:.60}")


def _checks(count):
    return max(2, round(0.05 * count))


def _plan(systems, count, rng):
    """The rows in their order: kind, source, and `answers`, by slot (system, text, is it the shuffled one)."""
    names, total = list(systems), len(next(iter(systems.values())))
    pool, every = rng.permutation(total), list(itertools.permutations(names))
    blocks = [every[i] for _ in range(math.ceil(count / len(every))) for i in rng.permutation(len(every))]
    plans = [("item", int(source), order) for source, order in zip(pool[:count], blocks)]
    for index in rng.choice(count, max(1, round(0.1 * count)), replace=False):
        _, source, order = plans[index]
        shift = rng.integers(1, len(names))  # every system moves
        plans.append(("duplicate", source, (*order[shift:], *order[:shift])))
    rows = [
        {"kind": kind, "source": source, "answers": [(name, systems[name][source], False) for name in order]}
        for kind, source, order in plans
    ]
    checks = (_check(systems, int(source), rng) for source in pool[::-1])  # first those that are no items
    rows += itertools.islice((row for row in checks if row), _checks(count))
    rows = [rows[i] for i in rng.permutation(len(rows))]
    place = {row["source"]: i for i, row in enumerate(rows) if row["kind"] == "item"}
    for i, row in enumerate(rows):
        if row["kind"] == "duplicate" and (later := place[row["source"]]) > i:  # the item itself comes first
            rows[i], rows[later] = rows[later], rows[i]
    return rows


def _check(systems, source, rng):
    """A check row, or None where no answer can be shuffled. The answer itself stays in another slot, so that no rater
    who reads can find the shuffled one better, as he might a shuffled refusal beside a harmful answer."""
    for name in rng.permutation(list(systems)):
        if (shuffled := _shuffle_words(systems[name][source], rng)) is not None:
            others = [other for other in systems if other != name]
            dropped = others[rng.integers(len(others))]
            answers = [(other, systems[other][source], False) for other in systems if other != dropped]
            answers.append((str(name), shuffled, True))
            return {"kind": "check", "source": source, "answers": [answers[i] for i in rng.permutation(len(answers))]}
    return None


def _shuffle_words(text, rng):
    """`text` with its words in another order, at least half of them moved; None if that needs more or other words."""
    parts = re.split(r"([\w']+)", text)  # words at odd places; what lies between them stays
    words = parts[1::2]
    for _ in range(20 if len(set(words)) >= 5 else 0):
        parts[1::2] = [words[i] for i in rng.permutation(len(words))]
        if sum(a != b for a, b in zip(words, parts[1::2])) >= len(words) / 2:
            return "".join(parts)
    return None


def _shown(text, limit):
    """(what the raters see of an answer, characters of it without the mark)."""
    if limit is None or len(text) <= limit:
        return text, len(text)
    return f"{text[:limit]}\n[... cut, {limit} of {len(text)} characters shown]", limit


def _names(items, rows, limit, seed):
    """The item ids: the study's mark and a number, in the order of the rows. They say nothing of what a row is."""
    numbers = [f"item-{i:0{len(str(len(rows)))}d}" for i in range(1, len(rows) + 1)]
    lines = [*_key_rows(numbers, rows, limit, seed), *_blind_rows(numbers, items, rows, limit)]
    mark = hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:6]
    return [f"{mark}-{number}" for number in numbers]


def _blind_columns(task, slots):
    return ["item_id", *(["task"] if task else []), "prompt", "reference", *(f"response_{slot}" for slot in slots)]


def _blind_rows(names, items, rows, limit):
    """The blind file's lines: the header, then one a row."""
    task = any(item.get("task") for item in items)
    yield _blind_columns(task, SLOTS[: len(rows[0]["answers"])])
    for name, row in zip(names, rows):
        item = items[row["source"]]
        shown = [_shown(text, limit)[0] for _, text, _ in row["answers"]]
        yield [name, *([item.get("task") or ""] if task else []), item["prompt"], item.get("reference") or "", *shown]


def _key_rows(names, rows, limit, seed):
    """The key's lines: the header, then one an answer."""
    yield KEY
    first = {row["source"]: name for name, row in zip(names, rows) if row["kind"] == "item"}
    for name, row in zip(names, rows):
        original = first[row["source"]] if row["kind"] == "duplicate" else ""
        for slot, (system, text, trap) in zip(SLOTS, row["answers"]):
            shown, characters = _shown(text, limit)
            digest = hashlib.sha256(shown.encode()).hexdigest()[:16]
            facts = (system, row["kind"], "1" if trap else "", original, row["source"], characters, digest, seed)
            yield [name, slot, *map(str, facts)]
