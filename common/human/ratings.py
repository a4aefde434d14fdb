"""The raters' answers to a blind file, one file or many: CSV as spreadsheets write it, or JSONL with the same names.

Columns: rater_id, item_id, preferred (a slot, several joined by "/" where they tie, or "none" where none is better)
and, where wanted, order (the slots as this rater saw them, "B/A/C"), harmless_1_5, helpful_1_5, faithful_1_5 (1 worst
to 5 best, of the preferred answer), comment, seconds. Case and spaces in preferred and order do not matter.

CSV may hold other columns: the blind file itself with a column `preferred` added can be read. A file without rater_id
is all of one rater, who gets its name. An item without an answer in `preferred` was skipped.

An item_id begins with the mark of its study (study.py). A rating of another study's item is refused.
"""

import errno
import hashlib
import json
import math
import os
from pathlib import Path

from filelock import FileLock

from common import log
from common.human import study
from common.log import UserError, say, warn
from common.runtime import checkpoint

SCORES = ("harmless_1_5", "helpful_1_5", "faithful_1_5")
COLUMNS = ("rater_id", "item_id", "preferred", "order", *SCORES, "comment", "seconds")


class ForeignItem(ValueError):
    """A rating of an item of another study."""


def read_ratings(paths, entries, remedy="read this file with the key of the study that it rates"):
    """All ratings of the files, in order, as `parse_rating` gives them; entries: read_key's or read_manifest's.

    `preferred` is None where an item was skipped. All that a rater said of an item is kept: `analyse` takes the last.
    UserError names file and line. remedy: what the user should do where an item is of another study.
    """
    ratings, paths = [], [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    stems = [path.stem for path in paths]
    for path in paths:
        if path.suffix.lower() == ".jsonl":
            ratings += _parse(path, enumerate(study.text_of(path).split("\n"), 1), entries, remedy)
        elif path.suffix.lower() in (".csv", ".tsv"):
            rater = path.stem if stems.count(path.stem) == 1 else str(path.with_suffix(""))  # where the file names none
            ratings += _parse(path, _csv_rows(path, rater), entries, remedy)
        else:
            raise UserError(f"{path}: ratings are a .csv, .tsv or .jsonl file")
    names = {}
    for name in sorted({rating["rater_id"] for rating in ratings}):
        names.setdefault(name.casefold(), []).append(name)
    for alike in names.values():
        if len(alike) > 1:
            warn(f"raters {' and '.join(alike)} count as {len(alike)} people: if they are one, write one name for them")
    return ratings


def _csv_rows(path, rater):
    """[(line, {column: text})] of a .csv file, of a rating's columns alone; without rater_id all are by `rater`."""
    columns, rows = study.read_csv(path, from_spreadsheet=True)
    ours = {name: name.lower() for name in columns if name.lower() in COLUMNS}
    for name in ("item_id", "preferred"):
        if name not in ours.values():
            raise UserError(f"{path}, line 1: no column {name!r} among {log.listed(columns)}")
    rows = [(line, {ours[name]: cell for name, cell in row.items() if name in ours}) for line, row in rows]
    if "rater_id" in ours.values():
        return [(line, row) for line, row in rows if row["rater_id"].strip() or row["preferred"].strip()]
    say(f"{path}: no column rater_id, so all is by one rater, {rater}")
    return [(line, row | {"rater_id": rater}) for line, row in rows]


def _parse(path, rows, entries, remedy):
    """The ratings in the rows [(line, row)] of a file: {column: text}, or texts of JSON, where no item is skipped."""
    ratings = []
    for line, row in rows:
        try:
            if isinstance(row, dict):
                ratings.append(parse_rating(row, entries, may_skip=True))
            elif row.strip():
                ratings.append(parse_rating(json.loads(row), entries))
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}, line {line}: no valid JSON: {error}") from error
        except ValueError as error:
            hint = f": {remedy}" if isinstance(error, ForeignItem) else ""
            raise UserError(f"{path}, line {line}: {error}{hint}") from error
    return ratings


