"""Records: every bad row is named; examples: what is dropped is counted; steps: every example once, budgets kept."""

import importlib.util
import json
import random
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from common import chat, config, data, dist, model, prompts, tasks
from common.log import UserError
from common.runtime import base

ROOT = Path(__file__).resolve().parents[1]
IMAGE = chat.IMAGE_TOKEN


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def record(index=0, prompt="question", response="answer", **changes):
    turns = [user(prompt)] if isinstance(prompt, str) else prompt
    return {"id": f"r{index}", "prompt": turns, "response": response, "rejected": None, "reference": None} | changes


# --------------------------------------------------------------------------------------------------------- load_split


def write(folder, *lines):
    """train.jsonl with a good record in front of the lines given, as text, bytes or records; and a val.jsonl."""
    (folder / "val.jsonl").write_text(json.dumps(record("val")) + "\n")
    rows = [line if isinstance(line, str | bytes) else json.dumps(line) for line in (record("first"), *lines)]
    (folder / "train.jsonl").write_bytes(b"\n".join(r.encode() if isinstance(r, str) else r for r in rows))
    return folder


def without(key):
    return {k: v for k, v in record().items() if k != key}


def test_good_rows_come_back_as_written(tmp_path):
    rows = [record(1, "é漢🧑‍🚀\u0000", "  indented\n", rejected="no", extra={"kept": 1}), record(2)]
    short = {k: rows[1][k] for k in ("id", "prompt", "response")}  # rejected and reference may be left out
    assert data.load_split(write(tmp_path, rows[0], short), "train") == [record("first"), *rows]


# ----------------------------------------------------------------------------------------------------- encode_records


def test_counts(tokenizer):
    long = "word " * 100
    rows = [
        record(0),
        record(1, response=" \n"),
        record(2, prompt=[assistant("only")]),
        record(3, prompt=long),
        record(4, response=long),
        record(5, prompt=[{"role": "system", "content": "s"}, user(""), user("a"), user("b")]),
        record(6, prompt=[assistant("hello"), user("a")]),
    ]
    examples, report = data.encode_records(rows, tokenizer, max_length=48)
    assert [e["id"] for e in examples] == ["r0", "r4", "r5", "r6"]
    assert report == {
        "records": 7,
        "empty_response": 1,
        "no_user_turn": 1,
        "no_target": 1,
        "truncated": 2,
        "empty": 1,
        "system_folded": 1,
        "merged": 1,
        "leading_assistant": 3,
        "kept": 4,
    }


def naive_examples(rows, tokenizer, limit, last_turn_only):
    """One record at a time and one text at a time, as before there were batches."""
    for row in rows:
        turns, _ = chat.normalise([*row["prompt"], assistant(row["response"])])
        ids, mask = [chat.BOS], [0]
        for i, turn in enumerate(turns):
            name, text = ("user", turn["content"].strip()) if i % 2 == 0 else ("model", turn["content"])
            head, body, newline = (
                tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                for part in (f"{name}\n", text, "\n")
            )
            trained = int(name == "model" and (not last_turn_only or i == len(turns) - 1))
            ids += [105, *head, *body, 106, *newline]
            mask += [0] * (1 + len(head)) + [trained] * (len(body) + 1) + [0] * len(newline)
        end = min(limit, max(i for i, m in enumerate(mask) if m) + 1)
        if any(mask[:end]):
            yield {"id": row["id"], "ids": ids[:end], "mask": mask[:end]}


@pytest.mark.parametrize("last_turn_only", [False, True])
def test_batches_encode_what_single_texts_did(tokenizer, monkeypatch, last_turn_only):
    monkeypatch.setattr(data, "CHUNK", 7)
    words = ["How do I", " fix", "my car?", "\n\n", "    ", "é漢🧑‍🚀", "<end_of_turn>", "x = 1", "12.5"]
    rng, rows = random.Random(4), []
    for i in range(60):
        turns = [(user, assistant)[k % 2]("w" + "".join(rng.choices(words, k=6))) for k in range(1 + 2 * (i % 3))]
        rows.append(record(i, turns, "".join(rng.choices(words, k=9)) + "."))
    examples, report = data.encode_records(rows, tokenizer, 120, last_turn_only)
    assert examples == [*naive_examples(rows, tokenizer, 120, last_turn_only)] and 0 < report["truncated"] < 60


