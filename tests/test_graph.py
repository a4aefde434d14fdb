"""The decoder of fixed shapes against the plain one: unrecorded, recorded and replayed by torch's tracer, on CUDA."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.graph import SLOTS, GraphDecoder
from common import rollouts
from common.decoder import Decoder
from tests.test_decoder import ids
from tests.test_gemma import random_gemma

pytestmark = pytest.mark.usefixtures("one_thread")


class Traced:
    """What a CUDA graph does: the kernels of one run, again, on what the same tensors hold now."""

    def __init__(self, decoder, tokens, at, slots):
        self.tokens, self.at = tokens, at
        self.run = make_fx(lambda tokens, at: decoder._fixed_step(tokens, at, slots))(tokens, at)
        self.hidden, self.replays = torch.empty(len(tokens), decoder.head.shape[1]), 0

    def replay(self):
        self.hidden.copy_(self.run(self.tokens, self.at))
        self.replays += 1


def traced(decoder, tokens, at, slots):
    graph = Traced(decoder, tokens, at, slots)
    return graph.hidden, graph


@pytest.mark.parametrize("capture", [None, traced], ids=["unrecorded", "replayed"])
def test_steps_equal_the_plain_decoder(monkeypatch, capture):
    """Ragged rows, beyond the window of 16 and beyond the slots of one graph; rows leave and others come."""
    if capture:
        monkeypatch.setattr(GraphDecoder, "_capture", capture)
    net = random_gemma()
    plain, fixed = Decoder(net, 6, 2 * SLOTS), GraphDecoder(net, 6, 2 * SLOTS)

    def both(method, *args):
        results = [getattr(decoder, method)(*args) for decoder in (plain, fixed)]
        if method == "keep":
            assert results[0] == results[1]
        else:
            assert (results[0] - results[1]).abs().max() < 1e-5 * results[0].abs().max()

    both("prefill", [ids(SLOTS - 5, 0), ids(7, 1), ids(20, 2)], [1, 2, 2])
    for step in range(10):
        both("step", torch.tensor(ids(5, 10 + step)))
    both("keep", [1, 3])
    for step in range(3):
        both("step", torch.tensor(ids(2, 30 + step)))
    both("prefill", [ids(30, 3)], [1])
    for step in range(3):
        both("step", torch.tensor(ids(3, 40 + step)))
    assert plain.lengths == fixed.lengths
    assert set(fixed.recorded) == {(6, SLOTS), (6, 2 * SLOTS), (2, SLOTS), (4, SLOTS)}
    if capture:
        assert sum(step.graph.replays for step in fixed.recorded.values()) == 16


def test_samples_are_the_same(micro_model):
    net, _ = micro_model
    how = {"group_size": 3, "max_new_tokens": 12, "uniforms": rollouts.uniforms(0, 0, range(6), 12), "stop": range(100)}
    plain, fixed = (
        rollouts.sample(net, [ids(9, 0), ids(4, 1)], decoder_class=kind, **how) for kind in (Decoder, GraphDecoder)
    )
    assert plain["completions"] == fixed["completions"] and len({len(row) for row in plain["completions"]}) > 1
    assert (plain["sampled_logprobs"] - fixed["sampled_logprobs"]).abs().max() < 1e-5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_graph_on_cuda_equals_the_plain_decoder():
    net = random_gemma().cuda()
    plain, fixed = Decoder(net, 6, 2 * SLOTS), GraphDecoder(net, 6, 2 * SLOTS)
    for decoder in (plain, fixed):
        decoder.prefill([ids(SLOTS - 5, 0), ids(7, 1)], [1, 2])
    for step in range(10):
        tokens = torch.tensor(ids(3, step), device="cuda")
        right, hidden = plain.step(tokens), fixed.step(tokens)
        assert (right - hidden).abs().max() < 1e-4 * right.abs().max()
