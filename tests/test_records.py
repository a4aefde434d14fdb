"""Rows of every shape become the same records, examples and pairs; what is no row is named by file and line."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from common import config, data, records
from common.log import UserError
from common.runtime import sources
from tests.publishers import pair as hh_pair

ROOT = Path(__file__).resolve().parents[1]
SET = [(f"Question {i}, é\nplease?", f"  answer {i}\n" if i % 3 else f"No {i}.", f"worse {i}") for i in range(40)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def says(speaker, text):
    return {"from": speaker, "value": text}


ANSWERED = {  # a row of each shape
    "ours": lambda q, a: {"prompt": [user(q)], "response": a},
    "our keys, text": lambda q, a: {"prompt": q, "response": a, "extra": 1},
    "messages": lambda q, a: {"messages": [user(q), assistant(a)], "prompt": q},
    "other cases": lambda q, a: {"messages": [{"role": "User", "content": q}, {"role": "ASSISTANT", "content": a}]},
    "gemma's role": lambda q, a: {"messages": [user(q), {"role": "model", "content": a, "tool_calls": None}]},
    "completion": lambda q, a: {"prompt": q, "completion": a},
    "completion, turns": lambda q, a: {"prompt": [user(q)], "completion": [assistant(a)]},
    "sharegpt": lambda q, a: {"conversations": [says("human", q), says("gpt", a)], "id": None},
    "sharegpt, others": lambda q, a: {"conversations": [says("user", q), says("chatgpt", a)]},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a, "text": "ignored"},
    "question": lambda q, a: {"question": q, "answer": a},
}
PREFERRED = {
    "ours": lambda q, a, b: {"prompt": [user(q)], "response": a, "rejected": b},
    "text": lambda q, a, b: {"prompt": q, "chosen": a, "rejected": b},
    "answers as turns": lambda q, a, b: {"prompt": [user(q)], "chosen": [assistant(a)], "rejected": [assistant(b)]},
    "dialogues": lambda q, a, b: {"chosen": [user(q), assistant(a)], "rejected": [user(q), assistant(b)]},
    "dialogues and prompt": lambda q, a, b: {
        "prompt": q,
        "messages": [user(q), assistant(a)],
        "chosen": [user(q), assistant(a)],
        "rejected": [user(q), assistant(b)],
    },
    "prompt as HH's": lambda q, a, b: {"prompt": f"\n\nHuman: {q}\n\nAssistant:", "chosen": a, "rejected": b},
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def load(tmp_path):
    """The records of rows that stand in one file, val beside it so that nothing is cut."""

    def read(rows, **options):
        for split in ("train", "val"):
            write(tmp_path / f"{split}.jsonl", rows)
        return data.load_split(tmp_path, "train", **options)

    return read


@pytest.mark.parametrize("shape", ANSWERED)
def test_all_shapes_give_the_same_examples(load, tokenizer, shape, capsys):
    right = load([ANSWERED["ours"](q, a) for q, a, _ in SET])
    read = load([ANSWERED[shape](q, a) for q, a, _ in SET])
    for key in ("id", "prompt", "response", "rejected"):  # the id of a row without one is its content's hash
        assert [record[key] for record in read] == [record[key] for record in right]
    assert [record["reference"] for record in read] == [a if shape == "question" else None for _, a, _ in SET]
    assert data.encode_records(read, tokenizer, 64) == data.encode_records(right, tokenizer, 64)
    assert "read 40 rows of " in capsys.readouterr().out


@pytest.mark.parametrize("shape", PREFERRED)
def test_all_shapes_give_the_same_pairs(load, tokenizer, shape):
    right, read = (load([PREFERRED[name](*row) for row in SET]) for name in ("ours", shape))
    pairs, report = data.encode_pairs(read, tokenizer, 64)
    assert (pairs, report) == data.encode_pairs(right, tokenizer, 64) and report["kept"] == 40


def test_dialogues_of_several_turns(load, tokenizer):
    """A system turn stays the first; answers in a row are one; turns before the last answer are the prompt."""
    turns = [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    plain = [{"role": role, "content": text} for role, text in turns]
    right = load([{"prompt": plain[:-1], "response": "d"}])
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = {"conversations": [says(names[role], text) for role, text in turns]}
    for row in ({"messages": plain}, shared, {"prompt": plain[:2], "completion": plain[2:]}):
        assert load([row]) == right
    assert load([{"messages": [*plain, assistant("e")]}])[0]["response"] == "d\ne"
    (open_end,) = load([{"messages": plain[:-1]}])  # it can be asked, and teaches nothing
    assert (open_end["prompt"], open_end["response"]) == (plain[:-1], "")
    assert data.encode_records([open_end], tokenizer, 64)[1]["empty_response"] == 1


def test_alpaca_appends_its_input(load):
    (record,) = load([{"instruction": "Translate.", "input": "chat", "output": "cat"}])
    assert record["prompt"] == [user("Translate.\n\nchat")] and record["response"] == "cat"


def test_prompts_alone(load, capsys):
    rows = [{"prompt": "a", "reference": "b"}, {"prompt": [user("c")]}, {"prompt": "\n\nHuman: d\n\nAssistant:"}]
    read = load(rows)
    assert [(r["prompt"][0]["content"], r["response"], r["reference"]) for r in read] == [
        ("a", "", "b"),
        ("c", "", None),
        ("d", "", None),
    ]
    assert "read 3 rows of prompt for train from" in capsys.readouterr().out


def test_keys_of_other_names(load):
    rows = [{"ask": q, "gold": a, "prompt": "of something else", "n": 5} for q, a, _ in SET]
    read = load(rows, data_keys="prompt=ask, response=gold")
    assert read[0] | {"id": ""} == {
        "n": 5,
        "prompt": [user(SET[0][0])],
        "response": SET[0][1],
        "text_prompt": True,
    } | dict.fromkeys(("rejected", "reference")) | {"id": ""}
    read = load(rows, data_keys="question=ask,answer=gold")
    assert [record["reference"] for record in read] == [a for _, a, _ in SET]
    with pytest.raises(UserError, match=r"train\.jsonl:1: data_keys: no key 'asks'; keys found: ask, gold, n, prompt"):
        load(rows, data_keys="prompt=asks")
    for wrong in ("prompt", "prompt=", "prompts=ask"):
        with pytest.raises(UserError, match="data_keys: expected KEY=KEY_OF_THE_ROWS"):
            load(rows, data_keys=wrong)


# ---------------------------------------------------------------- what is no row


BAD = {
    "tools": ({"messages": [user("a"), assistant("") | {"tool_calls": [{}]}]}, "messages: a turn calls tools"),
    "a tool's turn": ({"messages": [user("a"), {"role": "tool", "content": "b"}]}, "the role of a turn is 'tool'"),
    "a picture": ({"messages": [user([{"type": "image"}]), assistant("b")]}, "messages: the content of a turn is"),
    "no turns": ({"messages": []}, "messages: expected a list of turns"),
    "text for turns": ({"messages": [["a"]]}, "messages: expected turns"),
    "answers alone": ({"messages": [assistant("a")]}, "messages: no turn of a user"),
    "a prompt that answers": (
        {"prompt": [user("a"), assistant("b")], "completion": "c"},
        "prompt: it ends with a turn",
    ),
    "a prompt alone that answers": ({"prompt": [user("a"), assistant("b")]}, "prompt: it ends with a turn of the ass"),
    "its pair": (
        {"prompt": [user("a"), assistant("b")], "chosen": "c", "rejected": "d"},
        "prompt: it ends with a turn of the assistant",
    ),
    "completion of the user": ({"prompt": "a", "completion": [user("b")]}, "completion: its last turn is not the"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "chosen: an answer alone needs a prompt"),
    "a number": ({"question": "a", "answer": 7}, "answer: expected text, got '7'"),
    "input": ({"instruction": "a", "input": ["b"], "output": "c"}, "input: expected text, got \"['b']\""),
    "null output": ({"instruction": "a", "output": None}, "output: expected text, got 'None'"),
    "turns as JSON": ({"messages": json.dumps([user("a")])}, "messages: expected a list of turns, got '[{"),
    "unknown": ({"source": "a", "target": "b"}, "no known shape; keys found: source, target; known: prompt+response, "),
    "none": ({}, "no known shape; keys found: none; known: "),
    "unfinished": ({"prompt": "a", "response": "b", "unfinished": True}, "unfinished: expected a list of response and"),
    "an id": ({"question": "a", "answer": "b", "id": [1]}, "id: expected text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_line_and_key(tmp_path, name):
    row, words = BAD[name]
    path = write(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError) as error:
        records.read([path])
    assert str(error.value).startswith(f"{path}:1: ") and words in str(error.value), error.value


def test_mixed_shapes_name_the_first_odd_line(load, tmp_path):
    rows = [{"question": "a", "answer": "b"}] * 2 + [{"messages": [user("a"), assistant("b")]}]
    why = r"the rows before have question\+answer; keys found: messages; known: "
    with pytest.raises(UserError, match=rf"train\.jsonl:3: {why}"):
        load(rows)


def test_ids_that_are_empty_are_none(load):
    rows = [{"id": name, "prompt": "a", "response": "b"} for name in (None, "", None)]
    ids = [record["id"] for record in load(rows)]
    assert ids[1:] == [f"{ids[0]}-2", f"{ids[0]}-3"] and len(ids[0]) == 16


def test_generated_records_of_an_empty_id_get_a_number():
    row = {"id": "", "prompt": "a", "response": "x", "reference": "x"}
    first, second = records.generated([dict(row), dict(row)], "mine.py", "train")
    assert first["id"] and second["id"].startswith(first["id"]) and first["id"] != second["id"]


def test_equal_rows_and_ids_of_others_get_a_number(load):
    rows = [{"question": "a", "answer": "b"}] * 3 + [{"question": "a", "answer": "c", "id": 7}] * 2
    ids = [record["id"] for record in load(rows)]
    assert ids[1:] == [f"{ids[0]}-2", f"{ids[0]}-3", "7", "7-2"] and len(ids[0]) == 16


# ---------------------------------------------------------------- HH-RLHF's dirt


def test_many_equal_rows_are_numbered_in_linear_time(monkeypatch):
    class Places(dict):
        asked = 0

        def __contains__(self, name):
            Places.asked += 1
            return super().__contains__(name)

    places, repeats = Places(), Counter()
    ids = [records._unique("a", f"line {i}", places, repeats, True) for i in range(500)]
    assert ids == ["a", *(f"a-{i}" for i in range(2, 501))] and Places.asked < 2000
    assert records._unique("a-501", "x", places, repeats, True) == "a-501"
    assert records._unique("a", "y", places, repeats, True) == "a-502"


def test_hh_texts_as_the_downloader_reads_them(load, capsys):
    """Its pairs that are none are counted and left out; what is left is what data/download_datasets.py makes of it."""
    spec = importlib.util.spec_from_file_location("download_datasets", ROOT / "data" / "download_datasets.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = [hh_pair(f"q {i}?", f"No {i}.", f"Yes {i}.") for i in range(6)]
    more = "\n\nAssistant: Why?\n\nHuman: So."
    rows += [hh_pair("a" + more, "x", "y"), hh_pair("b", "x" + more, "y"), hh_pair("c", "x\n\nAssistant: z", "y")]
    rows += [hh_pair("d\n\nHuman: again", "x", "y"), {"chosen": "\n\nHuman: e", "rejected": "\n\nHuman: e"}]
    right = [script.TASKS["safety"].read(row, "train:1", i) for i, row in enumerate(rows)]
    kept = [(row.prompt, row.response, row.rejected) for row in right if not isinstance(row, str)]
    read = load(rows)
    assert [(r["prompt"], r["response"], r["rejected"]) for r in read] == kept and len(kept) == 7
    said = capsys.readouterr().out
    assert "2 left out: prompts differ" in said and "2 left out: roles do not alternate" in said


def test_prompts_of_two_dialogues_that_differ(load, capsys):
    rows = [PREFERRED["dialogues"](*row) for row in SET]
    rows[3]["rejected"] = [user("another"), assistant("b")]
    rows[5]["chosen"] = [user(SET[5][0]), assistant("a"), user("and?")]
    rows[7]["chosen"] = rows[7]["rejected"] = [user("a"), assistant("b"), assistant("c")]
    assert len(load(rows)) == 37
    said = capsys.readouterr().out
    assert "2 left out: prompts differ" in said and "1 left out: no answer after a turn of the user" in said


# ---------------------------------------------------------------- what is cut from train


def test_a_file_alone_is_cut_in_three_by_its_prompts(tmp_path, capsys):
    rows = [{"question": f"q {i // 2}" + " " * (i % 2), "answer": f"{i}"} for i in range(2000)]  # two rows a prompt
    path = write(tmp_path / "mine.jsonl", rows)
    parts = {split: data.load_split(path, split) for split in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == 2000 and all(60 < len(parts[split]) < 150 for split in ("val", "test"))
    asked = [{r["prompt"][0]["content"].strip() for r in part} for part in parts.values()]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]
    said = capsys.readouterr().out
    assert f"read {len(parts['val'])} rows of question + answer for val from {path}; of 2,000 in train" in said
    # the order of the rows does not decide, nor what else stands in the file
    write(path, [*rows[::-1], {"question": "new", "answer": "new"}])
    again = data.load_split(path, "val")
    assert {r["id"] for r in parts["val"]} <= {r["id"] for r in again} and len(again) <= len(parts["val"]) + 1
    # a folder of train alone is cut alike; with a test file just val is
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", rows)
    assert data.load_split(folder, "test") == parts["test"]
    write(folder / "test.jsonl", rows[:4])
    assert data.load_split(folder, "val") == parts["val"] and len(data.load_split(folder, "test")) == 4
    assert len(data.load_split(folder, "train")) == 2000 - len(parts["val"])


@pytest.mark.parametrize("count", [3, 4, 10])
def test_few_rows_give_one_at_least_to_each(tmp_path, count):
    path = write(tmp_path / "mine.jsonl", [{"question": f"{i}", "answer": "a"} for i in range(count)])
    sizes = [len(data.load_split(path, split)) for split in ("train", "val", "test")]
    assert sum(sizes) == count and min(sizes) >= 1


def test_a_folder_without_a_split_s_name_says_what_it_has(tmp_path):
    for name in ("part-1.jsonl", "part-2.jsonl", "notes.txt"):
        write(tmp_path / name, [])
    with pytest.raises(
        UserError, match=r"/train\.jsonl: no such file; .* \(the folder has part-1\.jsonl, part-2\.jsonl\)$"
    ):
        data.load_split(tmp_path, "train")


def test_two_rows_are_too_few(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"question": f"{i}", "answer": "a"} for i in range(2)])
    with pytest.raises(UserError, match=r"mine\.jsonl: 2 prompts are too few to cut val and test from"):
        data.load_split(path, "train")


def test_a_run_reads_its_files_once(tmp_path, monkeypatch, capsys):
    """train and val of a run are what each alone is, whether val is cut from train or a file of its own."""
    opened = []
    monkeypatch.setattr(sources, "rows", lambda path, real=sources.rows: opened.append(path.name) or real(path))
    rows = [{"question": f"{i}", "answer": "a"} for i in range(100)]
    write(tmp_path / "train.jsonl", rows)
    for files in (["train.jsonl"], ["train.jsonl", "val.jsonl"]):
        alone = {split: data.load_split(tmp_path, split) for split in ("train", "val")}
        said = capsys.readouterr().out
        opened.clear()
        assert data.load_train_and_val(config.load_config(None, {"dataset_path": str(tmp_path)})) == alone
        assert opened == files and capsys.readouterr().out == said
        write(tmp_path / "val.jsonl", [{"question": "other", "answer": "b"}])
