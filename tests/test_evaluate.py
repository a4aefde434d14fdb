"""evaluate.py end to end: its files, going on, seeds, human evaluation, refusals, the Python call."""

import csv
import functools
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train_reward
from common import chat, config, data, model, stats
from common.evaluation import measure, metrics
from common.human import study
from tests import inputs, processes
from tests.inputs import random_adapter, random_reward_model, write_data

ROOT = Path(evaluate.__file__).parent
MAIN = evaluate.main
train, run, refused = (functools.partial(each, MAIN) for each in (processes.train, processes.run, processes.refused))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "few", "safety", test=16)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, micro_folder):
    """Folders of two random adapters."""
    out = tmp_path_factory.mktemp("adapters")
    for seed in (1, 2):
        net, tokenizer = model.load(micro_folder, torch.device("cpu"), torch.float32)
        random_adapter(net, "policy", seed)
        (out / str(seed)).mkdir()
        model.save(net, tokenizer, out / str(seed), "policy", str(micro_folder))
    return [out / "1", out / "2"]


@pytest.fixture(scope="module")
def settings(few, micro_folder):
    def flags(folder, *more):
        sizes = ["--evaluation.max_items", 12, "--evaluation.max_new_tokens", 10, "--evaluation.draws", 200]
        where = ["--model.base_checkpoint", micro_folder, "--dataset_path", few, "--logging.output_dir", folder]
        return ["--debug", *sizes, *where, "--logging.run_name", "run", "--reward.type", "heuristic", *more]

    return flags


@pytest.fixture(scope="module")
def done(tmp_path_factory, settings, adapters, micro_folder):
    """The folder of a finished comparison with a judge, and its command."""
    out = tmp_path_factory.mktemp("done")
    judge = random_reward_model(out / "judge", micro_folder)
    argv = settings(
        out,
        "--checkpoints",
        f"base={micro_folder}",
        f"sft={adapters[0]}",
        f"rl={adapters[1]}",
        "--evaluation.reward_checkpoint",
        judge,
        "--human_eval",
    )
    result = train(out, argv, pictures=True)
    return out / "run", argv, result


def lines(folder, name):
    return [json.loads(line) for line in (folder / "items" / f"{name}.jsonl").read_text().splitlines()][1:]


def test_its_files_hold_what_it_says(done):
    folder, _, result = done
    names = {path.name for path in folder.iterdir()}
    assert {"results.json", "report.md", "report.html", "items", "human_eval.csv", "human_eval.key.csv"} <= names
    results = json.loads((folder / "results.json").read_text())
    assert results["systems"] == ["base", "sft", "rl"] and results["headline"] == "reward" == result["headline"]
    assert results["items"] == 12 and len(results["pairs"]["reward"]) == 3 == len(results["wins"])
    for name in results["systems"]:
        found = lines(folder, f"{name}-0")
        assert len(found) == 12 and len({line["id"] for line in found}) == 12
        assert all("judge" in line["scores"] for line in found)
        for metric in ("reward", "length", "stops", "preference", "distinct_2", "loss_per_byte"):
            sums = np.array([line["stats"][metric] for line in found]).sum(0)
            cell = results["cells"][metric][name]
            assert cell["value"] == pytest.approx(metrics.value(sums)), metric
            if len({line["scores"].get(metric) for line in found}) == 1 and cell["low"] is None:
                continue  # the same for every item: the bootstrap has no width
            assert cell["low"] <= cell["value"] <= cell["high"]
    assert results["cells"]["kl_base"]["base"]["value"] == 0 < results["cells"]["kl_base"]["sft"]["value"]
    best = [results["cells"]["reward"][f"base, {n}"]["value"] for n in ("1 of 4 at random", "best of 2", "best of 4")]
    assert best == sorted(best) and results["cells"]["kl_base_sequence"]["base, 1 of 4 at random"]["value"] == 0
    assert results["floors"] == [
        "always refuse",
        "data's answer",
        "base, 1 of 4 at random",
        *(f"base, best of {n}" for n in (2, 4)),
    ]
    assert results["cells"]["kl_base_sequence"]["base, best of 4"]["value"] == pytest.approx(np.log(4) - 3 / 4)
    assert "always refuse" in results["cells"]["reward"] and "always refuse" not in results["cells"]["loss_per_byte"]
    # a judge with random weights: on the whole split's pairs it is not good enough
    assert not results["gate"]["passed"] and "judge" not in results["cells"]
    assert results["judge"]["pairs"] == 16 and 0 <= results["judge"]["accuracy"] <= 1
    assert "The judge was not good enough" in (folder / "report.md").read_text()
    page = (folder / "report.html").read_text()
    assert page.count("<article") == 12 and all(line["id"] in page for line in lines(folder, "base-0"))
    for pair in results["pairs"]["reward"]:
        ours, theirs = (
            np.array([line["scores"]["reward"] for line in lines(folder, f"{pair[side]}-0")]) for side in "ab"
        )
        assert pair["difference"] == pytest.approx((ours - theirs).mean())


