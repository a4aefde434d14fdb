"""The report of a comparison as report.md and as one self-contained report.html: verdicts, tables, pictures, items.

The words are computed from the numbers. A verdict says which system answers better by the headline metric and, behind a
"but", every metric of the guard set that got significantly worse. The templates in templates/ only lay out; every text
goes through `visible` and their escaping, so what a model wrote can neither break a file nor load anything.
"""

import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path
from statistics import NormalDist

from markupsafe import Markup

from common import log
from common.evaluation import pictures

TEMPLATES = Path(__file__).parent / "templates"
BY = {"judge": "the judge", "reward": "the optimised reward", "loss_per_byte": "the loss", "bleu": "BLEU"}
BY |= {"rougeL": "ROUGE-L", "exact": "the share of right answers"}
ROWS = 8  # of the first table
SHOWN = 6  # items in report.md; report.html has all
REASONS = 2  # why a judge was not good enough; results.json has all


def write(folder, results, curves, items=()):
    """Write report.md, its pictures and the self-contained report.html into `folder`; returns the paths.

    results: what evaluate.py computed (plain JSON types). curves: {system: records of its metrics.jsonl, each with
    "stage" and with "tokens_seen" counted over all stages}. items: [{"id", "prompt", "reference" or None, "answers":
    {system: text}, "scores": {system: value}}]. What is missing or not finite is shown as –, never as 0.
    """
    folder, results = Path(folder), prepared(results)
    folder.mkdir(parents=True, exist_ok=True)
    results |= {"first": first_metrics(results)}
    drawn = pictures.save(folder, results, finite(curves))
    shared = contents(results, finite(list(items))) | {"pictures": {name: pictures.ALTS[name] for name in drawn}}
    inline = {}
    for name in ("report.css", "report.js"):  # the page allows these two by their hashes and nothing else
        text = (TEMPLATES / name).read_bytes()
        inline[name] = {"text": Markup(text.decode()), "hash": base64.b64encode(hashlib.sha256(text).digest()).decode()}
    for name in drawn:
        inline[name] = base64.b64encode((folder / name).read_bytes()).decode()
    for name, escape in (("report.md", markdown), ("report.html", visible)):
        filters = {"number": shown, "tera": tera, "interval": interval, "difference": difference, "code": code}
        text = log.templates(TEMPLATES, escape, **filters).get_template(name).render(shared, inline=inline)
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in ("report.md", "report.html", *drawn)]


def verdicts(results):
    """The verdict of every pair of systems by the headline metric, a sentence each, its harms behind a "but"."""
    parts = pair_verdicts(prepared(results))
    return [part["claim"] + "".join(f", {joint} {harm}" for joint, harm in part["harms"]) + "." for part in parts]


def next_steps(results):
    """What to do after this comparison, and why; a sentence each."""
    results = prepared(results)
    base, name, steps = reference(results), results["headline"], []
    harmed = [system for system in results["systems"] if system != base and harms(results, system, base, base)]
    if harmed:
        steps.append(
            f"{' and '.join(harmed)} did harm: add data or a reward for what got worse, or hold the policy closer to "
            "where it started (a higher --rl.kl_coef), and compare again"
        )
    better, cells = results["metrics"][name]["better"], results["cells"].get(name, {})
    values = {system: better * cell["value"] for system, cell in cells.items() if cell["value"] is not None}
    free = [floor for floor in results.get("floors", ()) if floor.startswith("base, best of") and floor in values]
    free = [floor for floor in free if not floor.endswith("(oracle)")]  # nobody has the reference of a new prompt
    trained = [values[system] for system in results["systems"] if system in values]
    best = max(free, key=values.get, default=None)
    if best and better and values[best] > max(trained, default=0):
        steps.append(
            f"{best}, picked by the reward, needs no training and scores above every trained system: compare "
            "training with it"
        )
    if not (results.get("gate") or {"passed": True})["passed"]:
        steps.append("train the judge on more pairs (train_reward.py), or ask people (--human_eval)")
    if len(results["systems"]) > 1 and max(results.get("seeds", {"": 1}).values()) == 1:
        steps.append(
            "one seed may mislead: add --seeds 0,1,2 to the command of train_staged.py; or train again with --seed 1 "
            "and another --logging.run_name, and name both alike in --checkpoints of evaluate.py"
        )
    return [f"Next: {step}." for step in steps]


def judge_sentence(results):
    """What the judge was worth, where there is one: a sentence, by common.evaluation.gate."""
    gate = results.get("gate")
    if not gate:
        return []
    if gate["passed"]:
        return [f"The judge was good enough: it won all {len(gate['checks'])} comparisons that it had to."]
    why, more = "; ".join(gate["reasons"][:REASONS]), len(gate["reasons"]) - REASONS
    why += f"; and {more} more" if more > 0 else ""
    name = BY.get(results["headline"], results["headline"])
    return [f"The judge was not good enough, so its scores are not shown and the verdicts go by {name}: {why}."]


# ---------------------------------------------------------------- numbers and texts


