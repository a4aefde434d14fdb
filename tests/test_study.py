"""Blind files and their keys: blinding, balance, refusals, a whole study from files, CSV whole or not at all."""

import csv
import json
import os
import stat
from collections import Counter

import pytest

import evaluate
import serve
from common.human import analysis, ratings, study
from common.log import UserError
from tests import processes
from tests.studies import NAMES, NO_PORT, answers, made_study, rate_all, take_marks_off, two_studies


def test_the_blind_file_and_its_key(tmp_path):
    items, key = made_study(tmp_path, n=300, num_samples=200, seed=3)
    kinds = Counter(entry["kind"] for entry in key.values())
    assert kinds == {"item": 200, "duplicate": 20, "check": 10} and list(items) == list(key)
    texts = {name: answers(300, seed) for seed, name in enumerate(NAMES)}
    for name, entry in key.items():
        shown, i = items[name], entry["source"]
        assert (shown["prompt"], shown["reference"], shown["task"]) == (f"=prompt {i}", f"reference {i}", "clinical")
        for slot, system in entry["systems"].items():
            if slot != entry["trap"]:
                assert shown["answers"][slot] == texts[system][i]
            assert entry["characters"][slot] == len(shown["answers"][slot]) and entry["seed"] == "3"
    sources = [entry["source"] for entry in key.values() if entry["kind"] == "item"]
    checked = {entry["source"] for entry in key.values() if entry["kind"] == "check"}
    assert len(set(sources)) == 200 and not checked & set(sources)  # checks are of other items while there are any


def test_slots_are_balanced_and_duplicates_move_every_answer(tmp_path):
    _, key = made_study(tmp_path, n=200, seed=1)
    counts = Counter((name, slot) for e in key.values() if e["kind"] == "item" for slot, name in e["systems"].items())
    assert set(counts.values()) <= set(range(64, 70))  # 200 / 3, give or take one block of six orders
    places, moved = list(key), 0
    for name, entry in key.items():
        if entry["kind"] == "duplicate":
            first = key[entry["original"]]
            assert first["source"] == entry["source"] and places.index(entry["original"]) < places.index(name)
            assert all(first["systems"][slot] != system for slot, system in entry["systems"].items())
            moved += 1
    assert moved == 20


@pytest.mark.parametrize("systems", [("x", "y"), NAMES, ("a", "b", "c", "d")])
def test_a_check_shows_an_answer_and_its_shuffled_words(tmp_path, systems):
    items, key = made_study(tmp_path, systems=systems)
    checks = [name for name, entry in key.items() if entry["kind"] == "check"]
    assert len(checks) == 3
    for name in checks:
        shown, trap = items[name]["answers"], key[name]["trap"]
        twin = [slot for slot in shown if slot != trap and key[name]["systems"][slot] == key[name]["systems"][trap]]
        assert len(twin) == 1 and len(shown) == len(systems)
        assert shown[trap] != shown[twin[0]] and sorted(shown[trap].split()) == sorted(shown[twin[0]].split())


def test_nothing_in_the_blind_file_names_a_system(tmp_path):
    (tmp_path / "outputs").mkdir()
    names = {name: answers(50, seed) for seed, name in enumerate(("sft_lora", "grpo_rl", "staged_run"))}
    items = [{"prompt": f"question {i}"} for i in range(50)]
    path = tmp_path / "outputs" / "human.csv"
    study.write(items, names, path)
    text = path.read_text(encoding="utf-8-sig")
    for word in (*names, "lora", "staged", "outputs", str(tmp_path), "duplicate", "check", "trap"):
        assert word not in text
    assert sorted(file.name for file in path.parent.iterdir()) == ["human.csv", "human.key.csv"]
    assert stat.S_ISREG(path.stat().st_mode) and not (hasattr(os, "listxattr") and os.listxattr(path))
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, strict=True))
    assert rows[0] == ["item_id", "prompt", "reference", "response_A", "response_B", "response_C"]
    mark = rows[1][0][:6]
    assert [row[0] for row in rows[1:]] == [f"{mark}-item-{i:02d}" for i in range(1, len(rows))]


