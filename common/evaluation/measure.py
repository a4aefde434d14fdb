"""What one system is worth on held-out items: its answers and, for each item, the statistics behind every metric.

A line is {"id", "prompt", "answer", "tokens", "stopped", "scores": {metric: value}, "stats": {metric: k numbers}}: the
statistics of an item as metrics.py defines them, so that any table, interval or test is a function of such lines.
Items are shared out over ranks; all numbers of an item are its own, so ranks and order cannot change them.
"""

import time

import numpy as np
import torch

from common import chat, data, dist, model, prompts, rollouts, tasks
from common.evaluation import metrics
from common.log import UserError

TOKENS_PER_PASS = 4096  # of a forward pass without gradient
ROWS = 64  # answers that a rank samples between two meetings with the others


def items(records, tokenizer, longest, most, seed):
    """The records to answer: those whose prompt has at most `longest` tokens; `most` of them, drawn by `seed`.

    -> ([prompts.Prompt], {"records", "kept" and each reason to leave one out: how many}). UserError if none is left.
    """
    encoded, counts = prompts.encode_prompts(records, tokenizer, longest)
    order = sorted(data.shuffled(len(encoded), f"items/{seed}")[:most])
    counts["not_drawn"] = len(encoded) - len(order)
    if not order:
        raise UserError(
            f"none of {len(records)} prompts has at most {longest} tokens (training.max_seq_length "
            "minus evaluation.max_new_tokens)"
        )
    return [encoded[i] for i in order], counts | {"kept": len(order)}


