"""A blind study: who sees which answer in which slot, written as a file for raters and its key, and read back.

Blind file NAME.csv, for the raters, in the order to be shown:
    item_id, task (where the items have one), prompt, reference, response_A, response_B, .. up to D
Key NAME.key.csv beside it, never for the raters, a line for each item and slot:
    item_id, slot, system, kind (item | duplicate | check), trap (1: the shuffled answer of a check), original (the
    item_id that a duplicate repeats), source (place in the lists given, from 0), characters (of the answer),
    digest (of the text shown: the first 16 hex digits of its SHA-256), seed (of every shuffle)
Ratings: see ratings.py. The server keeps its own in NAME.ratings.jsonl.

An item_id is MARK-item-NUMBER, such as 3fa09c-item-01. The mark is the first 6 hex digits of the SHA-256 of all that
the study is made of, seed included: a rating that is read with the key of another study is refused. Files that were
written before there were marks can still be read.

CSV is UTF-8 with a BOM (Excel takes it for another encoding without), all cells quoted, texts exactly as given, but for
an apostrophe in front of what a spreadsheet could run, which reading takes off (OWASP, CSV injection). The blinding is
for honest raters: a text may still give its writer away.
"""

import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import log
from common.log import UserError, say
from common.runtime import checkpoint

SLOTS, KINDS = "ABCD", ("item", "duplicate", "check")
KEY = ["item_id", "slot", "system", "kind", "trap", "original", "source", "characters", "digest", "seed"]
LONGEST_CELL = 2**31 - 1  # csv's own limit is 131,072 characters; the largest that every platform takes


@dataclass
class Row:
    """An item as it will be shown, by slot."""

    kind: str  # one of KINDS
    source: int
    systems: list
    texts: list
    trap: str | None = None  # the slot of the shuffled answer of a check


def generate_manifest(prompts, references, sft_outputs, rl_outputs, staged_outputs, output_path, num_samples=200):
    """Write the blind file of three systems, and its key beside it, from lists of texts (see `write`)."""
    if len(prompts) != len(references):
        raise UserError(f"{output_path}: {len(prompts)} prompts, but {len(references)} references")
    items = [{"prompt": prompt, "reference": text} for prompt, text in zip(prompts, references, strict=True)]
    systems = {"sft": sft_outputs, "rl": rl_outputs, "staged": staged_outputs}
    return write(items, systems, output_path, num_samples)


# ---------------------------------------------------------------- writing


def write(items, systems, path, num_samples=200, seed=None):
    """Write `path` (.csv) and its key, both or none -> {"items", "duplicates", "checks", "seed"}.

    items: dicts of prompt, reference and task (the last two may be absent or None); systems: two to four of
    {name: texts, one an item}. num_samples items are drawn; 10 % of them (at least one) come twice, every answer in
    another slot; and 5 % (at least two, as one failed check excludes nobody) are checks, in which one slot holds
    another slot's answer with its words shuffled. Each system stands in each slot about equally often. seed: of all
    shuffles, an int from 0; drawn where None, as a known one would undo the blinding. UserError says what is wrong; a
    file that exists may have been rated and stays.
    """
    path = Path(path)
    check_free(path)
    _check_texts(path, items, systems)
    if num_samples < 1:
        raise UserError(f"{path}: num_samples must be at least 1, not {num_samples}")
    seed = secrets.randbits(48) if seed is None else seed
    count = min(num_samples, len(items))
    checks = max(2, round(0.05 * count))
    rows = _plan(systems, count, checks, np.random.default_rng(seed))
    kinds = Counter(row.kind for row in rows)
    if count < num_samples:
        say(f"{path}: only {count} items were given, so all are in the study ({num_samples} were asked for)")
    if kinds["check"] < checks:
        few = "a check shuffles the words of an answer, and too few answers have five different words"
        say(f"{path}: {kinds['check']} attention checks instead of {checks}: {few}")
    mark = hashlib.sha256(json.dumps([items, systems, count, seed], default=str).encode()).hexdigest()[:6]
    has_task, item_ids = any(item.get("task") for item in items), {}
    blind_rows, key_rows = [_columns(has_task, len(systems))], [KEY]
    for number, row in enumerate(rows, 1):
        item, item_id = items[row.source], f"{mark}-item-{number:0{len(str(len(rows)))}d}"
        if row.kind == "item":
            item_ids[row.source] = item_id
        task = [item.get("task") or ""] if has_task else []
        blind_rows.append([item_id, *task, item["prompt"], item.get("reference") or "", *row.texts])
        original = item_ids[row.source] if row.kind == "duplicate" else ""
        for slot, system, text in zip(SLOTS, row.systems, row.texts, strict=False):
            trap = "1" if slot == row.trap else ""
            cells = (system, row.kind, trap, original, row.source, len(text), digest(text), seed)
            key_rows.append([item_id, slot, *map(str, cells)])
    try:
        save(key_path(path), key_rows)  # the key first: a blind file without one would be worthless
        save(path, blind_rows)
    except BaseException:
        for file in (path, key_path(path)):
            file.unlink(missing_ok=True)
        raise
    return {"items": count, "duplicates": kinds["duplicate"], "checks": kinds["check"], "seed": seed}


