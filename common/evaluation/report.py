"""The report of a comparison: what was found, in words, tables and pictures, as Markdown and as one HTML file.

The words are computed from the numbers: they say which differences are significant, and of the others that these data
cannot tell the systems apart and how large a difference would have had to be.
"""

from pathlib import Path
from statistics import NormalDist

from common.evaluation import markup, pictures
from common.evaluation.markup import ARROWS, finite, shown

ALTS = {
    "differences.png": "Differences between the systems in each metric with 95 % intervals; filled: significant.",
    "wins.png": "Share of items in which the row's system wins against the column's, ties half, with 95 % intervals.",
    "frontier.png": "Reward and judge's score of each system over the square root of its KL to the base.",
    "curves.png": "Learning curves of all arms over the tokens seen in training, one line a stage.",
    "length_diversity.png": "Length, diversity, repetition and stops of each system's answers; small dots are seeds.",
    "cost.png": "Tokens, time and peak memory of each arm, its stages in shades, and the headline metric over time.",
}


def write(folder, results, curves):
    """Write report.md, its pictures and the self-contained report.html into `folder`; returns the paths.

    `results` is what evaluate.py found (plain JSON types), `curves` is {system: records of its metrics.jsonl, each with
    "stage" and with "tokens_seen" counted over all stages}. What is missing or not finite is shown as –, never as 0.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = results | {"pairs": {metric: _pairs(results, metric) for metric in results["metrics"]}}
    drawn = pictures.save(folder, results, curves)
    blocks = _blocks(results, drawn)
    (folder / "report.md").write_text(markup.markdown(blocks), encoding="utf-8")
    (folder / "report.html").write_text(markup.page(blocks, folder), encoding="utf-8")
    return [folder / name for name in ("report.md", "report.html", *drawn)]


def _blocks(results, drawn):
    picture = {name: [("picture", name, ALTS[name])] if name in drawn else [] for name in ALTS}
    rewards = "The answers that the optimised reward liked best: good answers, or ones that found a hole in it?"
    chosen = "Items chosen at random, the same for every system; in brackets the score."
    sections = [
        ("Comparison", _comparison(results)),
        ("Pairs", _pair_tables(results) + picture["differences.png"]),
        ("Wins", _win_table(results) + picture["wins.png"]),
        ("Reward and distance from the base", picture["frontier.png"]),
        ("Learning curves", picture["curves.png"]),
        ("Length and diversity", picture["length_diversity.png"]),
        ("Cost", _cost_table(results) + picture["cost.png"]),
        ("Samples", _samples(results.get("samples"), chosen)),
        ("Highest rewards", _samples(results.get("top"), rewards)),
        ("Notes", [("list", results["notes"])] if results.get("notes") else []),
        ("How to repeat", [("code", results["command"])] if results.get("command") else []),
    ]
    blocks = [("heading", 1, f"{results['task']}: {_and(results['systems'])}"), ("text", _summary(results))]
    for title, content in sections:
        blocks += [("heading", 2, title), *content] if content else []
    return blocks


def _and(names):
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _base(results):
    return "base" if "base" in results["systems"] else results["systems"][0]


def _pairs(results, metric):
    """The pairs of a metric with their verdict: better or worse (higher or lower), or None if not significant.

    A pair is turned round where that reads better: an arm against the base, staged against the others.
    """
    judged, better = [], results["metrics"][metric]["better"]
    for given in results.get("pairs", {}).get(metric, ()):
        pair = given
        if pair["a"] == _base(results) or (pair["b"] == "staged" and pair["a"] != "staged"):
            turned = {"difference": "difference", "low": "high", "high": "low"}
            turned = {k: None if finite(pair.get(v)) is None else -pair[v] for k, v in turned.items()}
            pair = pair | turned | {"a": pair["b"], "b": pair["a"]}
        sure = None not in (finite(pair["difference"]), finite(pair.get("p_holm"))) and pair["p_holm"] < 0.05
        up = sure and pair["difference"] * (better or 1) > 0
        word = (("better", "worse") if better else ("higher", "lower"))[not up] if sure else None
        judged.append(pair | {"verdict": word})
    return sorted(
        judged, key=lambda pair: (pair["b"] != _base(results), pair["b"] != _base(results) and pair["a"] != "staged")
    )


def _range(entry, digits=3, sign=""):
    """[low, high], or nothing where there is no interval."""
    low, high = (shown(entry.get(end), digits, sign) for end in ("low", "high"))
    return "" if "–" in (low, high) else f"[{low}, {high}]"


def _p(value):
    return "–" if finite(value) is None else "<0.001" if value < 0.001 else f"{value:.2g}"


def _difference(pair, digits):
    """A pair's difference in words: +0.12 [-0.20, +0.44], p 0.47."""
    interval = f" {_range(pair, digits, '+')}".rstrip()
    return f"{shown(pair['difference'], digits, '+')}{interval}, p {_p(pair.get('p_holm'))}"


