"""R01 to R17 of train_sft.py, as whole runs."""

import functools
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_sft
from common import data, log, lora, model
from common.log import UserError
from common.runtime import base, checkpoint, resume, watch
from tests import checks, inputs, processes
from tests.checks import lines
from tests.faults import inject, trainers
from tests.faults.children import save_step, wait_for

MAIN = train_sft.main
train, run, refused = (functools.partial(each, MAIN) for each in (processes.train, processes.run, processes.refused))
few, settings, straight = trainers.fixtures("sft")


def test_R01_R13_sigterm_at_an_evaluation_and_resume(tmp_path, settings, straight):
    checks.check_sigterm(MAIN, tmp_path, settings, straight)


def test_R01_R14_crash_behind_a_save_and_resume(tmp_path, settings, straight):
    checks.check_crash(MAIN, tmp_path, settings, straight, "none")


def test_R03_kills_at_random_moments(tmp_path, settings, straight):
    checks.check_kills(MAIN, tmp_path, settings, straight, 4, 0.45)


def test_R02_R13_two_ranks_stop_together_and_resume(tmp_path, settings):
    checks.check_two_ranks(MAIN, tmp_path, settings)


def test_R11_second_start_is_refused(tmp_path, settings):
    argv, run_dir = settings(tmp_path, "--training.max_steps", 4), tmp_path / "run"
    pid = processes.start(MAIN, tmp_path, argv, inject.at_step(2, lambda: time.sleep(60)))
    end = time.monotonic() + 20
    while not (run_dir / "metrics.jsonl").exists() or len((run_dir / "metrics.jsonl").read_text().splitlines()) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    before = checks.snapshot(run_dir)
    refused(tmp_path, argv, f"locked by pid {pid}")
    assert checks.snapshot(run_dir) == before
    os.kill(pid, signal.SIGKILL)
    processes.finish(tmp_path, pid)
    assert train(tmp_path, argv)["step"] == 4


def test_R09_resume_refusals(tmp_path, settings, straight, few, micro_folder):
    other = tmp_path / "other"
    shutil.copytree(few, other)
    shutil.copyfile(few / "val.jsonl", other / "train.jsonl")
    smaller = Path(shutil.copytree(micro_folder, tmp_path / "smaller"))  # a layer less
    about = json.loads((smaller / "config.json").read_text())
    about |= {"num_hidden_layers": about["num_hidden_layers"] - 1, "layer_types": about["layer_types"][:-1]}
    (smaller / "config.json").write_text(json.dumps(about))
    tensors = load_file(smaller / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if f"layers.{about['num_hidden_layers']}." not in name}
    save_file(kept, smaller / "model.safetensors", metadata={"format": "pt"})
    spoken = Path(shutil.copytree(micro_folder, tmp_path / "spoken"))  # a merge less
    text = json.loads((spoken / "tokenizer.json").read_text())
    text["model"]["merges"].pop()
    (spoken / "tokenizer.json").write_text(json.dumps(text, indent=1))
    checks.check_refusals(
        MAIN,
        tmp_path,
        settings,
        straight,
        (["--dataset_path", other], "dataset_path", "data "),
        (["--model.peft_rank", 4], "model.peft_rank 8 -> 4"),
        (["--model.base_checkpoint", smaller], "model.base_checkpoint", "model "),
        (["--model.base_checkpoint", spoken], "model.base_checkpoint", "tokenizer "),
        (["--training.resume", other], str(other), "MANIFEST.json"),
    )


def test_R09_what_may_change(tmp_path, settings, straight):
    checks.check_what_may_change(MAIN, tmp_path, settings, straight)


def test_R09_a_run_begun_before_there_was_a_history_goes_on(tmp_path, settings, straight):
    """Its run.json is damaged, then lost: neither is needed. What spares memory may change unasked."""
    run_dir, last = tmp_path / "run", tmp_path / "run" / "step-000009"
    shutil.copytree(straight(), run_dir)
    shutil.rmtree(run_dir / f"step-{inputs.STEPS:06d}")
    state, manifest = json.loads((last / "state.json").read_text()), checkpoint.verify(last)
    del state["history"], state["facts"]["training.resume_changed"]
    (last / "state.json").write_text(json.dumps(state))
    (last / "MANIFEST.json").unlink()
    checkpoint._seal(last, {"step": manifest["step"], "tensors": manifest["tensors"]})
    (run_dir / "run.json").write_text('{"command"')
    status, _, err = run(tmp_path, settings(tmp_path), inject.at_step(10, processes.terminate))
    assert status == 1 and "stopped at step 11" in err, err
    (first,) = checks.history(run_dir)
    assert first["step"] == 0 and first["source"] == "step-000009/state.json"
    assert first["settings"]["training.learning_rate"] == 0.001
    (run_dir / "run.json").unlink()
    train(tmp_path, settings(tmp_path, "--training.micro_batch_tokens", 64))
    assert checks.history(run_dir) == [first, {"step": 11, "settings": {"training.micro_batch_tokens": 64}}]
    assert len(lines(run_dir)) == inputs.STEPS + 1


