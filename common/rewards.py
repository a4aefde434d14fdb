"""Scores of completions: a task's heuristics, a trained model's score, their hybrid, or any function of the user's.

The heuristic reward is the weighted mean of the parts that the task's file declares (common/tasks/); each lies in
[0, 1], higher is better.
"""

import math
from collections.abc import Callable
from numbers import Real
from types import SimpleNamespace as Config

import torch
from torch import Tensor

from common import config, functions, model, tasks
from common.log import UserError
from common.runtime import checkpoint
from common.tasks.text import LONGEST

SMALLEST_STD = 1e-6  # of rewards of reference answers; below it they are all alike
ROUNDING = 1e-9  # BLEU of a text with itself is 1 + 4e-16


def heuristic_reward(
    task: str | tasks.Task, prompt: list[dict], completion: str, reference: str | None = None, **weights: float
) -> tuple[float, dict[str, float]]:
    """(weighted mean of the task's parts in [0, 1], {part: value}) for one completion.

    prompt: turns; completion: text; reference: text, or None where the task needs none; weights by part, 1 if not
    given. ValueError: a reference is needed and missing. UserError: unknown task, or a task that breaks its contract.
    """
    task = tasks.load(task)
    if task.needs_reference and reference is None:
        raise ValueError(f"the heuristic reward of {task.name} compares with a reference, and there is none")
    completion = completion.encode("utf-8", "replace").decode()[: LONGEST + 1]
    parts = _check_parts(task, task.reward(prompt, completion, reference), completion)
    shares = {name: float(weights.get(name, 1.0)) for name in parts}
    total = sum(shares.values())
    return sum(parts[name] * shares[name] for name in parts) / total if total else 0.0, parts


def _check_parts(task, parts, completion):
    """{part: float in [0, 1]} in the order of the task's parts, from what its reward returned."""
    where = f"task: {task.path or task.name}: reward"
    if not isinstance(parts, dict) or parts.keys() != task.parts.keys():
        raise UserError(f"{where} returned {parts!r:.80}, expected a dict of {', '.join(task.parts)}")
    for name, value in parts.items():
        if not isinstance(value, Real) or not -ROUNDING <= float(value) <= 1 + ROUNDING:
            said = f"it says {completion[: functions.SHOWN]!r}"
            raise UserError(f"{where} returned {value!r:.80} for {name}, expected a number from 0 to 1; {said}")
    return {name: float(parts[name]) for name in task.parts}


def wants_model(reward: Config) -> bool:
    """Do these settings (section `reward`) ask for a trained model?"""
    return reward.function is None and reward.type != "heuristic"


def needs_model(reward: Config) -> bool:
    """As wants_model; UserError where it is wanted and none is named."""
    if wants_model(reward) and reward.checkpoint is None:
        raise UserError(f"reward.checkpoint: reward.type {reward.type} needs a reward model of train_reward.py")
    return wants_model(reward)


def check_references(cfg: Config, records: dict[str, list[dict]]) -> None:
    """UserError where the heuristic reward of sampled answers needs a reference and a record has none."""
    chosen, reward = tasks.load(cfg.task), cfg.reward
    if reward.function or reward.type == "trainable":
        return
    for record in [*records.get("val", ()), *records.get("train", ())]:  # before hours of sampling
        require_reference(chosen, record)


def require_reference(task: tasks.Task, record: dict) -> None:
    """UserError where the task's heuristic reward needs a reference and the record has none."""
    if record["reference"] is None and task.needs_reference:
        lacks = f"the heuristic reward of {task.name} needs a reference, it has none"
        raise UserError(f"{record['id']}: {lacks}: name its key with --data_keys reference=KEY")