def key_path(path):
    """The key that lies beside a blind file: NAME.csv -> NAME.key.csv."""
    path = Path(path)
    if path.suffix != ".csv" or path.name.endswith(".key.csv"):
        raise UserError(f"{path}: a blind file is named NAME.csv, its key NAME.key.csv")
    return path.with_suffix(".key.csv")


def check_free(path):
    """UserError where a study may not be written: its files are there, or the ratings of an earlier one."""
    for taken in (path, key_path(path), path.with_suffix(".ratings.jsonl")):
        if os.path.lexists(taken):
            raise UserError(
                f"{taken} exists and may have been rated: write to another name, or move the old study away"
            )


def _check_texts(path, items, systems):
    """UserError unless there are two to four systems with one text an item, and all texts can be written."""
    if not items or not 2 <= len(systems) <= len(SLOTS) or "" in systems:
        given = f"{len(items)} items and the systems {', '.join(map(repr, systems))}"
        raise UserError(f"{path}: a study needs items and two to four named systems, these are {given}")
    for name, answers in systems.items():
        if len(answers) != len(items):
            raise UserError(f"{path}: {len(items)} items, but {len(answers)} answers of {name}")
    for index, item in enumerate(items):
        texts = {"prompt": item.get("prompt"), **{name: item.get(name) or "" for name in ("reference", "task")}}
        texts |= {f"answer of {name}": answers[index] for name, answers in systems.items()}
        for column, text in texts.items():
            if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
                raise UserError(f"{path}: item {index}, {column}: no text that UTF-8 can hold: {text!r:.60}")


def _plan(systems, count, checks, rng):
    """The rows of a study in their order."""
    names = list(systems)
    sources = rng.permutation(len(systems[names[0]])).tolist()
    orders = list(itertools.permutations(names))
    blocks = [orders[i] for _ in range(math.ceil(count / len(orders))) for i in rng.permutation(len(orders))]
    plans = [("item", source, order) for source, order in zip(sources[:count], blocks[:count], strict=True)]
    for index in rng.choice(count, max(1, round(0.1 * count)), replace=False):
        _, source, order = plans[index]
        shift = rng.integers(1, len(names))  # every system moves
        plans.append(("duplicate", source, (*order[shift:], *order[:shift])))
    rows = [Row(kind, source, order, [systems[name][source] for name in order]) for kind, source, order in plans]
    made = (_check(systems, source, rng) for source in sources[::-1])  # first those that are no items
    rows += itertools.islice(filter(None, made), checks)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    place = {row.source: i for i, row in enumerate(rows) if row.kind == "item"}
    for i, row in enumerate(rows):
        if row.kind == "duplicate" and (later := place[row.source]) > i:  # the item itself comes first
            rows[i], rows[later] = rows[later], rows[i]
    return rows


