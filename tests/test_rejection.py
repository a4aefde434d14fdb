"""Rejection sampling: which samples are kept, what they cost, going on after a kill, refusals."""

import functools
import json
import os
import signal

import pytest

import train_staged
from common import config, data, log
from tests import checks, inputs, processes
from tests.checks import lines

MAIN = train_staged.main
train, run = (functools.partial(each, MAIN) for each in (processes.train, processes.run))
BUDGET = 3000


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return inputs.write_data(tmp_path_factory.mktemp("data") / "few", "safety", train=24, val=8, test=10)


@pytest.fixture(scope="module")
def settings(few, micro_folder):
    return inputs.staged_settings(few, micro_folder)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, settings, tiny_folder):
    """The folder of a comparison with SFT on the best samples of a base that ends its answers, and its command."""
    out = tmp_path_factory.mktemp("sampled")
    argv = settings(out, "--paradigms", "rft,grpo", "--training.budget_tokens", BUDGET, "--reward.type", "heuristic")
    argv += ["--model.base_checkpoint", tiny_folder, "--rl.max_new_tokens", 24, "--rl.group_size", 4]
    train(out, argv)
    return out / "run", argv


def test_rft_learns_from_the_best_of_each_group(sampled, few):
    out, _ = sampled
    samples, kept = (checks.samples(out / "rft-samples", name) for name in ("samples", "train"))
    groups = {}
    for line in samples:
        groups.setdefault((line["step"], line["id"]), []).append(line)
    assert all(len(group) == 4 for group in groups.values()) and 8 < len(groups)
    best = {}
    for (step, name), group in groups.items():
        top = max(line["reward"] for line in group)
        line = next(line for line in group if line["reward"] == top)
        if line["stopped"]:
            best[f"{name}/{step}"] = line["completion"]
    assert {row["id"]: row["response"] for row in kept} == best and 0 < len(best) < len(groups)
    prompts = {record["id"]: record["prompt"] for record in data.load_split(few, "train")}
    assert all(row["prompt"] == prompts[row["id"].rpartition("/")[0]] for row in kept)
    assert config.load_config(out / "rft" / "config.yml").dataset_path == str(out / "rft-samples")


def test_rft_spends_half_on_samples_and_half_on_sft(sampled):
    out, _ = sampled
    passes = lines(out / "rft-samples")
    tokens = sum(row["tokens"] for row in checks.samples(out / "rft-samples"))
    assert passes[-1]["tokens_seen"] == tokens >= BUDGET // 2 > passes[-2]["tokens_seen"]
    results = json.loads((out / "comparison" / "results.json").read_text())
    cost = results["cost"]["rft"]
    assert [stage["name"] for stage in cost["stages"]] == ["rft-samples", "rft"]
    assert cost["tokens"] == tokens + lines(out / "rft")[-1]["tokens_seen"]
    assert {"base, 1 of 4 at random", "base, best of 4"} <= set(results["floors"])
    assert results["systems"] == ["base", "rft", "grpo"]


def test_rft_killed_in_a_pass_goes_on_to_the_same_bits(tmp_path, sampled):
    out, argv = sampled
    argv = ["rft" if word == "rft,grpo" else tmp_path if word == out.parent else word for word in argv]

    def body(main, argv):
        write, calls = log.write_records, []

        def write_records(path, records):
            calls.append(path.name)
            if calls.count("metrics.jsonl") == 3:  # the samples of the pass are written, its record is not
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, records)

        log.write_records = write_records
        processes.call(main, argv)

    assert run(tmp_path, argv, body)[0] == -9
    folder = tmp_path / "run" / "rft-samples"
    assert len(lines(folder)) == 2 and not (folder / "train.jsonl").exists()
    train(tmp_path, argv)
    for name in ("samples.jsonl", "train.jsonl", "val.jsonl"):
        assert (folder / name).read_bytes() == (out / "rft-samples" / name).read_bytes(), name
    checks.assert_same_records(tmp_path / "run" / "rft", out / "rft")
    status, text, _ = run(tmp_path, argv)
    assert status == 0 and "rft-samples, finished before" in text
    status, _, err = run(tmp_path, [*argv, "--rl.temperature", 0.5])
    assert status == 2 and err.count("\n") == 1 and "was sampled with other settings" in err
    (known,) = tmp_path.rglob("rft-samples/run.json")
    known.write_text('{"key": ')
    status, _, err = run(tmp_path, [*argv, "--rl.temperature", 0.5])
    assert status == 2 and err.count("\n") == 1 and "was sampled with other settings" in err


def test_rft_without_an_answer_that_ends_is_refused(tmp_path, settings):
    argv = settings(tmp_path, "--paradigms", "rft", "--training.budget_tokens", 200, "--reward.type", "heuristic")
    status, _, err = run(tmp_path, [*argv, "--rl.max_new_tokens", 1])
    assert status == 2 and err.count("\n") == 1 and "rft: of " in err and "stops by itself" in err