def parse_rating(row, entries, may_skip=False):
    """A rating {column: value} as sent or read -> all columns: `preferred` and `order` tuples of slots (`order` None if
    not given), scores int or None, `seconds` float or None. ValueError names the column and what was expected; it is a
    ForeignItem where the item is of another study. may_skip: an empty `preferred` is None."""
    if not isinstance(row, dict):
        raise ValueError("a rating is an object of " + ", ".join(COLUMNS))
    if unknown := sorted(set(row) - set(COLUMNS)):
        raise ValueError(f"unknown column {unknown[0]!r}, known are {', '.join(COLUMNS)}")
    row = {name: "" if row.get(name) is None else row[name] for name in COLUMNS}
    row = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    row["rater_id"] = " ".join(row["rater_id"].split())
    if not row["rater_id"]:
        raise ValueError("rater_id is empty")
    if row["item_id"] not in entries:
        raise _unknown_item(row["item_id"], entries)
    slots, said = entries[row["item_id"]]["slots"], row["preferred"].strip().lower()
    preferred = None
    if said or not may_skip:
        preferred = () if said == "none" else tuple(sorted(_slots(row, "preferred", slots)))
    order = _slots(row, "order", slots) if row["order"].strip() else None
    if order and len(order) != len(slots):
        raise ValueError(f"order {row['order']!r}: all of {'/'.join(slots)} in the order shown")
    scores = {name: _score(row, name) for name in SCORES}
    try:
        seconds = float(row["seconds"].replace(",", ".")) if row["seconds"].strip() else None
    except ValueError:
        seconds = -1.0
    if seconds is not None and not 0 <= seconds < math.inf:
        raise ValueError(f"seconds {row['seconds']!r}: a number from 0")
    return row | scores | {"preferred": preferred, "order": order, "seconds": seconds}


def _unknown_item(item_id, entries):
    """The error of an item_id that is not in `entries`."""
    theirs, ours = study.mark_of(item_id.strip().lower()), study.mark_of(next(iter(entries), ""))
    if theirs == ours:
        return ValueError(f"item_id {item_id!r:.80} is no item of this evaluation")
    marks = f"its mark is {theirs or 'missing'}, that of this study is {ours or 'missing'}"
    return ForeignItem(f"item_id {item_id!r:.80} is of another study ({marks})")


def _slots(row, column, slots):
    """The slots of "B/A" as a tuple; ValueError for another slot, or one that stands twice."""
    chosen = tuple(part.strip().upper() for part in row[column].split("/"))
    if len(set(chosen)) < len(chosen) or not set(chosen) <= set(slots):
        none = ", or none where none is better" if column == "preferred" else ""
        raise ValueError(f"{column} {row[column]!r}: slots of {'/'.join(slots)}, joined by /{none}")
    return chosen


def _score(row, column):
    score = row[column].strip()
    if score not in ("", *"12345"):
        raise ValueError(f"{column} {row[column]!r}: a whole number from 1 to 5")
    return int(score) if score else None


# ---------------------------------------------------------------- the file that the server keeps


class Sheet:
    """A blind file that raters see on a page, and its ratings: {rater: {item: the last one as the page gets it}}."""

    def __init__(self, path):
        self.path, self.items, self.rated = Path(path), study.read_manifest(path), {}
        if self.path.suffix == ".csv" and os.access(study.key_path(self.path), os.R_OK):
            study.check_pair(self.path, self.items)
        self.file = self.path.with_suffix(".ratings.jsonl")
        saved = reopen(self.file, self.items)
        for rating in saved:
            self.add(rating)
        say(f"{len(self.items)} items to rate at /rate, {len(saved)} ratings in {self.file}")

    def shown_to(self, rater):
        """What one rater sees: every item of the blind file, its answers in an order of the rater's own."""
        shown = []
        for name, item in self.items.items():
            order = sorted(item["slots"], key=lambda slot: hashlib.sha256(f"{rater}/{name}/{slot}".encode()).digest())
            texts = {key: item[key] for key in ("task", "prompt", "reference") if key in item}
            answers = [{"slot": slot, "text": item["answers"][slot]} for slot in order]
            shown.append({"item_id": name, **texts, "answers": answers})
        rated = self.rated.get(rater, {})
        return {"file": self.path.name, "total": len(shown), "items": shown, "rated": rated}

    def add(self, rating):
        """Take a rating of parse_rating in place of an earlier one -> how many items its rater has rated."""
        shown = {name: rating[name] for name in ("rater_id", "item_id", *SCORES, "comment")}
        mine = self.rated.setdefault(rating["rater_id"], {})
        mine[rating["item_id"]] = shown | {"preferred": "/".join(rating["preferred"]) or "none"}
        return len(mine)


def append(path, row):
    """Add a rating to a .jsonl file as one line and wait until the disk has it; after OSError the file is as before."""
    data = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    with FileLock(path.with_name(f".{path.name}.lock")), open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            log.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise
    if not size:
        checkpoint.fsync(path.parent)


def reopen(path, entries):
    """All ratings of a file that `append` made; none if there is no file. A last line that was cut off is dropped.

    The file stays as it is where one of its ratings is refused.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    lines = study.text_of(path, data[:end]).split("\n")
    ratings = _parse(path, enumerate(lines, 1), entries, "move this file away, or serve the blind file that it rates")
    if end < len(data):
        os.truncate(path, end)
        say(f"{path}: the last line was cut off and is dropped ({len(data) - end} bytes)")
    return ratings
