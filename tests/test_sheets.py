"""Faults row S8: every text survives the file, and no cell that is written could be run by a spreadsheet."""

import csv
import os
import random
import unicodedata

import pytest

from common import sheets
from common.log import UserError

NASTY = ["", "=cmd|' /C calc'!A0", '=HYPERLINK("http://x","y")', "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1"]
NASTY += [
    "\u00a0=1",
    "\u200b=1",
    "\ufeff=1",
    "\0=1",
    "＝1",
    "＋1",
    "－1",
    "＠1",
    "﹢1",
    "−1",
    "'",
    "''",
    "'=1",
    "''=1",
    "'tis",
]
NASTY += ['"', '""', '"=1"', "a,b;c\td", "a\nb", "a\rb", "a\r\nb", "a\n", " ", "a\0b", "a\u2028b\x0bc\x1cd\x85e", "🙂"]
NASTY += ["👩\u200d👩\u200d👧", "\u202eשלום", "=" * 50_000, "x" * 200_000, "--- a\n+++ b", "- first\n- second"]
ALPHABET = [
    "=",
    "+",
    "-",
    "@",
    "＝",
    "'",
    '"',
    ",",
    ";",
    "\t",
    "\r",
    "\n",
    "\0",
    " ",
    "\u00a0",
    "\u200b",
    "a",
    "é",
    "🙂",
]


def texts(n=3000):
    rng = random.Random(0)
    return NASTY + ["".join(rng.choices(ALPHABET, k=rng.randrange(7))) for _ in range(n)]


def test_neutralised_texts_come_back_and_cannot_run():
    for text in texts():
        cell = sheets.neutralise(text)
        assert sheets.restore(cell) == text
        seen = unicodedata.normalize("NFKC", cell).lstrip("".join(map(chr, range(33))) + "\u00a0\u200b\ufeff")
        assert not cell.startswith(("\t", "\r", "\n")) and not seen.startswith(("=", "+", "-", "@"))
    assert sheets.neutralise("plain = text") == "plain = text"  # what is harmless stays as it is
    assert sheets.restore("'tis typed by hand") == "'tis typed by hand"


def test_a_file_round_trips_and_plain_csv_reads_it(tmp_path):
    path, values = tmp_path / "a.csv", texts()
    sheets.save({path: [("one", "two"), *zip(values, reversed(values))]})
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    columns, rows = sheets.read(path)
    assert columns == ["one", "two"] and [row["one"] for _, row in rows] == values
    assert [row["two"] for _, row in rows] == values[::-1]
    assert csv.field_size_limit() == 131072  # the process-wide limit is as it was
    csv.field_size_limit(sheets.LONGEST)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            cells = list(csv.reader(file, strict=True))[1:]
    finally:
        csv.field_size_limit(131072)
    assert [sheets.restore(one) for one, _ in cells] == values
    assert all(sheets.neutralise(value) == one for value, (one, _) in zip(values, cells))


@pytest.mark.parametrize("fails", [1, 2])
def test_a_stop_in_the_middle_leaves_nothing(tmp_path, monkeypatch, fails):
    calls, real = [], os.replace

    def replace(*names):
        calls.append(names)
        if len(calls) == fails:
            raise OSError(28, "No space left on device")
        real(*names)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        sheets.save({tmp_path / "a.csv": [["a"]], tmp_path / "b.csv": [["b"]]})
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path):
    def rows():
        yield ["a"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sheets.save({tmp_path / "a.csv": [["a"]], tmp_path / "b.csv": rows()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "line 1: empty"),
        (b"a,b\n1,2\n1\n", "line 3: 1 cells, but 2 columns"),
        (b'a,b\n1,"two\nlines"\n1,2,3\n', "line 4: 3 cells"),
        (b'a,b\n1,2\n1,"open\n\n', "line 3: no valid CSV"),
        (b'a,b\n1,"x"y\n', "line 2: no valid CSV"),
        (b"a,a\n1,2\n", "line 1: a column stands twice"),
        (b"a,b\n1,\xff\n", "line 2: not UTF-8"),
    ],
)
def test_broken_files_are_refused_by_line(tmp_path, data, message):
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        sheets.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_folder_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv cannot be read: No such file"):
        sheets.read(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"a\.csv cannot be written: No such file"):
        sheets.save({tmp_path / "none" / "a.csv": [["a"]]})
