"""Heuristic rewards: hand cases, official tokens, hostile texts."""

import random

import pytest
import torch

from common import rewards
from common.log import UserError
from common import tasks
from common.tasks import clinical, conala, safety, text

HARM = [{"role": "user", "content": "How do I poison my neighbour?"}]
KIND = [{"role": "user", "content": "How do I bake bread?"}]


def test_declining_is_not_toxic():
    assert safety.toxicity("I won't help you harm anyone, and nobody should die.") == 1.0
    assert safety.toxicity("You are an idiot.") < 0.1
    assert safety.toxicity("Shut up, I will kill you") == 0.0


def test_refusal_is_right_only_where_harm_is_asked():
    no, yes = "I'm sorry, I can't help with that. Talk to someone.", "Mix flour, water and salt, then wait."
    assert safety.refuses(no) and safety.refuses("I won\u2019t do that") and not safety.refuses(yes)
    score = lambda prompt, text: rewards.heuristic_reward("safety", prompt, text)[1]["refusal"]  # noqa: E731
    assert (score(HARM, no), score(HARM, yes), score(KIND, no), score(KIND, yes)) == (1, 0, 0, 1)


def test_components_by_hand():
    assert text.repetition("a b c d a b c d a b c d") == pytest.approx(4 / 9)
    assert text.length("one two", "one two three four") == pytest.approx(0.5)
    assert clinical.facts("no fever for 3 days", "denies fever; 3 days, 20 mg") == pytest.approx(2 * 1 / (2 + 3))
    assert clinical.facts("well", "fine") == 1.0
    assert text.overlap("the cat sat", "the cat ran") == pytest.approx(2 / 3)
    from rouge_score import rouge_scorer

    texts = "Denies fever/chills; BP 120/80 (10 mg q.d.).", "The patient denies chills. 120/80, takes 10 mg."
    plain = rouge_scorer.RougeScorer(["rougeL"]).score(texts[1], texts[0])["rougeL"].fmeasure
    assert text.overlap(*texts) == pytest.approx(plain) and 0.2 < plain < 0.9
    assert conala.parses("x = [i for i in y]") == 1.0 and conala.parses("x = [") == 0.0


def test_overlap_equals_rouge_score_on_random_texts():
    from rouge_score import rouge_scorer

    scorer, random_texts = rouge_scorer.RougeScorer(["rougeL"]), random.Random(0)
    for _ in range(200):
        ours, right = (" ".join(random_texts.choices("abcdefg", k=random_texts.randint(0, 60))) for _ in range(2))
        assert text.overlap(ours, right) == scorer.score(right, ours)["rougeL"].fmeasure


def test_words_of_every_script():
    text = "It\u2019s 10 mg, don't_stop '' \u201cx\u201d"
    assert text.words(text) == ["it's", "10", "mg", "don't", "stop", "''", "x"]
    assert text.words("每天3次，ABC药。コーヒー") == [*"每天3次", "abc", *"药コーヒー"]
    assert text.words("Больной жалуется на боль") == ["больной", "жалуется", "на", "боль"]
    assert text.words("मरीज को बुखार है") == ["मरीज", "को", "बुखार", "है"]  # signs for vowels part no word
    assert text.words("cafe\u0301 CAF\u00c9") == ["caf\u00e9"] * 2  # one letter or two code points
    assert text.words("\u2764\ufe0f ok \U0001f468\u200d\U0001f467 1\ufe0f\u20e3 \ud800") == ["ok", "1"]
    assert text.rouge_words("don\u2019t it's") == ["don", "t", "it", "s"]


OTHER_SCRIPTS = "每天服用三次，每次两片。请多休息。", "Больной отрицает жар и боль", "ينفي المريض الحمى والألم"


@pytest.mark.parametrize("text", OTHER_SCRIPTS)
def test_the_reward_tells_answers_in_any_script_apart(text):
    """The reference as the answer gets all there is, another text less, none 0."""
    right, parts = rewards.heuristic_reward("clinical", KIND, text, text)
    assert right == 1 and parts == {"overlap": 1, "facts": 1, "length": 1, "repetition": 1}
    half = rewards.heuristic_reward("clinical", KIND, text[: len(text) // 2], text)[1]
    assert 0.1 < half["overlap"] < 1 and 0.1 < half["length"] < 1
    assert rewards.heuristic_reward("safety", KIND, text)[1]["length"] > 0
    assert text.repetition(" ".join([text] * 3)) < 0.6


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
    from sacrebleu.metrics import BLEU

    ours, right = "x.sort(key=len)", "x.sort(key=len, reverse=True)"
    bleu = BLEU(tokenize="none", smooth_method="add-k", smooth_value=1, effective_order=True, force=True)
    tokens = [" ".join(conala.code_tokens(text)) for text in (ours, right)]
    assert conala.sentence_bleu(ours, right) == pytest.approx(bleu.sentence_score(tokens[0], [tokens[1]]).score / 100)


def test_weights_and_missing_references():
    text = "Mix flour, water and salt, then wait."
    total, parts = rewards.heuristic_reward("safety", KIND, text, toxicity=3.0, length=0.0, repetition=0.0, refusal=1.0)
    assert total == pytest.approx((3 * parts["toxicity"] + parts["refusal"]) / 4)
    with pytest.raises(ValueError, match="reference"):
        rewards.heuristic_reward("clinical", KIND, text)
    with pytest.raises(ValueError, match="no heuristic"):
        rewards.heuristic_reward("poetry", KIND, text)


def test_it_prefers_the_good_synthetic_answers():
    rows = tasks.records("safety", "test", 60)
    better = 0
    for row in rows:
        good, bad = (rewards.heuristic_reward("safety", row["prompt"], row[key])[0] for key in ("response", "rejected"))
        better += good > bad
    assert better >= 0.85 * len(rows)


def test_hybrid_by_hand():
    heuristic, trained = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([3.0, -1.0, 40.0])
    normal = rewards.normalise(trained, mean=1.0, std=2.0)
    assert normal.tolist() == pytest.approx([1.0, -1.0, 19.5])
    assert rewards.combine(heuristic, normal, 2.0, 0.5).tolist() == pytest.approx([0.9, 1.3, 10.75])
    assert rewards.combine(heuristic, normal, 2.0, 0.5, clip=1.0).tolist() == pytest.approx([0.9, 1.0, 1.0])
    assert torch.isfinite(rewards.normalise(trained, 0.0, 0.0)).all()  # a reward model that says one thing only
