"""The report of a study, from the dict of human.analyse, as Markdown; its words are in the template human.md."""

import re
from pathlib import Path

from markupsafe import Markup

from common import log
from common.human.analysis import MAX_FAILED, PRIOR, SCORES


def report(study):
    """human.analyse's dict -> Markdown text, for a reader who has not seen the code."""
    pages = log.templates(Path(__file__).parent, plain, figure=figure)
    left_out = [row for row in study["raters"] if row["rater_id"] in study["excluded"]]
    ranked = sorted(study["bradley_terry"].items(), key=lambda pair: -pair[1]["strength"])
    fixed = {"MAX_FAILED": MAX_FAILED, "PRIOR": PRIOR, "SCORES": SCORES}
    return pages.get_template("human.md").render(study=study, left_out=left_out, ranked=ranked, **fixed)


def plain(text):
    """A name that a user chose, as one line of plain text."""
    if isinstance(text, Markup):
        return text
    return Markup(re.sub(r"([\\|<>*`\[\]])", r"\\\1", " ".join(str(text).split())))


def figure(row, name, scale=1, shown=".3f", unit=""):
    """A figure with its interval."""
    if row[name] is None:
        return "-"
    bounds = "no interval" if row["low"] is None else f"{scale * row['low']:{shown}}, {scale * row['high']:{shown}}"
    return f"{scale * row[name]:{shown}}{unit} ({bounds})"