def test_the_best_of_several_answers_are_the_bare_bases(done, few, micro_model):
    net, tokenizer = micro_model
    items, _ = measure.items(data.load_split(few, "test"), tokenizer, 118, 12, 0)
    sampling = {"seed": 0, "max_new_tokens": 10, "temperature": 1.0, "top_p": 1.0}
    samples = measure.generate(net, items, sampling, 4)[0]
    for name, rows in lines(done[0], "base-best"):
        for line, group in zip(rows, samples):
            texts = [chat.decode(tokenizer, ids) for ids in group]
            assert line["answer"] in texts[: 1 if name.endswith("at random") else int(name.split()[-1])]


def test_started_again_it_asks_nobody_and_says_the_same(tmp_path, done):
    folder, argv, result = done
    shutil.copytree(folder, tmp_path / "run")
    damaged = tmp_path / "run" / "items" / "rl-0.jsonl"
    damaged.write_text(damaged.read_text()[:-20])
    argv = [tmp_path if word == folder.parent else word for word in argv]

    def body(main, argv):
        asked, once = [], evaluate.ask
        evaluate.ask = lambda *rest: asked.append(1) or once(*rest)
        processes.call(main, argv)
        assert len(asked) == 1  # the damaged one

    status, out, err = run(tmp_path, argv, body)
    assert status == 0, err
    again = json.loads(out.partition("RESULT ")[2])
    assert out.count("answered before") == 5 and "rl-0.jsonl is damaged" in out and "kept" in out
    assert again["cells"] == result["cells"] and again["pairs"] == result["pairs"]
    # another decoding is another question
    changed = [6 if before == "--evaluation.max_new_tokens" else word for before, word in zip(["", *argv], argv)]
    changed = [word for word in changed if not str(word).startswith(("sft=", "rl=", "--human"))]
    status, out, err = run(tmp_path, changed)
    assert status == 0 and "answered before" not in out, err


def test_recorded_items_are_compared_without_a_model(tmp_path, done):
    """The files alone, some packed, give the same tables; other items, other decoding or a wrong file are refused."""
    folder, _, result = done
    files = []
    for path in sorted((folder / "items").iterdir(), key=lambda path: not path.name.startswith("base-0")):
        files.append(tmp_path / path.name)
        files[-1].write_bytes(path.read_bytes())
        if path.name.startswith("sft"):
            files[-1] = tmp_path / f"{path.name}.gz"
            files[-1].write_bytes(gzip.compress(path.read_bytes()))
    flags = ["--logging.output_dir", tmp_path, "--logging.run_name", "again", "--evaluation.draws", 200]

    def body(main, argv):
        model.load = None  # no model is wanted
        processes.call(main, argv)

    again = train(tmp_path, [*flags, "--items", *files], body)
    assert {name: row["sft"] for name, row in again["cells"].items()} == {
        name: row["sft"] for name, row in result["cells"].items()
    }
    tables, before = (json.loads((out / "results.json").read_text()) for out in (tmp_path / "again", folder))
    assert tables["gate"] == before["gate"] and tables["wins"] == before["wins"] and tables["notes"] == before["notes"]
    assert (tmp_path / "again" / "report.html").read_text().count("<article") == 12
    other = tmp_path / "other.jsonl"
    head, *rows = files[0].read_text().splitlines(keepends=True)
    other.write_text("".join([head.replace('"max_new_tokens": 10', '"max_new_tokens": 9'), *rows]))
    refused(tmp_path, [*flags, "--items", files[0], other], "other.jsonl cannot be compared", "max_new_tokens 10 -> 9")
    refused(tmp_path, [*flags, "--items", tmp_path / "nowhere.jsonl"], "nowhere.jsonl")
    refused(tmp_path, [*flags, "--items", files[0], "--human_eval"], "--items")


