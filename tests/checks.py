"""What runs leave behind, read and compared, and what must hold of every script."""

import json
import os
import random
import re
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import dist
from common.runtime import checkpoint
from tests import inputs, processes
from tests.faults import inject

# what may differ between two equal runs
CLOCK = {"seconds", "tokens_per_second", "pairs_per_second", "reference_seconds", "peak_memory_gb"}
CLOCK |= {"seconds_rollout", "seconds_reward", "seconds_update"}


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def history(run_dir):
    return json.loads((run_dir / "run.json").read_text())["history"]


def samples(run_dir, name="samples"):
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_bytes().splitlines()]


def bits(value):
    return value if isinstance(value, str) else float(value).hex()


def records(run_dir):
    """metrics.jsonl without clocks, every number as its bits."""
    found = lines(run_dir)
    assert [line["step"] for line in found] == list(range(len(found))), found
    return [{key: bits(value) for key, value in line.items() if key not in CLOCK} for line in found]


def snapshot(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, checkpoint.sha256(path)) for path in files}


def assert_same_run(run_dir, straight):
    assert_same_records(run_dir, straight)
    for name in ("final", "best"):  # which step it is, and every file but the one that names the run's folder
        if not (straight / name).exists():  # no evaluation beat the first: then of neither run
            assert name == "best" and not (run_dir / name).exists()
            continue
        now, then = (checkpoint.verify(folder / name) for folder in (run_dir, straight))
        assert now["step"] == then["step"], name
        odd = [file for file, facts in then["files"].items() if now["files"].get(file) != facts]
        assert odd in ([], ["state.json"]), (name, odd)
    optimizers = [
        folder / f"step-{len(lines(straight)) - 1:06d}" / "optimizer.safetensors" for folder in (run_dir, straight)
    ]
    assert checkpoint.sha256(optimizers[0]) == checkpoint.sha256(optimizers[1])
    assert not list(run_dir.glob(".tmp-*"))


def assert_same_records(run_dir, straight, apart=()):
    for now, then in zip(records(run_dir), records(straight), strict=True):
        odd = {key: (now.get(key), then.get(key)) for key in now | then if now.get(key) != then.get(key)}
        odd = {key: both for key, both in odd.items() if key not in apart}
        assert not odd, (now["step"], odd)


def assert_finite(run_dir, number, peft="lora"):
    folder = checkpoint.newest(run_dir)
    assert folder.name == f"step-{number:06d}" and checkpoint.load_state(folder)["step"] == number
    for group in (load_file(folder / name) for name in ("optimizer.safetensors", inputs.WEIGHTS[peft])):
        assert group and all(tensor.isfinite().all() for tensor in group.values())
    assert len(lines(run_dir)) == number


# ---------------------------------------------------------------- what must hold of every script


def check_sigterm(main, folder, settings, straight):
    """R1, R13: the step ends, no other begins, the evaluation that is due waits; then it goes on bit for bit."""
    argv = settings(folder)
    status, out, err = processes.run(main, folder, argv, inject.at_step(7, processes.terminate))
    assert status == 1 and "stopped at step 8" in err, err
    assert checkpoint.newest(folder / "run").name == "step-000008" and 8 not in processes.steps(out)
    assert not (folder / "run" / "final").exists()
    processes.train(main, folder, argv)
    assert_same_run(folder / "run", straight())


