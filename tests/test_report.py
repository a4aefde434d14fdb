"""The report says every number that was found and no other, in words that follow from them, and is safe to open."""

import copy
import math
import re
from html.parser import HTMLParser

import pytest

from common.evaluation import report

SYSTEMS = ["base", "sft", "rl", "staged"]
HOSTILE = ("<script>alert(1)</script> | a `code` ![x](http://evil.example/p.png)\n\n# big\n> quote\n| a | b |\r\n"
           "[x]: http://evil.example\n</blockquote></div>\x07\x1b[31m\u202e\u2028www.evil.example "
           "<img src=http://evil.example> *b* $x$ \ud800 &lt; '\"")  # fmt: skip
METRICS = {
    "judge": {"what": "score of an answer (logits)", "better": 1, "kind": "mean", "digits": 2},
    "repetition": {"what": "share of repeated words", "better": -1, "kind": "rate", "digits": 3},
    "length": {"what": "tokens an answer", "better": 0, "kind": "mean", "digits": 1},
}
PAIRS = (("sft", "base"), ("rl", "base"), ("base", "staged"), ("sft", "rl"), ("sft", "staged"), ("rl", "staged"))
HOLM = {("sft", "base"): 0.002, ("base", "staged"): 0.0005}  # the other pairs: 0.47


def found():
    """A small result: sft and staged beat the base on the judge, rl does not; nothing else is significant."""
    cells = {m: {s: {"value": i + j / 8, "low": i + j / 8 - 0.25, "high": i + j / 8 + 0.25, "n": 40}
                 for j, s in enumerate(SYSTEMS)} for i, m in enumerate(METRICS)}  # fmt: skip
    del cells["length"]["rl"]
    cells["judge"]["always refuse"] = {"value": 0.75, "low": None, "high": None, "n": 38}
    pairs = {m: [{"a": a, "b": b, "difference": 0.12, "low": -0.2, "high": 0.44, "p": 0.4, "p_holm": 0.47,
                  "test": "randomisation"} for a, b in PAIRS] for m in METRICS}  # fmt: skip
    for pair in pairs["judge"]:
        holm = HOLM.get((pair["a"], pair["b"]), 0.47)
        sign = -1 if pair["a"] == "base" else 1
        if holm < 0.05:
            pair |= {"difference": sign * 0.5, "low": sign * 0.5 - 0.2, "high": sign * 0.5 + 0.2, "p_holm": holm}
    stage = {"name": "sft", "tokens": 1234, "seconds": 20.0, "peak_memory_gb": 1.5}
    sample = {"id": "item 1", "prompt": HOSTILE, "answers": dict.fromkeys(SYSTEMS, HOSTILE), "scores": {"base": 0.5}}
    return {
        "task": "safety", "items": 40, "draws": 500, "systems": SYSTEMS, "seeds": dict.fromkeys(SYSTEMS, 1),
        "metrics": METRICS, "headline": "judge", "cells": cells, "floors": ["always refuse"], "pairs": pairs,
        "wins": [{"a": "sft", "b": "base", "by": "judge", "wins": 25, "ties": 2, "losses": 13, "rate": 0.65,
                  "low": 0.5, "high": 0.78, "controlled": None}],
        "frontier": [{"system": s, "seed": 0, "kl": i * 3.0, "reward": i, "judge": i} for i, s in enumerate(SYSTEMS)],
        "by_seed": {"judge": {s: [0.5] for s in SYSTEMS}},
        "cost": {"base": {}, "sft": {**stage, "stages": [stage]},
                 "staged": {"tokens": 2468, "seconds": 40.0, "peak_memory_gb": 1.5, "stages": [stage, stage]}},
        "extra_cost": {"reward model": {**stage, "stages": []}}, "speed": {"sft": 321.0}, "samples": [sample],
        "top": [sample | {"system": "rl"}], "judge": {"accuracy": 0.6, "low": 0.5, "high": 0.7, "pairs": 90,
                                                      "shorter": 0.55},
        "decoding": "temperature 1", "notes": ["a <note>"], "command": "python evaluate.py --task safety",
    }  # fmt: skip