def test_R09_the_history_survives_a_kill_and_follows_the_run(tmp_path, settings):
    run_dir = tmp_path / "run"

    def argv(steps, rate, *more):
        return settings(tmp_path, "--training.max_steps", steps, "--training.learning_rate", rate, *more)

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    train(tmp_path, argv(3, 1e-3))
    (first,) = checks.history(run_dir)
    changed = {"training.learning_rate": 5e-4, "training.max_steps": 6}
    for act in (kill, processes.terminate):  # the first leaves no checkpoint with the new settings
        assert run(tmp_path, argv(6, 5e-4, "--training.resume_changed", "true"), inject.at_step(4, act))[0]
        assert checks.history(run_dir) == [first, {"step": 3, "settings": changed}]
    train(tmp_path, argv(6, 5e-4))  # as it was saved: nothing is asked for
    assert checks.history(run_dir) == [first, {"step": 3, "settings": changed}]
    assert [line["lr"] > 0 for line in lines(run_dir)[:6]].count(True) >= 5
    shutil.rmtree(run_dir / "step-000006")
    refused(tmp_path, argv(6, 1e-3), "training.learning_rate 0.0005 -> 0.001; add --training.resume_changed true")
    train(tmp_path, argv(6, 1e-4, "--training.resume_changed", "true"))
    step = checkpoint.verify(run_dir / "final")["step"]
    assert step == 6 and checks.history(run_dir)[:2] == [first, {"step": 3, "settings": changed}]
    assert checks.history(run_dir)[2] == {"step": 5, "settings": {"training.learning_rate": 1e-4}}


def test_R15_nan_ends_the_run_before_the_update(tmp_path, settings):
    checks.check_nan(MAIN, tmp_path, settings, "synthetic-conala-train-", model, "sequence_logprobs")


# ---------------------------------------------------------------- disks and damage


def limited(number, size):
    """A body that may write no file of more than `size` bytes from step `number` on."""

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return inject.at_step(number, full)


@pytest.mark.parametrize(("size", "words"), [(50_000, "cannot save"), (1_000, "cannot write")], ids=["save", "log"])
def test_R05_a_full_disk_ends_the_run_in_one_line(tmp_path, settings, straight, size, words):
    """At a checkpoint, and at a log that no checkpoint waits for: what was saved stays, and the run goes on later."""
    status, out, err = run(tmp_path, settings(tmp_path), limited(4, size))
    assert status == 2 and err.count("\n") == 1 and "RESULT" not in out, (status, err)
    assert re.fullmatch(rf"error: {words} {tmp_path}/run/\S+: .*\(\d+ bytes needed, \d+ free\)\n", err), err
    names = {path.name for path in (tmp_path / "run").glob("*")}
    assert "step-000004" in names and "step-000006" not in names and not {n for n in names if n.startswith(".tmp-")}
    checkpoint.load_state(tmp_path / "run" / "step-000004")  # of the evaluation in step 4, the best so far
    train(tmp_path, settings(tmp_path))
    checks.assert_same_run(tmp_path / "run", straight())


def test_R06_R07_a_damaged_checkpoint_is_passed_over(tmp_path, settings, straight):
    """Cut or flipped, by itself with a warning, by its path with an error; then the run ends as if nothing had been."""
    last, before = (tmp_path / "run" / f"step-{step:06d}" for step in (inputs.STEPS, inputs.STEPS - 3))
    shutil.copytree(straight(), tmp_path / "run")
    whole = {path.name: path.read_bytes() for path in last.iterdir()}
    assert {"MANIFEST.json", "state.json", "optimizer.safetensors", inputs.WEIGHTS["lora"]} < whole.keys()
    for name, good in whole.items():
        for content in (good[:-4096], inputs.flipped(good)):
            (last / name).write_bytes(content)
            with pytest.raises(UserError, match=re.escape(name)):
                resume.find(tmp_path / "run", str(last))
            assert checkpoint.newest(tmp_path / "run") == before
            (last / name).write_bytes(good)
    os.truncate(last / "optimizer.safetensors", len(whole["optimizer.safetensors"]) - 4096)
    refused(tmp_path, settings(tmp_path, "--training.resume", last), "optimizer.safetensors is damaged")
    status, out, err = run(tmp_path, settings(tmp_path))
    assert status == 0 and err.count("\n") == 1 and "checkpoint skipped" in err and "optimizer.safetensors" in err, err
    assert f"at step {inputs.STEPS - 3} of" in out
    checks.assert_same_run(tmp_path / "run", straight())


