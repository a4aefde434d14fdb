"""CSV files: written whole or not at all, read strictly. (S8, cells that could be run: tests/faults/test_hostile.py)"""

import os

import pytest

from common.human import sheets
from common.log import UserError


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
