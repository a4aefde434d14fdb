"""What one system is worth, on the tiny base, against plain transformers and under other layouts."""

import math

import numpy as np
import pytest
import torch

from common import chat, lora, model, tasks
from common.evaluation import measure, metrics
from tests import inputs

SAMPLING = {"seed": 3, "max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    net, tokenizer = model.load(tiny_folder, torch.device("cpu"), torch.float32)
    inputs.random_adapter(net, "policy", 0)
    return net, tokenizer


@pytest.fixture(scope="module")
def items(tiny):
    found, counts = measure.items(tasks.records("safety", "test", 40), tiny[1], 100, 10, 0)
    assert counts["kept"] == len(found) == 10 and sum(counts.values()) - 40 == 40
    return found


def test_items_are_drawn_by_the_seed_and_never_too_long(tiny):
    records = tasks.records("safety", "test", 40)
    drawn = [[item.record["id"] for item in measure.items(records, tiny[1], 60, 5, seed)[0]] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 5
    assert all(len(item.ids) <= 30 for item in measure.items(records, tiny[1], 30, None, 0)[0])
    with pytest.raises(measure.UserError, match="at most 5 tokens"):
        measure.items(records, tiny[1], 5, None, 0)


def test_an_answer_is_its_items_own(tiny, items):
    """Neither the items beside it nor the number that is asked changes an answer; several are not one repeated."""
    net, _ = tiny
    whole, speed = measure.generate(net, items, SAMPLING)
    few, _ = measure.generate(net, items[:3], SAMPLING)
    assert whole[:3] == few and speed > 0 and all(len(group) == 1 for group in whole)
    several, _ = measure.generate(net, items, SAMPLING, group=3)
    assert all(len(group) == 3 for group in several) and sum(len({*map(tuple, group)}) > 1 for group in several) > 5
    greedy, _ = measure.generate(net, items, SAMPLING | {"temperature": 0.0})
    assert greedy == measure.generate(net, items, SAMPLING | {"temperature": 0.0, "seed": 9})[0]


def test_lines_hold_lengths_stops_and_the_scorers_values(tiny, items):
    _, tokenizer = tiny
    answers = [[*chat.encode_text(tokenizer, "I can't help with that."), chat.END_OF_TURN]] * 9 + [[]]
    scorers = {"judge": lambda records, answers: torch.tensor([float(len(ids)) for ids in answers])}
    lines = measure.merge(measure.text_lines("safety", items, answers, tokenizer, scorers), {})
    assert [line["stopped"] for line in lines] == [True] * 9 + [False]
    assert lines[0]["scores"]["judge"] == lines[0]["tokens"] == lines[0]["scores"]["length"] == len(answers[0])
    assert lines[9]["scores"]["empty"] == 1 and lines[9]["answer"] == "" and "repetition" not in lines[9]["scores"]
    assert {line["scores"].get("refusal_harmful", line["scores"].get("refusal_benign")) for line in lines[:9]} == {1.0}
    assert list(lines[0]["stats"]) == [name for name in metrics.table("safety") if name in lines[0]["stats"]]


def test_loss_and_preferences_are_those_of_plain_transformers(tiny, items):
    net, tokenizer = tiny
    with lora.using(net, "policy"):
        stats = measure.model_stats(net, {}, items, [[5, 6]] * len(items), tokenizer, 512)
        assert {name: values.shape for name, values in stats.items()} == dict.fromkeys(
            ("loss_per_byte", "preference", "preference_per_token"), (10, 2)
        )
        for i, item in enumerate(items):
            sums = []
            for side in ("response", "rejected"):
                turns, _ = chat.normalise([*item.record["prompt"], {"role": "assistant", "content": item.record[side]}])
                ids, mask = chat.encode(tokenizer, turns, last_turn_only=True)
                logits = net(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
                each = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] * torch.tensor(mask[1:])
                sums.append((each.sum().item(), sum(mask)))
            (good, n), (bad, m) = sums
            assert stats["preference"][i, 0] == (good > bad) and stats["preference_per_token"][i, 0] == (
                good / n > bad / m
            )
            text = item.record["response"].encode()
            assert stats["loss_per_byte"][i] == pytest.approx([-good, len(text)], rel=1e-5)


def test_kl_is_zero_to_itself_and_exact_to_another(tiny, items):
    net, tokenizer = tiny
    with lora.using(net, "policy"):
        answers = [group[0] for group in measure.generate(net, items, SAMPLING)[0]]
        others = {"kl_base": (net, None), "kl_reference": (net, "policy")}
        stats = measure.model_stats(net, others, items, answers, tokenizer, 128)
    assert (stats["kl_reference"][:, 0] == 0).all()
    assert stats["kl_base"][:, 1].tolist() == [len(ids) for ids in answers]
    assert (stats["kl_base_sequence"][:, 0] == stats["kl_base"][:, 0]).all()
    for item, ids, (kl, _) in zip(items, answers, stats["kl_base"]):
        row, logits = torch.tensor([[*item.ids, *ids]]), {}
        for name in ("policy", None):
            with lora.using(net, name), torch.no_grad():
                logits[name] = net(row).logits[0, len(item.ids) - 1 : -1].double().log_softmax(-1)
        exact = (logits["policy"].exp() * (logits["policy"] - logits[None])).sum().item()
        assert exact > 0.01 and kl == pytest.approx(exact, rel=1e-3)


def test_records_without_pairs_have_a_loss_and_no_preference(tiny):
    net, tokenizer = tiny
    items, _ = measure.items(tasks.records("conala", "test", 6), tokenizer, 100, None, 0)
    stats = measure.model_stats(net, {}, items, [[5]] * len(items), tokenizer, 128)
    assert set(stats) == {"loss_per_byte"} and (stats["loss_per_byte"] > 0).all()


def test_merge_leaves_out_what_has_no_value():
    line = {"stats": {"length": [3.0, 1.0]}}
    [found] = measure.merge([line], {"refusal_benign": np.zeros((1, 2)), "bleu": np.zeros((1, 10))})
    assert found["scores"] == {"length": 3.0, "bleu": 0.0} and list(found["stats"]) == [
        "refusal_benign",
        "bleu",
        "length",
    ]
    assert measure.stack([[found]], "judge") is None and measure.stack([[found]] * 2, "bleu").shape == (2, 1, 10)
    assert math.isnan(metrics.value(measure.stack([[found]], "refusal_benign").sum((0, 1))))


def test_an_item_without_a_score_does_not_count(tiny, items):
    """NaN of a user's reward function or metric is no score; of a judge it stays to be seen."""
    _, tokenizer = tiny
    answers = [chat.encode_text(tokenizer, "Yes.")] * 10
    scores = torch.tensor([math.nan, *range(1, 10)])
    scorers = {name: lambda records, answers: scores for name in ("reward", "mine", "judge")}
    lines = measure.merge(measure.text_lines("safety", items, answers, tokenizer, scorers), {})
    assert "reward" not in lines[0]["scores"] and lines[1]["scores"]["reward"] == 1
    for name in ("reward", "mine"):
        stats = measure.stack([lines], name).sum((0, 1))
        assert stats.tolist() == [45, 9] and metrics.value(stats) == 5
    assert np.isnan(measure.stack([lines], "judge").sum((0, 1))[0])