def test_a_judge_that_learned_is_good_enough(tmp_path, tiny_folder):
    """Trained for seconds on other pairs of the embedded data, it passes, and verdicts go by it."""
    source = write_data(tmp_path / "data", "safety", train=256, val=16, test=400)
    where = ["--debug", "--dataset_path", source, "--logging.output_dir", tmp_path]
    where += ["--model.base_checkpoint", tiny_folder]
    learn = ["--config", ROOT / "configs" / "reward_270m.yml", "--training.max_steps", 32, "--training.batch_size", 8]
    learn += ["--training.learning_rate", 2e-3, "--training.eval_interval", 32, "--logging.run_name", "judge"]
    processes.train(train_reward.main, tmp_path, [*where, *learn])
    asked = ["--checkpoints", f"base={tiny_folder}", "--evaluation.reward_checkpoint", tmp_path / "judge" / "final"]
    asked += ["--evaluation.max_new_tokens", 24, "--evaluation.draws", 500, "--logging.run_name", "run"]
    result = train(tmp_path, [*where, *asked, "--reward.type", "heuristic", "--evaluation.max_items", 64])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["gate"]["passed"], results["gate"]
    assert result["headline"] == "judge" and results["judge"]["pairs"] == 416
    cells = results["cells"]["judge"]
    assert cells["data's answer"]["value"] > max(cells["base"]["value"], cells["always refuse"]["value"])


def test_drift_and_what_was_forgotten(tmp_path, settings, adapters, micro_folder):
    systems = ["--checkpoints", f"base={micro_folder}", f"sft={adapters[0]}"]
    more = ["--evaluation.drift", "true", "--evaluation.other_tasks", "clinical,conala"]
    cells = train(tmp_path, [*settings(tmp_path, *systems), *more])["cells"]
    for name in ("kl_forward", "kl_reverse", "kl_base_forward"):
        assert cells[name]["base"]["value"] == 0 < cells[name]["sft"]["value"]
    for name in ("loss_on_clinical", "loss_on_conala"):
        assert cells[name]["base"]["n"] == 12 and cells[name]["base"]["value"] != cells[name]["sft"]["value"]
    text = (tmp_path / "run" / "report.md").read_text()
    assert "## Forgetting" in text and "loss\\_on\\_clinical" in text
    refused(tmp_path, [*settings(tmp_path, *systems), "--evaluation.other_tasks", "safety"], "other_tasks: safety")


def test_seeds_of_one_system(tmp_path, settings, adapters, micro_folder):
    """One of them is a best/ that the reward picked, which the report says."""
    best = shutil.copytree(adapters[0], tmp_path / "best")
    (best / "state.json").write_text(json.dumps({"best_metric": "eval/reward"}))
    argv = settings(tmp_path, "--checkpoints", f"base={micro_folder}", f"sft={best}", f"sft={adapters[1]}")
    result = train(tmp_path, argv)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [note.split()[0] for note in results["notes"] if "is a best/ that its own reward picked" in note] == ["sft"]
    assert "is a best/ that its own reward picked" in (tmp_path / "run" / "report.md").read_text()
    assert results["seeds"] == {"base": 1, "sft": 2} and result["headline"] == "reward"
    both = [np.array([line["scores"]["reward"] for line in lines(tmp_path / "run", f"sft-{k}")]) for k in (0, 1)]
    assert results["by_seed"]["reward"]["sft"] == pytest.approx([one.mean() for one in both])
    assert results["cells"]["reward"]["sft"]["value"] == pytest.approx(np.mean(both))


def test_a_tokenizer_of_other_bytes_is_the_same_one(tmp_path, settings, micro_folder):
    """The base's tokenizer.json saved again, compact, beside a whole model that has it as it was."""
    compact = shutil.copytree(micro_folder, tmp_path / "base") / "tokenizer.json"
    content = json.loads(compact.read_text())
    compact.write_text(json.dumps(content, separators=(",", ":")))
    argv = settings(tmp_path, "--checkpoints", f"base={compact.parent}", f"full={micro_folder}")
    cells = train(tmp_path, [*argv, "--evaluation.max_items", 2])["cells"]["reward"]
    assert cells["base"] == cells["full"]
    content["model"]["merges"].pop()  # the same tokens, but it cuts words otherwise
    compact.write_text(json.dumps(content))
    refused(tmp_path, argv, "full has another tokenizer than the base")


