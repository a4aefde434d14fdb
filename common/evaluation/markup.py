"""A document as a list of blocks, written as Markdown and as one HTML file that loads nothing.

A block is a plain tuple: ("heading", level, text), ("text", text), ("list", texts), ("table", headers, rows),
("picture", file, alt), ("sample", prompt, [(name, score, answer)]), ("code", text). A cell of a table is a text or
(value, detail, bold); a row that is a text is a line across the table. Blocks hold texts as they came and the writers
escape all of them: what a model wrote, or a name in a config, can neither break a file nor load anything.
"""

import base64
import html
import math
import re

ARROWS = {1: " ↑", -1: " ↓"}
STYLE = """
:root{color-scheme:light} body{margin:0 auto;max-width:76rem;padding:1rem;background:#fff;color:#1a1a1a;
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere} h1{line-height:1.2} h2{margin-top:2.2rem;border-bottom:1px
solid #ccc} .box{overflow-x:auto;margin:1rem 0} table{border-collapse:collapse;font-variant-numeric:tabular-nums;
font-size:.88rem}
th,td{padding:.3rem .5rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff;
white-space:normal;min-width:6.5rem;max-width:11rem} thead th{border-bottom:2px solid
#555} td small{display:block;color:#444} .line td{border-top:2px solid #555;text-align:left;color:#444}
img{display:block;min-width:34rem;max-width:100%;height:auto;margin:0 auto} .sample{border:1px solid #ccc;
border-radius:6px;margin:1rem 0;padding:.2rem .8rem .8rem} .answers{display:grid;gap:.8rem;
grid-template-columns:repeat(auto-fit,minmax(14rem,1fr))} .answers>div{border-left:3px solid #888;padding-left:.6rem}
.caption{font-size:.88rem;color:#444}
.said{white-space:pre-wrap;margin:.2rem 0} pre{white-space:pre-wrap;background:#f4f4f4;padding:.8rem}
@media print{@page{size:A4 landscape;margin:12mm} body{max-width:none;padding:0;font-size:10pt} .box{overflow:visible}
table{font-size:8pt} th,td{padding:.2rem .4rem;white-space:normal} td:first-child,th:first-child{position:static}
img{min-width:0;max-height:125mm} .sample,tr,img{break-inside:avoid} h2,h3{break-after:avoid}}
"""


def finite(value):
    """The value, or None where it is missing or not finite."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def shown(value, digits=3, sign=""):
    """A number with its digits, or – where there is none; `sign` "+" shows both signs. Never "-0"."""
    return "–" if finite(value) is None else f"{value:{sign}z,.{digits}f}"


def _visible(text):
    """Text whose line breaks are newlines and in which no control or direction-changing character stays hidden."""
    text = re.sub("\r\n?|[\u2028\u2029]", "\n", str(text)).replace("\t", "    ")
    return re.sub("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]", "�", text)


def _md(text):
    """Text as one line of Markdown that is only text: no tag, table cell, code, emphasis, picture or link."""
    text = html.escape(_visible(text).strip().replace("\n", " ⏎ "), quote=False)
    text = re.sub(r"([\\`*_|~$#]|\](?=[(\[:]))", r"\\\1", text)  # an interval keeps its plain brackets
    return text.replace("://", ":\\//").replace("www.", "www\\.")


def markdown(blocks):
    """The blocks as one Markdown text; pictures are files beside it."""
    return "\n\n".join(_MARKDOWN[kind](*content) for kind, *content in blocks) + "\n"


def _md_row(cells):
    texts = []
    for cell in cells:
        value, detail, bold = cell if isinstance(cell, tuple) else (cell, "", False)
        texts.append(f"{f'**{_md(value)}**' if bold else _md(value)} {_md(detail)}".strip())
    return f"| {' | '.join(texts)} |"


def _md_table(head, rows):
    lines = [_md_row(head), "|" + " :-- |" + " --: |" * (len(head) - 1)]
    return "\n".join(lines + [_md_row([row, *[""] * (len(head) - 1)] if isinstance(row, str) else row) for row in rows])


def _md_sample(prompt, answers):
    lines = [f"> {_md(prompt)}", *(f"> **{_md(name)}** ({score}): {_md(text)}" for name, score, text in answers)]
    return "\n>\n".join(lines)


_MARKDOWN = {
    "heading": lambda level, text: f"{'#' * level} {_md(text)}",
    "text": _md,
    "list": lambda texts: "\n".join(f"- {_md(text)}" for text in texts),
    "table": _md_table,
    "picture": lambda name, alt: f"![{alt}]({name})\n\n*{_md(alt)}*",
    "sample": _md_sample,
    "code": lambda text: "    " + _visible(text).strip().replace("\n", "\n    "),
}


def _e(text):
    return html.escape(_visible(text))


def page(blocks, folder):
    """The blocks as one HTML page; the pictures, read from `folder`, are inside it."""
    writers = _HTML | {"picture": lambda name, alt: _html_picture(folder / name, alt)}
    body = "\n".join(writers[kind](*content) for kind, *content in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{_e(blocks[0][2])}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _html_picture(path, alt):
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    caption = f'<p class="caption">{_e(alt)}</p>'
    return f'<div class="box" tabindex="0"><img alt="{_e(alt)}" src="data:image/png;base64,{data}"></div>{caption}'


def _html_row(cells, tag="td"):
    texts = []
    for cell in cells:
        value, detail, bold = cell if isinstance(cell, tuple) else (cell, "", False)
        value = f"<b>{_e(value)}</b>" if bold else _e(value)
        kind = f'{tag} scope="col"' if tag == "th" else tag
        texts.append(f"<{kind}>{value}{f' <small>{_e(detail)}</small>' if detail else ''}</{tag}>")
    return f"<tr>{''.join(texts)}</tr>"


def _html_table(head, rows):
    lines = [f'<tr class="line"><td colspan="{len(head)}">{_e(row)}</td></tr>' if isinstance(row, str)
             else _html_row(row) for row in rows]  # fmt: skip
    return (f'<div class="box" tabindex="0"><table><thead>{_html_row(head, "th")}</thead>\n<tbody>'
            + "\n".join(lines) + "</tbody></table></div>")  # fmt: skip


def _html_sample(prompt, answers):
    cards = "".join(f'<div><b>{_e(name)}</b> ({score})<div class="said">{_e(text)}</div></div>'
                    for name, score, text in answers)  # fmt: skip
    return f'<div class="sample"><p class="said">{_e(prompt)}</p><div class="answers">{cards}</div></div>'


_HTML = {
    "heading": lambda level, text: f"<h{level}>{_e(text)}</h{level}>",
    "text": lambda text: f"<p>{_e(text)}</p>",
    "list": lambda texts: "<ul>" + "".join(f"<li>{_e(text)}</li>" for text in texts) + "</ul>",
    "table": _html_table,
    "sample": _html_sample,
    "code": lambda text: f"<pre>{_e(text)}</pre>",
}
