"""A step of on-policy data: order of prompts, plan of updates, aggregation, rewards, and what is reported."""

import math
import re
import types

import pytest
import torch

import train_rl
from common import chat, config, data, experience, log, rewards, synthetic
from common.log import UserError
from tests.test_policy_losses import trl_loss


@pytest.fixture
def source(tokenizer):
    records = {split: synthetic.records("safety", split, 30) for split in ("train", "val")}
    return experience.source(records, tokenizer, 200, 7, 10, 0)


def test_b24_each_prompt_once_an_epoch_in_whole_steps(source):
    assert source.per_epoch == len(source.train) // 7 == 4 and len(source.val) == 10
    epochs = [[source.batch(step) for step in range(4 * e, 4 * e + 4)] for e in range(3)]
    for epoch in epochs:
        chosen = [i for batch in epoch for i in batch]
        assert all(len(batch) == 7 for batch in epoch) and len(set(chosen)) == 28
    assert epochs[0] != epochs[1] != epochs[2]
    for prompt in source.train:
        assert prompt["ids"][0] == chat.BOS and prompt["ids"].count(chat.BOS) == 1


def test_prompts_that_do_not_fit_are_counted(tokenizer, capsys):
    records = {split: synthetic.records("safety", split, 20) for split in ("train", "val")}
    lengths = [len(chat.encode_prompt(tokenizer, record["prompt"])) for record in records["train"]]
    records["train"][0] = records["train"][0] | {"prompt": [{"role": "assistant", "content": "I begin."}]}
    limit = sorted(lengths)[10]
    found = experience.source(records, tokenizer, limit, 2, None, 0)
    assert len(found.train) == sum(length <= limit for length in lengths[1:]) and len(found.train) < 19
    assert "1 no_user_turn" in capsys.readouterr().out
    with pytest.raises(UserError, match="train: 0 prompts of at most 3 tokens"):
        experience.source(records, tokenizer, 3, 2, None, 0)


def batch_of(groups, group_size=2, seed=0):
    """A batch of these groups with random lengths: what `plan` reads."""
    dice = torch.Generator().manual_seed(seed)
    members = [group for group in groups for _ in range(group_size)]
    answers = torch.randint(1, 9, (len(members),), generator=dice)
    prompts = torch.tensor([10 + group for group in members])
    return {"groups": members, "lengths": answers, "costs": answers + prompts}


def test_plan_deals_whole_groups_once_an_epoch():
    batch, kept = batch_of(range(7)), [row % 5 != 0 for row in range(14)]
    found = experience.plan(batch, kept, 7, (3, 2), 40, "key")
    assert len(found["plan"]) == len(found["members"]) == 6
    for epoch in range(3):
        part = found["members"][2 * epoch : 2 * epoch + 2]
        assert sorted(row for rows in part for row in rows) == list(range(14))
        for rows in part:
            assert all(row ^ 1 in rows for row in rows)  # both samples of a prompt
            assert len(rows) in (6, 8)
    assert found["members"][:2] != found["members"][2:4]
    for rows, cuts in zip(found["members"], found["plan"]):
        assert [row for cut in cuts for row in cut] == [row for row in rows if kept[row]]
        for cut in cuts:  # a prompt counts once where its rows are neighbours
            cost = 0
            for i, row in enumerate(cut):
                shared = i and batch["groups"][cut[i - 1]] == batch["groups"][row]
                cost += batch["lengths"][row] if shared else batch["costs"][row]
            assert cost <= 40 or len(cut) == 1