def test_R07_what_a_run_published_is_verified_where_it_is_used(tmp_path, settings, straight, micro_folder):
    """One flipped bit in final/ as an adapter, in a base with a manifest, in a reward model: refused by name."""
    final = Path(shutil.copytree(straight() / "final", tmp_path / "final"))
    adapter = final / inputs.WEIGHTS["lora"]
    adapter.write_bytes(inputs.flipped(adapter.read_bytes()))
    refused(tmp_path, settings(tmp_path, "--model.adapter", final), f"{adapter} is damaged")
    net, tokenizer = model.load(micro_folder, torch.device("cpu"), torch.float32)
    step = save_step(tmp_path / "whole", 1, {}, {}, functools.partial(model.save_model, net, tokenizer))
    weights = step / "model.safetensors"
    assert base.resolve(str(step)) == step
    weights.write_bytes(inputs.flipped(weights.read_bytes()))
    refused(tmp_path, settings(tmp_path, "--model.base_checkpoint", step), f"{weights} is damaged")


def test_R09_another_layout_of_the_bases_json_is_the_same_base(tmp_path, settings, micro_folder):
    """Its tokenizer.json and config.json are saved again while the run is stopped."""
    folder = shutil.copytree(micro_folder, tmp_path / "base")
    argv = settings(tmp_path, "--model.base_checkpoint", folder, "--training.save_interval", 1)
    train(tmp_path, [*argv, "--training.max_steps", 1])
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text())))
    status, out, err = run(tmp_path, [*argv, "--training.max_steps", 2])
    assert status == 0 and "at step 1 of 2" in out, (out, err)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_R13_the_second_signal_ends_a_long_step_at_once(tmp_path, settings, number):
    argv, marker = settings(tmp_path), tmp_path / "marker"
    pid = processes.start(MAIN, tmp_path, argv, inject.at_step(4, lambda: (marker.touch(), time.sleep(60))))
    wait_for(marker, 60)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(pid, number)
    status, _, err = processes.finish(tmp_path, pid)
    assert status == 128 + number, err
    assert checkpoint.newest(tmp_path / "run").name == "step-000004"  # of the evaluation in it


# ---------------------------------------------------------------- R16: a spike


def spiked(factor):
    """A body whose loss is `factor` times as large in step 6; it leaves the weights behind that step."""

    def body(main, argv):
        step, seed_step, logprobs, record = [0], resume.seed_step, model.sequence_logprobs, log.write_record
        folder = Path(dict(itertools.pairwise(argv))["--logging.output_dir"])

        def remember(seed, now, rank):
            step[0] = now
            seed_step(seed, now, rank)

        def enlarged(net, *more):
            spiked.net = net
            return logprobs(net, *more) * (factor if step[0] == 6 else 1)

        def write_record(path, line):
            record(path, line)
            if line["step"] == 6:
                kept = {name: p.detach().clone() for name, p in lora.adapter_parameters(spiked.net, "policy").items()}
                save_file(kept, folder / "behind.safetensors")

        resume.seed_step, model.sequence_logprobs, log.write_record = remember, enlarged, write_record
        processes.call(main, argv)

    return body


def test_R16_a_spike_is_clipped_logged_and_said(tmp_path, settings):
    """The norm before clipping is logged, the update is that of an ordinary clipped step, and a warning is printed."""
    flags = ["--training.max_grad_norm", 0.01, "--training.max_steps", 8, "--training.save_interval", 100]
    found, said = [], []
    for factor in (1, 2**20):  # a power of two: the gradient's direction keeps its bits
        out = tmp_path / str(factor)
        out.mkdir()
        status, words, err = run(tmp_path, settings(out, *flags), spiked(factor))
        assert status == 0, err
        found.append(load_file(out / "behind.safetensors"))
        said.append([line for line in words.splitlines() if "before clipping" in line])
    plain, spike = (lines(tmp_path / name / "run") for name in ("1", str(2**20)))
    assert plain[6]["grad_norm"] > 0.01  # clipped in either run
    assert spike[6]["grad_norm"] == pytest.approx(2**20 * plain[6]["grad_norm"], rel=1e-5)
    assert all(torch.allclose(found[0][name], tensor, rtol=1e-4, atol=1e-7) for name, tensor in found[1].items())
    assert [line["step"] for line in spike if "warning" in line] == [6] and "warning" not in str(plain)
    assert said[0] == [] and len(said[1]) == 1 and said[1][0].startswith("warning: step 6: grad_norm was ")


