"""The report says every number that was found and no other, in words that follow from them, and is safe to open."""

import base64
import copy
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest

from common.evaluation import metrics, report

SYSTEMS = ["base", "sft", "rl", "staged"]
HOSTILE = ("<script>alert(1)</script> | a `code` ![x](http://evil.example/p.png)\n\n# big\n> quote\n| a | b |\r\n"
           "[x]: http://evil.example\n</blockquote></div>\x07\x1b[31m\u202e\u2028www.evil.example "
           "<img src=http://evil.example> *b* $x$ \ud800 &lt; '\"")  # fmt: skip
METRICS = {
    "judge": {"what": "score of an answer (logits)", "better": 1, "kind": "mean", "digits": 2},
    "repetition": {"what": "share of repeated words", "better": -1, "kind": "rate", "digits": 3},
    "length": {"what": "tokens an answer", "better": 0, "kind": "mean", "digits": 1},
}
METRICS = {name: facts | {"topic": "Answers", "harm": ""} for name, facts in METRICS.items()}
KNOWN = metrics.table("safety")
GUARDS = {name: metric for name, metric in KNOWN.items() if metric.harm}
PAIRS = (("sft", "base"), ("rl", "base"), ("base", "staged"), ("sft", "rl"), ("sft", "staged"), ("rl", "staged"))
HOLM = {("sft", "base"): 0.002, ("base", "staged"): 0.0005}  # the other pairs: 0.47


def found():
    """A small result: sft and staged beat the base on the judge, rl does not; nothing else is significant."""
    cells = {m: {s: {"value": i + j / 8, "low": i + j / 8 - 0.25, "high": i + j / 8 + 0.25, "n": 40}
                 for j, s in enumerate(SYSTEMS)} for i, m in enumerate(METRICS)}  # fmt: skip
    del cells["length"]["rl"]
    kl = {s: {"value": j * 3.0, "low": j * 2.0, "high": j * 4.0, "n": 40} for j, s in enumerate(SYSTEMS)}
    cells |= {"kl_base_sequence": kl}  # for the picture
    cells["judge"]["always refuse"] = {"value": 0.75, "low": None, "high": None, "n": 38}
    pairs = {m: [{"a": a, "b": b, "difference": 0.12, "low": -0.2, "high": 0.44, "p": 0.4, "p_holm": 0.47,
                  "test": "randomisation"} for a, b in PAIRS] for m in METRICS}  # fmt: skip
    for pair in pairs["judge"]:
        holm = HOLM.get((pair["a"], pair["b"]), 0.47)
        sign = -1 if pair["a"] == "base" else 1
        if holm < 0.05:
            pair |= {"difference": sign * 0.5, "low": sign * 0.5 - 0.2, "high": sign * 0.5 + 0.2, "p_holm": holm}
    stage = {"name": "sft", "tokens": 1234, "flops": 3.21e12, "seconds": 20.0, "peak_memory_gb": 1.5}
    return {
        "task": "safety", "items": 40, "draws": 500, "systems": SYSTEMS, "seeds": dict.fromkeys(SYSTEMS, 1),
        "metrics": METRICS, "headline": "judge", "cells": cells, "floors": ["always refuse"], "pairs": pairs,
        "wins": [{"a": "sft", "b": "base", "by": "judge", "wins": 25, "ties": 2, "losses": 13, "rate": 0.65,
                  "low": 0.5, "high": 0.78, "controlled": None}],
        "by_seed": {"judge": {s: [0.5] for s in SYSTEMS}},
        "cost": {"base": {}, "sft": {**stage, "stages": [stage]},
                 "staged": {"tokens": 2468, "seconds": 40.0, "peak_memory_gb": 1.5, "stages": [stage, stage]}},
        "extra_cost": {"reward model": {**stage, "stages": []}}, "speed": {"sft": 321.0},
        "judge": {"accuracy": 0.6, "low": 0.5, "high": 0.7, "pairs": 90, "shorter": 0.55}, "item_score": "judge",
        "decoding": "temperature 1", "notes": ["a <note>"], "command": "python evaluate.py --task safety",
    }  # fmt: skip


