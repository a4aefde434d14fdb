"""GSM8K: word problems of primary school with a final number (Cobbe et al. 2021, MIT). The reward is simply true."""

import re

from common.log import UserError
from common.tasks import File, Metric, Part, Row, Task, counted, generate, question, right_answer, split_of, text_of
from common.tasks.numbers import right, vote

INSTRUCTION = "Solve this problem step by step. End with #### and the final number."
ANNOTATION = re.compile(r"<<[^<>]*>>")  # the calculator's, which the publisher's answers hold: 3+4=<<3+4=7>>7
ENDING = re.compile(r"####\s*-?[$€£]?[\d,]*(?:\d|\.\d+)\s*\Z")

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
STORIES = (
    ("{name} has {a} {things} and gets {b} more. How many {things} does {name} have?", "+"),
    ("{name} has {c} {things} and gives {b} away. How many {things} are left?", "-"),
    ("{name} buys {a} boxes of {b} {things}. How many {things} is that?", "*"),
)


def reward(prompt: list[dict], completion: str, reference: str) -> dict[str, float]:
    return {"exact": float(right(completion, reference)), "format": float(bool(ENDING.search(completion)))}


def statistics(record: dict, text: str) -> dict[str, tuple[float, float]]:
    return {
        "exact": counted(right(text, right_answer(record))),
        "formatted": counted(ENDING.search(text) is not None),
    }


def floors(records: list[dict]) -> dict[str, list[str]]:
    """Without a model: the last number that the problem states."""
    return {"last number of the problem": [record["prompt"][-1]["content"] for record in records]}


def draw(rng, split):
    """(problem, its solution, one with a wrong number) in the publisher's form, of at most three tokens a number."""
    while True:
        story, sign = rng.choice(STORIES)
        a, b, name, things = rng.randint(2, 9), rng.randint(2, 9), rng.choice(NAMES), rng.choice(THINGS)
        problem = story.format(name=name, things=things, a=a, b=b, c=a + b)
        if split_of(problem) == split:
            break
    first, value = {"+": (a, a + b), "-": (a + b, a), "*": (a, a * b)}[sign]
    good, bad = (f"{first} {sign} {b} = {number} {things}.\n#### {number}" for number in (value, value + 1))
    return question(f"{INSTRUCTION}\n\n{problem}"), good, bad


def read(row: dict, where: str, index: int) -> Row | str:
    """The solution without the calculator's annotations; the reference is the number after ####."""
    problem, answer = text_of(row, "question", where).strip(), text_of(row, "answer", where)
    solution, mark, number = ANNOTATION.sub("", answer).strip().rpartition("####")
    if not mark:
        raise UserError(f"{where}:answer: expected a solution that ends with #### and a number")
    if not problem or not solution.strip():
        return "question or solution is empty"
    number = number.strip()
    text = f"{solution.strip()}\n#### {number}"
    return Row(str(index), question(f"{INSTRUCTION}\n\n{problem}"), text, reference=number)


DATA = "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d/grade_school_math/data/"
TASK = Task(
    name="gsm8k",
    parts={
        "exact": Part(1.0, "1 for the right final number"),
        "format": Part(0.1, "1 for an answer that ends with #### and a number"),
    },
    reward=reward,
    metrics={
        "exact": Metric("share of answers whose final number is the official one", 1, "rate"),
        "formatted": Metric("share of answers that end with #### and a number", 0, "rate"),
    },
    statistics=statistics,
    headline=("exact",),
    correct="exact",
    vote=vote,
    floors=floors,
    synthetic=lambda split, count, seed: generate(draw, "gsm8k", split, count, seed),
    files={
        "test": File(DATA + "test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
        "train": File(DATA + "train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    },
    read=read,
    licence="MIT",
    mirror="gsm8k",
)
