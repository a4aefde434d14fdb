"""The scalar head: initialisation, the position it reads, PEFT's file format, and refusals."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train_reward
import train_rl
from common import data, lora, reward_model, rewards, tasks
from common.log import UserError
from common.runtime import base
from tests import checks, inputs, processes
from tests.faults import trainers


@pytest.fixture
def judge(tiny_model):
    """(net, tokenizer, head): an adapter with random B, so that it changes something, and a head."""
    net, tokenizer = tiny_model
    torch.manual_seed(0)
    lora.inject(net, "reward", 4, 8)
    with torch.no_grad():
        for name, p in lora.adapter_parameters(net, "reward").items():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return net, tokenizer, reward_model.new_head(net.config.hidden_size, torch.device("cpu"))


@pytest.fixture
def pairs(tokenizer):
    return data.encode_pairs(tasks.records("safety", "val", 6), tokenizer, 128)[0]


def test_head_has_unit_outputs_at_first():
    """N(0, 1 / sqrt(d + 1)): rewards of states with unit entries are about N(0, 1) whatever the width."""
    generator = torch.Generator().manual_seed(0)
    for width in (64, 640, 1152):
        heads = torch.cat([reward_model.new_head(width, torch.device("cpu"), generator) for _ in range(200)])
        assert heads.shape == (200, width) and heads.dtype == torch.float32
        assert heads.std().item() == pytest.approx((width + 1) ** -0.5, rel=0.03)
        assert abs(heads.mean().item()) < 4 * (width + 1) ** -0.5 / heads.numel() ** 0.5  # four standard errors


def test_score_is_of_the_last_token_by_transformers_own_states(judge, pairs):
    net, _, head = judge
    tokens, mask = data.collate_pairs(pairs)
    found = reward_model.scores(net, head, tokens, mask)
    examples = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    assert found.shape == (len(examples),)
    with torch.no_grad():
        for value, example in zip(found, examples):
            states = net.model(torch.tensor([example["ids"]]), use_cache=False).last_hidden_state[0]
            assert value.item() == pytest.approx((states[-1] @ head[0]).item(), abs=1e-4)
            assert abs(value.item() - (states[-2] @ head[0]).item()) > 1e-3  # so that a slip by one would show


def test_score_does_not_depend_on_padding_order_or_company(judge, pairs):
    net, _, head = judge
    tokens, mask = data.collate_pairs(pairs)
    found = reward_model.scores(net, head, tokens, mask)
    wider = torch.cat([tokens, torch.randint(5, 600, (len(tokens), 50))], 1)  # padding may be any token
    assert torch.equal(reward_model.scores(net, head, wider, torch.cat([mask, torch.zeros(len(mask), 50)], 1)), found)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))  # prompts are no longer neighbours
    assert (reward_model.scores(net, head, tokens[order], mask[order]) - found[order]).abs().max() < 1e-5
    alone = torch.cat([reward_model.scores(net, head, tokens[i : i + 1], mask[i : i + 1]) for i in range(len(tokens))])
    assert (alone - found).abs().max() < 1e-5
    with pytest.raises(AssertionError, match="without an answer"):
        reward_model.scores(net, head, tokens, mask * 0)


def test_completions_score_as_their_rows(judge, pairs):
    net, _, head = judge
    tokens, mask = data.collate_pairs(pairs)
    cut = [
        (p[side]["ids"][: p["prompt_tokens"]], p[side]["ids"][p["prompt_tokens"] :])
        for p in pairs
        for side in ("chosen", "rejected")
    ]
    found = reward_model.score_completions(net, head, *zip(*cut), budget=150)  # several passes
    assert (found - reward_model.scores(net, head, tokens, mask)).abs().max() < 1e-5


def write(judge, folder, **more):
    net, tokenizer, head = judge
    about = {
        "base_checkpoint": str(base.resolve("tiny")),
        "base": base.fingerprint(base.resolve("tiny")),
        "task": "safety",
        "mean": 0.5,
        "std": 2.0,
    } | more
    folder.mkdir()
    reward_model.save(net, tokenizer, folder, "reward", head, about)
    return about


def test_saved_and_loaded_beside_a_policy(judge, pairs, tmp_path, tiny_folder):
    net, _, head = judge
    about = write(judge, tmp_path / "rm")
    tokens, mask = data.collate_pairs(pairs)
    before = reward_model.scores(net, head, tokens, mask).detach()

    from common import model

    policy, _ = model.load("tiny", torch.device("cpu"), torch.float32)
    lora.inject(policy, "policy", 8, 16)
    loaded, read = reward_model.load(policy, "reward", tmp_path / "rm", base.fingerprint(tiny_folder))
    assert read == about and torch.equal(loaded, head)
    assert {module.active for module in lora.lora_modules(policy).values()} == {"policy"}  # as it was
    frozen = reward_model.parameters(policy, "reward", loaded).values()
    assert not any(p.requires_grad for p in frozen)
    assert all(p.requires_grad for p in lora.adapter_parameters(policy, "policy").values())
    with lora.using(policy, "reward"):
        assert torch.equal(reward_model.scores(policy, loaded, tokens, mask), before)


def test_plain_peft_opens_it(judge, pairs, tmp_path, tiny_folder):
    import peft
    from transformers import AutoModelForSequenceClassification

    net, _, head = judge
    write(judge, tmp_path / "rm")
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    plain = peft.PeftModel.from_pretrained(plain, tmp_path / "rm").eval()
    tokens, mask = data.collate_pairs(pairs)
    found = reward_model.scores(net, head, tokens, mask)
    with torch.no_grad():
        for value, pair_side in zip(found, [p[s] for p in pairs for s in ("chosen", "rejected")]):
            assert plain(torch.tensor([pair_side["ids"]])).logits.item() == pytest.approx(value.item(), abs=1e-4)
    assert reward_model.HEAD in load_file(tmp_path / "rm" / "adapter_model.safetensors")


def test_what_does_not_fit_is_refused(judge, tmp_path, tiny_model, tiny_folder):
    from common import model

    net, tokenizer, _ = judge
    right = base.fingerprint(tiny_folder)
    write(judge, tmp_path / "rm")
    (tmp_path / "policy").mkdir()
    model.save_adapter(net, tokenizer, tmp_path / "policy", "reward", "tiny")
    shutil.copytree(tmp_path / "rm", tmp_path / "headless")
    config = json.loads((tmp_path / "rm" / "adapter_config.json").read_text())
    (tmp_path / "headless" / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    shutil.copytree(tmp_path / "rm", tmp_path / "step-000030")
    (tmp_path / "step-000030" / "state.json").write_text('{"step": 30, "evaluation": null}')
    fresh, _ = model.load("tiny", torch.device("cpu"), torch.float32)
    for folder, fingerprint, words in (
        ("none", right, "none"),
        ("policy", right, "reward.json"),
        ("rm", "another", "another base"),
        ("headless", right, "shape"),
        ("step-000030", right, "between two evaluations"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            reward_model.load(fresh, "reward", tmp_path / folder, fingerprint)
        assert str(caught.value).startswith(f"reward.checkpoint: {tmp_path / folder}")
    with pytest.raises(UserError, match="modules_to_save"):  # and it is no policy to start from
        model.load_adapter(fresh, "policy", tmp_path / "rm")


def test_values_are_those_of_the_states_before_each_token(judge, pairs):
    net, _, head = judge
    tokens, mask = data.collate_pairs(pairs)
    found = reward_model.values(net, head, tokens, mask)
    assert found.shape == mask.shape and not found[mask == 0].any() and found[mask == 1].abs().min() > 0
    examples = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    with torch.no_grad():
        for row, example in zip(found, examples):
            states = net.model(torch.tensor([example["ids"]]), use_cache=False).last_hidden_state[0]
            kept = torch.tensor(example["mask"][1:]).bool()
            expected = (states[:-1][kept] * head).sum(-1)
            assert torch.allclose(row[: len(kept)][kept], expected, atol=1e-4)
    wide = torch.cat([tokens, torch.full((len(tokens), 9), 7)], 1), torch.cat([mask, torch.zeros(len(mask), 9)], 1)
    assert torch.allclose(reward_model.values(net, head, *wide)[:, : mask.shape[1]], found, atol=1e-6)
    zero = torch.zeros_like(head)
    assert not reward_model.values(net, zero, tokens, mask).any()
    assert reward_model.values(net, head, tokens, torch.zeros_like(mask)).shape == mask.shape


def test_a_deviation_of_zero_divides_by_one():
    assert rewards.normalise(torch.tensor([0.3]), 0.0, 0.0).item() == pytest.approx(0.3)
    assert rewards.normalise(torch.tensor([0.3]), 0.1, 0.5).item() == pytest.approx(0.4)


def test_a_reward_model_of_one_held_out_pair(tmp_path, micro_folder):
    source = inputs.write_data(tmp_path / "data", "safety", train=12, val=1)
    argv = trainers.settings("reward", micro_folder, source)(tmp_path, "--training.max_steps", 2)
    status, out, err = processes.run(train_reward.main, tmp_path, argv)
    assert status == 0 and reward_model.ALIKE in out, (out, err)
    argv = trainers.settings("grpo", micro_folder, source, "--reward.type", "trainable")(tmp_path / "rl")
    argv += ["--reward.checkpoint", tmp_path / "run" / "final", "--evaluation.max_items", 1, "--rl.max_steps", 2]
    (tmp_path / "rl").mkdir()
    status, out, err = processes.run(train_rl.main, tmp_path / "rl", argv)
    assert status == 0 and reward_model.ALIKE in out, (out, err)
    values = [row["reward"] for row in checks.samples(tmp_path / "rl" / "run")]
    assert all(math.isfinite(value) and abs(value) < 100 for value in values), values
