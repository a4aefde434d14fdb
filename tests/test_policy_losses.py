"""Policy, value and KL losses: numbers of other code bases, exact enumeration, TRL's own GRPO loss."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from common import losses


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


# what verl, OpenRLHF and torchtune give on these numbers
MASK = f64([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
LOGPROBS = f64([[-1.0, -0.5, -2.0, -0.7, -0.1], [-0.3, -1.2, -0.8, -9, -9], [-2.5, -0.05, -9, -9, -9]])
OLD = f64([[-1.2, -0.5, -1.5, -0.9, -0.6], [-0.5, -0.9, -0.8, -9, -9], [-2.0, -0.4, -9, -9, -9]])
REFERENCE = f64([[-1.1, -0.7, -1.7, -0.7, -0.3], [-0.4, -1.0, -1.1, -9, -9], [-2.2, -0.2, -9, -9, -9]])
ADVANTAGES = f64([[1.0] * 5, [-1.0] * 5, [0.5] * 5])
VALUES = f64([[0.1, 0.2, 0.3, 0.4, 0.5], [-0.2, 0.0, 0.2, 0, 0], [0.6, -0.1, 0, 0, 0]])
NEW_VALUES = f64([[0.5, 0.1, 0.3, 0.9, 0.2], [-0.6, 0.1, 0.2, 0, 0], [0.6, 0.3, 0, 0, 0]])
RETURNS = f64(
    [
        [0.8511864213, 0.8891934304, 0.9402907287, 0.9893575, 1.015],
        [-0.4459297788, -0.4794575, -0.515, 0, 0],
        [1.875455, 2.01, 0, 0, 0],
    ]
)


# the line that a script changes: DAPO, GRPO, Dr. GRPO
def token_mean(loss, mask):
    return (loss * mask).sum() / mask.sum()


def sequence_mean(loss, mask):
    return ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / len(mask)


def constant(loss, mask, length=5):
    return (loss * mask).sum() / (len(mask) * length)


def test_policy_goldens():
    loss = losses.policy_loss(LOGPROBS, OLD, ADVANTAGES)
    assert loss.shape == MASK.shape
    assert token_mean(loss, MASK).item() == pytest.approx(-0.308839323140878, abs=1e-12)
    assert sequence_mean(loss, MASK).item() == pytest.approx(-0.16193484772232233, abs=1e-9)  # theirs adds 1e-8
    higher = losses.policy_loss(LOGPROBS, OLD, ADVANTAGES, clip_high=0.28)
    assert token_mean(higher, MASK).item() == pytest.approx(-0.325119874772912, abs=1e-12)
    clipped = losses.clipped(LOGPROBS, OLD, ADVANTAGES)
    assert clipped.dtype == torch.bool and token_mean(clipped, MASK).item() == 0.5


def test_dual_clip_and_gspo_goldens():
    dual = losses.dual_clip_loss(LOGPROBS, OLD - 1.5, ADVANTAGES)
    assert token_mean(dual, MASK).item() == pytest.approx(0.18, abs=1e-12)
    plain = losses.policy_loss(LOGPROBS, OLD - 1.5, ADVANTAGES)
    assert torch.equal(dual[ADVANTAGES > 0], plain[ADVANTAGES > 0])
    gspo = losses.gspo_loss(LOGPROBS, OLD, ADVANTAGES, MASK, 0.2, 0.2)
    assert sequence_mean(gspo, MASK).item() == pytest.approx(-0.19331423636511666, abs=1e-9)  # theirs adds 1e-8


def test_value_goldens():
    clipped = losses.value_loss(NEW_VALUES, VALUES, RETURNS)
    assert token_mean(clipped, MASK).item() == pytest.approx(0.4149024153055631, abs=1e-9)
    unclipped = losses.value_loss(NEW_VALUES, VALUES, RETURNS, math.inf)
    assert token_mean(unclipped, MASK).item() == pytest.approx(0.362497961879939, abs=1e-9)


def test_a_value_beyond_the_clip_on_the_wrong_side_still_learns():
    values = f64([[1.0, -1.0]]).requires_grad_()  # the rollout said 0; R = 2: the first is clipped, the second not
    losses.value_loss(values, torch.zeros(1, 2), f64([[2.0, 2.0]])).sum().backward()
    assert values.grad.tolist() == [[0.0, -3.0]]


KL = {
    "k1": [[-0.1, 0.2, 0.2, -0.2, -0.3], [-0.1, 0.1, 0.3, 0, 0], [0.2, -0.2, 0, 0, 0]],
    "k2": [[0.005, 0.02, 0.02, 0.02, 0.045], [0.005, 0.005, 0.045, 0, 0], [0.02, 0.02, 0, 0, 0]],
    "k3": [
        [0.0051709181, 0.0187307531, 0.0187307531, 0.0214027582, 0.0498588076],
        [0.0051709181, 0.004837418, 0.0408182207, 0, 0],
        [0.0187307531, 0.0214027582, 0, 0, 0],
    ],
}


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_goldens(kind):
    assert torch.allclose(losses.kl_estimate(OLD, REFERENCE, kind), f64(KL[kind]), rtol=0, atol=1e-10)


def test_k3_is_precise_and_not_negative_near_zero():
    d = torch.tensor([1e-4, -1e-4, 3e-3])
    k3 = losses.kl_estimate(d, torch.zeros(3))
    exact = torch.expm1(-d.double()) + d.double()
    assert (k3 >= 0).all() and torch.allclose(k3.double(), exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("lost", [-1000.0, 1000.0])
def test_far_apart_is_finite_in_value_and_gradient(lost):
    logprobs = torch.full((1, 2), lost, requires_grad=True)
    zero, one = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    total = losses.policy_loss(logprobs, zero, one) + losses.dual_clip_loss(logprobs, zero, one)
    total = total + losses.gspo_loss(logprobs, zero, one, one.abs()) + losses.cispo_loss(logprobs, zero, one)
    total = total + losses.kl_loss_unbiased(logprobs, zero, zero)
    for kind in KL:
        total = total + losses.kl_estimate(logprobs, zero, kind)
    total.sum().backward()
    assert torch.isfinite(total).all() and torch.isfinite(logprobs.grad).all()


# ---------------------------------------------------------------- gradients


def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def test_kl_estimators_by_enumeration():
    """Sum over all outcomes of p(sample) * loss: the expectation, without sampling."""
    leaves = logits()
    theta, other, old = (torch.log_softmax(leaf, -1) for leaf in leaves)
    reference, old = other.detach(), old.detach()

    def gradient(value):
        return torch.autograd.grad(value, leaves[0], retain_graph=True)[0]

    reverse, forward = (theta.exp() * (theta - reference)).sum(), (reference.exp() * (reference - theta)).sum()
    right, wrong = gradient(reverse), gradient(forward)
    assert (right - wrong).abs().max() > 0.05  # or the lines below could not tell them apart
    samples = theta.exp().detach()
    k1, k2, k3 = (losses.kl_estimate(theta, reference, kind) for kind in KL)
    assert (samples * k1).sum().item() == pytest.approx(reverse.item(), abs=1e-12)
    assert (samples * k3).sum().item() == pytest.approx(reverse.item(), abs=1e-12)
    assert gradient((samples * k1).sum()).abs().max() < 1e-12
    assert torch.allclose(gradient((samples * k2).sum()), right, atol=1e-12)
    assert torch.allclose(gradient((samples * k3).sum()), wrong, atol=1e-12)
    for behaviour in (theta.detach(), old):  # on and off the policy
        unbiased = (behaviour.exp() * losses.kl_loss_unbiased(theta, behaviour, reference)).sum()
        assert unbiased.item() == pytest.approx(reverse.item(), abs=1e-12)
        assert torch.allclose(gradient(unbiased), right, atol=1e-12)
    scored = gradient((samples * k1.detach() * theta).sum())  # k1 in the reward, REINFORCE
    assert torch.allclose(scored, right, atol=1e-12)


def test_every_loss_is_reinforce_at_ratio_one():
    logprobs = LOGPROBS.clone().requires_grad_()
    old = LOGPROBS.clone()
    for loss in (losses.policy_loss, losses.dual_clip_loss, losses.cispo_loss):
        (gradient,) = torch.autograd.grad(loss(logprobs, old, ADVANTAGES).sum(), logprobs)
        assert torch.allclose(gradient, -ADVANTAGES, atol=1e-14), loss
    gspo = sequence_mean(losses.gspo_loss(logprobs, old, ADVANTAGES, MASK), MASK)
    reinforce = sequence_mean(-ADVANTAGES * logprobs, MASK)
    ours, theirs = (torch.autograd.grad(loss, logprobs)[0] for loss in (gspo, reinforce))
    assert torch.allclose(ours, theirs, atol=1e-14)


def far(seed=1):
    """Log-probs with grad, old ones, advantages of both signs; ratios on both sides of any clip."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, old, advantages = torch.randn(3, 6, 40, generator=generator, dtype=torch.float64)
    return logprobs.requires_grad_(), old, advantages