def generate(net, items, sampling, group=1):
    """`group` answers to each item by the active adapter -> ([n lists of group lists of ids], tokens per second).

    sampling: {"seed", "max_new_tokens", "temperature" (0 is greedy), "top_p"}. A random number belongs to (seed, item,
    sample). The tokens per second are this rank's.
    """
    temperature, ranks, started = sampling["temperature"], dist.world_size(), time.perf_counter()
    items_per_pass = len(items) if ranks == 1 else ranks * max(1, ROWS // group)
    answers = []
    for start in range(0, len(items), items_per_pass):
        dist.barrier()  # so that ranks do not drift apart by more than a pass
        mine = range(start + dist.rank(), min(start + items_per_pass, len(items)), ranks)
        rows = [i * group + g for i in mine for g in range(group)]
        if not rows:
            continue
        uniforms = rollouts.uniforms(sampling["seed"], f"test/{group}", rows, sampling["max_new_tokens"])
        sampled = rollouts.sample(
            net,
            [items[i].ids for i in mine],
            group,
            sampling["max_new_tokens"],
            temperature or 1.0,
            uniforms,
            greedy=temperature == 0,
            top_p=sampling["top_p"],
        )
        answers += zip(rows, sampled["completions"], strict=True)
    speed = sum(len(ids) for _, ids in answers) / (time.perf_counter() - started)
    by_row = dict(dist.gather_rows(answers))
    return [[by_row[i * group + g] for g in range(group)] for i in range(len(items))], speed


def text_lines(task, items, answers, tokenizer, scorers):
    """Lines of answers (n lists of ids), from whatever wrote them: what texts and `scorers` say.

    scorers: {metric: function (records, answers) -> (n,)}, of the reward models.
    """
    records, texts = [item.record for item in items], [chat.decode(tokenizer, ids) for ids in answers]
    stats = metrics.score(task, records, texts)
    for name, scorer in scorers.items():
        scores = share_scores(scorer, records, answers)
        stats[name] = values_and_counts(scores)
        if name != "judge":
            stats[name][np.isnan(scores)] = 0  # the user's function gave no score: the item does not count
    stats["length"] = values_and_counts([len(ids) for ids in answers])
    stats["stops"] = values_and_counts([bool(ids) and ids[-1] in chat.STOP_TOKENS for ids in answers])
    return [
        {
            "id": record["id"],
            "prompt": dialogue(record["prompt"]),
            "reference": tasks.right_answer(record),
            "answer": text,
            "tokens": len(ids),
            "stopped": bool(ids) and ids[-1] in chat.STOP_TOKENS,
            "stats": {name: [float(x) for x in values[i]] for name, values in stats.items()},
        }
        for i, (record, text, ids) in enumerate(zip(records, texts, answers))
    ]


def share_scores(scorer, records, answers):
    """(n,) of scorer(records, answers as ids), shared out over ranks."""
    mine, scores = range(dist.rank(), len(records), dist.world_size()), torch.zeros(len(records), dtype=torch.float64)
    if mine:
        scores[mine] = scorer([records[i] for i in mine], [answers[i] for i in mine]).double().cpu()
    return dist.sum_tensor(scores).numpy()


def dialogue(turns):
    """The prompt as a person reads it: the text of a single turn, else every turn after who said it."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


def values_and_counts(values):
    """Statistics (n, 2) of a metric that is a mean over all items: [value, 1] of each."""
    values = np.asarray(values, dtype=np.float64)
    return np.stack([values, np.ones_like(values)], 1)


def model_stats(net, others, items, answers, tokenizer, limit):
    """{metric: (n, k)} that need the system's own log-probabilities: loss, preferences, KL on its own samples.

    others: {"kl_base": (net, adapter), ...}, what the KL is taken to. limit: tokens of a row, as in training.
    """
    records = [item.record for item in items]
    stats = preferences(net, records, tokenizer, limit)
    examples = own_answers(items, answers)
    cuts = cuts_of(examples)
    for name, (frozen, adapter) in others.items():
        sums = dist.sum_tensor(model.exact_entropy_and_kl(net, frozen, adapter, examples, cuts)).numpy()
        stats[name] = sums[:, 1:]
        if name == "kl_base":
            stats["kl_base_sequence"] = values_and_counts(sums[:, 1])
    return stats


def own_answers(items, answers):
    """An example for each item: its prompt, then the answer (ids) that it got."""
    return [
        {"id": item.id, "ids": [*item.ids, *ids], "mask": [0] * len(item.ids) + [1] * len(ids)}
        for item, ids in zip(items, answers, strict=True)
    ]


def data_answers(records, tokenizer, limit):
    """An example for each record that has an answer: its reference, or else its response."""
    answered = [record | {"response": tasks.right_answer(record)} for record in records]
    return data.encode_records(answered, tokenizer, limit, last_turn_only=True)[0]


def cuts_of(examples):
    """This rank's share of the examples, as lists of rows that go through the model together."""
    sizes = [len(example["ids"]) for example in examples]
    return data.held_out_micro_batches(sizes, TOKENS_PER_PASS)


@torch.no_grad()
def preferences(net, records, tokenizer, limit):
    """Loss per byte of the data's answers and, where there are pairs, which of the two answers is more likely.

    As soon as one record has a rejected answer, records without one do not count, not even in the loss.
    """
    if any(record["rejected"] is not None for record in records):
        pairs, _ = data.encode_pairs(records, tokenizer, limit)
        answers = {pair["id"]: [pair["chosen"], pair["rejected"]] for pair in pairs}
    else:
        answers = {row["id"]: [row] for row in data_answers(records, tokenizer, limit)}
    if not answers:
        return {}
    groups = list(answers.values())
    totals = torch.zeros(len(groups), len(groups[0]), dtype=torch.float64)  # summed log-probs; zeros for other ranks
    sizes = [sum(len(row["ids"]) for row in group) for group in groups]
    for cut in data.held_out_micro_batches(sizes, TOKENS_PER_PASS):
        tokens, mask = data.collate([row for i in cut for row in groups[i]], net.device)
        summed = (model.sequence_logprobs(net, tokens, mask) * mask).sum(1)
        totals[cut] = summed.cpu().double().view(len(cut), -1)
    totals = dist.sum_tensor(totals).numpy()
    place = {record["id"]: i for i, record in enumerate(records)}
    names = ("loss_per_byte", "preference", "preference_per_token") if len(groups[0]) == 2 else ("loss_per_byte",)
    stats = {name: np.zeros((len(records), 2)) for name in names}
    for (name, group), sums in zip(answers.items(), totals, strict=True):
        good = group[0]
        text = chat.decode(tokenizer, [token for token, m in zip(good["ids"], good["mask"]) if m])
        stats["loss_per_byte"][place[name]] = -sums[0], max(1, len(text.encode("utf-8")))
        if len(group) == 2:
            means = sums / [sum(row["mask"]) for row in group]
            for metric, (a, b) in (("preference", sums), ("preference_per_token", means)):
                stats[metric][place[name]] = (a > b) + 0.5 * (a == b), 1
    return stats


def merge(lines, stats):
    """The lines with more statistics {metric: (n, k)}, the task's first, and each item's own values."""
    places = {name: place for place, name in enumerate(metrics.ANY_TASK)}
    for i, line in enumerate(lines):
        line["stats"] |= {name: [float(x) for x in values[i]] for name, values in stats.items()}
        line["stats"] = dict(sorted(line["stats"].items(), key=lambda entry: places.get(entry[0], -1)))
        values = {name: float(metrics.value(x)) for name, x in line["stats"].items()}
        line["scores"] = {name: value for name, value in values.items() if np.isfinite(value)}
    return lines


def stack(runs, name):
    """Statistics (seeds, n, k) of metric `name` over runs (lists of lines, the same items); None if absent."""
    if any(name not in line["stats"] for lines in runs for line in lines):
        return None
    return np.array([[line["stats"][name] for line in lines] for lines in runs])