CURVES = {
    "sft": [{"stage": "sft", "step": i, "tokens_seen": 10 * i, "eval/loss": 2 - i / 9} for i in range(5)],
    "rl": [
        {"stage": "rl", "step": i, "tokens_seen": 10 * i, "reward": i, "kl": None, "eval/loss": 99} for i in range(5)
    ],
}


def written(folder, results, curves=None):
    report.write(folder, results, curves or {})
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    return markdown, (folder / "report.html").read_text(encoding="utf-8")


def table(markdown, first):
    """The rows of the table whose header's first metric is `first`, as {name: {column: cell}}."""
    lines = markdown[markdown.index(f"|  | {first}") :].split("\n\n")[0].split("\n")
    rows = [[c.strip().replace("\\", "") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: dict(zip(rows[0], row)) for row in rows[2:]}


class Page(HTMLParser):
    """Collects what a browser would see: tags, attributes, text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, *written(folder, found(), CURVES)


def test_the_table_holds_every_value_with_its_interval(whole):
    _, markdown, page = whole
    rows, seen = table(markdown, "judge"), [data.strip() for data in Page(page).text]
    assert list(rows) == [*SYSTEMS, "floors, for orientation", "always refuse"]
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
    rows = table(whole[1], "judge")
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
    cells = {name: list(row.values())[3] for name, row in table(markdown, "judge").items()}
    assert [name for name, cell in cells.items() if "**" in cell] == (["sft"] if beats else [])


def test_the_summary_says_what_differs_and_what_may_not(whole):
    summary = whole[1].split("\n\n")[1]
    assert "sft and staged beat base significantly" in summary
    assert "staged is better than base: +0.50 [+0.30, +0.70], p <0.001." in summary.replace("&lt;", "<")  # turned
    unsure = (
        "p 0.47: these data cannot tell them apart; a true difference of about 0.57 would be seen four times in five."
    )
    assert f"Not significant: sft against rl: +0.12 [-0.20, +0.44], {unsure}" in summary
    assert f"Not significant: staged against sft: -0.12 [-0.44, +0.20], {unsure}" in summary
    assert summary.count("cannot tell them apart") == 4
    assert "one seed" in summary


def test_missing_is_never_zero(whole):
    markdown = whole[1]
    cost = markdown[markdown.index("## Cost") :]
    assert "| base | – | – | – | – |" in cost
    assert "| staged: sft | 1,234 | 20 | 1.50 | – |" in cost
    assert "| sft - base | judge | 25 | 2 | 13 | 0.650 | [0.500, 0.780] | – |" in markdown
    assert "**base** (0.50)" in markdown and "**sft** (–)" in markdown
    assert "read its verdicts with care" in markdown  # 0.50 is below 0.55, the floor


def test_one_system_alone_has_a_report(tmp_path):
    results = {k: v for k, v in found().items() if k in ("task", "items", "draws", "metrics", "headline", "cells")}
    markdown, _ = written(
        tmp_path, results | {"systems": ["sft"], "pairs": {}, "wins": [], "samples": [], "judge": None}
    )
    assert "No pairs were tested. sft: 0.12 [-0.12, 0.38]." in markdown
    assert list(table(markdown, "judge")) == ["sft"] and "**" not in markdown and "## Pairs" not in markdown


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
    rows = table(markdown, "judge")
    assert {cell.split(" (")[0] for name in SYSTEMS for cell in list(rows[name].values())[1:]} == {"–"}
    assert (
        "No system beats base" in markdown
        and "Not measured: sft against base." in markdown
        and "better than" not in markdown
    )
    assert not re.search(r"\b(nan|inf)\b", markdown) and "nan" not in " ".join(Page(page).text)