def test_truncation_keeps_the_start_and_the_length(tokenizer):
    rows = [record(i, "question " * (1 + i), "answer " * (1 + i)) for i in range(12)]
    whole, _ = data.encode_records(rows, tokenizer, 10_000)
    for limit in (20, 33, 60):
        examples, report = data.encode_records(rows, tokenizer, limit)
        found = {e["id"]: e for e in examples}
        for full in whole:
            fits = sum(full["mask"][:limit]) > 0
            assert (full["id"] in found) == fits
            if fits:
                one = found[full["id"]]
                assert one["ids"] == full["ids"][:limit] and one["mask"] == full["mask"][:limit]
        assert report["truncated"] == sum(len(e["ids"]) > limit for e in whole)
        assert report["no_target"] == len(rows) - len(examples)
    fitting = len(whole[0]["ids"])  # exactly fitting is not truncated, and ends with the trained stop token
    examples, report = data.encode_records(rows[:1], tokenizer, fitting)
    assert report["truncated"] == 0 and examples[0]["ids"][-1] == chat.END_OF_TURN and examples[0]["mask"][-1] == 1


def test_last_turn_only_reaches_the_mask(tokenizer):
    rows = [record(0, [user("a"), assistant("one"), user("b")], "two")]
    for last, trained in ((False, "one<end_of_turn>two<end_of_turn>"), (True, "two<end_of_turn>")):
        (one,), _ = data.encode_records(rows, tokenizer, 100, last_turn_only=last)
        assert tokenizer.decode([i for i, m in zip(one["ids"], one["mask"]) if m]) == trained


# ------------------------------------------------------------------------------------ packs, batches, micro-batches


def lengths_of(count, seed=0):
    rng = random.Random(seed)
    return [min(2000, 5 + int(rng.expovariate(1 / 120))) for _ in range(count)]


def test_pack_by_hand():
    # 7 opens A, 6 opens B, 4 fills B (A has room for 3), 3 fills A, 2 and 1 share C
    assert data.pack([2, 7, 4, 1, 6, 3], 10) == [[1, 5], [4, 2], [0, 3]]
    # best fit, not first fit: 3 goes where just 3 are left, though there is room for 40 before it
    assert data.pack([60, 55, 42, 3], 100) == [[0], [1, 2, 3]]
    assert data.pack([99, 1], 10) == [[0], [1]] and data.pack([], 10) == []


def quadratic_pack(lengths, capacity):
    """Best-fit decreasing by the book: of the packs with room the fullest, of equals the first."""
    packs, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(space, number) for number, space in enumerate(room) if space >= lengths[i]]
        if fitting:
            _, number = min(fitting)
            packs[number].append(i)
            room[number] -= lengths[i]
        else:
            packs.append([i])
            room.append(capacity - lengths[i])
    return packs


@pytest.mark.parametrize("capacity", [1, 8, 64, 512])
def test_packs_are_those_of_the_book_to_the_index(capacity):
    rng = random.Random(capacity)
    for count in (0, 1, 2, 30, 300):
        for longest in (2, 12, capacity, 2 * capacity):
            lengths = [rng.randint(1, longest) for _ in range(count)]
            assert data.pack(lengths, capacity) == quadratic_pack(lengths, capacity)


def test_packing_is_near_linear():
    times = []
    for count in (20_000, 80_000):
        lengths = lengths_of(count)
        start = time.process_time()
        data.pack(lengths, 2048)
        times.append(time.process_time() - start)
    assert times[1] < 8 * times[0] and times[1] < 5  # the square would take 16 times as long, and a minute


