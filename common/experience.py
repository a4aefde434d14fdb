"""One step of on-policy data: prompts -> completions -> rewards -> a batch, and the plan of its updates.

Prompts, rows and minibatches are numbered over all ranks: a rank holds whole groups, and neither their number nor a
resume changes what is sampled or which rows are updated together.
"""

import random
import time
from types import SimpleNamespace

import torch

from common import advantages, chat, data, dist, log, losses, reference, resume, rollouts, stats, watch
from common.log import UserError, say, say_counts

DRIFT = 128  # held-out answers whose exact entropy and KL are measured: two whole distributions a token cost their time
TOGETHER = 2048  # tokens of them in one pass
LOOK = 4  # rows of a rollout that --explain shows
PANELS = [
    ("reward of a completion", ("reward", "eval/reward")),
    ("KL to the reference (nats a token)", ("kl", "eval/kl")),
    ("completion (tokens)", ("length", "eval/length")),
    ("entropy (nats a token)", ("entropy", "eval/entropy")),
]


def source(records, tokenizer, longest, size, most, seed):
    """Prompts as a source of steps of `size` prompts: train, val, fingerprint, per_epoch, pace, batch(step) -> indices.

    A prompt is {"id", "ids", "record"}. Those of more than `longest` tokens or without a user turn are left out and
    counted; `most` bounds the held-out ones (or None). pace: mean prompt tokens a step. UserError where too few remain.
    """
    found = {}
    for split, part in records.items():
        found[split], counts = fitting(part, tokenizer, longest)
        say_counts(split, counts | {"kept": len(found[split])})
    train, val = found["train"], found["val"][:most]
    if size < dist.world_size():
        raise UserError(f"rl.rollout_size: {size} prompts a step leave some of {dist.world_size()} ranks without one")
    for split, part, least in (("train", train, size), ("val", val, dist.world_size())):
        if len(part) < least:
            raise UserError(f"{split}: {len(part)} prompts of at most {longest} tokens (training.max_seq_length minus "
                            f"rl.max_new_tokens), at least {least} are needed")  # fmt: skip
    per_epoch = len(train) // size
    digest = resume.fingerprint([[p["id"], p["ids"], p["record"]["reference"]] for p in train + val])

    def batch(step):
        epoch, place = divmod(step, per_epoch)
        return shuffled(len(train), f"prompts/{seed}/{epoch}")[place * size : (place + 1) * size]

    pace = sum(len(prompt["ids"]) for prompt in train) / len(train) * size
    return SimpleNamespace(train=train, val=val, per_epoch=per_epoch, pace=pace, batch=batch, fingerprint=digest)


def fitting(records, tokenizer, longest):
    """([{"id", "ids", "record"}] of the prompts of at most `longest` tokens, {reason: how many were left out})."""
    counts, found = {"records": len(records), "no_user_turn": 0, "prompt_too_long": 0}, []
    for record in records:
        if not chat.normalise(record["prompt"])[0]:
            counts["no_user_turn"] += 1
            continue
        ids = chat.encode_prompt(tokenizer, record["prompt"])
        if len(ids) > longest:
            counts["prompt_too_long"] += 1
        else:
            found.append({"id": record["id"], "ids": ids, "record": record})
    return found, counts


def shuffled(count, key):
    """0 .. count - 1 in an order that is a function of `key`, a text."""
    order = list(range(count))
    random.Random(key).shuffle(order)
    return order


def share(chosen):
    """This rank's part of a step's prompts: {number in the step: prompt}."""
    return dict(list(enumerate(chosen))[dist.rank() :: dist.world_size()])