ITEM = {"id": "item 1", "prompt": HOSTILE, "reference": HOSTILE, "answers": dict.fromkeys(SYSTEMS, HOSTILE),
        "scores": {"base": 0.5}}  # fmt: skip
CURVES = {
    "sft": [{"stage": "sft", "step": i, "tokens_seen": 10 * i, "eval/loss": 2 - i / 9} for i in range(5)],
    "rl": [
        {"stage": "rl", "step": i, "tokens_seen": 10 * i, "reward": i, "kl": None, "eval/loss": 99} for i in range(5)
    ],
}


def written(folder, results, curves=None, items=(ITEM, ITEM)):
    report.write(folder, results, curves or {}, items)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    return markdown, (folder / "report.html").read_text(encoding="utf-8")


def table(markdown, heading):
    """The first table of metrics after `heading`, as {name: {metric: cell}}: systems are its columns."""
    text = markdown[markdown.index(heading) :]
    lines = text[text.index("|  | ") :].split("\n\n")[0].split("\n")
    rows = [[c.strip().replace("\\", "") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {name: {row[0]: row[i] for row in rows[2:]} for i, name in enumerate(rows[0]) if i}


class Page(HTMLParser):
    """Collects what a browser would see: tags, attributes, text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open, self.scripts = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] == ["script"] else self.text).append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, *written(folder, found(), CURVES)


def test_the_table_holds_every_value_with_its_interval(whole):
    _, markdown, page = whole
    rows, seen = table(markdown, "## Answers"), [data.strip() for data in Page(page).text]
    assert list(rows) == [*SYSTEMS, "always refuse"]
    for metric, about in METRICS.items():
        column = metric + {1: " ↑", -1: " ↓", 0: ""}[about["better"]]
        for name in (*SYSTEMS, "always refuse"):
            cell, shown = found()["cells"][metric].get(name), rows[name][column].replace("**", "")
            if cell is None:
                assert shown == "–"
                continue
            digits, numbers = about["digits"], [cell["value"], cell["low"], cell["high"]]
            value, low, high = (None if x is None else f"{x:.{digits}f}" for x in numbers)
            assert shown == (f"{value} (n 38)" if low is None else f"{value} [{low}, {high}]")
            assert value in seen


def test_bold_is_only_what_beats_the_base_significantly(whole):
    rows = table(whole[1], "## Answers")
    bold = {(name, column) for name, row in rows.items() for column, cell in row.items() if "**" in cell}
    assert bold == {("sft", "judge ↑"), ("staged", "judge ↑")}
    assert rows["staged"]["judge ↑"].startswith("**0.38** [")


@pytest.mark.parametrize(("better", "difference", "beats"), [(1, 0.3, True), (1, -0.3, False), (-1, -0.3, True),
                                                             (-1, 0.3, False), (0, 0.3, False)])  # fmt: skip
def test_bold_knows_which_way_is_better(tmp_path, monkeypatch, better, difference, beats):
    monkeypatch.setattr(report.pictures, "save", lambda *_: [])
    results = found()
    results["metrics"] = copy.deepcopy(METRICS)
    results["metrics"]["length"]["better"] = better
    results["pairs"]["length"] = [{"a": "base", "b": "sft", "difference": -difference, "low": -difference - 0.1,
                                   "high": -difference + 0.1, "p": 0.001, "p_holm": 0.006, "test": "t"}]  # fmt: skip
    markdown, _ = written(tmp_path, results)
    cells = {name: list(row.values())[2] for name, row in table(markdown, "## Answers").items()}
    assert [name for name, cell in cells.items() if "**" in cell] == (["sft"] if beats else [])


def test_the_verdicts_say_what_differs_and_what_may_not(whole):
    _, markdown, page = whole
    said = report.verdicts(found())
    assert said == [
        "sft beats base by the judge (0.12 against 0.00).",
        "rl and base cannot be told apart by the judge (0.25 against 0.00).",
        "staged beats base by the judge (0.38 against 0.00).",  # turned
        "staged and sft cannot be told apart by the judge (0.38 against 0.12).",
        "staged and rl cannot be told apart by the judge (0.38 against 0.25).",
        "sft and rl cannot be told apart by the judge (0.12 against 0.25).",
    ]
    assert [line[2:] for line in markdown.split("\n\n")[2].split("\n")] == said
    assert all(f"<li>{sentence}</li>" in page for sentence in said)
    assert "staged against base: +0.50 [+0.30, +0.70], p <0.001." in markdown.replace("&lt;", "<")
    unsure = (
        "p 0.47: these data cannot tell them apart; a true difference of about 0.57 would be seen four times in five."
    )
    assert f"sft against rl: +0.12 [-0.20, +0.44], {unsure}" in markdown
    assert f"staged against sft: -0.12 [-0.44, +0.20], {unsure}" in markdown
    assert markdown.count("cannot tell them apart") == 4
    assert "one seed" in markdown


def harmed(name, system="rl", other="base", headline="better"):
    """`system` is `headline` than `other` by the judge, and harmed in one metric of the guard set."""
    facts = {"judge": vars(KNOWN["judge"]), name: vars(KNOWN[name])}
    cells = {"judge": {system: {"value": 0.5}, other: {"value": 0.0}}, name: {system: {"value": 0.8}}}
    cells[name][other] = {"value": 0.8 + 0.41 * facts[name]["better"]}
    difference = {"better": 0.5, "worse": -0.5, None: 0.5}[headline]
    pair = {"a": system, "b": other, "low": None, "high": None, "difference": difference, "p_holm": 0.01}
    pair["p_holm"] = 0.01 if headline else 0.6
    harm = pair | {"difference": -0.41 * facts[name]["better"], "p_holm": 0.001}
    systems, pairs = list(dict.fromkeys(["base", other, system])), {"judge": [pair], name: [harm]}
    return {"systems": systems, "headline": "judge", "metrics": facts, "cells": cells, "pairs": pairs}


def test_the_first_table_keeps_what_got_worse():
    """Nine metrics for eight rows: over-refusal, worse by its interval alone, stays; one that only got better goes."""
    results = harmed("refusal_benign")
    results["pairs"]["refusal_benign"][0] |= {"low": 0.1, "high": 0.6, "p_holm": 0.07}
    for name in GUARDS:
        if name != "refusal_benign":
            facts = results["metrics"][name] = vars(KNOWN[name])
            results["cells"][name] = {"rl": {"value": 0.5}, "base": {"value": 0.2}}
            pair = {"a": "rl", "b": "base", "difference": 0.3 * facts["better"], "p_holm": 0.001}
            ends = sorted((0.1 * facts["better"], 0.5 * facts["better"]))
            results["pairs"][name] = [pair | dict(zip(("low", "high"), ends))]
    first = report.first_metrics(report.prepared(results))
    assert len(first) == report.ROWS < 1 + len(GUARDS) and first[:1] == ["judge"] and "refusal_benign" in first
    results["pairs"]["refusal_benign"][0]["low"] = -0.1  # not even by its interval
    assert "refusal_benign" not in report.first_metrics(report.prepared(results))


def test_the_guard_set_has_directions():
    asked = {"refusal_benign", "helpfulness", "toxicity", "repetition", "distinct_starts", "stops", "loss_per_byte"}
    assert set(GUARDS) == asked | {"refusal_harmful"} and all(metric.better for metric in GUARDS.values())
    assert KNOWN["refusal_benign"].better == -1


@pytest.mark.parametrize("name", GUARDS)
def test_a_harm_stands_behind_a_but(name, tmp_path):
    """Each metric of the guard set alone, worse for the system that wins: named, with both values."""
    results = harmed(name)
    (sentence,) = report.verdicts(results)
    now, before = results["cells"][name]["rl"]["value"], results["cells"][name]["base"]["value"]
    rate, digits = KNOWN[name].kind == "rate", KNOWN[name].digits
    values = [f"{100 * x:.0f} %" if rate else f"{x:.{digits}f}" for x in (now, before)]
    assert sentence.startswith("rl beats base by the judge (0.500 against 0.000), but ")
    assert values[0] in sentence and sentence.endswith(f", was {values[1]}.")
    pair = results["pairs"][name][0]
    for harmless in ({"p_holm": 0.05}, {"difference": -pair["difference"]}, {"p_holm": None}):
        results["pairs"][name] = [pair | harmless]
        assert report.verdicts(results) == ["rl beats base by the judge (0.500 against 0.000)."]
    # the same pair given the other way round is the same verdict
    turned = [
        {**p, "a": p["b"], "b": p["a"], "difference": -p["difference"]}
        for p in (harmed(name)["pairs"]["judge"][0], pair)
    ]
    assert report.verdicts(results | {"pairs": {"judge": turned[:1], name: turned[1:]}}) == [sentence]


def test_the_verdict_of_the_arm_that_declines_all():
    assert report.verdicts(harmed("refusal_benign")) == [
        "rl beats base by the judge (0.500 against 0.000), but declines 80 % of harmless requests, was 39 %."
    ]
    assert report.verdicts(harmed("refusal_benign", headline=None)) == [
        "rl and base cannot be told apart by the judge (0.500 against 0.000), "
        "but rl declines 80 % of harmless requests, was 39 %."
    ]
    assert report.verdicts(harmed("refusal_benign", "rl", "sft", headline="worse")) == [
        "rl is worse than sft by the judge (0.500 against 0.000), and declines 80 % of harmless requests, sft 39 %."
    ]
    found = harmed("refusal_benign", "rl", "sft", headline="worse")
    found["pairs"]["refusal_benign"][0]["difference"] = -0.41  # it is sft that declines more
    assert report.verdicts(found)[0].endswith(", but sft declines 39 % of harmless requests, rl 80 %.")
    found = harmed("refusal_benign")
    found["cells"]["refusal_benign"] = {"rl": {"value": 0.804}, "base": {"value": 0.801}}
    assert "80.4 % of harmless requests, was 80.1 %" in report.verdicts(found)[0]


def test_next_steps_follow_from_the_results():
    results = harmed("refusal_benign")
    harm, seeds = report.next_steps(results)
    assert harm.startswith("Next: rl did harm") and "one seed may mislead" in seeds
    free = {"floors": ["base, best of 4"], "seeds": {"base": 3, "rl": 3}}
    results["cells"]["judge"]["base, best of 4"] = {"value": 0.6}
    assert [step.split(",")[0] for step in report.next_steps(results | free)] == [
        "Next: rl did harm: add data or a reward for what got worse",
        "Next: base",
    ]
    results["cells"]["judge"]["base, best of 8"] = {"value": 0.4}  # more samples, and a worse best one
    several = free | {"floors": ["base, best of 4", "base, best of 8"]}
    assert report.next_steps(results | several)[1].startswith("Next: base, best of 4, picked by the reward")
    oracle = "base, best of 4 (oracle)"  # picked by the references, which nobody has of a new prompt
    results["cells"]["judge"][oracle] = {"value": 0.9}
    assert report.next_steps(results | free | {"floors": [oracle]}) == report.next_steps(results | free)[:1]
    results["cells"]["judge"]["base, best of 4"] = {"value": 0.4}  # below rl
    results["pairs"]["refusal_benign"][0]["p_holm"] = 0.2
    assert report.next_steps(results | free) == []


def test_no_width_is_no_interval_and_no_power(tmp_path):
    """One item, or a metric that is equal in both systems: the bootstrap has no width and says nothing."""
    results = found()
    for pair in results["pairs"]["judge"]:
        pair |= {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "p_holm": 1.0}
    results["cells"]["judge"]["sft"] = {"value": 0.5, "low": 0.5, "high": 0.5, "n": 40}
    markdown, page = written(tmp_path, results)
    assert "sft against base: +0.00, p 1." in markdown and "four times in five" not in markdown + page
    assert table(markdown, "## Answers")["sft"]["judge ↑"] == "0.50"


def test_the_first_table_has_at_most_eight_rows(tmp_path):
    results, everything = found(), {name: vars(metric) for name, metric in KNOWN.items()}
    results["metrics"] = everything
    results["cells"] = {m: {s: {"value": i + j / 8, "low": None, "high": None, "n": 40} for j, s in enumerate(SYSTEMS)}
                        for i, m in enumerate(everything)}  # fmt: skip
    results["cells"]["toxicity"] = {s: {"value": 0.0, "low": 0.0, "high": 0.0, "n": 40} for s in SYSTEMS}
    worse = {"a": "rl", "b": "base", "difference": 1.0, "low": None, "high": None, "p_holm": 0.001}
    results["pairs"] = {"judge": results["pairs"]["judge"], "repetition": [worse]}
    markdown, page = written(tmp_path, results)
    first, names = table(markdown, "# Which")["rl"], list(everything)
    assert len(first) == 8 and next(iter(first)) == "judge ↑" and "*worse*" in first["repetition ↓"]
    assert {name.split()[0] for name in first} == {"judge", *GUARDS} - {"toxicity"}  # the same everywhere: dropped
    order = [names.index(name.split()[0]) for name in list(first)[1:]]
    assert order == sorted(order)
    shown = {name.split()[0] for topic in {m["topic"] for m in everything.values()}
             for name in table(markdown, f"## {topic}, beside")["rl"]}  # fmt: skip
    assert shown == set(everything) - {"toxicity"} and "were not measured: toxicity." in markdown
    assert page.count("<details>") >= 6 and page.index("<h2>Cost") < page.index("<h2>More numbers")


def test_missing_is_never_zero(whole):
    markdown = whole[1]
    cost = markdown[markdown.index("## Cost") :].split("\n\n!")[0]
    assert "| base | – | – | – | – | – |" in cost
    assert "| staged: sft | 1,234 | 3.2 | 20 | 1.50 | – |" in cost and "| staged | 2,468 | – | 40 |" in cost
    assert "| sft - base | judge | 25 | 2 | 13 | 0.650 | [0.500, 0.780] | – |" in markdown
    assert "**base** (0.50)" in markdown and "**sft** (–)" in markdown


def test_one_system_alone_has_a_report(tmp_path):
    results = {k: v for k, v in found().items() if k in ("task", "items", "draws", "metrics", "headline", "cells")}
    markdown, _ = written(tmp_path, results | {"systems": ["sft"], "pairs": {}, "wins": [], "judge": None}, items=())
    assert "sft has 0.12 [-0.12, 0.38] by the judge, and nothing was compared with it." in markdown
    assert list(table(markdown, "## Answers")) == ["sft"] and "## Pairs" not in markdown
    assert markdown.count("**") == 2 and "**Bold**" in markdown  # the legend's own


def test_several_seeds_are_all_shown(tmp_path):
    results = found()
    results["seeds"] = {"base": 1, "sft": 3, "rl": 3, "staged": 3}
    results["by_seed"] = {"judge": {"base": [0.1], "sft": [0.2, 0.3, 0.4]}, "length": {"sft": [1.0, math.nan]}}
    markdown, _ = written(tmp_path, results, CURVES)
    assert "Training seeds: base 1, sft 3, rl 3, staged 3." in markdown and "one seed" not in markdown
    assert "| sft | 0.20 · 0.30 · 0.40 | 1.0 · – |" in markdown and "| rl | – | – |" in markdown


def test_nothing_that_is_not_finite_is_shown_or_significant(tmp_path):
    def spoil(value):
        if isinstance(value, dict):
            return {k: v if k in ("metrics", "seeds", "items", "draws") else spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        return math.nan if isinstance(value, (float, int)) else value

    markdown, page = written(tmp_path, spoil(found()), {"sft": spoil(CURVES["sft"])})
    rows = table(markdown, "# Which")
    assert {cell.split(" (")[0] for name in SYSTEMS for cell in rows[name].values()} <= {"–"}
    said = markdown.split("\n\n")[2].split("\n")
    assert len(said) == 6 and all(line.startswith("- Not measured: ") for line in said)
    assert "- Not measured: sft against base." in said and "p –, better" not in markdown
    assert not re.search(r"\b(nan|inf)\b", markdown) and "nan" not in " ".join(Page(page).text)


# ---------------------------------------------------------------- whatever a model wrote stays text, nothing is loaded


def test_hostile_text_breaks_neither_file(tmp_path):
    markdown, text = written(tmp_path, found(), CURVES)
    page = Page(text)
    assert not page.open
    assert not {"iframe", "link", "a", "object", "blockquote", "form", "base"} & set(page.tags)
    own = {name: (report.TEMPLATES / name).read_text() for name in ("report.js", "report.css")}
    assert page.tags.count("script") == 1 and "".join(page.scripts) == own["report.js"]
    assert page.tags.count("img") == 4
    assert all(v.startswith("data:image/png;base64,") for k, v in page.attributes if k == "src")
    assert not [(k, v) for k, v in page.attributes if k != "src" and ("//" in v or k.startswith("on") or k == "href")]
    assert "url(" not in text and "@import" not in text
    assert any("<script>alert(1)</script> | a `code`" in data for data in page.text)  # shown, not run
    quoted = [line for line in markdown.split("\n") if "evil" in line]
    assert len(quoted) == 12 and all(line.startswith("> ") for line in quoted)  # prompt, reference, 4 answers, twice
    for line in quoted:
        bare = re.sub(r"\\.", "", line)
        assert "⏎" in line and "](" not in bare and "]:" not in bare and "http://" not in line and "www." not in line
        assert not set("<`|$") & set(bare) and ">" not in bare[2:]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u2028\u202e\ud800]", markdown + text)


def test_the_page_allows_only_its_own_script_and_style(whole):
    text = whole[2]
    rules = dict(rule.split(" ", 1) for rule in re.search(r'Policy" content="([^"]+)"', text)[1].split("; "))
    hashes = {tag: base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", text, re.S)[1].encode()).digest())
              for tag in ("script", "style")}  # fmt: skip
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
                     **{f"{tag}-src": f"'sha256-{value.decode()}'" for tag, value in hashes.items()}}  # fmt: skip
    assert " style=" not in text and "prefers-color-scheme: dark" in text


def test_every_item_stands_side_by_side(tmp_path):
    items = [{"id": f"item-{i}", "prompt": f"question {i}", "reference": None,
              "answers": {s: f"{s} says {i}" for s in SYSTEMS}, "scores": {"base": i / 8, "sft": math.nan}}
             for i in range(40)]  # fmt: skip
    markdown, page = written(tmp_path, found(), items=items)
    seen = " ".join(Page(page).text)
    assert all(f"{s} says {i}" in seen for s in SYSTEMS for i in range(40)) and page.count("<article") == 40
    orders = [json.loads(v) for k, v in Page(page).attributes if k == "data-scores"]
    assert orders == [[i / 8, None, None, None] for i in range(40)]
    assert markdown.count("\n### ") == 6 and "6 of 40 items" in markdown


def test_names_are_data_too(tmp_path):
    results, evil = found(), "<b>|`$x"
    results = json.loads(json.dumps(results).replace('"staged"', json.dumps(evil)))
    markdown, page = written(tmp_path, results, {evil: CURVES["sft"]})
    assert evil not in markdown and evil not in page
    assert "&lt;b&gt;|`$x" in table(markdown, "## Answers") and evil in Page(page).text


def test_numbers_are_shown_with_their_digits_or_not_at_all():
    assert report.shown(1234.5678, 2) == "1,234.57" and report.shown(0.5, 1, "+") == "+0.5"
    assert report.shown(-0.0001, 2) == "0.00"  # never -0
    assert [report.shown(value) for value in (None, math.nan, math.inf, "1")] == ["–"] * 4
    assert report.finite({"a": [3, math.nan, -math.inf]}) == {"a": [3, None, None]}
