"""What one system is worth on held-out items: its answers and, for each item, the statistics behind every metric.

A line is {"id", "prompt", "answer", "tokens", "stopped", "scores": {metric: value}, "stats": {metric: k numbers}}: the
statistics of an item as metrics.py defines them, so that any table, interval or test is a function of such lines.
Items are shared out over ranks; all numbers of an item are its own, so ranks and order cannot change them.
"""

import time

import numpy as np
import torch

from common import chat, data, dist, model, prompts, rollouts
from common.evaluation import metrics
from common.log import UserError

TOGETHER = 4096  # tokens a forward pass without gradient


def items(records, tokenizer, longest, most, seed):
    """The records to answer: those whose prompt has at most `longest` tokens; `most` of them, drawn by `seed`.

    -> ([{"id", "ids", "record"}], {reason: how many were left out}). UserError if none is left.
    """
    found, counts = prompts.encode_prompts(records, tokenizer, longest)
    order = sorted(data.shuffled(len(found), f"items/{seed}")[:most])
    counts["not_drawn"] = len(found) - len(order)
    if not order:
        raise UserError(f"test: none of {len(records)} prompts has at most {longest} tokens (training.max_seq_length "
                        "minus evaluation.max_new_tokens)")  # fmt: skip
    return [found[i] for i in order], counts | {"kept": len(order)}


def generate(net, items, sampling, group=1):
    """`group` answers to each item by the active adapter -> ([n lists of group lists of ids], tokens per second).

    sampling: {"seed", "max_new_tokens", "temperature" (0 is greedy), "top_p"}. A random number belongs to (seed, item,
    sample). The tokens per second are this rank's.
    """
    mine, heat = range(dist.rank(), len(items), dist.world_size()), sampling["temperature"]
    rows, started = [i * group + g for i in mine for g in range(group)], time.perf_counter()
    found = []
    if rows:
        uniforms = rollouts.uniforms(sampling["seed"], f"test/{group}", rows, sampling["max_new_tokens"])
        found = rollouts.sample(net, [items[i].ids for i in mine], group, sampling["max_new_tokens"], heat or 1.0,
                                uniforms, greedy=heat == 0, top_p=sampling["top_p"])["completions"]  # fmt: skip
    speed = sum(map(len, found)) / (time.perf_counter() - started)
    everyone = dict(dist.gather_rows([[row, ids] for row, ids in zip(rows, found)]))
    return [[everyone[i * group + g] for g in range(group)] for i in range(len(items))], speed


def text_lines(task, items, answers, tokenizer, scorers):
    """Lines of answers (n lists of ids), from whatever wrote them: what texts and `scorers` say.

    scorers: {metric: function (records, answers) -> (n,)}, of the reward models.
    """
    records, texts = [item.record for item in items], [chat.decode(tokenizer, ids) for ids in answers]
    stats = metrics.score(task, records, texts)
    for name, scorer in scorers.items():
        mine, found = range(dist.rank(), len(items), dist.world_size()), torch.zeros(len(items), dtype=torch.float64)
        if mine:
            found[mine] = scorer([records[i] for i in mine], [answers[i] for i in mine]).double().cpu()
        stats[name] = mean(dist.sum_tensor(found).numpy())
    stats["length"] = mean([len(ids) for ids in answers])
    stats["stops"] = mean([bool(ids) and ids[-1] in chat.STOP_TOKENS for ids in answers])
    return [
        {"id": record["id"], "prompt": dialogue(record["prompt"]), "answer": text, "tokens": len(ids),
         "stopped": bool(ids) and ids[-1] in chat.STOP_TOKENS,
         "stats": {name: [float(x) for x in stats[name][i]] for name in metrics.METRICS if name in stats}}
        for i, (record, text, ids) in enumerate(zip(records, texts, answers))
    ]  # fmt: skip