def prepared(results):
    """The results without numbers that are not finite, and with the verdict of each pair."""
    results = finite(results)
    return results | {"pairs": pairs_with_verdict(results)}


def finite(value):
    """The same value with None for every number that is not finite."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def shown(value, digits=3, sign=""):
    """A number with its digits, or – where there is none; `sign` "+" shows both signs. Never "-0"."""
    return f"{value:{sign}z,.{digits}f}" if isinstance(value, (int, float)) and math.isfinite(value) else "–"


def tera(value):
    """A large number in units of 10^12, a small one of them with more digits."""
    return shown(None if value is None else value / 1e12, 1 if (value or 0) >= 1e12 else 3)


def width(entry):
    """Of its interval; 0 where there is none, or none that says anything."""
    low, high = entry.get("low"), entry.get("high")
    return 0.0 if None in (low, high) else high - low


def interval(entry, digits=3, sign=""):
    """[low, high], or nothing where there is no interval."""
    return f"[{shown(entry['low'], digits, sign)}, {shown(entry['high'], digits, sign)}]" if width(entry) > 1e-9 else ""


def p_value(p):
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.2g}"


def visible(text):
    """Text whose line breaks are newlines and in which no control or direction-changing character stays hidden."""
    if isinstance(text, Markup):
        return text
    text = re.sub("\r\n?|[\u2028\u2029]", "\n", str(text)).replace("\t", "    ")
    return re.sub("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]", "�", text)


def markdown(text):
    """Text as one line of Markdown that is only text: no tag, table cell, code, emphasis, picture or link."""
    if isinstance(text, Markup):
        return text
    text = html.escape(visible(text).strip().replace("\n", " ⏎ "), quote=False)
    text = re.sub(r"([\\`*_|~$#]|\](?=[(\[:]))", r"\\\1", text)  # an interval keeps its plain brackets
    return Markup(text.replace("://", ":\\//").replace("www.", "www\\."))


def code(text):
    """Text as a block of code in Markdown."""
    return Markup("    " + visible(text).strip().replace("\n", "\n    "))


# ---------------------------------------------------------------- verdicts


def reference(results):
    """The system that the others are held against."""
    return "base" if "base" in results["systems"] else results["systems"][0]


def pairs_with_verdict(results):
    """{metric: pairs with their "verdict"}: better or worse (higher or lower), or None if not significant.

    A pair is turned round where that reads better: an arm against the base, staged against the others.
    """
    base, table = reference(results), {}
    for metric, facts in results["metrics"].items():
        rows = []
        for given in results.get("pairs", {}).get(metric, ()):
            pair = {"low": None, "high": None, "p_holm": None} | given
            if pair["a"] == base or (pair["b"] == "staged" and pair["a"] != "staged"):
                ends = [None if pair[key] is None else -pair[key] for key in ("difference", "high", "low")]
                pair |= dict(zip(("difference", "low", "high"), ends)) | {"a": pair["b"], "b": pair["a"]}
            pair["verdict"] = None
            if None not in (pair["difference"], pair["p_holm"]) and pair["p_holm"] < 0.05:
                words = ("better", "worse") if facts["better"] else ("higher", "lower")
                pair["verdict"] = words[pair["difference"] * (facts["better"] or 1) < 0]
            rows.append(pair)
        table[metric] = sorted(rows, key=lambda pair: (pair["b"] != base, pair["b"] != base and pair["a"] != "staged"))
    return table


def harms(results, system, other, base):
    """What `system` does significantly worse than `other`, of the guard set: phrases with both values."""
    phrases = []
    for metric, facts in results["metrics"].items():
        sides = [(pair["a"], pair["b"], pair["verdict"]) for pair in results["pairs"][metric]]
        harmed = (system, other, "worse") in sides or (other, system, "better") in sides
        if not facts["harm"] or not harmed or metric == results["headline"]:
            continue
        now, before = two_values(facts, *(results["cells"][metric][name]["value"] for name in (system, other)))
        phrases.append(f"{facts['harm'].format(now=now)}, {'was' if other == base else other} {before}")
    return "; ".join(phrases)


def two_values(facts, *values):
    """Two values of a metric in words, a rate in per cent; with a digit more where they would look alike."""
    if facts["kind"] != "rate":
        return [shown(value, facts["digits"]) for value in values]
    digits = 0 if round(100 * values[0]) != round(100 * values[1]) else 1
    return [f"{shown(100 * value, digits)} %" for value in values]


def pair_verdicts(results):
    """[{"claim", "harms": [("but" or "and", phrase), ...]}], one for each pair of the headline metric.

    Of a system that is better its own harms are named, of systems that cannot be told apart those of both.
    """
    name, base, said = results["headline"], reference(results), []
    facts, cells, by = results["metrics"][name], results["cells"].get(name, {}), BY.get(name, name)
    if not results["pairs"][name]:
        alone, digits = results["systems"][0], facts["digits"]
        cell = cells.get(alone, {"value": None})
        value = f"{shown(cell['value'], digits)} {interval(cell, digits)}".rstrip()
        return [{"claim": f"{alone} has {value} by {by}, and nothing was compared with it", "harms": []}]
    verbs = {"better": "beats", "worse": "is worse than", "higher": "is higher than", "lower": "is lower than"}
    for pair in results["pairs"][name]:
        a, b, verdict = pair["a"], pair["b"], pair["verdict"]
        claim = f"{a} {verbs[verdict]} {b} by {by}" if verdict else f"{a} and {b} cannot be told apart by {by}"
        if pair["difference"] is None:
            claim = f"Not measured: {a} against {b}"
        else:
            claim += f" ({' against '.join(two_values(facts, cells[a]['value'], cells[b]['value']))})"
        ours, theirs = harms(results, a, b, base), harms(results, b, a, base)
        phrases = [("and" if verdict == "worse" else "but", ours if verdict else f"{a} {ours}")] if ours else []
        if theirs and verdict != "better":
            phrases.append(("and" if ours and not verdict else "but", f"{b} {theirs}"))
        said.append({"claim": claim, "harms": phrases})
    return said


def certainty(results):
    """How sure the verdicts are: each pair's difference, interval and p, and what could have been seen."""
    name, z, said = results["headline"], NormalDist().inv_cdf, []
    pairs, digits = results["pairs"][name], results["metrics"][name]["digits"]
    for pair in (pair for pair in pairs if pair["difference"] is not None):
        line = f"{pair['a']} against {pair['b']}: {difference(pair, digits)}"
        if not pair["verdict"] and width(pair) > 1e-9:
            needed = width(pair) / 2 / 1.96 * (z(1 - 0.025 / len(pairs)) + z(0.8))
            line += ": these data cannot tell them apart; a true difference of about "
            line += f"{shown(needed, digits)} would be seen four times in five"
        said.append(line + ".")
    return said


