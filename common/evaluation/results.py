"""From recorded answers to results.json: one path for answers that were just given and for those of other days.

A recording is a file of items/: a head, and a row for each item. What its head holds under "of":

    system    lines of common.evaluation.measure; "name", "cost", "four_bit", "notes"
    floors    [name, lines] of answers that need no model; "cost" of training the reward model
    best      [name, lines] of the base's best of n answers by the optimised reward
    judge     rows of common.evaluation.gate; "cost" of training it, "reliability" by its own report

All have "key", a hash of all that decides the rows, and "facts": what must be equal in files that are compared.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import stats, tasks
from common.evaluation import comparison, gate, metrics
from common.log import UserError
from common.runtime import cache

DECODING = ("max_new_tokens", "temperature", "top_p", "samples", "metric", "drift")  # of section evaluation
DATA = "data's answer"  # listed with the floors, but no rival of the judge: the data's own answer


@dataclass
class Recording:
    """A file of items/: its first line, and the others."""

    head: dict
    rows: list


def read(paths):
    """The recordings in these files, each once. UserError where they cannot be compared, or none is of a system."""
    recordings, first = {}, None
    for path in map(Path, paths):
        head, rows = cache.read(path)
        if not {"of", "key", "facts"} <= head.keys():
            raise UserError(f"--items: {path} is of a version that did not say what it answers: evaluate anew")
        first = first or (path, head["facts"])
        if head["facts"] != first[1]:
            raise UserError(
                f"--items: {path} cannot be compared with {first[0]}: {differences_in_words(head['facts'], first[1])}"
            )
        # a system may lie in several folders, floors and judge beside every system
        own = (head["name"], head["key"]) if head["of"] == "system" else head["of"]
        recordings.setdefault(own, Recording(head, rows))
    if not any(recording.head["of"] == "system" for recording in recordings.values()):
        raise UserError("--items: none of these files holds a system's answers")
    comparison.check_seeds("--items", runs_by_system(recordings.values()))
    return list(recordings.values())


def differences_in_words(facts, first):
    """What differs between the facts of two files, in words."""
    words = {"items": "it answers other items", "code": "another version of the code scored it"}
    words |= {"base": "its KL is to another base", "scorers": "other reward models or settings scored it"}
    words["other_tasks"] = "other tasks or data tell what was forgotten"
    names = [name for name in {**first, **facts} if facts.get(name) != first.get(name)]
    return ", ".join(words.get(name, f"{name} {first.get(name)} -> {facts.get(name)}") for name in names)


def runs_by_system(recordings):
    """{system: [its lines under each seed]}"""
    runs = {}
    for recording in recordings:
        if recording.head["of"] == "system":
            runs.setdefault(recording.head["name"], []).append(recording.rows)
    return runs


def build(recordings, draws):
    """What follows from the recordings alone, for results.json and the report."""
    facts, by_kind = recordings[0].head["facts"], {recording.head["of"]: recording for recording in recordings}
    runs = runs_by_system(recordings)
    floors = {name: lines for kind in ("floors", "best") if kind in by_kind for name, lines in by_kind[kind].rows}
    known = metrics.table(facts["task"], facts["samples"], facts["metric"], facts["other_tasks"])
    table = comparison.cells(runs | {name: [lines] for name, lines in floors.items()}, known, draws)
    verdict = gate_verdict(by_kind, runs, draws) if "judge" in table else None
    if verdict and not verdict["passed"]:
        del table["judge"]
    headline = next((name for name in tasks.load(facts["task"]).headline if name in table), next(iter(table)))
    first = known[headline]
    known = {name: known[name] for name in (headline, *(name for name in table if name != headline))}
    by_seed = {}
    for name in known:
        measured = [system for system in runs if system in table[name]]
        by_seed[name] = {s: [comparison.value(lines, name) for lines in runs[s]] for s in measured}
    firsts = first_seeds(recordings)
    extra = {"reward model": by_kind.get("floors"), "second reward model": by_kind.get("judge")}
    costs = {title: recording.head["cost"] for title, recording in extra.items() if recording}
    return {
        "task": tasks.load(facts["task"]).name,
        "items": len(next(iter(runs.values()))[0]),
        "draws": draws,
        "systems": list(runs),
        "headline": headline,
        "gate": verdict,
        "item_score": "reward" if "reward" in table else headline,
        "seeds": {name: len(seeds) for name, seeds in runs.items()},
        "metrics": {name: vars(metric) for name, metric in known.items()},
        "cells": {name: table[name] for name in known},
        "floors": list(floors),
        "pairs": comparison.pairs(runs, known, draws),
        "wins": comparison.wins(runs, headline, first.better) if first.better and first.kind != "corpus" else [],
        "by_seed": by_seed,
        "cost": {name: recording.head["cost"] for name, recording in firsts.items()},
        "extra_cost": {title: cost for title, cost in costs.items() if cost},
        "speed": {name: seeds[0][0]["tokens_per_second"] for name, seeds in runs.items()},
        "judge": accuracy(by_kind["judge"]) if "judge" in by_kind and by_kind["judge"].rows else None,
        "decoding": f"temperature {facts['temperature']:g}, top_p {facts['top_p']:g}, at most "
        f"{facts['max_new_tokens']} tokens, seed {facts['seed']}",
        "notes": remarks(recordings, floors),
    }


def first_seeds(recordings):
    """{system: the recording of its first seed}"""
    systems = {}
    for recording in recordings:
        if recording.head["of"] == "system":
            systems.setdefault(recording.head["name"], recording)
    return systems


def gate_verdict(by_kind, runs, draws):
    """What gate.decide says of the judge; answers that are not there fail it, as they were not set against it."""
    rivals = {"those of the base": runs["base"][0] if "base" in runs else []}
    fixed = by_kind["floors"].rows if "floors" in by_kind else [["any fixed answer", []]]
    rivals |= {f'"{name}"': lines for name, lines in fixed if name != DATA}
    scores = {
        name: {line["id"]: line["scores"]["judge"] for line in lines if "judge" in line["scores"]}
        for name, lines in rivals.items()
    }
    return gate.decide(gate.checks(by_kind["judge"].rows if "judge" in by_kind else [], scores, draws))


def accuracy(judge):
    """The judge's accuracy on its held-out pairs beside that of the shorter answer."""
    margins = np.array([pair["chosen"] - pair["rejected"] for pair in judge.rows])
    value, low, high = stats.preference_accuracy(margins)
    shorter = stats.preference_accuracy([pair["tokens"][1] - pair["tokens"][0] for pair in judge.rows])[0]
    figures = {"accuracy": value, "low": low, "high": high, "pairs": len(judge.rows), "shorter": shorter}
    return figures | {"reliability": judge.head["reliability"]}


