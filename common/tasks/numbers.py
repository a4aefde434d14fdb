"""The final number of an answer, as a value: commas, currency, decimals, units, fractions and \\boxed{} are read."""

import re
import unicodedata
from fractions import Fraction

TAIL = 2_000  # characters at the end of an answer that are looked at
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
LATEX = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
# A minus counts as a sign unless a digit, a letter or a bracket stands before it: 10-5 ends in 5, not in -5.
SIGN = r"(?<![\w)\]])-\s?"
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(rf"(?P<minus>{SIGN}[$€£]?|[$€£]-)?(?P<top>{DIGITS})(?:\s?/\s?(?P<bottom>\d+)(?![\d.,/]))?")


def final_number(text: str) -> Fraction | None:
    """The number in the last \\boxed{}, else after the last ####, else the last one in the text; None: there is none.

    Only the text's last 2,000 characters count. 1,234.50 = 1234.5 = $1,234.50; 3/4 = \\frac{3}{4} = 0.75.
    """
    text = unicodedata.normalize("NFKC", text[-TAIL:].replace("\\!", "").replace("\\$", "$").replace("\\%", "%"))
    text = text.replace("\u2212", "-").replace("\u2044", "/").replace("{,}", ",")
    boxed = BOXED.findall(text)
    text = boxed[-1] if boxed else text
    _, mark, after = text.rpartition("####")
    if mark and re.search(r"\d", after):
        text = after
    matches = list(NUMBER.finditer(LATEX.sub(r"\1/\2", text)))
    return _value(matches[-1]) if matches else None


def _value(match):
    """The value of a match of NUMBER."""
    top, bottom = match["top"].replace(",", ""), match["bottom"]
    if len(top) > 50 or (bottom and (len(bottom) > 50 or not int(bottom))):
        return None
    value = Fraction(top) / Fraction(bottom or 1)
    return -value if match["minus"] else value


def right(completion: str, reference: str) -> bool:
    """Is the final number of the completion that of the reference?"""
    wanted = final_number(reference)
    return wanted is not None and final_number(completion) == wanted


def vote(text: str) -> str | None:
    """The final number as a text, the same for the same value."""
    value = final_number(text)
    return None if value is None else str(value)