def dialogue(turns):
    """The prompt as a person reads it: the text of a single turn, else every turn behind who said it."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


def mean(values):
    """Statistics (n, 2) of a mean over all items."""
    values = np.asarray(values, dtype=np.float64)
    return np.stack([values, np.ones_like(values)], 1)


def model_stats(net, others, items, answers, tokenizer, limit):
    """{metric: (n, k)} that need the system's own log-probabilities: loss, preferences, KL on its own samples.

    others: {"kl_base": (net, adapter), ...}, what the KL is taken to. limit: tokens of a row, as in training.
    """
    records = [item.record for item in items]
    stats = _preferences(net, records, tokenizer, limit)
    examples = [{"ids": [*item.ids, *ids], "mask": [0] * len(item.ids) + [1] * len(ids)}
                for item, ids in zip(items, answers)]  # fmt: skip
    sizes = [len(example["ids"]) for example in examples]
    cuts = data.micro_batches(range(dist.rank(), len(items), dist.world_size()), sizes, TOGETHER)
    for name, (frozen, adapter) in others.items():
        found = dist.sum_tensor(model.exact_entropy_and_kl(net, frozen, adapter, examples, cuts)).numpy()
        stats[name] = found[:, 1:]
        if name == "kl_base":
            stats["kl_base_sequence"] = mean(found[:, 1])
    return stats


def _preferences(net, records, tokenizer, limit):
    """Loss a byte of the data's answers and, where there are pairs, which of the two answers is more likely."""
    if any(record["rejected"] is not None for record in records):
        found, _ = data.encode_pairs(records, tokenizer, limit)
        rows = [pair[side] for pair in found for side in ("chosen", "rejected")]
        names = [pair["id"] for pair in found]
    else:
        found = [record | {"response": record["reference"] or record["response"]} for record in records]
        rows, _ = data.encode_records(found, tokenizer, limit, last_turn_only=True)
        names = [row["id"] for row in rows]
    if not rows:
        return {}
    each = len(rows) // len(names)  # rows an item
    cuts = data.micro_batches(range(dist.rank(), len(names), dist.world_size()),
                              [sum(len(row["ids"]) for row in rows[i * each : (i + 1) * each])
                               for i in range(len(names))], TOGETHER)  # fmt: skip
    totals = dist.sum_tensor(_logprobs(net, rows, each, cuts)).view(-1, each).numpy()
    tokens = np.array([sum(row["mask"]) for row in rows], dtype=np.float64).reshape(-1, each)
    place = {record["id"]: i for i, record in enumerate(records)}
    stats = {"loss_per_byte": np.zeros((len(records), 2))}
    if each == 2:
        stats |= {"preference": np.zeros((len(records), 2)), "preference_per_token": np.zeros((len(records), 2))}
    for number, name in enumerate(names):
        good = rows[number * each]
        text = chat.decode(tokenizer, [token for token, m in zip(good["ids"], good["mask"]) if m])
        stats["loss_per_byte"][place[name]] = -totals[number, 0], max(1, len(text.encode("utf-8")))
        if each == 2:
            sums, means = totals[number], totals[number] / tokens[number]
            for metric, (a, b) in (("preference", sums), ("preference_per_token", means)):
                stats[metric][place[name]] = (a > b) + 0.5 * (a == b), 1
    return stats


@torch.no_grad()
def _logprobs(net, rows, each, cuts):
    """Summed log-probs of the rows of these items (`each` rows an item), zeros elsewhere -> (rows,) fp64."""
    found = torch.zeros(len(rows), dtype=torch.float64)
    for cut in cuts:
        at = [i * each + side for i in cut for side in range(each)]
        tokens, mask = data.collate([rows[i] for i in at], net.device)
        found[at] = (model.sequence_logprobs(net, tokens, mask) * mask).sum(1).cpu().double()
    return found


def merge(lines, stats):
    """The lines with more statistics {metric: (n, k)}, in the order of metrics.METRICS, and each item's own values."""
    for i, line in enumerate(lines):
        line["stats"] |= {name: [float(x) for x in values[i]] for name, values in stats.items()}
        line["stats"] = {name: line["stats"][name] for name in metrics.METRICS if name in line["stats"]}
        values = {name: float(metrics.value(name, np.array(x))) for name, x in line["stats"].items()}
        line["scores"] = {name: value for name, value in values.items() if np.isfinite(value)}
    return lines


def stack(runs, name):
    """Statistics (seeds, n, k) of metric `name` over runs (lists of lines, the same items); None if absent."""
    if any(name not in line["stats"] for lines in runs for line in lines):
        return None
    return np.array([[line["stats"][name] for line in lines] for lines in runs])