def remarks(recordings, floors):
    """What a reader of the tables should know, in sentences."""
    heads = [recording.head for recording in recordings if recording.head["of"] == "system"]
    facts, firsts = heads[0]["facts"], first_seeds(recordings)
    spent = {name: recording.head["cost"] for name, recording in firsts.items() if recording.head["cost"]}
    said = list(dict.fromkeys(note for head in heads for note in head["notes"]))
    if any(unequal([cost[unit] for cost in spent.values()]) for unit in ("tokens", "flops")):
        costs = "; ".join(f"{name} {in_words(cost)}" for name, cost in spent.items())
        said.append(f"The systems did not cost the same: {costs}.")
    if any(head["four_bit"] for head in heads):
        names = ", ".join(dict.fromkeys(head["name"] for head in heads if head["four_bit"]))
        said.append(
            f"Trained on a 4-bit base and measured on it: {names}. The KL to the base, which is not quantised, "
            "counts what the 4 bits change, too."
        )
    if len(heads) > len(firsts):
        said.append("Cost and learning curves are those of each system's first seed.")
    if facts["temperature"] != 1 or facts["top_p"] < 1:
        said.append("Answers were not drawn from the policy itself, so the KL along them is no expectation under it.")
    if "judge" in facts["scorers"]:
        said.append(
            "No policy was optimised against the judge's scores, but SFT may have learned the answers that the "
            "judge learned to prefer."
        )
    if any(name.endswith("(oracle)") for name in floors):
        said.append("The best of several answers was picked by a reward that reads the reference: an upper bound.")
    return said


def unequal(costs):
    """Do these differ by more than 5 %? None is not known."""
    known = [cost for cost in costs if cost is not None]
    return bool(known) and max(known) > 1.05 * min(known)


def in_words(cost):
    flops = "" if cost["flops"] is None else f"{cost['flops'] / 1e12:,.1f} TFLOP, "
    return f"{cost['tokens']:,} tokens, {flops}{cost['seconds']:,.0f} s"


def side_by_side(runs, score):
    """Every item for the report: its prompt, and of each system's first seed the answer and its `score`."""
    firsts, rows = {name: seeds[0] for name, seeds in runs.items()}, []
    for lines in zip(*firsts.values(), strict=True):
        rows.append(
            {
                "id": lines[0]["id"],
                "prompt": lines[0]["prompt"],
                "reference": lines[0]["reference"],
                "answers": {name: line["answer"] for name, line in zip(firsts, lines, strict=True)},
                "scores": {name: line["scores"].get(score) for name, line in zip(firsts, lines, strict=True)},
            }
        )
    return rows
