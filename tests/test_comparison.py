"""Tables of systems against each other, from lines made by hand; costs and curves from run folders."""

import json

import numpy as np
import pytest

from common import config, stats
from common.evaluation import comparison, metrics, statistics


def known(*names):
    """{name: Metric} of these names, in their order."""
    return {name: metrics.table("conala")[name] for name in names}


def line(number, **values):
    """An item's line; a value is x (a mean) or (x, n)."""
    found = {name: list(x) if isinstance(x, tuple) else [float(x), 1.0] for name, x in values.items()}
    scores = {name: a / b for name, (a, b) in found.items() if b}
    what = {"id": f"item-{number}", "prompt": "p", "answer": "a", "tokens": 5 + number, "stopped": True}
    return what | {"stats": found, "scores": scores}


def system(seed, shift, n=30):
    rng = np.random.default_rng(seed)
    return [
        line(i, judge=shift + rng.normal(), stops=int(rng.random() < 0.5), loss_per_byte=(i + shift, 2.0))
        for i in range(n)
    ]


def test_cells_are_means_ratios_and_rates_with_their_intervals():
    lines = system(0, 1.0)
    cells = comparison.cells({"a": [lines]}, metrics.ANY_TASK, 500)
    judge = [one["scores"]["judge"] for one in lines]
    assert list(cells) == [name for name in metrics.ANY_TASK if name in ("judge", "loss_per_byte", "stops")]
    assert cells["judge"]["a"]["value"] == pytest.approx(np.mean(judge)) and cells["judge"]["a"]["n"] == 30
    half = cells["judge"]["a"]["high"] - cells["judge"]["a"]["low"]
    assert half == pytest.approx(2 * 1.96 * np.std(judge) / 30**0.5, rel=0.2)  # the normal approximation
    assert cells["loss_per_byte"]["a"]["value"] == pytest.approx(sum(i + 1.0 for i in range(30)) / 60)
    stops = sum(one["scores"]["stops"] for one in lines)
    assert [cells["stops"]["a"][side] for side in ("low", "high")] == [*stats.wilson(stops, 30)]


def test_what_no_item_has_is_no_cell_and_never_zero():
    lines = [line(i, judge=1.0) | {"scores": {}} for i in range(3)]
    for one in lines:
        one["stats"]["refusal_benign"] = [0.0, 0.0]
    cells = comparison.cells(
        {"a": [lines], "floor": [[line(i, length=2) for i in range(3)]]}, metrics.table("safety"), 100
    )
    assert "refusal_benign" not in cells and list(cells["length"]) == ["floor"] and list(cells["judge"]) == ["a"]


def test_an_item_counts_if_it_does_under_any_seed():
    """Where no answer of the first seed counts, the rate of the second one has items all the same."""
    none, half = ([line(i, stops=stats) for i in range(4)] for stats in ((0, 0), (1, 1)))
    half[3] = line(3, stops=(0, 0))
    found = comparison.cell([none, half], "stops", "rate", 100)
    assert found["value"] == 1 and found["n"] == 3


def test_pairs_are_every_two_systems_with_holm_over_them():
    systems = {"base": [system(0, 0.0)], "sft": [system(1, 1.0)], "rl": [system(2, 2.0)], "staged": [system(3, 2.0)]}
    rows = comparison.pairs(systems, known("judge", "stops"), 2000)
    order = "sft-base rl-base staged-base rl-sft staged-sft staged-rl"
    assert " ".join(f"{row['a']}-{row['b']}" for row in rows["judge"]) == order
    for row in rows["judge"]:
        ours, theirs = (comparison.stack(systems[row[side]], "judge") for side in "ab")
        expected = statistics.compare(ours, theirs, metrics.value, 2000)
        assert [row[key] for key in ("difference", "low", "high", "p")] == pytest.approx(list(expected))
        assert row["p_holm"] >= row["p"] and row["test"] == "randomisation"
    assert sorted(row["p_holm"] for row in rows["judge"])[0] == pytest.approx(6 * min(r["p"] for r in rows["judge"]))
    assert all(row["test"] == "McNemar" for row in rows["stops"])
    one, other = (np.array([each["scores"]["stops"] for each in systems[name][0]]) > 0 for name in ("rl", "sft"))
    assert rows["stops"][3]["p"] == stats.mcnemar(one, other)[2]


def test_one_seed_meets_every_seed_and_two_never_meet_three():
    systems = {
        "base": [system(0, 0.0)],
        "sft": [system(k, 1.0) for k in (1, 2)],
        "rl": [system(k, 1.0) for k in (3, 4, 5)],
    }
    rows = comparison.pairs(systems, known("judge", "stops"), 200)
    assert [(row["a"], row["b"]) for row in rows["judge"]] == [("sft", "base"), ("rl", "base")]
    assert {row["test"] for row in rows["stops"]} == {"randomisation"}  # McNemar has no seeds
    assert [row["wins"] + row["ties"] + row["losses"] for row in comparison.wins(systems, "judge", 1)] == [30, 30, 30]


