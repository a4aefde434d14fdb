"""Systems against each other on the same items: cells with intervals, paired tests, win rates; what each one cost."""

import itertools
import json
import os
from pathlib import Path

import numpy as np

from common import config, log
from common.evaluation import metrics, statistics
from common.evaluation.measure import stack
from common.log import UserError
from common.runtime import base
from common.stats import mcnemar, wilson


def cell(runs, name, kind, draws):
    """{"value", "low", "high", "n"} of a metric over runs (lists of lines, one per seed), or None without a value.

    The interval is that of `statistics.interval`; of a rate under one seed, Wilson's. n: items that count under
    any seed.
    """
    stats = stack(runs, name)
    if not _has_value(stats):
        return None
    value, low, high = statistics.interval(stats, metrics.value, draws)
    n = stats.shape[1] if kind == "corpus" else int((stats[:, :, -1] > 0).any(0).sum())
    if kind == "rate":  # of several seeds the wider of both, as the bootstrap has no width at 0 and 1
        least, most = wilson(value * n, n)
        low, high = (least, most) if len(runs) == 1 or low is None else (min(low, least), max(high, most))
    return {"value": value, "low": low, "high": high, "n": n}


def _has_value(stats):
    return stats is not None and bool(np.isfinite(metrics.value(stats.sum((0, 1)))))


def cells(systems, known, draws):
    """{metric: {system: cell}} of {system: runs}, in the order of `known`, {name: Metric}."""
    table = {
        name: {system: cell(runs, name, metric.kind, draws) for system, runs in systems.items()}
        for name, metric in known.items()
    }
    table = {name: {system: entry for system, entry in row.items() if entry} for name, row in table.items()}
    return {name: row for name, row in table.items() if row}


def pairs(systems, known, draws):
    """{metric: [{"a", "b", "difference", "low", "high", "p", "p_holm", "test"}]}: each system against each before it.

    p: paired randomisation, for a rate under one seed exact McNemar; p_holm: adjusted for the pairs of the metric.
    """
    table = {}
    for name, metric in known.items():
        rows = []
        for b, a in itertools.combinations(systems, 2):
            ours, theirs = (stack(systems[system], name) for system in (a, b))
            if not _has_value(ours) or not _has_value(theirs) or len({len(ours), len(theirs), 1}) > 2:
                continue
            compared = statistics.compare(ours, theirs, metrics.value, draws)
            row = dict(zip(("difference", "low", "high", "p"), compared)) | {"test": "randomisation"}
            if metric.kind == "rate" and len(ours) == len(theirs) == 1:
                both = (ours[0, :, 1] > 0) & (theirs[0, :, 1] > 0)
                right, other = ours[0, both, 0], theirs[0, both, 0]
                if not (right % 1).any() and not (other % 1).any():  # no half right
                    row |= {"p": mcnemar(right > 0, other > 0)[2], "test": "McNemar"}
            rows.append({"a": a, "b": b} | row)
        for row, adjusted in zip(rows, statistics.holm([row["p"] for row in rows])):
            row["p_holm"] = adjusted
        if rows:
            table[name] = rows
    return table


def wins(systems, name, better):
    """Win rates by metric `name` (better: 1 up, -1 down) of every later system against each earlier; ties half.

    An item is won by the higher score; of several seeds, by the higher mean of them, so that n stays the items'.
    """
    rows = []
    for b, a in itertools.combinations(systems, 2):
        both = [list(zip(*systems[system])) for system in (a, b)]  # an item's lines under all seeds
        kept = [item for item in zip(*both) if all(name in line["scores"] for side in item for line in side)]
        if kept:
            columns = [
                [better * np.mean([line["scores"][name] for line in lines]) for lines in side] for side in zip(*kept)
            ]
            lengths = [[np.mean([line["tokens"] for line in lines]) for lines in side] for side in zip(*kept)]
            rows.append({"a": a, "b": b, "by": name} | statistics.win_rate(*columns, *lengths))
    return rows


def check_seeds(flag, by_system):
    """UserError unless the systems, {name: a list of its seeds}, have one seed each, or equally many."""
    counts = {len(seeds) for seeds in by_system.values()} - {1}
    if len(counts) > 1:
        raise UserError(f"{flag}: systems have {sorted(counts)} seeds; give each of them one, or equally many")


