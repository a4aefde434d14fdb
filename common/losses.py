"""Log-probabilities and losses. Nothing here knows a model, a config or a rank; losses come back unreduced."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """log softmax(hidden @ head_weight.T / temperature)[target] for each row -> (N,) fp32.

    hidden (N, d), head_weight (V, d) frozen or trainable, targets (N,) int64. No tensor of (N, V) is ever made: only
    `chunk` rows of logits exist at a time (default 256 on CPU, 1024 elsewhere), and the softmax is in fp32.
    Under a frozen head the gradient is made in the forward, two matrix products in all (see _FrozenHead).
    """
    return token_logprobs_and_hits(hidden, head_weight, targets, temperature, chunk)[0]


def token_logprobs_and_hits(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """As token_logprobs, and beside it (N,) bool: is the target the most likely token (ties count as hits)."""
    assert hidden.ndim == 2 and targets.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    chunk = chunk or (256 if hidden.device.type == "cpu" else 1024)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
    head = _TrainableHead if head_weight.requires_grad else _FrozenHead
    with torch.autocast(hidden.device.type, enabled=False):
        return head.apply(hidden.to(head_weight.dtype), head_weight, targets, temperature, chunk)


class _FrozenHead(torch.autograd.Function):
    """d logp / d hidden = (onehot - p) @ W / T is one fixed vector per token, so it is made while the logits exist.

    Backward only scales it by the incoming gradient: two matrix products where recomputing needs three. p - onehot is
    formed in fp32 before the cast, or a confident model loses a tenth of its gradient to rounding.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        logprobs, hits = _outputs(hidden)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows, logits in _chunks(hidden, weight, chunk):
            _softmax_rows(logits, targets[rows], temperature, logprobs[rows], hits[rows], grad is not None)
            if grad is not None:  # the chunk of logits now holds p - onehot
                torch.mm(logits, weight, out=grad[rows])
        ctx.temperature = temperature
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(hits)
        return logprobs, hits

    @staticmethod
    def backward(ctx, upstream, _):
        (grad,) = ctx.saved_tensors
        return (grad * (upstream / -ctx.temperature)[:, None]).to(grad.dtype), None, None, None, None