def scorer(
    task: str, reward: Config, decode: Callable[[list[int]], str], trained_scorer: Callable | None = None
) -> Callable:
    """A function (records, answers as ids) -> (rewards (n,) fp32, a dict of components for each) by section `reward`.

    A reward is NaN where a user's function gave no score, see functions.call; nothing else lets a NaN through.
    decode(ids) -> text; trained_scorer(records, answers) -> (n,), a trained model's scores, where needs_model.
    """
    function = functions.load(reward.function, "reward.function") if reward.function else None
    chosen = tasks.load(task)

    def score(records, answers):
        texts = [decode(ids) for ids in answers]
        if function:
            scores = functions.call(function, "reward.function", records, texts, answers)
            return torch.tensor(scores), [{} for _ in texts]
        parts, heuristic, trained = [{} for _ in texts], torch.zeros(len(texts)), torch.zeros(len(texts))
        if reward.type != "trainable":
            weights, rows = vars(reward.heuristic), []
            for record, text in zip(records, texts, strict=True):
                require_reference(chosen, record)
                rows.append(heuristic_reward(chosen, record["prompt"], text, record["reference"], **weights))
            heuristic, parts = torch.tensor([value for value, _ in rows]), [part for _, part in rows]
        if trained_scorer:
            trained = trained_scorer(records, answers)
            parts = [part | {"trained": value} for part, value in zip(parts, trained.tolist())]
        alpha, beta = (reward.alpha, reward.beta) if reward.type == "hybrid" else (1.0, 1.0)
        total = combine(heuristic, trained, alpha, beta, reward.clip_rewards)
        for record, text, value, part in zip(records, texts, total.tolist(), parts):
            if not math.isfinite(value):
                said = f"{part}; it says {text[: functions.SHOWN]!r}"
                raise UserError(f"the reward of a sample for {record['id']} is {value}: {said}")
        return total, parts

    return score


def facts(cfg: Config, judge: str | None) -> dict:
    """What a run keeps of the models that score it: their hashes with and without the places of their bases."""
    ways = {"": model.adapter_fingerprint, "_effect": model.adapter_effect}
    scores = {f"score{end}": fingerprint(cfg.reward, cfg.task, hashed) for end, hashed in ways.items()}
    return scores | {f"judge{end}": hashed(judge) for end, hashed in ways.items()}


def fingerprint(
    reward: Config, task: str, hashed: Callable[[str], list | None] = model.adapter_fingerprint
) -> str | list | None:
    """Hash of what decides the scores beside the settings: the user's function or task, a reward model by `hashed`."""
    if reward.function:
        return checkpoint.sha256(reward.function.rpartition(":")[0])
    models = [hashed(folder) for folder in config.paths(reward.checkpoint)] * wants_model(reward)
    trained = [*models, reward.ensemble] if len(models) > 1 else models[0] if models else None
    own = tasks.load(task).path is not None and reward.type != "trainable"
    return [trained, tasks.fingerprint(task)] if own else trained


def combine(heuristic: Tensor, trained: Tensor, alpha: float, beta: float, clip: float | None = None) -> Tensor:
    """alpha * heuristic + beta * trained, clipped to [-clip, clip]; (B,) tensors. `trained` is already normalised."""
    total = alpha * heuristic + beta * trained
    return total.clamp(-clip, clip) if clip is not None else total


def ensemble(scores: Tensor, kind: str) -> Tensor:
    """One score (n,) of those of several reward models (members, n). Coste et al. 2024, section 3.

    mean; min, their worst-case optimisation; mean_minus_std, their uncertainty-weighted one with the deviation between
    the members in place of its square, at weight 1.
    """
    assert kind in ("mean", "min", "mean_minus_std"), kind
    if kind == "min":
        return scores.amin(0)
    return scores.mean(0) - (scores.std(0, correction=0) if kind == "mean_minus_std" else 0.0)


def normalise(scores: Tensor, mean: float, std: float) -> Tensor:
    """(scores - mean) / std with the reward model's statistics on reference answers, stored at its training.

    std below SMALLEST_STD: divided by 1, as their spread says nothing.
    """
    return (scores - mean) / (std if std >= SMALLEST_STD else 1.0)
