"""Prompts to sample from: which are kept, each once an epoch, and what the report compares."""

import pytest

from common import chat, prompts, tasks
from common.log import UserError


@pytest.fixture
def dataset(tokenizer):
    records = {split: tasks.records("safety", split, 30) for split in ("train", "val")}
    return prompts.encode(records, tokenizer, 200, 7, 10, 0)


def test_b24_each_prompt_once_an_epoch_in_whole_steps(dataset):
    assert dataset.per_epoch == len(dataset.train) // 7 == 4 and len(dataset.val) == 10
    epochs = [[dataset.batch(step) for step in range(4 * e, 4 * e + 4)] for e in range(3)]
    for epoch in epochs:
        chosen = [prompt.id for batch in epoch for prompt in batch]
        assert all(len(batch) == 7 for batch in epoch) and len(set(chosen)) == 28
    assert epochs[0] != epochs[1] != epochs[2]
    for prompt in dataset.train:
        assert prompt.ids[0] == chat.BOS and prompt.ids.count(chat.BOS) == 1


def test_a_column_that_a_reward_may_read_is_part_of_the_data(tokenizer):
    """A run does not go on over data whose extra column changed; data without such columns are what they were."""
    records = {split: tasks.records("safety", split, 30) for split in ("train", "val")}

    def fingerprint(**columns):
        changed = records | {"train": [records["train"][0] | columns, *records["train"][1:]]}
        return prompts.encode(changed, tokenizer, 200, 7, 10, 0).fingerprint

    bare = fingerprint()
    assert fingerprint(margin=0.5) == bare  # of a pair: no reward function is given it as something new
    assert len({bare, fingerprint(tests=["a"]), fingerprint(tests=["b"]), fingerprint(tests=None)}) == 4


def test_prompts_that_do_not_fit_are_counted(tokenizer, capsys):
    records = {split: tasks.records("safety", split, 20) for split in ("train", "val")}
    lengths = [len(chat.encode_prompt(tokenizer, record["prompt"])) for record in records["train"]]
    records["train"][0] = records["train"][0] | {"prompt": [{"role": "assistant", "content": "I begin."}]}
    limit = sorted(lengths)[10]
    dataset = prompts.encode(records, tokenizer, limit, 2, None, 0)
    assert len(dataset.train) == sum(length <= limit for length in lengths[1:]) and len(dataset.train) < 19
    assert "1 left out (no user turn)" in capsys.readouterr().out
    with pytest.raises(UserError, match="train: 0 prompts of at most 3 tokens"):
        prompts.encode(records, tokenizer, 3, 2, None, 0)


def test_d24_too_few_prompts_name_the_keys_to_change(tokenizer):
    records = {split: tasks.records("safety", split, 20) for split in ("train", "val")}
    with pytest.raises(
        UserError, match=r"rl\.max_new_tokens leaves -208 of training\.max_seq_length's tokens"
    ) as error:
        prompts.encode(records, tokenizer, -208, 2, None, 0)
    assert "lower rl.max_new_tokens or raise training.max_seq_length" in str(error.value)
    with pytest.raises(UserError, match=r"train: 20 prompts .* at least 21 are needed.* lower rl\.rollout_size"):
        prompts.encode(records, tokenizer, 300, 21, None, 0)
    with pytest.raises(UserError, match=r"val: 0 prompts .* raise training\.max_seq_length"):
        prompts.encode(records | {"val": []}, tokenizer, 300, 4, None, 0)


def test_comparison_by_hand():
    lines = [
        {"step": 9, "row": row, "reward": row / 12, "parts": {"refusal": row % 2}, "tokens": row + 1, "stopped": True}
        for row in range(12)
    ]
    later = [line | {"step": 20, "reward": line["reward"] + 0.25, "tokens": line["tokens"] + 2} for line in lines]
    report = prompts.compare(lines + later, 200)
    assert report["steps"] == [9, 20] and report["prompts"] == 12
    assert report["reward"]["difference"] == pytest.approx(0.25) and report["length"]["difference"] == 2
    assert report["reward"]["interval"] == [None, None] and report["reward/refusal"]["p"] == 1


def test_comparison_of_answers_without_a_score():
    """None: the reward is compared over the prompts whose both answers have one, all else over all."""
    line = {"parts": {}, "tokens": 4, "stopped": True}
    rewards = {9: [1.0, None, 3.0, 4.0], 20: [2.0, 7.0, None, 6.0]}
    lines = [line | {"step": step, "row": i, "reward": x} for step in rewards for i, x in enumerate(rewards[step])]
    report = prompts.compare(lines, 200)
    assert report["reward"]["prompts"] == 2 and report["reward"]["difference"] == pytest.approx(1.5)
    assert report["length"]["prompts"] == report["prompts"] == 4
    assert "reward" not in prompts.compare([entry | {"reward": None} for entry in lines], 200)
