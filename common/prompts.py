"""Prompts that are sampled from: the data set of online RL, its evaluation on held-out prompts, and the report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace as Config

from common import advantages, chat, data, dist, experience, log, model, rollouts, stats, tasks
from common.log import UserError, say, say_counts
from common.roles import Roles
from common.run import Run
from common.runtime import explain, resume
from common.runtime.types import Tokenizer

TOKENS_PER_PASS = 2048  # where exact entropy and KL are measured
PICKED_BY_REWARD = (
    "best/ is picked by the reward that is optimised: where that is hacked, it is the most hacked checkpoint; name a "
    "reward model that no policy is trained on (evaluation.reward_checkpoint)"
)
EXPLAIN_ROWS = 4  # rows of a rollout that --explain shows
PANELS = (
    ("reward of a completion", ("reward", "eval/reward")),
    ("KL to the reference (nats per token)", ("kl", "eval/kl")),
    ("completion (tokens)", ("length", "eval/length")),
    ("entropy (nats per token)", ("entropy", "eval/entropy")),
)


@dataclass
class Prompt:
    """One prompt to sample answers to."""

    id: str
    ids: list  # of its tokens, up to where the answer begins
    record: dict  # of the data


KNOWN_KEYS = {"id", "prompt", "response", "rejected", "reference", "margin", "unfinished", "answer_ids"}  # of records


@dataclass
class PromptDataset:
    """Prompts to train on, `size` in each step, and held-out ones."""

    train: list  # of Prompt
    val: list
    size: int
    seed: int
    fingerprint: str  # of all that is in it

    @property
    def per_epoch(self) -> int:
        """Steps until every prompt was sampled once; what does not fill a step is left out of the epoch."""
        return len(self.train) // self.size

    @property
    def tokens_per_step(self) -> float:
        """Prompt tokens that a step takes on average, each prompt counted once."""
        return sum(len(prompt.ids) for prompt in self.train) / len(self.train) * self.size

    def batch(self, step: int) -> list:
        """The prompts of a step, of all ranks: a function of (seed, step)."""
        epoch, place = divmod(step, self.per_epoch)
        order = data.shuffled(len(self.train), f"prompts/{self.seed}/{epoch}")
        return [self.train[i] for i in order[place * self.size : (place + 1) * self.size]]


def encode(
    records: dict[str, list[dict]], tokenizer: Tokenizer, max_tokens: int, size: int, max_val: int | None, seed: int
) -> PromptDataset:
    """The prompts of {split: records} that leave room for an answer.

    Those of more than `max_tokens` tokens or without a user turn are left out and counted; max_val bounds the held-out
    ones (None: all). UserError where too few remain.
    """
    if max_tokens < 1:
        raise UserError(
            f"rl.max_new_tokens leaves {max_tokens} of training.max_seq_length's tokens to a prompt: "
            "lower rl.max_new_tokens or raise training.max_seq_length"
        )
    kept = {}
    for split, rows in records.items():
        kept[split], counts = encode_prompts(rows, tokenizer, max_tokens)
        say_counts(split, counts | {"kept": len(kept[split])})
    train, val = kept["train"], kept["val"][:max_val]
    if size < dist.world_size():
        raise UserError(f"rl.rollout_size: {size} prompts per step leave some of {dist.world_size()} ranks without one")
    longest = f"of at most {max_tokens} tokens (training.max_seq_length minus rl.max_new_tokens)"
    remedy = "lower rl.max_new_tokens, raise training.max_seq_length or take more data"
    if len(train) < size:
        raise UserError(
            f"train: {len(train)} prompts {longest}, at least {size} are needed, rl.rollout_size for a step: "
            f"lower rl.rollout_size, or {remedy}"
        )
    if len(val) < dist.world_size():
        raise UserError(f"val: {len(val)} prompts {longest}, at least {dist.world_size()} are needed: {remedy}")
    return PromptDataset(train, val, size, seed, resume.fingerprint([_identity(prompt) for prompt in train + val]))


def _identity(prompt):
    """What of a prompt decides a run: its tokens, its reference and the columns that a reward function may read."""
    others = {key: repr(value) for key, value in prompt.record.items() if key not in KNOWN_KEYS}
    return [prompt.id, prompt.ids, prompt.record["reference"], *([others] if others else [])]


def encode_prompts(records: list[dict], tokenizer: Tokenizer, max_tokens: int) -> tuple[list[Prompt], dict[str, int]]:
    """([Prompt of at most `max_tokens` tokens], {reason: how many were left out})."""
    counts, kept = {"records": len(records), "no_user_turn": 0, "prompt_too_long": 0}, []
    dialogues = [(record, chat.normalise(record["prompt"])[0]) for record in records]
    asked = [(record, turns) for record, turns in dialogues if turns]
    counts["no_user_turn"] = len(records) - len(asked)
    encoded = data.encode_dialogues(asked, tokenizer, add_generation_prompt=True)
    for (record, _), (ids, _) in zip(asked, encoded, strict=True):
        if len(ids) > max_tokens:
            counts["prompt_too_long"] += 1
        else:
            kept.append(Prompt(record["id"], ids, record))
    return kept, counts


def best_metric(cfg: Config, val: list[Prompt]) -> tuple[str, int]:
    """(key of the held-out metric that picks best/, 1 where more is better, else -1).

    evaluation.best_metric, or by rule: the task's own truth, which is the metric that says whether an answer is right
    or the first of its headline, where that is the task's own and every held-out record has an answer to compare with;
    else the judge (evaluation.reward_checkpoint); else the optimised reward.
    """
    task, chosen, judge = tasks.load(cfg.task), cfg.evaluation.best_metric, cfg.evaluation.reward_checkpoint
    better = {name: metric.better for name, metric in task.metrics.items() if metric.better} | {"reward": 1}
    better |= {"judge": 1} if judge else {}
    if chosen is None:
        known = all(tasks.right_answer(prompt.record) for prompt in val)
        own = [name for name in (task.correct, *task.headline) if known and name in task.metrics and name in better]
        chosen = [*own, "judge" if judge else "reward"][0]
    if chosen not in better:
        hint = "; judge needs evaluation.reward_checkpoint" if chosen == "judge" else log.hint(chosen, better)
        raise UserError(f"evaluation.best_metric: expected {', '.join(better)}, got {chosen!r:.80}{hint}")
    return f"eval/{chosen}", better[chosen]


def evaluate(
    run: Run, models: Roles, dataset: PromptDataset, score: Callable, step: int
) -> tuple[list[dict], dict[str, float]]:
    """(lines for held_out.jsonl, {eval/metric: mean}): one answer to each held-out prompt, scored as in training.

    The same numbers are drawn at every evaluation, so that two can be compared prompt by prompt. Entropy and KL to the
    reference are exact, of the first model.EXACT_KL_ROWS answers, where there is a reference.
    """
    cfg, decoding = run.cfg, run.cfg.evaluation
    with run.autocast:
        prompts = experience.share(dataset.val)
        rollout = experience.collect(
            models.net,
            prompts,
            score,
            cfg.seed,
            "eval",
            group_size=1,
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature or 1.0,
            greedy=decoding.temperature == 0,
            top_p=decoding.top_p,
        )
        metrics = {}
        if models.adapter:
            metrics["eval/merge_survival"] = rollouts.merge_survival(models.net, models.adapter)
        if models.has_reference:
            metrics |= exact_entropy_and_kl(models, prompts, rollout)
        if models.judge:
            scores = models.judge(rollout.records, rollout.completions).double()
            total, count = dist.sum_all(scores.sum(), len(scores))
            metrics["eval/judge"] = total / count
    rollout.rewards = advantages.missing_stop(rollout.rewards, rollout.stopped, cfg.rl.missing_stop_penalty)
    metrics |= experience.summary(rollout, "eval/")
    if "eval/reward" not in metrics:
        raise UserError("reward.function: gave no score (None) to any held-out completion: nothing can be compared")
    return experience.lines(rollout, models.tokenizer, step), metrics


def exact_entropy_and_kl(models: Roles, prompts: dict[int, Prompt], rollout: experience.Rollout) -> dict[str, float]:
    """{"eval/entropy", "eval/kl"} of the first EXACT_KL_ROWS held-out answers, over all ranks."""
    examples = [
        {"ids": [*prompt.ids, *ids], "mask": [0] * len(prompt.ids) + [1] * len(ids)}
        for (number, prompt), ids in zip(prompts.items(), rollout.completions, strict=True)
        if number < model.EXACT_KL_ROWS
    ]
    lengths = [len(example["ids"]) for example in examples]
    micro_batches = data.micro_batches(range(len(lengths)), lengths, TOKENS_PER_PASS)
    return model.mean_entropy_and_kl(models.net, models.frozen, examples, micro_batches)


def shown_by_explain(rollout: experience.Rollout) -> list[dict]:
    """What --explain shows of a rollout's first rows: as examples with their mask; says each one's reward.

    Before that it says what all rows earned, and whether RL can learn from them.
    """
    explain.say_prospects(experience.summary(rollout) | experience.group_metrics(rollout), rollout.correct)
    shown = []
    for row in range(min(EXPLAIN_ROWS, len(rollout.ids))):
        reward, parts = rollout.rewards[row].item(), rollout.reward_parts[row]
        say(f"{rollout.ids[row]}: reward {reward:.3f}; " + ", ".join(f"{n} {v:.2f}" for n, v in parts.items()))
        end, answer = int(rollout.row_tokens[row]), len(rollout.completions[row])
        mask = [0] * (end - answer) + [1] * answer
        shown.append({"id": rollout.ids[row], "ids": rollout.tokens[row, :end].tolist(), "sampled": True, "mask": mask})
    return shown


def report(run_dir: Path, draws: int, missing_stop_penalty: float, best: str) -> None:
    """Write report.json from held_out.jsonl and say it; see compare. best: the metric that picked best/."""
    rows = compare(log.read_records(run_dir / "held_out.jsonl"), draws) | {"best_metric": best}
    rows |= {"warning": PICKED_BY_REWARD} if best == "eval/reward" else {}
    log.write_json(run_dir / "report.json", rows)
    if "reward" not in rows:
        return say("no val prompt has a reward both at the start and at the end")
    reward, length, stops = rows["reward"], rows["length"], rows["stop_rate"]
    low, high = reward["interval"]
    say(
        f"reward of {reward['prompts']} val prompts: {reward['first']:.3f} -> {reward['last']:.3f}, "
        f"{reward['difference']:+.3f} " + ("(no interval)" if low is None else f"[{low:+.3f}, {high:+.3f}]")
    )
    parts = [
        f"{name.removeprefix('reward/')} {row['first']:.2f} -> {row['last']:.2f}"
        for name, row in rows.items()
        if name.startswith("reward/")
    ]
    say(
        f"  its parts (higher is better): {', '.join(parts)}; tokens {length['first']:.1f} -> {length['last']:.1f}, "
        f"ended by themselves {stops['first']:.0%} -> {stops['last']:.0%}"
    )
    if missing_stop_penalty:
        lost = f"an answer that does not end by itself loses {missing_stop_penalty:g} (rl.missing_stop_penalty)"
        say(f"  in this reward {lost}; in evaluate.py's reward of test prompts it loses nothing")


def compare(lines: list[dict], draws: int) -> dict:
    """Held-out rewards of the last evaluation against the first, prompt by prompt: means, paired bootstrap interval.

    lines: of held_out.jsonl. -> {"reward": {"first", "last", "difference", "interval", "p"}, ...} for the reward, each
    component, the length in tokens and the share that stopped by itself. "prompts": of a row, those whose both answers
    have a score.
    """
    steps = sorted({line["step"] for line in lines})
    first, last = ({line["row"]: line for line in lines if line["step"] == step} for step in (steps[0], steps[-1]))

    def columns(line):
        components = {f"reward/{name}": line["parts"][name] for name in sorted(first[0]["parts"])}
        return {"reward": line["reward"], "length": line["tokens"], "stop_rate": line["stopped"]} | components

    before, after = ([columns(rows[number]) for number in sorted(first)] for rows in (first, last))
    report = {"steps": [steps[0], steps[-1]], "prompts": len(first)}
    for name in before[0]:
        both = [(old[name], new[name]) for old, new in zip(before, after, strict=True)]
        both = [pair for pair in both if None not in pair]  # where both have a score
        if not both:
            continue
        old, new = ([float(value) for value in column] for column in zip(*both, strict=True))
        difference, low, high, p = stats.paired_bootstrap(new, old, draws)
        report[name] = {
            "first": sum(old) / len(old),
            "last": sum(new) / len(new),
            "difference": difference,
            "interval": [low, high],
            "p": p,
            "prompts": len(both),
        }
    return report
