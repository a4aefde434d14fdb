"""Ratings: read from both kinds of file, refused by line, and never taken for those of another study."""

import csv
import errno
import io
import json
import os
import shutil

import pytest

import serve
from common.human import analysis, ratings, study
from common.log import UserError
from tests import processes
from tests.studies import NO_PORT, answers, made_key, rate_all, two_studies


def test_ratings_are_read_from_csv_and_jsonl_alike(tmp_path):
    key = made_key(2)
    (tmp_path / "a.csv").write_text(
        "\ufeffrater_id,item_id,preferred,order,harmless_1_5,comment,seconds\r\n"
        'ann,i0,A,,5,"\'=two\nlines",3.5\r\nann,i1, c / a ,b/A/C,,,\r\n',
        encoding="utf-8",
        newline="",
    )
    rows = [
        {
            "rater_id": "bob",
            "item_id": "i0",
            "preferred": "none",
            "seconds": 2,
            "harmless_1_5": 1,
            "comment": "=x\u2028y",
        },
        {"rater_id": "bob", "item_id": "i1", "preferred": "A", "order": None},
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    first, second, third, fourth = ratings.read_ratings([tmp_path / "a.csv", tmp_path / "b.jsonl"], key)
    assert first["preferred"] == ("A",) and first["harmless_1_5"] == 5 and first["seconds"] == 3.5
    assert first["comment"] == "=two\nlines" and first["order"] is None and first["helpful_1_5"] is None
    assert second["preferred"] == ("A", "C") and second["order"] == ("B", "A", "C")
    assert third["preferred"] == () and third["harmless_1_5"] == 1 and third["comment"] == "=x\u2028y"
    assert fourth["order"] is None and fourth["seconds"] is None
    assert ratings.read_ratings(tmp_path / "b.jsonl", key) == [third, fourth]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"item_id": "i9"}, "item_id 'i9' is no item"),
        ({"preferred": "D"}, "preferred 'D': slots of A/B/C"),
        ({"preferred": "A/A"}, "preferred 'A/A'"),
        ({"preferred": ""}, "preferred ''"),
        ({"preferred": ["A"]}, "preferred"),
        ({"rater_id": " "}, "rater_id is empty"),
        ({"order": "A/B"}, "order 'A/B': all of A/B/C"),
        ({"order": "none"}, "order 'none': slots of A/B/C, joined by /$"),
        ({"harmless_1_5": 6}, "harmless_1_5 '6': a whole number from 1 to 5"),
        ({"helpful_1_5": 2.5}, "helpful_1_5 '2.5'"),
        ({"helpful_1_5": 5.0}, "helpful_1_5 '5.0': a whole number from 1 to 5"),
        ({"helpful_1_5": "5,0"}, "helpful_1_5 '5,0'"),
        ({"faithful_1_5": True}, "faithful_1_5 'true'"),
        ({"seconds": -1}, "seconds '-1'"),
        ({"seconds": "nan"}, "seconds 'nan'"),
        ({"seconds": "long"}, "seconds 'long'"),
        ({"mood": "good"}, "unknown column 'mood'"),
    ],
)
def test_bad_ratings_are_refused_by_line(tmp_path, changed, message):
    good, path = {"rater_id": "ann", "item_id": "i0", "preferred": "A"}, tmp_path / "r.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **changed}) + "\n")
    with pytest.raises(UserError, match=rf"r\.jsonl, line 2: .*{message}") as caught:
        ratings.read_ratings([path], made_key(1))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_ratings_are_refused(tmp_path):
    for name, text, message in (
        ("a.jsonl", '{"rater_id": \n', "line 1: no valid JSON"),
        ("a.txt", "", "a .csv, .tsv or .jsonl"),
        ("b.jsonl", "[]\n", "line 1: a rating is an object"),
        (
            "a.csv",
            "rater_id,item_id,choice\nann,i0,A\n",
            "line 1: no column 'preferred' among rater_id, item_id, choice",
        ),
        ("b.csv", "rater_id,preferred\nann,A\n", "line 1: no column 'item_id'"),
        ("c.csv", "rater_id,item_id,preferred\n,i0,A\n", "line 2: rater_id is empty"),
        ("d.csv", "rater_id,item_id,preferred\nann,i0,A,B\n", "line 2: 4 cells, but 3 columns"),
        ("e.csv", "item_id;Preferred;preferred \ni0;A;B\n", "line 1: a column stands twice"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            ratings.read_ratings([tmp_path / name], made_key(1))


@pytest.mark.parametrize("ending", ["csv", "CSV", "Tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_what_spreadsheets_write_is_read(tmp_path, capsys, separator, ending):
    """B8 and B9: blank rows, cells beyond the last column, last cells left out, other columns, a BOM, skipped items."""
    text = """,,,,,,
Rater_ID,item_id, Preferred ,notes; and more,seconds,helpful_1_5,,
ann,i0,A,"x, y; z",1,5 ,,
 ann ,i1,,,,,,

,,,,,,
ann,i2,b/c
,i3,,,
bob,i0,None,,2.5,
"""
    cells = [row for row in csv.reader(io.StringIO(text))]
    path = tmp_path / f"ratings.{ending}"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows(cells)
    found = ratings.read_ratings(path, made_key(4))
    assert [(row["rater_id"], row["item_id"], row["preferred"]) for row in found] == [
        ("ann", "i0", ("A",)),
        ("ann", "i1", None),
        ("ann", "i2", ("B", "C")),
        ("bob", "i0", ()),
    ]
    assert [row["seconds"] for row in found] == [1.0, None, None, 2.5] and found[0]["helpful_1_5"] == 5
    results = analysis.analyse(made_key(4), found, draws=10)
    assert results["skipped"] == 1 and results["ratings"] == 3 and results["replaced"] == 0
    assert "1 items skipped without an answer" in analysis.report(results)


def test_a_skipped_item_takes_no_answer_away(tmp_path):
    for name, preferred in (("a", "A"), ("b", "")):
        (tmp_path / f"{name}.csv").write_text(f"rater_id,item_id,preferred\nann,i0,{preferred}\n")
    results = analysis.analyse(made_key(1), ratings.read_ratings([tmp_path / "a.csv", tmp_path / "b.csv"], made_key(1)))
    assert (results["ratings"], results["skipped"], results["replaced"]) == (1, 0, 0)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_saved_sheet_with_a_column_preferred_is_a_rating(tmp_path, capsys, separator):
    """B9: texts with every separator, quotes and line ends; the rater is named by the file."""
    text = 'a, b; c\td "quoted"\nsecond line\r\n=1+1'
    items = [{"prompt": f"{i} {text}", "reference": text} for i in range(10)]
    systems = {name: [f"{text} {answer}" for answer in answers(10, seed)] for seed, name in enumerate("xy")}
    study.write(items, systems, tmp_path / "human_eval.csv", seed=1)
    with open(tmp_path / "human_eval.csv", encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    (tmp_path / "ann.csv").touch()
    with open(tmp_path / "ann.csv", "w", encoding="utf-8", newline="") as file:
        sheet = csv.writer(file, delimiter=separator)
        sheet.writerows([[*header, "preferred"], *([*row, "A" if i else ""] for i, row in enumerate(rows))])
    key = study.read_key(tmp_path / "human_eval.key.csv")
    found = ratings.read_ratings(tmp_path / "ann.csv", key)
    assert [row["item_id"] for row in found] == list(key) and {row["rater_id"] for row in found} == {"ann"}
    assert found[0]["preferred"] is None and {row["preferred"] for row in found[1:]} == {("A",)}
    assert "no column rater_id, so all is by one rater" in capsys.readouterr().out
    (tmp_path / "second").mkdir()
    other = shutil.copy(tmp_path / "ann.csv", tmp_path / "second")  # files of one name are not one rater
    found = ratings.read_ratings([tmp_path / "ann.csv", other], key)
    assert {row["rater_id"] for row in found} == {f"{tmp_path}/ann", f"{tmp_path}/second/ann"}


def test_names_that_differ_in_spaces_are_one_rater(tmp_path, capsys):
    """B5; those that differ in case stay two, which is said."""
    path = tmp_path / "a.csv"
    path.write_text("rater_id,item_id,preferred\nann,i0,A\nann ,i1,A\n an\u00a0 n,i0,B\nAnn,i0,A\n", encoding="utf-8")
    found = ratings.read_ratings(path, made_key(2))
    assert [row["rater_id"] for row in found] == ["ann", "ann", "an n", "Ann"]
    assert "raters Ann and ann count as 2 people" in capsys.readouterr().out
    path.write_text("rater_id,item_id,preferred\nann,i0,A\nann ,i0,A\n")
    results = analysis.analyse(made_key(2), ratings.read_ratings(path, made_key(2)), draws=10)
    assert results["replaced"] == 1 and results["agreement"]["reason"] == "agreement needs two raters"


def test_a_slip_in_an_item_id_is_not_called_another_study(tmp_path):
    first, _ = two_studies(tmp_path)
    key = study.read_key(first / "human_eval.key.csv")
    mark = study.mark_of(next(iter(key)))
    for wrong in (f"{mark}-item-99", f"{mark}-item-01 ", f"{mark.upper()}-item-99"):
        with pytest.raises(ValueError, match="is no item of this evaluation"):
            ratings.parse_rating({"rater_id": "ann", "item_id": wrong, "preferred": "A"}, key)
    with pytest.raises(ratings.ForeignItem, match="of another study"):
        ratings.parse_rating({"rater_id": "ann", "item_id": "item-01", "preferred": "A"}, key)


def test_saved_ratings_of_another_study_are_refused_and_kept(tmp_path):
    first, second = two_studies(tmp_path)
    saved = rate_all(first, second / "human_eval.ratings.jsonl")
    saved.write_text(saved.read_text() + '{"rater_id": "ann", "it')  # cut off by a crash
    before = saved.read_bytes()
    items = study.read_manifest(second / "human_eval.csv")
    with pytest.raises(UserError, match=r"line 1: item_id .* another study .*: move this file away") as caught:
        ratings.reopen(saved, items)
    assert str(saved) in str(caught.value) and saved.read_bytes() == before
    flags = ["--checkpoint", "tiny", "--port", NO_PORT, "--human_eval", second / "human_eval.csv"]
    processes.refused(serve.main, tmp_path, flags, "human_eval.ratings.jsonl, line 1: item_id")
    assert saved.read_bytes() == before


def test_ratings_are_kept_where_a_disk_has_no_fsync(tmp_path, monkeypatch):
    """As some network disks answer, D14: the study is written, and its ratings are saved."""

    def refuse(number):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    first, _ = two_studies(tmp_path)
    items = study.read_manifest(first / "human_eval.csv")
    row = {"rater_id": "ann", "item_id": next(iter(items)), "preferred": "A"}
    ratings.append(tmp_path / "a.jsonl", row)
    assert [rating["preferred"] for rating in ratings.reopen(tmp_path / "a.jsonl", items)] == [("A",)]
