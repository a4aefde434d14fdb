"""What is shown of a policy before and after a stage."""

import json
import shutil

import pytest

from common import config
from common.evaluation import answers
from tests import inputs


@pytest.fixture
def made(tmp_path, micro_folder):
    few = inputs.write_data(tmp_path / "few", "safety", train=4, val=4)
    return answers.Answers(
        config.load_config(None, {"model.base_checkpoint": str(micro_folder), "dataset_path": str(few)})
    )


def test_an_adapter_answers_on_the_base_at_hand(tmp_path, made, micro_folder):
    """Whatever place its files name."""
    start = inputs.random_start(tmp_path / "start", micro_folder, std=0.5)
    path = start / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    text = made.by(str(start))
    assert text != made.by(str(micro_folder)) and text
    shutil.rmtree(start)
    assert made.by(str(start)) == text  # it is asked once


def test_answers_are_shown_on_one_line_each_and_equal_ones_once(made, capsys):
    made.known |= {"a": "one\n\ntwo", "b": "x" * 300, "c": " \n"}
    made.show("a", "b")
    made.show("a", "a")
    made.show("b", "c")
    lines = capsys.readouterr().out.splitlines()
    prompt = lines[0].removeprefix("  val prompt:      ")
    assert prompt and lines[1:3] == ["  before:          one two", f"  after:           {'x' * 200}..."]
    assert lines[3:5] == [lines[0], "  before, after:   one two"] and lines[7] == "  after:           (nothing)"
    made.prompts = []
    made.show("a", "b")
    assert not capsys.readouterr().out
