"""Whole runs of a script, as the tests of all scripts want them: start, stop, break, resume, compare.

Every run is a forked child of the warmed parent: locks, signal handlers and patches of one end with it. What a child
does is a body(main, argv), `call` if nothing is to go wrong; `main` is a script's.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import data, dist, log, lora, losses, model, reward_model
from common.evaluation import pictures as pictures_of_a_report
from common.runtime import base, checkpoint, resume
from common.tasks import synthetic

# what may differ between two equal runs
CLOCK = {"seconds", "tokens_per_second", "pairs_per_second", "reference_seconds", "peak_memory_gb"}
CLOCK |= {"seconds_rollout", "seconds_reward", "seconds_update"}
WEIGHTS = {"lora": "adapter_model.safetensors", "none": "model.safetensors"}
STEPS = 12


# ---------------------------------------------------------------- children


def call(main, argv):
    print("RESULT " + json.dumps(main([str(word) for word in argv])))


def start(main, folder, argv, body=call, environment=(), pictures=False):
    """Fork a child that runs body(main, argv) as a script would and prints to files in `folder`; returns its pid.

    Curves are drawn only with `pictures`: they take longer than a short run.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / f"{name}-{os.getpid()}", os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
            os.environ.update(environment)
            if not pictures:
                log.plot_curves = log.plot_reliability = lambda *what: what[-1].write_bytes(b"")
                pictures_of_a_report.save = lambda *what: []
            body(main, argv)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
            sys.stderr.write("" if isinstance(error.code, int) else f"{error.code}\n")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def finish(folder, pid):
    """Wait for a child of `start` -> (exit status, stdout, stderr)."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    files = [folder / f"{name}-{pid}" for name in ("out", "err")]
    return status, *(file.read_text() if file.exists() else "" for file in files)  # none yet where it died at once


def run(main, folder, argv, body=call, **options):
    return finish(folder, start(main, folder, argv, body, **options))


def train(main, folder, argv, body=call, **options):
    """A run that must end well; returns what main returned."""
    status, out, err = run(main, folder, argv, body, **options)
    assert status == 0, err
    return json.loads(out.partition("RESULT ")[2])


def refused(main, folder, argv, *words):
    """A run that must end with status 2 and one line that has all `words`."""
    status, out, err = run(main, folder, argv)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, (status, out[-500:], err)
    assert all(word in err for word in words), err
    assert "step 0 " not in out and "RESULT" not in out, out
    return err


def start_ranks(main, folder, argv, bodies=(call, call), environment=()):
    """Two ranks as torchrun would start them, forked; returns their pids."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **dict(environment)}
    places = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    return [start(main, folder, argv, body, place) for body, place in zip(bodies, places)]


def ranks(main, folder, argv, bodies=(call, call)):
    """[(status, stdout, stderr), ...] of start_ranks."""
    return [finish(folder, pid) for pid in start_ranks(main, folder, argv, bodies)]


def train_ranks(main, folder, argv):
    """Two ranks that must end well, of which one speaks."""
    done = ranks(main, folder, argv)
    assert [status for status, *_ in done] == [0, 0], done
    assert ["step 5 " in out for _, out, _ in done] == [True, False], done


def free_port():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


# ---------------------------------------------------------------- bodies


def at_step(number, act):
    """A body that calls act() inside step `number`, before its update."""

    def body(main, argv):
        real = resume.seed_step

        def seed_step(seed, step, rank):
            if step == number:
                act()
            real(seed, step, rank)

        resume.seed_step = seed_step
        call(main, argv)

    return body


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def crash_behind_save(number):
    """A body that dies with status 9 as soon as the folder of step `number` is written."""

    def body(main, argv):
        real = checkpoint.commit

        @contextlib.contextmanager
        def commit(final, *more):
            with real(final, *more) as temp:
                yield temp
            if final.name == f"step-{number:06d}":
                os._exit(9)

        checkpoint.commit = commit
        call(main, argv)

    return body


