"""Reward and preference losses: numbers of other code bases, hand cases, TRL's own methods where it is installed."""

import math
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
    trl = pytest.importorskip("trl")
    assert trl
    orpo = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    chosen, rejected = torch.tensor([-0.3, -1.2]), torch.tensor([-0.9, -0.4])
    stub = SimpleNamespace(beta=1.0, accelerator=SimpleNamespace(device="cpu"))
    theirs = orpo.odds_ratio_loss(stub, chosen, rejected)[0]
    assert torch.allclose(losses.orpo_loss(chosen, rejected), -theirs, atol=1e-6)
