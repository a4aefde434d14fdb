"""The pictures of a comparison, one function each: (results, curves, styles) -> a Figure, or None without data.

A value that is missing or not finite is not drawn: it is never shown as 0. A system keeps its colour, marker and line
in every picture: Okabe and Ito's colours stay apart for colour-blind readers, the markers in a grey print.
"""

import math
from itertools import cycle
from pathlib import Path

from common.evaluation.markup import ARROWS, finite

SETTINGS = {"font.size": 9, "axes.titlesize": 9.5, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
            "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}  # fmt: skip
KNOWN = {"base": ("#595959", "s", "-"), "sft": ("#0072B2", "o", "-"), "rl": ("#D55E00", "^", "-"),
         "staged": ("#009E73", "D", (0, (5, 3)))}  # fmt: skip
OTHERS = (("#CC79A7", "*", "-."), ("#E69F00", "P", ":"), ("#56B4E9", "X", "-."), ("#000000", "v", ":"),
          ("#999999", "h", "-."), ("#8C564B", "<", ":"))  # fmt: skip
ANSWERS = ("length", "distinct_2", "repetition", "stops")
LEARNING = {"held-out loss of SFT (nats a token)": ("eval/loss",), "reward (markers: held-out)":
            ("reward", "eval/reward"), "KL to the reference (nats a token)": ("kl",),
            "length of an answer (tokens)": ("length",)}  # fmt: skip


def _ends(cell):
    """(low, high) of its interval, or None without one."""
    ends = (finite(cell.get("low")), finite(cell.get("high")))
    return None if None in ends else ends


def save(folder, results, curves):
    """Draw what has data into `folder` and return the names of the files."""
    import matplotlib

    names = [*results["systems"], *(row["system"] for row in results.get("frontier", ())), *curves]
    names += [*results.get("floors", ()), *results.get("extra_cost", ()), *results.get("cost", ())]
    styles = KNOWN | dict(zip((name for name in dict.fromkeys(names) if name not in KNOWN), cycle(OTHERS)))
    with matplotlib.rc_context(SETTINGS):
        drawn = {name: draw(results, curves, styles) for name, draw in DRAWERS.items()}
        drawn = {name: figure for name, figure in drawn.items() if figure is not None}
        for name, figure in drawn.items():
            figure.savefig(Path(folder) / name, dpi=120, metadata={"Software": None})
    return list(drawn)


def _grid(panels, columns, size):
    """A figure and one pair of axes a panel, filled row by row."""
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(max(size[0] * columns, 4.2), size[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]


def _legend(figure, names, styles, lines=False):
    """One legend for all panels, above them: each name with its colour, marker and, for `lines`, its line."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker=marker, linestyle=dash if lines else "", label=name)
               for name in names for colour, marker, dash in [styles[name]]]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=3 if len(names) > 4 else 4, frameon=False)


def _interval(axis, row, cell, style, filled=True):
    """A point with its interval, lying on the line y = row."""
    if _ends(cell):
        axis.hlines(row, *_ends(cell), color=style[0], linewidth=2, alpha=0.8)
    axis.scatter([cell["value"]], [row], s=36, marker=style[1], color=style[0],
                 facecolor=style[0] if filled else "white", zorder=3)  # fmt: skip


def _rows(axis, labels):
    """Name the lines 0, 1, ... of a panel, the first one on top."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.locator_params(axis="x", nbins=4)


def differences(results, curves, styles):
    """A forest: a panel for each metric, a line for each pair; filled where it is significant."""
    tables = {m: rows for m in results["metrics"] if (rows := results.get("pairs", {}).get(m))}
    if not tables:
        return None
    names = list(dict.fromkeys((row["a"], row["b"]) for rows in tables.values() for row in rows))
    figure, axes = _grid(len(tables), 3, (2.7, 0.8 + 0.26 * len(names)))
    for i, (axis, (metric, rows)) in enumerate(zip(axes, tables.items())):
        for row in (row for row in rows if finite(row["difference"]) is not None):
            cell, place = row | {"value": row["difference"]}, names.index((row["a"], row["b"]))
            _interval(axis, place, cell, styles[row["a"]], row["verdict"] is not None)
        axis.axvline(0, color="black", linewidth=0.8)
        _rows(axis, [f"{a} - {b}" for a, b in names] if i % 3 == 0 else [""] * len(names))
        axis.set_title(metric + ARROWS.get(results["metrics"][metric]["better"], ""))
    return figure


def wins(results, curves, styles):
    """A matrix for each judge of answers: how often the row's system wins against the column's, ties half."""
    rows = [row for row in results.get("wins", ()) if finite(row["rate"]) is not None]
    if not rows:
        return None
    names = [s for s in results["systems"] if any(s in (r["a"], r["b"]) for r in rows)]
    judges = list(dict.fromkeys(row["by"] for row in rows))
    figure, axes = _grid(len(judges), 2, (1.5 + 0.85 * len(names), 1.1 + 0.62 * len(names)))
    for axis, judge in zip(axes, judges):
        table, text = [[math.nan] * len(names) for _ in names], {}
        for row in (row for row in rows if row["by"] == judge):
            i, j, ends = names.index(row["a"]), names.index(row["b"]), _ends(row)
            turned = ends and (1 - ends[1], 1 - ends[0])
            for (x, y), rate, span in (((i, j), row["rate"], ends), ((j, i), 1 - row["rate"], turned)):
                table[x][y] = rate
                text[x, y] = f"{rate:.2f}" + (f"\n[{span[0]:.2f}, {span[1]:.2f}]" if span else "")
        axis.imshow(table, cmap="PuOr_r", vmin=-0.4, vmax=1.4, aspect="auto")  # pale enough for black text
        for i in range(len(names)):
            for j in range(len(names)):
                label = text.get((i, j), "–" if i != j else "")
                axis.text(j, i, label, ha="center", va="center", fontsize=8)
        axis.grid(False)
        axis.set(title=f"by {judge}", xlabel="against", xticks=range(len(names)), xticklabels=names,
                 ylabel="wins of", yticks=range(len(names)), yticklabels=names)  # fmt: skip
    return figure


def frontier(results, curves, styles):
    """What was gained for how far the policy moved: reward and judge over the square root of the KL to the base."""
    rows = [row for row in results.get("frontier", ()) if finite(row.get("kl")) is not None]
    panels = [key for key in ("reward", "judge") if any(finite(row.get(key)) is not None for row in rows)]
    if not panels:
        return None
    figure, axes = _grid(len(panels), 2, (3.8, 3.4))
    names = list(dict.fromkeys(row["system"] for row in rows))
    for axis, key in zip(axes, panels):
        for name in names:
            points = [(math.sqrt(max(row["kl"], 0)), row[key]) for row in rows
                      if row["system"] == name and finite(row.get(key)) is not None]  # fmt: skip
            if points:
                axis.scatter(*zip(*points), s=45, color=styles[name][0], marker=styles[name][1], alpha=0.9)
        axis.set(title=key, xlabel="square root of the KL to the base (nats an answer)")
    _legend(figure, names, styles)
    return figure


def _series(curves, keys):
    """{key: {(arm, stage, seed): its points (tokens, value)}}; eval/loss of SFT only: elsewhere it is one of pairs."""
    lines = {}
    for name, records in curves.items():
        for r in records:
            place = (name, r.get("stage"), r.get("seed"))
            for key in keys if finite(r.get("tokens_seen")) is not None else ():
                if finite(r.get(key)) is not None and (key != "eval/loss" or r.get("stage") in (None, "sft")):
                    lines.setdefault(key, {}).setdefault(place, []).append((r["tokens_seen"], r[key]))
    return lines


def learning(results, curves, styles):
    """Learning curves of all arms on one axis of tokens; a line is one stage of one run."""
    from matplotlib.ticker import EngFormatter

    lines = _series(curves, [key for keys in LEARNING.values() for key in keys])
    panels = {title: [k for k in keys if k in lines] for title, keys in LEARNING.items() if set(keys) & set(lines)}
    if not panels:
        return None
    figure, axes = _grid(len(panels), 2, (3.8, 2.8))
    for axis, (title, keys) in zip(axes, panels.items()):
        for key in keys:
            for (name, *_), points in lines[key].items():
                (colour, marker, dash), held_out = styles[name], key.startswith("eval/")
                axis.plot(*zip(*sorted(points)), color=colour, linestyle=dash, linewidth=1.4 if held_out else 0.8,
                          alpha=0.55 if key == "reward" else 1, markersize=5, markerfacecolor="none",
                          marker=marker if held_out or len(points) < 3 else "")  # fmt: skip
        axis.set(title=title, xlabel="tokens seen, over all stages")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    _legend(figure, list(dict.fromkeys(name for series in lines.values() for name, *_ in series)), styles, lines=True)
    return figure


def answers(results, curves, styles):
    """Length and diversity of the answers: each system with its interval, each seed as a dot below it."""
    cells = {m: results["cells"].get(m, {}) for m in ANSWERS}
    panels = [m for m in ANSWERS if any(finite(c.get("value")) is not None for c in cells[m].values())]
    if not panels:
        return None
    names = [*results["systems"], *(f for f in results.get("floors", ()) if any(f in cells[m] for m in panels))]
    figure, axes = _grid(len(panels), 2, (3.8, 0.8 + 0.3 * len(names)))
    for i, (axis, metric) in enumerate(zip(axes, panels)):
        for row, name in enumerate(names):
            cell = cells[metric].get(name, {})
            if finite(cell.get("value")) is not None:
                _interval(axis, row, cell, styles[name])
            seeds = [v for v in results.get("by_seed", {}).get(metric, {}).get(name, ()) if finite(v) is not None]
            if len(seeds) > 1:
                axis.scatter(seeds, [row + 0.3] * len(seeds), s=9, color=styles[name][0], alpha=0.7)
        _rows(axis, names if i % 2 == 0 else [""] * len(names))
        axis.set_title(metric + ARROWS.get(results["metrics"].get(metric, {}).get("better"), ""))
    return figure


def cost(results, curves, styles):
    """What an arm took: tokens and seconds stage by stage, peak memory; and the headline metric over its seconds."""
    from matplotlib.ticker import EngFormatter

    spent = {n: c for n, c in {**results.get("cost", {}), **results.get("extra_cost", {})}.items() if c}
    panels = {"tokens": "training tokens", "seconds": "training time (s)", "peak_memory_gb": "peak memory (GB)"}
    panels = {k: t for k, t in panels.items() if any(finite(c.get(k)) is not None for c in spent.values())}
    cells = results["cells"].get(results["headline"], {})
    known = [n for n in results["systems"] if finite(cells.get(n, {}).get("value")) is not None]
    seconds = {n: finite(c.get("seconds")) for n, c in results.get("cost", {}).items() if n in known}
    bought = {n: x for n, x in seconds.items() if x is not None or results["cost"][n] == {}}
    if not panels:
        return None
    figure, axes = _grid(len(panels) + bool(bought), 2, (3.8, max(2.2, 0.8 + 0.32 * len(spent))))
    for axis, (key, title) in zip(axes, panels.items()):
        for row, (name, c) in enumerate(spent.items()):
            parts = [finite(s.get(key)) for s in c.get("stages", ())] if key != "peak_memory_gb" else []
            total, start = finite(c.get(key)), 0
            if total is None:
                continue
            for i, part in enumerate(parts if parts and None not in parts else [total]):
                axis.barh(row, part, left=start, color=styles[name][0], alpha=(1, 0.65, 0.4)[i % 3], edgecolor="white")
                start += part
            axis.text(start, row, f" {EngFormatter(sep='')(float(f'{total:.3g}'))}", va="center")
        _rows(axis, list(spent))
        axis.set(title=title, xlim=(0, axis.get_xlim()[1] * 1.2))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if bought:
        _bought(axes[-1], results, bought, styles)
        _legend(figure, list(bought), styles)
    return figure


def _bought(axis, results, seconds, styles):
    """The headline metric of each arm over its seconds of training; without training (None) it is a dashed line."""
    for name, x in seconds.items():
        cell, (colour, marker, _) = results["cells"][results["headline"]][name], styles[name]
        if x is None:
            axis.axhline(cell["value"], color=colour, linestyle="--", marker=marker, markevery=[0], clip_on=False)
        else:
            axis.scatter([x], [cell["value"]], s=40, color=colour, marker=marker)
            if _ends(cell):
                axis.vlines(x, *_ends(cell), color=colour, linewidth=2, alpha=0.8)
    axis.margins(x=0.1)
    axis.set(title=f"{results['headline']} over training time (s)", xlim=(0, None))


DRAWERS = {"differences.png": differences, "wins.png": wins, "frontier.png": frontier, "curves.png": learning,
           "length_diversity.png": answers, "cost.png": cost}  # fmt: skip
