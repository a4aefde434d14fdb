"""Blind studies to test with: answers, a study on disk, a key without files, ratings of it."""

import csv
import json
import re

import numpy as np

from common.human import analysis as human
from common.human import study

NAMES = ("sft", "rl", "staged")


WORDS = "the visit note says that a patient with mild fever was told to rest and drink more water today".split()


def answers(n, seed=0, words=10):
    rng = np.random.default_rng(seed)
    return [f"{i} {' '.join(rng.choice(WORDS, words))}" for i in range(n)]


def made_study(tmp_path, n=60, systems=NAMES, **options):
    """Write a study; (its blind file, its key, both read)."""
    path = tmp_path / "study.csv"
    items = [{"prompt": f"=prompt {i}", "reference": f"reference {i}", "task": "clinical"} for i in range(n)]
    study.write(items, {name: answers(n, seed) for seed, name in enumerate(systems)}, path, **options)
    return study.read_manifest(path), study.read_key(tmp_path / "study.key.csv")


def made_key(n, systems=NAMES, checks=0):
    """A key as read_key gives it, without files: n items, then checks with their trap in slot A."""
    slots, rng, found = "ABCD"[: len(systems)], np.random.default_rng(0), {}
    for i in range(n + checks):
        order = [str(name) for name in rng.permutation(systems)]
        found[f"i{i}"] = {
            "slots": slots,
            "kind": "item" if i < n else "check",
            "original": "",
            "source": i,
            "trap": None if i < n else "A",
            "systems": dict(zip(slots, order)),
            "seed": "0",
            "characters": dict.fromkeys(slots, 10),
            "digests": {s: f"{i}{s}" for s in slots},
        }
    return found


def rated(key, item, *preferred, rater="r", order=None, **scores):
    """A rating that prefers these systems."""
    slots = tuple(slot for slot, name in key[item]["systems"].items() if name in preferred)
    return {
        "rater_id": rater,
        "item_id": item,
        "preferred": slots,
        "order": order,
        **dict.fromkeys(human.SCORES),
        **scores,
    }


NO_PORT = 99_999  # a server that is started where it should refuse ends at once, with another line


def two_studies(tmp_path):
    """The folders of two runs that compare the same two systems, each with a blind file and its key."""
    folders = []
    for name, seed in (("first", 1), ("second", 2)):
        (tmp_path / name).mkdir()
        items = [{"prompt": f"{name} prompt {i}"} for i in range(20)]
        systems = {"base": answers(20, seed), "tuned": answers(20, seed + 10)}
        study.write(items, systems, tmp_path / name / "human_eval.csv", seed=seed)
        folders.append(tmp_path / name)
    return folders


def rate_all(folder, path, system="tuned", raters=("ann", "bob")):
    """Write a file of ratings in which all raters prefer `system` wherever it is shown."""
    rows = [
        {"rater_id": rater, "item_id": item, "preferred": "/".join(slots) or "none"}
        for rater in raters
        for item, entry in study.read_key(folder / "human_eval.key.csv").items()
        for slots in [[s for s, name in entry["systems"].items() if name == system and s != entry["trap"]]]
    ]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def take_marks_off(*paths):
    """Turn files into what the version before marks wrote."""
    for path in paths:
        path.write_bytes(re.sub(rb"[0-9a-f]{6}-(item-[0-9]+)", rb"\1", path.read_bytes()))