def test_plan_is_the_same_over_ranks():
    whole = experience.plan(batch_of(range(6)), [True] * 12, 6, (2, 3), 1000, "k")["members"]
    parts = [experience.plan(batch_of(range(r, 6, 2)), [True] * 6, 6, (2, 3), 1000, "k")["members"] for r in (0, 1)]
    for number, rows in enumerate(whole):
        mine = {row // 2 for row in rows}
        theirs = {group for r, part in enumerate(parts) for row in part[number] for group in [2 * (row // 2) + r]}
        assert mine == theirs


def test_aggregation_by_hand():
    mask = torch.tensor([[0.0, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    loss = torch.tensor([[9.0, 1, 2, 3, 4], [9, 10, 9, 9, 9], [9, 9, 9, 9, 9]])
    for kind, expected in (("token", 20 / 5), ("sequence", (2.5 + 10) / 2), ("constant", (10 + 10) / (2 * 8))):
        found = experience.aggregation(mask, kind, 8)
        value = (loss * found["weight"]).sum() / found["sizes"].sum()
        assert value.item() == pytest.approx(expected), kind
        wide = experience.aggregation(torch.cat([mask, torch.zeros(3, 7)], 1), kind, 8)
        assert wide["weight"][:, :5].equal(found["weight"]) and wide["sizes"].equal(found["sizes"])  # B-19


@pytest.mark.parametrize("kl_coef", [0.0, 0.4])
@pytest.mark.parametrize(("kind", "theirs"), [("token", "dapo"), ("sequence", "grpo"), ("constant", "dr_grpo")])
def test_grpos_objective_equals_trls_in_value_and_gradient(kind, theirs, kl_coef):
    """train_rl.py's own objective and aggregation against GRPOTrainer._compute_loss, off the policy, ragged lengths."""
    generator = torch.Generator().manual_seed(3)
    old, reference, noise = torch.randn(3, 8, 12, generator=generator, dtype=torch.float64) * 0.4 - 2
    logprobs = (old + (noise + 2) * 0.8).requires_grad_()
    a = torch.randn(8, 1, generator=generator, dtype=torch.float64).expand(8, 12)
    mask = (torch.arange(12) < torch.tensor([[12], [1], [5], [9], [3], [12], [7], [2]])).double()
    settings = {"loss_type": theirs, "beta": kl_coef, "use_bias_correction_kl": True}
    expected = trl_loss(logprobs, old, reference, a, mask, **settings)
    rl = config.load_config(None, {"rl.kl_coef": kl_coef, "rl.clip_high": 0.28}).rl
    batch = {"old_logprobs": old, "ref_logprobs": reference, "advantages": a * mask, "mask": mask}
    batch |= experience.aggregation(mask, kind, 16)
    [(loss, weight)], metrics = train_rl.grpo_objective({"logprobs": logprobs}, batch, rl)
    value = (loss * weight).sum() / batch["sizes"].sum()
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    found, right = (torch.autograd.grad(each, logprobs, retain_graph=True)[0] for each in (value, expected))
    assert torch.allclose(found, right, atol=1e-13) and right.abs().max() > 1e-3
    assert len(metrics["clip_share"]) == mask.sum() and metrics["policy_kl"].min() >= 0


def test_equal_groups():
    found = experience.equal_groups(torch.tensor([1.0, 1, 2, 2.5, 0, 0, math.nan, math.nan]), 2)
    assert found.tolist() == [True, True, False, False, True, True, False, False]


def test_rewards_summary_and_comparison_by_hand(tiny_model, source, tmp_path):
    net, tokenizer = tiny_model
    torch.set_num_threads(1)
    heuristic = types.SimpleNamespace(toxicity=1.0, length=0.2, repetition=0.5, refusal=0.5, overlap=1.0, facts=0.5,
                                      bleu=1.0, exact=0.5, parse=0.5)  # fmt: skip
    settings = types.SimpleNamespace(type="heuristic", function=None, alpha=1.0, beta=0.5, clip_rewards=None,
                                     heuristic=heuristic)  # fmt: skip
    score = rewards.make("safety", settings, lambda ids: chat.decode(tokenizer, ids))
    sampling = {"seed": 3, "step": 4, "group_size": 3, "max_new_tokens": 12, "temperature": 1.0}
    prompts = {number: i for number, i in enumerate(source.batch(0)[:4])}
    whole = experience.collect(net, [source.train[i] for i in prompts.values()], prompts, score, sampling)
    assert whole["rows"] == list(range(12)) and whole["groups"] == [i // 3 for i in range(12)]
    assert whole["generated"] == whole["lengths"].sum() == sum(map(len, whole["completions"]))
    half = experience.collect(net, [source.train[prompts[i]] for i in (1, 3)], (1, 3), score, sampling)
    assert half["rows"] == [3, 4, 5, 9, 10, 11]
    assert half["completions"] == [whole["completions"][row] for row in half["rows"]]  # B-38: whoever draws them
    assert half["rewards"].tolist() == [whole["rewards"][row].item() for row in half["rows"]]

    found = experience.summary(whole, "x/")
    assert found["x/reward"] == pytest.approx(whole["rewards"].mean().item(), abs=1e-6)
    assert found["x/reward_std"] == pytest.approx(whole["rewards"].std().item(), abs=1e-5)
    assert found["x/reward/refusal"] == sum(part["refusal"] for part in whole["parts"]) / 12
    assert whole["ids"] == [f"{record['id']}/{row}" for row, record in enumerate(whole["records"])]
    assert experience.listed(list("abc"), 2) == "a, b and 1 more" and experience.listed(["a", "b"]) == "a, b"
    lines = experience.lines(whole, tokenizer, 9)
    lines[0]["completion"] = "one\u2028line \x85"
    log.write_records(tmp_path / "log.jsonl", lines)
    assert log.read_records(tmp_path / "log.jsonl") == lines
    assert [line["row"] for line in lines] == list(range(12)) and {line["step"] for line in lines} == {9}
    assert lines[5]["completion"] == chat.decode(tokenizer, whole["completions"][5])

    later = [line | {"step": 20, "reward": line["reward"] + 0.25, "tokens": line["tokens"] + 2} for line in lines]
    report = experience.compare(lines + later, 200)
    assert report["steps"] == [9, 20] and report["prompts"] == 12
    assert report["reward"]["difference"] == pytest.approx(0.25) and report["length"]["difference"] == 2
    assert report["reward"]["interval"] == pytest.approx([0.25, 0.25]) and report["reward/refusal"]["p"] == 1

    def judge(records, answers):
        return torch.tensor([1.0] * (len(answers) - 1) + [math.nan])

    settings.type = "trainable"
    broken = rewards.make("safety", settings, lambda ids: chat.decode(tokenizer, ids), judge)
    words = f"sample for {source.train[prompts[3]]['id']} is nan.*it says {lines[-1]['completion']!r}"
    with pytest.raises(UserError, match=re.escape(words).replace(re.escape(".*"), ".*")):
        experience.collect(net, [source.train[i] for i in prompts.values()], prompts, broken, sampling)


def test_piece_cuts_what_no_row_needs():
    tokens = torch.arange(24).view(3, 8)
    mask = torch.zeros(3, 7)
    mask[0, 1:3] = mask[1, 2:5] = mask[2, 6] = 1
    batch = {"tokens": tokens, "mask": mask, "rewards": torch.arange(3.0), "sizes": torch.ones(3, 1), "ids": ["a"] * 3}
    piece = data.piece(batch, [1, 0])
    assert piece["tokens"].tolist() == [tokens[1, :6].tolist(), tokens[0, :6].tolist()]
    assert piece["mask"].shape == (2, 5) and piece["rewards"].tolist() == [1.0, 0.0] and "ids" not in piece
    assert data.piece(batch, [2])["tokens"].shape == (1, 8)
