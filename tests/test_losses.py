"""token_logprobs against fp64 autograd on whole logits: values, gradients, both heads, every chunking."""

import pytest
import torch

from common.losses import entropy, entropy_and_kl, token_logprobs, token_logprobs_and_hits

N, D, V = 37, 24, 1024


def inputs(dtype=torch.float32, sharp=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) * sharp).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    upstream = torch.randn(N, generator=generator)
    return hidden, weight, targets, upstream


def exact(hidden, weight, targets, upstream, temperature):
    """fp64 on the same numbers: log-probs, d hidden, d weight."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logprobs = torch.log_softmax(h @ w.T / temperature, -1).gather(1, targets[:, None])[:, 0]
    (logprobs * upstream).sum().backward()
    return logprobs.detach(), h.grad, w.grad


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [None, 1, 16, 1000])
@pytest.mark.parametrize("trainable", [False, True])
def test_values_and_gradients_equal_fp64(temperature, chunk, trainable):
    hidden, weight, targets, upstream = inputs()
    weight.requires_grad_(trainable)
    logprobs = token_logprobs(hidden, weight, targets, temperature, chunk)
    (logprobs * upstream).sum().backward()
    right, grad_hidden, grad_weight = exact(hidden, weight, targets, upstream, temperature)
    assert logprobs.dtype == torch.float32
    assert (logprobs.double() - right).abs().max() < 1e-5
    assert relative(hidden.grad, grad_hidden) < 1e-4
    if trainable:
        assert relative(weight.grad, grad_weight) < 1e-4


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("sharp", [0.3, 3.0])  # an unsure and a very sure model
def test_bf16_is_as_good_as_the_plain_path(trainable, sharp):
    hidden, weight, targets, upstream = inputs(torch.bfloat16, sharp)
    weight.requires_grad_(trainable)
    targets = (hidden.detach() @ weight.detach().T).argmax(-1)  # the sure case: p close to 1 at the target
    right, grad_hidden, _ = exact(hidden, weight, targets, upstream, 1.0)
    plain = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]
    (plain * upstream).sum().backward()
    plain_error = (plain - right).abs().mean(), relative(hidden.grad, grad_hidden)
    hidden.grad = None
    ours = token_logprobs(hidden, weight, targets, chunk=16)
    (ours * upstream).sum().backward()
    assert (ours - right).abs().mean() <= plain_error[0] * 1.01
    # the gradient made in the forward is rounded once more when it is scaled: 0.0029 against 0.0027 relative (unsure)
    assert relative(hidden.grad, grad_hidden) <= plain_error[1] * 1.1


def test_hits_are_the_argmax():
    hidden, weight, targets, _ = inputs()
    top = (hidden @ weight.T).argmax(-1)
    targets = torch.where(torch.arange(N) % 2 == 0, top, targets)
    _, hits = token_logprobs_and_hits(hidden, weight, targets)
    assert torch.equal(hits, targets == top)


def test_runs_under_autocast_in_the_autocast_dtype():
    hidden, weight, targets, upstream = inputs()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs = token_logprobs(hidden, weight, targets)
    (logprobs * upstream).sum().backward()
    right, grad_hidden, grad_weight = exact(hidden, weight, targets, upstream, 1.0)
    assert logprobs.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert relative(hidden.grad, grad_hidden) < 2e-2 and relative(weight.grad, grad_weight) < 2e-2
    assert (logprobs.double() - right).abs().max() < 0.3  # bf16 products, not an exact path


def test_no_gradient_is_made_where_none_is_wanted():
    hidden, weight, targets, _ = inputs()
    with torch.no_grad():
        assert not token_logprobs(hidden, weight, targets).requires_grad
    assert not token_logprobs(hidden.detach(), weight, targets).requires_grad


def test_the_logits_never_exist_at_once():
    """Peak of allocations while scoring: far below one (N, V) tensor."""
    rows, vocabulary = 2048, 16384
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(vocabulary, 8)
    targets = torch.zeros(rows, dtype=torch.long)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        token_logprobs(hidden, weight, targets, chunk=64).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 64 * vocabulary * 4 < rows * vocabulary * 4 / 16


def test_shapes_are_checked():
    hidden, weight, targets, _ = inputs()
    with pytest.raises(AssertionError):
        token_logprobs(hidden, weight, targets[:-1])


@pytest.mark.parametrize("chunk", [None, 5])
def test_entropy_and_kl_are_exact(chunk):
    hidden, weight, _, _ = inputs()
    other = hidden.detach() + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    entropy, kl = entropy_and_kl(hidden.detach(), other, weight, chunk)
    log_p, log_q = (torch.log_softmax(h.detach().double() @ weight.double().T, -1) for h in (hidden, other))
    assert (entropy - -(log_p.exp() * log_p).sum(-1)).abs().max() < 1e-4
    assert (kl - (log_p.exp() * (log_p - log_q)).sum(-1)).abs().max() < 1e-4 and (kl > 0.01).any()
    assert not entropy_and_kl(hidden.detach(), hidden.detach(), weight, chunk)[1].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trainable", [False, True])
def test_entropy_and_its_gradient_equal_autograd_on_whole_logits(temperature, trainable):
    hidden, weight, _, upstream = inputs()
    weight.requires_grad_(trainable)
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    log_p = torch.log_softmax(h @ w.T / temperature, -1)
    exact_entropy = -(log_p.exp() * log_p).sum(-1)
    (exact_entropy * upstream).sum().backward()
    for chunk in (1, 5, None):
        hidden.grad = weight.grad = None
        found = entropy(hidden, weight, temperature, chunk)
        assert found.shape == (N,) and found.dtype == torch.float32
        assert torch.allclose(found.double(), exact_entropy, atol=1e-5)
        (found * upstream).sum().backward()
        assert relative(hidden.grad, h.grad) < 1e-5
        assert not trainable or relative(weight.grad, w.grad) < 1e-5
    assert entropy(hidden[:0], weight).shape == (0,)


def test_entropy_of_known_distributions():
    flat = entropy(torch.zeros(1, 4), torch.randn(50, 4))
    sure = entropy(torch.full((1, 4), 50.0), torch.cat([torch.ones(1, 4), -torch.ones(49, 4)]))
    assert flat.item() == pytest.approx(torch.tensor(50.0).log().item(), rel=1e-6) and sure.item() == 0
