"""Drift in both directions against whole distributions by transformers; losses on other tasks against their own."""

import numpy as np
import pytest
import torch

from common import chat, config, lora, tasks
from common.evaluation import drift, measure
from common.log import UserError
from tests import inputs


@pytest.fixture
def policy(micro_model):
    net, tokenizer = micro_model
    inputs.random_adapter(net, "policy", 0)
    return net, tokenizer


def log_distributions(net, adapter, ids):
    with torch.no_grad(), lora.using(net, adapter):
        return net(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_the_kl_in_both_directions_is_exact(policy):
    net, tokenizer = policy
    items, _ = measure.items(tasks.records("clinical", "test", 6), tokenizer, 100, 5, 0)
    answers = [[7 + i, 9, 30 + i][: 1 + i % 3] for i in range(len(items))]
    with lora.using(net, "policy"):
        stats = drift.kl_both_ways(net, net, items, answers, tokenizer, 512)
    assert set(stats) == {"kl_forward", "kl_reverse", "kl_base_forward"}
    for i, item in enumerate(items):
        turns = [*item.record["prompt"], {"role": "assistant", "content": item.record["reference"]}]
        ids, mask = chat.encode(tokenizer, chat.normalise(turns)[0], last_turn_only=True)
        own = [*item.ids, *answers[i]], [0] * len(item.ids) + [1] * len(answers[i])
        for names, (tokens, trained) in ((("kl_forward", "kl_reverse"), (ids, mask)), (("kl_base_forward",), own)):
            ours, theirs = (log_distributions(net, adapter, tokens)[:-1] for adapter in ("policy", None))
            kept = torch.tensor(trained[1:]).bool()
            forward = (theirs.exp() * (theirs - ours)).sum(-1)[kept].sum().item()
            reverse = (ours.exp() * (ours - theirs)).sum(-1)[kept].sum().item()
            for name, value in zip(names, (forward, reverse), strict=False):
                assert stats[name][i] == pytest.approx([value, kept.sum().item()], rel=1e-4), name
            assert forward != pytest.approx(reverse, rel=1e-3)


def test_the_base_has_not_moved(policy):
    net, tokenizer = policy
    items, _ = measure.items(tasks.records("safety", "test", 4), tokenizer, 100, 4, 0)
    with lora.using(net, None):
        stats = drift.kl_both_ways(net, net, items, [[5, 6]] * 4, tokenizer, 512)
    assert all((values[:, 0] == 0).all() and (values[:, 1] > 0).all() for values in stats.values())


def test_losses_on_other_tasks_are_those_of_their_own_evaluation(policy):
    net, tokenizer = policy
    cfg = config.load_config(None, {"debug": True, "evaluation.other_tasks": "clinical, conala", "task": "safety"})
    others = drift.load_others(cfg)
    assert {name: len(rows) for name, rows in others.items()} == {"clinical": 128, "conala": 128}
    with lora.using(net, "policy"):
        stats = drift.losses_on(net, others, tokenizer, 512, 128)
        for name, rows in others.items():
            whole = measure.preferences(net, rows, tokenizer, 512)["loss_per_byte"]
            assert stats[f"loss_on_{name}"].sum(0) == pytest.approx(whole.sum(0))
        few = drift.losses_on(net, others, tokenizer, 512, 5)["loss_on_clinical"]
        more = drift.losses_on(net, {"clinical": others["clinical"][:3]}, tokenizer, 512, 5)["loss_on_clinical"]
    assert few == pytest.approx(stats["loss_on_clinical"][:5])
    assert (more[:3, 1] > 0).all() and not np.any(more[3:])  # fewer records than items: the others do not count


def test_given_data_and_wrong_names(tmp_path):
    folder = inputs.write_data(tmp_path / "own", "clinical", test=3)
    cfg = config.load_config(None, {"evaluation.other_tasks": f"clinical={folder}"})
    assert [len(rows) for rows in drift.load_others(cfg).values()] == [3]
    for names, words in (
        ("clinical,clinical", "named twice"),
        ("safety", "task that is measured"),
        ("clinicl", "did you mean clinical"),
    ):
        with pytest.raises(UserError, match=words):
            drift.load_others(config.load_config(None, {"debug": True, "evaluation.other_tasks": names}))
    assert drift.load_others(config.load_config()) == {}
