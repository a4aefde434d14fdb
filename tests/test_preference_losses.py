"""Reward and preference losses: numbers of other code bases, hand cases, TRL's own methods called with a stub."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from common import losses

# what OpenRLHF and TRL give on these numbers
POLICY = torch.tensor([-10.0, -12.0, -7.0]), torch.tensor([-11.0, -9.0, -20.0])
REFERENCE = torch.tensor([-10.5, -11.0, -8.0]), torch.tensor([-10.5, -10.0, -15.0])


def test_dpo_and_cdpo_goldens():
    assert losses.dpo_loss(*POLICY, *REFERENCE).mean().item() == pytest.approx(0.6266744933136827, abs=1e-7)
    smooth = losses.dpo_loss(*POLICY, *REFERENCE, label_smoothing=0.1)
    assert smooth.mean().item() == pytest.approx(0.6433411599803495, abs=1e-7)
    assert losses.dpo_loss(*POLICY, *REFERENCE, kind="ipo").mean().item() == pytest.approx(22.0, abs=1e-5)


def test_reward_goldens():
    chosen, rejected = torch.tensor([1.0, 0.2]), torch.tensor([0.5, 0.3])
    assert losses.reward_loss(chosen, rejected).mean().item() == pytest.approx(0.6092368221268387, abs=1e-7)
    assert losses.reward_loss(chosen, rejected, 1.0).mean().item() == pytest.approx(1.1807061546477686, abs=1e-7)
    assert losses.centering_loss(chosen, rejected).tolist() == pytest.approx([2.25, 0.25])


@pytest.mark.parametrize("kind", ["sigmoid", "length_normalised"])
def test_log_two_and_no_margin_where_policy_is_reference(kind):
    loss = losses.dpo_loss(*POLICY, *POLICY, kind=kind)
    assert loss.tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "length_normalised"])
def test_gradients_by_finite_differences(kind):
    inputs = [t.double().requires_grad_() for t in POLICY]
    reference = [t.double() for t in REFERENCE]
    assert torch.autograd.gradcheck(lambda c, r: losses.dpo_loss(c, r, *reference, 0.3, 0.1, kind), inputs)
    assert torch.autograd.gradcheck(lambda c, r: losses.hinge_loss(c, r, *reference, 0.3), inputs)
    assert torch.autograd.gradcheck(losses.simpo_loss, inputs)
    assert torch.autograd.gradcheck(losses.orpo_loss, [t.double().div(20).detach().requires_grad_() for t in POLICY])


def test_hinge_simpo_orpo_by_hand():
    assert losses.hinge_loss(*POLICY, *REFERENCE, beta=0.1).tolist() == pytest.approx([0.9, 1.2, 0.4])
    assert losses.simpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0])).item() == pytest.approx(
        math.log(1 + math.exp(-1.5))
    )
    p, q = 0.8, 0.5
    odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
    value = losses.orpo_loss(torch.tensor([math.log(p)]), torch.tensor([math.log(q)])).item()
    assert value == pytest.approx(math.log(1 + math.exp(-odds)), rel=1e-6)
    nearly_sure = torch.tensor([-1e-6], requires_grad=True)
    losses.orpo_loss(nearly_sure, torch.tensor([-5.0])).sum().backward()
    assert torch.isfinite(nearly_sure.grad).all()


def test_orpo_and_simpo_equal_trl():
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = torch.tensor([-0.3, -1.2]), torch.tensor([-0.9, -0.4])
    stub = SimpleNamespace(beta=1.0, accelerator=SimpleNamespace(device="cpu"))
    theirs = ORPOTrainer.odds_ratio_loss(stub, chosen, rejected)[0]
    assert torch.allclose(losses.orpo_loss(chosen, rejected), -theirs, atol=1e-6)


# ---------------------------------------------------------------- TRL's own DPO and reward losses, called with a stub

MASK = torch.tensor(
    [[0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
)  # chosen, chosen, rejected, ...


def dpo_by_trl(logprobs, ref_logprobs, beta, kind, smoothing=0.0):
    """DPOTrainer's loss of rows (chosen 0, chosen 1, rejected 0, rejected 1), per-token log-probs (4, 4)."""
    from trl.trainer.dpo_trainer import DPOTrainer

    gather = SimpleNamespace(gather=lambda t: t, gather_for_metrics=lambda t: t, device=torch.device("cpu"))
    shape = logprobs.shape
    out = SimpleNamespace(
        log_probs=logprobs,
        entropy=torch.zeros(shape),
        mean_logits=torch.zeros(shape),
        is_top1=torch.zeros(shape, dtype=torch.bool),
    )

    def model(**_):
        return out

    model.training = True
    ref = ref_logprobs.sum(1)
    stub = SimpleNamespace(
        model=model,
        accelerator=gather,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        beta=beta,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones(4, 5, dtype=torch.long),
        "attention_mask": torch.ones(4, 5),
        "completion_mask": MASK,
        "ref_chosen_logps": ref[:2],
        "ref_rejected_logps": ref[2:],
    }
    return DPOTrainer._compute_loss(stub, model, inputs, False)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    {
        "sigmoid": "sigmoid",
        "ipo": "ipo",
        "length_normalised": "sigmoid_norm",
        "hinge": "hinge",
        "smoothed": "robust",
    }.items(),
)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_equals_trl_in_value_and_gradient(ours, theirs, beta):
    generator = torch.Generator().manual_seed(3)
    mask = MASK[:, 1:].float()
    logprobs, ref = (-3 * torch.rand(4, 4, generator=generator, dtype=torch.float64) * mask for _ in range(2))
    grads, values = [], []
    for side in ("ours", "theirs"):
        leaf = logprobs.clone().requires_grad_()
        if side == "theirs":
            loss = dpo_by_trl(leaf * mask, ref, beta, theirs, 0.1 if ours == "smoothed" else 0.0)
        else:
            scale = 1 if ours in ("sigmoid", "hinge", "smoothed") else 1 / mask.sum(1)
            sums, ref_sums = (leaf * mask).sum(1) * scale, ref.sum(1) * scale
            parts = sums[:2], sums[2:], ref_sums[:2], ref_sums[2:]
            if ours == "hinge":
                loss = losses.hinge_loss(*parts, beta=beta).mean()
            elif ours == "smoothed":  # TRL has robust DPO, which is cDPO's two terms combined otherwise
                plain, flipped = (losses.dpo_loss(*parts, beta=beta, label_smoothing=e) for e in (0.0, 1.0))
                loss = ((0.9 * plain - 0.1 * flipped) / 0.8).mean()
            else:
                loss = losses.dpo_loss(*parts, beta=beta, kind=ours).mean()
        loss.backward()
        values.append(loss.item())
        grads.append(leaf.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert grads[0].abs().max() > 1e-3 and (grads[0] - grads[1]).abs().max() < 1e-6 * grads[1].abs().max()


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centre", [None, 0.01])
def test_reward_equals_trl_in_value_and_gradient(margin, centre):
    from trl.trainer.reward_trainer import RewardTrainer

    scores = torch.tensor([1.0, 0.2, -0.7, 0.5, 0.3, 0.9])  # three chosen, three rejected
    margins = torch.tensor([0.0, 0.5, 2.0])
    grads, values = [], []
    for side in ("ours", "theirs"):
        leaf = scores.clone().requires_grad_()
        if side == "ours":
            extra = margins if margin else 0.0
            loss = (
                losses.reward_loss(leaf[:3], leaf[3:], extra)
                + (centre or 0) * losses.centering_loss(leaf[:3], leaf[3:])
            ).mean()
        else:
            stub = SimpleNamespace(
                model=SimpleNamespace(training=True),
                args=SimpleNamespace(center_rewards_coefficient=centre),
                accelerator=SimpleNamespace(gather=lambda t: t, gather_for_metrics=lambda t: t),
                _total_train_tokens=0,
                _metrics={"train": defaultdict(list)},
                _tp_size=1,
            )
            inputs = {"attention_mask": torch.ones(6, 2)} | ({"margin": margins} if margin else {})

            def model(attention_mask, use_cache, leaf=leaf, **_):
                return SimpleNamespace(logits=leaf[:, None])

            model.training = True
            loss = RewardTrainer.compute_loss(stub, model, inputs)
        loss.backward()
        values.append(loss.item())
        grads.append(leaf.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert (grads[0] - grads[1]).abs().max() < 1e-7 and grads[0].abs().max() > 0.01
