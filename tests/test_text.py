"""Words of any script, and what is counted in them: repetition, length, ROUGE-L."""

import random

import pytest
from rouge_score import rouge_scorer

from common.tasks import text


def test_repetition_length_and_overlap_by_hand():
    assert text.repetition("a b c d a b c d a b c d") == pytest.approx(4 / 9)
    assert text.length("one two", "one two three four") == pytest.approx(0.5)
    assert text.overlap("the cat sat", "the cat ran") == pytest.approx(2 / 3)
    texts = "Denies fever/chills; BP 120/80 (10 mg q.d.).", "The patient denies chills. 120/80, takes 10 mg."
    plain = rouge_scorer.RougeScorer(["rougeL"]).score(texts[1], texts[0])["rougeL"].fmeasure
    assert text.overlap(*texts) == pytest.approx(plain) and 0.2 < plain < 0.9


def test_overlap_equals_rouge_score_on_random_texts():
    scorer, random_texts = rouge_scorer.RougeScorer(["rougeL"]), random.Random(0)
    for _ in range(200):
        ours, right = (" ".join(random_texts.choices("abcdefg", k=random_texts.randint(0, 60))) for _ in range(2))
        assert text.overlap(ours, right) == scorer.score(right, ours)["rougeL"].fmeasure


def test_words_of_every_script():
    mixed = "It\u2019s 10 mg, don't_stop '' \u201cx\u201d"
    assert text.words(mixed) == ["it's", "10", "mg", "don't", "stop", "''", "x"]
    assert text.words("每天3次，ABC药。コーヒー") == [*"每天3次", "abc", *"药コーヒー"]
    assert text.words("Больной жалуется на боль") == ["больной", "жалуется", "на", "боль"]
    assert text.words("मरीज को बुखार है") == ["मरीज", "को", "बुखार", "है"]  # signs for vowels part no word
    assert text.words("cafe\u0301 CAF\u00c9") == ["caf\u00e9"] * 2  # one letter or two code points
    assert text.words("\u2764\ufe0f ok \U0001f468\u200d\U0001f467 1\ufe0f\u20e3 \ud800") == ["ok", "1"]
    assert text.rouge_words("don\u2019t it's") == ["don", "t", "it", "s"]