def _check(systems, source, rng):
    """A check row, or None where no answer can be shuffled. The answer itself stays in another slot, so that no rater
    who reads can find the shuffled one better, as he might a shuffled refusal beside a harmful answer."""
    for name in rng.permutation(list(systems)).tolist():
        shuffled = _shuffle_words(systems[name][source], rng)
        if shuffled is not None:
            others = [other for other in systems if other != name]
            dropped = others[rng.integers(len(others))]
            answers = [(other, systems[other][source]) for other in systems if other != dropped] + [(name, shuffled)]
            order = rng.permutation(len(answers)).tolist()
            shown_systems, texts = zip(*(answers[i] for i in order), strict=True)
            return Row("check", source, shown_systems, texts, trap=SLOTS[order.index(len(answers) - 1)])
    return None


def _shuffle_words(text, rng):
    """`text` with its words in another order, at least half of them moved; None if that needs more or other words."""
    parts = re.split(r"([\w']+)", text)  # words at odd places; what lies between them stays
    words = parts[1::2]
    for _ in range(20 if len(set(words)) >= 5 else 0):
        parts[1::2] = [words[i] for i in rng.permutation(len(words))]
        if sum(a != b for a, b in zip(words, parts[1::2], strict=True)) >= len(words) / 2:
            return "".join(parts)
    return None


def _columns(has_task, systems):
    """Those of a blind file of so many systems."""
    return ["item_id", *["task"] * has_task, "prompt", "reference", *(f"response_{slot}" for slot in SLOTS[:systems])]


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- reading


def read_manifest(path):
    """{item_id: {"slots": "ABC", "task", "prompt", "reference", "answers": {slot: text}}} in the order of the file."""
    columns, rows = read_csv(path)
    if columns not in [_columns(has_task, systems) for has_task in (False, True) for systems in (2, 3, 4)]:
        raise UserError(f"{path}, line 1: a blind file has other columns than {', '.join(columns)}")
    items = {}
    for line, row in rows:
        item_id = row.pop("item_id")
        if not item_id or item_id in items:
            raise UserError(f"{path}, line {line}: item_id {item_id!r} is empty or stands twice")
        answers = {name[-1]: row.pop(name) for name in columns if name.startswith("response_")}
        items[item_id] = row | {"slots": "".join(answers), "answers": answers}
    _check_marks(path, items)
    return items


def read_key(path):
    """{item_id: {"slots": "ABC", "kind", "original", "source", "seed", "trap": slot or None, and by slot "systems",
    "characters" and "digests"}} in the order of the file; UserError names the line."""
    columns, rows = read_csv(path)
    if columns != KEY:
        raise UserError(f"{path}, line 1: a key's columns are {', '.join(KEY)}")
    entries = {}
    for line, row in rows:
        facts = {name: row[name] for name in ("kind", "original", "source", "seed")}
        empty = {"slots": "", "trap": None, "systems": {}, "characters": {}, "digests": {}}
        entry, slot = entries.setdefault(row["item_id"], facts | empty), row["slot"]
        entry["slots"] += slot
        is_whole = row["item_id"] and slot and row["system"] and row["kind"] in KINDS and row["trap"] in ("", "1")
        are_numbers = row["source"].isdecimal() and row["characters"].isdecimal()
        fits = entry | facts == entry and SLOTS.startswith(entry["slots"]) and not (row["trap"] and entry["trap"])
        if not (is_whole and are_numbers and fits):
            raise UserError(f"{path}, line {line}: damaged, or moved from another line: {', '.join(row.values())}")
        entry["trap"] = slot if row["trap"] else entry["trap"]
        entry["systems"][slot], entry["digests"][slot] = row["system"], row["digest"]
        entry["characters"][slot] = int(row["characters"])
    for item, entry in entries.items():
        is_check, is_duplicate = entry["kind"] == "check", entry["kind"] == "duplicate"
        repeats = entries.get(entry["original"], {}).get("kind") == "item"
        if len(entry["slots"]) < 2 or is_check != bool(entry["trap"]) or is_duplicate != repeats:
            facts = ", ".join(f"{name} {entry[name]!r}" for name in ("slots", "kind", "trap", "original"))
            raise UserError(f"{path}: item {item} is damaged: {facts}")
        entry["source"] = int(entry["source"])
    _check_marks(path, entries)
    return entries


