"""The decode step against the whole forward pass: windows, ragged rows, rows that come and go, adapters, dtypes."""

import pytest
import torch

from common import gemma, lora, model
from common.decoder import Decoder
from tests.test_gemma import random_gemma
from tests.test_lora import adapted

pytestmark = pytest.mark.usefixtures("one_thread")


def ids(n, seed):
    return torch.randint(300, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole(net, text):
    """Hidden states of one row by the trainer's forward."""
    with torch.no_grad():
        return gemma.hidden_states(net, torch.tensor(text), [len(text)])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_steps_equal_the_whole_forward_across_the_window(groups):
    """Prompts shorter and longer than the window of 16; every step of every row, and the forked copies agree."""
    net, prompts = random_gemma(num_key_value_heads=groups), [ids(5, 0), ids(40, 1), ids(15, 2)]
    dec, texts = Decoder(net, 4, 64), [prompts[0], prompts[1], prompts[1], prompts[2]]
    hidden = dec.prefill(prompts, [1, 2, 1])
    assert dec.lengths == [5, 40, 40, 15] and torch.equal(hidden[1], hidden[2])
    for step in range(24):
        for row, text in enumerate(texts):
            right = whole(net, text)[-1]
            assert (hidden[row] - right).abs().max() < 2e-5 * right.abs().max(), (step, row)
        fresh = ids(4, 100 + step)  # the two copies of a prompt go different ways
        texts = [[*text, token] for text, token in zip(texts, fresh)]
        hidden = dec.step(torch.tensor(fresh))


def test_rows_come_and_go_without_touching_the_others():
    net = random_gemma()
    texts = {name: ids(n, seed) for seed, (name, n) in enumerate({"a": 7, "b": 30, "c": 21, "d": 16, "e": 3}.items())}
    dec, rows = Decoder(net, 4, 64), ["a", "b", "c", "d"]
    dec.prefill([texts[name] for name in rows], [1] * 4)

    def advance(steps, seed):
        for step in range(steps):
            fresh = ids(len(rows), seed + step)
            for name, token in zip(rows, fresh):
                texts[name].append(token)
            hidden = dec.step(torch.tensor(fresh))
        for name, found in zip(rows, hidden):
            assert (found - whole(net, texts[name])[-1]).abs().max() < 1e-4, name

    advance(3, 10)
    order = dec.keep([1, 3])
    assert order == [3, 1], "the hole in front is filled by the last row, the other stays"
    rows = [rows[i] for i in order]
    assert dec.lengths == [len(texts[name]) for name in rows]
    advance(5, 20)
    dec.prefill([texts["e"]], [1])
    rows.append("e")
    advance(20, 30)  # beyond the window for all of them
    assert dec.keep([]) == [] and dec.lengths == []
    rows = ["e"]
    dec.prefill([texts["e"]], [1])  # over the slots of others
    advance(2, 60)


def test_select_copies_no_more_rows_than_have_left():
    dec = Decoder(random_gemma(), 6, 8)
    dec.prefill([ids(3, i) for i in range(6)], [1] * 6)
    before = dec.keys.clone()
    order = dec.keep({0, 2, 4, 5})
    assert order == [0, 4, 2, 5] and dec.keep(range(4)) == [0, 1, 2, 3]
    assert torch.equal(dec.keys[:, :4], before[:, order])


def test_no_slot_and_no_row_left_are_refused():
    dec = Decoder(random_gemma(), 1, 4)
    dec.prefill([ids(3, 0)], [1])
    dec.step(torch.tensor([1]))
    with pytest.raises(AssertionError):
        dec.step(torch.tensor([1]))
    with pytest.raises(AssertionError):
        dec.prefill([ids(3, 0)], [1])
    with pytest.raises(AssertionError):
        Decoder(random_gemma(), 1, 4).prefill([ids(5, 0)], [1])


@pytest.mark.parametrize("targets", [["k_proj", "up_proj", "down_proj"], list(lora.TARGETS)])
def test_the_active_adapter_merged_and_beside_the_weights(targets):
    net, text = adapted(targets=targets), ids(20, 0)
    lora.inject(net, "other", 2, 2)
    lora.use(net, "policy")
    before = {name: p.clone() for name, p in net.named_parameters()}
    seen = []
    for name in ("policy", "other", None):
        with lora.using(net, name):
            right = whole(net, text)[-1]
            for merge in (True, False):
                dec = Decoder(net, 1, 32, merge)
                dec.prefill([text[:-1]], [1])
                hidden = dec.step(torch.tensor(text[-1:]))[0]
                assert (hidden - right).abs().max() < 1e-5 * right.abs().max(), (name, merge)
            seen.append(right)
    assert (seen[0] - seen[2]).abs().max() > 0.1
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())


def test_a_4_bit_base_is_dequantised_once(tiny_model):
    net, _ = tiny_model
    model.quantise(net)
    torch.manual_seed(0)
    lora.inject(net, "policy", 4, 8)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(net, "policy").values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    text = ids(12, 0)
    for merge in (True, False):
        dec = Decoder(net, 1, 16, merge)
        assert (dec.prefill([text], [1])[0] - whole(net, text)[-1]).abs().max() < 1e-4, merge
        assert all(layer.products["qkv"][0].dtype == torch.float32 for layer in dec.layers)


def test_fp32_masters_decode_in_the_dtype_of_autocast():
    net, text = random_gemma(), ids(20, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dec, right = Decoder(net, 1, 32), whole(net, text)[-1]
        dec.prefill([text[:-1]], [1])
        hidden = dec.step(torch.tensor(text[-1:]))
    assert dec.head.dtype == hidden.dtype == right.dtype == torch.bfloat16
    assert net.lm_head.weight.dtype == torch.float32
    exact = whole(net, text)[-1]
    assert (hidden[0] - exact).norm() < 1.5 * (right - exact).norm() + 1e-3  # as near as the trainer's own forward
