"""Preference pairs made from a model's own samples, for tasks whose data has none; kept as JSONL by content hash."""

import json
import os
import shutil

import torch

from common import base, chat, data, dist, rollouts
from common.log import UserError, say

ROWS = 64  # completions sampled together


def prompt_ids(tokenizer, record):
    """Token ids of a record's prompt up to where the answer begins."""
    return chat.encode(tokenizer, chat.normalise(record["prompt"])[0], add_generation_prompt=True)[0]


def sample(net, tokenizer, records, seed, sampling):
    """G completions of each record's prompt, by the active adapter, shared out over ranks -> lists of G lists of ids.

    sampling: {"group_size": G, "max_new_tokens", "temperature"}. Random numbers belong to (seed, record, sample).
    """
    group, limit = sampling["group_size"], sampling["max_new_tokens"]
    prompts = [prompt_ids(tokenizer, record) for record in records]
    found = torch.zeros(len(records), group, limit + 1, dtype=torch.float64)  # length first, then ids
    mine = sorted(range(len(records)), key=lambda i: (-len(prompts[i]), i))[dist.rank() :: dist.world_size()]
    for start in range(0, len(mine), max(1, ROWS // group)):
        rows = mine[start : start + max(1, ROWS // group)]
        numbers = [i * group + g for i in rows for g in range(group)]
        uniforms = rollouts.uniforms(seed, 0, numbers, limit)
        batch = rollouts.sample(net, [prompts[i] for i in rows], group, limit, sampling["temperature"], uniforms)
        for number, ids in zip(numbers, batch["completions"]):
            one = found[number // group, number % group]
            one[0], one[1 : len(ids) + 1] = len(ids), torch.tensor(ids, dtype=torch.float64)
    found = dist.sum_tensor(found).long().tolist()
    return [[one[1 : one[0] + 1] for one in samples] for samples in found]


def best_and_worst(records, answers, tokenizer, score):
    """(best text, worst text, best score, worst score) of each record's samples, ties by the first.

    score(records, answers) -> (rewards (n,), components), as make_reward of train_rl.py; each rank scores its share.
    """
    rewards = torch.zeros(len(records), len(answers[0]), dtype=torch.float64)
    for i in range(dist.rank(), len(records), dist.world_size()):
        rewards[i] = score([records[i]] * len(answers[i]), answers[i])[0].double()
    rewards = dist.sum_tensor(rewards)
    if not torch.isfinite(rewards).all():
        wrong = int((~torch.isfinite(rewards)).any(1).nonzero()[0])
        raise UserError(f"the reward of a sample for {records[wrong]['id']} is not finite")
    best, worst = rewards.argmax(1).tolist(), rewards.argmin(1).tolist()
    return [
        (*(chat.decode(tokenizer, samples[i]) for i in (b, w)), row[b].item(), row[w].item())
        for samples, row, b, w in zip(answers, rewards, best, worst)
    ]


def cached(key, splits, make):
    """{split: records with pairs} from the cache where a run with the same `key` left them, else from make(split).

    They lie there as a data folder of JSONL, which --dataset_path reads too. All ranks make together, the main one
    writes, whole or not at all.
    """
    folder = base.cache_dir() / "pairs" / key
    if dist.any_rank(not folder.is_dir()):
        made = {split: make(split) for split in splits}
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
