"""From rewards to advantages. No gradient passes, no input is written; every rank calls what is global over ranks."""

import torch
from torch import Tensor

from common import dist


@torch.no_grad()
def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * kl on every token, plus the score (B,) on the last one -> (B, T-1). Ouyang et al. 2022, eq. 2.

    kl (B, T-1) is k1 between the rollout's policy and the reference; a row without a token stays zero.
    """
    assert kl.shape == mask.shape and rewards.shape == mask.shape[:1], (rewards.shape, kl.shape, mask.shape)
    index = torch.arange(mask.shape[1], device=mask.device)
    last = mask.bool() & (index == (mask.bool() * index).amax(1, keepdim=True))
    penalty = torch.where(mask.bool(), -kl_coef * kl, 0)
    return torch.where(last, penalty + rewards[:, None], penalty)


@torch.no_grad()
def gae(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """A_t = delta_t + gamma lam A_t+1 with delta_t = r_t + gamma V_t+1 - V_t -> (advantages, returns), (B, T-1) each.

    returns = A + V before any whitening; V is 0 after the last token. Schulman et al. 2016, eq. 16.
    A masked token inside a sequence (a tool's text) is stepped over: A and V carry on undiscounted.
    """
    assert token_rewards.shape == values.shape == mask.shape, (token_rewards.shape, values.shape, mask.shape)
    device = values.device  # a GPU would start eight small kernels for each token
    token_rewards, values, mask = token_rewards.cpu(), values.cpu(), mask.cpu()
    advantages = torch.zeros_like(token_rewards)
    advantage = next_value = torch.zeros_like(token_rewards[:, 0])
    for t in reversed(range(values.shape[1])):
        here = mask[:, t].bool()
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(here, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, advantage, 0)
    return advantages.to(device), torch.where(mask.bool(), advantages + values, 0).to(device)


@torch.no_grad()
def group_advantages(rewards: Tensor, group_size: int, scale: str = "group") -> Tensor:
    """(r - mean of its group) / (std + 1e-4) -> (B,), unbiased std, a group's rows adjacent. Shao et al. 2024, 4.1.2.

    scale  group  std of the group: GRPO
           batch  std of all rewards of all ranks: Liu et al. 2025 (Lite PPO)
           none   no division: Liu et al. 2025 (Dr. GRPO)
    A reward of NaN (unscorable) counts in no mean and no std, and gets 0; so does every row of a group of equals.
    """
    assert scale in ("group", "batch", "none"), scale
    centred, n = _centred(rewards, group_size)
    if scale == "group":
        centred /= (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt() + 1e-4
    elif scale == "batch":
        centred /= _moments(rewards, ~rewards.isnan())[1] ** 0.5 + 1e-4
    return centred.flatten().to(rewards)


@torch.no_grad()
def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """r - mean of the others in its group -> (B,); NaN as above. Kool et al. 2019; RLOO, Ahmadian et al. 2024."""
    centred, n = _centred(rewards, group_size)
    return (centred * n / (n - 1).clamp(min=1)).flatten().to(rewards)


def _centred(rewards, group_size):
    """r - mean of its group, 0 for NaN -> (groups, G) fp64, and the scorable rows of each group (groups, 1)."""
    assert rewards.ndim == 1 and len(rewards) % group_size == 0, (rewards.shape, group_size)
    if group_size == 1:
        raise ValueError("group_size 1: a sample alone is its own mean, every advantage would be 0; take 2 or more")
    groups = rewards.cpu().double().view(-1, group_size)
    assert not groups.isinf().any(), "a reward is infinite"
    scorable, n = ~groups.isnan(), (~groups.isnan()).sum(1, keepdim=True)
    # from the group's smallest reward, so that equal rewards leave exact zeros and not a rounding error over 1e-4
    above = torch.where(scorable, groups - groups.nan_to_num(torch.inf).amin(1, keepdim=True), 0)
    return torch.where(scorable, above - above.sum(1, keepdim=True) / n.clamp(min=1), 0), n


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(unbiased variance + 1e-8) over the tokens of all ranks -> (B, T-1), 0 where mask is 0."""
    mean, variance = _moments(x, mask)
    return torch.where(mask.bool(), ((x.cpu().double() - mean) / (variance + 1e-8) ** 0.5).to(x), 0)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R) over the tokens of all ranks -> float; 0 for a constant critic or constant R."""
    assert values.shape == returns.shape, (values.shape, returns.shape)
    variance = _moments(returns, mask)[1]
    return 1 - _moments(returns - values, mask)[1] / variance if variance > 0 else 0.0


def _moments(x, mask):
    """Mean and unbiased variance of x where mask is 1, over all ranks -> floats; two passes in fp64."""
    assert x.shape == mask.shape, (x.shape, mask.shape)
    kept = x.cpu().double()[mask.cpu().bool()]
    total, n = dist.sum_all(kept.sum(), len(kept))
    mean = total / max(n, 1)
    (squares,) = dist.sum_all((kept - mean).square().sum())
    return mean, squares / max(n - 1, 1)


def adaptive_kl(coef: float, kl: float, target: float, horizon: float, n: float) -> float:
    """coef * (1 + clip(kl / target - 1, +-0.2) n / horizon) -> float, after n samples. Ziegler et al. 2019, 2.2."""
    return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


def soft_overlong(lengths: Tensor, max_length: int, cache: int) -> Tensor:
    """0 up to max_length - cache, then 1 / cache less per token, to -1 -> (B,), added to rewards. DAPO 2025, eq. 13."""
    assert 0 < cache <= max_length, (cache, max_length)
    return ((max_length - cache - lengths) / cache).clamp(-1, 0)


@torch.no_grad()
def missing_stop(rewards: Tensor, stopped: Tensor, penalty: float) -> Tensor:
    """rewards minus the penalty, once, for each completion that did not end with a stop token -> (B,)."""
    assert rewards.shape == stopped.shape, (rewards.shape, stopped.shape)
    return torch.where(stopped.bool(), rewards, rewards - penalty)
