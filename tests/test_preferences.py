"""Pairs made from samples: which are picked, what the record keeps, what the cache is keyed on."""

import contextlib
import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from common import chat, config, data, lora, preferences, reward_model, rewards, tasks
from common.log import UserError

SAMPLING = {"group_size": 3, "max_new_tokens": 12, "temperature": 1.0, "seed": 0}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_ALIGNMENT_CACHE", str(tmp_path))
    return tmp_path / "pairs"


def made_by(tiny_model, records, score, start, explained=False):
    """preferences.from_policy for a run whose policy is `start`."""
    flags = {f"rl.{name}": value for name, value in SAMPLING.items() if name != "seed"}
    cfg = config.load_config(None, flags | {"seed": SAMPLING["seed"], "task": "conala"})
    run = SimpleNamespace(cfg=cfg, start_key=[start], autocast=contextlib.nullcontext(), explained=explained)
    models = SimpleNamespace(frozen=tiny_model[0], tokenizer=tiny_model[1])
    return preferences.from_policy(run, models, records, score)


def by_length(records, answers):
    """A reward that a test can predict: the number of tokens."""
    return torch.tensor([float(len(ids)) for ids in answers]), [{"tokens": len(ids)} for ids in answers]


def test_samples_are_those_of_their_own_numbers(tiny_model):
    net, tokenizer = tiny_model
    records = tasks.records("conala", "val", 5)
    together = preferences.sample(net, tokenizer, records, SAMPLING)
    assert [len(samples) for samples in together] == [3] * 5 and len({str(ids) for ids in together[0]}) > 1
    assert all(0 < len(ids) <= 12 for samples in together for ids in samples)
    assert preferences.sample(net, tokenizer, records[:2], SAMPLING) == together[:2]  # company changes nothing
    assert preferences.sample(net, tokenizer, records, SAMPLING | {"seed": 1}) != together
    with pytest.raises(UserError, match=r"rl\.group_size"):
        preferences.sample(net, tokenizer, records, SAMPLING | {"group_size": 1})


def test_two_ranks_share_the_samples_of_one(tiny_model, monkeypatch):
    """Each rank's share as it leaves it; the second one finds both, as JSON, in the order of ranks."""
    records, shares = tasks.records("conala", "val", 5), []

    def gather(rows):
        shares.append(json.loads(json.dumps(rows)))
        return [row for share in shares for row in share]

    alone = preferences.sample(*tiny_model, records, SAMPLING)
    monkeypatch.setattr(preferences.dist, "world_size", lambda: 2)
    monkeypatch.setattr(preferences.dist, "barrier", lambda: None)
    monkeypatch.setattr(preferences.dist, "gather_rows", gather)
    monkeypatch.setattr(preferences.dist, "rank", lambda: 0)
    with pytest.raises(KeyError):  # the other's share is not there yet
        preferences.sample(*tiny_model, records, SAMPLING)
    monkeypatch.setattr(preferences.dist, "rank", lambda: 1)
    together = preferences.sample(*tiny_model, records, SAMPLING)
    assert [len(rows) for rows in shares] == [3, 2] and together == alone


def test_what_cannot_be_sampled_is_one_line(tiny_model, monkeypatch):
    net, tokenizer = tiny_model
    records = tasks.records("conala", "val", 2)
    odd = records[0] | {"id": "odd", "prompt": [{"role": "user", "content": "a<think>b"}]}
    marked = copy.deepcopy(tokenizer)
    marked.add_tokens(["<think>"])
    with pytest.raises(UserError, match=r"odd: .*<think>"):
        preferences.sample(net, marked, [records[1], odd], SAMPLING)

    def diverged(*arguments):
        raise FloatingPointError("logits are not finite")

    monkeypatch.setattr(preferences.rollouts, "sample", diverged)
    with pytest.raises(UserError, match=r"^no pairs can be made: logits"):
        preferences.sample(net, tokenizer, records, SAMPLING)


