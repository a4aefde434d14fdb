"""Is the judge good enough to be printed? What it must do better than rules without a model, fixed before any study.

On held-out pairs that it did not learn from, a judge has to be right more often than every floor (the shorter answer,
the task's pair_rules), on all pairs and on those of about equal length; and it has to score the data's answers above
those of the base and above every fixed answer, such as always refusing. Each difference is paired over the same pairs
or items, and its 95 % interval has to lie above 0. Where one does not, or cannot be measured, the judge's scores are
not shown and no verdict goes by them: a judge that only knows lengths would reward lengths.
"""

import contextlib

import numpy as np

from common import data
from common.evaluation import measure
from common.log import UserError
from common.preferences import MATCHED, floor_margins
from common.stats import paired_bootstrap

PAIRS = 1000  # at most so many of the split
FEWEST = 10  # pairs or items behind a difference: of fewer an interval says nothing


def score_pairs(score, records, tokenizer, task, limit):
    """What a judge and the floors say of held-out pairs, a row each: {"id", "chosen", "rejected", "tokens", "floors"}.

    chosen, rejected: the judge's scores; tokens: of both answers; floors: {rule: margin}. limit: tokens of a row.
    """
    pairs, _ = data.encode_pairs(records, tokenizer, limit)
    by_id = {record["id"]: record for record in records}
    sides = [(by_id[pair["id"]], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    answers = [[token for token, m in zip(side["ids"], side["mask"], strict=True) if m] for _, side in sides]
    scores = measure.share_scores(score, [record for record, _ in sides], answers) if sides else []
    floors = floor_margins(pairs, task)
    return [
        {
            "id": pair["id"],
            "chosen": float(scores[2 * i]),
            "rejected": float(scores[2 * i + 1]),
            "tokens": [len(answers[2 * i]), len(answers[2 * i + 1])],
            "floors": {rule: float(margins[i]) for rule, margins in floors.items()},
        }
        for i, pair in enumerate(pairs)
    ]


def held_out_records(items, records, cfg):
    """The records with pairs that the judge is checked on, at most PAIRS: those of the items first, then others of the
    split, then of val, on which no judge is trained either."""
    asked = {item.id for item in items}
    order = sorted(data.shuffled(len(records), "pairs"), key=lambda i: records[i]["id"] not in asked)
    kept = [records[i] for i in order if records[i]["rejected"] is not None]
    if len(kept) < PAIRS and cfg.evaluation.split != "val":
        with contextlib.suppress(UserError):  # there is no val
            others = data.from_config(cfg, "val")
            kept += [row | {"id": f"val/{row['id']}"} for row in others if row["rejected"] is not None]
    return kept[:PAIRS]


def checks(pairs, rivals, draws):
    """All comparisons that a judge has to win, a row each: {"on", "against", "judge", "other", "difference", "low",
    "high", "n"}.

    pairs: rows of score_pairs; rivals: {name: {item: the judge's score of this answer}}, set against its score of the
    data's answer to the same item. low and high are None where there are fewer than FEWEST.
    """
    margins = np.array([pair["chosen"] - pair["rejected"] for pair in pairs])
    lengths = np.array([pair["tokens"] for pair in pairs]).reshape(-1, 2)
    near = np.abs(lengths[:, 0] - lengths[:, 1]) <= MATCHED
    rows = []
    for on, kept in (("held-out pairs", np.full(len(pairs), True)), ("pairs of about equal length", near)):
        for rule in pairs[0]["floors"] if pairs else ("any floor",):
            floor = np.array([pair["floors"][rule] for pair in pairs])
            rows.append({"on": on, "against": rule} | _difference(_right(margins)[kept], _right(floor)[kept], draws))
    own = {pair["id"]: pair["chosen"] for pair in pairs}
    for name, scores in rivals.items():
        both = [item for item in scores if item in own]
        compared = _difference([own[item] for item in both], [scores[item] for item in both], draws)
        rows.append({"on": "the data's answers", "against": name} | compared)
    return rows


def _right(margins):
    """1 for a pair whose chosen answer is preferred, 1/2 for a tie, 0 else."""
    return (margins > 0) + 0.5 * (margins == 0)


def _difference(judge, other, draws):
    if len(judge) < FEWEST:
        return {"judge": None, "other": None, "difference": None, "low": None, "high": None, "n": len(judge)}
    difference, low, high, _ = paired_bootstrap(judge, other, draws)
    low, high = (difference, difference) if low is None else (low, high)  # equal on all pairs, of which there are many
    means = {"judge": float(np.mean(judge)), "other": float(np.mean(other))}
    return means | {"difference": difference, "low": low, "high": high, "n": len(judge)}


def decide(rows):
    """{"passed", "reasons", "checks": the rows}: passed if every interval of `checks` lies above 0."""
    failed = [row for row in rows if row["low"] is None or not row["low"] > 0]
    return {"passed": bool(rows) and not failed, "reasons": [reason(row) for row in failed], "checks": rows}


def reason(row):
    """Why a judge does not pass one check, in words."""
    if row["difference"] is None:
        on = "items" if row["on"] == "the data's answers" else row["on"]
        return f"{row['n']} {on} are too few to set it against {row['against']}"
    ends = f"difference {row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
    if row["on"] == "the data's answers":
        means = f"{row['judge']:.2f} against {row['other']:.2f} on {row['n']} items"
        return f"it does not score the data's answers above {row['against']} ({means}, {ends})"
    means = f"{row['judge']:.2f} against {row['other']:.2f} of {row['n']}"
    return f'on {row["on"]} it is not shown to beat the rule "{row["against"]}" ({means}, {ends})'
