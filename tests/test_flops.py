"""The formula of FLOPs equals what torch counts: on transformers' own model, and on ours with its backward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3ForCausalLM

from common import gemma, lora, losses
from common.runtime import flops, tiny

LENGTH = 48  # within the window, and one block of our attention


@pytest.fixture
def net():
    config = tiny.make_config()
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForCausalLM(config).requires_grad_(False)


def counted(run):
    """{operator: FLOPs} by torch's counter, products of attention (batched) apart from the others."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = {}
    for operator, number in counter.get_flop_counts()["Global"].items():
        name = "attention" if "bmm" in str(operator) else "linear"
        counts[name] = counts.get(name, 0) + number
    return counts


def tokens(count=LENGTH):
    return torch.arange(count) % 600


def attention(config):
    """FLOPs of attention's two products where every token is multiplied with every key."""
    return 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * LENGTH**2


def test_a_forward_is_what_torch_counts_on_transformers_model(net):
    """The eager attention there computes the whole square, of which a causal one needs (L + 1) / 2L."""
    with torch.no_grad():
        counts = counted(lambda: net(tokens()[None]))
    needed = counts["attention"] * (LENGTH + 1) / (2 * LENGTH)
    assert counts["attention"] == attention(net.config)
    assert flops.forward(net.config, [(0, LENGTH)], logits=LENGTH) == counts["linear"] + needed


def test_no_key_beyond_the_window_or_of_another_sequence():
    """Against a count of every pair of tokens."""
    config = tiny.make_config()
    config.sliding_window = 7
    heads = config.num_attention_heads * config.head_dim
    for start, end in ((0, 5), (0, 30), (9, 30), (3, 9)):
        keys = 0
        for kind in config.layer_types:
            window = 7 if kind == "sliding_attention" else end
            keys += sum(0 <= query - key < window for query in range(start, end) for key in range(end))
        without = flops.forward(config, [(0, 0)] * 3)
        linear = 2 * sum(flops.linears(config).values()) * config.num_hidden_layers * (end - start)
        assert flops.forward(config, [(start, end)]) - without == linear + 4 * heads * keys
    assert flops.shared_prompt(10, [3, 5]) == [(0, 10), (10, 13), (10, 15)]


@pytest.mark.parametrize("full", [False, True])
def test_a_backward_is_what_torch_counts_on_ours(net, full):
    """But for what ours does otherwise: attention in one whole block; the gradient of a frozen head in the forward; the
    logits of a trained one twice; and no gradient of what the lowest layer reads where the embedding is frozen."""
    config, head = net.config, net.lm_head.weight
    if full:
        net.requires_grad_(True)
    else:
        lora.inject(net, "policy", 4, 8, dropout=0.1)  # so that torch makes the products: it does not count addmm_
        net.train()
    adapter = 0 if full else sum(p.numel() for p in lora.adapter_parameters(net, "policy").values())
    out = []

    def forward():
        hidden = gemma.hidden_states(net, tokens(), [LENGTH])
        out.append(losses.token_logprobs(hidden, head, tokens()).sum())

    counts = counted(forward), counted(out[0].backward)
    square, logits = attention(config), 2 * config.hidden_size * config.vocab_size * LENGTH
    causal = square * (LENGTH + 1) / (2 * LENGTH)
    lowest = 0 if full else 2 * LENGTH * (flops.linears(config)["qkv"] + 3 * 4 * config.hidden_size)
    spans = [(0, LENGTH)]
    forward_formula = flops.forward(config, spans, LENGTH, adapter)
    backward_formula = flops.backward(config, spans, LENGTH, adapter, full)
    assert counts[0] == {"linear": forward_formula - causal + (0 if full else logits), "attention": square}
    again = logits if full else -logits
    assert counts[1] == {"linear": backward_formula - 2 * causal + again - lowest, "attention": 2 * square}
