"""R01, R09, R13 to R15, R19 of train_rl.py with DPO, as whole runs."""

import functools
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_rl
from common import lora, model, pairs
from tests import checks, inputs, processes
from tests.checks import lines, records
from tests.faults import trainers

MAIN = train_rl.main
train, run, refused = (functools.partial(each, MAIN) for each in (processes.train, processes.run, processes.refused))
few, settings, straight = trainers.fixtures("dpo")
cache = trainers.cache
LOG2 = math.log(2)


def test_R01_R13_sigterm_at_an_evaluation_and_resume(tmp_path, settings, straight):
    checks.check_sigterm(MAIN, tmp_path, settings, straight)
    reports = [(run_dir / "report.json").read_bytes() for run_dir in (tmp_path / "run", straight())]
    assert reports[0] == reports[1]


def test_R01_R14_crash_behind_a_save_and_resume(tmp_path, settings, straight):
    checks.check_crash(MAIN, tmp_path, settings, straight, "none")


def test_R01_a_finished_run_started_again(tmp_path, straight, settings):
    shutil.copytree(straight(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "report.json").unlink()
    assert train(tmp_path, settings(tmp_path))["step"] == inputs.STEPS
    checks.assert_same_run(tmp_path / "run", straight())
    assert (tmp_path / "run" / "report.json").read_bytes() == (straight() / "report.json").read_bytes()


def test_R02_R13_b1_two_ranks_stop_resume_and_equal_one(tmp_path, settings):
    keep = ["--training.keep_last", 10, "--training.save_interval", 1, "--rl.learning_rate", 1e-2]
    whole = checks.check_two_ranks(MAIN, tmp_path, lambda folder, *more: settings(folder, *more, *keep))
    flags = ["--training.max_steps", 6, "--training.eval_interval", 3, *keep]
    train(tmp_path, settings(tmp_path / "one", *flags))
    checks.assert_one_rank_or_two(tmp_path / "one" / "run", whole, rel=1e-4, near_zero=1e-6)
    assert len(records(whole)) == 7


def test_R09_resume_refusals(tmp_path, settings, straight, few, micro_folder):
    other = shutil.copytree(few, tmp_path / "other")
    shutil.copyfile(few / "val.jsonl", other / "train.jsonl")
    changed = inputs.another_base(tmp_path / "base", micro_folder)
    checks.check_refusals(
        MAIN,
        tmp_path,
        settings,
        straight,
        (["--dataset_path", other], "dataset_path", "data "),
        (["--model.base_checkpoint", changed], "model.base_checkpoint", "model "),
        (["--rl.dpo_beta", 0.5], "rl.dpo_beta 0.1 -> 0.5"),
        (["--rl.dpo_loss", "ipo"], "rl.dpo_loss sigmoid -> ipo"),
        (["--model.adapter", straight() / "final"], "model.adapter None -> "),
    )


def test_R09_another_adapter_at_one_path_is_another_reference(tmp_path, settings, straight):
    adapter = shutil.copytree(straight() / "final", tmp_path / "adapter")
    flags = ["--model.adapter", adapter, "--training.save_interval", 1]
    train(tmp_path, settings(tmp_path, *flags, "--training.max_steps", 2))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({key: 0.5 * tensor for key, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    (adapter / "MANIFEST.json").unlink()  # as one must who changes it by hand
    refused(tmp_path, settings(tmp_path, *flags, "--training.max_steps", 4), "another run")


@pytest.mark.parametrize(("rate", "old"), [("training.learning_rate", 0.001), ("rl.learning_rate", None)])
def test_R09_what_may_change(tmp_path, settings, straight, rate, old):
    checks.check_what_may_change(MAIN, tmp_path, settings, straight, rate, old)


def test_R15_nan_ends_the_run_before_the_update(tmp_path, settings):
    checks.check_nan(MAIN, tmp_path, settings, "synthetic-safety-train-", model, "sequence_logprobs")


def watched(main, argv):
    """A body that checks at the end that nothing of the reference has changed."""
    seen, real = {}, pairs.reference_logprobs

    def tensors(net):
        return {key: tensor for key, tensor in net.state_dict().items() if not key.endswith("policy")}

    def reference_logprobs(net, *more):
        seen["net"], seen["before"] = net, {key: tensor.clone() for key, tensor in tensors(net).items()}
        return real(net, *more)

    pairs.reference_logprobs = reference_logprobs
    processes.call(main, argv)
    after = tensors(seen["net"])
    assert after.keys() == seen["before"].keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in seen["before"].items())
    flags = dict(itertools.pairwise(argv))
    if "--model.adapter" in flags:
        saved = load_file(Path(flags["--model.adapter"]) / "adapter_model.safetensors")
        frozen = lora.adapter_parameters(seen["net"], "reference")
        assert all(torch.equal(saved[key], frozen[key]) for key in saved) and saved.keys() == frozen.keys()


@pytest.mark.parametrize("kind", ["lora", "adapter", "none", "bfloat16", "qlora"])
def test_R19_b26_b34_it_starts_at_its_reference(tmp_path, settings, straight, kind, monkeypatch):
    if kind == "qlora":
        import bitsandbytes  # noqa: F401
    monkeypatch.setenv("GEMMA_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    peft, more, start = {"adapter": "lora", "bfloat16": "none"}.get(kind, kind), [], None
    if kind == "bfloat16":  # fp32 masters, products in bf16
        more = ["--model.dtype", "bfloat16"]
    if kind == "adapter":  # trained with dropout, so that a policy in train mode would differ from its reference
        start = straight() / "final"
        assert json.loads((start / "adapter_config.json").read_text())["lora_dropout"] == 0.1
        more = ["--model.adapter", start]
    flags = ["--training.max_steps", 2, "--training.eval_interval", 1, "--training.learning_rate", 1e-3]
    train(tmp_path, settings(tmp_path, *flags, *more, peft=peft), watched)
    first, second, last = lines(tmp_path / "run")
    assert first["loss"] == pytest.approx(LOG2, abs=1e-7) and first["eval/loss"] == pytest.approx(LOG2, abs=1e-7)
    assert first["margin"] == first["eval/margin"] == 0
    assert first["accuracy"] == first["eval/accuracy"] == 0.5
    assert first["chosen_change"] == first["eval/chosen_change"] == first["eval/rejected_change"] == 0
    assert 0 <= abs(first["eval/kl"]) <= 1e-9 and first["eval/entropy"] > 0.01
    assert first["grad_norm"] > 0 and second["margin"] != 0 and last["eval/margin"] != 0 and last["eval/kl"] > 1e-9
    if start:  # another start than the base, and another end than the start
        assert first["eval/chosen_logprob"] != lines(straight())[0]["eval/chosen_logprob"]
        before, after = (load_file(at / "adapter_model.safetensors") for at in (start, tmp_path / "run" / "final"))
        assert before.keys() == after.keys() and not any(torch.equal(before[key], after[key]) for key in before)
