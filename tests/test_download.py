"""data/download_datasets.py against a loopback server, and against the publishers' files where they are at hand.

Hostile servers, archives and rows are rows S3 to S5 of the fault table: tests/faults/test_downloads.py.
"""

import hashlib
import json

import pytest

from common import tasks
from common.tasks import clinical
from tests.publishers import HH_TEST, HH_TRAIN, MTS, ROOT, hh, pair, pin, read

REAL = ROOT.parent / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the publishers' files are not at ../shared/data")

# ---------------------------------------------------------------------------------------------------- what is written


def test_every_task_is_written_as_one_kind_of_record(go, tmp_path):
    reports = go("all")
    for task, report in reports.items():
        assert json.loads((tmp_path / task / "report.json").read_text()) == report
        for split in ("train", "val", "test"):
            rows = read(tmp_path, task, split)
            assert len(rows) == report["splits"][split]["kept"] > 0
            written = (tmp_path / task / f"{split}.jsonl").read_bytes()
            assert report["splits"][split]["sha256"] == hashlib.sha256(written).hexdigest()
            for row in rows:
                assert list(row) == ["id", "prompt", "response", "rejected", "reference"]
                right = row["response"].rpartition("#### ")[2] if task == "gsm8k" else row["response"]
                assert row["prompt"][-1]["role"] == "user" and row["reference"] == right
        ids = [row["id"] for split in ("train", "val", "test") for row in read(tmp_path, task, split)]
        assert len(ids) == len(set(ids))
    assert reports["clinical"]["files"]["val"]["hash"] == "pinned"
    assert reports["conala"]["files"]["train"]["hash"] == "recorded now"
    assert not list(tmp_path.rglob("*.part*")) and not list(tmp_path.rglob("*.tmp"))


def test_second_run_asks_the_network_nothing(go, server, tmp_path):
    first = go("all")
    before = (tmp_path / "safety" / "train.jsonl").read_bytes()
    server.asked.clear()
    again = go("all")
    assert server.asked == []
    assert (tmp_path / "safety" / "train.jsonl").read_bytes() == before
    assert again["safety"]["splits"] == first["safety"]["splits"]
    assert again["conala"]["files"]["train"]["hash"] == "as recorded"


def test_a_split_does_not_depend_on_which_others_are_asked_for(go, server, tmp_path):
    go("safety")
    together = {split: (tmp_path / "safety" / f"{split}.jsonl").read_bytes() for split in ("train", "val", "test")}
    for split, data in together.items():
        (tmp_path / "safety" / f"{split}.jsonl").unlink()
        report = go("safety", split)
        assert (tmp_path / "safety" / f"{split}.jsonl").read_bytes() == data
        assert set(report["safety"]["splits"]) == {"train", "val", "test"}  # what it said of the others stays


def test_test_needs_only_its_own_file_and_val_that_of_train(go, server):
    go("safety", "test")
    assert [path for path, _ in server.asked] == [HH_TEST]
    del server.files[HH_TRAIN]
    assert HH_TRAIN in go.refused("safety", "val")
    go("clinical", "val")
    assert MTS.format("TrainingSet") not in [path for path, _ in server.asked]


def test_val_cut_is_stable_disjoint_and_keeps_a_prompt_together(go, server, tmp_path):
    rows = [pair(f"train {i // 2}?", f"No {i}.", f"Yes {i}.") for i in range(400)]
    server.files[HH_TRAIN] = hh(rows)
    go("safety")
    val, train = ({row["prompt"][0]["content"] for row in read(tmp_path, "safety", s)} for s in ("val", "train"))
    assert 3 <= len(val) <= 20 and not val & train
    assert len(read(tmp_path, "safety", "val")) == 2 * len(val)
    digest = {p: hashlib.sha256(f"user: {p.lower()}".encode()).hexdigest() for p in val | train}
    assert val == {p for p in digest if int(digest[p][:8], 16) % 20 == 0}
    # order and company of the rows do not matter
    server.files[HH_TRAIN] = hh(rows[::-1][:200])
    (tmp_path / "raw" / "safety" / "sha256.json").unlink()
    go("safety", "val")
    fewer = {row["prompt"][0]["content"] for row in read(tmp_path, "safety", "val")}
    assert fewer == {p for p in val if int(p.split()[1][:-1]) >= 100}


def test_indentation_of_a_snippet_is_kept_and_nulls_fall_back(go, tmp_path):
    go("conala")
    assert {row["response"] for row in read(tmp_path, "conala", "train")} <= {f"    f({i})\n" for i in range(100)}
    test = read(tmp_path, "conala", "test")
    assert [row["prompt"][0]["content"].split("\n\n")[1] for row in test] == ["sort x", "add up x"]
    assert [row["id"] for row in test] == ["conala-test-1-0", "conala-test-2-1"]


def test_clinical_names_the_section_and_joins_line_ends(go, tmp_path):
    go("clinical")
    row = read(tmp_path, "clinical", "train")[0]
    assert "history of present illness" in row["prompt"][0]["content"]
    assert row["prompt"][0]["content"].endswith("Doctor: TrainingSet 0?\nPatient: Yes.")
    assert row["response"] == "Note 0." and row["rejected"] is None