def listed(names, most=8):
    """Names for an error message, not too many of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def collect(net, prompts, numbers, score, sampling):
    """Completions of each prompt by the active adapter, with their rewards: a batch of rollouts.sample and more.

    numbers: the prompts' places in the step, over all ranks. score: of rewards.make. sampling: {"seed", "step",
    "group_size", "max_new_tokens", "temperature"} and more of rollouts.sample. Adds rewards (B,), parts (B dicts), rows
    (B numbers), records, ids, groups (B: which prompt), lengths and costs (B,), the tokens of completion and row,
    generated, the tokens of all ranks, and seconds.
    UserError on all ranks where one of them cannot sample or score, or a score is not finite.
    """
    more = {key: value for key, value in sampling.items() if key not in ("seed", "step")}
    group, limit = sampling["group_size"], sampling["max_new_tokens"]
    rows = [number * group + g for number in numbers for g in range(group)]
    uniforms = rollouts.uniforms(sampling["seed"], sampling["step"], rows, limit)
    records = [prompt["record"] for prompt in prompts for _ in range(group)]
    started, wrong = time.perf_counter(), None
    try:
        batch = rollouts.sample(net, [prompt["ids"] for prompt in prompts], uniforms=uniforms, **more)
        sampled = time.perf_counter()
        found = score(records, batch["completions"])
    except UserError as error:
        wrong = error
    except FloatingPointError as error:
        names = listed([prompt["id"] for prompt in prompts])
        wrong = UserError(f"step {sampling['step']}: {error}; nothing was updated; it was answering {names}")
    log.refuse_together(wrong, "another rank could not sample or score")
    return batch | {
        "rewards": found[0].float().to(batch["tokens"].device), "parts": found[1], "rows": rows, "records": records,
        "groups": [number for number in numbers for _ in range(group)], "lengths": batch["mask"].sum(1),
        "costs": batch["attention_mask"].sum(1), "ids": [f"{record['id']}/{row}" for record, row in zip(records, rows)],
        "generated": dist.sum_all(batch["mask"].sum())[0],
        "seconds": {"seconds_rollout": sampled - started, "seconds_reward": time.perf_counter() - sampled},
    }  # fmt: skip


def plan(batch, kept, prompts, parts, budget, key):
    """The updates of one rollout, parts = (epochs, minibatches): {"plan", "members"}, lists of epochs * minibatches.

    Whole groups are dealt out anew in every epoch by a permutation of all `prompts` of the step, of which this rank has
    some. members: this rank's rows of a minibatch, each in one minibatch of an epoch; plan: those that are `kept`
    (B bools), in micro-batches of `budget` tokens.
    """
    sizes, answers = ([int(n) for n in batch[name].tolist()] for name in ("costs", "lengths"))
    shared = [(group, size - answer) for group, size, answer in zip(batch["groups"], sizes, answers)]
    members = []
    for epoch in range(parts[0]):
        order = shuffled(prompts, f"minibatches/{key}/{epoch}")
        place = {group: i % parts[1] for i, group in enumerate(order)}
        rows = range(len(sizes))
        members += [[row for row in rows if place[batch["groups"][row]] == number] for number in range(parts[1])]
    cut = [data.micro_batches([r for r in rows if kept[r]], sizes, budget, sort=False, shared=shared)
           for rows in members]  # fmt: skip
    return {"plan": cut, "members": members}


@torch.no_grad()
def over(forward, batch, role, name):
    """forward(role, tokens, mask)[name] in the micro-batches of the first epoch -> (B, T-1); zeros in other rows."""
    found = torch.zeros_like(batch["mask"])
    for rows in batch["first"]:
        found[rows] = forward(role, batch["tokens"][rows], batch["mask"][rows])[name]
    return found


def check_finite(batch, step):
    """UserError on all ranks where log-probs or values of a row are not finite, before they reach other rows."""
    names = [name for name in ("old_logprobs", "ref_logprobs", "values") if name in batch]
    wrong = [row for row in range(len(batch["ids"])) if not all(batch[name][row].isfinite().all() for name in names)]
    wrong = dist.gather_rows([batch["ids"][row] for row in wrong])
    if wrong:
        raise UserError(f"step {step}: log-probs or values are not finite; not updated; of {listed(wrong)}")


def equal_groups(rewards, group_size):
    """(B,) bool: do all completions of its prompt have the same reward? Then none of them is better than another."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(1).repeat_interleave(group_size)