def test_clipped_is_where_the_gradient_is_zero():
    logprobs, old, advantages = far()
    (gradient,) = torch.autograd.grad(losses.policy_loss(logprobs, old, advantages, 0.1, 0.3).sum(), logprobs)
    clipped = losses.clipped(logprobs, old, advantages, 0.1, 0.3)
    assert torch.equal(clipped, gradient == 0) and 0.2 < clipped.double().mean() < 0.8


def test_cispo_and_dual_clip_gradients_by_hand():
    logprobs, old, advantages = far()
    ratio = (logprobs - old).exp().detach()
    (gradient,) = torch.autograd.grad(losses.cispo_loss(logprobs, old, advantages, 1.5).sum(), logprobs)
    assert torch.allclose(gradient, -advantages * ratio.clamp(max=1.5), atol=1e-12) and (ratio > 1.5).any()
    (gradient,) = torch.autograd.grad(losses.dual_clip_loss(logprobs, old, advantages).sum(), logprobs)
    runaway = (advantages < 0) & (ratio > 3)
    flat = runaway | losses.clipped(logprobs, old, advantages)
    assert runaway.any() and torch.allclose(gradient, torch.where(flat, 0, -advantages * ratio), atol=1e-12)


def test_gradients_by_finite_differences():
    logprobs, old, advantages = (t[:2, :5] for t in far(2))
    logprobs, mask = logprobs.detach().requires_grad_(), MASK[:2]
    functions = [
        lambda x: losses.policy_loss(x, old, advantages),
        lambda x: losses.dual_clip_loss(x, old, advantages),
        lambda x: losses.gspo_loss(x, old, advantages, mask, 0.2, 0.2),
        lambda x: losses.kl_loss_unbiased(x, old, advantages),
        lambda x: losses.value_loss(x, old, advantages),
        *(lambda x, kind=kind: losses.kl_estimate(x, old, kind) for kind in KL),
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, [logprobs])