def test_seeds_that_only_repeat_the_items_teach_nothing_more():
    """Three copies of the same answers: the intervals of rates and win rates stay those of one."""
    one, two = ({"base": [system(0, 0.0)] * n, "sft": [system(1, 0.3)] * n} for n in (1, 3))
    assert comparison.wins(one, "judge", 1) == comparison.wins(two, "judge", 1)
    few, many = (comparison.cell(systems["sft"], "stops", "rate", 400) for systems in (one, two))
    assert few["value"] == many["value"] and many["low"] <= few["low"] and many["high"] >= few["high"]
    always = [[line(i, stops=1) for i in range(20)]] * 3
    assert comparison.cell(always, "stops", "rate", 100)["low"] == pytest.approx(stats.wilson(20, 20)[0])


@pytest.mark.parametrize("seeds", [1, 3])
def test_without_width_there_is_no_interval(seeds):
    """B7: one item, or a metric that is equal in both systems: no interval, so nobody can say what would be seen."""
    equal = [[line(i, length=7.1, repetition=0.1, stops=1, bleu=1) for i in range(20)]] * seeds
    for name, runs in (("equal", equal), ("one item", [lines[:1] for lines in equal])):
        for lines in runs:
            for each in lines:
                each["stats"]["bleu"] = [4.0, 4, 4, 3, 2, 1, 4, 3, 2, 1]
        compared = known("length", "repetition", "bleu")
        for metric, rows in comparison.pairs({"a": runs, "b": runs}, compared, 300).items():
            assert [(row["difference"], row["low"], row["high"], row["p"]) for row in rows] == [(0, None, None, 1.0)]
            cell = comparison.cell(runs, metric, compared[metric].kind, 300)
            assert (cell["low"], cell["high"]) == (None, None) and cell["n"] == len(runs[0]), name
        stops = comparison.cell(runs, "stops", "rate", 300)
        assert (stops["low"], stops["high"]) == pytest.approx(stats.wilson(len(runs[0]), len(runs[0])))


def test_luck_with_seeds_is_seldom_taken_for_a_difference():
    """Two equal paradigms whose seeds differ more than their items: p < 0.05 far less often than by items alone."""
    rng, found = np.random.default_rng(0), {1: 0, 3: 0}
    for _ in range(60):
        draw = {
            name: [
                [line(i, judge=x) for i, x in enumerate(shift + rng.normal(size=40))] for shift in rng.normal(0, 0.5, 3)
            ]
            for name in ("a", "b")
        }
        pooled = {name: comparison.stack(runs, "judge").mean(0, keepdims=True) for name, runs in draw.items()}
        found[1] += statistics.compare(pooled["b"], pooled["a"], metrics.value, 200)[3] < 0.05
        found[3] += comparison.pairs(draw, known("judge"), 200)["judge"][0]["p"] < 0.05
    assert found[3] < 0.5 * found[1] and found[1] > 20, found


def test_bleu_counts_every_item():
    cells = comparison.cells(
        {"a": [[line(i) | {"stats": {"bleu": [2.0, 2, 2, 1, 0, 0, 2, 1, 0, 0]}} for i in range(4)]]},
        known("bleu"),
        50,
    )
    assert cells["bleu"]["a"]["n"] == 4


def test_wins_turn_round_where_less_is_better():
    low, high = [line(i, toxicity=0.1) for i in range(4)], [line(i, toxicity=0.5) for i in range(4)]
    [row] = comparison.wins({"base": [high], "sft": [low]}, "toxicity", -1)
    assert row["a"] == "sft" and (row["wins"], row["losses"]) == (4, 0)


def test_history_cost_and_curve_follow_the_stages(tmp_path):
    start = None
    for name, mode, seen in (("staged-sft", "sft", (10, 20)), ("staged-rl", "rl", (30, 60))):
        run = tmp_path / name
        (run / "final").mkdir(parents=True)
        cfg = config.load_config(None, {"training.mode": mode, "model.adapter": start})
        (run / "config.yml").write_text(config.dump(cfg))
        records = [{"step": i, "tokens_seen": n, "seconds": 2.0, "peak_memory_gb": 1.0 + i} for i, n in enumerate(seen)]
        records.append({"step": 2, "tokens_seen": seen[-1], "eval/loss": 1.0})
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        start = str(run / "final")
    runs = comparison.history(start)
    assert [run.name for run in runs] == ["staged-sft", "staged-rl"] and comparison.history("tiny") == []
    cost = comparison.cost(runs)
    assert (cost["tokens"], cost["seconds"], cost["peak_memory_gb"]) == (80, 8.0, 2.0)
    assert [stage["tokens"] for stage in cost["stages"]] == [20, 60] and comparison.cost([]) == {}
    curve = comparison.curve(runs)
    assert [record["tokens_seen"] for record in curve] == [0, 10, 20, 20, 50, 80]
    assert [record["stage"] for record in curve] == ["sft"] * 3 + ["rl"] * 3
    assert cost["flops"] is None  # neither run counted them
    counting = runs[1] / "metrics.jsonl"
    counting.write_text("".join(json.dumps({"tokens_seen": n, "flops_seen": 1e9 * n}) + "\n" for n in (30, 60)))
    assert comparison.cost(runs)["flops"] is None and comparison.cost(runs[1:])["flops"] == 6e10