def check_pair(path, items):
    """UserError if the key beside the blind file `path` lacks one of its items (as read_manifest gives them)."""
    if not items.keys() <= read_key(key_path(path)).keys():
        raise UserError(f"{path}, {key_path(path)}: they are of two studies, put the blind file beside its own key")


def mark_of(item_id):
    """The mark of the study that an item_id belongs to; "" in files that were written before there were marks."""
    match = re.fullmatch("([0-9a-f]{6})-item-[0-9]+", item_id)
    return match[1] if match else ""


def _check_marks(path, items):
    """UserError if a file holds items of several studies; a warning where its items carry no mark."""
    of_mark = {mark_of(item): item for item in reversed(items)}  # the first of each
    if len(of_mark) > 1:
        item, other, *_ = of_mark.values()
        raise UserError(f"{path}: {item!r:.80} and {other!r:.80} are items of two studies: one file for each is needed")
    if "" in of_mark:
        say(f"{path}: its items carry no study mark, as it is of an earlier version: use it with its own ratings only")


# ---------------------------------------------------------------- CSV that people open in spreadsheets


def neutralise(text):
    """`text` as a cell that no spreadsheet runs; `restore` gives every text back exactly."""
    return "'" + text if _risky(text) else text


def restore(cell):
    """The text that was neutralised. An apostrophe that was not needed is the writer's own and stays ('tis)."""
    return cell[1:] if cell.startswith("'") and _risky(cell[1:]) else cell


def _risky(text):
    """Does it start with a tab, a line end or an apostrophe, or is its first character after spaces and control
    characters = + - @ or a Unicode form of them?"""
    first = next((c for c in text if unicodedata.category(c)[0] not in "ZC"), "")  # separators, control and format
    return text.startswith(("'", "\t", "\r", "\n")) or unicodedata.normalize("NFKC", first)[:1] in set("=+-@\u2212")


def save(path, rows):
    """Write rows of texts as a CSV file, whole or not at all; UserError if it cannot be written."""
    cells = io.StringIO(newline="")
    csv.writer(cells, quoting=csv.QUOTE_ALL).writerows([neutralise(text) for text in row] for row in rows)
    log.replace(path, "\ufeff" + cells.getvalue())
    checkpoint.fsync(path.parent)


def text_of(path, data=None):
    """The text of a file, or of `data` that was read from it; UserError if it cannot be read or is not UTF-8."""
    try:
        data = Path(path).read_bytes() if data is None else data
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 (save it as CSV UTF-8)") from error


def read_csv(path, from_spreadsheet=False):
    """(columns, [(line, {column: text}), ...]) of a CSV file with a header; `line` is where the row begins, from 1.

    Cells are separated by commas, semicolons or tabs. Blank lines, and empty cells beyond the last column, are passed
    over. from_spreadsheet: so are rows of empty cells, and a row may lack its last cells, as Excel leaves them out
    where they are empty. UserError names the line of broken quotes or of a row with too many or too few cells.
    """
    text = text_of(path)
    header = next((line for line in text.splitlines() if line.strip(",;\t ")), "")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    columns, rows, line = [], [], 1
    limit = csv.field_size_limit(LONGEST_CELL)  # of the whole process
    try:
        for row in reader:
            while row and not row[-1].strip() and (from_spreadsheet or len(row) > len(columns)):
                row.pop()
            if not columns:
                columns = [name.strip() for name in row]
                names = [name.lower() for name in columns if name]
                if len(set(names)) < len(names):
                    raise UserError(f"{path}, line {line}: a column stands twice in {columns}")
            elif row:
                cells = row + [""] * (len(columns) - len(row) if from_spreadsheet else 0)
                if len(cells) != len(columns):
                    raise UserError(f"{path}, line {line}: {len(row)} cells, but {len(columns)} columns")
                rows.append((line, dict(zip(columns, map(restore, cells), strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: no valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if not columns:
        raise UserError(f"{path}, line 1: empty, a header is needed")
    return columns, rows
