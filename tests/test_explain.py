"""The view of --explain marks what is trained, its checks find each fault, and its plan follows the sizes."""

import pytest
import torch

from common import chat, explain, model

TURNS = [
    {"role": "user", "content": "Say hi"},
    {"role": "assistant", "content": "hi there"},
    {"role": "user", "content": "Again"},
    {"role": "assistant", "content": "  hi"},
]
PLAN_TOKENS = 512


def example(tokenizer, **options):
    ids, mask = chat.encode(tokenizer, TURNS, **options)
    return {"id": "one", "ids": ids, "mask": mask}


def test_view_marks_exactly_the_trained_tokens(tokenizer):
    assert explain.token_view(tokenizer, example(tokenizer), colour=False) == (
        "<bos><start_of_turn>user\nSay hi<end_of_turn>\n<start_of_turn>model\n[[hi there<end_of_turn>]]\n"
        "<start_of_turn>user\nAgain<end_of_turn>\n<start_of_turn>model\n[[  hi<end_of_turn>]]\n"
    )
    last = explain.token_view(tokenizer, example(tokenizer, last_turn_only=True), colour=False)
    assert last.count("[[") == last.count("]]") == 1 and "[[  hi<end_of_turn>]]" in last


def test_view_in_colour_holds_the_same_text(tokenizer):
    coloured = explain.token_view(tokenizer, example(tokenizer))
    assert f"{explain.GREEN}hi there<end_of_turn>{explain.PLAIN}" in coloured and coloured.endswith(explain.PLAIN)
    for code in (explain.GREEN, explain.DIM, explain.PLAIN):
        coloured = coloured.replace(code, "")
    assert coloured == tokenizer.decode(example(tokenizer)["ids"])


def test_a_long_view_is_cut_with_a_mark(tokenizer):
    one = example(tokenizer)
    cut = explain.token_view(tokenizer, one, colour=False, limit=mask_start(one) + 1)
    assert cut.endswith(f"]] ... and {len(one['ids']) - mask_start(one) - 1} more tokens")


def mask_start(one):
    return one["mask"].index(1)


def broken(tokenizer, fault):
    one = example(tokenizer)
    ids, mask = one["ids"], one["mask"]
    if fault == "2 BOS":
        ids, mask = [chat.BOS, *ids], [0, *mask]
    elif fault == "0 BOS":
        ids, mask = ids[1:], mask[1:]
    elif fault == "no trained token":
        mask = [0] * len(mask)
    elif fault == "trains a control token":
        mask = [int(m or i == chat.START_OF_TURN) for i, m in zip(ids, mask)]
    elif fault == "trains no <end_of_turn>":
        mask = [int(m and i != chat.END_OF_TURN) for i, m in zip(ids, mask)]
    elif fault == "trains its first token":
        mask = [1, *mask[1:]]
    return {"id": "one", "ids": ids, "mask": mask}


def test_a_good_example_passes(tokenizer):
    one = example(tokenizer)
    assert explain.check_example(one) == []
    cut = mask_start(one) + 1  # a truncated answer has no stop token, and that is no fault
    assert explain.check_example({"id": "cut", "ids": one["ids"][:cut], "mask": one["mask"][:cut]}) == []


@pytest.mark.parametrize(
    "fault",
    ["2 BOS", "0 BOS", "no trained token", "trains a control token", "trains no <end_of_turn>",
     "trains its first token"],
)  # fmt: skip
def test_each_fault_is_found_and_stops_the_command(tokenizer, tiny_model, fault):
    one = broken(tokenizer, fault)
    assert any(fault in words for words in explain.check_example(one))
    named = dict(tiny_model[0].named_parameters())
    with pytest.raises(model.UserError, match=f"example one .*{fault}"):
        explain.show([example(tokenizer), one], tokenizer, tiny_model[0], named, PLAN_TOKENS)


def test_show_prints_counts(tokenizer, tiny_model, capsys):
    net, _ = tiny_model
    named = dict(net.named_parameters())
    one = example(tokenizer)
    assert explain.show([one], tokenizer, net, named, PLAN_TOKENS) == 1
    out = capsys.readouterr().out
    assert f"one: {len(one['ids'])} tokens, {sum(one['mask'])} trained" in out
    assert f"trainable: {sum(p.numel() for p in net.parameters()):,} parameters" in out


def test_plan_is_positive_and_grows_with_tokens_and_with_what_is_trained(tiny_model):
    net, _ = tiny_model
    everything, little = list(net.parameters()), list(net.parameters())[1:2]

    def total(trainable, tokens, length):
        plan = explain.memory_plan(net, trainable, tokens, length)
        assert all(size > 0 for _, size in plan)
        return sum(size for _, size in plan)

    totals = [total(everything, tokens, 64) for tokens in (64, 128, 256, 4096)]
    assert totals == sorted(totals) and len(set(totals)) == 4
    assert total(everything, 4096, 1024) > totals[-1] > total(little, 4096, 64)
    plan = dict(explain.memory_plan(net, everything, 64, 64))
    numbers = sum(p.numel() for p in everything)
    assert plan["weights"] == 4 * numbers  # float32, the tied head counted once
    assert plan["gradients and Adam moments of what is trained, fp32"] == 12 * numbers
    half = dict(explain.memory_plan(net.to(torch.bfloat16), everything, 64, 64))
    assert half["weights"] == 2 * numbers