def _summary(results):
    """The result in one paragraph of plain words: what is significant, what is not, what could have been seen."""
    name, base = results["headline"], _base(results)
    metric, pairs = results["metrics"][name], results["pairs"][name]
    digits, seeds = metric["digits"], results.get("seeds", {})
    better = {1: "; higher is better", -1: "; lower is better"}.get(metric["better"], "")
    said = [f"{_and(results['systems'])} answered the same {results['items']} items; the headline metric is {name} "
            f"({metric['what']}{better})."]  # fmt: skip
    if not pairs:
        cell = results["cells"].get(name, {}).get(results["systems"][0], {})
        value = f"{shown(cell.get('value'), digits)} {_range(cell, digits)}".rstrip()
        return f"{said[0]} No pairs were tested. {results['systems'][0]}: {value}."
    beats = [pair["a"] for pair in pairs if pair["b"] == base and pair["verdict"] in ("better", "higher")]
    said.append(f"{_and(beats) if beats else 'No system'} beat{'' if len(beats) > 1 else 's'} {base} significantly "
                f"(p adjusted by Holm over {len(pairs)} pairs, below 0.05).")  # fmt: skip
    for pair in (pair for pair in pairs if pair["verdict"]):
        said.append(f"{pair['a']} is {pair['verdict']} than {pair['b']}: {_difference(pair, digits)}.")
    for pair in (pair for pair in pairs if not pair["verdict"]):
        if finite(pair["difference"]) is None:
            said.append(f"Not measured: {pair['a']} against {pair['b']}.")
            continue
        line = f"Not significant: {pair['a']} against {pair['b']}: {_difference(pair, digits)}"
        if None not in (finite(pair.get("low")), finite(pair.get("high"))):
            z = NormalDist().inv_cdf
            needed = (pair["high"] - pair["low"]) / 2 / 1.96 * (z(1 - 0.025 / len(pairs)) + z(0.8))
            line += (": these data cannot tell them apart; a true difference of about "
                     f"{shown(needed, digits)} would be seen four times in five")  # fmt: skip
        said.append(line + ".")
    if seeds and max(seeds.values()) == 1:
        said.append("Each arm was trained with one seed, so the intervals cover the choice of items only.")
    elif seeds:
        said.append("Training seeds: " + ", ".join(f"{system} {count}" for system, count in seeds.items()) + ".")
    return " ".join(said)


def _comparison(results):
    """The table of systems and floors by metrics, bold where a system beats the base significantly."""
    metrics, base = results["metrics"], _base(results)
    bold = {(m, p["a"]) for m in metrics for p in results["pairs"][m] if p["b"] == base and p["verdict"] == "better"}
    rows = []
    for name in (*results["systems"], *results.get("floors", ())):
        rows += ["floors, for orientation"] if results.get("floors") and name == results["floors"][0] else []
        row = [name]
        for metric, facts in metrics.items():
            cell = results["cells"].get(metric, {}).get(name, {})
            few = f" (n {cell['n']})" if finite(cell.get("n")) not in (None, results["items"]) else ""
            row.append((shown(cell.get("value"), facts["digits"]), _range(cell, facts["digits"]) + few,
                        (metric, name) in bold))  # fmt: skip
        rows.append(row)
    how = [f"{results['items']} items", results.get("decoding"), f"{results['draws']:,} draws for each interval"]
    blocks = [("text", f"{'; '.join(filter(None, how))}. Brackets hold 95 % intervals; bold beats {base} significantly "
               "(Holm-adjusted p below 0.05); – was not measured."),
              ("table", ["", *(m + ARROWS.get(a["better"], "") for m, a in metrics.items())], rows),
              ("list", [f"{m}{ARROWS.get(a['better'], '')}: {a['what']}" for m, a in metrics.items()])]  # fmt: skip
    seeds = {
        m: s for m, s in results.get("by_seed", {}).items() if m in metrics and any(len(v) > 1 for v in s.values())
    }
    rows = [[s, *(" · ".join(shown(v, metrics[m]["digits"]) for v in seeds[m].get(s, ())) or "–" for m in seeds)]
            for s in results["systems"]]  # fmt: skip
    return blocks + ([("text", "Each training seed:"), ("table", ["", *seeds], rows)] if seeds else [])