def value(lines, name):
    """Metric `name` over the lines of one run, or None without a value."""
    stats = stack([lines], name)
    return float(metrics.value(stats.sum((0, 1)))) if _has_value(stats) else None


def history(source):
    """The run folders that led to a checkpoint, the first stage first.

    That of what it started from, that which sampled the answers it learned from, then its own.
    """
    run = base.split_scale(source)[0].resolve().parent
    if not (run / "metrics.jsonl").is_file() or not (run / "config.yml").is_file():
        return []
    cfg = run_config(run)
    before, samples = cfg.model.adapter or cfg.model.base_checkpoint, Path(cfg.dataset_path or "none")
    sampled = [samples.resolve()] if (samples / "samples.jsonl").is_file() else []
    return [*(history(before) if base.split_scale(before)[0].is_dir() else []), *sampled, run]


def run_config(run):
    """The config of a run. Where what it started from is gone, its path is that beside the run: both were moved."""
    cfg = config.load_config(run / "config.yml")
    home = Path(cfg.logging.output_dir) / run.name
    for key, path in (("adapter", cfg.model.adapter), ("base_checkpoint", cfg.model.base_checkpoint)):
        if path and not base.split_scale(path)[0].exists():
            beside = Path(os.path.normpath(run / os.path.relpath(path, home)))
            if base.split_scale(beside)[0].is_dir():
                setattr(cfg.model, key, str(beside))
    return cfg


def cost(runs):
    """{"tokens" (trained and sampled), "flops", "seconds" of steps, "peak_memory_gb", "stages"} of a system's runs.

    flops: of common/runtime/flops.py, as the runs counted them; None where one of them did not.
    """
    stages = []
    for run in runs:
        records = log.read_records(run / "metrics.jsonl")
        flops = max((record["flops_seen"] for record in records if record.get("flops_seen")), default=None)
        stage = {
            "name": run.name,
            "tokens": int(max((record.get("tokens_seen") or 0 for record in records), default=0)),
        }
        stage |= {"flops": flops, "seconds": sum(record.get("seconds") or 0.0 for record in records)}
        stages.append(stage | {"peak_memory_gb": _peak(records)})
    total = {key: sum(stage[key] for stage in stages) for key in ("tokens", "seconds")}
    counted = [stage["flops"] for stage in stages]
    total |= {"flops": None if None in counted else sum(counted), "peak_memory_gb": _peak(stages), "stages": stages}
    return total if stages else {}


def cost_of_models(checkpoint):
    """What the training of reward models took, {} where a run is not there."""
    folders = config.paths(checkpoint)
    known = folders and all(map(history, folders))
    return cost([Path(folder).resolve().parent for folder in folders]) if known else {}


def picked_by_reward(name, source):
    """[what a reader should know] of a checkpoint that is a best/ which the reward picked, by its state.json."""
    folder, state = base.split_scale(source)[0], {}
    if folder.name == "best" and (folder / "state.json").is_file():
        state = json.loads((folder / "state.json").read_text())
    if state.get("best_metric") != "eval/reward":
        return []
    return [f"{name} is a best/ that its own reward picked: where that is hacked, the most hacked checkpoint."]


def reliability(judge):
    """What the report of its own run says of a reward model's probabilities, [] where there is none."""
    path = Path(judge).resolve().parent / "report.json"
    return json.loads(path.read_text(encoding="utf-8")).get("reliability", []) if path.is_file() else []


def _peak(records):
    """The highest peak_memory_gb of the records that have one, or None."""
    return max((record["peak_memory_gb"] for record in records if record.get("peak_memory_gb")), default=None)


def curve(runs):
    """The records of a system's runs as one curve: "stage" added, "tokens_seen" going on from stage to stage."""
    points, before = [], 0
    for run in runs:
        records, seen = log.read_records(run / "metrics.jsonl"), 0
        mode = config.load_config(run / "config.yml").training.mode
        for record in records:  # a record's evaluation stands before its update
            points.append(record | {"stage": mode, "tokens_seen": before + seen})
            seen = int(record.get("tokens_seen") or seen)
        before += seen
    return points
