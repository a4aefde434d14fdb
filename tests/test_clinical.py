"""The clinical task: stated facts, references in any script, and summaries that keep to the visit."""

import re

import pytest

from common import rewards, tasks
from common.tasks import clinical, text
from tests.test_safety import KIND

OTHER_SCRIPTS = "每天服用三次，每次两片。请多休息。", "Больной отрицает жар и боль", "ينفي المريض الحمى والألم"


def test_facts_by_hand():
    assert clinical.facts("no fever for 3 days", "denies fever; 3 days, 20 mg") == pytest.approx(2 * 1 / (2 + 3))
    assert clinical.facts("well", "fine") == 1.0


@pytest.mark.parametrize("answer", OTHER_SCRIPTS)
def test_the_reward_tells_answers_in_any_script_apart(answer):
    """The reference as the answer gets all there is, another text less, none 0."""
    right, parts = rewards.heuristic_reward("clinical", KIND, answer, answer)
    assert right == 1 and parts == {"overlap": 1, "facts": 1, "length": 1, "repetition": 1}
    half = rewards.heuristic_reward("clinical", KIND, answer[: len(answer) // 2], answer)[1]
    assert 0.1 < half["overlap"] < 1 and 0.1 < half["length"] < 1
    assert rewards.heuristic_reward("safety", KIND, answer)[1]["length"] > 0
    assert text.repetition(" ".join([answer] * 3)) < 0.6


def test_clinical_summaries_use_the_slots_of_the_visit():
    for row in tasks.records("clinical", "train", 200):
        visit = row["prompt"][-1]["content"]
        assert all(number in visit for number in re.findall(r"\d+", row["response"]))
        if "denies" in row["response"]:
            assert "No, no" in visit