def test_R16_ten_times_the_running_median_is_a_spike():
    norms = {}
    for step, (norm, expected) in enumerate([(1, 0), (2, 0), (3, 0), (900, 0), (25, 0), (29, 0), (139, 0), (271, 1)]):
        said = watch.spikes(norms, {"grad_norm": float(norm)})  # medians: -, -, -, -, 2.5, 3, 14, 25
        assert len(said) == expected, (step, said)
    assert "grad_norm was 271 before clipping" in said[0] and "usual 25" in said[0]
    assert json.loads(json.dumps(norms)) == norms
    assert not watch.spikes(norms, {"grad_norm": 0.0}) and not watch.spikes(norms, {}) and len(norms["grad_norm"]) == 8
    for _ in range(100):
        watch.spikes(norms, {"grad_norm": 5.0, "critic_grad_norm": 1.0})
    assert norms["grad_norm"] == [5.0] * watch.RECENT
    (said,) = watch.spikes(norms, {"grad_norm": 50.0, "critic_grad_norm": 10.5})  # ten times is none yet
    assert said.startswith("critic_grad_norm was 10.5")


def test_R16_the_running_median_survives_a_crash(tmp_path, settings):
    flags = ["--training.max_steps", 8, "--training.save_interval", 3, "--training.eval_interval", 100]
    argv = [settings(tmp_path / name, *flags) for name in ("whole", "cut")]
    train(tmp_path, argv[0], spiked_at_resume)
    assert run(tmp_path, argv[1], inject.crash_behind_save(6))[0] == 9
    train(tmp_path, argv[1], spiked_at_resume)  # of its own steps it would know too few
    checks.assert_same_records(tmp_path / "cut" / "run", tmp_path / "whole" / "run")
    assert [line["step"] for line in lines(tmp_path / "cut" / "run") if "warning" in line] == [6]


def spiked_at_resume(main, argv):
    step, seed_step, logprobs = [0], resume.seed_step, model.sequence_logprobs

    def remember(seed, now, rank):
        step[0] = now
        seed_step(seed, now, rank)

    resume.seed_step = remember
    model.sequence_logprobs = lambda *args: logprobs(*args) * (1e6 if step[0] == 6 else 1)
    processes.call(main, argv)


# ---------------------------------------------------------------- R17: nothing to learn from


def test_R17_rows_without_a_target_are_counted_and_never_trained(tmp_path, settings, few):
    """Empty answers, answers beyond the context, prompts that fill it: counted at load, and no figure becomes nan."""
    source = Path(shutil.copytree(few, tmp_path / "odd"))
    rows = data.load_split(few, "train")
    long = {"prompt": [{"role": "user", "content": "How do I sort a list? " * 60}]}
    changes = [{"response": ""}, {"response": " \n"}, long, {"response": "x = 1\n" * 300}]
    rows[:4] = [row | change for row, change in zip(rows, changes)]
    (source / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset_path", source, "--training.max_steps", 6, "--training.max_seq_length", 128]
    status, out, err = run(tmp_path, settings(tmp_path, *flags))
    assert status == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("train: "))
    for words in ("2 left out (empty response)", "1 left out (no target)", "2 cut at 128 tokens", "train: 17 kept"):
        assert words in line, line
    values = [value for line in lines(tmp_path / "run") for value in line.values()]
    assert None not in values and all(math.isfinite(value) for value in values if not isinstance(value, str))
    nobody = {"prompt": [{"role": "system", "content": "Be kind."}]}
    reason = "no record has a user's turn and a response to train on"
    for change, words in (({"response": " "}, reason), (nobody, reason), (long, "leaves no example a token to train")):
        (source / "train.jsonl").write_text("".join(json.dumps(row | change) + "\n" for row in rows))
        refused(tmp_path, settings(tmp_path / "none", *flags), "train: ", words)


def test_R17_a_batch_without_a_label_has_loss_0_and_no_gradient(tiny_model):
    net, _ = tiny_model
    lora.inject(net, "policy", 4, 8)
    tokens = torch.randint(107, 300, (3, 9))
    logprobs = model.sequence_logprobs(net, tokens, torch.zeros(3, 8))
    assert logprobs.shape == (3, 8) and not logprobs.any() and not logprobs.requires_grad
