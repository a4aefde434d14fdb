"""The learning rate against transformers' schedules and by hand."""

import pytest
import torch
from common.schedule import expected_steps, learning_rate


@pytest.mark.parametrize(("shape", "theirs"), [("cosine", "cosine"), ("linear", "linear")])
def test_equals_transformers(shape, theirs):
    transformers = pytest.importorskip("transformers")
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