def test_human_evaluation_from_sheets_to_results(tmp_path, done):
    """Raters who see only the blind file prefer the longest answer; unblinded, the system that writes most wins."""
    folder = shutil.copytree(done[0], tmp_path / "run")
    blind = study.read_manifest(folder / "human_eval.csv")
    text = (folder / "human_eval.csv").read_text("utf-8-sig")
    assert len(blind) >= 12 and not any(name in text.splitlines()[0] for name in ("base", "sft", "rl"))
    key = study.read_key(folder / "human_eval.key.csv")
    with open(tmp_path / "ratings.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rater_id", "item_id", "preferred"])
        for rater in ("ann", "bob"):
            for name, item in blind.items():
                answers = {slot: answer for slot, answer in item["answers"].items() if slot != key[name]["trap"]}
                writer.writerow([rater, name, max(answers, key=lambda slot: len(answers[slot]))])
    argv = ["--logging.output_dir", tmp_path, "--logging.run_name", "run", "--human_results", tmp_path / "ratings.csv"]
    found = train(tmp_path, [*argv, "--evaluation.draws", 100])
    assert json.loads((folder / "human_results.json").read_text()) == found
    assert "Bradley" in (folder / "human_results.md").read_text()
    refused(tmp_path, [*argv[:-1], tmp_path / "none.csv"], "none.csv")


def test_ratings_become_pairs_that_a_reward_model_learns(tmp_path, done, micro_folder, tokenizer):
    """Two of three raters prefer the longest answer, one the shortest; the pairs are read as data and trained on."""
    folder, pairs = shutil.copytree(done[0], tmp_path / "run"), tmp_path / "pairs.jsonl"
    blind, key = study.read_manifest(folder / "human_eval.csv"), study.read_key(folder / "human_eval.key.csv")
    with open(tmp_path / "ratings.jsonl", "w") as file:
        for rater, choose in (("ann", max), ("bob", max), ("cy", min)):
            for item, entry in blind.items():
                answers = {slot: text for slot, text in entry["answers"].items() if slot != key[item]["trap"]}
                best = choose(answers, key=lambda slot: len(answers[slot]))
                file.write(json.dumps({"rater_id": rater, "item_id": item, "preferred": best}) + "\n")
    argv = ["--human_results", tmp_path / "ratings.jsonl", "--human_key", folder / "human_eval.key.csv"]
    for more in (["--checkpoints", "base=tiny"], ["--items", "x.jsonl"], ["--human_eval"]):
        processes.refused(evaluate.main, tmp_path, [*argv, *more], "--human_results", "nothing beside it")
    status, out, err = run(tmp_path, [*argv, "--human_pairs", pairs, "--evaluation.draws", 100])
    assert status == 0 and "measure what they train on other prompts" in out, err
    records = data.load_split(pairs, "train") + data.load_split(pairs, "val") + data.load_split(pairs, "test")
    expected = set()
    for item, entry in blind.items():
        if key[item]["kind"] == "item":
            long, short = (choose(entry["answers"].values(), key=len) for choose in (max, min))
            (other,) = set(entry["answers"].values()) - {long, short}
            expected |= {(long, other, 1.0), (long, short, 1 / 3), (short, other, 1.0)}
    assert {(record["response"], record["rejected"], record["margin"]) for record in records} == expected
    asked = {line["prompt"]: line["id"] for line in lines(folder, "base-0")}
    stopped = {line["answer"]: line["stopped"] for name in ("base", "sft", "rl") for line in lines(folder, f"{name}-0")}
    for record in records:
        assert measure.dialogue(record["prompt"]) in asked and record["prompt"][-1]["role"] == "user"
        cut_off = [side for side in ("response", "rejected") if not stopped[record[side]]]
        assert record["unfinished"] == cut_off
    encoded, counts = data.encode_pairs(records, tokenizer, 256)
    assert {pair["margin"] for pair in encoded} == {record["margin"] for record in records} and counts["kept"]
    before = pairs.read_bytes()
    refused(tmp_path, [*argv, "--human_pairs", pairs], "name a new file that ends with .jsonl")
    assert pairs.read_bytes() == before
    flags = inputs.settings(micro_folder, pairs, "--training.mode", "reward", "--training.micro_batch_tokens", 256)
    processes.train(
        train_reward.main, tmp_path, [*flags(tmp_path, "--training.max_steps", 2), "--logging.run_name", "reward"]
    )
    assert (tmp_path / "reward" / "final" / "adapter_model.safetensors").exists()