def aggregation(mask, kind, max_new_tokens):
    """{"weight": of each token (B, T-1), "sizes": what each row adds to the divisor (B, 1)} of a loss summed over rows.

    token     mean over all tokens of the minibatch: DAPO, Yu et al. 2025, eq. 8
    sequence  mean over completions of their means: GRPO, Shao et al. 2024, eq. 3
    constant  sum over tokens / (completions * max_new_tokens): Dr. GRPO, Liu et al. 2025
    A row without a token counts in no divisor.
    """
    assert kind in ("token", "sequence", "constant"), kind
    tokens = mask.sum(1, keepdim=True)
    if kind == "token":
        return {"weight": mask, "sizes": tokens}
    weight = mask / (tokens.clamp(min=1) if kind == "sequence" else max_new_tokens)
    return {"weight": weight, "sizes": (tokens > 0).float()}


def summary(batch, front=""):
    """{name: mean over all ranks' completions} of rewards, their components and spread, lengths, stops, variety."""
    names = sorted({name for part in batch["parts"] for name in part})
    rewards = batch["rewards"].double()
    columns = {"reward": rewards, "reward_square": rewards.square(), "length": batch["lengths"],
               "stop_rate": batch["stopped"]}  # fmt: skip
    sums = [column.sum() for column in columns.values()]
    sums += [sum(part[name] for part in batch["parts"]) for name in names]
    variety = watch.distinct_bigrams(dist.gather_rows(batch["completions"]))
    *sums, count = dist.sum_all(*sums, len(rewards))
    found = {name: total / count for name, total in zip([*columns, *(f"reward/{name}" for name in names)], sums)}
    spread = max(0.0, found.pop("reward_square") - found["reward"] ** 2) * count / max(1, count - 1)
    found |= {"reward_std": spread**0.5, "distinct_bigrams": variety}
    return {front + name: value for name, value in found.items()}


def record(batch):
    """What a step of online RL logs over all ranks, beside its updates.

    entropy: mean of -log pi of the sampled tokens, its unbiased estimate, in nats. kl: k3 to the reference (Schulman
    2020), where there is one, and sampler_mean and sampler_max, the difference between the log-probs of sampler and
    trainer, are over the rows that were computed: without those of equal groups or cut answers where they are left out.
    zero_advantage_share: of completions whose group is all equal.
    """
    rows = torch.tensor([row for rows in batch["first"] for row in rows], dtype=torch.long, device=batch["mask"].device)
    kept = batch["mask"][rows].bool()
    old, sampled = (batch[name][rows][kept] for name in ("old_logprobs", "sampled_logprobs"))
    apart = (old - sampled).abs()
    sums = {"sampler_mean": apart.sum()}
    if "ref_logprobs" in batch:
        sums["kl"] = losses.kl_estimate(old, batch["ref_logprobs"][rows][kept]).sum()
    *totals, count, equal, rows, surprise = dist.sum_all(
        *sums.values(), len(old), batch["equal"].sum(), len(batch["equal"]), -batch["sampled_logprobs"].sum()
    )
    found = {name: total / count for name, total in zip(sums, totals) if count} | {
        "entropy": surprise / batch["generated"]
    }
    found |= {"sampler_max": max(dist.gather_rows([apart.max().item()] if len(old) else [0.0])),
              "zero_advantage_share": equal / rows}  # fmt: skip
    if "returns" in batch:
        found["explained_variance"] = advantages.explained_variance(batch["values"], batch["returns"], batch["mask"])
    return summary(batch) | found | batch["seconds"]


def lines(batch, tokenizer, step):
    """What samples.jsonl and held_out.jsonl keep of all ranks' rows, in their order; nothing is cut."""
    texts = [chat.decode(tokenizer, ids) for ids in batch["completions"]]
    columns = (batch["rows"], batch["records"], texts, batch["rewards"].tolist(), batch["parts"],
               batch["lengths"].long().tolist(), batch["stopped"].tolist())  # fmt: skip
    found = [
        {"step": step, "row": row, "id": record["id"], "prompt": record["prompt"][-1]["content"], "completion": text,
         "reward": reward, "parts": parts, "tokens": tokens, "stopped": stopped}
        for row, record, text, reward, parts, tokens, stopped in zip(*columns)
    ]  # fmt: skip
    return sorted(dist.gather_rows(found), key=lambda line: line["row"])