class _TrainableHead(torch.autograd.Function):
    """With a trainable head d W needs the incoming gradient, so each chunk of logits is made again in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        logprobs, hits = _outputs(hidden)
        for rows, logits in _chunks(hidden, weight, chunk):
            _softmax_rows(logits, targets[rows], temperature, logprobs[rows], hits[rows], False)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.save_for_backward(hidden, weight, targets)
        ctx.mark_non_differentiable(hits)
        return logprobs, hits

    @staticmethod
    def backward(ctx, upstream, _):
        hidden, weight, targets = ctx.saved_tensors
        logprobs, hits = _outputs(hidden)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows, logits in _chunks(hidden, weight, ctx.chunk):
            _softmax_rows(logits, targets[rows], ctx.temperature, logprobs[rows], hits[rows], True)
            scale = upstream[rows, None] / -ctx.temperature
            grad_hidden[rows] = (logits @ weight * scale).to(hidden.dtype)
            grad_weight += logits.T @ (hidden[rows] * scale).to(hidden.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _outputs(hidden):
    n = len(hidden)
    return hidden.new_empty(n, dtype=torch.float32), hidden.new_empty(n, dtype=torch.bool)


def _chunks(hidden, weight, chunk):
    """Yields (rows, logits (rows, V)); the logits' memory is reused: on CPU fresh pages cost as much as the product.

    In fp32 on CPU 1,024 words are multiplied at a time: all 262,144 at once take MKL 1.2 to 1.6 times as long.
    """
    buffer = torch.empty(min(chunk, len(hidden)), len(weight), dtype=weight.dtype, device=weight.device)
    words = 1024 if weight.device.type == "cpu" and weight.dtype == torch.float32 else len(weight)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, min(start + chunk, len(hidden)))
        logits = buffer[: rows.stop - start]
        for part, out in zip(weight.split(words), logits.split(words, 1), strict=True):
            torch.mm(hidden[rows], part.T, out=out)
        yield rows, logits


def _softmax_rows(logits, targets, temperature, logprobs, hits, keep_gradient):
    """Fills logprobs and hits (rows,) from logits (rows, V); leaves p - onehot in logits where the gradient is wanted.

    In fp32, 4 rows at a time on CPU: they stay in the cache. logits of fp32 are overwritten.
    """
    block = 4 if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), block):
        rows = slice(start, min(start + block, len(logits)))
        target = targets[rows, None]
        z = logits[rows].float()
        if temperature != 1.0:
            z.div_(temperature)
        z.sub_(z.amax(-1, keepdim=True))
        at = z.gather(1, target)
        total = z.exp_().sum(-1, keepdim=True)
        logprobs[rows] = (at - total.log())[:, 0]
        hits[rows] = at[:, 0] >= 0
        if keep_gradient:
            z.div_(total).scatter_add_(1, target, -torch.ones_like(at))
            if logits.dtype != torch.float32:
                logits[rows] = z


def entropy(hidden: Tensor, head_weight: Tensor, temperature: float = 1.0, chunk: int | None = None) -> Tensor:
    """-sum p log p, p = softmax(hidden @ head_weight.T / temperature), exact over the vocabulary -> (N,) fp32, in nats.

    With gradient, frozen head or not: each chunk of logits (default 64 rows) is made again in the backward. It costs
    two to three times what token_logprobs does; for a report, the mean of -log p over sampled tokens is free.
    """

    def rows(part, weight):
        log_p = torch.log_softmax((part.to(weight.dtype) @ weight.T).float() / temperature, -1)
        return -(log_p.exp() * log_p).sum(-1)

    parts = [checkpoint(rows, part, head_weight, use_reentrant=False) for part in hidden.split(chunk or 64)]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def entropy_and_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    head_weight: Tensor,
    chunk: int | None = None,
    ref_head_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Entropy of the next-token distribution and KL(policy || reference), exact over the vocabulary -> (N,), (N,) fp32.

    hidden, ref_hidden (N, d) under their heads (V, d), one and the same if ref_head_weight is not given; nats; no
    gradient. As token_logprobs, never (N, V) beyond a chunk.
    """
    ref_head_weight = head_weight if ref_head_weight is None else ref_head_weight
    chunk = chunk or (256 if hidden.device.type == "cpu" else 1024)
    block = 16 if hidden.device.type == "cpu" else chunk
    entropy, kl = torch.zeros(2, len(hidden), device=hidden.device)
    heads = ((hidden, head_weight), (ref_hidden, ref_head_weight))
    both = zip(*(_chunks(h.to(w.dtype), w, chunk) for h, w in heads))
    for (rows, ours), (_, theirs) in both:
        for start in range(0, len(ours), block):
            at = slice(rows.start + start, min(rows.start + start + block, rows.stop))
            log_p, log_q = (torch.log_softmax(z[start : start + block].float(), -1) for z in (ours, theirs))
            p = log_p.exp()
            entropy[at], kl[at] = -(p * log_p).sum(-1), (p * (log_p - log_q)).sum(-1)
    return entropy, kl


def reward_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margin: float | Tensor = 0.0) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) -> (pairs,). Bradley-Terry; Ouyang et al. 2022, eq. 1."""
    assert chosen_rewards.shape == rejected_rewards.shape
    return -F.logsigmoid(chosen_rewards - rejected_rewards - margin)


def centering_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """(r_chosen + r_rejected)^2 -> (pairs,): keeps the scores around zero. Eisenstein et al. 2023, eq. 2."""
    return (chosen_rewards + rejected_rewards).square()


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> Tensor:
    """Preference loss -> (pairs,), from log-probs of whole answers (pairs,) under policy and reference.

    h = log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected)
    sigmoid            -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)    Rafailov et al. 2023, eq. 7; e: cDPO
    length_normalised  the same on averages per token (Lambert et al. 2024, `dpo_norm`)
    ipo                (h - 1 / (2 beta))^2 on averages per token                 Azar et al. 2023, eq. 17
    The caller has to pass sums over the answer for sigmoid, and averages per token for the other two: this function
    cannot tell them apart.
    """
    h = (chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)
    if kind == "ipo":
        return (h - 1 / (2 * beta)).square()
    assert kind in ("sigmoid", "length_normalised"), kind
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def hinge_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """max(0, 1 - beta h) -> (pairs,), h as in dpo_loss. SLiC-HF, Zhao et al. 2023, on DPO's margin."""
    h = (chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)
    return torch.relu(1 - beta * h)


def simpo_loss(chosen_logprobs: Tensor, rejected_logprobs: Tensor, beta: float = 2.0, gamma: float = 0.5) -> Tensor:
    """-log sigmoid(beta (c - r) - gamma) -> (pairs,) on averages per token, no reference. Meng et al. 2024, eq. 6."""
    return -F.logsigmoid(beta * (chosen_logprobs - rejected_logprobs) - gamma)