def test_two_ranks_say_what_one_says(tmp_path, settings, adapters, micro_folder):
    flags = ["--evaluation.max_items", 5, "--checkpoints", f"base={micro_folder}", f"sft={adapters[0]}"]
    train(tmp_path, [*settings(tmp_path, *flags), "--logging.run_name", "one"])
    done = processes.ranks(MAIN, tmp_path, [*settings(tmp_path, *flags), "--logging.run_name", "two"])
    assert [status for status, *_ in done] == [0, 0] and [out.count("wrote") for _, out, _ in done] == [1, 0], done
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for key in ("cells", "pairs", "wins", "by_seed"):
        assert json.dumps(one[key]) == json.dumps(two[key]), key


def test_other_tasks_and_records_without_any_answer(tmp_path, settings, micro_folder):
    for task, name in (("conala", "bleu"), ("clinical", "rougeL")):
        data = write_data(tmp_path / task, task, test=3)
        flags = ["--task", task, "--dataset_path", data, "--evaluation.temperature", 0, "--logging.run_name", task]
        train(tmp_path, settings(tmp_path, "--checkpoints", f"base={micro_folder}", *flags))
        results = json.loads((tmp_path / task / "results.json").read_text())
        assert results["headline"] == name and "base, best of 4 (oracle)" in results["cells"][name]
        assert "reads the reference" in " ".join(results["notes"])
    empty = write_data(tmp_path / "empty", "safety", {"response": "", "rejected": ""}, test=2)
    flags = ["--dataset_path", empty, "--logging.run_name", "empty"]
    train(tmp_path, settings(tmp_path, "--checkpoints", f"base={micro_folder}", *flags))
    assert "loss_per_byte" not in json.loads((tmp_path / "empty" / "results.json").read_text())["cells"]


def test_the_python_call(few, micro_model, adapters):
    net, tokenizer = micro_model
    sizes = {"max_items": 5, "max_new_tokens": 8, "draws": 100, "temperature": 1.0}
    cfg = config.load_config(ROOT / "configs" / "sft_lora_270m.yml", {f"evaluation.{k}": v for k, v in sizes.items()})
    found = evaluate.evaluate(net, tokenizer, data.load_split(few, "test"), cfg)
    stops = [line["stopped"] for line in found["lines"]]
    assert len(stops) == 5 and found["metrics"]["stops"]["value"] == np.mean(stops)
    assert [found["metrics"]["stops"][side] for side in ("low", "high")] == [*stats.wilson(sum(stops), 5)]
    assert "judge" not in found["metrics"] and "kl_base" not in found["metrics"]


def test_a_name_may_hold_dots(tmp_path, settings, adapters, micro_folder):
    """B14: in files, tables and the blind sheets; names that differ in a dot alone are two."""
    names = {"sft-v1.2": adapters[0], "sft-v1_2": adapters[1], "0.5B": adapters[0]}
    systems = [f"base={micro_folder}", *(f"{name}={folder}" for name, folder in names.items())]
    result = train(tmp_path, settings(tmp_path, "--human_eval", "--checkpoints", *systems), pictures=True)
    cells = result["cells"]["loss_per_byte"]
    assert cells.keys() >= {"base", *names} and cells["sft-v1.2"] == cells["0.5B"] != cells["sft-v1_2"]
    assert all(len(lines(tmp_path / "run", f"{name}-0")) == 12 for name in names)
    assert all(name in (tmp_path / "run" / "report.html").read_text() for name in names)
    shown = (tmp_path / "run" / "human_eval.key.csv").read_text(encoding="utf-8-sig")
    assert all(f'"{name}"' in shown for name in names)
    for wrong in (".sft", "a/b", "a b", "", ".", ".."):
        argv = settings(tmp_path, "--checkpoints", f"{wrong}={micro_folder}")
        refused(tmp_path, argv, "expected NAME=CHECKPOINT", "letters, digits, '_', '-' and '.'")