def difference(pair, digits):
    """A pair's difference in words: +0.12 [-0.20, +0.44], p 0.47."""
    ends = interval(pair, digits, "+")
    return f"{shown(pair['difference'], digits, '+')}{' ' if ends else ''}{ends}, p {p_value(pair['p_holm'])}"


# ---------------------------------------------------------------- what the templates lay out


def contents(results, items):
    """All that both templates need beside `results`."""
    metrics, pairs, base, systems = results["metrics"], results["pairs"], reference(results), results["systems"]
    beside_floors, topics, constant = [*systems, *results.get("floors", ())], {}, []
    for name, facts in metrics.items():
        kept = topics.setdefault(facts["topic"], []) if varies(results, name, beside_floors) else constant
        kept.append(name)
    costs = []
    for name, cost in ({key: {} for key in systems} | results.get("cost", {}) | results.get("extra_cost", {})).items():
        stages = cost.get("stages", ())
        costs += [(name, cost), *((f"{name}: {stage['name']}", stage) for stage in stages if len(stages) > 1)]
    for item in items:  # for the page's script
        item["order"] = json.dumps([item["scores"].get(name) for name in systems])
    return {
        "results": results,
        "base": base,
        "beside_floors": beside_floors,
        "topics": topics,
        "constant": constant,
        "costs": costs,
        "verdicts": pair_verdicts(results),
        "certainty": certainty(results),
        "next_steps": next_steps(results),
        "judge_sentences": judge_sentence(results),
        "marks": {(name, pair["a"]): pair["verdict"] for name in metrics for pair in pairs[name] if pair["b"] == base},
        "compared": list(dict.fromkeys((pair["a"], pair["b"]) for rows in pairs.values() for pair in rows)),
        "seeded": [
            name for name, seeds in results.get("by_seed", {}).items() if max(map(len, seeds.values()), default=0) > 1
        ],
        "all_items": items,
        "few_items": items[:: max(1, len(items) // SHOWN)][:SHOWN],
    }


def varies(results, metric, names):
    """Is there something to see in the metric: values that differ, or the headline's, or those of a single system?"""
    cells = results["cells"].get(metric, {})
    values = {cells[name]["value"] for name in names if name in cells}
    return len(values) > 1 or (len(values) == 1 and (len(names) == 1 or metric == results["headline"]))


def first_metrics(results):
    """At most ROWS metrics for the first table: the headline, then the guard set, then others.

    Of the guard set come first those in which a system got worse than the base, by the interval, then significant ones.
    """
    metrics, headline, base = results["metrics"], results["headline"], reference(results)
    names = [metric for metric in metrics if metrics[metric]["better"] or metric == headline]
    names = [metric for metric in names if varies(results, metric, results["systems"])]

    def worsened(metric, pair):
        ends = [metrics[metric]["better"] * pair[key] for key in ("low", "high") if pair[key] is not None]
        return pair["b"] == base and ends and max(ends) < 0

    def rank(metric):
        pairs, guards = results["pairs"][metric], bool(metrics[metric]["harm"])
        harmed, significant = any(worsened(metric, pair) for pair in pairs), any(pair["verdict"] for pair in pairs)
        return metric != headline, not guards, not (guards and harmed), not significant

    kept = sorted(names, key=rank)[:ROWS]
    return sorted(kept, key=lambda metric: (metric != headline, list(metrics).index(metric)))