def test_dirty_pairs_are_dropped_by_reason(go, server, tmp_path, monkeypatch, script):
    dirt = [
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: d"},
        {"chosen": "no dialogue", "rejected": "no dialogue"},
        pair("q", "", "x"),
        pair("q", "x", " "),
        pair("q", "x", "x "),
        pair("", "x", "y"),
        pair("q", "Human: x", "y"),
        pair("q", "fine", "not fine"),
    ]
    server.files[HH_TEST] = server.files[HH_TRAIN] = hh(dirt)
    pin(script, monkeypatch, "safety")
    report = go("safety")["safety"]
    expected = {
        "prompts differ": 1,
        "roles do not alternate": 2,
        "chosen answer is empty": 1,
        "rejected answer is empty": 1,
        "answers are equal": 1,
        "a turn of the prompt is empty": 1,
    }
    assert report["files"]["test"]["dropped"] == expected
    assert report["files"]["test"]["flagged"] == ["safety-test-7"]
    assert report["files"]["train"]["dropped"] == expected | {"'Human:' in an answer": 1}
    assert [row["response"] for row in read(tmp_path, "safety", "test")] == ["Human: x", "fine"]


# --------------------------------------------------------------------------------------------------- redirects, damage


def test_a_redirect_to_http_is_followed(go, server, tmp_path):
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", f"{server.url}/elsewhere")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    server.tricks[HH_TEST] = redirect
    server.files["/elsewhere"] = server.files[HH_TEST]
    assert go("safety", "test")["safety"]["splits"]["test"]["kept"] == 5


def test_unknown_splits_are_refused(go):
    assert "--splits" in go.refused("safety", "train,dev")


# ------------------------------------------------------------------------------------------------------------ bad rows


def test_a_tilde_in_the_output_folder_is_the_home_of_the_user(script, server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["--dataset", "conala", "--splits", "test", "--source", server.url, "--output-dir", "~/data"]
    assert script.main(argv)["conala"] and (tmp_path / "data" / "conala" / "test.jsonl").is_file()


def test_a_damaged_table_of_hashes_is_not_trusted(go, tmp_path):
    go("conala", "test")
    (tmp_path / "raw" / "conala" / "sha256.json").write_text("{")
    assert "sha256.json" in go.refused("conala", "test")


# ------------------------------------------------------------------------------------------------ the publishers' files


@pytest.fixture
def real(script, tmp_path):
    """Run the script, with its own pinned hashes, on the publishers' files."""

    def run(dataset, splits="train,val,test", source=REAL):
        argv = ["--dataset", dataset, "--splits", splits, "--source", str(source), "--output-dir", str(tmp_path)]
        return script.main(argv)[dataset]

    return run


@needs_real
def test_real_safety_counts(real, tmp_path):
    report = real("safety", "test")
    facts = report["files"]["test"]
    assert facts["dropped"] == {"prompts differ": 5, "chosen answer is empty": 4, "roles do not alternate": 4}
    assert (facts["rows"], facts["hash"], len(facts["flagged"])) == (2312, "pinned", 31)
    rows = read(tmp_path, "safety", "test")
    assert len(rows) == 2299
    shorter = sum(len(row["response"]) < len(row["rejected"]) for row in rows) / len(rows)
    assert 0.54 < shorter < 0.57  # the published floor of this file is 55.5 %: the columns are not swapped


@needs_real
def test_real_safety_without_its_train_file_names_it(real, capsys, tmp_path):
    test_file = tmp_path / "publishers" / HH_TEST[1:]
    test_file.parent.mkdir(parents=True)
    test_file.symlink_to(REAL / HH_TEST[1:])
    with pytest.raises(SystemExit):
        real("safety", source=tmp_path / "publishers")
    assert "harmless-base/train.jsonl.gz: no such file" in capsys.readouterr().err


@needs_real
def test_real_clinical_counts(real, tmp_path):
    report = real("clinical")
    assert {facts["hash"] for facts in report["files"].values()} == {"pinned"}
    assert [report["files"][s]["rows"] for s in ("train", "val", "test")] == [1201, 100, 200]
    assert [report["splits"][s]["kept"] for s in ("train", "val", "test")] == [1198, 100, 200]
    rows = [row for split in ("train", "val", "test") for row in read(tmp_path, "clinical", split)]
    texts = [row["prompt"][0]["content"] for row in rows]
    assert not any("\r" in text for text in texts)
    assert len({text.split(" section of the clinical note")[0] for text in texts}) == len(clinical.SECTIONS) == 20


@needs_real
def test_real_conala_counts(real, tmp_path):
    report = real("conala")
    splits = report["splits"]
    assert [splits[s]["rows"] for s in ("train", "val", "test")] == [2249, 129, 500]
    assert [splits[s]["duplicates"] for s in ("train", "val", "test")] == [12, 0, 6]
    original = json.loads((REAL / "conala" / "conala-test.json").read_text(encoding="utf-8"))
    for row in read(tmp_path, "conala", "test"):
        assert row["response"] == original[int(row["id"].rsplit("-", 1)[1])]["snippet"]


@needs_real
def test_real_bytes_over_http_give_the_same_dataset(real, server, script, monkeypatch, tmp_path):
    monkeypatch.setitem(script.TASKS, "safety", tasks.load("safety"))  # with its own pinned hashes
    server.files = {HH_TEST: (REAL / HH_TEST[1:]).read_bytes()}
    over_http = real("safety", "test", source=server.url)
    assert over_http["splits"] == real("safety", "test")["splits"]
    assert over_http["files"]["test"]["hash"] == "pinned"
