"""How far training moved a policy from its base, and what it forgot; off by default, as it takes more forward passes.

    forward   KL(base || policy) = sum over the vocabulary of p_base log(p_base / p_policy), for each token of an answer
    reverse   KL(policy || base), likewise

Both are exact over the vocabulary; their contexts are the task's prompts with the data's held-out answers, or with what
the policy says itself. RL's Razor (Shenfeld et al. 2025, arXiv 2509.04259) finds that the forward KL on the new task,
the mean of KL(base || policy) over its prompts, predicts how much is forgotten elsewhere. What is forgotten is measured
beside it: the loss on held-out answers of other tasks.
"""

import numpy as np

from common import data, dist, lora, model, tasks
from common.evaluation import measure
from common.log import UserError


def load_others(cfg):
    """{task's name: its held-out records} of evaluation.other_tasks, which is `a,b=FOLDER`; a task's own data, where
    there is some, or generated records. UserError where one is the task that is measured, or named twice."""
    others = {}
    for part in (cfg.evaluation.other_tasks or "").split(","):
        task, _, folder = part.strip().partition("=")
        if not task:
            continue
        name = tasks.load(task).name
        if name in others or name == tasks.load(cfg.task).name:
            raise UserError(f"evaluation.other_tasks: {name} is named twice, or is the task that is measured")
        others[name] = data.load(task, folder or None, "test", cfg.debug, cfg.seed)
    return others


def losses_on(net, others, tokenizer, limit, count):
    """{"loss_on_<task>": (count, 2)}: nats and bytes of the answers to `count` records of each other task.

    Line i of a system's answers holds those of the i-th record: another item, but resampled and compared like its own.
    """
    stats = {}
    for name, records in others.items():
        rows = [records[i] | {"rejected": None} for i in data.shuffled(len(records), "others")[:count]]
        losses = measure.preferences(net, rows, tokenizer, limit).get("loss_per_byte", np.zeros((0, 2)))
        stats[f"loss_on_{name}"] = np.concatenate([losses, np.zeros((count - len(losses), 2))])
    return stats


def kl_both_ways(net, base_net, items, answers, tokenizer, limit):
    """{metric: (n, 2)}: KL in nats and tokens, of the active adapter of `net` against the bare `base_net`."""
    place = {item.id: i for i, item in enumerate(items)}
    by_data = measure.data_answers([item.record for item in items], tokenizer, limit)
    own = measure.own_answers(items, answers)
    policy, base = (net, lora.active(net)), (base_net, None)
    stats = {}
    for name, examples, (first, adapter), second in (  # KL(first || second)
        ("kl_forward", by_data, base, policy),
        ("kl_reverse", by_data, policy, base),
        ("kl_base_forward", own, base, policy),
    ):
        with lora.using(first, adapter):
            sums = model.exact_entropy_and_kl(first, *second, examples, measure.cuts_of(examples))
        stats[name] = np.zeros((len(items), 2))
        for example, row in zip(examples, dist.sum_tensor(sums).numpy(), strict=True):
            stats[name][place[example["id"]]] = row[1:]
    return stats
