"""What a frozen reference says about fixed data, computed once and kept by content hash."""

import hashlib
import json
import os
from pathlib import Path

import torch

from common import base, data, dist, gemma, lora, losses, model
from common.log import say


def cached(key, shape, compute):
    """The fp64 tensor of `shape` that compute() returns, from the cache where a run with the same `key` left it.

    key: a hash of everything that decides its bits (weights, data, dtype, layout); that of our own forward pass is
    added. compute() runs on all ranks together or on none; the main rank writes, whole or not at all. A damaged file is
    computed anew, and said.
    """
    sources = [Path(module.__file__).read_bytes() for module in (gemma, losses, lora, model)]
    name = hashlib.sha256(b"\0".join([key.encode(), *sources])).hexdigest()
    path = base.cache_dir() / "reference" / f"{name}.json"
    found = _read(path, shape) if dist.is_main() else None
    if dist.any_rank(found is not None):
        zeros = torch.zeros(shape, dtype=torch.float64)  # of the other ranks
        return dist.sum_tensor(zeros if found is None else torch.tensor(found, dtype=torch.float64).view(shape))
    value = compute()
    if dist.is_main():
        flat = value.flatten().tolist()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"value": flat, "sha256": _digest(flat)}))
        os.replace(draft, path)
    return value


@torch.no_grad()
def pair_logprobs(net, pairs, cuts):
    """Summed log-probs of both answers (pairs, 2) fp64, chosen first; `cuts` are this rank's micro-batches of rows."""
    found = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for number in range(max(dist.gather_rows([len(cuts)]))):
        if number % 16 == 0:
            dist.barrier()  # so that ranks do not drift apart by more than these: training.timeout counts it
        if number >= len(cuts):
            continue
        rows = cuts[number]
        tokens, mask = data.collate_pairs([pairs[i] for i in rows], net.device)
        found[rows] = (model.sequence_logprobs(net, tokens, mask) * mask).sum(1).cpu().double().view(-1, 2)
    return dist.sum_tensor(found)


def drift(net, frozen, examples, cuts):
    """Exact entropy of the policy and KL(policy || reference) a supervised token, in nats, over all ranks.

    `frozen` holds the reference: as its adapter of that name, or bare. `cuts` are this rank's micro-batches of rows.
    """
    found = divergence(net, frozen, "reference", examples, cuts).sum(0)
    entropy, kl, count = dist.sum_tensor(found).tolist()
    return {"eval/entropy": entropy / count, "eval/kl": kl / count}


@torch.no_grad()
def divergence(net, frozen, name, examples, cuts):
    """For each example, summed over its supervised tokens: exact entropy of `net` and KL to adapter `name` of `frozen`
    (None: the bare base), in nats, and the number of tokens -> (n, 3) fp64. Rows outside `cuts` stay zero."""
    found = torch.zeros(len(examples), 3, dtype=torch.float64)
    for rows in cuts:
        tokens, mask = data.collate([examples[i] for i in rows], net.device)
        hidden, index = model.sequence_hidden(net, tokens, mask)
        with lora.using(frozen, name):
            reference_hidden, _ = model.sequence_hidden(frozen, tokens, mask)
        kept = mask.bool()
        at = index[:, :-1][kept]
        both = losses.entropy_and_kl(
            hidden[at], reference_hidden[at], net.lm_head.weight, ref_head_weight=frozen.lm_head.weight
        )
        columns = [torch.zeros_like(mask).masked_scatter(kept, value).double().sum(1) for value in both]
        found[rows] = torch.stack([*columns, kept.double().sum(1)], 1).cpu()
    return found


def _read(path, shape):
    if not Path(path).is_file():
        return None
    try:
        saved = json.loads(path.read_text())
        if saved["sha256"] == _digest(saved["value"]) and len(saved["value"]) == torch.Size(shape).numel():
            return saved["value"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    say(f"{path} is damaged: computing the reference anew")
    return None


def _digest(flat):
    return hashlib.sha256(json.dumps(flat).encode()).hexdigest()
