"""What the answers are worth: metrics as sums over items; here those that any task has.

A metric is an array of per-item sufficient statistics (n, k) and a function `value` of their sum over items. So one
line resamples any metric, corpus BLEU included: sum other items, take the value of the sums. The statistics are

    mean, rate   [x, 1], or [0, 0] where the item does not count; value = sum / sum      (rate: x is 0 or 1)
    ratio        [numerator, denominator]; value = sum / sum, nan if nothing counts
    corpus       BLEU: [answer tokens, reference tokens, matching 1..4-grams, the answer's 1..4-grams]

A task's own metrics are in its file under common/tasks/, beside its rewards, so that both mean the same.
"""

import importlib
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real

import numpy as np

from common import tasks
from common.log import UserError
from common.stats import pass_at_k
from common.tasks import Metric, counted
from common.tasks.text import repetition, words

START = 5  # words
BLEU_COUNTS = 10

ANY_TASK = {  # in the order of the tables, after the task's own
    "judge": Metric("mean score by a second reward model that no policy was trained on", 1, "mean", "Rewards"),
    "reward": Metric("mean of the reward that was optimised", 1, "mean", "Rewards"),
    "preference": Metric(
        "share of pairs whose chosen answer has the higher summed log-probability", 1, "rate", "The data's answers"
    ),
    "preference_per_token": Metric("the same by mean log-probability per token", 1, "rate", "The data's answers"),
    "loss_per_byte": Metric(
        "nats per byte of the reference answers",
        better=-1,
        kind="ratio",
        topic="The data's answers",
        harm="predicts the data's answers worse: {now} nats per byte",
    ),
    "kl_base": Metric("KL to the base on own samples, nats per token", 0, "ratio", "Distance from the base"),
    "kl_base_sequence": Metric(
        "KL to the base on own samples, nats per answer", 0, "mean", "Distance from the base", digits=2
    ),
    "kl_reference": Metric(
        "KL to the policy that RL started from on own samples, nats per token", 0, "ratio", "Distance from the base"
    ),
    "kl_base_forward": Metric(
        "KL(base || policy) on own samples, nats per token", 0, "ratio", "Distance from the base"
    ),
    "kl_forward": Metric(
        "KL(base || policy) on the data's answers, nats per token: said to predict forgetting",
        better=0,
        kind="ratio",
        topic="Distance from the base",
    ),
    "kl_reverse": Metric(
        "KL(policy || base) on the data's answers, nats per token", 0, "ratio", "Distance from the base"
    ),
    "length": Metric("tokens per answer", 0, "mean", "Length and variety", digits=1),
    "stops": Metric(
        "share of answers that end by themselves, before the token limit",
        better=1,
        kind="rate",
        topic="Length and variety",
        harm="ends only {now} of its answers before the token limit",
    ),
    "empty": Metric("share of answers without a visible character", -1, "rate", "Length and variety"),
    "repetition": Metric(
        "share of an answer's 4-grams of words that repeat earlier ones, 0 to 1",
        better=-1,
        kind="mean",
        topic="Length and variety",
        harm="repeats itself more: {now} of its 4-grams",
    ),
    "distinct_starts": Metric(
        "different first five words / answers; falls as a policy collapses",
        better=1,
        kind="mean",
        topic="Length and variety",
        harm="varies its openings less: {now}",
    ),
    "distinct_1": Metric("distinct words / words, counted within answers", 0, "ratio", "Length and variety"),
    "distinct_2": Metric(
        "distinct pairs of words / pairs of words, counted within answers", 0, "ratio", "Length and variety"
    ),
}


def table(
    task: str | tasks.Task, samples: int = 1, own: str | None = None, others: Sequence[str] = ()
) -> dict[str, Metric]:
    """{name: Metric} in the order of the tables: the task's own first.

    samples: answers per item, for pass@k; own: file.py:name of the user's metric; others: tasks on which the loss is
    measured. UserError if a name is taken.
    """
    task, several = tasks.load(task), {}
    if taken := task.metrics.keys() & ANY_TASK.keys():
        raise UserError(f"task: {task.path or task.name}: every task has a metric {min(taken)}: call yours otherwise")
    if task.correct and samples > 1:
        what = "share of prompts with a right answer among {} sampled ones (unbiased; Chen et al. 2021)"
        several = {f"pass@{k}": Metric(what.format(k), 1, "mean", "Several answers") for k in range(1, samples + 1)}
        what = f"share of prompts whose most frequent answer of {samples} is right; ties count by their share"
        several["majority"] = Metric(what, 1, "mean", "Several answers")
    any_task = dict(ANY_TASK)
    if task.correct:  # right answers are alike: equal openings are no harm
        any_task["distinct_starts"] = replace(ANY_TASK["distinct_starts"], harm="")
    known = task.metrics | any_task | several | {f"loss_on_{name}": elsewhere(name) for name in others}
    name = own.rpartition(":")[2] if own else None
    if name in known:
        raise UserError(f"evaluation.metric: {name} is the name of another metric: rename your function")
    return ({name: Metric(f"mean of {own}", 1, "mean")} if name else {}) | known


