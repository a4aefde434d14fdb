"""From ratings to training pairs: the turns that a rater read. test_evaluate.py and test_study.py go the whole way."""

import pytest

from common.evaluation import measure
from common.human import sheets


@pytest.mark.parametrize("roles", ["user", "user assistant user", "system user", "system user assistant user"])
def test_a_dialogue_that_a_person_reads_becomes_its_turns_again(roles):
    turns = [{"role": role, "content": f"said {i}: \n\nso\n{role} x"} for i, role in enumerate(roles.split())]
    assert sheets.turns(measure.dialogue(turns)) == turns


@pytest.mark.parametrize("text", ["User: hello", "a\n\nUser: b\n\nUser: c", "User: a\n\nAssistant: b", "", "Users: a"])
def test_other_texts_are_one_turn(text):
    assert sheets.turns(text) == [{"role": "user", "content": text}]
