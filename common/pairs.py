"""Preference pairs as a source of steps: encoded, with the frozen reference's log-probs, in batches and evaluations."""

import functools
import math
import time
from types import SimpleNamespace

import torch

from common import data, dist, log, lora, model, preferences, reference, resume
from common.log import UserError, say, say_counts

DRIFT = 128  # held-out pairs whose exact entropy and KL are measured: two whole distributions a token cost their time
PANELS = [
    ("loss (nats a pair)", ("loss", "eval/loss")),
    ("pair accuracy", ("accuracy", "eval/accuracy")),
    ("change against the reference (nats a token)", ("eval/chosen_change", "eval/rejected_change")),
    ("KL to the reference (nats a token)", ("eval/kl",)),
]


def source(records, tokenizer, max_length, size, seed):
    """Pairs as a source of steps of `size` pairs: train, val, lengths, fingerprint, per_epoch, pace, batch(step).

    batch(step) -> indices; pace: mean tokens a step. Says what was skipped. UserError where a split has no pair left.
    """
    found = {}
    for split, part in records.items():
        found[split], counts = data.encode_pairs(part, tokenizer, max_length)
        say_counts(split, counts)
        if not found[split]:
            raise UserError(f"{split}: no usable pair in {counts['records']} records")
    train, val = found["train"], found["val"]
    lengths, per_epoch = [data.pair_tokens(pair) for pair in train], math.ceil(len(train) / size)
    batches = functools.lru_cache(1)(functools.partial(data.epoch_batches, lengths, size, seed))
    digest = resume.fingerprint([[p["id"], p["chosen"], p["rejected"]] for p in train + val])
    return SimpleNamespace(train=train, val=val, lengths=lengths, per_epoch=per_epoch, fingerprint=digest,
                           pace=sum(lengths) / per_epoch,
                           batch=lambda step: batches(step // per_epoch)[step % per_epoch])  # fmt: skip


def from_policy(run, records, sampling, about):
    """preferences.from_policy of a run: its first policy's samples, scored by its reward; kept by content hash.

    A look (run.look pairs a split) makes few and leaves nothing behind.
    """
    key = None if run.look else resume.fingerprint([run.about, sampling, about, records, run.score.about])
    records = {split: part[: run.look or None] for split, part in records.items()}
    return preferences.from_policy(run.frozen, run.tokenizer, records, run.score, sampling, key)


def cut(rows, lengths, budget):
    """This rank's share of a step's pairs, as micro-batches, the longest first."""
    mine = sorted(rows, key=lambda i: (-lengths[i], i))[dist.rank() :: dist.world_size()]
    return data.micro_batches(mine, lengths, budget)


def look(source):
    """What --explain shows: the examples of step 0."""
    return [source.train[i][side] for i in source.batch(0) for side in ("chosen", "rejected")]


def hear_reference(run, steps, budget):
    """Summed log-probs of both answers under the frozen reference, from the cache or computed.

    They are made in the very micro-batches of the first epoch and of the evaluation, where they will be compared. Sets
    run.ref_logprobs, (pairs, 2) of train, run.reference_seconds, and run.held_out, the batch of val; run.about is what
    decides their bits beside data and layout.
    """
    source, found, seconds = run.source, {}, {}
    first, mine = range(min(steps, source.per_epoch)), range(dist.rank(), len(source.val), dist.world_size())
    layouts = {"train": [rows for step in first for rows in cut(source.batch(step), source.lengths, budget)],
               "val": data.micro_batches(mine, [data.pair_tokens(pair) for pair in source.val], budget)}  # fmt: skip
    for split, layout in layouts.items():
        part = getattr(source, split)
        compute = functools.partial(reference.pair_logprobs, run.frozen, part, layout)
        about = [run.about, source.fingerprint, split, layout, dist.world_size(), torch.__version__]
        started = time.perf_counter()
        with lora.using(run.frozen, "reference"):
            found[split] = reference.cached(resume.fingerprint(about), (len(part), 2), compute)
        seconds[split] = time.perf_counter() - started
        say(f"reference log-probs of {split}: {seconds[split]:.1f} s")
    run.ref_logprobs, run.reference_seconds = found["train"], seconds["train"]
    run.held_out = batch(source.val, found["val"], layouts["val"], run.net.device)


def batch(pairs, ref_logprobs, cuts, device):
    """The rows of these micro-batches (lists of pairs) as one batch: chosen, rejected, chosen, ...; and its plan.

    sizes (B, 2): what a row adds to the divisors of the objective's two terms, pairs and tokens of chosen answers;
    costs (B,): a pair's tokens on its chosen row.
    """
    order, plan, start = [i for part in cuts for i in part], [], 0
    for part in cuts:
        plan.append([*range(2 * start, 2 * (start + len(part)))])
        start += len(part)
    tokens, mask = data.collate_pairs([pairs[i] for i in order], device) if order else torch.zeros(2, 0, 2)
    chosen = (torch.arange(len(tokens), device=device) % 2 == 0).float()
    sizes = torch.stack([chosen, chosen * mask.sum(1)], 1)
    costs = torch.tensor([cost for i in order for cost in (data.pair_tokens(pairs[i]), 0)])
    ids = [pairs[i]["id"] for i in order for _ in range(2)]
    return {"tokens": tokens, "mask": mask, "ref_logprobs": ref_logprobs[order].flatten().float().to(device),
            "sizes": sizes, "costs": costs, "ids": ids, "plan": [plan],
            "members": [[*range(len(tokens))]]}  # fmt: skip


@torch.no_grad()
def evaluate(net, frozen, pairs, whole, objective, names):
    """({metric: (pairs,)}, {eval/metric: mean}) over the held-out pairs of all ranks; `whole` is this rank's batch.

    objective(outputs, batch) -> ([(loss, weight)], {metric: (pairs,)}) with metrics of these `names`. Beside them: its
    loss, and the exact entropy and KL to the reference of the first DRIFT pairs' chosen answers.
    """
    number, cuts = {pair["id"]: i for i, pair in enumerate(pairs)}, []
    found = {name: torch.zeros(len(pairs), dtype=torch.float64) for name in names}
    losses = torch.zeros(whole["sizes"].shape[1], dtype=torch.float64)
    for rows in whole["plan"][0]:
        piece = data.piece(whole, rows)
        terms, metrics = objective({"logprobs": model.sequence_logprobs(net, piece["tokens"], piece["mask"])}, piece)
        losses[: len(terms)] += torch.tensor([(term * weight).sum().item() for term, weight in terms])
        cuts.append([number[whole["ids"][row]] for row in rows[::2]])
        for name, values in metrics.items():
            found[name][cuts[-1]] = values.cpu().double()
    found = {name: dist.sum_tensor(values) for name, values in found.items()}
    loss = sum(dist.sum_tensor(losses) / dist.sum_tensor(whole["sizes"].cpu().double().sum(0)))
    few = [[i for i in rows if i < DRIFT] for rows in cuts]
    moved = reference.drift(net, frozen, [pair["chosen"] for pair in pairs], [rows for rows in few if rows])
    means = {f"eval/{name}": values.mean().item() for name, values in found.items()}
    return found, {"eval/loss": loss.item()} | means | moved


def report(run_dir, found, pairs):
    """Write report.json from evaluate's per-pair metrics and say it; returns what to plot."""
    worth = preferences.implicit_report(found, pairs)
    log.write_json(run_dir / "report.json", worth)
    for name, row in worth.items():
        if isinstance(row, dict):
            low, high = row["interval"]
            say(f"{name.replace('_', ' ')}: {row['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {row['pairs']} pairs")
    return PANELS