def test_the_seed_makes_the_files_and_is_drawn_if_none(tmp_path):
    files = []
    for name, seed in (("a", 5), ("b", 5), ("c", None), ("d", None)):
        study.write([{"prompt": "p"}] * 20, {n: answers(20) for n in NAMES}, tmp_path / f"{name}.csv", 20, seed)
        files.append((tmp_path / f"{name}.key.csv").read_bytes())
    assert files[0] == files[1] and files[2] != files[3]
    seed = int(next(iter(study.read_key(tmp_path / "c.key.csv").values()))["seed"])
    study.write([{"prompt": "p"}] * 20, {n: answers(20) for n in NAMES}, tmp_path / "e.csv", 20, seed)
    assert (tmp_path / "e.key.csv").read_bytes() == files[2]


def test_generate_manifest_takes_the_readmes_call(tmp_path, capsys):
    texts = [answers(8, seed) for seed in range(3)]
    prompts, references = ["=1+1", "'tis", *"cdefgh"], ["", "\n", *"cdefgh"]
    made = study.generate_manifest(prompts, references, *texts, output_path=str(tmp_path / "h.csv"), num_samples=200)
    assert {name: made[name] for name in ("items", "duplicates", "checks")} == {
        "items": 8,
        "duplicates": 1,
        "checks": 2,
    }
    assert "only 8 items were given, so all are in the study (200 were asked for)" in capsys.readouterr().out
    key = study.read_key(tmp_path / "h.key.csv")
    for name, item in study.read_manifest(tmp_path / "h.csv").items():
        i = key[name]["source"]
        assert (item["prompt"], item["reference"]) == (prompts[i], references[i])
    assert {name for entry in key.values() for name in entry["systems"].values()} == {"sft", "rl", "staged"}


def test_nothing_is_cut(tmp_path):
    long, items = {"x": ["a" * 5000] * 4, "y": ["b" * 10] * 4}, [{"prompt": "p" * 9000}] * 4
    study.write(items, long, tmp_path / "whole.csv")
    assert {len(a) for i in study.read_manifest(tmp_path / "whole.csv").values() for a in i["answers"].values()} == {
        5000,
        10,
    }
    assert {len(i["prompt"]) for i in study.read_manifest(tmp_path / "whole.csv").values()} == {9000}


def test_answers_too_short_to_shuffle_are_said(tmp_path, capsys):
    made = study.write([{"prompt": "p"}] * 9, {"x": ["yes"] * 9, "y": ["no"] * 9}, tmp_path / "a.csv", 9)
    assert made["checks"] == 0 and "0 attention checks instead of 2" in capsys.readouterr().out


