"""The human side of evaluate.py: blind sheets of what systems answered; from ratings the results and training pairs."""

import itertools
import re
from pathlib import Path

from common import log, tasks
from common.human import analysis, ratings, study
from common.log import UserError, say


def check(sheet, systems):
    """UserError, before hours of answers, where `sheet` cannot hold a study of so many systems."""
    if not 2 <= systems <= 4:
        raise UserError(f"--human_eval: raters compare 2 to 4 systems, these are {systems}")
    if is_written(sheet):
        study.check_pair(sheet, study.read_manifest(sheet))
    else:
        study.check_free(sheet)


def is_written(sheet):
    return sheet.exists() and study.key_path(sheet).exists()


def write(sheet, task, items, runs):
    """The blind file for raters and its key, once. runs: {system: its lines under each seed}, of which the first."""
    if is_written(sheet):
        say(f"{sheet} is there already and may have been rated: kept")
        return
    texts = {name: [line["answer"] for line in seeds[0]] for name, seeds in runs.items()}
    prompts = [line["prompt"] for line in next(iter(runs.values()))[0]]
    asked = [
        {"task": task, "prompt": prompt, "reference": item.record["reference"] or ""}
        for prompt, item in zip(prompts, items, strict=True)
    ]
    study.write(asked, texts, sheet)  # by a seed that nobody knows, or it would not be blind


def results(files, key_path, draws, pairs=None):
    """Unblind ratings with their key: human_results.json and .md beside it, and training pairs in the file `pairs`."""
    if pairs and (Path(pairs).exists() or not pairs.endswith(".jsonl")):
        raise UserError(f"--human_pairs {pairs}: name a new file that ends with .jsonl")
    key_path = Path(key_path)
    key = study.read_key(key_path)
    remedy = f"{key_path} is not its key, name that with --human_key, or the run that has it with --logging.run_name"
    rated = ratings.read_ratings(files, key, remedy)
    outcome = analysis.analyse(key, rated, draws)
    text = analysis.report(outcome)
    log.write_json(key_path.parent / "human_results.json", outcome)
    log.write(key_path.parent / "human_results.md", text)
    say(text)
    if pairs:
        write_pairs(pairs, key_path, key, rated)
    return outcome


def write_pairs(target, key_path, key, rated):
    """The ratings as training pairs, records of data.py.

    Where the answers of the run lie beside the key, a pair says which of its two were cut off at max_new_tokens.
    """
    if not key_path.name.endswith(".key.csv"):
        raise UserError(f"{key_path}: a key is named NAME.key.csv, the blind file beside it NAME.csv")
    items = study.read_manifest(key_path.with_name(key_path.name.removesuffix(".key.csv") + ".csv"))
    records, left_out = analysis.training_pairs(key, items, rated)
    reasons = "".join(f"; {count} left out: {why}" for why, count in left_out.items())
    if not records:
        raise UserError(f"--human_pairs: raters preferred no answer over another{reasons}")
    unfinished = set()
    for line in itertools.chain.from_iterable(map(log.read_records, (key_path.parent / "items").glob("*.jsonl"))):
        if isinstance(line, dict) and line.get("stopped") is False:
            unfinished.add(study.digest(line["answer"]))
    for record in records:
        record["prompt"] = turns(record["prompt"])
        record["unfinished"] = [side for side in ("response", "rejected") if study.digest(record[side]) in unfinished]
    log.replace_records(target, records)
    say(f"wrote {len(records)} pairs to {target}{reasons}; measure what they train on other prompts than these")


def turns(text):
    """The turns that measure.dialogue made a text of; any other text is a single turn."""
    parts = re.split(r"(?:^|\n\n)(System|User|Assistant): ", text)
    if len(parts) < 5 or parts[0] or parts[-2] != "User":
        return tasks.question(text)
    spoken = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": role.lower(), "content": content} for role, content in spoken]
