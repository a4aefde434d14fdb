"""The data set of preference pairs, and for DPO: the reference's log-probs, evaluation, report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from common import data, dist, gemma, log, lora, losses, model, preferences
from common.log import UserError, say, say_counts
from common.roles import Roles
from common.run import Run
from common.runtime import cache, flops, resume
from common.runtime.types import Gemma, Tokenizer

PANELS = (
    ("loss (nats per pair)", ("loss", "eval/loss")),
    ("pair accuracy", ("accuracy", "eval/accuracy")),
    ("change against the reference (nats per token)", ("eval/chosen_change", "eval/rejected_change")),
    ("KL to the reference (nats per token)", ("eval/kl",)),
)


@dataclass
class PairDataset:
    """Encoded pairs (data.encode_pairs) to train on, in batches of a step, and held-out ones."""

    train: list
    val: list
    batches: data.EpochBatches  # batches[step] -> rows of train
    fingerprint: str  # of all that is in it
    ref_logprobs: dict = field(default_factory=dict)  # {split: (pairs, 2) fp64}: filled by add_reference_logprobs
    reference_seconds: float = 0.0  # that those of train took

    def micro_batch(self, split: str, rows: list, device: torch.device) -> "PairMicroBatch":
        pairs = [getattr(self, split)[row] for row in rows]
        tokens, mask = data.collate_pairs(pairs, device)
        ref_logprobs = self.ref_logprobs[split][rows].flatten().float().to(device)
        return PairMicroBatch([pair["id"] for pair in pairs], tokens, mask, ref_logprobs)


@dataclass
class PairMicroBatch:
    """Pairs that go through the model together, as rows chosen, rejected, chosen, ..."""

    ids: list  # names of the pairs, for error messages
    tokens: Tensor  # (B, T), B = 2 * pairs
    mask: Tensor  # (B, T-1), 1 on the tokens of the answer
    ref_logprobs: Tensor  # (B,), summed over the answer


def encode(
    records: dict[str, list[dict]], tokenizer: Tokenizer, max_length: int, batch_size: int, seed: int
) -> PairDataset:
    """The pairs of {split: records}. Says what was skipped; UserError where a split has no pair left."""
    pairs = {}
    for split, rows in records.items():
        pairs[split], counts = data.encode_pairs(rows, tokenizer, max_length)
        say_counts(split, counts, max_length)
        if not pairs[split]:
            raise UserError(f"{split}: no usable pair in {counts['records']} records")
    train, val = pairs["train"], pairs["val"]
    batches = data.EpochBatches([data.pair_tokens(pair) for pair in train], batch_size, seed)
    return PairDataset(
        train, val, batches, resume.fingerprint([[p["id"], p["chosen"], p["rejected"]] for p in train + val])
    )


def held_out_micro_batches(dataset: PairDataset, budget: int) -> list[list[int]]:
    """This rank's held-out pairs, as lists of rows of at most `budget` tokens."""
    lengths = [data.pair_tokens(pair) for pair in dataset.val]
    return data.held_out_micro_batches(lengths, budget)


def training_micro_batches(dataset: PairDataset, step: int, budget: int) -> list[list[int]]:
    """This rank's share of a step's pairs, as lists of rows of at most `budget` tokens, the longest first."""
    lengths = dataset.batches.lengths
    return data.micro_batches(data.shard(dataset.batches[step], lengths), lengths, budget)


def step_flops(models: Roles, dataset: PairDataset, step: int) -> float:
    """FLOPs of a step of DPO by formula: the update on all ranks' pairs; in the first epoch the reference's forward."""
    batch = [dataset.train[row] for row in dataset.batches[step]]
    tokens = sum(sum(pair[side]["mask"]) for pair in batch for side in ("chosen", "rejected"))
    net, spans = models.net.config, [span for pair in batch for span in data.pair_spans(pair)]
    cost = flops.update(net, spans, tokens, models.adapter_size(models.adapter), models.adapter is None)
    if step < dataset.batches.per_epoch:
        cost += flops.forward(net, spans, tokens, models.adapter_size("reference"))
    return cost


def shown_by_explain(dataset: PairDataset) -> list[dict]:
    """What --explain shows: the examples of step 0."""
    return [dataset.train[row][side] for row in dataset.batches[0] for side in ("chosen", "rejected")]