@pytest.mark.parametrize("capacity", [200, 512, 2048])
def test_pack_holds_all_and_keeps_the_capacity(capacity):
    lengths = lengths_of(400)
    packs = data.pack(lengths, capacity)
    assert sorted(i for pack in packs for i in pack) == list(range(400))
    assert all(sum(lengths[i] for i in pack) <= capacity or len(pack) == 1 for pack in packs)
    fitting = [n for n in lengths if n <= capacity]
    bound = len(lengths) - len(fitting) - (-sum(fitting) // capacity)
    assert len(packs) <= 11 / 9 * bound + 1  # the theorem about best-fit decreasing


def test_every_index_once_in_an_epoch_and_epochs_differ():
    lengths = lengths_of(1003)
    epochs = [data.epoch_batches(lengths, 8, seed=3, epoch=e) for e in range(3)]
    for batches in epochs:
        assert Counter(i for batch in batches for i in batch) == Counter(range(1003))
        assert all(0 < len(batch) <= 8 for batch in batches) and len(batches) == 126
    assert epochs[0] != epochs[1] != epochs[2]
    random.seed(1)  # nothing outside decides
    assert [data.epoch_batches(lengths, 8, seed=3, epoch=e) for e in range(3)] == epochs
    assert data.epoch_batches(lengths, 8, seed=4, epoch=1) != epochs[1]


def test_the_first_batch_of_a_run_is_the_largest():
    lengths = lengths_of(1000)
    for seed in range(5):
        sizes = [sum(lengths[i] for i in batch) for batch in data.epoch_batches(lengths, 8, seed, 0)]
        assert sizes[0] == max(sizes)
    later = [[sum(lengths[i] for i in b) for b in data.epoch_batches(lengths, 8, s, 1)] for s in range(5)]
    assert any(sizes[0] != max(sizes) for sizes in later)


def test_batches_of_any_step_are_those_of_the_epochs():
    lengths = lengths_of(103)
    whole = [batch for epoch in range(3) for batch in data.epoch_batches(lengths, 8, 3, epoch)]
    batches = data.EpochBatches(lengths, 8, 3)
    assert batches.per_epoch == 13 and batches.tokens_per_step == sum(lengths) / 13
    assert [batches[step] for step in range(39)] == whole
    for step in (38, 0, 13, 12, 12, 26):  # a resumed run begins anywhere
        assert batches[step] == data.EpochBatches(lengths, 8, 3)[step] == whole[step]
    assert data.EpochBatches(lengths[:3], 8, 3).per_epoch == 1  # fewer rows than a batch
    assert [sorted(data.EpochBatches(lengths[:3], 8, 3)[step]) for step in (0, 1)] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_shares_of_the_ranks_are_the_batch(monkeypatch, world):
    lengths, rows = lengths_of(60), list(range(3, 60, 4))
    monkeypatch.setattr(dist, "world_size", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        shares.append(data.shard(rows, lengths))
        assert data.shard(rows[::-1], lengths) == shares[-1]  # the order of the rows does not decide
    assert sorted(i for share in shares for i in share) == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    sums = [sum(lengths[i] for i in share) for share in shares]
    assert max(sums) - min(sums) <= max(lengths[i] for i in rows)  # ranks work equally long


def test_batches_are_length_grouped_but_not_in_order():
    lengths = lengths_of(1600)

    def waste(batches):
        padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
        return 1 - sum(lengths) / padded

    grouped = data.epoch_batches(lengths, 8, 0, 1)
    shuffled = random.Random(0).sample(range(1600), 1600)
    assert waste(grouped) < 0.1
    assert waste([shuffled[i : i + 8] for i in range(0, 1600, 8)]) > 0.4
    widest = [max(lengths[i] for i in batch) for batch in grouped]
    rising = sum(a < b for a, b in pairwise(widest)) / len(widest)
    assert 0.4 < rising < 0.6  # a curriculum from short to long would be near 1


def test_micro_batches_keep_the_budget():
    lengths = lengths_of(60)
    rows = random.Random(0).sample(range(60), 40)
    for budget in (100, 400, 3000):
        cuts = data.micro_batches(rows, lengths, budget)
        assert sorted(i for cut in cuts for i in cut) == sorted(rows)
        assert all(sum(lengths[i] for i in cut) <= budget or len(cut) == 1 for cut in cuts)
        order = [lengths[i] for cut in cuts for i in cut]
        assert order == sorted(order, reverse=True)
    assert data.micro_batches([0, 1, 2, 3], [5, 9, 3, 2], 8) == [[1], [0, 2], [3]]
    assert data.micro_batches([], lengths, 8) == []


def test_collate_by_hand():
    rows = [{"id": "a", "ids": [2, 11, 12, 13], "mask": [0, 0, 1, 1]}, {"id": "b", "ids": [2, 21], "mask": [0, 1]}]
    tokens, mask = data.collate(rows)
    assert tokens.tolist() == [[2, 11, 12, 13], [2, 21, 0, 0]] and tokens.dtype == torch.int64
    assert mask.tolist() == [[0, 1, 1], [1, 0, 0]] and mask.dtype == torch.float32
    assert tokens[:, 1:][mask.bool()].tolist() == [12, 13, 21]


# ------------------------------------------------------------------------------------------------------ official files


@pytest.mark.parametrize("task, split", [("clinical", "train"), ("safety", "test"), ("conala", "train")])
def test_official_records_encode(official, tokenizer, tmp_path, task, split):
    spec = importlib.util.spec_from_file_location("download_datasets", ROOT / "data" / "download_datasets.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--dataset", task, "--splits", split, "--source", str(official), "--output-dir", str(tmp_path)])
    records = data.load_split(tmp_path / task, split)
    examples, report = data.encode_records(records[:300], tokenizer, max_length=1024, last_turn_only=True)
    assert report["empty_response"] == report["no_user_turn"] == 0 and report["kept"] + report["no_target"] == 300
    responses = {r["id"]: r["response"] for r in records}
    for one in examples:
        assert len(one["ids"]) <= 1024 and one["ids"].count(chat.BOS) == 1
        text = chat.decode(tokenizer, [i for i, m in zip(one["ids"], one["mask"]) if m])
        if one["ids"][-1] == chat.END_OF_TURN:
            assert text == responses[one["id"]]
        else:
            assert responses[one["id"]].startswith(text.rstrip("\ufffd")) and len(one["ids"]) == 1024


# ---------------------------------------------------------------- preference pairs


def test_pairs_share_their_prompt_by_tokens(tokenizer):
    """Also where the answers begin with newlines or blanks, which string tokenisation would merge into the prompt."""
    texts = (("yes", "no"), ("\n\ncode", "code"), ("  in", "\tin"), ("\n", "x\n"), ("a", "<end_of_turn>"))
    rows = [record(i, response=first, rejected=second) for i, (first, second) in enumerate(texts)]
    pairs, report = data.encode_pairs(rows, tokenizer, 128)
    assert report["kept"] == 4 and report["empty_answer"] == 1
    for pair in pairs:
        n = pair["prompt_tokens"]
        prompt = chat.encode(tokenizer, [user("question")], add_generation_prompt=True)[0]
        for side, text in zip(("chosen", "rejected"), pair["texts"]):
            example = pair[side]
            assert example["ids"][:n] == prompt and example["ids"].count(chat.BOS) == 1
            assert example["mask"] == [0] * n + [1] * (len(example["ids"]) - n)
            assert example["ids"][-1] == chat.END_OF_TURN and tokenizer.decode(example["ids"][n:-1]) == text
        assert data.pair_tokens(pair) == n + sum(sum(pair[side]["mask"]) for side in ("chosen", "rejected"))


def test_pairs_that_teach_nothing_are_counted(tokenizer):
    long = "word " * 200
    texts = [
        ("good", "bad"),
        ("good", None),
        ("good", " \n"),
        (" ", "bad"),
        ("same", "same"),
        ("good", "bad"),
        ("good", "bad"),
        (long + "a", long + "b"),
        (long, "bad"),
    ]
    rows = [record(i, response=good, rejected=bad) for i, (good, bad) in enumerate(texts)]
    rows[5]["prompt"], rows[6]["prompt"] = [user(long)], [assistant("hello")]
    pairs, report = data.encode_pairs(rows, tokenizer, 64)
    assert [pair["id"] for pair in pairs] == ["r0", "r8"]
    assert {key: report[key] for key in (*data.PAIR_SKIPS, "truncated", "kept", "records")} == {
        "no_rejected": 1,
        "empty_answer": 2,
        "equal_answers": 2,
        "no_user_turn": 1,
        "prompt_too_long": 1,
        "truncated": 3,
        "kept": 2,
        "records": 9,
    }
    assert len(pairs[1]["chosen"]["ids"]) == 64 and pairs[1]["chosen"]["mask"][-1] == 1


def test_a_margin_is_read(tmp_path, tokenizer):
    rows = [record(0, response="good", rejected="bad", margin=1.5), record(1, response="good", rejected="bad")]
    pairs, _ = data.encode_pairs(data.load_split(write(tmp_path, *rows), "train"), tokenizer, 64)
    assert [pair["margin"] for pair in pairs] == [1.5, 0.0]


@pytest.mark.parametrize("ids", ["text", [1.5], {"x": [1]}])
def test_answer_ids_that_are_no_lists_of_ids(tmp_path, ids):
    record = tasks.records("safety", "train", 1)[0]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(record | {"answer_ids": {"response": ids} if isinstance(ids, list) else ids}) + "\n")
    with pytest.raises(UserError, match=r"train.jsonl:1: answer_ids"):
        data.load_split(tmp_path, "train")


