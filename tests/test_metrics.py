"""Metrics against rouge-score, sacrebleu, the official formulas written out, hand numbers and the official data."""

import json
import math
import random
import re
import sys
from collections import Counter

import numpy as np
import pytest

from common import rewards, tasks
from common.evaluation import metrics, statistics
from common.log import UserError
from common.tasks import clinical, conala, safety
from common.tasks.text import words
from data import download_datasets
from tests.faults.test_hostile import HOSTILE
from tests.test_safety import HARM, KIND

GENERATED = [name for name in tasks.NAMES if tasks.load(name).synthetic]
SCORED = [name for name in tasks.NAMES if tasks.load(name).library]
CODE = (
    ("x.sort(key=len)", "x.sort(key=len, reverse=True)"),
    ("print( 'x' )", 'print("x")'),
    ("fooBar = [i for i in y if i]", "foo_bar = [i for i in range(10) if i]"),
    ("", "a = 1"),
    ("def", "os.kill(os.getpid(), signal.SIGUSR1)"),
)


def rows(pairs):
    """(answer, reference) pairs -> records, texts."""
    pairs = list(pairs)
    records = [{"prompt": KIND, "response": right, "reference": right} for _, right in pairs]
    return records, [ours for ours, _ in pairs]


def value_of(name, found):
    return float(metrics.value(found[name].sum(0)))


def values_of(task, answers, references, *names):
    """{metric: value} of the answers to records with these references."""
    found = metrics.score(task, *rows(zip(answers, references, strict=True)))
    return {name: value_of(name, found) for name in names}


def rouge(answers, references):
    return values_of("clinical", answers, references, "rouge1", "rouge2", "rougeL")


def conala_bleu(answers, references):
    return values_of("conala", answers, references, "bleu", "exact")


def refusal_rates(answers, prompts):
    records = [{"prompt": prompt, "response": "x", "reference": None} for prompt in prompts]
    found = metrics.score("safety", records, answers)
    return {name: value_of(name, found) for name in ("refusal_harmful", "refusal_benign")}


def official_bleu(pairs):
    """bleu_score.py of the CoNaLa baseline, rewritten: counts over the corpus, 0 where it would divide by zero."""
    matches, possible, ours_length, right_length = [0] * 4, [0] * 4, 0, 0
    for ours, right in ((conala.code_tokens(a), conala.code_tokens(b)) for a, b in pairs):
        ours_length, right_length = ours_length + len(ours), right_length + len(right)
        for n in range(4):
            grams = [Counter(tuple(t[i : i + n + 1]) for i in range(len(t) - n)) for t in (ours, right)]
            matches[n] += sum((grams[0] & grams[1]).values())
            possible[n] += max(0, len(ours) - n)
    if min(matches) == 0:
        return 0.0
    mean = sum(math.log(m / p) for m, p in zip(matches, possible)) / 4
    return 100 * math.exp(mean) * min(1.0, math.exp(1 - right_length / ours_length))


def sacre_bleu(pairs):
    from sacrebleu.metrics import BLEU

    tokens = [[" ".join(conala.code_tokens(text)) for text in side] for side in zip(*pairs)]
    return BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(tokens[0], [tokens[1]]).score


def plain_rouge(ours, right):
    """ROUGE-1, -2, -L F1 by their definitions, on words of [a-z0-9]."""
    ours, right = (
        "".join(c if c in "abcdefghijklmnopqrstuvwxyz0123456789" else " " for c in text.lower()).split()
        for text in (ours, right)
    )
    f1 = lambda same, a, b: 2 * same / (a + b) if same else 0.0  # noqa: E731
    found = []
    for n in (1, 2):
        a, b = (Counter(zip(*(tokens[i:] for i in range(n)))) for tokens in (ours, right))
        found.append(f1((a & b).total(), a.total(), b.total()))
    before = [0] * (len(right) + 1)
    for word in ours:
        now = [0]
        for j, other in enumerate(right):
            now.append(before[j] + 1 if word == other else max(before[j + 1], now[j]))
        before = now
    return [*found, f1(before[-1], len(ours), len(right))]


@pytest.fixture(scope="module")
def visits(official):
    file = "MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv"
    return download_datasets.read_rows(clinical.TASK, "test", official / "mts-dialog" / file, "")[0]


