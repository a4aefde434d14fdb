"""train_reward.py end to end: what a run leaves behind and is worth, exact resume, refusals, invariances."""

import functools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train_reward
from common import config, lora, model, reward_model, tasks
from common.log import UserError
from common.runtime import base
from tests import checks, inputs, processes
from tests.faults import trainers
from tests.inputs import write_data

ROOT = Path(train_reward.__file__).parent
MAIN = train_reward.main
train, run, refused = (functools.partial(each, MAIN) for each in (processes.train, processes.run, processes.refused))
few, settings, _ = trainers.fixtures("reward")


def plain_rewards(folder, base_folder, pairs):
    """Rewards (pairs, 2) by plain transformers and peft, one answer at a time."""
    import peft
    import transformers

    torch.set_num_threads(1)
    net = transformers.Gemma3TextForSequenceClassification.from_pretrained(
        base_folder, num_labels=1, dtype=torch.float32
    )
    net = peft.PeftModel.from_pretrained(net, folder).eval()
    with torch.no_grad():
        rewards = [net(torch.tensor([pair[side]["ids"]])).logits for pair in pairs for side in ("chosen", "rejected")]
    return torch.cat(rewards).view(-1, 2).double()


# ---------------------------------------------------------------- a run, and what it leaves behind


def test_it_learns_and_leaves_its_files(tmp_path, tiny_folder, tokenizer):
    source = write_data(tmp_path / "data", "safety", train=128, val=40)
    argv = ["--config", ROOT / "configs" / "reward_270m.yml", "--debug", "--dataset_path", source]
    argv += ["--logging.output_dir", tmp_path, "--model.base_checkpoint", tiny_folder, "--training.max_steps", 16]
    argv += ["--training.learning_rate", 3e-3, "--training.batch_size", 8]
    argv += ["--training.eval_interval", 8, "--training.save_interval", 4]
    status, out, err = run(tmp_path, argv, pictures=True)
    assert status == 0, err
    run_dir = tmp_path / "reward_270m-debug"
    assert {path.name for path in run_dir.iterdir()} == {
        ".lock",
        "config.yml",
        "run.json",
        "metrics.jsonl",
        "curves.png",
        "report.json",
        "reliability.png",
        "best",
        "final",
        "step-000012",
        "step-000016",
    }
    lines, report = checks.lines(run_dir), json.loads((run_dir / "report.json").read_text())
    assert [line["step"] for line in lines] == list(range(17))
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 8, 16]
    assert lines[-1] == json.loads(out.partition("RESULT ")[2])
    assert lines[-1]["eval/loss"] < 0.5 * lines[0]["eval/loss"] and lines[-1]["eval/margin"] > 1
    assert lines[-1]["best_eval_loss"] == min(line.get("eval/loss", math.inf) for line in lines)
    assert config.load_config(run_dir / "config.yml").training.max_steps == 16
    assert len(json.loads((run_dir / "run.json").read_text())["facts"]["data"]) == 64
    assert all((run_dir / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n") for name in ("curves", "reliability"))

    held_out, floors = report["held_out"], report["floors"]
    assert held_out["accuracy"] >= 0.9 and held_out["accuracy"] == lines[-1]["eval/accuracy"]
    assert set(floors) == {"shorter answer", "refusal phrase", "fewer toxic words"}
    assert all(floor["pairs"] == 40 and floor["accuracy"] < held_out["interval"][0] for floor in floors.values())
    assert (
        "reward model: accuracy {:.3f} [{:.3f}, {:.3f}] of 40 val pairs".format(
            held_out["accuracy"], *held_out["interval"]
        )
        in out
    )

    pairs = inputs.pairs_of(source, "val", tokenizer)
    found = plain_rewards(run_dir / "final", tiny_folder, pairs)
    assert_worth(report, found, pairs)
    mean, std = found[:, 0].mean().item(), found[:, 0].std(correction=0).item()
    about = json.loads((run_dir / "final" / "reward.json").read_text())
    for row in (about, report["reward_on_reference_answers"]):
        assert (row["mean"], row["std"]) == pytest.approx((mean, std), rel=1e-4)
    assert about["task"] == "safety" and about["base"] == base.fingerprint(tiny_folder)
    assert lines[-1]["eval/reward_mean"] == about["mean"] and lines[-1]["eval/reward_std"] == about["std"]


def assert_worth(report, found, pairs):
    """The report's figures, computed anew from rewards (pairs, 2)."""
    n, margins = len(pairs), (found[:, 0] - found[:, 1]).numpy()
    sizes = np.array([[sum(pair[side]["mask"]) for side in ("chosen", "rejected")] for pair in pairs])
    rate, z = (margins > 0).mean(), 1.959964
    centre, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    assert report["held_out"]["interval"] == pytest.approx(
        [(centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)]
    )
    matched = margins[abs(sizes[:, 0] - sizes[:, 1]) <= 5]
    assert 0 < len(matched) < n
    assert report["length_matched_within_5_tokens"]["pairs"] == len(matched)
    assert report["length_matched_within_5_tokens"]["accuracy"] == pytest.approx((matched > 0).mean())
    assert report["floors"]["shorter answer"]["accuracy"] == pytest.approx(
        (sizes[:, 0] < sizes[:, 1]).mean() + 0.5 * (sizes[:, 0] == sizes[:, 1]).mean()
    )
    assert report["correlation_of_reward_and_length"] == pytest.approx(
        np.corrcoef(found.flatten().numpy(), sizes.flatten())[0, 1], abs=1e-4
    )
    rows = report["reliability"]
    assert sum(row["count"] for row in rows) == 2 * n  # each pair shown both ways
    p = 1 / (1 + np.exp(-np.concatenate([margins, -margins])))
    assert sum(row["count"] * row["predicted"] for row in rows) == pytest.approx(p.sum(), rel=1e-4)
    assert sum(row["count"] * row["observed"] for row in rows) == pytest.approx(n)
    gaps = [row["count"] * abs(row["predicted"] - row["observed"]) for row in rows]
    assert report["calibration_error"] == pytest.approx(sum(gaps) / (2 * n)) and sum(gaps) > 0


def test_loss_of_a_step_by_transformers_and_peft(tmp_path, settings, micro_folder, tokenizer):
    source = write_data(tmp_path / "data", "safety", {"margin": 1.5}, train=8, val=6)
    flags = ["--training.learning_rate", 1e-30, "--training.max_steps", 1, "--training.batch_size", 8]
    flags += ["--reward.center_coefficient", 0.5, "--dataset_path", source, "--model.peft_dropout", 0]
    train(tmp_path, settings(tmp_path, *flags))
    first, last = checks.lines(tmp_path / "run")

    found = {
        split: plain_rewards(tmp_path / "run" / "final", micro_folder, inputs.pairs_of(source, split, tokenizer))
        for split in ("train", "val")
    }
    margin = {split: rewards[:, 0] - rewards[:, 1] for split, rewards in found.items()}
    centre = 0.5 * found["train"].sum(1).square()
    assert first["loss"] == pytest.approx((F.softplus(1.5 - margin["train"]) + centre).mean().item(), rel=1e-4)
    assert first["accuracy"] == (margin["train"] > 0).double().mean()
    for line in (first, last):
        assert line["eval/loss"] == pytest.approx(F.softplus(1.5 - margin["val"]).mean().item(), rel=1e-4)
    assert 0.2 < found["train"].std() < 5  # fresh rewards have about unit size


def test_it_starts_from_an_adapter_and_runs_on_four_bits(tmp_path, settings, micro_folder):
    net, tokenizer = model.load(micro_folder, torch.device("cpu"), torch.float32)
    torch.manual_seed(1)
    lora.inject(net, "policy", 4, 8, ("q_proj", "down_proj"))
    with torch.no_grad():
        for parameter in lora.adapter_parameters(net, "policy").values():
            parameter.normal_(std=0.1)
    (tmp_path / "adapter").mkdir()
    model.save_adapter(net, tokenizer, tmp_path / "adapter", "policy", "base")
    flags = ["--model.adapter", tmp_path / "adapter", "--training.max_steps", 4, "--training.learning_rate", 1e-30]
    status, out, err = run(tmp_path, settings(tmp_path, *flags, peft="qlora"))
    assert status == 0, err
    assert f"starting from {tmp_path}/adapter" in out
    final = tmp_path / "run" / "final"
    net, _ = model.load(micro_folder, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match=r"reward\.checkpoint: .* trained on a 4-bit base"):
        reward_model.load(net, "reward", final, base.fingerprint(micro_folder))
    net, _ = model.load(micro_folder, torch.device("cpu"), torch.float32, quantize=True)
    head, about = reward_model.load(net, "reward", final, base.fingerprint(micro_folder))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, parameter in lora.adapter_parameters(net, "reward").items():
        assert torch.allclose(parameter, saved[name], atol=1e-20), name
    assert head.any() and math.isfinite(about["std"])
    assert all(math.isfinite(line["loss"]) for line in checks.lines(tmp_path / "run")[:-1])


# ---------------------------------------------------------------- a step does not depend on how it is cut


def test_b1_gradient_of_micro_batches(tmp_path, settings, few):
    checks.check_cuts(MAIN, tmp_path, settings, few, "lora")


# ---------------------------------------------------------------- --explain and bad input


def test_explain_writes_nothing_and_skips_are_counted(tmp_path, settings, few):
    out_dir, source = tmp_path / "out", inputs.odd_pairs(tmp_path / "odd", few)
    before = checks.snapshot(tmp_path / "odd")
    status, out, err = run(tmp_path, settings(out_dir, "--explain", "--dataset_path", source))
    assert status == 0 and not err and not out_dir.exists() and checks.snapshot(tmp_path / "odd") == before
    line = next(line for line in out.splitlines() if line.startswith("train: "))
    for reason in ("no rejected", "empty answer", "equal answers", "prompt too long"):
        assert f"1 left out ({reason})" in line, line
    assert line.startswith("train: 16 kept, "), line
    assert re.search(r"one step takes about \S+ s here, [\d,]+ steps \S+ (s|minutes|hours), evaluations apart", out), (
        out
    )
    assert "[[" in out and "checked 8 examples" in out and "estimated peak" in out  # both answers of four pairs
    assert out.count("/chosen: ") == out.count("/rejected: ") == 4 and "logits" not in out


def test_bad_input_is_one_line(tmp_path, settings, few, micro_folder):
    out_dir = tmp_path / "out"
    refused(tmp_path, ["--config", ROOT / "configs" / "sft_lora_270m.yml", "--debug"], "train_sft.py")
    refused(tmp_path, ["--config", ROOT / "configs" / "dpo_270m.yml", "--debug"], "train_rl.py")
    refused(tmp_path, settings(out_dir, peft="none"), "model.peft_type", "lora or qlora")
    refused(tmp_path, settings(out_dir, "--training.packing", "true"), "training.packing")
    refused(tmp_path, settings(out_dir, "--training.last_turn_only", "true"), "last_turn_only")
    assert not out_dir.exists()
    nothing = write_data(tmp_path / "nothing", "safety", {"rejected": None}, train=20, val=6)
    refused(tmp_path, settings(out_dir, "--dataset_path", nothing), "train: no usable pair in 20 records")
    shutil.copyfile(few / "train.jsonl", nothing / "train.jsonl")
    refused(tmp_path, settings(out_dir, "--dataset_path", nothing), "val: no usable pair in 6 records")
    refused(tmp_path, settings(out_dir, "--dataset_path", tmp_path / "none"), f"{tmp_path}/none/train.jsonl")
    refused(tmp_path, settings(out_dir, "--training.max_seq_length", 8), "train: no usable pair in 20 records")
    refused(tmp_path, settings(out_dir, "--model.adapter", tmp_path / "none"), "model.adapter", f"{tmp_path}/none")
    conala = write_data(tmp_path / "conala", "conala", train=6, val=4)
    rows = [json.loads(line) for line in (conala / "val.jsonl").read_text().splitlines()]
    (conala / "val.jsonl").write_text("".join(json.dumps(row | {"reference": None}) + "\n" for row in rows))
    without = ["--task", "conala", "--dataset_path", conala]
    refused(tmp_path, settings(out_dir, *without), "val: no record has a reference to compare samples with")
    judge = inputs.random_reward_model(tmp_path / "judge", micro_folder)
    refused(tmp_path, settings(out_dir, "--model.adapter", judge), "model.adapter", "modules_to_save")
    assert not list(out_dir.rglob("*.*ml"))  # neither a config nor a metric


@pytest.mark.parametrize("value", ["None", "nan"])
def test_a_rank_that_is_no_number_is_one_line(tmp_path, micro_folder, value):
    text = (ROOT / "common" / "tasks" / "dialogue.py").read_text()
    rank = f"nan = float('nan')\n\n\ndef rank(completion, reference):\n    return {value}\n\n\n"
    mine = tmp_path / "mine.py"
    mine.write_text(text.replace("TASK = Task(", f"{rank}TASK = Task(\n    rank=rank,"))
    net, tokenizer = model.load(micro_folder, torch.device("cpu"), torch.float32)
    sampling = {"group_size": 2, "max_new_tokens": 4, "temperature": 1.0, "seed": 0}
    records = tasks.records("conala", "train", 2)
    with pytest.raises(UserError, match=f"^task: {mine}: rank: returned {value} for {records[0]['id']}"):
        train_reward.make_pairs(net, tokenizer, records, sampling, str(mine))
    assert tasks.load(str(mine)).rank.__name__ == "rank"  # by which the scores of a pair are called


def test_a_budget_is_not_ignored(tmp_path, settings):
    """The key is in this script's --help; a run that reads past it would spend without end."""
    refused(tmp_path, settings(tmp_path / "out", "--training.budget_tokens", 100), "budget_tokens")
