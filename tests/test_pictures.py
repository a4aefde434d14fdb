"""The pictures of a comparison: PNG files that the report names, and none without data."""

import re

from common.evaluation import pictures
from tests.test_report import CURVES, Page, found, written


def test_pictures_are_png_files_that_the_files_name(tmp_path):
    folder, (markdown, page) = tmp_path, written(tmp_path, found(), CURVES)
    names = re.findall(r"^!\[.+\]\((\w+\.png)\)$", markdown, re.M)
    assert sorted(names) == sorted(path.name for path in folder.glob("*.png")) and len(names) == 6
    assert all((folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for name in names)
    assert len([v for k, v in Page(page).attributes if k == "alt" and v]) == 6


def test_without_data_there_is_no_picture(tmp_path):
    bare = {"systems": ["sft"], "metrics": {}, "headline": "judge", "cells": {}}
    assert pictures.save(tmp_path, bare, {}) == [] and not list(tmp_path.iterdir())
    styles = {"sft": pictures.KNOWN["sft"]}
    assert {draw(bare, {}, styles) for draw in pictures.DRAWERS.values()} == {None}
