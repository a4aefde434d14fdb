"""Rejection sampling: SFT data from the base's own samples. Of each prompt the best one by the reward is kept.

RAFT, Dong et al. 2023, one round. Samples are drawn as train_rl.py draws those of a step, in passes over the prompts. A
pass is a function of (seed, its number), so sampling goes on after the last whole pass.
"""

import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace as Config

from common import advantages, config, data, dist, experience, log, lora, model, prompts, rewards, roles, tasks
from common.log import UserError, say
from common.runtime import base, checkpoint, resume


def load_prompts(cfg: Config) -> tuple[dict[str, list[dict]], prompts.PromptDataset]:
    """(records by split, the prompts to sample answers to, rl.rollout_size in each pass)"""
    tokenizer = base.load_tokenizer(base.resolve(cfg.model.base_checkpoint))
    records, longest = data.load_train_and_val(cfg), cfg.training.max_seq_length - cfg.rl.max_new_tokens
    rewards.check_references(cfg, records)
    return records, prompts.encode(records, tokenizer, longest, cfg.rl.rollout_size, None, cfg.seed)


def sample_passes(cfg: Config, dataset: prompts.PromptDataset, folder: Path, keys: Sequence[str]) -> list[dict]:
    """rl.group_size samples of the base for rl.rollout_size prompts a pass, until the budget is spent.

    folder gets samples.jsonl, every sample with its reward, and metrics.jsonl, a record for each pass, which are
    returned. keys: hashes of what decides the samples; a folder that was begun with none of them is refused.
    """
    device = model.pick_device(cfg.device)
    resume.prepare(device)
    rl, base_folder = cfg.rl, base.resolve(cfg.model.base_checkpoint)
    dtype = model.pick_dtype(cfg.model.dtype, device)
    net, tokenizer = model.load(str(base_folder), device, dtype, quantize=cfg.model.peft_type == "qlora")
    lora.wrap(net)
    lora.use(net, None)
    models = roles.Roles(net.eval(), net, tokenizer, None, False)
    wants_model = rewards.needs_model(cfg.reward)
    score = roles.load_scorers(models, cfg, base.fingerprint(base_folder), wants_model, False)

    # --- resume after the last whole pass
    metrics, samples = folder / "metrics.jsonl", folder / "samples.jsonl"
    if dist.is_main():
        log.on_exit(checkpoint.lock_run(folder).release)
        known = folder / "run.json"
        if known.is_file() and read_key(known) not in keys:
            raise UserError(f"{folder} was sampled with other settings or data: choose another --logging.run_name")
        log.write_json(known, log.provenance(key=keys[0]))
        log.replace(folder / "config.yml", config.dump(cfg))
        checkpoint.truncate_log(metrics, 10**9)  # a torn line
    dist.barrier()
    passes = log.read_records(metrics) if metrics.exists() else []
    if dist.is_main():
        checkpoint.truncate_log(samples, len(passes) - 1)
    seen, cost = (passes[-1]["tokens_seen"], passes[-1]["flops_seen"]) if passes else (0, 0.0)

    # --- sample and score
    sizes = {"group_size": rl.group_size, "max_new_tokens": rl.max_new_tokens, "temperature": rl.temperature}
    budgets = cfg.training.budget_tokens or math.inf, cfg.training.budget_flops or math.inf
    bar = log.progress(None, len(passes), unit="pass")
    for step in itertools.count(len(passes)):
        if seen >= budgets[0] or cost >= budgets[1]:
            break
        started, mine = time.perf_counter(), experience.share(dataset.batch(step))
        rollout = experience.collect(net, mine, score, cfg.seed, f"rft/{step}", **sizes)
        rollout.rewards = advantages.missing_stop(rollout.rewards, rollout.stopped, rl.missing_stop_penalty)
        rollout.correct = tasks.load(cfg.task).correct
        log.write_records(samples, experience.lines(rollout, tokenizer, step))
        seen, cost = seen + rollout.sampled_tokens, cost + experience.step_flops(models, rollout, [], [])
        record = {"step": step} | experience.summary(rollout) | experience.group_metrics(rollout)
        record |= {"tokens_seen": seen, "flops_seen": cost, "seconds": time.perf_counter() - started}
        passes.append(record)
        log.write_records(metrics, [record])
        bar.update()
    bar.close()
    return passes


def read_key(path: Path) -> str | None:
    """The key of a folder of samples, from its run.json; None where that is damaged, or of a run of another kind."""
    try:
        return json.loads(path.read_text())["key"]
    except (ValueError, KeyError, TypeError):
        return None


def write_best_samples(cfg: Config, folder: Path, keys: Sequence[str]) -> None:
    """sample_passes, then train.jsonl and val.jsonl in folder, whole or not at all, for SFT.

    A best sample is kept if it stops by itself and is not known to be wrong. val is that of the data, or a tenth of
    what is kept where the data has prompts alone. UserError on all ranks where nothing is left for train.
    """
    records, dataset = load_prompts(cfg)
    sample_passes(cfg, dataset, folder, keys)
    task, n, failure = tasks.load(cfg.task), cfg.rl.group_size, None
    if dist.is_main():
        kept, groups = best_of_groups(log.read_records(folder / "samples.jsonl"), n, dataset, task.correct)
        answered = any(record["response"] for record in records["val"])
        val, train = (records["val"], kept) if answered else (kept[::10], [kept[i] for i in range(len(kept)) if i % 10])
        if train:
            for split, rows in (("val", val), ("train", train)):
                log.replace_records(folder / f"{split}.jsonl", rows)
            mean = sum(row["reward"] for row in kept) / len(kept)
            say(f"kept the best of {n} samples for {len(kept)} of {groups} prompts, their mean reward is {mean:.3f}")
        else:
            wanted = "stops by itself and is right" if task.correct else "stops by itself"
            failure = UserError(
                f"rft: of {groups} prompts, {len(kept)} have a best sample that {wanted}: too few to learn from"
            )
    log.refuse_together(failure, "rft")


def best_of_groups(
    lines: list[dict], group_size: int, dataset: prompts.PromptDataset, correct: str | None
) -> tuple[list[dict], int]:
    """([the record of each prompt with its best sample as the response], number of groups) of lines of samples.jsonl.

    correct: the part of the reward that is 1 for a right answer, or None.
    """
    groups, kept = groups_of(lines, group_size), []
    for (step, number), group in groups.items():
        best = max(group, key=lambda line: -math.inf if line["reward"] is None else line["reward"])
        right = best["parts"].get(correct, 1) == 1 and best["reward"] is not None
        if best["stopped"] and right and best["completion"].strip():
            record = answered_by(best, dataset.batch(step)[number].record)
            kept.append(record | {"reward": best["reward"]})
    return kept, len(groups)


def groups_of(lines: list[dict], group_size: int) -> dict[tuple[int, int], list[dict]]:
    """{(step, place of the prompt in its batch): its samples} of lines of samples.jsonl."""
    groups: dict[tuple[int, int], list[dict]] = {}
    for line in lines:
        groups.setdefault((line["step"], line["row"] // group_size), []).append(line)
    return groups


def answered_by(line: dict, record: dict) -> dict:
    """The record with this sample as its response."""
    answer = {"id": f"{record['id']}/{line['step']}", "response": line["completion"], "rejected": None}
    return record | answer