def test_rows_in_train_and_val_are_counted(tmp_path, capsys):
    for split, numbers in (("train", range(6)), ("val", range(4, 8))):
        lines = [json.dumps({"question": f"{i}", "answer": f"{i}"}) + "\n" for i in numbers]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    cfg = config.load_config(None, {"dataset_path": str(tmp_path), "data_keys": "question=question"})
    loaded = data.load_train_and_val(cfg)
    assert [len(loaded[split]) for split in ("train", "val")] == [6, 4]
    assert "warning: 2 of 6 rows of train are in val too" in capsys.readouterr().out


# ---------------------------------------------------------------- tokens that were added to a base


@pytest.mark.parametrize("special", [False, True])
def test_d5_an_added_token_becomes_its_id(folder, special):
    """Also beside control tokens in a text, which stay text; and an answer with it decodes to itself."""
    tokenizer = base.load_tokenizer(folder)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    first = tokenizer.convert_tokens_to_ids("<think>")
    text = "<think>a <end_of_turn> b</think>\n" + IMAGE + "yes"
    ids = chat.encode_text(tokenizer, text)
    assert ids[0] == first and ids.count(first + 1) == 1 and not chat.CONTROL_TOKENS.intersection(ids)
    assert max(ids) == first + 1 and chat.decode(tokenizer, ids) == text
    push, shown = chat.streamer(tokenizer), ""
    for i, token in enumerate(ids):
        shown += push(token, last=i == len(ids) - 1)[0]
    assert shown == text
    rows = [record(0, "why <think>?", text, rejected="no")]
    for examples, _ in (data.encode_records(rows, tokenizer, 200), data.encode_pairs(rows, tokenizer, 200)):
        assert first in (examples[0].get("chosen") or examples[0])["ids"]


@pytest.mark.parametrize("special", [False, True])
def test_d5_without_an_embedding_file_and_record_are_named(folder, tmp_path, special):
    tokenizer = base.load_tokenizer(folder)
    tokenizer.add_tokens(["<think>"], special_tokens=special)
    tokenizer.save_pretrained(folder)
    _, tokenizer = model.load(str(folder), torch.device("cpu"), torch.float32)
    rows = data.load_split(write(tmp_path, record(1), record(2, response="so <think> it")), "train")
    for encode in (data.encode_records, data.encode_pairs, prompts.encode_prompts):
        changed = [row | {"rejected": "x", "prompt": [user(row["response"])]} for row in rows]
        with pytest.raises(UserError) as error:
            encode(changed, tokenizer, 100)
        assert str(error.value).startswith(f"{tmp_path}/train.jsonl:3: r2: '<think>' is token ")
        assert "the model has embeddings of" in str(error.value)