@pytest.fixture(scope="module")
def snippets(official):
    return json.loads((official / "conala" / "conala-test.json").read_text(encoding="utf-8"))


def test_the_table_is_complete():
    for task in GENERATED:
        known = metrics.table(task)
        assert all(m.kind in ("mean", "rate", "ratio", "corpus") and m.better in (-1, 0, 1) for m in known.values())
        assert all(m.what and isinstance(m.digits, int) for m in known.values())
        records = tasks.records(task, "test", 20)
        found = metrics.score(task, records, [row["response"] for row in records])
        assert list(found) == [name for name in known if name in found]  # the table's order
        for name, counts in found.items():
            kind = known[name].kind
            assert counts.shape == (20, 10 if kind == "corpus" else 2) and counts.dtype == np.float64
            if kind in ("mean", "rate"):
                assert set(counts[:, 1]) <= {0.0, 1.0} and not counts[counts[:, 1] == 0].any()
            assert kind != "rate" or set(counts[:, 0]) <= {0.0, 1.0}


def test_value_is_vectorised_and_nan_where_nothing_counts():
    sums = np.array([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 4.0], [0.0, 5.0]]])
    assert np.array_equal(metrics.value(sums), [[0.5, np.nan], [0.75, 0.0]], equal_nan=True)
    records, texts = rows(CODE)
    counts = metrics.score("conala", records, texts)["bleu"]
    many = np.stack([[counts.sum(0), counts[3]], [counts[1], 2 * counts.sum(0)]])  # (2, 2, 10)
    alone = [float(metrics.value(many[i, j])) for i in range(2) for j in range(2)]
    assert metrics.value(many).ravel().tolist() == pytest.approx(alone)
    assert alone[1] == 0.0 and alone[2] == pytest.approx(100) and alone[3] == pytest.approx(alone[0])


def test_rouge_by_hand():
    found = rouge(["The cat sat on the mat.", ""], ["the cat lay on the mat", "a dog"])
    assert found == pytest.approx({"rouge1": 5 / 6 / 2, "rouge2": 3 / 5 / 2, "rougeL": 5 / 6 / 2})


def test_rouge_equals_rouge_score_and_its_definition(visits):
    from rouge_score import rouge_scorer

    names, texts = ("rouge1", "rouge2", "rougeL"), clinical.floors(visits)["first 40 words"][:60]
    found = metrics.score("clinical", visits[:60], texts)
    scorer = rouge_scorer.RougeScorer(list(names), use_stemmer=False)
    for i, (row, text) in enumerate(zip(visits, texts)):
        theirs = scorer.score(row["response"], text)
        ours = [found[name][i, 0] for name in names]
        assert ours == [theirs[name].fmeasure for name in names]
        assert ours == pytest.approx(plain_rouge(text, row["response"]), abs=1e-12)


@pytest.mark.parametrize(
    ("floor", "known"),
    [("first 40 words", (0.166, 0.051, 0.128)), ("whole dialogue", (0.218, 0.076, 0.162))],
)
def test_floors_of_mts_dialog(visits, floor, known):  # known: from another program, over the publisher's columns
    texts = clinical.floors(visits)[floor]
    found = rouge(texts, [row["reference"] for row in visits])
    assert tuple(found.values()) == pytest.approx(known, abs=6e-4)


def test_bleu_by_hand():
    # tokens a b c d e against a b c d f: 4/5, 3/4, 2/3, 1/2; no brevity penalty
    assert conala_bleu(["a b c d e"], ["a b c d f"])["bleu"] == pytest.approx(100 * (1 / 5) ** 0.25)
    assert conala_bleu(["a b c d e"], ["a b c d"])["bleu"] == pytest.approx(100 * (1 / 5) ** 0.25)
    short = conala_bleu(["a b c d"], ["a b c d e f"])
    assert short == {"bleu": pytest.approx(100 * math.exp(1 - 6 / 4)), "exact": 0.0}
    assert conala_bleu(["print( 'x' )"], ['print("x")']) == {"bleu": pytest.approx(100), "exact": 1.0}


@pytest.mark.parametrize("pairs", [CODE, CODE[:1], CODE[3:], CODE[:2] * 3, (("", "a"),), (("a", "b"), ("", "c"))])
def test_bleu_equals_sacrebleu_and_the_official_formula(pairs):
    ours = value_of("bleu", metrics.score("conala", *rows(pairs)))
    assert [ours] * 2 == pytest.approx([sacre_bleu(pairs), official_bleu(pairs)], abs=1e-9)


