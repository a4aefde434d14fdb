"""Full fine-tuning in bf16 over fp32 masters, and the same numbers on a GPU where there is one."""

import pytest
import torch

from common import lora, losses, model
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


def test_full_fine_tuning_in_bf16_keeps_fp32_masters_and_their_gradients():
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
