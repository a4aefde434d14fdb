"""Ratings: read from both kinds of file, refused by line, and never taken for those of another study."""

import json

import pytest

import serve
from common.human import ratings, study
from common.log import UserError
from tests import processes
from tests.studies import NO_PORT, made_key, rate_all, two_studies


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
        ({"harmless_1_5": 6}, "harmless_1_5 '6': a whole number from 1 to 5"),
        ({"helpful_1_5": 2.5}, "helpful_1_5 '2.5'"),
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
        ("a.txt", "", "a .csv or a .jsonl"),
        ("b.jsonl", "[]\n", "line 1: a rating is an object"),
        ("a.csv", "rater_id,item_id,preferred,mood\nann,i0,A,x\n", "line 2: unknown column"),
        ("b.csv", "rater_id,item_id\nann,i0\n", "line 2: preferred ''"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            ratings.read_ratings([tmp_path / name], made_key(1))


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