def test_best_against_worst_with_what_decided(tiny_model, cache, capsys):
    net, tokenizer = tiny_model
    records = {"train": tasks.records("conala", "train", 6), "val": tasks.records("conala", "val", 3)}
    answers = preferences.sample(net, tokenizer, records["train"], SAMPLING)
    made = made_by(tiny_model, records, by_length, "key")
    sizes = [sorted(map(len, samples)) for samples in answers]
    assert len(made["train"]) == sum(s[0] < s[-1] for s in sizes)
    rows = {record["id"]: record for record in made["train"]}
    for record, samples, size in zip(records["train"], answers, sizes):
        if size[0] < size[-1]:
            row, texts = rows[record["id"]], {chat.decode(tokenizer, ids) for ids in samples}
            assert {row["response"], row["rejected"]} <= texts and row["prompt"] == record["prompt"]
            assert row["scores"]["response"] == {"total": size[-1], "tokens": size[-1]}
            assert row["scores"]["rejected"] == {"total": size[0], "tokens": size[0]}
            longest = max(samples, key=len)
            assert ("response" in row["unfinished"]) == (longest[-1] not in chat.STOP_TOKENS)
    said = capsys.readouterr().out
    assert "answers cut off" in said and "best: total" in said and "tokens" in said

    def never(*_):
        raise AssertionError("the cache holds them")

    assert made_by(tiny_model, records, never, "key") == made  # and the files are records
    (folder,) = (path for path in cache.iterdir() if path.is_dir())  # beside its lock
    assert data.load_split(folder, "train") == made["train"] and sorted(p.name for p in folder.iterdir()) == [
        "train.jsonl",
        "val.jsonl",
    ]
    with pytest.raises(AssertionError):
        made_by(tiny_model, records, never, "another key")


def test_a_judge_of_moods_is_asked_once_and_says_what_decided(tiny_model, cache):
    """What it said when the pair was made, not what it says when it is asked again."""
    asked = []

    def moody(records, answers):
        values = [float(len(asked) + i) for i in range(len(answers))]
        asked.extend(answers)
        return torch.tensor(values), [{"mood": value} for value in values]

    records = {"train": tasks.records("conala", "train", 4), "val": tasks.records("conala", "val", 2)}
    made = made_by(tiny_model, records, moody, "moods")
    assert len(asked) == 3 * (4 + 2)
    for row in itertools.chain(*made.values()):
        assert all(side["mood"] == side["total"] for side in row["scores"].values())


def test_prompts_that_leave_no_room_are_not_sampled(tiny_model, cache, capsys):
    records = {"train": tasks.records("conala", "train", 6), "val": tasks.records("conala", "val", 3)}
    long = records["train"][0] | {"id": "long", "prompt": [{"role": "user", "content": "a word " * 2000}]}
    alone = records["train"][0] | {"id": "alone", "prompt": [{"role": "assistant", "content": "hello"}]}
    records["train"] += [long, alone]
    made = made_by(tiny_model, records, by_length, "long")
    assert not {"long", "alone"} & {row["id"] for row in made["train"]}
    assert "train: 6 kept, " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^val: no prompt has at most 500 tokens: raise training\.max_seq_length"):
        preferences.answerable({"val": [long]}, tiny_model[1], 500)


def test_a_cut_answer_has_no_stop_token(tokenizer):
    record = {"id": "a", "prompt": [{"role": "user", "content": "q"}], "response": "one", "rejected": "two"}
    for unfinished in ([], ["response"], ["response", "rejected"]):
        (pair,), _ = data.encode_pairs([record | {"unfinished": unfinished}], tokenizer, 64)
        for side, key in (("chosen", "response"), ("rejected", "rejected")):
            assert (pair[side]["ids"][-1] == chat.END_OF_TURN) == (key not in unfinished)
            assert pair[side]["mask"][-1] == 1
        (row,), _ = data.encode_records([record | {"unfinished": unfinished}], tokenizer, 64)
        assert row["ids"] == pair["chosen"]["ids"] and row["mask"][-1] == 1


def test_equal_scores_and_bad_scores(tiny_model, cache):
    records = {"train": tasks.records("conala", "train", 2)}

    def flat(rows, answers):
        return torch.ones(len(rows)), [{} for _ in rows]

    def nan(rows, answers):
        return torch.full((len(rows),), float("nan")), [{} for _ in rows]

    for explained in (False, True):
        with pytest.raises(UserError, match="score the same"):
            made_by(tiny_model, records, flat, "flat", explained)
    with pytest.raises(UserError, match=f"{records['train'][0]['id']} is not finite"):
        made_by(tiny_model, records, nan, "nan")
    assert not cache.exists()  # nothing half made is kept


# ---------------------------------------------------------------- the reward that ranks them


def settings(**changes):
    weights = SimpleNamespace(
        toxicity=1.0, length=0.2, repetition=0.5, refusal=0.5, overlap=1.0, facts=0.5, bleu=1.0, exact=0.5, parse=0.5
    )
    plain = {
        "type": "heuristic",
        "alpha": 2.0,
        "beta": 0.5,
        "checkpoint": None,
        "function": None,
        "clip_rewards": None,
        "normalize_rewards": True,
        "heuristic": weights,
    }
    return SimpleNamespace(**plain | changes)


