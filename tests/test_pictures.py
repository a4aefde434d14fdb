"""The pictures of a comparison: PNG files that the report names, and none without data."""

import re

from common import log
from common.evaluation import pictures
from tests.test_report import CURVES, Page, found, written


def test_pictures_are_png_files_that_the_files_name(tmp_path):
    folder, (markdown, page) = tmp_path, written(tmp_path, found(), CURVES)
    names = re.findall(r"^!\[.+\]\((\w+\.png)\)$", markdown, re.M)
    assert sorted(names) == sorted(path.name for path in folder.glob("*.png")) and len(names) == 4
    assert all((folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for name in names)
    assert len([v for k, v in Page(page).attributes if k == "alt" and v]) == 4


def test_without_data_there_is_no_picture(tmp_path):
    bare = {"systems": ["sft"], "metrics": {}, "headline": "judge", "cells": {}}
    assert pictures.save(tmp_path, bare, {}) == [] and not list(tmp_path.iterdir())
    bare["first"] = []
    styles = {"sft": pictures.KNOWN["sft"]}
    assert {draw(bare, {}, styles) for draw in pictures.DRAWERS.values()} == {None}


def test_the_frontier_has_intervals_on_both_axes(monkeypatch):
    from matplotlib.axes import Axes

    drawn, draw = {}, Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda axis, x, y, **how: drawn.update({x: (y, how)}) or draw(axis, x, y, **how)
    )
    reward = {"sft": {"value": 1.0, "low": 0.5, "high": 2.0}, "base": {"value": 0.0, "low": None, "high": None}}
    kl = {"sft": {"value": 4.0, "low": 1.0, "high": 9.0}, "base": {"value": 0.0}}
    cells = {"reward": reward, "kl_base_sequence": kl}
    figure = pictures.frontier({"cells": cells}, {}, pictures.KNOWN)
    assert len(figure.axes) == 1 and set(drawn) == {0.0, 2.0}  # the square roots
    assert drawn[2.0][0] == 1.0 and drawn[2.0][1]["xerr"] == [[1.0], [1.0]] and drawn[2.0][1]["yerr"] == [[0.5], [1.0]]
    assert drawn[0.0][1]["xerr"] is None and drawn[0.0][1]["yerr"] is None


def test_the_headline_over_every_cost_that_is_known(monkeypatch):
    from matplotlib.axes import Axes

    drawn, draw = {}, Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda axis, x, y, **how: drawn.update({(x, y): how["yerr"]}) or draw(axis, x, y, **how)
    )
    cells = {"base": {"value": 0.0}, "sft": {"value": 1.0, "low": 0.5, "high": 2.0}, "rl": {"value": 3.0}}
    spent = {"tokens": 100, "flops": 2e12, "seconds": 7.0}
    results = {"systems": [*cells], "headline": "reward", "cells": {"reward": cells}}
    results["cost"] = {"base": {}, "sft": spent, "rl": spent | {"tokens": 200, "flops": None, "seconds": 8.0}}
    figure = pictures.cost(results, {}, pictures.KNOWN)
    assert [axis.get_xlabel() for axis in figure.axes] == list(pictures.COSTS.values())
    assert set(drawn) == {(0, 0.0), (100, 1.0), (2e12, 1.0), (7.0, 1.0), (200, 3.0), (8.0, 3.0)}
    assert drawn[(100, 1.0)] == [[0.5], [1.0]] and drawn[(200, 3.0)] is None


def test_the_reliability_of_the_judge_is_drawn_where_known(tmp_path):
    results = found()
    results["judge"]["reliability"] = [{"predicted": 0.2, "observed": 0.3, "count": 4}]
    markdown, _ = written(tmp_path, results)
    assert "(reliability.png)" in markdown and (tmp_path / "reliability.png").stat().st_size > 1000


def test_a_picture_that_fails_leaves_the_report(tmp_path, monkeypatch, capsys):
    """The report is written without it, and one line says so: its numbers took hours."""

    def broken(results, curves, styles):
        raise RuntimeError("no room for labels")

    monkeypatch.setitem(pictures.DRAWERS, "frontier.png", broken)
    monkeypatch.setattr(log, "_warned", set())
    markdown, page = written(tmp_path, found(), CURVES)
    assert "(differences.png)" in markdown and "frontier.png" not in markdown + page
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["cost.png", "curves.png", "differences.png"]
    assert (
        capsys.readouterr().out == f"warning: {tmp_path}/frontier.png was not drawn: RuntimeError: no room for labels\n"
    )
    assert not list(tmp_path.glob(".tmp-*"))
