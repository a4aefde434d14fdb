"""Heuristic rewards by weight, any function of the user's, and their hybrid with a trained model."""

import pytest
import torch

from common import config, rewards, tasks
from common.log import UserError
from tests.test_safety import KIND


def test_weights_and_missing_references():
    text = "Mix flour, water and salt, then wait."
    total, parts = rewards.heuristic_reward("safety", KIND, text, toxicity=3.0, length=0.0, repetition=0.0, refusal=1.0)
    assert total == pytest.approx((3 * parts["toxicity"] + parts["refusal"]) / 4)
    with pytest.raises(ValueError, match="reference"):
        rewards.heuristic_reward("clinical", KIND, text)
    with pytest.raises(UserError, match=r"^task: poetry: expected safety, "):
        rewards.heuristic_reward("poetry", KIND, text)


def test_a_missing_reference_is_named_before_anything_is_sampled():
    """One of train is enough: a run would end at the step that draws it, and every resume at the same one."""
    rows = tasks.records("conala", "train", 3)
    records = {"val": tasks.records("conala", "val", 2), "train": [rows[0], rows[1] | {"reference": None}, rows[2]]}
    grpo = {"task": "conala", "rl.algorithm": "grpo", "reward.type": "heuristic"}
    for change in ({}, {"rl.algorithm": "dpo"}, {"reward.type": "hybrid"}):  # dpo: rejection sampling asks no algorithm
        cfg = config.load_config(None, grpo | change)
        with pytest.raises(UserError, match=f"^{rows[1]['id']}: .*needs a reference.*--data_keys reference=KEY"):
            rewards.check_references(cfg, records)
        rewards.check_references(cfg, records | {"train": rows})
    for change in ({"reward.type": "trainable"}, {"reward.function": "mine.py:f"}):
        rewards.check_references(config.load_config(None, grpo | change), records)
    rewards.check_references(config.load_config(None, grpo | {"task": "safety"}), records)


def test_hybrid_by_hand():
    heuristic, trained = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([3.0, -1.0, 40.0])
    normal = rewards.normalise(trained, mean=1.0, std=2.0)
    assert normal.tolist() == pytest.approx([1.0, -1.0, 19.5])
    assert rewards.combine(heuristic, normal, 2.0, 0.5).tolist() == pytest.approx([0.9, 1.3, 10.75])
    assert rewards.combine(heuristic, normal, 2.0, 0.5, clip=1.0).tolist() == pytest.approx([0.9, 1.0, 1.0])
    assert torch.isfinite(rewards.normalise(trained, 0.0, 0.0)).all()  # a reward model that says one thing only


def test_an_ensemble_by_hand():
    """Coste et al. 2024: mean, worst case, and the mean minus the deviation between members."""
    scores = torch.tensor([[1.0, 4.0], [3.0, 4.0], [5.0, -2.0]])
    assert rewards.ensemble(scores, "mean").tolist() == [3.0, 2.0]
    assert rewards.ensemble(scores, "min").tolist() == [1.0, -2.0]
    by_hand = [3 - ((4 + 0 + 4) / 3) ** 0.5, 2 - ((4 + 4 + 16) / 3) ** 0.5]
    assert rewards.ensemble(scores, "mean_minus_std").tolist() == pytest.approx(by_hand)
    assert torch.equal(rewards.ensemble(scores[:1], "mean_minus_std"), scores[0])