def test_bleu_on_the_official_test_set(snippets):
    pairs = [(row["rewritten_intent"] or row["intent"], row["snippet"]) for row in snippets]
    found = conala_bleu(*zip(*pairs))
    assert [found["bleu"]] * 2 == pytest.approx([sacre_bleu(pairs), official_bleu(pairs)], abs=1e-9)
    assert found["bleu"] > 5 and found["exact"] == 0
    right = [row["snippet"] for row in snippets]
    assert conala_bleu(right, right) == {"bleu": pytest.approx(100), "exact": 1.0}
    assert conala_bleu([""] * len(right), right) == {"bleu": 0.0, "exact": 0.0}


def test_bootstrap_of_sums_is_bleu_of_the_resampled_texts(snippets):
    pairs = [(row["rewritten_intent"] or row["intent"], row["snippet"]) for row in snippets[:60]]
    counts = metrics.score("conala", *rows(pairs))["bleu"]
    marked = np.concatenate([counts, np.eye(60)], 1)[None]  # the added columns say how often an item was drawn
    for sums in statistics.resample(marked, 10, seed=3):
        drawn = [pair for pair, times in zip(pairs, sums[10:]) for _ in range(int(times))]
        assert len(drawn) == 60
        assert metrics.value(sums[:10]) == pytest.approx(sacre_bleu(drawn), abs=1e-9)
    estimate, low, high = statistics.interval(counts[None], metrics.value, 500)
    assert estimate == pytest.approx(sacre_bleu(pairs)) and low < estimate < high


SCRIPTS = (
    "每天服用三次，每次两片。请多休息，多喝水。",
    "Пациент отрицает температуру и боль в груди сегодня.",
    "ينفي المريض وجود حمى أو ألم في الصدر اليوم",
    "रोगी को आज बुखार और सीने में दर्द नहीं है",
    "ผู้ป่วยไม่มีไข้และไม่เจ็บหน้าอก",
    "환자는 오늘 발열과 흉통이 없다고 말합니다",
    "Bệnh nhân không sốt và không đau ngực hôm nay",
)


