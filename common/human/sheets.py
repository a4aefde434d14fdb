"""CSV that people open in spreadsheets: written whole or not at all, read strictly, and no cell that could be run.

UTF-8 with a BOM (Excel takes it for another encoding without), RFC 4180, all cells quoted. A text whose first character
after spaces and control characters is one of = + - @ (or a Unicode form of them, such as full-width), or that starts
with a tab, a line end or an apostrophe, gets an apostrophe in front (OWASP, CSV injection); reading takes it off again.
"""

import csv
import io
import os
import re
import unicodedata
from pathlib import Path

from common.log import UserError
from common.runtime import checkpoint

LONGEST = 2**31 - 1  # csv's own limit is 131,072 characters a cell; the largest that every platform takes


def neutralise(text):
    """`text` as a cell that no spreadsheet runs; `restore` gives every text back exactly."""
    return "'" + text if _risky(text) else text


def restore(cell):
    """The text that was neutralised. An apostrophe that was not needed is the writer's own and stays ('tis)."""
    return cell[1:] if cell.startswith("'") and _risky(cell[1:]) else cell


def _risky(text):
    if text.startswith(("'", "\t", "\r", "\n")):
        return True
    first = next((c for c in text if unicodedata.category(c)[0] not in "ZC"), "")  # separators, control and format
    return unicodedata.normalize("NFKC", first)[:1] in ("=", "+", "-", "@", "\u2212")


def save(files):
    """Write {path: rows of texts} as CSV, all files or none; UserError if one cannot be written."""
    drafts = {path: path.with_name(f".tmp-{path.name}-{os.getpid()}") for path in map(Path, files)}
    placed, target = [], None
    try:
        for target, rows in zip(drafts, files.values()):
            with open(drafts[target], "w", encoding="utf-8-sig", newline="") as file:
                csv.writer(file, quoting=csv.QUOTE_ALL).writerows([neutralise(text) for text in row] for row in rows)
                file.flush()
                os.fsync(file.fileno())
        for target, draft in drafts.items():
            os.replace(draft, target)
            placed.append(target)
        for folder in {path.parent for path in drafts}:
            checkpoint.fsync(folder)
    except BaseException as error:
        for path in (*drafts.values(), *placed):
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{target} cannot be written: {error.strerror or error}") from error
        raise


def text_of(path):
    """A file's text, line ends untouched; UserError if it cannot be read or is not UTF-8, naming the line."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return decode(path, data)


def decode(path, data):
    """The text of a file's bytes; UserError if they are not UTF-8, naming the line."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 (save it as CSV UTF-8)") from error


def read(path):
    """(columns, [(line, {column: text}), ...]) of a CSV file with a header; `line` is where the row begins, from 1.

    Blank lines are passed over. UserError names the line of broken quotes or of a row with too many or too few cells.
    """
    reader = csv.reader(io.StringIO(text_of(path), newline=""), strict=True)
    rows, columns, line = [], None, 1
    limit = csv.field_size_limit(LONGEST)
    try:
        for row in reader:
            if columns is None and row:
                columns = row
                if len(set(columns)) < len(columns):
                    raise UserError(f"{path}, line {line}: a column stands twice in {columns}")
            elif row:
                if len(row) != len(columns):
                    raise UserError(f"{path}, line {line}: {len(row)} cells, but {len(columns)} columns")
                rows.append((line, {name: restore(cell) for name, cell in zip(columns, row)}))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: no valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if columns is None:
        raise UserError(f"{path}, line 1: empty, a header is needed")
    return columns, rows


def whole(row, column, low=0, high=10**18):
    """The whole number low..high in a cell; ValueError names the column."""
    if not re.fullmatch("[0-9]{1,18}", row[column]) or not low <= int(row[column]) <= high:
        raise ValueError(f"{column} {row[column]!r}: a whole number from {low}" + f" to {high}" * (high < 10**18))
    return int(row[column])
