"""A task of the user's through whole commands: docs/your_task.md as it stands there, faults that end in one line."""

import json
import re

import pytest

import evaluate
import train_rl
import train_sft
from tests import processes
from tests.test_docs import blocks
from tests.test_tasks import EXACT, RIGHT, write

ANSWERS = ["--evaluation.max_items", 6, "--evaluation.max_new_tokens", 8, "--evaluation.draws", 100]
RUN = ["--debug", "--training.eval_interval", 2, "--training.save_interval", 2]
SMALL = [*RUN, *ANSWERS, "--rl.rollout_size", 2, "--rl.group_size", 2, "--rl.max_new_tokens", 8, "--rl.max_steps", 2]
SMALL += ["--training.mode", "rl", "--rl.algorithm", "grpo", "--rl.minibatches", 1, "--reward.type", "heuristic"]


@pytest.fixture
def page(tmp_path):
    """The file that the page writes."""
    [code] = blocks("docs/your_task.md", "python")
    assert len(code.splitlines()) <= 45
    (tmp_path / "reverse.py").write_text(code)
    return tmp_path / "reverse.py"


def test_the_page_s_task_is_trained_and_evaluated(tmp_path, page, micro_folder):
    out = ["--task", page, "--logging.output_dir", tmp_path / "out", "--model.base_checkpoint", micro_folder]
    sft = [*RUN, "--training.max_steps", 2, "--training.batch_size", 4, *out, "--logging.run_name", "reverse-sft"]
    processes.train(train_sft.main, tmp_path, sft)
    start = tmp_path / "out" / "reverse-sft" / "final"
    rl = [*SMALL, *out, "--logging.run_name", "reverse-rl", "--model.adapter", start]
    processes.train(train_rl.main, tmp_path, [*rl, "--reward.heuristic.letters", 0.25])
    trained = tmp_path / "out" / "reverse-rl"
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert samples and all(re.fullmatch(r"Write [a-h]{4} backwards\.", s["prompt"]) for s in samples)
    for sample in samples:
        exact, letters = sample["parts"]["exact"], sample["parts"]["letters"]
        assert exact in (0, 1) and 0 <= letters <= 1
        assert sample["reward"] == pytest.approx((exact + 0.25 * letters) / 1.25 - (not sample["stopped"]), abs=1e-6)
    argv = ["--debug", *ANSWERS, *out, "--logging.run_name", "reverse", "--checkpoints", f"base={micro_folder}"]
    argv += [f"sft={start}", f"rl={trained / 'final'}"]
    processes.train(evaluate.main, tmp_path, argv)
    results = json.loads((tmp_path / "out" / "reverse" / "results.json").read_text())
    assert (results["task"], results["headline"], results["systems"]) == ("reverse", "exact", ["base", "sft", "rl"])
    assert results["cells"]["exact"].keys() >= {"base", "sft", "rl"} and results["items"] == 6
    report = (tmp_path / "out" / "reverse" / "report.md").read_text()
    assert "exact" in report and "share of answers that are the word backwards" in report

    # another text of the file is another run, and scores the same answers anew
    page.write_text(page.read_text().replace('counted(text.strip() == record["reference"])', "counted(True)"))
    more = [*rl, "--reward.heuristic.letters", 0.25, "--rl.max_steps", 3]
    processes.refused(train_rl.main, tmp_path, more, "cannot be resumed, this is another run: score")
    processes.train(evaluate.main, tmp_path, argv)
    results = json.loads((tmp_path / "out" / "reverse" / "results.json").read_text())
    assert [results["cells"]["exact"][name]["value"] for name in ("base", "sft", "rl")] == [1, 1, 1]


def test_the_weights_and_the_help_know_its_parts(tmp_path, page, capsys):
    with pytest.raises(SystemExit) as stop:
        train_rl.main(["--task", str(page), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "--reward.heuristic.letters" in text and "share of letters in their place" in text
    argv = [*SMALL, "--task", page, "--logging.output_dir", tmp_path / "out", "--reward.heuristic.toxicity", 1]
    processes.refused(train_rl.main, tmp_path, argv, "reward.heuristic.toxicity")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("TASK =", "task =", ("expected TASK = Task",)),
        (EXACT, "exit('enough')", ("reward called exit(): enough",)),
        (EXACT, "return {'exact': 2}", ("returned 2 for exact",)),
        (", synthetic=synthetic", "", ("task mine has no generated records", "--dataset_path")),
        (
            "synthetic(split, count, seed):\n    return",
            "synthetic(split, count, seed):\n    return 7 #",
            ("returned 7",),
        ),
        ("def synthetic(split, count, seed)", "def synthetic(split)", ("synthetic failed: TypeError",)),
        (
            '    return generate(draw, "mine", split, count, seed)',
            "    return [{'id': 'a', 'prompt': 7, 'response': 'x', 'reference': 'x'}]",
            ("synthetic: record 0 of train: prompt: expected a list",),
        ),
        (
            '    return generate(draw, "mine", split, count, seed)',
            "    return [{'id': 'a', 'prompt': w, 'response': 'x', 'reference': 'x'} for w in ('a', 'b')]",
            ("synthetic: record 1 of train: id 'a' was used in", "synthetic: record 0 of train"),
        ),
    ],
    ids=["no TASK", "exits", "2", "no records", "no list", "arguments", "bad record", "an id twice"],
)
def test_a_whole_command_refuses_in_one_line(tmp_path, micro_folder, old, new, words):
    path = write(tmp_path, old, new)
    argv = [*SMALL, "--task", path, "--logging.output_dir", tmp_path / "out", "--model.base_checkpoint", micro_folder]
    processes.refused(train_rl.main, tmp_path, argv, *words)


def test_evaluate_refuses_statistics_in_one_line(tmp_path, micro_folder):
    path = write(tmp_path, RIGHT, "return {'right': (math.nan, 1)}")
    argv = ["--debug", "--task", path, "--checkpoints", f"base={micro_folder}", "--evaluation.max_items", 2]
    argv += ["--evaluation.max_new_tokens", 8, "--logging.output_dir", tmp_path / "out"]
    processes.refused(evaluate.main, tmp_path, argv, path, "statistics failed: NameError")
