"""Our forward pass against transformers' own, and the promise that sequences laid end to end cannot see each other."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from common import gemma, model


def random_gemma(seed=0, **changes):
    """A small Gemma 3 with large random weights, so that differences show; window 16, both kinds of layer."""
    settings = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "sliding_window": 16,
        "query_pre_attn_scalar": 12,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(seed)
    net = Gemma3ForCausalLM(Gemma3TextConfig(**settings | changes)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 0.1))
    return net


LENGTHS = [23, 1, 40, 150, 128, 7]  # shorter and longer than the window and than a block of queries


def sequences(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(300, (n,), generator=generator) for n in LENGTHS]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_transformers_across_the_window(groups):
    net, rows = random_gemma(num_key_value_heads=groups), sequences()
    with torch.no_grad():
        ours = gemma.hidden_states(net, torch.cat(rows), LENGTHS).split(LENGTHS)
        for one, row in zip(ours, rows):
            theirs = net.model(row[None], use_cache=False).last_hidden_state[0]
            assert (one - theirs).abs().max() < 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_equal_transformers(frozen):
    """Of every weight in full fine-tuning; of the embedding alone when all norms and linears are frozen."""
    net, rows = random_gemma(), sequences()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not frozen or "embed" in name)
    weights = torch.randn(sum(LENGTHS), 48, generator=torch.Generator().manual_seed(2))

    def gradients(hidden):
        net.zero_grad()
        (hidden * weights).sum().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    ours = gradients(gemma.hidden_states(net, torch.cat(rows), LENGTHS))
    theirs = gradients(torch.cat([net.model(row[None], use_cache=False).last_hidden_state[0] for row in rows]))
    assert ours.keys() == theirs.keys() and len(ours) == (1 if frozen else len(list(net.parameters())))
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() < 1e-4 * grad.norm(), name


def test_the_padded_path_equals_the_other():
    """What runs on a GPU, run here: the same numbers, windows and gradients."""
    generator = torch.Generator().manual_seed(3)
    alone, families = [None] * len(LENGTHS), [None, 0, 0, None, 3, 3]
    for window, parents in ((None, alone), (16, alone), (None, families), (16, families)):
        q, k, v = (torch.randn(sum(LENGTHS), h, 8, generator=generator).requires_grad_() for h in (4, 2, 2))
        outs, grads = [], []
        padded = gemma._padded(LENGTHS, parents, {None, 16}, "cpu")
        for attend, layout in ((gemma._attend_each, (LENGTHS, parents)), (gemma._attend_padded, padded)):
            out = attend(q, k, v, layout, 0.3, window)
            outs.append(out)
            grads.append(torch.autograd.grad((out * torch.arange(8)).sum(), (q, k, v)))
        assert (outs[0] - outs[1]).abs().max() < 1e-5
        for a, b in zip(*grads):
            assert (a - b).abs().max() < 1e-4


def test_neighbours_are_isolated():
    """Changing one sequence of a pack leaves every other bitwise as it was, values and gradients."""
    net, rows = random_gemma(), sequences()
    net.requires_grad_(False)
    changed = [row if i != 2 else (row + 1) % 300 for i, row in enumerate(rows)]
    before = gemma.hidden_states(net, torch.cat(rows), LENGTHS).split(LENGTHS)
    after = gemma.hidden_states(net, torch.cat(changed), LENGTHS).split(LENGTHS)
    same = [torch.equal(a, b) for a, b in zip(before, after)]
    assert same == [True, True, False, True, True, True]


def test_packed_equals_alone_and_order_does_not_matter():
    net, rows = random_gemma(), sequences()
    with torch.no_grad():
        packed = gemma.hidden_states(net, torch.cat(rows), LENGTHS).split(LENGTHS)
        reverse = gemma.hidden_states(net, torch.cat(rows[::-1]), LENGTHS[::-1]).split(LENGTHS[::-1])
        for one, other, row in zip(packed, reverse[::-1], rows):
            alone = gemma.hidden_states(net, row, [len(row)])
            assert (one - alone).abs().max() < 2e-5 and (one - other).abs().max() < 2e-5


def test_sequence_logprobs_against_whole_logits_and_padding():
    net, rows = random_gemma(), sequences()
    width = max(LENGTHS)
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width - 1)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, len(row) // 2 : len(row) - 1] = 1  # row 1 has a single token and so no target at all
    logprobs = model.sequence_logprobs(net, tokens, mask, temperature=0.8)
    with torch.no_grad():
        for i, row in enumerate(rows):
            full = torch.log_softmax(net(row[None], use_cache=False).logits[0] / 0.8, -1)
            right = full[:-1].gather(1, row[1:, None])[:, 0] * mask[i, : len(row) - 1]
            assert (logprobs[i, : len(row) - 1] - right).abs().max() < 1e-4 if len(row) > 1 else True
            assert not logprobs[i, len(row) - 1 :].any()
    wider = torch.cat([tokens, torch.full((len(rows), 9), 7)], 1)
    more = model.sequence_logprobs(net, wider, torch.cat([mask, torch.zeros(len(rows), 9)], 1), temperature=0.8)
    assert torch.equal(more[:, : width - 1], logprobs)


def family():
    """Rows in groups that share a prompt: (tokens, mask) with answers of 9, 30, 1 and 30 tokens, and a lone row."""
    generator = torch.Generator().manual_seed(4)

    def draw(n):
        return torch.randint(300, (n,), generator=generator)

    first, second = draw(140), draw(5)
    rows = [(first, 9), (first, 30), (first, 1), (first, 30), (second, 30), (second, 9), (draw(20), 4)]
    tokens, mask = torch.zeros(len(rows), 180, dtype=torch.long), torch.zeros(len(rows), 179)
    for i, (prompt, answer) in enumerate(rows):
        tokens[i, : len(prompt) + answer] = torch.cat([prompt, draw(answer)])
        mask[i, len(prompt) - 1 : len(prompt) + answer - 1] = 1
    return tokens, mask


def test_a_shared_prompt_is_computed_once():
    tokens, mask = family()
    ends = mask.argmax(1) + mask.sum(1)
    flat, sizes, parents, index = gemma.share_prompts(tokens, (mask.argmax(1) + 1).int().tolist(), ends.int().tolist())
    assert sizes == [140, 8, 29, 29, 5, 29, 8, 23]  # a last token predicts nothing and is not computed
    assert parents == [None, 0, 0, 0, None, 4, 4, None]
    for row in range(len(tokens)):
        end = int(ends[row])
        assert torch.equal(flat[index[row, :end]], tokens[row, :end])


def test_a_shared_prompt_changes_no_value_and_no_gradient():
    """Against each row alone, across the window; weights random per token, so that no error can cancel."""
    net, (tokens, mask) = random_gemma(), family()
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(5)) * mask

    def gradients(split):
        net.zero_grad()
        logprobs = torch.cat([model.sequence_logprobs(net, tokens[i], mask[i], 0.8) for i in split])
        (logprobs * weights).sum().backward()
        return logprobs.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}

    together, ours = gradients([slice(None)])
    alone, theirs = gradients([slice(i, i + 1) for i in range(len(tokens))])
    assert (together - alone).abs().max() < 1e-4
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() < 1e-4 * grad.norm(), name


def test_nothing_supervised_is_zero_and_no_forward():
    tokens = torch.ones(2, 5, dtype=torch.long)
    assert not model.sequence_logprobs(None, tokens, torch.zeros(2, 4)).any()
