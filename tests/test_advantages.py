"""Advantages: numbers of other code bases, hand cases, scipy, properties, and two ranks against one process."""

import datetime
import json
import os
import signal
import traceback

import numpy as np
import pytest
import torch

from common import advantages


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


# what verl, OpenRLHF, torchtune and TRL give on these numbers
MASK = f64([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
KL = f64([[-0.1, 0.2, 0.2, -0.2, -0.3], [-0.1, 0.1, 0.3, 0, 0], [0.2, -0.2, 0, 0, 0]])
SCORES = f64([1.0, -0.5, 2.0])
TOKEN_REWARDS = f64([[0.005, -0.01, -0.01, 0.01, 1.015], [0.005, -0.005, -0.515, 0, 0], [-0.01, 2.01, 0, 0, 0]])
VALUES = f64([[0.1, 0.2, 0.3, 0.4, 0.5], [-0.2, 0.0, 0.2, 0, 0], [0.6, -0.1, 0, 0, 0]])
ADVANTAGES = f64(
    [
        [0.7511864213, 0.6891934304, 0.6402907287, 0.5893575, 0.515],
        [-0.2459297787, -0.4794575, -0.715, 0, 0],
        [1.275455, 2.11, 0, 0, 0],
    ]
)
RETURNS = f64(
    [
        [0.8511864213, 0.8891934304, 0.9402907287, 0.9893575, 1.015],
        [-0.4459297788, -0.4794575, -0.515, 0, 0],
        [1.875455, 2.01, 0, 0, 0],
    ]
)
WHITENED = f64(
    [
        [0.2844390368, 0.2104048589, 0.1520035581, 0.0911773314, 0.0023770283],
        [-0.9063516806, -1.1852385774, -1.4665315927, 0, 0],
        [0.91053874, 1.9071812971, 0, 0, 0],
    ]
)
REWARDS = f64([1.0, 0.0, 0.0, 1.0, 0.3, 0.3, 0.3, 0.3])
NAN = float("nan")


def close(ours, theirs, atol=1e-9):
    return torch.allclose(ours, theirs, rtol=0, atol=atol)


def random(rows=6, length=9, seed=0):
    """Rewards, values and a ragged mask, all fp64; junk where there is no token."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, length, generator=generator, dtype=torch.float64)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)).double()
    return rewards, values, mask


# ---------------------------------------------------------------- PPO


def test_token_rewards_golden():
    assert close(advantages.token_rewards(SCORES, KL, MASK, 0.05), TOKEN_REWARDS)


def test_the_score_lies_on_the_last_valid_token():
    mask = f64([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])  # behind a hole; nowhere; on the first
    rewards = advantages.token_rewards(SCORES, torch.full_like(mask, 2.0), mask, 0.5)
    assert rewards.tolist() == [[0, -1, 0, 0, 0], [0] * 5, [1, 0, 0, 0, 0]]
    junk = torch.where(mask.bool(), 2.0, NAN)
    assert torch.equal(advantages.token_rewards(SCORES, junk, mask.bool(), 0.5), rewards)


def test_gae_goldens():
    ours, returns = advantages.gae(TOKEN_REWARDS, VALUES, MASK, 0.99, 0.95)
    assert close(ours, ADVANTAGES) and close(returns, RETURNS)


def test_gae_steps_over_a_hole():
    rewards, mask = f64([[0, 0, 0, 0, 0, 1]]), f64([[1, 1, 0, 0, 1, 1]])
    values = f64([[0.1, 0.2, 7, 7, 0.3, 0.4]])
    _, returns = advantages.gae(rewards, values, mask, 0.99, 0.95)
    assert close(returns, f64([[0.8732904271, 0.91801215, 0, 0, 0.9603, 1.0]]))


def test_a_hole_is_as_if_it_were_cut_out():
    rewards, values, mask = random()
    at = 3
    holes = zip((rewards, values, mask), (NAN, NAN, 0.0))
    wide = [torch.cat([t[:, :at], torch.full_like(t[:, :2], junk), t[:, at:]], 1) for t, junk in holes]
    narrow, holed = advantages.gae(rewards, values, mask, 0.9, 0.8), advantages.gae(*wide, 0.9, 0.8)
    for a, b in zip(narrow, holed):
        assert torch.equal(a, torch.cat([b[:, :at], b[:, at + 2 :]], 1)) and not b[:, at : at + 2].any()


def test_reinforce_returns_golden():
    """Without a critic and with lam = 1 an advantage is the discounted reward to go."""
    expected = f64(
        [
            [0.9700069401, 0.974754485, 0.9947015, 1.01485, 1.015],
            [-0.5047015, -0.51485, -0.515, 0, 0],
            [1.9799, 2.01, 0, 0, 0],
        ]
    )
    ours, returns = advantages.gae(TOKEN_REWARDS, torch.zeros_like(VALUES), MASK, 0.99, 1.0)
    assert close(ours, expected) and torch.equal(ours, returns)


def test_undiscounted_returns_are_the_reward_to_go():
    rewards, values, mask = random()
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    ours, returns = advantages.gae(rewards, values, mask, 1.0, 1.0)
    assert close(returns, to_go, 1e-12) and close(ours, (to_go - values) * mask, 1e-12)


def test_gae_by_hand_with_lam_zero():
    ours, returns = advantages.gae(f64([[1, 2, 4]]), f64([[10, 20, 40]]), torch.ones(1, 3), 0.5, 0.0)
    assert ours.tolist() == [[1.0, 2.0, -36.0]] and returns.tolist() == [[11.0, 22.0, 4.0]]


def test_gae_equals_scipy_s_filter():
    from scipy import signal as signal_

    rewards, values, mask = random(4, 30)
    next_values = torch.cat([values[:, 1:] * mask[:, 1:], torch.zeros(4, 1)], 1)
    deltas = ((rewards + 0.97 * next_values - values) * mask).numpy()
    expected = signal_.lfilter([1], [1, -0.97 * 0.9], deltas[:, ::-1])[:, ::-1]
    ours, _ = advantages.gae(rewards, values, mask, 0.97, 0.9)
    assert close(ours, torch.from_numpy(expected.copy()) * mask, 1e-12)


def test_whiten_golden():
    ours = advantages.whiten(ADVANTAGES, MASK)
    assert close(ours, WHITENED, 2e-9)  # the inputs are given to ten digits
    assert abs((ours * MASK).sum()) < 1e-9 and not ours[MASK == 0].any()


def test_whiten_equals_scipy_and_keeps_its_digits():
    from scipy import stats

    x, _, mask = random(seed=1)
    ours = advantages.whiten(torch.where(mask.bool(), x, NAN), mask)
    expected = stats.zscore(x[mask.bool()].numpy(), ddof=1)
    assert np.allclose(ours[mask.bool()].numpy(), expected, rtol=0, atol=1e-7)
    far = (x + 4096).float()  # single sums would lose the variance
    expected = stats.zscore(far.double()[mask.bool()].numpy(), ddof=1)
    assert np.allclose(advantages.whiten(far, mask)[mask.bool()].numpy(), expected, rtol=0, atol=1e-6)


def test_whiten_of_one_token_or_none_is_zero():
    x, mask = torch.tensor([[3.0, NAN]]), torch.tensor([[1.0, 0.0]])
    assert advantages.whiten(x, mask).tolist() == [[0.0, 0.0]]
    assert advantages.whiten(x, mask * 0).tolist() == [[0.0, 0.0]]


def padded(t, junk):
    return torch.cat([t, torch.full_like(t, junk)], 1)


def test_more_padding_changes_nothing():
    rewards, values, mask = random()
    length, wide = mask.shape[1], padded(mask, 0)
    narrow = advantages.gae(rewards, values, mask, 0.99, 0.95)
    wider = advantages.gae(padded(rewards, NAN), padded(values, NAN), wide, 0.99, 0.95)
    narrow += (advantages.whiten(rewards, mask), advantages.token_rewards(rewards[:, 0], values, mask, 0.1))
    wider += (advantages.whiten(padded(rewards, NAN), wide),)
    wider += (advantages.token_rewards(rewards[:, 0], padded(values, NAN), wide, 0.1),)
    for a, b in zip(narrow, wider):
        assert torch.equal(a, b[:, :length]) and not b[:, length:].any()
    explained = advantages.explained_variance(values, rewards, mask)
    assert explained == advantages.explained_variance(padded(values, NAN), padded(rewards, NAN), wide)


def test_explained_variance_by_hand():
    returns, mask = f64([[1, 2, 3, 4]]), torch.ones(1, 4)
    explained = advantages.explained_variance
    assert explained(returns, returns, mask) == 1 and explained(returns + 7, returns, mask) == 1
    assert explained(torch.zeros(1, 4), returns, mask) == 0 and explained(returns, returns * 0, mask) == 0
    assert explained(-returns, returns, mask) == -3
    assert explained(f64([[1, 2, 4, 3]]), returns, mask) == pytest.approx(1 - 2 / 5)
    assert explained(f64([[1, 2, 9, 9]]), returns, f64([[1, 1, 0, 0]])) == 1


# ---------------------------------------------------------------- GRPO, RLOO


def test_group_goldens():
    ours = advantages.group_advantages(REWARDS, 4)
    s = 0.8658754298
    assert close(ours, f64([s, -s, -s, s, 0, 0, 0, 0]), 1e-10)
    none = advantages.group_advantages(REWARDS, 4, "none")
    assert none.tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    assert close(advantages.leave_one_out(REWARDS, 4), f64([2, -2, -2, 2, 0, 0, 0, 0]) / 3, 1e-10)


def test_batch_scale_is_the_std_of_all_rewards():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(12, generator=generator)
    groups = rewards.view(3, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (rewards.std() + 1e-4)
    assert close(advantages.group_advantages(rewards, 4, "batch"), expected.flatten(), 1e-6)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    assert close(advantages.group_advantages(rewards, 4), expected.flatten(), 1e-6)


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others():
    rewards = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others = [(rewards[i // 5 * 5 : i // 5 * 5 + 5].sum() - rewards[i]) / 4 for i in range(10)]
    assert close(advantages.leave_one_out(rewards, 5), rewards - torch.stack(others), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.1, 0.3, -1 / 3, 1e8 + 1, 0.0])
@pytest.mark.parametrize("size", [2, 7, 9])
def test_equal_rewards_give_exact_zeros(value, dtype, size):
    rewards = torch.cat([torch.full((size,), value, dtype=dtype), torch.arange(size, dtype=dtype) + 1])
    for scale in ("group", "batch", "none"):
        ours = advantages.group_advantages(rewards, size, scale)
        assert ours.dtype == dtype and (ours[:size] == 0).all() and (ours[size:] != 0).any()
    assert (advantages.leave_one_out(rewards, size)[:size] == 0).all()
    assert (advantages.group_advantages(rewards[:size], size, "batch") == 0).all()


def test_unscorable_rewards_are_left_out():
    rewards = f64([1.0, NAN, 0.0, 2.0, NAN, 5.0, NAN, NAN, NAN, NAN, NAN, NAN])  # 3 of 4, 1 of 4, none of 4
    assert advantages.group_advantages(rewards, 4, "none").tolist() == [0, 0, -1, 1] + [0] * 8
    assert close(advantages.group_advantages(rewards, 4), f64([0, 0, -1, 1] + [0] * 8) / 1.0001, 1e-12)
    std = f64([1, 0, 2, 5]).std() + 1e-4
    assert close(advantages.group_advantages(rewards, 4, "batch"), f64([0, 0, -1, 1] + [0] * 8) / std, 1e-12)
    assert advantages.leave_one_out(rewards, 4).tolist() == [0, 0, -1.5, 1.5] + [0] * 8


def test_impossible_groups_are_refused():
    for call in (advantages.group_advantages, advantages.leave_one_out):
        with pytest.raises(ValueError, match="group_size 1"):
            call(REWARDS, 1)
        with pytest.raises(AssertionError):
            call(REWARDS, 3)
        with pytest.raises(AssertionError):
            call(REWARDS[:, None], 4)
        with pytest.raises(AssertionError, match="infinite"):
            call(REWARDS / 0, 4)
    with pytest.raises(AssertionError):
        advantages.group_advantages(REWARDS, 4, "std")


# ---------------------------------------------------------------- swap-ins


def test_adaptive_kl_golden():
    coef, seen = 0.2, []
    for kl in (3.0, 6.0, 30.0):
        coef = advantages.adaptive_kl(coef, kl, 6.0, 10000, 256)
        seen.append(coef)
    assert seen == pytest.approx([0.198976, 0.198976, 0.19999475712], abs=1e-12)


def test_soft_overlong_by_hand():
    lengths = torch.tensor([0, 80, 81, 90, 100, 500])
    assert advantages.soft_overlong(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.05, -0.5, -1, -1])
    with pytest.raises(AssertionError):
        advantages.soft_overlong(lengths, 100, 0)


def test_soft_overlong_equals_trl():
    from trl.rewards import get_soft_overlong_punishment

    theirs = get_soft_overlong_punishment(100, 20)
    ours = advantages.soft_overlong(torch.arange(150), 100, 20)
    assert ours.tolist() == pytest.approx(theirs([[1] * n for n in range(150)]), abs=1e-6)


def test_missing_stop_is_subtracted_once():
    rewards, stopped = torch.tensor([1.0, 1.0, NAN]), torch.tensor([True, False, True])
    assert advantages.missing_stop(rewards, stopped, 0.75)[:2].tolist() == [1.0, 0.25]
    assert advantages.missing_stop(rewards, stopped.float(), 0.75)[2].isnan()


# ---------------------------------------------------------------- contracts


def test_nothing_broadcasts():
    row, column, full = torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 3)
    for odd in (row, column):
        for call in (
            lambda odd=odd: advantages.gae(odd, full, full),
            lambda odd=odd: advantages.gae(full, odd, full),
            lambda odd=odd: advantages.gae(full, full, odd),
            lambda odd=odd: advantages.whiten(full, odd),
            lambda odd=odd: advantages.token_rewards(row, odd, full, 0.1),
            lambda odd=odd: advantages.token_rewards(row, full, odd, 0.1),
            lambda odd=odd: advantages.explained_variance(odd, full, full),
            lambda odd=odd: advantages.explained_variance(full, full, odd),
        ):
            with pytest.raises(AssertionError):
                call()
    with pytest.raises(AssertionError):
        advantages.token_rewards(column, full, full, 0.1)
    with pytest.raises(AssertionError):
        advantages.missing_stop(row, column, 1.0)


def test_inputs_are_left_alone_and_no_gradient_passes():
    rewards, values, mask = random()
    inputs = rewards.clone().requires_grad_(), values.clone().requires_grad_(), mask.clone()
    r, v, m = inputs
    results = [
        *advantages.gae(r, v, m),
        advantages.token_rewards(r[:, 0], v, m, 0.1),
        advantages.whiten(r, m),
        advantages.leave_one_out(r[:, 0], 2),
        advantages.missing_stop(r[:, 0], m[:, 0], 1.0),
        *(advantages.group_advantages(r[:, 0], 2, scale) for scale in ("group", "batch", "none")),
    ]
    assert not any(result.requires_grad for result in results)
    advantages.explained_variance(v, r, m)
    with torch.no_grad():
        for result in results:
            result.fill_(NAN)  # were a result a view, the inputs would show it
    assert all(torch.equal(a, b) for a, b in zip(inputs, (rewards, values, mask)))


# ---------------------------------------------------------------- ranks


def global_results(rows, groups):
    x, values, mask = random(7, 11)
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(2)).double() + 5
    rewards[2] = NAN
    return {
        "whiten": advantages.whiten(x[rows], mask[rows]).tolist(),
        "batch": advantages.group_advantages(rewards[groups], 4, "batch").tolist(),
        "explained": advantages.explained_variance(values[rows], x[rows], mask[rows]),
    }


def start_rank(rank, folder, rows, groups):
    """A forked child of a gloo group of two that writes its share's results; it ends by itself within 30 s."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.alarm(30)
        torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
        store = torch.distributed.FileStore(str(folder / "store"), 2)
        limit = datetime.timedelta(seconds=20)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
        (folder / f"{rank}.json").write_text(json.dumps(global_results(rows, groups)))
        torch.distributed.destroy_process_group()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(70)


@pytest.mark.parametrize("rows, groups", [(5, 8), (7, 12)])  # ragged; the second rank has nothing
def test_two_ranks_equal_one_process(rows, groups, tmp_path):
    pids = [
        start_rank(0, tmp_path, slice(0, rows), slice(0, groups)),
        start_rank(1, tmp_path, slice(rows, 7), slice(groups, 12)),
    ]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    whole = global_results(slice(0, 7), slice(0, 12))
    assert close(f64(first["whiten"] + second["whiten"]), f64(whole["whiten"]), 1e-12)
    assert close(f64(first["batch"] + second["batch"]), f64(whole["batch"]), 1e-12)
    assert first["explained"] == second["explained"] == pytest.approx(whole["explained"], abs=1e-12)
