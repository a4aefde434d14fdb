"""The pictures of a comparison, one function each: (results, curves, styles) -> a Figure, or None without data.

A value that is missing is not drawn: it is never shown as 0. A system keeps its colour, marker and line in every
picture: Okabe and Ito's colours stay apart for colour-blind readers, the markers in a grey print.
"""

import math
from functools import partial
from itertools import cycle
from pathlib import Path

from common import log

KNOWN = {
    "base": ("#595959", "s", "-"),
    "sft": ("#0072B2", "o", "-"),
    "rl": ("#D55E00", "^", "-"),
    "staged": ("#009E73", "D", (0, (5, 3))),
}
OTHERS = (
    ("#CC79A7", "*", "-."),
    ("#E69F00", "P", ":"),
    ("#56B4E9", "X", "-."),
    ("#000000", "v", ":"),
    ("#999999", "h", "-."),
    ("#8C564B", "<", ":"),
)
LEARNING = {
    "loss of SFT on val (nats per token)": ("eval/loss",),
    "reward (markers: on val)": ("reward", "eval/reward"),
    "KL to the reference (nats per token)": ("kl",),
    "length of an answer (tokens)": ("length",),
}
COSTS = {"tokens": "tokens, trained and sampled", "flops": "FLOPs by formula", "seconds": "seconds of steps"}
ALTS = {
    "differences.png": "Differences between the systems in each metric with 95 % intervals; filled: significant.",
    "cost.png": "The headline metric over what training cost, with 95 % intervals.",
    "frontier.png": "Reward, and score of a judge that passed, over the root of the KL to the base; 95 % intervals.",
    "curves.png": "Learning curves of all arms over the tokens seen in training, one line for each stage.",
    "reliability.png": "How often the judge is right on its val pairs, over how sure it says it is.",
}


def save(folder, results, curves):
    """Draw what has data into `folder` and return the names of the files. No number in results is infinite or nan."""
    names = [*results["systems"], *results.get("floors", ()), *curves]
    styles = KNOWN | dict(zip((name for name in dict.fromkeys(names) if name not in KNOWN), cycle(OTHERS)))
    drawn = []
    for name, draw in DRAWERS.items():
        if log.save_picture(Path(folder) / name, partial(draw, results, curves, styles)):
            drawn.append(name)
    return drawn


def legend(figure, names, styles, lines=False):
    """One legend for all panels, above them: each name with its colour, marker and, for `lines`, its line."""
    from matplotlib.lines import Line2D

    handles = []
    for name in names:
        colour, marker, dash = styles[name]
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle=dash if lines else "", label=name))
    figure.legend(handles=handles, loc="outside upper center", ncols=3 if len(names) > 4 else 4, frameon=False)


def measured(entry, key="value"):
    return entry is not None and entry.get(key) is not None


def differences(results, curves, styles):
    """A panel for each metric of the first table, a line for each pair; filled where it is significant."""
    tables = {metric: results["pairs"][metric] for metric in results.get("first", ()) if results["pairs"][metric]}
    if not tables:
        return None
    names = list(dict.fromkeys((row["a"], row["b"]) for rows in tables.values() for row in rows))
    figure, axes = log.panels_of(len(tables), 3, (2.7, 0.8 + 0.26 * len(names)))
    for i, (axis, (metric, rows)) in enumerate(zip(axes, tables.items(), strict=True)):
        for row in (row for row in rows if measured(row, "difference")):
            place, (colour, marker, _) = names.index((row["a"], row["b"])), styles[row["a"]]
            if measured(row, "low"):
                axis.hlines(place, row["low"], row["high"], color=colour, linewidth=2, alpha=0.8)
            fill = colour if row["verdict"] else "white"
            axis.scatter([row["difference"]], [place], s=36, marker=marker, color=colour, facecolor=fill, zorder=3)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), [f"{a} - {b}" for a, b in names] if i % 3 == 0 else [""] * len(names))
        axis.set_ylim(len(names) - 0.5, -0.5)  # the first pair on top
        axis.locator_params(axis="x", nbins=4)
        axis.set_title(metric + {1: " ↑", -1: " ↓", 0: ""}[results["metrics"][metric]["better"]])
    return figure


def bars(cell, scale):
    """The interval as lengths to both sides, where there is one."""
    if not measured(cell, "low") or not measured(cell, "high"):
        return None
    low, middle, high = (scale(cell[key]) for key in ("low", "value", "high"))
    return [[max(0, middle - low)], [max(0, high - middle)]]


