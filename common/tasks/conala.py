"""CoNaLa: a Python snippet for an intent (Yin et al. 2018, CC BY-SA 4.0). Code is parsed but never executed."""

import ast
import functools
import re

from common.log import UserError
from common.tasks import File, Metric, Part, Row, Task, counted, generate, question, right_answer, split_of, text_of
from common.tasks.text import instruction_off, repetition

LONGEST_CODE = 5_000  # characters of code that are looked at; CoNaLa's longest snippet has under 500
# The Markdown fence that chat models put around code.
FENCE = re.compile(r"\s*(`{3,8}|~{3,8})(?:[^\n`]*\n)?((?:(?!\1).)*)\1\s*", re.DOTALL)

CONALA = "https://www.phontron.com/download/conala-corpus-v1.1.zip"  # what conala-corpus.github.io links to

NAMES = ("x", "a", "b", "data", "items", "names", "words", "values", "rows", "nums", "lines", "parts", "cells", "users")
KEYS = ("id", "name", "age", "city", "date", "price", "size", "color", "title", "score", "email", "phone", "key", "day")
CODE = (
    ("sort list `{x}` in reverse order and store it in `{y}`", "{y} = sorted({x}, reverse=True)"),
    ("sort list of dictionaries `{x}` by key '{k}'", "{x}.sort(key=lambda d: d['{k}'])"),
    ("get the first {n} elements of list `{x}`", "{x}[:{n}]"),
    ("get the last {n} elements of list `{x}`", "{x}[-{n}:]"),
    ("join list of strings `{x}` with '{k}'", "'{k}'.join({x})"),
    ("count how often '{k}' occurs in list `{x}`", "{x}.count('{k}')"),
    ("get the sum of lists `{x}` and `{y}`", "sum({x}) + sum({y})"),
    ("zip lists `{x}` and `{y}` into a dictionary", "dict(zip({x}, {y}))"),
    ("multiply each number in list `{x}` by {n}", "[i * {n} for i in {x}]"),
    ("remove key '{k}' from dictionary `{x}`", "{x}.pop('{k}', None)"),
    ("print every item of list `{x}` that is not in `{y}`", "for i in {x}:\n    if i not in {y}:\n        print(i)"),
    ("define a function `{k}` that adds {n} to its argument", "def {k}(x):\n    return (x + {n})"),
    ("print '{k}' when list `{x}` has more than {n} items", "if len({x}) > {n}:\n    print('{k}')"),
)


def without_fence(text: str) -> tuple[str, bool]:
    """(text without the one Markdown fence that stands around all of it, whether there was one)."""
    fence = FENCE.fullmatch(text)
    return (fence[2], True) if fence else (text, False)


def code_tokens(text: str, limit: int | None = LONGEST_CODE) -> list[str]:
    """CoNaLa's `tokenize_for_bleu_eval`: every non-alphanumeric apart, camelCase split, quotes as one kind."""
    text = re.sub(r"[^A-Za-z0-9_]", lambda match: f" {match[0]} ", text[:limit])
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", text)
    return re.sub(r"\s+", " ", text).replace('"', "`").replace("'", "`").split()


def sentence_bleu(completion: str, reference: str) -> float:
    """BLEU-4 of one snippet with add-one smoothing, in [0, 1], from sacrebleu on the official tokens."""
    from sacrebleu.metrics import BLEU

    ours, right = " ".join(code_tokens(completion)), " ".join(code_tokens(reference))
    bleu = BLEU(tokenize="none", smooth_method="add-k", smooth_value=1, effective_order=True, force=True)
    return bleu.sentence_score(ours, [right]).score / 100 if ours and right else 0.0


def parses(completion: str) -> float:
    """1 if `ast.parse` accepts the text; code of over LONGEST_CODE characters or 100 brackets deep is not tried."""
    depth = deepest = 0
    for character in completion[: LONGEST_CODE + 1]:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if len(completion) > LONGEST_CODE or deepest > 100 or not completion.strip():
        return 0.0
    try:
        ast.parse(completion)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return 0.0
    return 1.0