def elsewhere(name: str) -> Metric:
    """The loss on another task, that of this name."""
    return Metric(
        f"nats per byte of held-out answers of {name}, another task",
        better=-1,
        kind="ratio",
        topic="Forgetting",
        harm=f"has forgotten some of {name}: {{now}} nats per byte",
    )


def require(task: str | tasks.Task) -> None:
    """UserError, at once and in one line, if the library that scores the task is missing."""
    task = tasks.load(task)
    if task.library is None:
        return
    try:
        importlib.import_module(task.library)
    except ImportError as error:
        package = task.library.replace("_", "-")
        raise UserError(f"{task.name} is scored by {package}, which fails ({error}): pip install {package}") from error


def value(sums):
    """The value (...,) of summed statistics (..., k): sum / count, nan where nothing counts; of ten counts, BLEU."""
    sums = np.asarray(sums, dtype=np.float64)
    if sums.shape[-1] == BLEU_COUNTS:
        return corpus_bleu(sums)
    top, bottom = sums[..., 0], sums[..., 1]
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)[()]


def corpus_bleu(sums):
    """BLEU-4 in 0..100 (...,) of summed counts (..., 10); 0 where a precision is. Papineni et al. 2002, section 2.3."""
    answer, reference, correct, total = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(correct / total).mean(-1) + np.minimum(0, 1 - reference / answer)
        return np.where(correct.min(-1) > 0, 100 * np.exp(logs), 0.0)[()]


def score(task, records, texts):
    """{metric: statistics (n, k) float64} of the answers `texts` to `records`: all that needs no model.

    UserError: a library is missing. ValueError: no items, or another number of texts than of records.
    """
    task = tasks.load(task)
    require(task)
    if len(records) != len(texts) or not texts:
        raise ValueError(f"expected one text per record, got {len(texts)} texts for {len(records)} records")
    rows = [_any_task(text) for text in texts]
    if task.statistics:
        rows = [_of_task(task, record, text) | row for record, text, row in zip(records, texts, rows, strict=True)]
    starts = [tuple(words(text)[:START]) for text in texts]
    for row, start in zip(rows, starts, strict=True):  # their sum is the number of different ones
        row["distinct_starts"] = counted(1 / starts.count(start))
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in table(task) if name in rows[0]}


def task_values(task: str | tasks.Task, records: list[dict], texts: list[str]) -> dict[str, float]:
    """{metric: value} of the task's own metrics over the answers `texts` to `records`; without those of no item."""
    own = tasks.load(task).metrics
    values = {name: float(value(rows.sum(0))) for name, rows in score(task, records, texts).items() if name in own}
    return {name: number for name, number in values.items() if math.isfinite(number)}


def _of_task(task, record, text):
    """The task's own statistics of an item. UserError where they are not those of its metrics."""
    row, where = task.statistics(record, text), f"task: {task.path or task.name}: statistics of {record.get('id')}"
    if not isinstance(row, Mapping) or row.keys() != task.metrics.keys():
        raise UserError(f"{where}: got {row!r:.80}, expected a dict of {', '.join(task.metrics)}")
    for name, values in row.items():
        count = BLEU_COUNTS if task.metrics[name].kind == "corpus" else 2
        numbers = list(values) if isinstance(values, Sequence) else []
        if len(numbers) != count or not all(isinstance(x, Real) and math.isfinite(x) for x in numbers):
            raise UserError(f"{where}: got {values!r:.80} for {name}, expected {count} finite numbers")
    return dict(row)


def _any_task(text):
    tokens = words(text)
    pairs = list(itertools.pairwise(tokens))
    return {
        "empty": counted(not text.strip()),
        "repetition": counted(1 - repetition(text), bool(tokens)),
        "distinct_1": (len(set(tokens)), len(tokens)),
        "distinct_2": (len(set(pairs)), len(pairs)),
    }


def several_answers(task: str | tasks.Task, records: list[dict], texts: list[list[str]]) -> dict[str, np.ndarray]:
    """{"pass@1", ..., "pass@n", "majority": statistics (prompts, 2)} of n answers to each record."""
    task, samples, rows = tasks.load(task), len(texts[0]), []
    for record, answers in zip(records, texts, strict=True):
        right = [bool(task.statistics(record, text)[task.correct][0]) for text in answers]
        row = {f"pass@{k}": pass_at_k(samples, sum(right), k) for k in range(1, samples + 1)}
        if task.vote:
            row["majority"] = majority([task.vote(text) for text in answers], right)
        rows.append(row)
    return {name: np.array([counted(row[name]) for row in rows]) for name in rows[0]}


def majority(votes: list[str | None], right: list[bool]) -> float:
    """Is the most frequent vote right? Between equally frequent ones the draw is fair; None is no vote."""
    counts = Counter(vote for vote in votes if vote is not None)
    leaders = [vote for vote, count in counts.items() if count == max(counts.values())]
    verdict = dict(zip(votes, right, strict=True))
    return sum(verdict[vote] for vote in leaders) / len(leaders) if leaders else 0.0
