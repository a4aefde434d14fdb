"""A step of on-policy data: minibatches, weights of the loss, micro-batches, rewards, and what is logged."""

import math
import re
import types

import pytest
import torch

import train_rl
from common import chat, config, experience, log, prompts, rewards, tasks
from common.log import UserError
from tests.test_policy_losses import trl_loss


def rollout_of(prompt_numbers, group_size=2, seed=0):
    """A rollout of these prompts with completions of random length, by its sizes alone."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [number for number in prompt_numbers for _ in range(group_size)]
    completion_tokens = torch.randint(1, 9, (len(numbers),), generator=generator)
    prompt_tokens = torch.tensor([10 + number for number in numbers])
    return types.SimpleNamespace(
        prompt_numbers=numbers, completion_tokens=completion_tokens, row_tokens=completion_tokens + prompt_tokens
    )


def deal(rollout, has_gradient, *sizes):
    return experience.minibatches(rollout, torch.tensor(has_gradient), torch.ones(len(has_gradient)), *sizes)


def test_minibatches_deal_whole_groups_once_a_pass():
    rollout, has_gradient = rollout_of(range(7)), [row % 5 != 0 for row in range(14)]
    whole = deal(rollout, [True] * 14, 7, 3, 2, 40, "key")
    dealt = deal(rollout, has_gradient, 7, 3, 2, 40, "key")
    assert [minibatch.number_of_pass for minibatch in dealt] == [0, 0, 1, 1, 2, 2]
    members = [sorted(row for rows in minibatch.micro_batch_rows for row in rows) for minibatch in whole]
    for number in range(3):
        part = members[2 * number : 2 * number + 2]
        assert sorted(row for rows in part for row in rows) == list(range(14))
        for rows in part:
            assert all(row ^ 1 in rows for row in rows) and len(rows) in (6, 8)  # both samples of a prompt
    assert members[:2] != members[2:4]
    for rows, minibatch in zip(members, dealt, strict=True):
        computed = [row for cut in minibatch.micro_batch_rows for row in cut]
        assert computed == [row for row in rows if has_gradient[row]] and minibatch.divisor == len(rows)
        assert minibatch.forward_tokens == sum(rollout.row_tokens[row] for row in computed)
        for cut in minibatch.micro_batch_rows:  # a prompt counts once where its rows are neighbours
            cost = 0
            for i, row in enumerate(cut):
                shared = i and rollout.prompt_numbers[cut[i - 1]] == rollout.prompt_numbers[row]
                cost += rollout.completion_tokens[row] if shared else rollout.row_tokens[row]
            assert cost <= 40 or len(cut) == 1


def test_minibatches_are_the_same_over_ranks():
    def rows_of(minibatch):
        return [row for rows in minibatch.micro_batch_rows for row in rows]

    whole = deal(rollout_of(range(6)), [True] * 12, 6, 2, 3, 1000, "k")
    parts = [deal(rollout_of(range(r, 6, 2)), [True] * 6, 6, 2, 3, 1000, "k") for r in (0, 1)]
    for number, minibatch in enumerate(whole):
        mine = {row // 2 for row in rows_of(minibatch)}
        theirs = set()
        for r, part in enumerate(parts):
            for other in part:  # a rank without a row of a minibatch alone leaves it out; several ranks count together
                if other.number_of_pass == minibatch.number_of_pass:
                    groups = {2 * (row // 2) + r for row in rows_of(other)}
                    theirs |= groups if groups & mine else set()
        assert mine == theirs, number


def test_a_minibatch_without_a_gradient_is_left_out():
    rollout = rollout_of(range(4))
    whole = deal(rollout, [True] * 8, 4, 2, 4, 40, "key")
    rows = [row for cut in whole[1].micro_batch_rows for row in cut]
    dealt = deal(rollout, [row not in rows for row in range(8)], 4, 2, 4, 40, "key")
    assert len(whole) == 8 and len(dealt) == 6 and len(experience.first_pass(dealt)) == 3


def test_aggregation_by_hand():
    mask = torch.tensor([[0.0, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    loss = torch.tensor([[9.0, 1, 2, 3, 4], [9, 10, 9, 9, 9], [9, 9, 9, 9, 9]])
    for kind, expected in (("token", 20 / 5), ("sequence", (2.5 + 10) / 2), ("constant", (10 + 10) / (2 * 8))):
        weight, row_divisor = experience.loss_weights(mask, kind, 8)
        assert ((loss * weight).sum() / row_divisor.sum()).item() == pytest.approx(expected), kind
        wide = experience.loss_weights(torch.cat([mask, torch.zeros(3, 7)], 1), kind, 8)
        assert wide[0][:, :5].equal(weight) and wide[1].equal(row_divisor)  # B-19


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
    weight, row_divisor = experience.loss_weights(mask, kind, 16)
    micro = experience.MicroBatch([], None, mask, weight, a * mask, None, old, reference)
    loss = train_rl.grpo_objective(logprobs, None, micro, rl)
    metrics = train_rl.policy_shift(logprobs, micro, rl)
    value = (loss * weight).sum() / row_divisor.sum()
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    found, right = (torch.autograd.grad(each, logprobs, retain_graph=True)[0] for each in (value, expected))
    assert torch.allclose(found, right, atol=1e-13) and right.abs().max() > 1e-3
    assert len(metrics["clip_share"]) == mask.sum() and metrics["policy_kl"].min() >= 0


def test_groups_without_an_advantage():
    advantages = torch.tensor([[0.0, 0], [0, 0], [0, 1], [0, 0], [0, 0], [0, 0]])
    assert experience.zero_advantage_groups(advantages, 2).tolist() == [True, True, False, False, True, True]


def test_rewards_summary_and_lines_by_hand(tiny_model, tmp_path):
    net, tokenizer = tiny_model
    torch.set_num_threads(1)
    settings = config.load_config(None, {"reward.type": "heuristic"}).reward
    score = rewards.scorer("safety", settings, lambda ids: chat.decode(tokenizer, ids))
    sampling = {"group_size": 3, "max_new_tokens": 12, "temperature": 1.0}
    encoded, _ = prompts.encode_prompts(tasks.records("safety", "train", 4), tokenizer, 200)
    chosen = dict(enumerate(encoded))
    whole = experience.collect(net, chosen, score, 3, 4, **sampling)
    assert whole.row_numbers == list(range(12)) and whole.prompt_numbers == [i // 3 for i in range(12)]
    assert whole.sampled_tokens == whole.completion_tokens.sum() == sum(map(len, whole.completions))
    half = experience.collect(net, {number: chosen[number] for number in (1, 3)}, score, 3, 4, **sampling)
    assert half.row_numbers == [3, 4, 5, 9, 10, 11]
    assert half.completions == [whole.completions[row] for row in half.row_numbers]  # B-38: whoever draws them
    assert half.rewards.tolist() == [whole.rewards[row].item() for row in half.row_numbers]

    found = experience.summary(whole, "x/")
    assert found["x/reward"] == pytest.approx(whole.rewards.mean().item(), abs=1e-6)
    assert found["x/reward_std"] == pytest.approx(whole.rewards.std().item(), abs=1e-5)
    assert found["x/reward/refusal"] == sum(part["refusal"] for part in whole.reward_parts) / 12
    assert whole.ids == [f"{record['id']}/{row}" for row, record in enumerate(whole.records)]
    assert log.listed(list("abc"), 2) == "a, b and 1 more" and log.listed(["a", "b"]) == "a, b"
    lines = experience.lines(whole, tokenizer, 9)
    lines[0]["completion"] = "one\u2028line \x85"
    log.write_records(tmp_path / "log.jsonl", lines)
    assert log.read_records(tmp_path / "log.jsonl") == lines
    assert [line["row"] for line in lines] == list(range(12)) and {line["step"] for line in lines} == {9}
    assert lines[5]["completion"] == chat.decode(tokenizer, whole.completions[5])

    def trained_scorer(records, answers):
        return torch.tensor([1.0] * (len(answers) - 1) + [math.nan])

    settings.type = "trainable"
    broken = rewards.scorer("safety", settings, lambda ids: chat.decode(tokenizer, ids), trained_scorer)
    words = f"sample for {chosen[3].id} is nan.*it says {lines[-1]['completion']!r}"
    with pytest.raises(UserError, match=re.escape(words).replace(re.escape(".*"), ".*")):
        experience.collect(net, chosen, broken, 3, 4, **sampling)


def test_a_micro_batch_is_as_if_collated_alone():
    """Cut after its last masked token; what was not made stays out."""
    mask = torch.tensor([[0.0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]])
    tokens = torch.arange(18).view(3, 6)
    sizes = {"row_tokens": torch.tensor([4, 6, 3]), "completion_tokens": mask.sum(1), "sampled_tokens": 6.0}
    rollout = experience.Rollout(
        tokens,
        mask,
        [],
        torch.ones(3).bool(),
        2 * mask,
        torch.zeros(3),
        [],
        [{"id": name} for name in "abc"],
        [6, 7, 8],
        [3, 3, 4],
        seconds={},
        **sizes,
    )
    rollout.weight, rollout.advantages, rollout.values = 3 * mask, 4 * mask, 5 * mask
    micro = rollout.micro_batch([2, 0])
    assert micro.ids == ["c/8", "a/6"] and micro.tokens.equal(tokens[[2, 0], :4])
    for name, times in (("mask", 1), ("sampled_logprobs", 2), ("weight", 3), ("advantages", 4), ("values", 5)):
        assert getattr(micro, name).equal(times * mask[[2, 0], :3]), name
    assert micro.old_logprobs is micro.ref_logprobs is micro.returns is None
    rollout.exclude(torch.tensor([False, True, True]))
    assert rollout.mask.sum(1).tolist() == [2, 0, 0] and rollout.micro_batch([0]).tokens.equal(tokens[[0], :4])


def test_group_metrics_by_hand():
    """Three groups of two: one with spread and a right answer, one with neither, one with a single score."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5, math.nan, 0.2])
    parts = [{"exact": value} for value in (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)]
    rollout = types.SimpleNamespace(
        prompt_numbers=[0, 0, 1, 1, 2, 2], rewards=rewards, reward_parts=parts, correct="exact"
    )
    found = experience.group_metrics(rollout)
    assert found == {"group_spread": pytest.approx(1 / 3), "pass@2": pytest.approx(1 / 3)}
    rollout.correct = None
    assert experience.group_metrics(rollout) == {"group_spread": pytest.approx(1 / 3)}
    rollout.prompt_numbers = list(range(6))
    assert experience.group_metrics(rollout) == {}