def test_bad_input_is_one_line(tmp_path, settings, adapters, micro_folder, monkeypatch):
    base = f"base={micro_folder}"
    refused(tmp_path, settings(tmp_path), "--checkpoints")
    refused(tmp_path, settings(tmp_path, "--checkpoints", "outputs/x"), "NAME=CHECKPOINT")
    two, three = ([f"{name}={micro_folder}"] * n for name, n in (("a", 2), ("b", 3)))
    refused(tmp_path, settings(tmp_path, "--checkpoints", *two, *three), "seeds")
    refused(tmp_path, settings(tmp_path, "--human_eval", "--checkpoints", base), "--human_eval")
    refused(tmp_path, settings(tmp_path, "--checkpoints", base, f"sft={tmp_path}/nowhere"), "nowhere")
    judge = random_reward_model(tmp_path / "judge", micro_folder)
    refused(tmp_path, settings(tmp_path, "--checkpoints", base, f"sft={judge}"), "is a reward model")
    both = ["--evaluation.reward_checkpoint", judge, "--reward.type", "hybrid", "--reward.checkpoint", judge]
    refused(tmp_path, settings(tmp_path, "--checkpoints", base, *both), "evaluation.reward_checkpoint")
    refused(
        tmp_path,
        settings(tmp_path, "--checkpoints", base, "--evaluation.reward_checkpoint", adapters[0]),
        "evaluation.reward_checkpoint",
        str(adapters[0]),
    )
    refused(tmp_path, settings(tmp_path, "--checkpoints", base, "--evaluation.max_new_tokens", 127), "max_seq_length")
    foreign = inputs.another_base(tmp_path / "foreign", micro_folder)
    other = ["--checkpoints", f"base={foreign}", "--evaluation.reward_checkpoint", judge]
    refused(tmp_path, settings(tmp_path, *other), "trained on another base")

    def without(main, argv):
        import sys

        sys.modules["rouge_score"] = None
        processes.call(main, argv)

    status, _, err = run(tmp_path, settings(tmp_path, "--checkpoints", base), without)
    assert status == 2 and "rouge-score" in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "results.json").exists()


def test_an_own_metric_and_several_answers(tmp_path, settings, micro_folder):
    """A user's metric beside the task's; pass@k and the majority vote of a task with right answers."""
    file = tmp_path / "mine.py"
    file.write_text("def letters(prompt, completion, reference):\n    return len(completion)\n")
    asked = ["--checkpoints", f"base={micro_folder}", "--evaluation.metric", f"{file}:letters", "--task", "arithmetic"]
    asked += ["--evaluation.samples", 3, "--evaluation.temperature", 1.0, "--dataset_path", "null"]

    def one_of_three_is_right(main, argv):
        """The random base never is: so its first answer becomes the reference."""
        several_answers = metrics.several_answers

        def with_reference(task, records, texts):
            right = [[record["reference"], *answers[1:]] for record, answers in zip(records, texts, strict=True)]
            return several_answers(task, records, right)

        metrics.several_answers = with_reference
        processes.call(main, argv)

    cells = train(tmp_path, settings(tmp_path, *asked), one_of_three_is_right)["cells"]
    answers = [line["answer"] for line in lines(tmp_path / "run", "base-0")]
    assert cells["letters"]["base"]["value"] == pytest.approx(np.mean([len(text) for text in answers]))
    rates = [cells[f"pass@{k}"]["base"]["value"] for k in (1, 2, 3)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1]) and 0 < cells["majority"]["base"]["value"] <= 1
    for flags, reason in (
        (["--evaluation.metric", f"{file}:absent"], "no function 'absent'"),
        (["--evaluation.samples", 3, "--task", "arithmetic", "--evaluation.temperature", 0], "greedy answers are all"),
        (["--evaluation.samples", 3, "--task", "safety", "--evaluation.temperature", 1], "no right answers to count"),
    ):
        refused(tmp_path, settings(tmp_path, "--checkpoints", f"base={micro_folder}", *flags), reason)
    file.write_text("def exact(prompt, completion, reference):\n    return 1\n")
    own = ["--evaluation.metric", f"{file}:exact", "--task", "arithmetic"]
    refused(tmp_path, settings(tmp_path, "--checkpoints", f"base={micro_folder}", *own), "rename your function")
