"""Preference pairs: the reference's log-probs against whole logits, and kept for one forward pass only."""

import pytest
import torch

from common import data, gemma, model, pairs, tasks
from tests import inputs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


def test_reference_logprobs_against_whole_logits(tiny_model, folder):
    net, tokenizer = tiny_model
    encoded, _ = data.encode_pairs(tasks.records("safety", "val", 5), tokenizer, 128)
    inputs.random_adapter(net, "policy", 0, std=0.05)
    found = pairs.reference_logprobs(net, encoded, [[3, 0], [1], [4, 2]], "key")
    assert found.shape == (5, 2) and found.dtype == torch.float64
    with torch.no_grad():
        for i, pair in enumerate(encoded):
            for j, side in enumerate(("chosen", "rejected")):
                ids, start = torch.tensor([pair[side]["ids"]]), pair["prompt_tokens"]
                log_p = torch.log_softmax(net(ids, use_cache=False).logits[0].double(), -1)[start - 1 : -1]
                right = log_p.gather(1, ids[0, start:, None]).sum().item()
                assert found[i, j].item() == pytest.approx(right, abs=1e-4)


def test_another_forward_pass_is_another_reference(tiny_model, folder, tmp_path, monkeypatch):
    net, tokenizer = tiny_model
    encoded, _ = data.encode_pairs(tasks.records("safety", "val", 1), tokenizer, 128)
    first = pairs.reference_logprobs(net, encoded, [[0]], "key")
    monkeypatch.setattr(model, "sequence_logprobs", lambda net, tokens, mask: torch.ones_like(mask))
    assert torch.equal(pairs.reference_logprobs(net, encoded, [[0]], "key"), first) and len(list(folder.iterdir())) == 1
    changed = tmp_path / "gemma.py"
    changed.write_text(open(gemma.__file__).read() + "# a fork")
    monkeypatch.setattr(gemma, "__file__", str(changed))
    answers = [[float(sum(encoded[0][side]["mask"])) for side in ("chosen", "rejected")]]
    assert pairs.reference_logprobs(net, encoded, [[0]], "key").tolist() == answers
    assert len(list(folder.iterdir())) == 2
