"""train_sft.py end to end: what a run leaves behind, exact resume after stops and kills, refusals, invariances."""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_sft
from common import config, data, model
from tests import checks, inputs, processes
from tests.checks import records
from tests.faults import trainers
from tests.inputs import write_data

ROOT = Path(train_sft.__file__).parent
MAIN = train_sft.main
train, run, refused = (functools.partial(each, MAIN) for each in (processes.train, processes.run, processes.refused))
few, settings, _ = trainers.fixtures("sft")


# ---------------------------------------------------------------- a run, and what it leaves behind


def test_it_learns_and_leaves_its_files(tmp_path, tiny_model):
    same = {"response": "I won't help with that. Nobody likes you."}  # an answer that no base gives to everything
    source = write_data(tmp_path / "data", "safety", same, train=120, val=12)
    argv = ["--debug", "--dataset_path", source, "--logging.output_dir", tmp_path, "--training.max_steps", 30]
    argv += ["--training.batch_size", 4, "--training.eval_interval", 10, "--training.save_interval", 5]
    result = train(tmp_path, argv, pictures=True)
    run_dir = tmp_path / "sft-debug"
    lines = checks.lines(run_dir)
    assert [line["step"] for line in lines] == list(range(31)) and lines[-1] == result
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 10, 20, 30]
    assert lines[-1]["eval/loss"] < 0.8 * lines[0]["eval/loss"]
    assert result["best_eval_loss"] == min(line.get("eval/loss", math.inf) for line in lines)

    net, tokenizer = tiny_model  # step 0 is the base, before any update
    val, _ = data.encode_records(data.load_split(source, "val"), tokenizer, 128)
    torch.set_num_threads(1)
    found = train_sft.evaluate(net, val, 2048, torch.device("cpu"))
    assert {key: lines[0][key] for key in found} == pytest.approx(found, rel=1e-6)
    assert found["eval/loss"] == pytest.approx(loss_by_transformers(net, val), rel=1e-5)

    assert {path.name for path in run_dir.iterdir()} == {
        ".lock",
        "config.yml",
        "run.json",
        "metrics.jsonl",
        "curves.png",
        "best",
        "final",
        "step-000025",
        "step-000030",
    }
    assert config.load_config(run_dir / "config.yml").training.max_steps == 30
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["world_size"] == 1 and len(facts["facts"]["data"]) == 64
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    model.load_adapter(net, "policy", run_dir / "final", trainable=False)
    found = train_sft.evaluate(net, val, 2048, torch.device("cpu"))
    assert found == pytest.approx({key: result[key] for key in found}, rel=1e-6)
    assert found["eval/loss"] == pytest.approx(loss_by_transformers(net, val), rel=1e-5)


@torch.no_grad()
def loss_by_transformers(net, examples):
    """Mean of -log p over the trained tokens, by whole logits of transformers' own forward pass."""
    logprobs = []
    for example in examples:
        ids, mask = torch.tensor(example["ids"]), torch.tensor(example["mask"][1:]).bool()
        each = net(ids[None]).logits[0, :-1].double().log_softmax(1).gather(1, ids[1:, None])[:, 0]
        logprobs.append(each[mask])
    return -torch.cat(logprobs).mean().item()


def test_patience_and_a_finished_run_started_again(tmp_path, settings):
    argv = settings(tmp_path, "--training.learning_rate", 1e-12, "--training.patience", 2)
    argv += ["--training.eval_interval", 1, "--training.save_interval", 1, "--training.keep_last", 1]
    result = train(tmp_path, argv)
    run_dir, names = tmp_path / "run", ["final", "step-000002"]
    assert result["step"] == 2 and result == checks.lines(run_dir)[-1]
    assert sorted(path.name for path in run_dir.iterdir() if path.is_dir()) == names  # nothing beat the base: no best
    before = records(run_dir)
    assert train(tmp_path, argv) == result
    assert records(run_dir) == before