def dying(number):
    """A body that dies with status 9 at the number-th os.replace, os.rename or os.fsync; leaves their count behind."""

    def body(main, argv):
        calls, folder = [0], Path(dict(itertools.pairwise(argv))["--logging.output_dir"]).parent

        def counted(real):
            def call_or_die(*args, **more):
                calls[0] += 1
                if calls[0] == number:
                    os._exit(9)
                return real(*args, **more)

            return call_or_die

        for name in ("replace", "rename", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        call(main, argv)
        (folder / "calls").write_text(str(calls[0]))

    return body


def poisoned(number, module, name):
    """A body in which module.name returns nan in step `number`; it checks that all that is trained stays as saved."""

    def body(main, argv):
        step, trained = [0], {}
        seed_step, real, sum_gradients = resume.seed_step, getattr(module, name), dist.sum_gradients

        def remember(seed, now, rank):
            step[0] = now
            seed_step(seed, now, rank)

        def keep(parameters):
            trained[id(parameters[0])] = parameters
            sum_gradients(parameters)

        def poison(*args):
            return real(*args) * (math.nan if step[0] == number else 1)

        resume.seed_step, dist.sum_gradients = remember, keep
        setattr(module, name, poison)
        try:
            call(main, argv)
        finally:
            flags = dict(itertools.pairwise(argv))
            folder = flags["--logging.output_dir"] / "run" / f"step-{number:06d}"
            files = [folder / WEIGHTS[flags["--model.peft_type"]], folder / "critic.safetensors"]
            saved = [load_file(file).values() for file in files if file.exists()]
            bits = [sorted(sorted(t.detach().numpy().tobytes() for t in part) for part in found)
                    for found in (saved, trained.values())]  # fmt: skip
            assert bits[0] == bits[1], "the update was made"

    return body


def spying(keep):
    """A body that calls keep(step, name, arguments, result) at every call of a loss of the policy or critic."""

    def body(main, argv):
        step, real_seed = [0], resume.seed_step

        def seed_step(seed, now, rank):
            step[0] = now
            real_seed(seed, now, rank)

        def watched(name, real):
            def function(*args, **more):
                result = real(*args, **more)
                keep(step[0], name, args, result)
                return result

            return function

        resume.seed_step = seed_step
        for name in ("policy_loss", "value_loss", "kl_loss_unbiased"):
            setattr(losses, name, watched(name, getattr(losses, name)))
        call(main, argv)

    return body


# ---------------------------------------------------------------- flags, data, what a run leaves behind


def settings(base_folder, source, *script, rate=1e-3):
    """A function that returns the flags of a short run: several micro-batches a step, dropout, two epoch edges."""

    def flags(output_dir, *more, peft="lora"):
        kind = ["--model.peft_type", peft, "--model.peft_dropout", 0.1]
        sizes = ["--training.max_steps", STEPS, "--training.batch_size", 4, "--training.micro_batch_tokens", 128]
        every = ["--training.eval_interval", 4, "--training.save_interval", 3]
        rates = ["--training.learning_rate", 0.1 * rate if peft == "none" else rate, "--logging.run_name", "run"]
        where = ["--model.base_checkpoint", base_folder, "--dataset_path", source, "--logging.output_dir", output_dir]
        return ["--debug", *kind, *sizes, *every, *rates, *where, *script, *more]

    return flags


def straight(main, tmp_path_factory, settings):
    """A function that returns the folder of a run that nothing stopped."""

    @functools.cache
    def folder(peft="lora"):
        out = tmp_path_factory.mktemp(f"straight-{peft}")
        train(main, out, settings(out, peft=peft))
        return out / "run"

    return folder


def write_data(folder, task, changes=(), **sizes):
    folder.mkdir(parents=True)
    for split, count in sizes.items():
        lines = [json.dumps(record | dict(changes)) + "\n" for record in synthetic.records(task, split, count)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def odd_pairs(folder, source):
    """The data of `source`, but one pair has equal answers, one an empty one, one only one, one an endless prompt."""
    shutil.copytree(source, folder)
    rows = data.load_split(source, "train")
    changes = [
        {"rejected": rows[0]["response"]},
        {"rejected": " \n"},
        {"rejected": None},
        {"prompt": [{"role": "user", "content": "How do I fix my car? " * 50}]},
    ]
    rows[:4] = [row | change for row, change in zip(rows, changes)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pairs_of(source, split, tokenizer):
    return data.encode_pairs(data.load_split(source, split), tokenizer, 128)[0]


def random_adapter(net, name, seed, std=0.1, dropout=0.0):
    """Give `net` an adapter that changes what it says."""
    torch.manual_seed(seed)
    lora.inject(net, name, 4, 8, dropout=dropout)
    with torch.no_grad():
        for key, p in lora.adapter_parameters(net, name).items():
            if "lora_B" in key:
                p.normal_(std=std)


def random_start(folder, base_folder):
    """The folder of a policy to start from, trained with dropout: in train mode it would differ from its reference."""
    folder.mkdir()
    net, tokenizer = model.load(base_folder, torch.device("cpu"), torch.float32)
    random_adapter(net, "policy", 2, std=0.05, dropout=0.1)
    model.save_adapter(net, tokenizer, folder, "policy", "base")
    return folder


def random_reward_model(folder, base_folder):
    """The folder of a reward model with random weights."""
    folder.mkdir()
    net, tokenizer = model.load(base_folder, torch.device("cpu"), torch.float32)
    random_adapter(net, "reward", 1, std=0.05)
    head = reward_model.new_head(net.config.hidden_size, net.device)
    about = {"base_checkpoint": "base", "base": base.fingerprint(base_folder), "mean": 0.1, "std": 2.0}
    reward_model.save(net, tokenizer, folder, "reward", head, about)
    return folder


def mine(folder, body):
    (folder / "mine.py").write_text(f"calls = [0]\ndef mine(prompt, completion, reference):\n    {body}\n")
    return ["--reward.function", f"{folder}/mine.py:mine"]


def another_base(folder, source):
    """The folder of a base with one weight changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def flipped(content, mask=0x40):
    """Bytes with one bit of the middle one turned round."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ mask]) + content[middle + 1 :]


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
    optimizers = [folder / f"step-{len(lines(straight)) - 1:06d}" / "optimizer.safetensors"
                  for folder in (run_dir, straight)]  # fmt: skip
    assert checkpoint.sha256(optimizers[0]) == checkpoint.sha256(optimizers[1])
    assert not list(run_dir.glob(".tmp-*"))


def assert_same_records(run_dir, straight):
    for now, then in zip(records(run_dir), records(straight), strict=True):
        odd = {key: (now.get(key), then.get(key)) for key in now | then if now.get(key) != then.get(key)}
        assert not odd, (now["step"], odd)


def assert_finite(run_dir, number, peft="lora"):
    folder = checkpoint.newest(run_dir)
    assert folder.name == f"step-{number:06d}" and checkpoint.load_state(folder)["step"] == number
    for group in (load_file(folder / name) for name in ("optimizer.safetensors", WEIGHTS[peft])):
        assert group and all(tensor.isfinite().all() for tensor in group.values())
    assert len(lines(run_dir)) == number


# ---------------------------------------------------------------- what must hold of every script


def check_sigterm(main, folder, settings, straight):
    """R1, R13: the step ends, no other begins, the evaluation that is due waits; then it goes on bit for bit."""
    argv = settings(folder)
    status, out, err = run(main, folder, argv, at_step(7, terminate))
    assert status == 1 and "stopped at step 8" in err, err
    assert checkpoint.newest(folder / "run").name == "step-000008" and "step 8" not in out
    assert not (folder / "run" / "final").exists()
    train(main, folder, argv)
    assert_same_run(folder / "run", straight())


def crash(main, folder, argv):
    """R14: what a crash behind a save leaves, and a torn log."""
    assert run(main, folder, argv, crash_behind_save(6))[0] == 9
    with open(folder / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')


def check_crash(main, folder, settings, straight, peft="lora"):
    """R1, R14: it goes on from there bit for bit."""
    argv = settings(folder, peft=peft)
    crash(main, folder, argv)
    train(main, folder, argv)
    assert_same_run(folder / "run", straight(peft))


def check_kills(main, folder, settings, straight, kills):
    """R3: SIGKILL at random moments; what is left is whole or not there, and the run ends as if nothing had been."""
    argv, run_dir, dice = settings(folder), folder / "run", random.Random(0)
    logs = r"config.yml|run.json|metrics.jsonl|samples.jsonl|held_out.jsonl|report.json|curves.png|\.lock"
    straight()
    while kills:
        pid = start(main, folder, argv, pictures=True)
        time.sleep(dice.uniform(0.5, 2.0))
        os.kill(pid, signal.SIGKILL)
        killed = finish(folder, pid)[0] == -signal.SIGKILL
        kills -= killed
        for path in run_dir.glob("*"):
            assert re.fullmatch(logs + r"|best|final|step-\d{6}|\.tmp-.*", path.name), path
            if re.fullmatch(r"best|step-\d{6}", path.name):
                checkpoint.verify(path)
        if not killed:  # it came to its end: begin again
            shutil.rmtree(run_dir)
    train(main, folder, argv)
    assert_same_run(run_dir, straight())


def check_kill_points(main, folder, argv, every):
    """R4: death at the n-th call that makes something durable, n = 1, 1 + every, ...; each run then ends the same."""
    train(main, folder, argv(folder / "whole"), dying(10**9))
    count = int((folder / "calls").read_text())
    assert count > every, count
    for number in range(1, count + 1, every):
        assert run(main, folder, argv(folder / str(number)), dying(number))[0] == 9, number
        train(main, folder, argv(folder / str(number)))
        assert_same_run(folder / str(number) / "run", folder / "whole" / "run")


def check_two_ranks(main, folder, settings):
    """R2, R13: two ranks stop together though one hears of it, and go on bit for bit, only as two; -> the whole run."""
    short = ["--training.max_steps", 6, "--training.eval_interval", 3, "--training.save_interval", 2]
    whole, cut = (settings(folder / name, *short) for name in ("whole", "cut"))
    train_ranks(main, folder, whole)
    stopped = ranks(main, folder, cut, (call, at_step(3, terminate)))
    assert [status for status, *_ in stopped] == [1, 1], stopped
    assert all("stopped at step 4" in err for *_, err in stopped), stopped
    refused(main, folder, cut, "world_size 2 -> 1")
    train_ranks(main, folder, cut)
    assert_same_records(folder / "cut" / "run", folder / "whole" / "run")
    digests = {checkpoint.sha256(folder / name / "run" / "final" / WEIGHTS["lora"]) for name in ("whole", "cut")}
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
        (["--training.max_steps", 6], "training.max_steps", f"step-{STEPS:06d}"),
        (["--training.weight_decay", 0.5], f"{run_dir} finished with training.weight_decay 0.0, now 0.5: choose"),
        (["--training.learning_rate", 1e-5], "training.learning_rate 0.001, now 1e-05: choose another --logging.run"),
        (["--training.learning_rate", 1e-5, "--training.resume_changed", "true"], "finished with", "now 1e-05"),
        *cases,
    ):
        refused(main, folder, settings(folder, *flags), *words)
        after = snapshot(folder)
        assert {path: after[path] for path in before} == before, flags
        assert sorted(os.listdir(run_dir)) == sorted(os.listdir(straight())), flags


def check_what_may_change(main, folder, settings, straight, rate="training.learning_rate", old=0.001, same="loss"):
    """R9: the number of steps may change, the learning rate, so far `old`, where it is asked for, and both are told."""
    shutil.copytree(straight(), folder / "run")
    shutil.rmtree(folder / "run" / f"step-{STEPS:06d}")
    before, argv = snapshot(folder / "run"), settings(folder, f"--{rate}", 5e-4, "--training.max_steps", 10)
    words = "was trained with other settings", "add --training.resume_changed true", "another --logging.run_name"
    refused(main, folder, argv, "step-000009", f"{rate} {old} -> 0.0005", *words)
    assert snapshot(folder / "run") == before
    status, out, err = run(main, folder, [*argv, "--training.resume_changed", "true"])
    assert status == 0, err
    assert f"{rate} {old} -> 0.0005" in out and "training.max_steps 12 -> 10" in out, out
    assert "resuming" in out and "step 9 of 10" in out, out
    first, second = history(folder / "run")
    assert first["step"] == 0 and first["settings"][rate] == old and first["settings"]["training.max_steps"] == STEPS
    assert second == {"step": 9, "settings": {rate: 5e-4, "training.max_steps": 10}}
    new, old = records(folder / "run"), records(straight())
    assert new[:9] == old[:9] and new[9][same] == old[9][same] and new[9]["lr"] != old[9]["lr"] and len(new) == 11


def check_nan(main, folder, settings, names, module, name, words="loss nan", count=4):
    """R15: nan ends the run before the update, on all ranks, and the message names the step's rows."""
    one, two = folder / "one", folder / "two"
    folder.mkdir(exist_ok=True)
    status, _, err = run(main, folder, settings(one, "--training.save_interval", 1), poisoned(3, module, name))
    assert status == 2 and err.count("\n") == 1, err
    assert f"step 3: {words}" in err and err.count(names) == (count or err.count(names)) > 0, err
    assert_finite(one / "run", 3)
    argv = settings(two, "--training.save_interval", 1)
    for status, _, err in ranks(main, folder, argv, (call, poisoned(2, module, name))):
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
        call(main, argv)

    folder.mkdir(exist_ok=True)
    train(main, folder, argv, body)
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
