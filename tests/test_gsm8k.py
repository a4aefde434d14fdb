"""GSM8K: the official answers are read as their authors meant them, from a folder and over HTTP, packed or not."""

import gzip
import json
import random
import re
from fractions import Fraction

import pytest

from common import rewards, tasks
from common.log import UserError
from common.tasks import gsm8k, numbers
from data import download_datasets
from tests.publishers import read

SIZES = {"train": 7473, "test": 1319}
PROBLEM = tasks.question("How many eggs are 9 * 2?")


def parts(text, reference="18"):
    return rewards.heuristic_reward("gsm8k", PROBLEM, text, reference)[1]


def test_reward_by_hand():
    assert parts("9 * 2 = 18 eggs.\n#### 18") == {"exact": 1, "format": 1}
    assert parts("9 * 2 = 18 eggs.\n#### 19") == {"exact": 0, "format": 1}
    assert parts("It is **18**.") == {"exact": 1, "format": 0}
    assert parts("#### 18 eggs") == {"exact": 1, "format": 0}  # the publisher's form has the number alone
    assert parts("18 #### none") == {"exact": 1, "format": 0}
    assert parts("") == {"exact": 0, "format": 0}
    assert parts("#### $1,234.50", "1234.5") == {"exact": 1, "format": 1}
    total, _ = rewards.heuristic_reward("gsm8k", PROBLEM, "18", "18", **tasks.load("gsm8k").weights())
    assert total == pytest.approx(1 / 1.1)


def test_endings_are_found_in_the_time_of_their_length():
    """As by the expression that tried every way to cut the digits in two; it would not come to the end of the last."""
    slow, rng = re.compile(r"####\s*-?[$€£]?[\d,]*\.?\d+\s*\Z"), random.Random(0)
    for _ in range(20_000):
        text = "####" + "".join(rng.choices("0123,,..-$ x#\n", k=rng.randint(0, 8)))
        assert bool(gsm8k.ENDING.search(text)) == bool(slow.search(text)), text
    assert not gsm8k.ENDING.search("#### " + "1" * 300_000 + "x")


def test_statistics_votes_and_floors():
    record = {"prompt": PROBLEM, "response": "9 * 2 = 18.\n#### 18", "reference": None}
    assert gsm8k.statistics(record, "#### 18") == {"exact": (1, 1), "formatted": (1, 1)}
    assert gsm8k.statistics(record, "18 or 20") == {"exact": (0, 1), "formatted": (0, 1)}
    assert gsm8k.TASK.vote("#### 18.0") == gsm8k.TASK.vote("so $18") == "18" and gsm8k.TASK.vote("none") is None
    [texts] = gsm8k.floors([record]).values()
    assert numbers.final_number(texts[0]) == 2


def test_generated_solutions_are_right():
    for record in tasks.records("gsm8k", "train", 300):
        a, sign, b, c = re.match(r"(\d+) ([-+*]) (\d+) = (\d+) \w+\.\n#### \4\Z", record["response"]).groups()
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(c)
        stated = re.findall(r"\d+", record["prompt"][0]["content"])
        assert stated == [a, b] and record["prompt"][0]["content"].startswith(gsm8k.INSTRUCTION + "\n\n")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": " ", "answer": "1\n#### 1"}, "question or solution is empty"),
        ({"question": "a?", "answer": "#### 1"}, "question or solution is empty"),
        ({"question": "a?", "answer": "<<1=1>>\n#### 1"}, "question or solution is empty"),
    ],
)
def test_rows_that_are_dropped(row, reason):
    assert gsm8k.read(row, "f:1", 0) == reason


@pytest.mark.parametrize("answer", ["no mark", "", 7, "a\0\n#### 1"])
def test_rows_that_are_refused(answer):
    with pytest.raises(UserError, match=r"^f:1:answer: "):
        gsm8k.read({"question": "a?", "answer": answer}, "f:1", 0)


def test_a_row_loses_its_annotations():
    row = gsm8k.read({"question": " a? ", "answer": "3+4=<<3+4=7>>7\nso 7,000.\n#### 7,000"}, "f:1", 5)
    assert row.response == "3+4=7\nso 7,000.\n#### 7,000" and row.reference == "7,000" and row.id == "5"
    assert row.prompt == tasks.question(f"{gsm8k.INSTRUCTION}\n\na?")


# ---------------------------------------------------------------- the official rows