def _pair_tables(results):
    """All numbers of the headline's pairs; for the other metrics the difference, its interval and Holm's p."""
    head, metrics, tables = results["headline"], results["metrics"], results["pairs"]
    rows = [[f"{p['a']} - {p['b']}", shown(p["difference"], metrics[head]["digits"], "+"),
             _range(p, metrics[head]["digits"], "+") or "–", _p(p.get("p")), _p(p.get("p_holm")), p.get("test") or "–",
             p["verdict"] or "not told apart"] for p in tables[head]]  # fmt: skip
    blocks = (
        [("table", [head, "difference", "95 % interval", "p", "Holm's p", "test", "verdict"], rows)] if rows else []
    )
    names = list(dict.fromkeys((p["a"], p["b"]) for m in tables if m != head for p in tables[m]))
    rows = []
    for metric in (m for m in tables if m != head and tables[m]):
        by_systems, digits = {(p["a"], p["b"]): p for p in tables[metric]}, metrics[metric]["digits"]
        cells = [(shown(p["difference"], digits, "+"), f"{_range(p, digits, '+')} p {_p(p.get('p_holm'))}"
                  + (f", {p['verdict']}" if p["verdict"] else ""), False) if (p := by_systems.get(name)) else "–"
                 for name in names]  # fmt: skip
        rows.append([metric + ARROWS.get(metrics[metric]["better"], ""), *cells])
    other = [("text", "The other metrics, with Holm's p:"), ("table", ["", *(f"{a} - {b}" for a, b in names)], rows)]
    return blocks + (other if rows else [])


def _win_table(results):
    judge, blocks = results.get("judge"), []
    if judge:
        weak = finite(judge.get("low")) is not None and judge["low"] <= (finite(judge.get("shorter")) or 0)
        blocks.append(
            (
                "text",
                f"The judge prefers the better answer in {shown(judge['accuracy'])} {_range(judge)} of "
                f"{shown(judge['pairs'], 0)} held-out pairs; always preferring the shorter one, in "
                f"{shown(judge.get('shorter'))}."
                + (" It is not shown to know more than that, so read its verdicts with care." if weak else ""),
            )
        )
    rows = [[f"{w['a']} - {w['b']}", w["by"], *(shown(w[k], 0) for k in ("wins", "ties", "losses")),
             shown(w["rate"]), _range(w) or "–", shown(w.get("controlled"))]
            for w in results.get("wins", ())]  # fmt: skip
    head = ["pair", "by", "wins", "ties", "losses", "win rate", "95 % interval", "at equal length"]
    return [*blocks, ("table", head, rows)] if rows else blocks


def _cost_table(results):
    """Tokens, time and memory of every arm, its stages below it; a system without training shows –."""
    rows = []
    for name, cost in {**results.get("cost", {}), **results.get("extra_cost", {})}.items():
        stages = cost.get("stages", ()) if len(cost.get("stages", ())) > 1 else ()
        for label, part in ((name, cost), *((f"{name}: {stage['name']}", stage) for stage in stages)):
            speed = results.get("speed", {}).get(name) if part is cost else None
            rows.append([label, shown(part.get("tokens"), 0), shown(part.get("seconds"), 0),
                         shown(part.get("peak_memory_gb"), 2), shown(speed, 0)])  # fmt: skip
    return (
        [("table", ["", "training tokens", "seconds", "peak memory (GB)", "tokens/s sampling"], rows)] if rows else []
    )


def _samples(items, caption):
    if not items:
        return []
    blocks = [("text", caption)]
    for item in items:
        answers = [(name, shown(item.get("scores", {}).get(name), 2), text) for name, text in item["answers"].items()]
        title = f"{item['id']}" + (f" (highest reward of {item['system']})" if item.get("system") else "")
        blocks += [("heading", 3, title), ("sample", item["prompt"], answers)]
    return blocks