def reward(prompt: list[dict], completion: str, reference: str) -> dict[str, float]:
    """One fence around the whole answer is taken off."""
    code, _ = without_fence(completion)
    return {
        "bleu": sentence_bleu(code, reference),
        "exact": float(code_tokens(code) == code_tokens(reference)),
        "parse": parses(code),
        "repetition": repetition(completion),
    }


def statistics(record: dict, text: str) -> dict[str, tuple[float, ...]]:
    text, fenced = without_fence(text)
    ours, right = (code_tokens(code, limit=None) for code in (text, right_answer(record)))
    return {
        "bleu": bleu_counts(ours, right),
        "exact": counted(ours == right),
        "parses": counted(parses(text)),
        "fenced": counted(fenced),
    }


def floors(records: list[dict]) -> dict[str, list[str]]:
    return {"the intent itself": [instruction_off(record["prompt"][-1]["content"]) for record in records]}


@functools.cache
def _bleu_scorer():
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="none", smooth_method="none", force=True)


def bleu_counts(ours, right):
    """The ten counts of two lists of tokens; a corpus of one, as sacrebleu warns at single sentences."""
    bleu = _bleu_scorer().corpus_score([" ".join(ours)], [[" ".join(right)]])
    return (bleu.sys_len, bleu.ref_len, *bleu.counts, *bleu.totals)


def draw(rng, split):
    """(intent, its code, the same with a bracket too few or too many)."""
    while True:
        x, y = rng.sample(NAMES, 2)
        slots = {"x": x, "y": y, "k": rng.choice(KEYS), "n": rng.randint(2, 9)}
        intent, code = (part.format(**slots) for part in rng.choice(CODE))
        if split_of(intent) == split:
            break
    # never parses
    end = max(code.rfind(")"), code.rfind("]"))
    broken = code[:end] + code[end + 1 :] if rng.random() < 0.5 else code[: end + 1] + code[end:]
    return question(f"Write Python code to {intent}."), code, broken


def read(row: dict, where: str, index: int) -> Row | str:
    """CoNaLa: Python for an intent. The snippet stays as it is, indentation too. A question may have several."""
    number = row.get("question_id")
    if type(number) is not int:
        raise UserError(f"{where}:question_id: expected a whole number, found {type(number).__name__}")
    intent = text_of(row, "intent" if row.get("rewritten_intent") is None else "rewritten_intent", where).strip()
    snippet = text_of(row, "snippet", where)
    if not intent or not snippet.strip():
        return "intent or snippet is empty"
    task = "Write Python code for this task. Answer with the code only."
    return Row(f"{number}-{index}", question(f"{task}\n\n{intent}"), snippet)


TASK = Task(
    name="conala",
    parts={
        "bleu": Part(1.0, "BLEU with the reference"),
        "exact": Part(0.5, "1 for the reference itself"),
        "parse": Part(0.5, "1 for valid Python; nothing is executed"),
        "repetition": Part(0.5, "share of 4-grams that are not repeated"),
    },
    reward=reward,
    metrics={
        "bleu": Metric("CoNaLa's corpus BLEU-4, 0 to 100, no smoothing, official tokens", 1, "corpus", digits=2),
        "exact": Metric("share of answers whose official tokens equal the reference's", 1, "rate"),
        "parses": Metric("share of answers that Python can parse (nothing is executed)", 1, "rate"),
        "fenced": Metric("share of answers that stand in one Markdown fence, which was taken off", 0, "rate"),
    },
    statistics=statistics,
    headline=("bleu",),
    library="sacrebleu",
    floors=floors,
    synthetic=lambda split, count, seed: generate(draw, "conala", split, count, seed),
    files={
        "test": File(CONALA + "#conala-corpus/conala-test.json"),
        "train": File(CONALA + "#conala-corpus/conala-train.json"),
    },
    read=read,
    licence="CC BY-SA 4.0",
    mirror="conala",
    rank=sentence_bleu,
)