def test_a_token_budget_ends_a_run_and_its_schedule(tmp_path, settings):
    result = train(tmp_path, settings(tmp_path, "--training.budget_tokens", 1200, "--training.max_steps", 1000))
    log = checks.lines(tmp_path / "run")
    assert log[-2]["tokens_seen"] >= 1200 > log[-3]["tokens_seen"] and result["step"] == len(log) - 1 < 1000
    assert "eval/loss" in log[-1] and (tmp_path / "run" / "final").is_dir()
    rates = [line["lr"] for line in log[:-1]]
    assert max(rates) == pytest.approx(1e-3) and rates[-1] < 0.2 * max(rates)  # decayed, though 1,000 steps were asked


def test_qlora(tmp_path, settings):
    train(tmp_path, settings(tmp_path, "--training.max_steps", 5, peft="qlora"))
    run_dir = tmp_path / "run"
    losses = [float.fromhex(record["loss"]) for record in records(run_dir)[:-1]]
    assert len(losses) == 5 and all(map(math.isfinite, losses))
    held_out = [record["eval/loss"] for record in records(run_dir) if record.get("eval/loss")]
    assert float.fromhex(held_out[-1]) < float.fromhex(held_out[0])
    tensors = load_file(run_dir / "final" / inputs.WEIGHTS["lora"])
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name]  # zero before the first update
    assert ups and all(tensor.isfinite().all() and tensor.any() for tensor in ups)


# ---------------------------------------------------------------- a step does not depend on how it is cut


def test_gradient_of_micro_batches_and_packs(tmp_path, settings, few):
    checks.check_cuts(MAIN, tmp_path, settings, few, "none", packed=["--training.packing", "true"])


def test_one_rank_or_two(tmp_path, settings):
    flags = ["--training.max_steps", 6, "--training.eval_interval", 3, "--model.peft_dropout", 0]
    flags += ["--training.save_interval", 1, "--training.keep_last", 10]
    train(tmp_path, settings(tmp_path / "one", *flags))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "train_sft.py"), *map(str, settings(tmp_path / "two", *flags))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert processes.steps(done.stdout).count(0) == 1  # one rank speaks
    checks.assert_one_rank_or_two(tmp_path / "one" / "run", tmp_path / "two" / "run")
    assert len(records(tmp_path / "two" / "run")) == 7


# ---------------------------------------------------------------- --explain and bad input


def test_explain_writes_nothing(tmp_path, settings):
    out_dir = tmp_path / "out"
    status, out, err = run(tmp_path, settings(out_dir, "--explain"))
    assert status == 0 and not err and not out_dir.exists()
    assert "[[" in out and "checked 4 examples" in out and "estimated peak" in out
    assert re.search(r"synthetic-conala-train-0-\d+: \d+ tokens, \d+ of them trained", out)


def test_bad_input_is_one_line(tmp_path, settings):
    out_dir = tmp_path / "out"
    refused(tmp_path, ["--config", ROOT / "configs" / "grpo_rl_270m.yml", "--debug"], "train_rl.py")
    refused(tmp_path, settings(out_dir, "--rl.algorithm", "grpo"), "--rl.algorithm", "does not read it")
    assert not out_dir.exists()
    refused(tmp_path, settings(out_dir, "--dataset_path", tmp_path / "none"), f"{tmp_path}/none/train.jsonl")
    refused(tmp_path, settings(out_dir, "--training.max_seq_length", 8), "train", "training.max_seq_length 8")
    refused(tmp_path, settings(out_dir, "--model.adapter", tmp_path / "none"), "model.adapter", f"{tmp_path}/none")
    alone = tmp_path / "prompts.jsonl"
    alone.write_text("".join(json.dumps({"ask": f"What is {i}?"}) + "\n" for i in range(40)))
    renamed = ["--dataset_path", alone, "--data_keys", "prompt=ask"]
    refused(tmp_path, settings(out_dir, *renamed), "train: no record has a user's turn and a response", "ppo and grpo")
    refused(tmp_path, settings(out_dir, "--dataset_path", alone), f"{alone}:1: no known shape; keys found: ask")
    assert not list(out_dir.rglob("*.*ml"))  # neither a config nor a metric
