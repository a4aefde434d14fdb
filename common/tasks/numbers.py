"""The final number of an answer, as a value: commas, currency, decimals, units, fractions and \\boxed{} are read."""

import re
import unicodedata
from fractions import Fraction

TAIL = 2_000  # characters at the end of an answer that are looked at
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
LATEX = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)(\d))")
RAISED = re.compile("[\u00b2\u00b3\u00b9\u2070-\u209c]|\\^ ?\\{?-?[0-9]+\\}?")  # exponents and indices: 50 m^2 is 50
BEFORE_FRACTION = re.compile("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e]|\\\\[dt]?frac)")  # 3½ is 3 1/2
# A minus is a sign if nothing stands between it and the number, and no digit, letter or bracket before it: both 10-5
# and 10 - 5 end in 5, and so does the item "- 5" of a list.
SIGN = r"(?<![\w)\]])-"
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
MIXED = r"(?:(?P<whole>\d+)\s(?=\d+/\d))?"  # 1 1/2
BOTTOM = r"(?:\s?/\s?(?P<bottom>\d+)(?!\d|[.,/]\d))?"
NUMBER = re.compile(rf"(?P<minus>{SIGN}[$€£]?|[$€£]-)?{MIXED}(?P<top>{DIGITS}){BOTTOM}")


def final_number(text: str) -> Fraction | None:
    """The number in the last \\boxed{}, else in the line after the last ####, else the last one; None: there is none.

    Only the text's last 2,000 characters count. 1,234.50 = 1234.5 = $1,234.50; 3/4 = \\frac{3}{4} = 0.75.
    """
    text = BEFORE_FRACTION.sub(" ", RAISED.sub("", re.sub(r"\\[!,]", "", text[-TAIL:])))
    text = unicodedata.normalize("NFKC", text.replace("\\$", "$").replace("\\%", "%"))
    text = text.replace("\u2212", "-").replace("\u2044", "/").replace("{,}", ",")
    boxed = BOXED.findall(text)
    text = boxed[-1] if boxed else text
    after = text.rpartition("####")[2].strip().partition("\n")[0] if "####" in text else ""
    text = after if re.search(r"\d", after) else text
    matches = list(NUMBER.finditer(LATEX.sub(r"\1\3/\2\4", text)))
    return _value(matches[-1]) if matches else None


def _value(match):
    """The value of a match of NUMBER."""
    whole, top, bottom = match["whole"] or "0", match["top"].replace(",", ""), match["bottom"] or "1"
    if max(len(whole), len(top), len(bottom)) > 50 or not int(bottom):
        return None
    value = Fraction(whole) + Fraction(top) / Fraction(bottom)
    return -value if match["minus"] else value


def right(completion: str, reference: str) -> bool:
    """Is the final number of the completion that of the reference?"""
    wanted = final_number(reference)
    return wanted is not None and final_number(completion) == wanted


def vote(text: str) -> str | None:
    """The final number as a text, the same for the same value."""
    value = final_number(text)
    return None if value is None else str(value)