def crash(main, folder, argv):
    """R14: what a crash behind a save leaves, and a torn log."""
    assert processes.run(main, folder, argv, inject.crash_behind_save(6))[0] == 9
    with open(folder / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')


def check_crash(main, folder, settings, straight, peft="lora"):
    """R1, R14: it goes on from there bit for bit."""
    argv = settings(folder, peft=peft)
    crash(main, folder, argv)
    processes.train(main, folder, argv)
    assert_same_run(folder / "run", straight(peft))


def check_kills(main, folder, settings, straight, kills, longest):
    """R3: SIGKILL at random moments; what is left is whole or not there, and the run ends as if nothing had been.

    longest: seconds until the latest kill. Before the first one pictures are drawn too, which takes longer.
    """
    argv, run_dir, dice = settings(folder), folder / "run", random.Random(0)
    logs = r"config.yml|run.json|metrics.jsonl|samples.jsonl|held_out.jsonl|report.json|curves.png|\.lock"
    straight()
    first = True
    while kills:
        pid = processes.start(main, folder, argv, pictures=first)
        time.sleep(dice.uniform(0.5, 2.0) if first else dice.uniform(0.05, longest))
        first = False
        os.kill(pid, signal.SIGKILL)
        killed = processes.finish(folder, pid)[0] == -signal.SIGKILL
        kills -= killed
        for path in run_dir.glob("*"):
            assert re.fullmatch(logs + r"|best|final|step-\d{6}|\.tmp-.*", path.name), path
            if re.fullmatch(r"best|step-\d{6}", path.name):
                checkpoint.verify(path)
        if not killed:  # it came to its end: begin again
            shutil.rmtree(run_dir)
    processes.train(main, folder, argv)
    assert_same_run(run_dir, straight())


def check_kill_points(main, folder, argv, every):
    """R4: death at the n-th call that makes something durable, n = 1, 1 + every, ...; each run then ends the same."""
    processes.train(main, folder, argv(folder / "whole"), inject.dying(10**9))
    count = int((folder / "calls").read_text())
    assert count > every, count
    for number in range(1, count + 1, every):
        assert processes.run(main, folder, argv(folder / str(number)), inject.dying(number))[0] == 9, number
        processes.train(main, folder, argv(folder / str(number)))
        assert_same_run(folder / str(number) / "run", folder / "whole" / "run")


def check_two_ranks(main, folder, settings):
    """R2, R13: two ranks stop together though one hears of it, and go on bit for bit, only as two; -> the whole run."""
    short = ["--training.max_steps", 6, "--training.eval_interval", 3, "--training.save_interval", 2]
    whole, cut = (settings(folder / name, *short) for name in ("whole", "cut"))
    processes.train_ranks(main, folder, whole)
    stopped = processes.ranks(main, folder, cut, (processes.call, inject.at_step(3, processes.terminate)))
    assert [status for status, *_ in stopped] == [1, 1], stopped
    assert all("stopped at step 4" in err for *_, err in stopped), stopped
    processes.refused(main, folder, cut, "world_size 2 -> 1")
    processes.train_ranks(main, folder, cut)
    assert_same_records(folder / "cut" / "run", folder / "whole" / "run")
    digests = {checkpoint.sha256(folder / name / "run" / "final" / inputs.WEIGHTS["lora"]) for name in ("whole", "cut")}
    assert len(digests) == 1
    return folder / "whole" / "run"


def check_refusals(main, folder, settings, straight, *cases):
    """R9: a finished run in `folder` does not take other (flags, words of the refusal), and nothing in it changes."""
    run_dir = folder / "run"
    shutil.copytree(straight(), run_dir)
    before = snapshot(folder)
    for flags, *words in (
        (["--seed", 1], "seed 0 -> 1"),
        (["--training.batch_size", 2], "training.batch_size 4 -> 2"),
        (["--training.resume", folder / "none"], "training.resume", str(folder / "none")),
        (["--training.resume", "never"], "training.resume is never", str(run_dir)),
        (["--training.max_steps", 6], "training.max_steps", f"step-{inputs.STEPS:06d}"),
        (["--training.weight_decay", 0.5], f"{run_dir} finished with training.weight_decay 0.0, now 0.5: choose"),
        (["--training.learning_rate", 1e-5], "training.learning_rate 0.001, now 1e-05: choose another --logging.run"),
        (["--training.learning_rate", 1e-5, "--training.resume_changed", "true"], "finished with", "now 1e-05"),
        *cases,
    ):
        processes.refused(main, folder, settings(folder, *flags), *words)
        after = snapshot(folder)
        assert {path: after[path] for path in before} == before, flags
        assert sorted(os.listdir(run_dir)) == sorted(os.listdir(straight())), flags


def check_what_may_change(main, folder, settings, straight, rate="training.learning_rate", old=0.001, same="loss"):
    """R9: the number of steps may change, the learning rate, so far `old`, where it is asked for, and both are told."""
    shutil.copytree(straight(), folder / "run")
    shutil.rmtree(folder / "run" / f"step-{inputs.STEPS:06d}")
    before, argv = snapshot(folder / "run"), settings(folder, f"--{rate}", 5e-4, "--training.max_steps", 10)
    words = "was trained with other settings", "add --training.resume_changed true", "another --logging.run_name"
    processes.refused(main, folder, argv, "step-000009", f"{rate} {old} -> 0.0005", *words)
    assert snapshot(folder / "run") == before
    status, out, err = processes.run(main, folder, [*argv, "--training.resume_changed", "true"])
    assert status == 0, err
    assert f"{rate} {old} -> 0.0005" in out and "training.max_steps 12 -> 10" in out, out
    assert "resuming" in out and "step 9 of 10" in out, out
    first, second = history(folder / "run")
    assert (
        first["step"] == 0
        and first["settings"][rate] == old
        and first["settings"]["training.max_steps"] == inputs.STEPS
    )
    assert second == {"step": 9, "settings": {rate: 5e-4, "training.max_steps": 10}}
    new, old = records(folder / "run"), records(straight())
    assert new[:9] == old[:9] and new[9][same] == old[9][same] and new[9]["lr"] != old[9]["lr"] and len(new) == 11


def check_nan(main, folder, settings, names, module, name, words="loss nan", count=4):
    """R15: nan ends the run before the update, on all ranks, and the message names the step's rows."""
    one, two = folder / "one", folder / "two"
    folder.mkdir(exist_ok=True)
    status, _, err = processes.run(
        main, folder, settings(one, "--training.save_interval", 1), inject.poisoned(3, module, name)
    )
    assert status == 2 and err.count("\n") == 1, err
    assert f"step 3: {words}" in err and err.count(names) == (count or err.count(names)) > 0, err
    assert_finite(one / "run", 3)
    argv = settings(two, "--training.save_interval", 1)
    for status, _, err in processes.ranks(main, folder, argv, (processes.call, inject.poisoned(2, module, name))):
        assert status == 2 and f"step 2: {words}" in err, err
    assert_finite(two / "run", 2)


def first_step(main, folder, argv):
    """(loss, one vector of gradients) of the first step."""

    def body(main, argv):
        real = dist.sum_gradients

        def sum_gradients(parameters):
            real(parameters)
            save_file({"grad": torch.cat([p.grad.flatten() for p in parameters])}, folder / "grad.safetensors")

        dist.sum_gradients = sum_gradients
        processes.call(main, argv)

    folder.mkdir(exist_ok=True)
    processes.train(main, folder, argv, body)
    return lines(folder / "run")[0]["loss"], load_file(folder / "grad.safetensors")["grad"].double()


def check_cuts(main, folder, settings, source, peft, **cuts):
    """B-1: the first step's loss and gradient are the same with the flags of each of `cuts`, to 1e-6."""
    eight = shutil.copytree(source, folder / "eight")
    (eight / "train.jsonl").write_text("".join((source / "train.jsonl").open().readlines()[:8]))
    flags = ["--training.max_steps", 1, "--training.batch_size", 8, "--dataset_path", eight, "--model.peft_dropout", 0]
    cuts = {"one": ["--training.micro_batch_tokens", 100_000], "each": ["--training.micro_batch_tokens", 1]} | cuts
    found = {
        name: first_step(main, folder / name, settings(folder / name, *flags, *more, peft=peft))
        for name, more in cuts.items()
    }
    loss, grad = found.pop("one")
    assert grad.norm() > 0.01, grad.norm()
    for name, (other_loss, other) in found.items():
        assert other_loss == pytest.approx(loss, rel=1e-6), name
        assert (other - grad).norm() < 1e-6 * grad.norm(), (name, (other - grad).norm() / grad.norm())


def assert_same_numbers(one, two, rel, near_zero):
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a.keys() == b.keys(), a["step"]
        for key in a.keys() - CLOCK:
            assert b[key] == pytest.approx(a[key], rel=rel, abs=near_zero), (a["step"], key)


def assert_one_rank_or_two(one, two, rel=1e-6, near_zero=1e-12):
    """B-1: two runs that kept the folder of their first step are the same up to rounding."""
    assert_same_numbers(one, two, rel, near_zero)
    # Adam's first moment after one step is a tenth of the gradient
    one, two = (load_file(run_dir / "step-000001" / "optimizer.safetensors") for run_dir in (one, two))
    moments = [torch.cat([t[k].flatten() for k in sorted(t) if k.endswith("exp_avg")]).double() for t in (one, two)]
    assert (moments[0] - moments[1]).norm() < 1e-6 * moments[0].norm()
