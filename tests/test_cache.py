"""What is costly to make: kept to the bit under its name, made anew where the code changed or the file is damaged."""

import gzip
import json

import pytest

from common.log import UserError
from common.runtime import cache

ROWS = [[1 / 3, -2e-17], [5e300, 0.1]]


def test_records_are_made_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return ROWS

    def records(name):
        return cache.records(tmp_path / "kept" / f"{name}.jsonl", name, make)

    assert records("one") == ROWS
    assert records("one") == ROWS and len(calls) == 1  # to the bit
    assert records("other") == ROWS and len(calls) == 2
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".jsonl"] * 2  # no draft is left


def test_a_file_of_another_name_is_made_anew(tmp_path):
    path = tmp_path / "kept.jsonl"
    cache.records(path, "one", lambda: ROWS)
    assert cache.records(path, "other", lambda: ROWS[:1]) == ROWS[:1]


def test_another_source_is_another_key(tmp_path, monkeypatch):
    value = ["model", 1, {"b": 2, "a": None}]
    first = cache.key(value, cache)
    assert first == cache.key(["model", 1, {"a": None, "b": 2}], cache) != cache.key(value) != cache.key(value[:2])
    changed = tmp_path / "cache.py"
    changed.write_text(open(cache.__file__).read() + "# a fork")
    monkeypatch.setattr(cache, "__file__", str(changed))
    assert cache.key(value, cache) != first


@pytest.mark.parametrize("how", ["cut", "flipped", "row lost", "not json", "hash"])
def test_damage_is_made_anew_and_said(tmp_path, capsys, how):
    path, rows = tmp_path / "kept.jsonl", [[1.5, 2.5], [3.5, 4.5]]
    cache.records(path, "key", lambda: rows)
    whole = path.read_text()
    head, *lines = whole.splitlines(keepends=True)
    path.write_text(
        {
            "cut": whole[:-9],
            "flipped": whole.replace("1.5", "1.25"),
            "row lost": head + lines[0],
            "not json": "[]",
            "hash": json.dumps({"key": "key"}) + "\n" + "".join(lines),
        }[how]
    )
    assert cache.records(path, "key", lambda: rows) == rows
    assert f"{path.name} is damaged" in capsys.readouterr().out
    assert path.read_text() == whole and list(tmp_path.iterdir()) == [path]


def sealed(folder):
    """A file in place of the folder: there, nobody can write, not even root."""
    folder.write_text("")
    return folder


def test_what_cannot_be_kept_is_not_lost(tmp_path, capsys):
    path = sealed(tmp_path / "cache") / "reference" / "kept.jsonl"
    assert cache.records(path, "one", lambda: ROWS) == ROWS
    assert capsys.readouterr().out.startswith("warning: not kept for the next run: ")
    with pytest.raises(OSError):
        cache.records(path, "one", lambda: ROWS, needed=True)


def test_a_filled_cache_is_read_without_a_lock(tmp_path, monkeypatch):
    """D15: a cache that an administrator filled may be read-only."""
    folder = cache.build_once(tmp_path / "cache" / "base", lambda folder: (folder / "a").touch())

    def no_lock(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache, "FileLock", no_lock)
    assert cache.build_once(folder, lambda folder: pytest.fail("built again")) == folder
    with pytest.raises(UserError, match=r"other cannot be written \(Permission denied\): set GEMMA_ALIGNMENT_CACHE"):
        cache.build_once(folder.with_name("other"), lambda folder: (folder / "a").touch())


def test_what_was_kept_is_read_with_its_head(tmp_path):
    path, packed = tmp_path / "kept.jsonl", tmp_path / "kept.jsonl.gz"
    cache.records(path, "one", lambda: ROWS, head={"of": "rows", "facts": [1]})
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, packed):
        head, rows = cache.read(file)
        assert rows == ROWS and (head["key"], head["of"], head["facts"]) == ("one", "rows", [1])
    assert cache.records(path, "one", list) == ROWS
    path.write_text(path.read_text().replace("e+300", "e+200"))
    packed.write_bytes(packed.read_bytes()[:-9])
    for file in (path, packed, tmp_path / "absent"):
        with pytest.raises(UserError, match=f"{file.name} cannot be read"):
            cache.read(file)
