"""The learning rate against transformers' schedules and by hand; one update, and what is logged of several."""

import math

import pytest
import torch

from common import optim
from common.log import UserError
from common.optim import Update, expected_steps, learning_rate


@pytest.mark.parametrize(("shape", "theirs"), [("cosine", "cosine"), ("linear", "linear")])
def test_equals_transformers(shape, theirs):
    import transformers

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0)
    schedule = transformers.get_scheduler(theirs, optimizer, num_warmup_steps=0, num_training_steps=40)
    for step in range(41):
        assert learning_rate(step, 40, 3.0, 0.0, shape) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_warm_up_ends_at_the_peak_and_the_last_step_at_zero():
    rates = [learning_rate(step, 20, 2.0, 0.2, "cosine") for step in range(21)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and max(rates) == rates[3] == rates[4] and rates[20] == 0
    assert [learning_rate(step, 20, 2.0, 0.0, "constant") for step in (0, 10, 20)] == [2.0] * 3
    assert learning_rate(0, 1, 2.0, 1.0, "linear") == 2.0


def test_a_budget_ends_at_the_pace_so_far():
    assert expected_steps(7, 40, 900, None, 100) == 40
    assert expected_steps(0, 40, 0, 1000, 100) == 10 and expected_steps(0, 8, 0, 1000, 100) == 8
    assert expected_steps(4, 40, 800, 1000, 100) == 5  # 200 a step, not 100
    seen = 0
    for step in range(40):  # whatever the steps cost, the end lies ahead until the budget is spent
        if seen >= 1000:
            break
        assert expected_steps(step, 40, seen, 1000, 100) > step
        seen += 30 + 70 * (step % 3)
    assert 1000 <= seen < 1170


# ---------------------------------------------------------------- groups and state on disk


def test_weight_decay_is_on_matrices_alone():
    named = {"matrix": torch.nn.Parameter(torch.ones(2, 2)), "norm": torch.nn.Parameter(torch.ones(2))}
    first, second = optim.adamw_groups(named, 0.1, 0.5)
    assert first["params"] == [named["matrix"]] and first["weight_decay"] == 0.5
    assert second["params"] == [named["norm"]] and second["weight_decay"] == 0 and second["peak_lr"] == 0.1
    assert len(optim.adamw_groups({"norm": named["norm"]}, 0.1, 0.5)) == 1  # no empty group


def test_the_state_comes_back_to_the_bit(tmp_path):
    found = []
    for again in (False, True):
        named = {"a": torch.nn.Parameter(torch.ones(2, 2)), "b": torch.nn.Parameter(torch.ones(3))}
        optimizer = torch.optim.AdamW(optim.adamw_groups(named, 0.1, 0.5), lr=0.1)
        if again:
            optim.load(optimizer, named, tmp_path)
        else:
            sum((p**3).sum() for p in named.values()).backward()
            optimizer.step()
            optim.save(optimizer, named, tmp_path)
        found.append([optimizer.state[p] for p in named.values()])
    for then, now in zip(*found, strict=True):
        assert then.keys() == now.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(then[key], now[key]) for key in then)


# ---------------------------------------------------------------- one update


def two_roles():
    """({role: [a parameter at 1 with its gradient]}, an optimizer that takes the gradient away)."""
    parameters = {"policy": [torch.nn.Parameter(torch.ones(2))], "critic": [torch.nn.Parameter(torch.ones(1))]}
    parameters["policy"][0].grad, parameters["critic"][0].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.5])
    return parameters, torch.optim.SGD([p for tensors in parameters.values() for p in tensors], lr=1.0)


def test_each_role_is_clipped_by_its_own_norm():
    parameters, optimizer = two_roles()
    update = Update(forward_tokens=7)
    update.add(["a"], torch.tensor(0.25))
    update.add(["b"], torch.tensor(0.5))
    assert optim.optimizer_step(optimizer, parameters, update, 3, max_grad_norm=1.0)
    assert update.taken and update.loss == 0.75 and update.forward_tokens == 7
    assert update.norms == {"grad_norm": 5.0, "critic_grad_norm": 0.5}  # before clipping
    assert torch.allclose(parameters["policy"][0], torch.tensor([0.4, 0.2]), atol=1e-5)
    assert torch.allclose(parameters["critic"][0], torch.tensor([0.5]))  # below the limit: as it is


@pytest.mark.parametrize("role", ["policy", "critic", "loss"])
def test_what_is_not_finite_updates_nothing(role):
    parameters, optimizer = two_roles()
    update = Update(forward_tokens=1)
    update.add(["good"], torch.tensor(0.5))
    if role == "loss":
        update.add(["odd", "odd too"], torch.tensor(math.nan))
    else:
        parameters[role][0].grad[0] = math.inf
    with pytest.raises(UserError, match=r"step 3: loss .* is not finite; not updated; of ") as caught:
        optim.optimizer_step(optimizer, parameters, update, 3, max_grad_norm=1.0)
    assert str(caught.value).endswith("of odd, odd too" if role == "loss" else "of good")
    assert not update.taken and all(p.eq(1).all() for tensors in parameters.values() for p in tensors)


def test_no_step_beyond_target_kl():
    for kl, taken in ((0.1, True), (0.3, False)):
        parameters, optimizer = two_roles()
        update = Update(forward_tokens=1)
        update.add(["a"], torch.tensor(0.5), policy_kl=torch.tensor([kl, kl]))
        update.add(["b"], torch.tensor(0.5), policy_kl=torch.tensor([kl + 0.03]))
        assert optim.optimizer_step(optimizer, parameters, update, 0, 1.0, target_kl=0.2) == update.taken == taken
        assert parameters["policy"][0].eq(1).all() != taken
        assert update.norms["grad_norm"] == 5.0  # logged all the same


def test_means_of_a_step_weigh_each_token_alike():
    first, second = Update(forward_tokens=4, loss=1.0, norms={"grad_norm": 3.0}), Update(forward_tokens=2, loss=2.0)
    first.add(["a"], torch.tensor(0.0), entropy=torch.tensor([1.0, 2.0, 3.0]), margin=torch.tensor([8.0]))
    second.add(["b"], torch.tensor(0.0), entropy=torch.tensor([10.0]), nothing=torch.tensor([]))
    assert optim.mean_metrics([first, second]) == {"loss": 1.5, "grad_norm": 3.0, "entropy": 4.0, "margin": 8.0}
    assert optim.mean_metrics([]) == {}