def test_prompts_without_references_are_refused(tmp_path):
    with pytest.raises(UserError, match="2 prompts, but 1 references"):
        study.generate_manifest(["a", "b"], ["c"], *[answers(2)] * 3, output_path=tmp_path / "h.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"systems": {"x": ["a"]}}, "two to four named systems"),
        ({"systems": {"x": ["a"], "y": ["b"]}}, "2 items, but 1 answers of x"),
        ({"systems": {"x": ["a", None], "y": ["b", "c"]}}, "item 1, answer of x: no text"),
        ({"systems": {"x": ["a", "\ud83d"], "y": ["b", "c"]}}, "item 1, answer of x: no text"),
        ({"items": [{"prompt": "p"}, {}]}, "item 1, prompt: no text"),
        ({"items": []}, "needs items"),
        ({"num_samples": 0}, "at least 1, not 0"),
        ({"path": "study.txt"}, "named NAME.csv"),
        ({"path": "study.key.csv"}, "named NAME.csv"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, change, message):
    given = {"items": [{"prompt": "p"}] * 2, "systems": {"x": ["a", "b"], "y": ["c", "d"]}, "path": "a.csv", **change}
    with pytest.raises(UserError, match=message) as caught:
        study.write(**{**given, "path": tmp_path / given["path"]})
    assert "\n" not in str(caught.value) and given["path"] in str(caught.value) and not list(tmp_path.iterdir())


def test_a_file_that_may_have_been_rated_is_never_replaced(tmp_path):
    made_study(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match="may have been rated"):
        made_study(tmp_path)
    (tmp_path / "study.csv").unlink()
    with pytest.raises(UserError, match=r"study\.key\.csv exists"):
        made_study(tmp_path)
    assert (tmp_path / "study.key.csv").read_bytes() == before["study.key.csv"]


def test_a_new_study_beside_old_ratings_is_refused(tmp_path):
    """B4: the page would count unseen items as rated; the command says so before it asks any system."""
    first, _ = two_studies(tmp_path)
    saved = rate_all(first, first / "human_eval.ratings.jsonl")
    for name in ("human_eval.csv", "human_eval.key.csv"):
        (first / name).unlink()
    with pytest.raises(UserError, match=r"human_eval\.ratings\.jsonl exists and may have been rated") as caught:
        study.write([{"prompt": "p"}] * 9, {n: answers(9) for n in NAMES}, first / "human_eval.csv")
    assert "\n" not in str(caught.value) and list(first.iterdir()) == [saved]
    flags = ["--logging.output_dir", tmp_path, "--logging.run_name", "first", "--human_eval"]
    flags += ["--checkpoints", "base=tiny", "tuned=nowhere"]
    processes.refused(evaluate.main, tmp_path, flags, "human_eval.ratings.jsonl exists and may have been rated")
    assert list(first.iterdir()) == [saved]


def test_a_stop_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        made_study(tmp_path)
    assert not list(tmp_path.iterdir())


HEADER = "item_id,slot,system,kind,trap,original,source,characters,digest,seed\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,slot\n", "line 1: a key's columns"),
        (HEADER + "i,A,x,item,,,zero,1,d,0\n", "line 2: damaged, .*zero"),
        (HEADER + "i,A,x,item,,,0,1,d,0\ni,C,y,item,,,0,1,d,0\n", "line 3: damaged, .*i, C, y"),
        (HEADER + "i,A,x,item,,,0,1,d,0\ni,B,y,check,,,0,1,d,0\n", "line 3: damaged, .*check"),
        (HEADER + "i,A,x,thing,,,0,1,d,0\n", "line 2: damaged, .*thing"),
        (HEADER + "i,A,x,item,,,0,1,d,0\n", "i is damaged: slots 'A'"),
        (HEADER + "i,A,x,check,,,0,1,d,0\ni,B,y,check,,,0,1,d,0\n", "trap None"),
        (HEADER + "i,A,x,check,1,,0,1,d,0\ni,B,y,check,1,,0,1,d,0\n", "line 3: damaged, .*check, 1"),
        (HEADER + "i,A,x,duplicate,,j,0,1,d,0\ni,B,y,duplicate,,j,0,1,d,0\n", "original 'j'"),
    ],
)
def test_a_damaged_key_is_refused(tmp_path, text, message):
    path = tmp_path / "a.key.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        study.read_key(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,prompt,response_A,response_B\n", "line 1: a blind file has other columns"),
        ("item_id,prompt,reference,response_A\n", "line 1: a blind file has other columns"),
        ("item_id,prompt,reference,response_B,response_A\n", "line 1"),
        ("item_id,prompt,reference,response_A,response_B\ni,p,r,a,b\ni,p,r,a,b\n", "line 3: item_id 'i'"),
    ],
)
def test_a_damaged_blind_file_is_refused(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        study.read_manifest(path)


def test_a_whole_study_from_files(tmp_path):
    """Raters who read prefer the staged system's answers; the report says so, from the written files alone."""
    items, key = made_study(tmp_path, n=60, seed=2)
    wanted, path = set(answers(60, NAMES.index("staged"))), tmp_path / "ratings.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for rater in ("ann", "bob"):
            for name, item in items.items():  # a check may show no staged answer: then none is preferred
                best = [slot for slot, text in item["answers"].items() if text in wanted]
                file.write(
                    json.dumps({"rater_id": rater, "item_id": name, "preferred": "/".join(best) or "none"}) + "\n"
                )
    found = analysis.analyse(key, ratings.read_ratings([path], key), draws=100)
    assert found["excluded"] == [] and found["items"] == 60 and found["ratings"] == 120
    assert max(found["bradley_terry"], key=lambda name: found["bradley_terry"][name]["strength"]) == "staged"
    assert found["self_consistency"] == {
        "share": 1.0,
        "low": pytest.approx(0.757, abs=1e-3),
        "high": pytest.approx(1),
        "n": 12,
    }
    assert analysis.report(found).startswith("## Human evaluation\n\n60 items, 2 raters, 120 ratings counted")


# ---------------------------------------------------------------- two studies, and files without marks


def results_of(folder, *files):
    """evaluate.py --human_results of these files with the key of the run in `folder`."""
    where = ["--logging.output_dir", folder.parent, "--logging.run_name", folder.name, "--evaluation.draws", 100]
    return evaluate.main([str(word) for word in [*where, "--human_results", *files]])


def refusal(capsys, folder, *files):
    """The one line with which the command refuses these files."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        results_of(folder, *files)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    return line


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_ratings_of_another_study_are_refused_by_the_command(tmp_path, capsys, kind):
    first, second = two_studies(tmp_path)
    mine = rate_all(first, tmp_path / f"mine.{kind}")
    found = results_of(first, mine)
    assert found["win_rates"][0]["rate"] == 0.0 and found["systems"] == ["base", "tuned"]
    assert found["self_consistency"]["share"] == 1.0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    item = next(iter(study.read_key(first / "human_eval.key.csv")))
    line = refusal(capsys, second, mine)
    assert f"mine.{kind}, line {2 if kind == 'csv' else 1}: item_id '{item}' is of another study" in line
    assert str(second / "human_eval.key.csv") in line and "--logging.run_name" in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (second / "human_results.json").exists()


def test_a_key_may_be_named_wherever_it_lies(tmp_path, capsys):
    first, second = two_studies(tmp_path)
    mine = str(rate_all(first, tmp_path / "mine.csv"))
    key = str(first / "human_eval.key.csv")
    found = evaluate.main(["--human_results", mine, "--human_key", key, "--evaluation.draws", "100"])
    assert found["win_rates"][0]["rate"] == 0.0 and "Bradley" in (first / "human_results.md").read_text()
    assert json.loads((first / "human_results.json").read_text()) == found
    key = second / "human_eval.key.csv"
    for argv, message in (
        (["--human_results", mine, "--human_key", key], f"{key} is not its key, name that with --human_key"),
        (["--human_results", mine, "--human_key", tmp_path / "none.key.csv"], "none.key.csv cannot be read"),
        (["--human_key", key], "--human_key and --human_pairs go with --human_results"),
        (["--human_results", mine, "--human_pairs", tmp_path / "mine.csv"], "name a new file that ends with .jsonl"),
    ):
        processes.refused(evaluate.main, tmp_path, argv, message)


def test_one_foreign_file_or_line_among_good_ones_is_named(tmp_path, capsys):
    first, second = two_studies(tmp_path)
    mine, theirs = rate_all(first, tmp_path / "mine.csv"), rate_all(second, tmp_path / "theirs.jsonl")
    assert "theirs.jsonl, line 1: item_id" in refusal(capsys, first, mine, theirs)
    good = rate_all(first, tmp_path / "good.jsonl").read_text()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(good + theirs.read_text())
    line = refusal(capsys, first, mixed)
    assert f"mixed.jsonl, line {good.count(chr(10)) + 1}: item_id" in line and "another study" in line


def test_files_without_marks_are_read_with_their_own_key_only(tmp_path, capsys):
    first, second = two_studies(tmp_path)
    marked = rate_all(first, tmp_path / "marked.csv")
    take_marks_off(first / "human_eval.csv", first / "human_eval.key.csv")
    old = rate_all(first, tmp_path / "old.csv")
    assert "item-01" in old.read_text().split(",") and list(study.read_manifest(first / "human_eval.csv"))
    capsys.readouterr()
    assert results_of(first, old)["win_rates"][0]["rate"] == 0.0
    assert "human_eval.key.csv: its items carry no study mark" in capsys.readouterr().out
    line = refusal(capsys, second, old)
    assert "old.csv, line 2: item_id 'item-01' is of another study (its mark is missing" in line
    line = refusal(capsys, first, marked)  # a new rating, and the key of an old study
    assert "marked.csv, line 2: item_id" in line and "that of this study is missing" in line


def test_the_mark_is_a_function_of_all_that_the_study_is(tmp_path):
    items, systems = [{"prompt": f"p{i}"} for i in range(12)], {"x": answers(12, 0), "y": answers(12, 1)}
    given = {"items": items, "systems": systems, "num_samples": 10, "seed": 5}
    changes = {
        "same": {},
        "again": {},
        "seed": {"seed": 6},
        "size": {"num_samples": 11},
        "prompt": {"items": [{"prompt": f"q{i}"} for i in range(12)]},
        "answer": {"systems": {**systems, "y": [*answers(12, 1)[:-1], "another one"]}, "num_samples": 12},
        "whole": {"num_samples": 12},
        "names": {"systems": {"x": systems["x"], "z": systems["y"]}},
    }
    marks = {}
    for name, change in changes.items():
        study.write(path=tmp_path / f"{name}.csv", **{**given, **change})
        found = {study.mark_of(item) for item in study.read_key(tmp_path / f"{name}.key.csv")}
        assert len(found) == 1 and "" not in found
        marks[name] = found.pop()
    assert marks.pop("again") == marks["same"] and len(set(marks.values())) == len(marks)


def test_a_file_with_the_items_of_two_studies_is_refused(tmp_path):
    first, second = two_studies(tmp_path)
    for name, read in (("human_eval.csv", study.read_manifest), ("human_eval.key.csv", study.read_key)):
        rows = (second / name).read_text("utf-8-sig").split("\n", 1)[1]
        (tmp_path / name).write_text((first / name).read_text("utf-8-sig") + rows)
        with pytest.raises(UserError, match=rf"{name}: .* are items of two studies") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_blind_file_beside_another_study_s_key_is_not_served(tmp_path):
    first, second = two_studies(tmp_path)
    os.replace(first / "human_eval.key.csv", second / "human_eval.key.csv")
    flags = ["--checkpoint", "tiny", "--port", NO_PORT, "--human_eval", second / "human_eval.csv"]
    processes.refused(serve.main, tmp_path, flags, "they are of two studies, put the blind file beside its own key")
    flags = ["--logging.output_dir", tmp_path, "--logging.run_name", "second", "--human_eval"]
    flags += ["--checkpoints", "base=tiny", "tuned=tiny"]
    processes.refused(evaluate.main, tmp_path, flags, "they are of two studies, put the blind file beside its own key")


# ---------------------------------------------------------------- CSV (S8, cells that could be run: test_hostile.py)


@pytest.mark.parametrize("fails", [1, 2])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_stop_in_the_middle_leaves_nothing(tmp_path, monkeypatch, fails, error):
    calls, real = [], os.replace

    def replace(*names):
        calls.append(names)
        if len(calls) == fails:
            raise error
        real(*names)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        made_study(tmp_path)
    name = ("study.key.csv", "study.csv")[fails - 1]
    assert caught.type is KeyboardInterrupt or f"cannot write {tmp_path / name}: No space left" in str(caught.value)
    assert len(calls) == fails and not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path):
    def rows():
        yield ["a"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.save(tmp_path / "a.csv", rows())
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
        study.read_csv(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_folder_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv cannot be read: No such file"):
        study.read_csv(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"cannot write .*a\.csv: No such file .* \(\d+ bytes needed, \d+ free\)"):
        study.save(tmp_path / "none" / "a.csv", [["a"]])