def orpo_loss(chosen_logprobs: Tensor, rejected_logprobs: Tensor) -> Tensor:
    """-log sigmoid(log odds(chosen) - log odds(rejected)) -> (pairs,) on averages per token. Hong et al. 2024, eq. 7.

    odds(p) = p / (1 - p); log(1 - p) from log p by log1mexp, since 1 - exp(x) is all rounding near x = 0.
    """
    odds = (chosen_logprobs - rejected_logprobs) - (_log1mexp(chosen_logprobs) - _log1mexp(rejected_logprobs))
    return -F.logsigmoid(odds)


def _log1mexp(x):
    """log(1 - exp(x)) for x < 0 (Maechler 2012): expm1 near 0, log1p far from it."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) -> (B, T-1), r = pi / old. Schulman et al. 2017, eq. 7."""
    assert logprobs.shape == advantages.shape, (logprobs.shape, advantages.shape)
    ratio = _ratio(logprobs, old_logprobs)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))


def clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """Where policy_loss is flat -> (B, T-1) bool: r above the range counts only under A > 0, below it under A < 0."""
    assert logprobs.shape == advantages.shape, (logprobs.shape, advantages.shape)
    ratio = _ratio(logprobs, old_logprobs)
    return (advantages > 0) & (ratio > 1 + clip_high) | (advantages < 0) & (ratio < 1 - clip_low)


def _ratio(logprobs, old_logprobs):
    """exp(log pi - log old); the exponent is clamped to +-20, and beyond it a token has no gradient."""
    assert logprobs.shape == old_logprobs.shape, (logprobs.shape, old_logprobs.shape)
    return (logprobs - old_logprobs).clamp(-20, 20).exp()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """max((V - R)^2, (V' - R)^2) / 2 -> (B, T-1), V' = V kept within +-clip of the rollout's value (inf: unclipped).

    Huang et al. 2022, detail 9."""
    assert values.shape == old_values.shape == returns.shape, (values.shape, old_values.shape, returns.shape)
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3") -> Tensor:
    """KL(policy || ref) per token, on samples of the policy -> (B, T-1); d = log pi - log ref. Schulman 2020.

    k1  d                  unbiased; for rewards and reports: as a loss its expected gradient is 0
    k2  d^2 / 2            biased, but as a loss its gradient is that of KL(policy || ref)
    k3  exp(-d) - 1 + d    unbiased and >= 0; as a loss it has the gradient of KL(ref || policy), see kl_loss_unbiased
    k3 clamps d to >= -20 (finite, no gradient below); k1 and k2 clamp nothing.
    """
    assert logprobs.shape == ref_logprobs.shape, (logprobs.shape, ref_logprobs.shape)
    assert kind in ("k1", "k2", "k3"), kind
    d = logprobs - ref_logprobs
    if kind == "k3":
        d = d.clamp(min=-20)
        return torch.expm1(-d) + d
    return d if kind == "k1" else 0.5 * d.square()


def kl_loss_unbiased(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """r * k3 -> (B, T-1), value and gradient of KL(policy || ref) on samples of `old`. DeepSeek-V3.2 2025, eq. 7."""
    return _ratio(logprobs, old_logprobs) * kl_estimate(logprobs, ref_logprobs)


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """policy_loss with one ratio per sequence, s = exp(mean of log r) -> (B, T-1). Zheng et al. 2025, eq. 5 and 7.

    Wants the mean of sequence means as its reduction: by tokens, long sequences would weigh more than eq. 5 says."""
    assert logprobs.shape == old_logprobs.shape == mask.shape, (logprobs.shape, old_logprobs.shape, mask.shape)
    mean = ((logprobs - old_logprobs) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return policy_loss(mean.expand_as(logprobs), torch.zeros_like(logprobs), advantages, clip_low, clip_high)


def cispo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, max_ratio: float = 5.0) -> Tensor:
    """-A stop_gradient(min(r, max_ratio)) log pi -> (B, T-1): every token keeps a gradient. MiniMax-M1 2025, eq. 4, 5.

    max_ratio bounds r itself (the paper's 1 + eps); there is no lower bound, as in the paper's runs."""
    assert logprobs.shape == advantages.shape, (logprobs.shape, advantages.shape)
    return -advantages * _ratio(logprobs, old_logprobs).clamp(max=max_ratio).detach() * logprobs


def dual_clip_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    bound: float = 3.0,
) -> Tensor:
    """policy_loss, at most -bound * A where A < 0: a runaway ratio has no gradient. Ye et al. 2020, dual-clip PPO."""
    loss = policy_loss(logprobs, old_logprobs, advantages, clip_low, clip_high)
    return torch.where(advantages < 0, torch.minimum(loss, -bound * advantages), loss)
