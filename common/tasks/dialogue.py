"""Dialogue: own data of any kind. Nothing is assumed of it: no word list, no reference, no right answer."""

from common.tasks import Part, Task
from common.tasks.text import length, repetition


def reward(prompt: list[dict], completion: str, reference: str | None) -> dict[str, float]:
    return {"length": length(completion, reference), "repetition": repetition(completion)}


TASK = Task(
    name="dialogue",
    parts={
        "length": Part(0.2, "nearness to the reference's number of words, or to 40 where there is none"),
        "repetition": Part(1.0, "share of 4-grams that are not repeated"),
    },
    reward=reward,
    needs_reference=False,
)