# ---------------------------------------------------------------- reductions


def test_aggregation_goldens():
    loss = f64([[0.2, 0, 0.5, 0.2, 0.5], [0.2, 0.3, 0, 0, 0], [0.5, 0.35, 0, 0, 0]])
    assert token_mean(loss, MASK).item() == pytest.approx(0.275, abs=1e-12)
    assert sequence_mean(loss, MASK).item() == pytest.approx(0.2905555544753704, abs=1e-7)  # theirs adds 1e-8
    assert constant(loss, MASK).item() == pytest.approx(0.55 / 3, abs=1e-12)  # theirs divides by length alone
    assert constant(loss, MASK, 1).item() == pytest.approx(0.9166666666666666, abs=1e-12)


def padded(tensor, junk):
    return torch.cat([tensor, torch.full_like(tensor, junk)], 1)


@pytest.mark.parametrize("reduce", [token_mean, sequence_mean, constant])
def test_more_padding_and_smaller_micro_batches_change_nothing(reduce):
    mask, wide = MASK, padded(MASK, 0)
    inputs = LOGPROBS, OLD, ADVANTAGES
    more = [padded(t, junk) for t, junk in zip(inputs, (-3.0, -2.0, 7.0))]
    for loss in (losses.policy_loss, losses.dual_clip_loss, losses.cispo_loss, losses.kl_loss_unbiased):
        assert torch.allclose(reduce(loss(*inputs), mask), reduce(loss(*more), wide), atol=1e-14)
    gspo, wider = losses.gspo_loss(*inputs, mask), losses.gspo_loss(*more, wide)
    assert torch.allclose(reduce(gspo, mask), reduce(wider, wide), atol=1e-14)


def test_token_sums_over_the_step_do_not_see_micro_batches():
    whole = token_mean(losses.policy_loss(LOGPROBS, OLD, ADVANTAGES), MASK)
    parts = [
        (losses.policy_loss(LOGPROBS[rows], OLD[rows], ADVANTAGES[rows]), MASK[rows])
        for rows in (slice(0, 2), slice(2, 3))
    ]
    assert torch.allclose(sum((loss * mask).sum() for loss, mask in parts) / MASK.sum(), whole, atol=1e-14)
    assert abs(sum(token_mean(*part) for part in parts) / 2 - whole) > 0.05  # a mean of means is another loss


# ---------------------------------------------------------------- contracts