def test_reward_types_and_components(tiny_model, tmp_path, tiny_folder):
    from common.runtime import base

    net, tokenizer = tiny_model
    torch.manual_seed(0)
    lora.inject(net, "reward", 4, 8)
    head = reward_model.new_head(net.config.hidden_size, torch.device("cpu"))
    fingerprint = base.fingerprint(tiny_folder)
    about = {"base_checkpoint": str(tiny_folder), "base": fingerprint, "task": "safety", "mean": 0.5, "std": 2.0}
    (tmp_path / "rm").mkdir()
    reward_model.save(net, tokenizer, tmp_path / "rm", "reward", head, about)
    records = tasks.records("safety", "val", 4)
    answers = [[*chat.encode_text(tokenizer, record["response"]), chat.END_OF_TURN] for record in records]

    def decode(ids):
        return chat.decode(tokenizer, ids)

    prompts = [chat.encode_prompt(tokenizer, record["prompt"]) for record in records]
    raw = reward_model.score_completions(net, head, prompts, answers, 4096)
    plain, _ = rewards.scorer("safety", settings(), decode)(records, answers)
    by_hand = [
        rewards.heuristic_reward("safety", r["prompt"], r["response"], **vars(settings().heuristic)) for r in records
    ]
    assert plain.tolist() == pytest.approx([value for value, _ in by_hand])
    for kind, normal, right in (
        ("trainable", True, (raw - 0.5) / 2),
        ("trainable", False, raw),
        ("hybrid", True, 2 * plain + 0.5 * (raw - 0.5) / 2),
    ):
        chosen = settings(type=kind, checkpoint=str(tmp_path / "rm"), normalize_rewards=normal)
        assert rewards.needs_model(chosen)
        trained = reward_model.scorer(net, tokenizer, chosen, fingerprint, 100)
        found, parts = rewards.scorer("safety", chosen, decode, trained)(records, answers)
        assert (found - right).abs().max() < 1e-4, kind
        assert [part["trained"] for part in parts] == pytest.approx((raw if not normal else (raw - 0.5) / 2).tolist())
        assert ("toxicity" in parts[0]) == (kind == "hybrid")
    clipped, _ = rewards.scorer("safety", settings(clip_rewards=0.3), decode)(records, answers)
    assert clipped.max().item() == pytest.approx(0.3)
    with pytest.raises(UserError, match=r"reward\.checkpoint: reward\.type hybrid needs"):
        rewards.needs_model(settings(type="hybrid"))
    assert not rewards.needs_model(settings(type="hybrid", function="f.py:g"))


def test_a_function_s_body_and_a_missing_reference(tmp_path, tokenizer):
    file = tmp_path / "mine.py"
    file.write_text("def f(prompt, completion, reference):\n    return len(completion)\n")
    chosen = settings(function=f"{file}:f")
    first = rewards.fingerprint(chosen, "safety")
    assert rewards.scorer("conala", chosen, str)([{"id": "a", "prompt": [], "reference": None}], ["four"])[
        0
    ].tolist() == [4.0]
    file.write_text("def f(prompt, completion, reference):\n    return -len(completion)\n")
    assert rewards.fingerprint(chosen, "safety") != first  # another key of the cache
    with pytest.raises(UserError, match="a: the heuristic reward of conala needs a reference"):
        rewards.scorer("conala", settings(), str)([{"id": "a", "prompt": [], "reference": None}], ["x"])
    assert json.dumps(first)


def test_pairs_train_on_the_very_ids_that_were_sampled(tiny_model):
    net, tokenizer = tiny_model
    records = tasks.records("conala", "train", 40)
    answers = preferences.sample(net, tokenizer, records, SAMPLING | {"temperature": 2.0})
    sides = preferences.best_and_worst(records, answers, tokenizer, by_length)
    made = [preferences.pair_record(record, *pair) for record, pair in zip(records, sides, strict=True)]
    pairs, counts = data.encode_pairs(made, tokenizer, 256)
    assert counts["kept"] == len(pairs) > 10
    samples = {record["id"]: answers[i] for i, record in enumerate(records)}
    other_ids = 0
    for pair in pairs:
        for side in ("chosen", "rejected"):
            answer = [token for token, m in zip(pair[side]["ids"], pair[side]["mask"], strict=True) if m]
            assert answer in samples[pair["id"]]
            again = chat.encode_text(tokenizer, chat.decode(tokenizer, answer))
            other_ids += again != [token for token in answer if token != chat.END_OF_TURN]
    assert other_ids > 0  # else the text would have done


def test_answer_ids_of_another_tokenizer_are_refused(tokenizer):
    record = tasks.records("safety", "train", 1)[0] | {"answer_ids": {"response": [300, 301]}}
    with pytest.raises(UserError, match="answer_ids do not decode to the answer"):
        data.encode_pairs([record], tokenizer, 256)