def add_reference_logprobs(run: Run, frozen: Gemma, dataset: PairDataset, steps: int) -> None:
    """Fill dataset.ref_logprobs: summed log-probs of both answers under the frozen reference, cached or computed.

    They are made in the very micro-batches of the first epoch and of the evaluation, where they will be compared: so
    the first margin is 0 to the bit. --explain takes zeros: a step takes as long, and nothing is left in the cache.
    """
    if run.explained:
        dataset.ref_logprobs["train"] = torch.zeros(len(dataset.train), 2)
        return
    budget = run.training.micro_batch_tokens
    first_epoch = range(min(steps, dataset.batches.per_epoch))
    micro_batches = {
        "train": [rows for step in first_epoch for rows in training_micro_batches(dataset, step, budget)],
        "val": held_out_micro_batches(dataset, budget),
    }
    for split, cuts in micro_batches.items():
        pairs = getattr(dataset, split)
        key = [run.start_key, dataset.fingerprint, split, cuts, dist.world_size(), torch.__version__]
        started = time.perf_counter()
        with run.autocast, lora.using(frozen, "reference"):
            dataset.ref_logprobs[split] = reference_logprobs(frozen, pairs, cuts, key)
        seconds = time.perf_counter() - started
        say(f"reference log-probs of {split}: {seconds:.1f} s")
        if split == "train":
            dataset.reference_seconds = seconds


def reference_logprobs(frozen: Gemma, pairs: list[dict], micro_batches: list[list[int]], key: list) -> Tensor:
    """Summed log-probs of both answers by the active adapter (pairs, 2) fp64, chosen first.

    From the cache where a run with the same `key` left them; micro_batches: this rank's rows.
    """

    @torch.no_grad()
    def compute():
        logprobs = torch.zeros(len(pairs), 2, dtype=torch.float64)
        for number in range(max(dist.gather_rows([len(micro_batches)]))):
            if number % 16 == 0:
                dist.barrier()  # so that ranks do not drift apart by more than these: training.timeout counts it
            if number < len(micro_batches):
                rows = micro_batches[number]
                tokens, mask = data.collate_pairs([pairs[row] for row in rows], frozen.device)
                summed = (model.sequence_logprobs(frozen, tokens, mask) * mask).sum(1)
                logprobs[rows] = summed.cpu().double().view(-1, 2)
        return dist.sum_tensor(logprobs).tolist()

    name = cache.key(key, gemma, losses, lora, model)
    rows = cache.records(cache.root() / "reference" / f"{name}.jsonl", name, compute)
    return torch.tensor(rows, dtype=torch.float64)


@torch.no_grad()
def evaluate(
    run: Run, models: Roles, dataset: PairDataset, objective: Callable, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """({metric: (pairs,)}, {eval/metric: mean}) over the held-out pairs of all ranks.

    objective(logprobs, micro_batch, rl) -> (loss of each pair (pairs,), loss of each chosen token (pairs, T-1) or None,
    {metric: (pairs,)} with these `names`). eval/loss is the mean over pairs plus the mean over chosen tokens.
    Beside these: the exact entropy and KL to the reference of the first EXACT_KL_ROWS pairs' chosen answers.
    """
    micro_batches = held_out_micro_batches(dataset, run.training.micro_batch_tokens)
    columns = {name: torch.zeros(len(dataset.val), dtype=torch.float64) for name in names}
    pair_loss = token_loss = 0.0
    for rows in micro_batches:
        micro = dataset.micro_batch("val", rows, models.net.device)
        with run.autocast:
            logprobs = model.sequence_logprobs(models.net, micro.tokens, micro.mask)
        per_pair, per_token, metrics = objective(logprobs, micro, run.cfg.rl)
        pair_loss += per_pair.sum().item()
        token_loss += 0.0 if per_token is None else per_token.sum().item()
        for name, values in metrics.items():
            columns[name][rows] = values.cpu().double()
    columns = {name: dist.sum_tensor(column) for name, column in columns.items()}
    pair_loss, token_loss = dist.sum_all(pair_loss, token_loss)
    chosen_tokens = sum(sum(pair["chosen"]["mask"]) for pair in dataset.val)
    loss = pair_loss / len(dataset.val) + token_loss / chosen_tokens
    few = [[row for row in rows if row < model.EXACT_KL_ROWS] for rows in micro_batches]
    chosen = [pair["chosen"] for pair in dataset.val]
    with run.autocast:
        exact = model.mean_entropy_and_kl(models.net, models.frozen, chosen, [rows for rows in few if rows])
    means = {f"eval/{name}": column.mean().item() for name, column in columns.items()}
    return columns, {"eval/loss": loss} | means | exact


def report(run_dir: Path, metrics: dict[str, Tensor], pairs: list[dict]) -> None:
    """Write report.json from evaluate's per-pair metrics and say it."""
    rows = preferences.implicit_report(metrics, pairs)
    log.write_json(run_dir / "report.json", rows)
    for name, row in rows.items():
        if isinstance(row, dict):
            say(f"{name.replace('_', ' ')}: {preferences.in_words(row)}")