def test_nothing_broadcasts():
    row, column, full = torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 3)
    for odd in (row, column):
        for call in (
            lambda odd=odd: losses.policy_loss(full, full, odd),
            lambda odd=odd: losses.policy_loss(full, odd, full),
            lambda odd=odd: losses.clipped(full, full, odd),
            lambda odd=odd: losses.clipped(full, odd, full),
            lambda odd=odd: losses.value_loss(full, full, odd),
            lambda odd=odd: losses.value_loss(full, odd, full),
            lambda odd=odd: losses.kl_estimate(full, odd),
            lambda odd=odd: losses.kl_loss_unbiased(full, odd, full),
            lambda odd=odd: losses.kl_loss_unbiased(full, full, odd),
            lambda odd=odd: losses.gspo_loss(full, full, odd, full),
            lambda odd=odd: losses.gspo_loss(full, full, full, odd),
            lambda odd=odd: losses.cispo_loss(full, full, odd),
            lambda odd=odd: losses.dual_clip_loss(full, full, odd),
        ):
            with pytest.raises(AssertionError):
                call()
    with pytest.raises(AssertionError):
        losses.kl_estimate(full, full, "k4")


def test_inputs_are_left_alone():
    inputs = [t.clone() for t in (LOGPROBS, OLD, ADVANTAGES, MASK, VALUES)]
    logprobs, old, advantages, mask, values = inputs
    losses.policy_loss(logprobs, old, advantages)
    losses.clipped(logprobs, old, advantages)
    losses.dual_clip_loss(logprobs, old, advantages)
    losses.cispo_loss(logprobs, old, advantages)
    losses.gspo_loss(logprobs, old, advantages, mask)
    losses.value_loss(values, old, advantages)
    losses.kl_loss_unbiased(logprobs, old, values)
    for kind in KL:
        losses.kl_estimate(logprobs, old, kind)
    assert all(torch.equal(a, b) for a, b in zip(inputs, (LOGPROBS, OLD, ADVANTAGES, MASK, VALUES)))


# ---------------------------------------------------------------- TRL


def trl_loss(logprobs, old, reference, advantages, mask, **settings):
    """TRL's GRPOTrainer._compute_loss on given log-probs, called as a method of a stub."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    args = {name: settings.pop(name, value) for name, value in (("delta", None), ("use_bias_correction_kl", False))}
    stub = SimpleNamespace(
        args=SimpleNamespace(steps_per_generation=1, **args),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(old), None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=16,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **{"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.28, "importance_sampling_level": "token", **settings},
    )
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages[:, 0],
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(stub, None, inputs)


def policy(logprobs, old, advantages, mask):
    return losses.policy_loss(logprobs, old, advantages, 0.2, 0.28)


def gspo(logprobs, old, advantages, mask):
    return losses.gspo_loss(logprobs, old, advantages, mask, 0.2, 0.28)


def cispo(logprobs, old, advantages, mask):
    return losses.cispo_loss(logprobs, old, advantages, 1.28)


def dual(logprobs, old, advantages, mask):
    return losses.dual_clip_loss(logprobs, old, advantages, 0.2, 0.28, 1.6)


def dr_grpo(loss, mask):
    return constant(loss, mask, 16)


@pytest.mark.parametrize(
    "settings, loss, reduce",
    [
        ({"loss_type": "grpo"}, policy, sequence_mean),
        ({"loss_type": "dapo"}, policy, token_mean),
        ({"loss_type": "bnpo"}, policy, token_mean),
        ({"loss_type": "dr_grpo"}, policy, dr_grpo),
        ({"loss_type": "cispo", "epsilon_high": 1.28}, cispo, token_mean),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, gspo, sequence_mean),
        ({"loss_type": "dapo", "delta": 1.6}, dual, token_mean),
        ({"loss_type": "dapo", "beta": 0.4}, policy, token_mean),
        ({"loss_type": "dapo", "beta": 0.4, "use_bias_correction_kl": True}, policy, token_mean),
    ],
)
def test_equal_to_trl_in_value_and_gradient(settings, loss, reduce):
    generator = torch.Generator().manual_seed(3)
    old, reference, noise = torch.randn(3, 8, 12, generator=generator, dtype=torch.float64) * 0.4 - 2
    logprobs = (old + (noise + 2) * 0.8).requires_grad_()
    advantages = torch.randn(8, 1, generator=generator, dtype=torch.float64).expand(8, 12)
    mask = (torch.arange(12) < torch.tensor([[12], [1], [5], [9], [3], [12], [7], [2]])).double()
    theirs = trl_loss(logprobs, old, reference, advantages, mask, **settings)
    (expected,) = torch.autograd.grad(theirs, logprobs)
    token_loss = loss(logprobs, old, advantages, mask)
    if settings.get("use_bias_correction_kl"):
        token_loss = token_loss + settings["beta"] * losses.kl_loss_unbiased(logprobs, old, reference)
    elif "beta" in settings:
        token_loss = token_loss + settings["beta"] * losses.kl_estimate(logprobs, reference)
    ours = reduce(token_loss, mask)
    (gradient,) = torch.autograd.grad(ours, logprobs)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    assert torch.allclose(gradient, expected, atol=1e-13) and expected.abs().max() > 1e-3