def answer(run, sampling):
    """(this rank's batch of one answer to each held-out prompt, {"eval/kl", "eval/entropy", "eval/merge_survival"}).

    The same numbers are drawn at every evaluation, so that two can be compared prompt by prompt. Entropy and KL to the
    reference are exact, of the first DRIFT answers, where there is a reference.
    """
    prompts, mine = run.source.val, share(range(len(run.source.val)))
    sampling = sampling | {"step": "eval", "group_size": 1}
    batch, found = collect(run.net, [prompts[i] for i in mine], mine, run.score, sampling), {}
    if run.adapter:
        found["eval/merge_survival"] = rollouts.merge_survival(run.net, run.adapter)
    if not run.referred:
        return batch, found
    examples = [{"ids": [*prompts[i]["ids"], *ids], "mask": [0] * len(prompts[i]["ids"]) + [1] * len(ids)}
                for i, ids in zip(mine, batch["completions"]) if i < DRIFT]  # fmt: skip
    sizes = [len(example["ids"]) for example in examples]
    cuts = data.micro_batches(range(len(sizes)), sizes, TOGETHER)
    return batch, found | reference.drift(run.net, run.frozen, examples, cuts)


def look(run_batch, tokenizer):
    """What --explain shows of a rollout's first rows: as examples with their mask; says each one's reward."""
    shown = []
    for row in range(min(LOOK, len(run_batch["ids"]))):
        reward, parts = run_batch["rewards"][row].item(), run_batch["parts"][row]
        name, ids = f"{run_batch['ids'][row]}/{run_batch['rows'][row]}", run_batch["completions"][row]
        say(f"{name}: reward {reward:.3f}; " + ", ".join(f"{part} {value:.2f}" for part, value in parts.items()))
        before = run_batch["costs"][row].item() - len(ids)
        shown.append({"id": name, "ids": run_batch["tokens"][row, : before + len(ids)].tolist(), "sampled": True,
                      "mask": [0] * before + [1] * len(ids)})  # fmt: skip
    return shown


def report(run_dir, draws):
    """Write report.json from held_out.jsonl and say it; returns what to plot. See compare."""
    found = compare(log.read_records(run_dir / "held_out.jsonl"), draws)
    log.write_json(run_dir / "report.json", found)
    for name, row in found.items():
        if isinstance(row, dict):
            low, high = row["interval"]
            say(f"held-out {name}: {row['first']:.3f} -> {row['last']:.3f}, {row['difference']:+.3f} "
                f"[{low:+.3f}, {high:+.3f}] of {found['prompts']} prompts")  # fmt: skip
    return PANELS


def compare(lines, draws):
    """Held-out rewards of the last evaluation against the first, prompt by prompt: means, paired bootstrap interval.

    lines: of held_out.jsonl. -> {"reward": {"first", "last", "difference", "interval", "p"}, ...} for the reward, each
    component, the length in tokens and the share that stopped by itself.
    """
    steps = sorted({line["step"] for line in lines})
    first, last = ({line["row"]: line for line in lines if line["step"] == step} for step in (steps[0], steps[-1]))
    columns = {"reward": lambda line: line["reward"], "length": lambda line: line["tokens"],
               "stop_rate": lambda line: line["stopped"]}  # fmt: skip
    for name in sorted(first[0]["parts"]):
        columns[f"reward/{name}"] = lambda line, name=name: line["parts"][name]
    found = {"steps": [steps[0], steps[-1]], "prompts": len(first)}
    for name, value in columns.items():
        a, b = ([float(value(lines[row])) for row in sorted(first)] for lines in (last, first))
        difference, low, high, p = stats.paired_bootstrap(a, b, draws)
        found[name] = {"first": sum(b) / len(b), "last": sum(a) / len(a), "difference": difference,
                       "interval": [low, high], "p": p}  # fmt: skip
    return found
