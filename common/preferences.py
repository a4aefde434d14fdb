"""Preference pairs made from a model's own samples, for tasks whose data has none; kept as JSONL by content hash."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

from common import base, chat, data, decoder, dist, gemma, log, lora, rollouts, stats
from common import rewards as heuristics
from common.log import UserError, say

ROWS = 64  # completions sampled together
SOURCES = (chat, decoder, gemma, heuristics, lora, rollouts)  # what decides which pairs are made


def sample(net, tokenizer, records, sampling):
    """G completions of each record's prompt, by the active adapter, shared out over ranks -> lists of G lists of ids.

    sampling: {"group_size": G, "max_new_tokens", "temperature", "seed"}; a number belongs to (seed, record, sample).
    """
    group, limit = sampling["group_size"], sampling["max_new_tokens"]
    if group < 2:
        raise UserError("rl.group_size: best and worst need at least 2 samples a prompt")
    prompts = [chat.encode_prompt(tokenizer, record["prompt"]) for record in records]
    found = torch.zeros(len(records), group, limit + 1, dtype=torch.float64)  # length first, then ids
    order = sorted(range(len(records)), key=lambda i: (-len(prompts[i]), i))
    together = max(1, ROWS // group) * dist.world_size()
    for start in range(0, len(order), together):
        dist.barrier()  # so that ranks do not drift apart by more than a batch
        rows = order[start : start + together][dist.rank() :: dist.world_size()]
        if not rows:
            continue
        numbers = [i * group + g for i in rows for g in range(group)]
        uniforms = rollouts.uniforms(sampling["seed"], 0, numbers, limit)
        batch = rollouts.sample(net, [prompts[i] for i in rows], group, limit, sampling["temperature"], uniforms)
        for number, ids in zip(numbers, batch["completions"]):
            one = found[number // group, number % group]
            one[0], one[1 : len(ids) + 1] = len(ids), torch.tensor(ids, dtype=torch.float64)
    found = dist.sum_tensor(found).long().tolist()
    return [[one[1 : one[0] + 1] for one in samples] for samples in found]


def best_and_worst(records, answers, tokenizer, score):
    """[(best, worst)] of each record's samples, ties by the first; a side is {"text", "stopped", "score", "parts"}.

    score(records, answers) -> (rewards (n,), a dict of components each); each rank scores its share, and all refuse
    together (UserError) where one cannot score or a score is not finite.
    """
    rewards, wrong = torch.zeros(len(records), len(answers[0]), dtype=torch.float64), None
    try:
        for i in range(dist.rank(), len(records), dist.world_size()):
            rewards[i] = score([records[i]] * len(answers[i]), answers[i])[0].double()
            if not torch.isfinite(rewards[i]).all():
                raise UserError(f"the reward of a sample for {records[i]['id']} is not finite")
    except UserError as error:
        wrong = error
    log.refuse_together(wrong, "another rank could not score its samples")
    rewards, found = dist.sum_tensor(rewards), []
    for record, samples, row in zip(records, answers, rewards):
        picked = [int(row.argmax()), int(row.argmin())]
        _, parts = score([record] * 2, [samples[i] for i in picked])
        sides = [{"text": chat.decode(tokenizer, samples[i]), "stopped": samples[i][-1] in chat.STOP_TOKENS,
                  "score": row[i].item(), "parts": part} for i, part in zip(picked, parts)]  # fmt: skip
        found.append(tuple(sides))
    return found


def pair_record(record, good, bad, suffix=""):
    """A record whose answers are two sides as best_and_worst gives them (or {"text"} alone), with what decided."""
    sides = {"response": good, "rejected": bad}
    scores = {key: {"total": side["score"], **side["parts"]} for key, side in sides.items() if "score" in side}
    return record | {"id": record["id"] + suffix, "response": good["text"], "rejected": bad["text"], "scores": scores,
                     "unfinished": [key for key, side in sides.items() if not side.get("stopped", True)]}  # fmt: skip


def from_policy(net, tokenizer, records, score, sampling, key):
    """{split: records} with the best against the worst of the active adapter's own samples; see sample and cached."""

    def make(split):
        found = best_and_worst(records[split], sample(net, tokenizer, records[split], sampling), tokenizer, score)
        pairs = zip(records[split], found)
        return [pair_record(record, good, bad) for record, (good, bad) in pairs if good["score"] > bad["score"]]

    made = cached(key, tuple(records), make)
    for split, part in made.items():
        cut, means = sum(len(record["unfinished"]) for record in part), []
        for side in ("response", "rejected"):
            names = part[0]["scores"][side]
            average = [sum(record["scores"][side][name] for record in part) / len(part) for name in names]
            means.append(", ".join(f"{name} {value:.2f}" for name, value in zip(names, average)))
        say(f"{split}: {len(part)} pairs of {len(records[split])} prompts, {cut} answers cut off; best: {means[0]}; "
            f"worst: {means[1]}")  # fmt: skip
    return made


def cached(key, splits, make):
    """{split: records with pairs} from the cache where a run with the same `key` left them, else from make(split).

    Without a key they are made and not kept. They lie there as a data folder of JSONL, which --dataset_path reads too.
    All ranks make together, the main one writes, whole or not at all.
    """
    if key is None:
        return {split: make(split) for split in splits}
    sources = [Path(module.__file__).read_bytes() for module in SOURCES]
    name = hashlib.sha256(b"\0".join([key.encode(), *sources])).hexdigest()
    folder = base.cache_dir() / "pairs" / name
    if dist.any_rank(not folder.is_dir()):
        made = {split: make(split) for split in splits}
        empty = [split for split, records in made.items() if not records]
        if empty:
            raise UserError(
                f"{empty[0]}: all samples of a prompt score the same, for every prompt: no pair can be made"
            )
        if dist.is_main() and not folder.is_dir():
            draft = folder.with_suffix(f".{os.getpid()}")
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            for split, records in made.items():
                (draft / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            os.rename(draft, folder)
            say(f"pairs made and kept in {folder}")
        return made
    say(f"pairs from {folder}")
    return {split: data.load_split(folder, split) for split in splits}


def implicit_report(found, pairs):
    """Held-out implicit preference accuracy (ties half) with a 95 % Wilson interval, beside length alone.

    found: {"chosen_change", "rejected_change"}, (pairs,) nats a token that each answer gained on the reference.
    """
    sizes = torch.tensor([[sum(pair[side]["mask"]) for side in ("chosen", "rejected")] for pair in pairs])
    change = torch.stack([found["chosen_change"], found["rejected_change"]], 1)  # nats a token
    longer = (sizes[:, 0] - sizes[:, 1]).double()
    sums = (change * sizes) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    rows = {"implicit_accuracy": sums, "implicit_accuracy_of_averages": change[:, 0] - change[:, 1],
            "floor_shorter_answer": -longer}  # fmt: skip
    rates = {name: stats.preference_accuracy(values.numpy()) for name, values in rows.items()}
    return {name: {"accuracy": rate, "interval": [low, high], "pairs": len(pairs)}
            for name, (rate, low, high) in rates.items()} | {
        "correlation_of_margin_and_length_difference": stats.correlation(sums.numpy(), longer.numpy())
    }  # fmt: skip
