"""Arithmetic: sums and differences of numbers with 1 to 4 digits, generated. A level is the number of digits.

`test_ood` holds numbers with one digit more than the largest level. Above level 1 no problem stands in two of train,
val and test. Of one digit there are only about 150 problems: they recur in every split, in other words.
"""

import random
from collections.abc import Sequence

from common.log import UserError
from common.tasks import SPLITS, Metric, Option, Part, Task, counted, question, right_answer, split_of
from common.tasks.numbers import final_number, right, vote

LEVELS = (1, 2, 3, 4)
FORMS = ("What is {}?", "Calculate {}.", "How much is {}?", "Please work out {}.", "{} = ?", "Tell me {}.")
WHAT = "share of answers whose last number is the right one"


def reward(prompt: list[dict], completion: str, reference: str) -> dict[str, float]:
    return {
        "exact": float(right(completion, reference)),
        "format": float(completion.strip().removeprefix("-").isdecimal()),
    }


def statistics(record: dict, text: str) -> dict[str, tuple[float, float]]:
    correct, level = right(text, right_answer(record)), record.get("level")
    return {"exact": counted(correct)} | {
        f"exact_{digits}": counted(correct, digits == level) for digits in (*LEVELS, LEVELS[-1] + 1)
    }


def floors(records: list[dict]) -> dict[str, list[str]]:
    """Without a model: the last number of the question."""
    asked = [final_number(record["prompt"][-1]["content"]) for record in records]
    return {"last number of the question": [str(number) for number in asked]}


def draw(rng: random.Random, level: int) -> tuple[str, str, str]:
    """(what is asked, the problem, the answer): numbers with exactly `level` digits, a difference is never negative."""
    low, high = 10 ** (level - 1) if level > 1 else 0, 10**level - 1
    a, b = rng.randint(low, high), rng.randint(low, high)
    if rng.random() < 0.5:
        problem, answer = f"{a} + {b}", a + b
    else:
        problem, answer = f"{max(a, b)} - {min(a, b)}", abs(a - b)
    return rng.choice(FORMS).format(problem), problem, str(answer)


def synthetic(split: str, count: int, seed: int = 0, levels: Sequence[str] = ("1", "2", "3")) -> list[dict]:
    """Up to `count` records with distinct questions and their `level`; the first n of a longer list are those of n."""
    if split not in (*SPLITS, "test_ood"):
        raise UserError(f"task arithmetic has no generated records for split {split!r}")
    wanted = [int(level) for level in levels]
    wanted = [max(wanted) + 1] if split == "test_ood" else wanted
    rng, kept = random.Random(f"{seed}/arithmetic/{split}"), {}
    for _ in range(20 * count + 1000):
        level = rng.choice(wanted)
        asked, problem, answer = draw(rng, level)
        if split != "test_ood" and split_of(problem if level > 1 else asked) != split:
            continue
        record = {"id": f"arithmetic-{split}-{seed}-{len(kept)}", "prompt": question(asked), "response": answer}
        kept.setdefault(asked, record | {"rejected": None, "reference": answer, "level": level})
        if len(kept) == count:
            break
    return list(kept.values())


TASK = Task(
    name="arithmetic",
    parts={
        "exact": Part(1.0, "1 for the right number"),
        "format": Part(0.1, "1 for an answer that is a number and nothing else"),
    },
    reward=reward,
    metrics={"exact": Metric(WHAT, 1, "rate")}
    | {f"exact_{n}": Metric(f"the same, of numbers with {n} digit{'s' * (n > 1)}", 1, "rate") for n in (*LEVELS, 5)},
    statistics=statistics,
    headline=("exact",),
    correct="exact",
    vote=vote,
    floors=floors,
    synthetic=synthetic,
    sizes={"train": 4096, "val": 128, "test": 400, "test_ood": 200},
    options={"levels": Option(["1", "2", "3"], "list of 1 | 2 | 3 | 4", "digits of the numbers, drawn equally often")},
)
