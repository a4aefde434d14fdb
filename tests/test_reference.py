"""Reference log-probs: kept by content hash, damage noticed, and the exact drift measured right."""

import json

import pytest
import torch

from common import data, lora, reference
from common.tasks import synthetic


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_ALIGNMENT_CACHE", str(tmp_path))
    return tmp_path / "reference"


def test_computed_once(cache):
    calls = []
    value = torch.tensor([[1 / 3, -2e-17], [5e300, 0.1]], dtype=torch.float64)

    def compute():
        calls.append(1)
        return value

    assert torch.equal(reference.cached("key", (2, 2), compute), value)
    assert torch.equal(reference.cached("key", (2, 2), compute), value) and len(calls) == 1  # to the bit
    assert torch.equal(reference.cached("other", (2, 2), compute), value) and len(calls) == 2
    assert [path.suffix for path in cache.iterdir()] == [".json"] * 2  # no draft is left


def test_another_forward_pass_is_another_reference(cache, tmp_path, monkeypatch):
    value = torch.zeros(1, 2, dtype=torch.float64)
    reference.cached("key", (1, 2), lambda: value)
    changed = tmp_path / "gemma.py"
    changed.write_text(open(reference.gemma.__file__).read() + "# a fork")
    monkeypatch.setattr(reference.gemma, "__file__", str(changed))
    assert reference.cached("key", (1, 2), lambda: value + 1).all() and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("how", ["cut", "flipped", "shape", "not json", "hash"])
def test_damage_is_computed_anew_and_said(cache, capsys, how):
    value = torch.tensor([[1.5, 2.5]], dtype=torch.float64)
    reference.cached("key", (1, 2), lambda: value)
    (path,) = cache.iterdir()
    saved = json.loads(path.read_text())
    path.write_text({
        "cut": path.read_text()[:-9], "flipped": path.read_text().replace("1.5", "1.25"), "not json": "[]",
        "shape": json.dumps(saved | {"value": [1.5]}), "hash": json.dumps({"value": saved["value"]}),
    }[how])  # fmt: skip
    assert torch.equal(reference.cached("key", (1, 2), lambda: value), value)
    assert f"{path.name} is damaged" in capsys.readouterr().out
    assert json.loads(path.read_text()) == saved


def test_pair_logprobs_and_drift_against_whole_logits(tiny_model):
    net, tokenizer = tiny_model
    pairs, _ = data.encode_pairs(synthetic.records("safety", "val", 5), tokenizer, 128)
    torch.manual_seed(0)
    lora.inject(net, "policy", 4, 8)
    with torch.no_grad():
        for name, p in lora.adapter_parameters(net, "policy").items():
            if "lora_B" in name:
                p.normal_(std=0.05)
    cuts = [[3, 0], [1], [4, 2]]
    found = reference.pair_logprobs(net, pairs, cuts)
    entropy = kl = count = 0.0
    with torch.no_grad():
        for i, pair in enumerate(pairs):
            for j, side in enumerate(("chosen", "rejected")):
                ids, start = torch.tensor([pair[side]["ids"]]), pair["prompt_tokens"]
                log_p = torch.log_softmax(net(ids, use_cache=False).logits[0].double(), -1)[start - 1 : -1]
                right = log_p.gather(1, ids[0, start:, None]).sum().item()
                assert found[i, j].item() == pytest.approx(right, abs=1e-4)
                if side == "chosen":
                    with lora.using(net, None):
                        log_q = torch.log_softmax(net(ids, use_cache=False).logits[0].double(), -1)[start - 1 : -1]
                    entropy -= (log_p.exp() * log_p).sum().item()
                    kl += (log_p.exp() * (log_p - log_q)).sum().item()
                    count += len(log_p)
    moved = reference.drift(net, net, [pair["chosen"] for pair in pairs], cuts)
    assert moved == pytest.approx({"eval/entropy": entropy / count, "eval/kl": kl / count}, rel=1e-3)
    assert moved["eval/kl"] > 1e-3
    with lora.using(net, None):  # the policy is the reference
        assert reference.drift(net, net, [pair["chosen"] for pair in pairs], cuts)["eval/kl"] == 0
