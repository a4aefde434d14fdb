"""Blocks as Markdown and HTML: whatever a model wrote stays text, and the page loads nothing."""

import json
import math
import re

from common.evaluation import markup
from tests.test_report import CURVES, Page, found, table, written


def test_hostile_text_breaks_neither_file(tmp_path):
    markdown, text = written(tmp_path, found(), CURVES)
    page = Page(text)
    assert not page.open
    assert not {"script", "iframe", "link", "a", "object", "blockquote"} & set(page.tags)
    assert page.tags.count("img") == 6
    assert all(v.startswith("data:image/png;base64,") for k, v in page.attributes if k == "src")
    assert not [(k, v) for k, v in page.attributes if k != "src" and ("//" in v or k.startswith("on") or k == "href")]
    assert "url(" not in text and "@import" not in text
    assert any("<script>alert(1)</script> | a `code`" in data for data in page.text)  # shown, not run
    quoted = [line for line in markdown.split("\n") if "evil" in line]
    assert len(quoted) == 10 and all(line.startswith("> ") for line in quoted)  # a prompt and 4 answers, twice
    for line in quoted:
        bare = re.sub(r"\\.", "", line)
        assert "⏎" in line and "](" not in bare and "]:" not in bare and "http://" not in line and "www." not in line
        assert not set("<`|$") & set(bare) and ">" not in bare[2:]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u2028\u202e\ud800]", markdown + text)


def test_names_are_data_too(tmp_path):
    results, evil = found(), "<b>|`$x"
    results = json.loads(json.dumps(results).replace('"staged"', json.dumps(evil)))
    markdown, page = written(tmp_path, results, {evil: CURVES["sft"]})
    assert evil not in markdown and evil not in page
    assert "&lt;b&gt;|`$x" in table(markdown, "judge") and evil in Page(page).text


def test_numbers_are_shown_with_their_digits_or_not_at_all():
    assert markup.shown(1234.5678, 2) == "1,234.57" and markup.shown(0.5, 1, "+") == "+0.5"
    assert markup.shown(-0.0001, 2) == "0.00"  # never -0
    assert [markup.shown(value) for value in (None, math.nan, math.inf, "1")] == ["–"] * 4
    assert markup.finite(3) == 3 and markup.finite(math.nan) is None


def test_every_block_is_written_in_both_forms(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    blocks = [
        ("heading", 1, "Title"),
        ("text", "Some *text*."),
        ("list", ["one", "two"]),
        ("table", ["", "loss"], [["sft", ("1.0", "[0.9, 1.1]", True)], "a line"]),
        ("picture", "a.png", "what it shows"),
        ("sample", "a prompt", [("sft", "0.5", "an answer")]),
        ("code", "python evaluate.py"),
    ]
    text, page = markup.markdown(blocks), markup.page(blocks, tmp_path)
    lines = [
        "# Title",
        r"Some \*text\*.",
        "- one\n- two",
        "| sft | **1.0** [0.9, 1.1] |",
        "| a line |  |",
        "![what it shows](a.png)",
        "> **sft** (0.5): an answer",
        "    python evaluate.py",
    ]
    assert [line for line in lines if line not in text] == []
    pieces = [
        "<title>Title</title>",
        "<p>Some *text*.</p>",
        "<li>two</li>",
        "<b>1.0</b> <small>[0.9, 1.1]</small>",
        "data:image/png;base64,iVBORw==",
        "an answer</div>",
        "<pre>python evaluate.py</pre>",
    ]
    assert [piece for piece in pieces if piece not in page] == []
