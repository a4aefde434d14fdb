"""The final number of an answer: what each way of writing one must give."""

import gc
import time
from fractions import Fraction

import pytest

from common.tasks import numbers

CASES = {
    # plain, and what may stand around it
    "18": 18,
    "The answer is 18.": 18,
    "18.00": 18,
    ".5": "1/2",
    "Then 3 + 4 = 7, so she has 12 eggs.": 12,
    "**18**": 18,
    "<b>5</b>": 5,
    "12eggs": 12,
    "May 5th": 5,
    "50 m^2": 50,
    "50 m²": 50,
    "x_1 = 4": 4,
    "(7)": 7,
    "5 %": 5,
    "50\\%": 50,
    "１８": 18,
    "٣": 3,
    # thousands and currency
    "1,234": 1234,
    "1,234.50": "1234.5",
    "1,000,000.": 1000000,
    "18, 20": 20,
    "1,2,3": 3,
    "1,23": 23,
    "1{,}000": 1000,
    "1\\,000": 1000,
    "$1,234.50": "1234.5",
    "US$5": 5,
    "€ 30": 30,
    "30€": 30,
    "\\$18": 18,
    "$18 dollars": 18,
    # signs
    "-7": -7,
    "\u22127": -7,
    "= -5": -5,
    "(-5)": -5,
    "3*-2": -2,
    "-$5": -5,
    "$-5": -5,
    "-.5": "-1/2",
    "-0": 0,
    "10-5": 5,
    "10 - 5": 5,
    "10-5=5": 5,
    "10 - 12 = -2": -2,
    "- 5 apples": 5,  # an item of a list
    "5-10": 10,
    "5\u201310 days": 10,
    "5 to 10": 10,
    # fractions
    "3/4": "3/4",
    "3 / 4 cup": "3/4",
    "3/4.": "3/4",
    "-3/4": "-3/4",
    "1 1/2": "3/2",
    "3½ cups": "7/2",
    "½": "1/2",
    "6/3": 2,
    "\\frac{3}{4}": "3/4",
    "\\dfrac34": "3/4",
    "-\\frac{3}{4}": "-3/4",
    "3\\frac{1}{2}": "7/2",
    "10/0": None,
    # marks
    "\\boxed{42}": 42,
    "so \\boxed{7} in 3 days": 7,
    "$\\boxed{\\$18}$ for 2": 18,
    "\\boxed{\\frac{1}{2}} of 8": "1/2",
    "\\boxed{\\mathbf{\\frac{1}{2}}} of 8": "1/2",
    "\\boxed{5}, no, \\boxed{6}": 6,
    "\\boxed {1{,}000 \\text{ eggs}}": 1000,
    "\\boxed{18": 18,
    "\\boxed{}": None,
    "#### 18": 18,
    "#### -$1,200.75.": "-1200.75",
    "3 #### 18\nas 20 - 2 = 18 of 25": 18,
    "#### 5\n#### 6": 6,
    "5 is the answer ####": 5,
    "5 #### none": 5,
    # nothing to read
    "": None,
    "none": None,
    "x²": None,
    "9" * 51: None,
    "1/" + "9" * 51: None,
}


@pytest.mark.parametrize("text", CASES, ids=lambda text: repr(text)[:40])
def test_final_number(text):
    wanted = CASES[text]
    value = numbers.final_number(text)
    assert value == (None if wanted is None else Fraction(wanted)), text
    assert numbers.vote(text) == (None if wanted is None else str(Fraction(wanted)))


def test_equal_values_are_right_and_one_vote():
    same = ["1234.5", "$1,234.50", "\\boxed{1{,}234.5}", "#### 1,234.50 dollars", "2469/2", "\\frac{2469}{2}"]
    assert {numbers.vote(text) for text in same} == {"2469/2"}
    assert all(numbers.right(text, same[0]) and numbers.right(same[0], text) for text in same)
    assert not numbers.right("1234", "1234.5") and not numbers.right("-5", "5")
    assert not numbers.right("none", "none") and not numbers.right("", "5") and not numbers.right("5", "")


def test_only_the_end_of_a_long_answer_counts():
    assert numbers.final_number("7" + " x" * 900) == 7
    assert numbers.final_number("7" + " x" * 1100) is None


@pytest.mark.parametrize(
    "text",
    [
        *("9" * 10**6, "\\boxed{" * 10**5, "{" * 5000, "\\boxed{" + "{a}" * 5000, "#" * 10**5, "-" * 10**5 + "1"),
        *("1,000" * 5000, "1/" * 5000, "\\frac{" * 5000, "1 " * 5000, "\ufdfa" * 5000, "\ud800 1", "1,1" * 5000),
        *("\\boxed{" + "{{" * 900 + "1", "^{" * 3000, "½" * 3000),
    ],
    ids=lambda text: text[:8].encode("ascii", "replace").decode(),
)
def test_hostile_texts_take_no_time(text):
    gc.disable()  # a collection is not in the time that is measured
    try:
        start = time.process_time()
        value = numbers.final_number(text)
        assert time.process_time() - start < 0.5
    finally:
        gc.enable()
    assert value is None or abs(value) < 10**51
