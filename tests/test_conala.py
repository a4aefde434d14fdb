"""The CoNaLa task: official tokens, sacrebleu's BLEU, fences, and code that is parsed but never executed."""

import ast
import random

import pytest
from sacrebleu.metrics import BLEU

from common import rewards
from common.tasks import conala
from tests.test_safety import KIND


def test_parses_by_hand():
    assert conala.parses("x = [i for i in y]") == 1.0 and conala.parses("x = [") == 0.0


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("\n  ```py\r\nx = 1\r\n```  \n", "x = 1\r\n"),
        ("~~~\nx = 1\n~~~", "x = 1\n"),
        ("````\nx = '```'\n````", "x = '```'\n"),
        ("```x = 1```", "x = 1"),
        ("```python\n    x = 1\n```", "    x = 1\n"),  # indentation is code
        ("```\n```", ""),
        ("x = 1", None),
        ("```\nx\n```\nand\n```\ny\n```", None),  # two
        ("So: ```x = 1```", None),
        ("```python\nx = 1", None),  # never closed
        ("", None),
    ],
)
def test_one_fence_around_the_whole_answer_is_stripped(text, bare):
    assert conala.without_fence(text) == ((text, False) if bare is None else (bare, True))


def test_conala_tokens_are_the_official_ones():
    assert conala.code_tokens("fooBar(x['a'], \"b\")") == "foo Bar ( x [ ` a ` ] , ` b ` )".split()
    perfect = rewards.heuristic_reward("conala", KIND, "print( 'x' )", 'print("x")')[1]
    assert perfect["exact"] == 1.0 and perfect["bleu"] == pytest.approx(1.0)


def test_bleu_equals_sacrebleu_on_the_official_tokens():
    ours, right = "x.sort(key=len)", "x.sort(key=len, reverse=True)"
    bleu = BLEU(tokenize="none", smooth_method="add-k", smooth_value=1, effective_order=True, force=True)
    tokens = [" ".join(conala.code_tokens(text)) for text in (ours, right)]
    assert conala.sentence_bleu(ours, right) == pytest.approx(bleu.sentence_score(tokens[0], [tokens[1]]).score / 100)


def test_code_parses_and_broken_code_does_not():
    rng, lines = random.Random(0), set()
    for _ in range(1000):
        _, good, bad = conala.draw(rng, "train")
        ast.parse(good)
        lines.add("\n" in good)
        with pytest.raises(SyntaxError):
            ast.parse(bad)
    assert lines == {True, False}
