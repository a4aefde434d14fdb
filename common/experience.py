"""One step of on-policy data: prompts -> completions -> rewards -> a Rollout -> minibatches of micro-batches.

Prompts, rows and minibatches are numbered over all ranks: a rank holds whole groups, and neither their number nor a
resume changes what is sampled or which rows are updated together.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from common import advantages, chat, data, dist, log, lora, losses, model, reward_model, rollouts
from common.log import UserError, listed
from common.optim import Update
from common.roles import Roles
from common.runtime import flops, watch
from common.runtime.types import Gemma, Tokenizer


@dataclass
class Rollout:
    """What this rank sampled in one step: B rows, those of one prompt neighbours; T tokens, right-padded.

    Per-token tensors are (B, T-1), aligned with tokens[:, 1:], and 0 where mask is 0.
    """

    # sampled and scored: collect
    tokens: Tensor  # (B, T), prompt and completion
    mask: Tensor  # (B, T-1), 1 on the tokens of the completion, its stop token included; see `exclude`
    completions: list  # B lists of ids
    stopped: Tensor  # (B,) bool: did the completion end with a stop token
    sampled_logprobs: Tensor  # (B, T-1), the sampler's own: a health check in the log, in no ratio
    rewards: Tensor  # (B,), NaN where the user's function gave no score
    reward_parts: list  # B dicts, the components of each reward
    records: list  # B, of the data
    row_numbers: list  # B, among all ranks' rows of this step
    prompt_numbers: list  # B, among all ranks' prompts of this step
    row_tokens: Tensor  # (B,), tokens of prompt and completion
    completion_tokens: Tensor  # (B,), tokens of the completion
    sampled_tokens: float  # tokens of all ranks' completions
    seconds: dict
    correct: str | None = None  # the part of the reward that is 1 for a right answer
    # made by the algorithm, (B, T-1) each
    weight: Tensor | None = None  # of each token's loss
    old_logprobs: Tensor | None = None  # None: there is one update, and its own log-probs are the old ones
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    zero_advantage: Tensor | None = None  # (B,) bool: of zero_advantage_groups; None where rows have no groups

    @property
    def ids(self) -> list[str]:
        return [f"{record['id']}/{row}" for record, row in zip(self.records, self.row_numbers, strict=True)]

    @property
    def unscored(self) -> Tensor:
        """(B,) bool: rows without a score; no update may use them."""
        return self.rewards.isnan()

    def exclude(self, rows: Tensor) -> None:
        """Leave rows (B,) bool out of the loss and of its divisor: their mask becomes 0."""
        self.mask = self.mask * ~rows[:, None]

    def micro_batch(self, rows: list[int]) -> "MicroBatch":
        """These rows as a MicroBatch, cut after their last masked token: as if collated alone."""
        width = 1 + int(self.mask[rows].any(0).nonzero().max())
        ids = self.ids
        cut: dict[str, Any] = {}
        for name in PER_TOKEN:
            tensor = getattr(self, name)
            cut[name] = None if tensor is None else tensor[rows][:, :width]
        return MicroBatch([ids[row] for row in rows], self.tokens[rows][:, : width + 1], **cut)


@dataclass
class MicroBatch:
    """Rows of a rollout that go through the model together; the fields are those of Rollout."""

    ids: list  # names of the rows, for error messages
    tokens: Tensor
    mask: Tensor
    weight: Tensor
    advantages: Tensor
    sampled_logprobs: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None


PER_TOKEN = ("mask", "weight", "advantages", "sampled_logprobs", "old_logprobs", "ref_logprobs", "values", "returns")


@dataclass
class Minibatch:
    """The rows of one update."""

    number_of_pass: int
    micro_batch_rows: list  # lists of this rank's rows that have a gradient
    forward_tokens: int  # of these rows on this rank, prompts included
    divisor: float  # of the summed loss: over all ranks, and over rows without a gradient too
    micro_batches: list = field(default_factory=list)  # one of each of micro_batch_rows, made by cut_micro_batches


def share(numbered: Iterable) -> dict[int, Any]:
    """This rank's part of a step's prompts, or of the held-out ones: {number among all ranks: prompt}."""
    return dict(list(enumerate(numbered))[dist.rank() :: dist.world_size()])


def collect(
    net: Gemma,
    prompts: dict[int, Any],
    score: Callable,
    seed: int,
    step: int | str,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    **decoding: Any,
) -> Rollout:
    """`group_size` completions of each prompt by the active adapter, with their rewards -> Rollout.

    prompts: {number in the step, over all ranks: Prompt}. score: of rewards.scorer. decoding: more of rollouts.sample.
    A row's random numbers belong to (seed, step, its number). UserError on all ranks where one of them cannot sample or
    score, or a score is not finite.
    """
    rows = [number * group_size + g for number in prompts for g in range(group_size)]
    records = [prompt.record for prompt in prompts.values() for _ in range(group_size)]
    uniforms = rollouts.uniforms(seed, step, rows, max_new_tokens)
    started, failure = time.perf_counter(), None
    try:
        ids = [prompt.ids for prompt in prompts.values()]
        sampled = rollouts.sample(net, ids, group_size, max_new_tokens, temperature, uniforms, **decoding)
        after_sampling = time.perf_counter()
        rewards, parts = score(records, sampled["completions"])
    except UserError as error:
        failure = error
    except FloatingPointError as error:
        names = listed([prompt.id for prompt in prompts.values()])
        failure = UserError(f"step {step}: {error}; nothing was updated; the prompts were {names}")
    log.refuse_together(failure, "another rank could not sample or score")
    return Rollout(
        tokens=sampled["tokens"],
        mask=sampled["mask"],
        completions=sampled["completions"],
        stopped=sampled["stopped"],
        sampled_logprobs=sampled["sampled_logprobs"],
        rewards=rewards.float().to(sampled["tokens"].device),
        reward_parts=parts,
        records=records,
        row_numbers=rows,
        prompt_numbers=[number for number in prompts for _ in range(group_size)],
        row_tokens=sampled["attention_mask"].sum(1),
        completion_tokens=sampled["mask"].sum(1),
        sampled_tokens=dist.sum_all(sampled["mask"].sum())[0],
        seconds={
            "seconds_rollout": after_sampling - started,
            "seconds_reward": time.perf_counter() - after_sampling,
        },
    )


def zero_advantage_groups(advantages: Tensor, group_size: int) -> Tensor:
    """(B,) bool: rows of groups of which no token has an advantage (B, T-1); to GRPO, those of equal rewards."""
    return (advantages == 0).all(1).view(-1, group_size).all(1).repeat_interleave(group_size)


def truncated(rollout: Rollout, step: int) -> Tensor:
    """(B,) bool: completions that did not stop by themselves. UserError where none of any rank did."""
    if not dist.any_rank(rollout.stopped.any()):
        raise UserError(
            f"step {step}: no completion stopped by itself and rl.mask_truncated leaves all of them out; raise "
            "rl.max_new_tokens, or start from a model that has learned to stop"
        )
    return ~rollout.stopped


def loss_weights(mask: Tensor, kind: str, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """(weight of each token's loss (B, T-1), what each row adds to the divisor (B,)) of a loss summed over rows.

    token     mean over all tokens of the minibatch: DAPO, Yu et al. 2025, eq. 8
    sequence  mean over completions of their means: GRPO, Shao et al. 2024, eq. 3
    constant  sum over tokens / (completions * max_new_tokens): Dr. GRPO, Liu et al. 2025
    A row without a token counts in no divisor.
    """
    assert kind in ("token", "sequence", "constant"), kind
    tokens = mask.sum(1)
    if kind == "token":
        return mask, tokens
    per_row = tokens.clamp(min=1)[:, None] if kind == "sequence" else max_new_tokens
    return mask / per_row, (tokens > 0).float()


def minibatches(
    rollout: Rollout,
    has_gradient: Tensor,
    row_divisor: Tensor,
    num_prompts: int,
    passes: int,
    count: int,
    budget: int,
    key: object,
) -> list[Minibatch]:
    """The minibatches of a rollout in their order, `count` in each of `passes` -> [Minibatch], for cut_micro_batches.

    Whole groups are dealt out anew in every pass, by a permutation of all prompts of the step: any number of ranks
    makes the same minibatches. One without a row that has_gradient (B,) bool on any rank is left out. row_divisor (B,):
    of loss_weights. budget: tokens of a micro-batch; a prompt that neighbouring rows share counts once.
    """
    row_tokens, has_gradient = [int(n) for n in rollout.row_tokens.tolist()], has_gradient.tolist()
    prompt_tokens = [n - int(m) for n, m in zip(row_tokens, rollout.completion_tokens.tolist(), strict=True)]
    shared = list(zip(rollout.prompt_numbers, prompt_tokens, strict=True))
    dealt = []
    for number_of_pass in range(passes):
        order = data.shuffled(num_prompts, f"minibatches/{key}/{number_of_pass}")
        minibatch_of = {prompt: place % count for place, prompt in enumerate(order)}
        for number in range(count):
            rows = [row for row, prompt in enumerate(rollout.prompt_numbers) if minibatch_of[prompt] == number]
            computed = [row for row in rows if has_gradient[row]]
            cuts = data.micro_batches(computed, row_tokens, budget, sort=False, shared=shared)
            divisor, computed_anywhere = dist.sum_all(row_divisor[rows].sum(), len(computed))
            if computed_anywhere:
                dealt.append(Minibatch(number_of_pass, cuts, sum(row_tokens[row] for row in computed), divisor))
    return dealt


def first_pass(dealt: list[Minibatch]) -> list[list[int]]:
    """Rows of the micro-batches of the first pass over a rollout."""
    return [rows for minibatch in dealt if minibatch.number_of_pass == 0 for rows in minibatch.micro_batch_rows]


def cut_micro_batches(dealt: list[Minibatch], rollout: Rollout) -> None:
    """Set micro_batches of all minibatches, cut from the rollout; call it once all its tensors are made."""
    for minibatch in dealt:
        minibatch.micro_batches = [rollout.micro_batch(rows) for rows in minibatch.micro_batch_rows]


@torch.no_grad()
def logprobs(
    net: Gemma, adapter: str | None, rollout: Rollout, micro_batch_rows: list[list[int]], temperature: float
) -> Tensor:
    """(B, T-1) log-probs of the rollout's tokens by one adapter, 0 in rows outside of micro_batch_rows.

    Made in the very micro-batches of the first pass of updates, so that the first ratio is 1 and the KL of a policy to
    an equal reference 0 to the bit.
    """
    out = torch.zeros_like(rollout.mask)
    with lora.using(net, adapter):
        for rows in micro_batch_rows:
            out[rows] = model.sequence_logprobs(net, rollout.tokens[rows], rollout.mask[rows], temperature)
    return out


@torch.no_grad()
def values(net: Gemma, head: Parameter, rollout: Rollout, micro_batch_rows: list[list[int]]) -> Tensor:
    """(B, T-1) values of the critic before each token, likewise."""
    out = torch.zeros_like(rollout.mask)
    with lora.using(net, "critic"):
        for rows in micro_batch_rows:
            out[rows] = reward_model.values(net, head, rollout.tokens[rows], rollout.mask[rows])
    return out


def check_finite(rollout: Rollout, step: int) -> None:
    """UserError on all ranks where log-probs or values of a row are not finite, before they reach other rows."""
    made = [t for t in (rollout.old_logprobs, rollout.ref_logprobs, rollout.values) if t is not None]
    finite = [t.isfinite().all(1).tolist() for t in made]
    ids = [name for row, name in enumerate(rollout.ids) if not all(of_rows[row] for of_rows in finite)]
    ids = dist.gather_rows(ids)
    if ids:
        raise UserError(f"step {step}: log-probs or values are not finite; not updated; of {listed(ids)}")


def summary(rollout: Rollout, front: str = "") -> dict[str, float]:
    """{name: mean over all ranks' completions} of rewards, their components and spread, lengths, stops, variety.

    Reward and its spread are over the completions that have a score, and missing where none of any rank has one.
    """
    names = sorted({name for part in rollout.reward_parts for name in part})
    rewards = rollout.rewards[~rollout.unscored].double()
    sums = {"length": rollout.completion_tokens.sum(), "stop_rate": rollout.stopped.sum()}
    sums |= {f"reward/{name}": sum(part[name] for part in rollout.reward_parts) for name in names}
    sums |= {"unscored_share": rollout.unscored.sum()}
    variety = watch.distinct_bigrams(dist.gather_rows(rollout.completions))
    *totals, reward, square, scored, count = dist.sum_all(
        *sums.values(), rewards.sum(), rewards.square().sum(), len(rewards), len(rollout.rewards)
    )
    means = {}
    if scored:
        spread = max(0.0, square / scored - (reward / scored) ** 2) * scored / max(1, scored - 1)
        means = {"reward": reward / scored, "reward_std": spread**0.5}
    means |= {name: total / count for name, total in zip(sums, totals, strict=True)}
    means["distinct_bigrams"] = variety
    return {front + name: value for name, value in means.items()}


def group_metrics(rollout: Rollout) -> dict[str, float]:
    """{"group_spread": share of groups whose rewards differ, "pass@G": share with a right answer}, over all ranks.

    Groups of one have no spread: {}.
    """
    rows_by_group: dict[int, list[int]] = {}
    for row, number in enumerate(rollout.prompt_numbers):
        rows_by_group.setdefault(number, []).append(row)
    groups = list(rows_by_group.values())
    size = max(map(len, groups))
    if size < 2:
        return {}
    rewards, parts = rollout.rewards.tolist(), rollout.reward_parts
    spread = sum(len({rewards[row] for row in rows if not math.isnan(rewards[row])}) > 1 for rows in groups)
    right = sum(any(parts[row].get(rollout.correct) == 1 for row in rows) for rows in groups)
    spread, right, count = dist.sum_all(spread, right, len(groups))
    return {"group_spread": spread / count} | ({f"pass@{size}": right / count} if rollout.correct in parts[0] else {})


def rollout_metrics(rollout: Rollout, dealt: list[Minibatch]) -> dict[str, float]:
    """What a step of online RL logs over all ranks, beside its updates. dealt: the minibatches after the updates.

    entropy: mean of -log pi of the sampled tokens, its unbiased estimate, in nats. kl: k3 to the reference (Schulman
    2020), where there is one, and sampler_mean and sampler_max, the difference between the log-probs of sampler and
    trainer, are over the rows that were computed: without those of equal groups or cut answers where they are left out.
    zero_advantage_share: of completions, see zero_advantage_groups.
    """
    first = [micro for minibatch in dealt if minibatch.number_of_pass == 0 for micro in minibatch.micro_batches]

    def kept(name):
        """(tokens,): this tensor of the first pass, where its mask is 1."""
        return torch.cat([rollout.mask.new_zeros(0), *(getattr(micro, name)[micro.mask.bool()] for micro in first)])

    old_logprobs = kept("old_logprobs")
    difference = (old_logprobs - kept("sampled_logprobs")).abs()
    sums = {"sampler_mean": difference.sum()}
    if rollout.ref_logprobs is not None:
        sums["kl"] = losses.kl_estimate(old_logprobs, kept("ref_logprobs")).sum()
    zero_advantage = 0 if rollout.zero_advantage is None else rollout.zero_advantage.sum()
    surprise = -rollout.sampled_logprobs.sum()
    *totals, count, zero_advantage, rows, surprise = dist.sum_all(
        *sums.values(), len(old_logprobs), zero_advantage, len(rollout.rewards), surprise
    )
    metrics = {name: total / count for name, total in zip(sums, totals, strict=True) if count}
    metrics["entropy"] = surprise / rollout.sampled_tokens
    metrics["sampler_max"] = max(dist.gather_rows([difference.max().item()] if len(difference) else [0.0]))
    metrics["zero_advantage_share"] = zero_advantage / rows
    if rollout.returns is not None:
        metrics["explained_variance"] = advantages.explained_variance(rollout.values, rollout.returns, rollout.mask)
    return summary(rollout) | group_metrics(rollout) | metrics | rollout.seconds


def step_flops(models: Roles, rollout: Rollout, dealt: list[Minibatch], updates: list[Update]) -> float:
    """FLOPs of a step over all ranks, by formula: sampling, scoring, log-probs and values of the first pass, updates.

    dealt: the minibatches, of which the first have made `updates`.
    """
    net, full, size = models.net.config, models.adapter is None, models.adapter_size
    row_tokens = rollout.row_tokens.tolist()

    def spans_and_tokens(rows):
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(rollout.prompt_numbers[row], []).append(row)
        answers = [[len(rollout.completions[row]) for row in group] for group in groups.values()]
        lengths = [row_tokens[group[0]] - a[0] for group, a in zip(groups.values(), answers, strict=True)]
        spans = [flops.shared_prompt(prompt, a) for prompt, a in zip(lengths, answers, strict=True)]
        return [span for part in spans for span in part], sum(map(sum, answers))

    policy, critic = size(models.adapter), size("critic")
    spans, tokens = spans_and_tokens(range(len(rollout.completions)))
    total = flops.forward(net, spans, tokens, policy)
    total += sum(flops.forward(net, spans, 0, size(name)) for name in models.scorers)
    spans, tokens = spans_and_tokens([row for rows in first_pass(dealt) for row in rows])
    if len(dealt) > 1 or rollout.values is not None:  # a single update's own log-probs are the old ones
        total += flops.forward(net, spans, tokens, policy)
    if rollout.ref_logprobs is not None:
        total += flops.forward(net, spans, tokens, size("reference"))
    if rollout.values is not None:
        total += flops.forward(net, spans, 0, critic)
    for minibatch, update in zip(dealt, updates, strict=False):  # target_kl may have ended them
        spans, tokens = spans_and_tokens([row for rows in minibatch.micro_batch_rows for row in rows])
        if "grad_norm" in update.norms:
            total += flops.update(net, spans, tokens, policy, full)
        if rollout.values is not None:
            total += flops.update(net, spans, 0, critic)
    return dist.sum_all(total)[0]


def lines(rollout: Rollout, tokenizer: Tokenizer, step: int) -> list[dict]:
    """What samples.jsonl and held_out.jsonl keep of all ranks' rows, in their order; nothing is cut."""
    texts = [chat.decode(tokenizer, ids) for ids in rollout.completions]
    rewards, stopped = rollout.rewards.tolist(), rollout.stopped.tolist()
    kept = [
        {
            "step": step,
            "row": number,
            "id": record["id"],
            "prompt": record["prompt"][-1]["content"],
            "completion": text,
            "reward": None if math.isnan(rewards[row]) else rewards[row],  # no score
            "parts": rollout.reward_parts[row],
            "tokens": len(rollout.completions[row]),
            "stopped": stopped[row],
        }
        for row, (number, record, text) in enumerate(zip(rollout.row_numbers, rollout.records, texts, strict=True))
    ]
    return sorted(dist.gather_rows(kept), key=lambda line: line["row"])
