"""Preference pairs made from a model's own samples, for tasks whose data has none; kept as JSONL under a hash of
what decides them."""

import sys
from collections.abc import Callable

import numpy as np
import torch

from common import chat, config, data, decoder, dist, functions, gemma, log, lora, rewards, rollouts, stats, tasks
from common.log import UserError, say, warn
from common.prompts import encode_prompts
from common.roles import Roles
from common.run import Run
from common.runtime import cache, resume
from common.runtime.types import Gemma, Tokenizer
from common.tasks import text

ROWS = 64  # completions sampled together
MATCHED = 5  # tokens by which two answers may differ and still count as equally long
# what decides which pairs are made, and what is written of them
SOURCES = (chat, decoder, functions, gemma, lora, rewards, rollouts, text, sys.modules[__name__])


def sample(net: Gemma, tokenizer: Tokenizer, records: list[dict], sampling: dict) -> list[list[list[int]]]:
    """G completions of each record's prompt, by the active adapter, shared out over ranks -> lists of G lists of ids.

    sampling: {"group_size": G, "max_new_tokens", "temperature", "seed"}; a number belongs to (seed, record, sample).
    """
    group_size, limit = sampling["group_size"], sampling["max_new_tokens"]
    if group_size < 2:
        raise UserError("rl.group_size: best and worst need at least 2 samples per prompt")
    dialogues = [(record, chat.normalise(record["prompt"])[0]) for record in records]
    encoded = [ids for ids, _ in data.encode_dialogues(dialogues, tokenizer, add_generation_prompt=True)]
    longest_first = sorted(range(len(records)), key=lambda i: (-len(encoded[i]), i))
    prompts_per_pass = max(1, ROWS // group_size) * dist.world_size()
    bar = log.progress(len(records), unit="prompt")
    answers = []
    for start in range(0, len(longest_first), prompts_per_pass):
        dist.barrier()  # so that ranks do not drift apart by more than a pass
        bar.update(min(prompts_per_pass, len(records) - start))
        mine = longest_first[start : start + prompts_per_pass][dist.rank() :: dist.world_size()]
        if not mine:
            continue
        numbers = [i * group_size + g for i in mine for g in range(group_size)]
        uniforms = rollouts.uniforms(sampling["seed"], 0, numbers, limit)
        prompt_ids = [encoded[i] for i in mine]
        try:
            batch = rollouts.sample(net, prompt_ids, group_size, limit, sampling["temperature"], uniforms)
        except FloatingPointError as error:
            raise UserError(f"no pairs can be made: {error}") from error
        completions = batch["completions"]
        answers += [[i, completions[n * group_size : (n + 1) * group_size]] for n, i in enumerate(mine)]
    bar.close()
    by_record = dict(dist.gather_rows(answers))
    return [by_record[i] for i in range(len(records))]


def best_and_worst(
    records: list[dict], answers: list[list[list[int]]], tokenizer: Tokenizer, score: Callable
) -> list[tuple[dict, dict]]:
    """[(best, worst)] of each record's samples, ties by the first; see pair_record for a side.

    score(records, answers) -> (rewards (n,), a dict of components each); each rank scores its share, and all refuse
    together (UserError) where one cannot score or a score is not finite.
    """
    sides, failure = [], None
    try:
        for i in range(dist.rank(), len(records), dist.world_size()):
            scores, parts = score([records[i]] * len(answers[i]), answers[i])
            if not torch.isfinite(scores).all():
                words = "is not finite: a pair needs a score of each sample"
                raise UserError(f"the reward of a sample for {records[i]['id']} {words}")
            picked = [
                {
                    "text": chat.decode(tokenizer, answers[i][k]),
                    "ids": answers[i][k],
                    "stopped": answers[i][k][-1] in chat.STOP_TOKENS,
                    "score": scores[k].item(),
                    "parts": parts[k],
                }
                for k in (int(scores.argmax()), int(scores.argmin()))
            ]
            sides.append([i, picked])
    except UserError as error:
        failure = error
    log.refuse_together(failure, "another rank could not score its samples")
    by_record = dict(dist.gather_rows(sides))
    return [tuple(by_record[i]) for i in range(len(records))]


def pair_record(record: dict, good: dict, bad: dict, suffix: str = "") -> dict:
    """A record whose answers are two sides, with what decided.

    A side is {"text", "ids": as sampled, "stopped": by itself, "score", "parts"}, or {"text"} alone. The ids are kept,
    since the text may have other ids when it is encoded again, and it is the sampled ones that were scored.
    """
    sides = {"response": good, "rejected": bad}
    return record | {
        "id": record["id"] + suffix,
        "response": good["text"],
        "rejected": bad["text"],
        "scores": {key: {"total": side["score"], **side["parts"]} for key, side in sides.items() if "score" in side},
        "answer_ids": {key: side["ids"] for key, side in sides.items() if "ids" in side},
        "unfinished": [key for key, side in sides.items() if not side.get("stopped", True)],
    }


def answerable(records: dict[str, list[dict]], tokenizer: Tokenizer, max_tokens: int) -> dict[str, list[dict]]:
    """{split: records} with a prompt of at most `max_tokens` tokens, which leave room for an answer.

    The others, and those without a user turn, are left out and counted. UserError where none remains.
    """
    kept = {}
    for split, rows in records.items():
        short_enough, counts = encode_prompts(rows, tokenizer, max_tokens)
        if len(short_enough) < len(rows):
            log.say_counts(split, counts | {"kept": len(short_enough)})
        if not short_enough:
            raise UserError(f"{split}: no prompt has at most {max_tokens} tokens: raise training.max_seq_length")
        kept[split] = [prompt.record for prompt in short_enough]
    return kept


def from_policy(run: Run, models: Roles, records: dict[str, list[dict]], score: Callable) -> dict[str, list[dict]]:
    """{split: records} with the best against the worst of the policy's own samples, as it is at the start.

    They are kept for later runs of the same start, data and settings; --explain makes those of a few records per split
    and keeps none.
    """
    cfg, rl = run.cfg, run.cfg.rl
    rewards.check_references(cfg, records)
    records = answerable(records, models.tokenizer, cfg.training.max_seq_length - rl.max_new_tokens)
    sampling = {"group_size": rl.group_size, "max_new_tokens": rl.max_new_tokens, "temperature": rl.temperature}
    sampling["seed"] = cfg.seed
    reward = [tasks.fingerprint(cfg.task), config.plain(cfg.reward), rewards.fingerprint(cfg.reward, cfg.task)]
    few = max(min(cfg.training.batch_size, 4), dist.world_size()) if run.explained else None
    key = None if run.explained else resume.fingerprint([run.start_key, sampling, reward, records])
    records = {split: rows[:few] for split, rows in records.items()}

    def make(split):
        samples = sample(models.frozen, models.tokenizer, records[split], sampling)
        sides = best_and_worst(records[split], samples, models.tokenizer, score)
        return [
            pair_record(record, best, worst)
            for record, (best, worst) in zip(records[split], sides, strict=True)
            if best["score"] > worst["score"]
        ]

    with run.autocast:
        made = cached(key, tuple(records), make)
    for split, rows in made.items():
        unfinished = sum(len(record["unfinished"]) for record in rows)
        say(
            f"{split}: {len(rows)} pairs of {len(records[split])} prompts, {unfinished} answers cut off; "
            f"best: {mean_scores(rows, 'response')}; worst: {mean_scores(rows, 'rejected')}"
        )
    return made


def mean_scores(records: list[dict], side: str) -> str:
    """The mean of the total and of each component over one side of pairs, as text."""
    scores = [record["scores"][side] for record in records]
    return ", ".join(f"{name} {sum(score[name] for score in scores) / len(scores):.2f}" for name in scores[0])


def cached(key: str | None, splits: tuple[str, ...], make: Callable[[str], list[dict]]) -> dict[str, list[dict]]:
    """{split: records with pairs} from the cache where a run with the same `key` left them, else from make(split).

    Without a key they are made and not kept. They lie there as a data folder of JSONL, which --dataset_path reads too.
    All ranks make together, the main one writes, whole or not at all. UserError where a split has no pair.
    """
    folder = None if key is None else cache.root() / "pairs" / cache.key(key, *SOURCES)
    if folder and not dist.any_rank(not folder.is_dir()):
        say(f"pairs from {folder}")
        return {split: data.load_split(folder, split) for split in splits}
    made = {split: make(split) for split in splits}
    empty = [split for split, records in made.items() if not records]
    if empty:
        why = "all samples of a prompt score the same, for every prompt that was tried"
        raise UserError(f"{empty[0]}: {why}: no pair can be made")
    if folder is None:
        return made

    def write(target):
        for split, records in made.items():
            log.replace_records(target / f"{split}.jsonl", records)

    if dist.is_main():
        try:
            cache.build_once(folder, write)
            say(f"pairs made and kept in {folder}")
        except UserError as error:
            warn(f"not kept for the next run: {error}")
    return made


def floor_margins(pairs: list[dict], task: str) -> dict[str, list[float]]:
    """{rule: margin of each pair}, above 0 where a rule without a model prefers the chosen answer.

    The shorter answer, and the task's own pair_rules. pairs: of data.encode_pairs.
    """
    lengths = [[sum(pair[side]["mask"]) for side in ("chosen", "rejected")] for pair in pairs]  # tokens
    rules = {"shorter answer": [rejected - chosen for chosen, rejected in lengths]}
    for name, score in tasks.load(task).pair_rules.items():
        rules[name] = [score(chosen) - score(rejected) for chosen, rejected in (pair["texts"] for pair in pairs)]
    return rules


def accuracy(margins: np.ndarray | list[float]) -> dict:
    """{"accuracy" (ties half), "interval" of 95 % (Wilson), "pairs"} of a rule whose margins are above 0 when right."""
    if not len(margins):
        return {"accuracy": None, "interval": None, "pairs": 0}
    rate, low, high = stats.preference_accuracy(margins)
    return {"accuracy": rate, "interval": [low, high], "pairs": len(margins)}


def in_words(row: dict) -> str:
    """What `accuracy` returned, as text."""
    low, high = row["interval"]
    return f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {row['pairs']} val pairs"


def implicit_report(metrics: dict[str, torch.Tensor], pairs: list[dict]) -> dict:
    """`accuracy` of the implicit preference on held-out pairs, beside that of length alone.

    metrics: {"chosen_change", "rejected_change"}, (pairs,) nats per token that each answer gained on the reference.
    """
    lengths = torch.tensor([[sum(pair[side]["mask"]) for side in ("chosen", "rejected")] for pair in pairs])
    change = torch.stack([metrics["chosen_change"], metrics["rejected_change"]], 1)  # nats per token
    longer = (lengths[:, 0] - lengths[:, 1]).double()
    margins = (change * lengths) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    rules = {
        "implicit_accuracy": margins,
        "implicit_accuracy_of_averages": change[:, 0] - change[:, 1],
        "floor_shorter_answer": -longer,
    }
    report = {name: accuracy(values.numpy()) for name, values in rules.items()}
    correlation = stats.correlation(margins.numpy(), longer.numpy())
    return report | {"correlation_of_margin_and_length_difference": correlation}
