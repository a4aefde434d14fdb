"""Full fine-tuning in bf16 over fp32 masters, and the same numbers on a GPU where there is one."""

import json

import pytest
import torch

from common import chat, data, lora, losses, model, tasks
from common.runtime import base
from tests.inputs import random_adapter
from tests.test_gemma import LENGTHS, random_gemma, sequences
from tests.test_losses import exact, inputs, relative

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def batch():
    rows = sequences()
    tokens, mask = torch.zeros(len(rows), max(LENGTHS), dtype=torch.long), torch.zeros(len(rows), max(LENGTHS) - 1)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row) - 1] = row, 1
    return tokens, mask


def gradient(net, context, device="cpu"):
    tokens, mask = (t.to(device) for t in batch())
    with context:
        loss = -(model.sequence_logprobs(net, tokens, mask).sum() / mask.sum())
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float().cpu() for p in net.parameters() if p.grad is not None])


def test_full_fine_tuning_in_bf16_keeps_fp32_masters():
    right_loss, right = gradient(random_gemma(), model.compute_context(torch.device("cpu"), torch.float32, True))
    net = random_gemma()
    loss, grad = gradient(net, model.compute_context(torch.device("cpu"), torch.bfloat16, True))
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in net.parameters())
    assert loss == pytest.approx(right_loss, rel=2e-2)
    assert torch.cosine_similarity(grad, right, dim=0) > 0.98


def test_a_small_step_moves_every_kind_of_weight():
    """What pure bf16 weights would lose: a step of 1e-5 relative to weights of 0.3."""
    for net, parameters in ((random_gemma(), None), (random_gemma().to(torch.bfloat16), "policy")):
        if parameters:
            lora.inject(net, "policy", 4, 8)
        trained = [p for p in net.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        gradient(net, model.compute_context(torch.device("cpu"), torch.bfloat16, parameters is None))
        torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0).step()
        moved = [not torch.equal(a, b) for a, b in zip(before, trained) if b.grad.any()]
        assert moved and all(moved)


def test_mean_entropy_and_kl_against_whole_logits(tiny_model):
    net, tokenizer = tiny_model
    pairs, _ = data.encode_pairs(tasks.records("safety", "val", 5), tokenizer, 128)
    random_adapter(net, "policy", 0, std=0.05)
    examples, micro_batches = [pair["chosen"] for pair in pairs], [[3, 0], [1], [4, 2]]
    entropy = kl = count = 0.0
    with torch.no_grad():
        for pair, example in zip(pairs, examples):
            ids, start = torch.tensor([example["ids"]]), pair["prompt_tokens"]
            log_p = torch.log_softmax(net(ids, use_cache=False).logits[0].double(), -1)[start - 1 : -1]
            with lora.using(net, None):
                log_q = torch.log_softmax(net(ids, use_cache=False).logits[0].double(), -1)[start - 1 : -1]
            entropy -= (log_p.exp() * log_p).sum().item()
            kl += (log_p.exp() * (log_p - log_q)).sum().item()
            count += len(log_p)
    moved = model.mean_entropy_and_kl(net, net, examples, micro_batches)
    assert moved == pytest.approx({"eval/entropy": entropy / count, "eval/kl": kl / count}, rel=1e-3)
    assert moved["eval/kl"] > 1e-3
    with lora.using(net, None):  # the policy is the reference
        assert model.mean_entropy_and_kl(net, net, examples, micro_batches)["eval/kl"] == 0


NAMED = {  # as in the tokenizer_config.json that Gemma 3 was published with, written by transformers 4
    "extra_special_tokens": {"boi_token": "<start_of_turn>", "eoi_token": "<end_of_turn>"},
    "boi_token": "<start_of_turn>",
    "eoi_token": "<end_of_turn>",
    "tokenizer_class": "GemmaTokenizer",
    "added_tokens_decoder": {"2": {"content": "<bos>", "special": True}},
}


@pytest.mark.parametrize("changes", [{}, NAMED], ids=["of version 5", "of version 4"])
def test_tokenizer_files_are_in_the_words_of_transformers_4(folder, tmp_path, changes):
    """B1: 4.57 knows no class TokenizersBackend, and extra_special_tokens only as a dict."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    if changes:
        settings = {k: v for k, v in settings.items() if k not in ("backend", "extra_special_tokens")} | changes
    path.write_text(json.dumps(settings))
    tokenizer = base.load_tokenizer(folder)
    for name in ("once", "twice"):
        model.save_tokenizer(tokenizer, tmp_path / name)
        tokenizer = base.load_tokenizer(tmp_path / name)
    written = json.loads((tmp_path / "once" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not written.keys() & {"backend", "is_local", "local_files_only"}
    assert isinstance(written.get("extra_special_tokens", {}), dict)
    assert (written.get("additional_special_tokens") == ["<start_of_turn>", "<end_of_turn>"]) != bool(changes)
    files = {path.name: path.read_text() for path in (tmp_path / "once").iterdir()}
    assert files == {path.name: path.read_text() for path in (tmp_path / "twice").iterdir()}
    assert files["chat_template.jinja"] == chat.TEMPLATE
    assert base.tokenizer_fingerprint(tmp_path / "once") == base.tokenizer_fingerprint(folder)


@pytest.mark.cuda
@CUDA
@pytest.mark.parametrize("trainable", [False, True])
def test_token_logprobs_on_cuda(trainable):
    hidden, weight, targets, upstream = inputs()
    moved = hidden.detach().cuda().requires_grad_()
    logprobs = losses.token_logprobs(moved, weight.cuda().requires_grad_(trainable), targets.cuda(), 0.7)
    (logprobs * upstream.cuda()).sum().backward()
    right, grad, _ = exact(hidden, weight, targets, upstream, 0.7)
    assert (logprobs.cpu().double() - right).abs().max() < 1e-4
    assert relative(moved.grad.cpu(), grad) < 1e-3


@pytest.mark.cuda
@CUDA
@pytest.mark.parametrize("window", [16, 512])
def test_forward_and_gradients_on_cuda_equal_the_cpu(window):
    right_loss, right = gradient(
        random_gemma(sliding_window=window), model.compute_context(torch.device("cpu"), None, 0)
    )
    net = random_gemma(sliding_window=window).cuda()
    loss, grad = gradient(net, model.compute_context(torch.device("cuda"), None, 0), "cuda")
    assert loss == pytest.approx(right_loss, rel=1e-4)
    assert (grad - right).norm() < 1e-3 * right.norm()
