"""Clinical: sections of a visit note from a doctor's dialogue, on MTS-Dialog (Ben Abacha et al. 2023, CC BY 4.0)."""

import re
from collections import Counter

from common.log import UserError
from common.tasks import File, Metric, Part, Row, Task, counted, generate, question, right_answer, split_of, text_of
from common.tasks.text import f1, instruction_off, length, overlap, repetition, rouge, words

NEGATIONS = frozenset("no not denies denied without never none negative nor".split())

MTS = "https://raw.githubusercontent.com/abachaa/MTS-Dialog/main/Main-Dataset/MTS-Dialog-"
SECTIONS = dict(  # the 20 section headers of MTS-Dialog in words
    pair.split("=")
    for pair in (
        "ALLERGY=allergies;ASSESSMENT=assessment;CC=chief complaint;DIAGNOSIS=diagnosis;DISPOSITION=disposition;"
        "EDCOURSE=emergency department course;EXAM=physical examination;FAM/SOCHX=family and social history;"
        "GENHX=history of present illness;GYNHX=gynecologic history;IMAGING=imaging;IMMUNIZATIONS=immunizations;"
        "LABS=laboratory results;MEDICATIONS=medications;OTHER_HISTORY=other history;PLAN=plan;PROCEDURES=procedures;"
        "PASTMEDICALHX=past medical history;PASTSURGICAL=past surgical history;ROS=review of systems"
    ).split(";")
)

SYMPTOMS = ("a cough", "a headache", "a rash", "back pain", "a sore throat", "chest pain", "knee pain", "ear pain")
SIGNS = ("fever", "chills", "nausea", "swelling", "weakness", "numbness")
DRUGS = ("aspirin", "insulin", "metformin", "ibuprofen", "codeine", "naproxen")
DOSES = (5, 10, 20, 25, 40, 50, 75, 80)
VISIT = """Summarize this visit for the section {section}.

Doctor: What is wrong?
Patient: I have had {symptom} for {number} {unit}.
Doctor: Any {sign}?
Patient: {reply}
Doctor: What do you take?
Patient: I take {dose} mg of {drug} every {time}."""
SUMMARIES = {
    "GENHX": "The patient has had {symptom} for {number} {unit}. The patient {verb} {sign}.",
    "MEDICATIONS": "The patient takes {dose} mg of {drug} every {time}.",
    "ROS": "The patient reports {symptom} and {verb} {sign}.",
}


def facts(completion: str, reference: str) -> float:
    """F1 of the numbers and negations that both texts state, as multisets; 1 if neither states any."""
    ours, right = (
        Counter(token for token in words(text) if token.isdigit() or token in NEGATIONS)
        for text in (completion, reference)
    )
    both = (ours & right).total()
    return 2 * both / (ours.total() + right.total()) if ours or right else 1.0


def reward(prompt: list[dict], completion: str, reference: str) -> dict[str, float]:
    return {
        "overlap": overlap(completion, reference),
        "facts": facts(completion, reference),
        "length": length(completion, reference),
        "repetition": repetition(completion),
    }


def statistics(record: dict, text: str) -> dict[str, tuple[float, float]]:
    right = right_answer(record)
    stated = [Counter(re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", side))) for side in (text, right)]
    denied = [Counter(w for w in words(side) if w in NEGATIONS) for side in (text, right)]
    return {name: counted(value) for name, value in rouge(text, right).items()} | {
        "numbers": counted(f1(*stated), any(stated)),
        "negations": counted(f1(*denied), any(denied)),
        "length_ratio": (len(words(text)), len(words(right))),
    }


def floors(records: list[dict]) -> dict[str, list[str]]:
    asked = [instruction_off(record["prompt"][-1]["content"]) for record in records]
    return {"first 40 words": [" ".join(text.split()[:40]) for text in asked], "whole dialogue": asked}


def draw(rng, split):
    """(visit and section, its summary, one with a wrong fact)."""
    while True:
        sign, sick = rng.choice(SIGNS), rng.random() < 0.5
        slots = {"section": rng.choice(tuple(SUMMARIES)), "symptom": rng.choice(SYMPTOMS), "sign": sign}
        slots |= {"number": rng.randint(2, 9), "unit": rng.choice(("days", "weeks", "months"))}
        slots |= {"dose": rng.choice(DOSES), "drug": rng.choice(DRUGS), "time": rng.choice(("morning", "night", "day"))}
        slots |= {"reply": f"Yes, some {sign}." if sick else f"No, no {sign}.", "verb": "reports" if sick else "denies"}
        visit, summary = VISIT.format(**slots), SUMMARIES[slots["section"]]
        if split_of(visit) == split:
            break
    wrong = {"verb": "denies" if sick else "reports", "dose": rng.choice([d for d in DOSES if d != slots["dose"]])}
    wrong["number"] = rng.choice([slots["number"], 2 + slots["number"] % 8])
    return question(visit), summary.format(**slots), summary.format(**slots | wrong)


def read(row: dict, where: str, index: int) -> Row | str:
    """MTS-Dialog: one section of the note from a dialogue. Line ends become \\n; only its training file has \\r\\n."""
    keys = ("ID", "section_header", "section_text", "dialogue")
    number, header, summary, dialogue = (text_of(row, key, where).replace("\r\n", "\n").strip() for key in keys)
    if header not in SECTIONS:
        raise UserError(f"{where}:section_header: unknown section {header!r}")
    if not summary or not dialogue:
        return "section_text or dialogue is empty"
    task = f"Write the {SECTIONS[header]} section of the clinical note for this conversation."
    return Row(number, question(f"{task}\n\n{dialogue}"), summary)


TASK = Task(
    name="clinical",
    parts={
        "overlap": Part(1.0, "ROUGE-L with the reference"),
        "facts": Part(0.5, "numbers and negations that the reference has too"),
        "length": Part(0.2, "nearness to the reference's number of words"),
        "repetition": Part(0.5, "share of 4-grams that are not repeated"),
    },
    reward=reward,
    metrics={
        "rouge1": Metric("ROUGE-1 F1 with the reference, 0 to 1, no stemming", 1, "mean"),
        "rouge2": Metric("ROUGE-2 F1 with the reference, 0 to 1, no stemming", 1, "mean"),
        "rougeL": Metric("ROUGE-L F1 with the reference, 0 to 1, no stemming", 1, "mean"),
        "numbers": Metric("F1 of the numbers that answer and reference state (units are not compared)", 1, "mean"),
        "negations": Metric("F1 of the words of negation that answer and reference use", 1, "mean"),
        "length_ratio": Metric("words of the answers / words of the references", 0, "ratio", digits=2),
    },
    statistics=statistics,
    headline=("rougeL",),
    library="rouge_score",
    floors=floors,
    synthetic=lambda split, count, seed: generate(draw, "clinical", split, count, seed),
    files={
        "test": File(
            MTS + "TestSet-1-MEDIQA-Chat-2023.csv", "b4d38dd2c99b2e9860099abcf653f1e0f3e9b69f9fcc45be2a2699b37a4d2f37"
        ),
        "val": File(MTS + "ValidationSet.csv", "227206520c4534381c0d7fba6d3f09319a9af5a6d9603a93c0341af1198e3958"),
        "train": File(MTS + "TrainingSet.csv", "65a28681dd59fc159681ea026e44610f2af7bc64a0e7f892d763eb03d9f503dc"),
    },
    read=read,
    rows="csv",
    licence="CC BY 4.0",
    mirror="mts-dialog",
    rank=overlap,
)