@pytest.mark.parametrize("split", SIZES)
def test_every_official_answer_is_read(official, split):
    path = official / "gsm8k" / f"{split}.jsonl.gz"
    records, facts = download_datasets.read_rows(gsm8k.TASK, split, path, "")
    assert len(records) == facts["rows"] == SIZES[split] and facts["dropped"] == {} and facts["flagged"] == []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        published = [json.loads(line) for line in file]
    for record, row in zip(records, published, strict=True):
        written = row["answer"].split("####")[1].strip()
        number = Fraction(written.replace(",", ""))  # all are plain numbers
        assert record["reference"] == written and numbers.final_number(written) == number
        assert numbers.final_number(record["response"]) == number
        assert "<<" not in record["response"] and ">>" not in record["response"]
        assert record["response"].endswith(f"\n#### {written}")
        assert row["question"].strip() in record["prompt"][0]["content"]
        assert gsm8k.statistics(record, record["response"]) == {"exact": (1, 1), "formatted": (1, 1)}
        assert gsm8k.reward(record["prompt"], record["response"], record["reference"]) == {"exact": 1, "format": 1}


def test_the_worked_steps_mostly_end_in_the_number_too(official):
    """Without ####: the last number of the text before it is the official one in nearly every solution."""
    records, _ = download_datasets.read_rows(gsm8k.TASK, "test", official / "gsm8k" / "test.jsonl.gz", "")
    steps = [record["response"].rpartition("\n####")[0] for record in records]
    right = sum(numbers.right(text, record["reference"]) for text, record in zip(steps, records, strict=True))
    assert right > 0.95 * len(records)


def test_from_a_folder_of_packed_files(script, official, tmp_path):
    report = script.main(
        ["--dataset", "gsm8k", "--source", str(official), "--output-dir", str(tmp_path)],
    )["gsm8k"]
    splits = report["splits"]
    assert {facts["hash"] for facts in report["files"].values()} == {"pinned"}
    assert splits["test"]["kept"] == 1319 and splits["val"]["rows"] + splits["train"]["rows"] == 7473
    assert sum(split["duplicates"] for split in splits.values()) == 0
    assert 300 < splits["val"]["kept"] < 450 and report["licence"] == "MIT"
    rows = {split: read(tmp_path, "gsm8k", split) for split in ("train", "val", "test")}
    assert all(len(rows[split]) == splits[split]["kept"] for split in rows)
    assert len(gsm8k.TASK.floors(rows["val"])) == 1
    assert sorted(path.name for path in (tmp_path / "raw" / "gsm8k").iterdir()) == [
        *("sha256.json", "test.jsonl", "train.jsonl"),
    ]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_over_http_packed_or_not(script, server, official, monkeypatch, tmp_path, suffix):
    monkeypatch.setitem(script.TASKS, "gsm8k", gsm8k.TASK)  # with its own pinned hashes
    packed = (official / "gsm8k" / "test.jsonl.gz").read_bytes()
    server.files = {f"/gsm8k/test.jsonl{suffix}": packed if suffix else gzip.decompress(packed)}
    argv = ["--dataset", "gsm8k", "--splits", "test", "--source", server.url, "--output-dir", str(tmp_path)]
    facts = script.main(argv)["gsm8k"]["files"]["test"]
    assert (facts["rows"], facts["hash"]) == (1319, "pinned") and facts["sha256"].startswith("3730d312")
    assert [path for path, _ in server.asked] == ["/gsm8k/test.jsonl", "/gsm8k/test.jsonl.gz"][: 1 + len(suffix) // 3]
    assert sorted(path.name for path in (tmp_path / "raw" / "gsm8k").iterdir()) == ["sha256.json", "test.jsonl"]
    server.asked.clear()
    script.main(argv)
    assert server.asked == []


def test_a_mirror_without_the_file_or_with_another_is_refused(go, server, tmp_path):
    packed = server.files.pop("/gsm8k/test.jsonl")
    assert "404" in go.refused("gsm8k", "test")
    assert [path for path, _ in server.asked] == ["/gsm8k/test.jsonl", "/gsm8k/test.jsonl.gz"]
    server.files["/gsm8k/test.jsonl.gz"] = gzip.compress(packed + b"\n")
    assert "is pinned; nothing was kept" in go.refused("gsm8k", "test")
    server.files["/gsm8k/test.jsonl.gz"] = b"<html>"
    (tmp_path / "raw" / "gsm8k" / "test.jsonl.gz").unlink(missing_ok=True)
    assert "cannot be unpacked" in go.refused("gsm8k", "test")
    server.files["/gsm8k/test.jsonl.gz"] = gzip.compress(packed)
    (tmp_path / "raw" / "gsm8k" / "test.jsonl.gz").unlink(missing_ok=True)
    assert go("gsm8k", "test")["gsm8k"]["splits"]["test"]["kept"] == 4