def cost(results, curves, styles):
    """What was gained for what training cost: the headline over tokens, FLOPs and seconds; the base cost nothing."""
    from matplotlib.ticker import EngFormatter

    cells, spent = results["cells"].get(results["headline"], {}), results.get("cost", {})
    names = [name for name in results["systems"] if measured(cells.get(name))]
    panels = {}
    for unit, title in COSTS.items():
        values = {name: spent[name][unit] for name in names if measured(spent.get(name), unit)}
        if values:
            panels[title] = values | {name: 0 for name in names if name == "base" and not spent.get(name)}
    if not panels:
        return None
    figure, axes = log.panels_of(len(panels), 3, (2.8, 3.2))
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        for name, value in values.items():
            colour, marker, _ = styles[name]
            lengths = bars(cells[name], float)
            axis.errorbar(value, cells[name]["value"], yerr=lengths, color=colour, marker=marker, alpha=0.9)
        axis.set(title=results["headline"], xlabel=title)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend(figure, names, styles)
    return figure


def frontier(results, curves, styles):
    """What was gained for how far the policy moved: reward and judge over the square root of the KL to the base."""
    cells = results["cells"]
    distances = {name: cell for name, cell in cells.get("kl_base_sequence", {}).items() if measured(cell)}
    panels = [key for key in ("reward", "judge") if any(measured(cells.get(key, {}).get(name)) for name in distances)]
    if not panels:
        return None

    def root(kl):
        return math.sqrt(max(kl, 0))

    figure, axes = log.panels_of(len(panels), 2, (3.8, 3.4))
    for axis, key in zip(axes, panels, strict=True):
        for name, distance in distances.items():
            cell, (colour, marker, _) = cells.get(key, {}).get(name), styles[name]
            if measured(cell):
                lengths = {"xerr": bars(distance, root), "yerr": bars(cell, float)}
                axis.errorbar(root(distance["value"]), cell["value"], **lengths, color=colour, marker=marker, alpha=0.9)
        axis.set(title=key, xlabel="square root of the KL to the base (nats per answer)")
    legend(figure, list(distances), styles)
    return figure


def series(curves, keys):
    """{key: {(arm, stage): its points (tokens, value)}}; eval/loss of SFT only: elsewhere it is one of pairs."""
    lines = {}
    for name, records in curves.items():
        for record in records:
            place = (name, record.get("stage"))
            for key in keys if measured(record, "tokens_seen") else ():
                if measured(record, key) and (key != "eval/loss" or record.get("stage") in (None, "sft")):
                    lines.setdefault(key, {}).setdefault(place, []).append((record["tokens_seen"], record[key]))
    return lines


def learning(results, curves, styles):
    """Learning curves of all arms on one axis of tokens; a line is one stage of one run."""
    from matplotlib.ticker import EngFormatter

    lines = series(curves, [key for keys in LEARNING.values() for key in keys])
    panels = {
        title: [key for key in keys if key in lines] for title, keys in LEARNING.items() if set(keys) & set(lines)
    }
    if not panels:
        return None
    figure, axes = log.panels_of(len(panels), 2, (3.8, 2.8))
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for key in keys:
            held_out = key.startswith("eval/")
            for (name, *_), points in lines[key].items():
                colour, marker, dash = styles[name]
                axis.plot(
                    *zip(*sorted(points)),
                    color=colour,
                    linestyle=dash,
                    linewidth=1.4 if held_out else 0.8,
                    alpha=0.55 if key == "reward" else 1,
                    marker=marker if held_out or len(points) < 3 else "",
                    markersize=5,
                    markerfacecolor="none",
                )
        axis.set(title=title, xlabel="tokens seen, over all stages")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend(figure, list(dict.fromkeys(name for arms in lines.values() for name, *_ in arms)), styles, lines=True)
    return figure


def reliability(results, curves, styles):
    """How often the judge is right over how sure it says it is, where the report of its own run knows."""
    rows = (results.get("judge") or {}).get("reliability")
    return log.reliability_diagram(rows) if rows else None


DRAWERS = {
    "differences.png": differences,
    "cost.png": cost,
    "frontier.png": frontier,
    "curves.png": learning,
    "reliability.png": reliability,
}