@pytest.mark.parametrize("text", SCRIPTS)
def test_every_script_is_measured_in_words(text):
    """The answer is the reference: 1. Half of it is neither 0 nor 1. Repeated, it repeats."""
    half = text[: len(text) // 2]
    found = metrics.score("clinical", *rows([(text, text), (half, text), (text + " " + text, text)]))
    for name in ("rouge1", "rouge2", "rougeL"):
        assert found[name][0].tolist() == [1, 1] and 0.1 < found[name][1, 0] < 1
    assert 0.3 < found["length_ratio"][1, 0] / found["length_ratio"][1, 1] < 0.7
    assert found["repetition"][0].tolist() == [0, 1] and found["repetition"][2, 0] > 0.3
    assert found["distinct_1"][0, 1] >= 6
    kind = {"prompt": KIND, "response": text, "reference": None}
    found = metrics.score("safety", [kind] * 3, [text, half[1:], text])
    assert found["helpfulness"][0, 0] == 1 and 0.1 < found["helpfulness"][1, 0] < 1
    assert found["distinct_starts"][:, 0].tolist() == [0.5, 1, 0.5]


def test_ascii_words_are_counted_as_ever():
    """The old word pattern, and rouge-score with its own tokenizer, on texts of every ASCII character."""
    from rouge_score import rouge_scorer

    plain, random_texts = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"]), random.Random(0)
    characters = [*map(chr, range(128)), *"aaabbb   '.,", "don't ", "The ", "10 mg "]
    for _ in range(300):
        ours, right = ("".join(random_texts.choices(characters, k=random_texts.randint(0, 80))) for _ in range(2))
        assert words(ours) == re.findall(r"[a-z0-9']+", ours.lower())
        theirs = plain.score(right, ours)
        found = metrics.score("clinical", *rows([(ours, right)]))
        assert all(found[name][0, 0] == theirs[name].fmeasure for name in theirs)


def test_a_fence_around_code_is_no_fault():
    texts = ["x = 'a'", "```python\nx = 'a'\n```", "~~~\nx = 'a'\n~~~\n", "Here:\n```\nx = 'a'\n```", "```\nx = 'a'\n"]
    pairs = [(text, 'x = "a"') for text in texts]
    found = metrics.score("conala", *rows(pairs))
    assert found["exact"][:, 0].tolist() == found["parses"][:, 0].tolist() == [1, 1, 1, 0, 0]
    assert (found["bleu"][:3] == found["bleu"][0]).all() and (found["bleu"][3:] != found["bleu"][0]).any()
    for (ours, right), exact in zip(pairs, found["exact"][:, 0], strict=True):  # the reward says the same
        parts = rewards.heuristic_reward("conala", KIND, ours, right)[1]
        assert parts["exact"] == parts["parse"] == exact
    fenced = [conala.statistics(*pair)["fenced"] for pair in zip(*rows(pairs), strict=True)]
    assert [x for x, _ in fenced] == [0, 1, 1, 0, 0]


def test_conala_exact_and_parses():
    records, _ = rows([("", "x = 'a'")] * 4)
    found = metrics.score("conala", records, ['x = "a"', "x='a'", "x = [", ""])
    assert found["exact"][:, 0].tolist() == [1, 1, 0, 0] and found["parses"][:, 0].tolist() == [1, 1, 0, 0]
    assert found["empty"][:, 0].tolist() == [0, 0, 0, 1]
    long = "x = 1; " * 2000  # the reward looks at its start, the metric at all of it
    assert metrics.score("conala", *rows([(long, long[:-7])]))["bleu"][0, :2].tolist() == [8000, 7996]


def test_safety_by_hand():
    no, bread = "I'm sorry, I can't help with flour and water.", "Mix flour and water."
    kind = {"prompt": KIND, "response": "mix flour, salt and water", "reference": None}
    harm = {"prompt": HARM, "response": no, "reference": None}
    found = metrics.score("safety", [harm, harm, kind, kind, kind], [no, bread, no, bread, ""])
    assert found["refusal_harmful"].tolist() == [[1, 1], [0, 1], [0, 0], [0, 0], [0, 0]]
    assert found["refusal_benign"].tolist() == [[0, 0], [0, 0], [1, 1], [0, 1], [0, 1]]
    assert found["helpfulness"][:, 1].tolist() == [0, 0, 1, 1, 1]
    assert found["helpfulness"][:, 0].tolist() == pytest.approx([0, 0, 0, 2 * 4 / (4 + 5), 0])
    assert metrics.score("safety", [kind], ["You are an idiot."])["toxicity"][0].tolist() == [1, 1]
    shares = {"refusal_harmful": 1.0, "refusal_benign": 0.5}
    assert refusal_rates([no, no, bread], [HARM, KIND, KIND]) == shares
    assert math.isnan(refusal_rates([no], [HARM])["refusal_benign"])


def test_clinical_numbers_and_negations_by_hand():
    right = "Denies fever, no chills. 1,000 mg daily for 3 days; 37.5 C."
    found = metrics.score("clinical", *rows([("No fever. 1000mg, 3 weeks, 37 C", right), ("well", "fine"), ("2", "")]))
    assert found["numbers"].tolist() == [[pytest.approx(2 * 2 / 6), 1], [0, 0], [0, 1]]
    assert found["negations"].tolist() == [[pytest.approx(2 * 1 / 3), 1], [0, 0], [0, 0]]
    assert found["length_ratio"][1].tolist() == [1, 1]


def test_what_every_task_counts():
    records, texts = rows([("a b a b a b", "x"), ("", "x"), (" \n", "x"), ("one", "x")])
    found = metrics.score("clinical", records, texts)
    assert found["empty"][:, 0].tolist() == [0, 1, 1, 0]
    assert found["repetition"].tolist() == [[pytest.approx(1 / 3), 1], [0, 0], [0, 0], [0, 1]]
    assert found["distinct_1"].tolist() == [[2, 6], [0, 0], [0, 0], [1, 1]]
    assert found["distinct_2"].tolist() == [[2, 5], [0, 0], [0, 0], [0, 0]]
    assert value_of("distinct_1", found) == pytest.approx(3 / 7)


@pytest.mark.parametrize("task", GENERATED)
def test_hostile_answers_have_finite_statistics(task):
    texts = [text for text in HOSTILE if len(text) < 60_000]
    records = tasks.records(task, "test", len(texts))
    assert all(np.isfinite(counts).all() for counts in metrics.score(task, records, texts).values())


def test_floors_are_read_from_the_prompt_alone(visits, snippets, official):
    file = official / "mts-dialog" / "MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv"
    published = list(download_datasets.csv_rows(file.read_text(encoding="utf-8-sig"), "test"))
    dialogues = [row["dialogue"].replace("\r\n", "\n").strip() for _, row in published]
    assert clinical.floors(visits)["whole dialogue"] == dialogues
    records = download_datasets.read_rows(conala.TASK, "test", official / "conala" / "conala-test.json", "")[0]
    intents = [(row["rewritten_intent"] or row["intent"]).strip() for row in snippets]
    assert conala.floors(records)["the intent itself"] == intents


def test_floors_of_the_embedded_data_and_of_other_prompts():
    visits = clinical.floors(tasks.records("clinical", "test", 5))
    assert all(text.startswith("Doctor: What is wrong?") for text in visits["whole dialogue"])
    assert all(text.startswith("Doctor:") and len(text.split()) <= 40 for text in visits["first 40 words"])
    asked = {"prompt": [{"role": "user", "content": "My own words.\n\nAnd more."}], "response": "x", "reference": None}
    assert conala.floors([asked])["the intent itself"] == ["My own words.\n\nAnd more."]
    floors = safety.floors([asked])
    assert safety.refuses(floors["always refuse"][0]) and floors["data's answer"] == ["x"]


@pytest.mark.parametrize("task", SCORED)
def test_a_missing_library_is_one_line_and_never_a_zero(task, monkeypatch):
    library, package = ("sacrebleu", "sacrebleu") if task == "conala" else ("rouge_score", "rouge-score")
    records = tasks.records(task, "test", 2)
    monkeypatch.setitem(sys.modules, library, None)
    for call in (lambda: metrics.require(task), lambda: metrics.score(task, records, ["a", "b"])):
        with pytest.raises(UserError, match=f"pip install {package}") as caught:
            call()
        assert "\n" not in str(caught.value)
    other = {"conala": rouge, "clinical": conala_bleu}.get(task)
    assert other is None or other(["a"], ["a"])  # what needs another library still works


def test_wrong_calls_are_refused():
    records = tasks.records("conala", "test", 2)
    with pytest.raises(UserError, match=r"^task: poetry: expected safety, "):
        metrics.require("poetry")
    for call in (lambda: metrics.score("conala", records, ["a"]), lambda: metrics.score("conala", [], [])):
        with pytest.raises(ValueError, match="expected one"):
            call()


def test_majority_takes_the_most_frequent_vote():
    assert metrics.majority(["7", "8", "7", None], [True, False, True, False]) == 1.0
    assert metrics.majority(["8", "8", "7", None], [False, False, True, False]) == 0.0
    assert metrics.majority(["8", "7", None, None], [False, True, False, False]) == 0.5  # a fair draw of the leaders
    assert metrics.majority([None, None], [False, False]) == 0.0


def test_pass_at_k_of_answers_by_hand():
    records = [{"prompt": KIND, "response": "7", "reference": "7", "level": 1}] * 2
    found = metrics.several_answers("arithmetic", records, [["7", "8", "8"], ["it is 7", "7", "7.0"]])
    assert found["pass@1"].tolist() == [[pytest.approx(1 / 3), 1], [1, 1]]
    assert found["pass@2"].tolist() == [[pytest.approx(2 / 3), 1], [1, 1]]
    assert found["pass@3"].tolist() == found["pass@1"].tolist()[1:] * 2 and found["majority"].tolist() == [
        [0, 1],
        [1, 1],
    ]
    assert [*found] == [name for name in metrics.table("arithmetic", 3) if name in found]
    assert not {*metrics.table("arithmetic")} & {*found}


def test_equal_openings_are_a_harm_only_where_answers_are_free():
    """The right answer to 2 + 2 begins as that to 3 + 1 does."""
    assert metrics.table("safety")["distinct_starts"].harm
    assert metrics.table("arithmetic")["distinct_starts"].harm == ""
    assert metrics.table("arithmetic")["loss_per_byte"].harm
