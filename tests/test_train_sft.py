"""train_sft.py end to end: what a run leaves behind, exact resume after stops and kills, refusals, invariances.

Every run is a forked child of the warmed parent: locks, signal handlers and patches of one end with it.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_sft
from common import checkpoint, config, data, dist, lora, model, resume, synthetic

ROOT = Path(train_sft.__file__).parent
CLOCK = {"seconds", "tokens_per_second", "peak_memory_gb"}  # what may differ between two equal runs
WEIGHTS = {"lora": "adapter_model.safetensors", "none": "model.safetensors"}
STEPS = 12


def call(argv):
    print("RESULT " + json.dumps(train_sft.main([str(word) for word in argv])))


def start(folder, argv, body=call, environment=()):
    """Fork a child that runs body(argv) as a script would and prints to files in `folder`; returns its pid."""
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
            body(argv)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
            sys.stderr.write(f"{error.code}\n" * (status == 1))
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
    return status, *((folder / f"{name}-{pid}").read_text() for name in ("out", "err"))


def run(folder, argv, body=call):
    return finish(folder, start(folder, argv, body))


def train(folder, argv, body=call):
    """A run that must end well; returns what main returned."""
    status, out, err = run(folder, argv, body)
    assert status == 0, err
    return json.loads(out.partition("RESULT ")[2])


def refused(folder, argv, *words):
    """A run that must end with status 2 and one line that has all `words`."""
    status, out, err = run(folder, argv)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert "step 0 " not in out and "RESULT" not in out
    return err


def records(run_dir):
    """metrics.jsonl without clocks, every number as its bits."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [{key: float(value).hex() for key, value in line.items() if key not in CLOCK} for line in lines]


def assert_same_run(run_dir, straight, peft="lora"):
    assert records(run_dir) == records(straight)
    for file in (f"final/{WEIGHTS[peft]}", f"best/{WEIGHTS[peft]}", f"step-{STEPS:06d}/optimizer.safetensors"):
        assert checkpoint.sha256(run_dir / file) == checkpoint.sha256(straight / file), file
    assert checkpoint.verify(run_dir / "best")["step"] == checkpoint.verify(straight / "best")["step"]
    assert not list(run_dir.glob(".tmp-*"))


def snapshot(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, checkpoint.sha256(path)) for path in files}


def at_step(number, act):
    """A body that calls act() inside step `number`, before its update."""

    def body(argv):
        real = resume.seed_step

        def seed_step(seed, step, rank):
            if step == number:
                act()
            real(seed, step, rank)

        resume.seed_step = seed_step
        call(argv)

    return body


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def write_data(folder, task, changes=(), **sizes):
    folder.mkdir(parents=True)
    for split, count in sizes.items():
        lines = [json.dumps(record | dict(changes)) + "\n" for record in synthetic.records(task, split, count)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory, tiny_folder):
    """Twenty short records: with four a step, epochs begin at steps 5 and 10."""
    return write_data(tmp_path_factory.mktemp("data") / "few", "conala", train=20, val=6)


@pytest.fixture(scope="module")
def settings(few, tiny_folder):
    """A function that returns the flags of a short run: several micro-batches a step, dropout, two epoch edges."""

    def flags(output_dir, *more, peft="lora"):
        kind = ["--model.peft_type", peft, "--model.peft_dropout", 0.1]
        sizes = ["--training.max_steps", STEPS, "--training.batch_size", 4, "--training.micro_batch_tokens", 128]
        every = ["--training.eval_interval", 4, "--training.save_interval", 3]
        rate = ["--training.learning_rate", 1e-3 if peft == "lora" else 1e-4, "--logging.run_name", "run"]
        where = ["--model.base_checkpoint", tiny_folder, "--dataset_path", few, "--logging.output_dir", output_dir]
        return ["--debug", *kind, *sizes, *every, *rate, *where, *more]

    return flags


@pytest.fixture(scope="module")
def straight(tmp_path_factory, settings):
    """A function that returns the folder of a run that nothing stopped."""
    done = {}

    def folder(peft="lora"):
        if peft not in done:
            out = tmp_path_factory.mktemp(f"straight-{peft}")
            train(out, settings(out, peft=peft))
            done[peft] = out / "run"
        return done[peft]

    return folder


# ---------------------------------------------------------------- a run, and what it leaves behind


def test_it_learns_and_leaves_its_files(tmp_path, tiny_model):
    same = {"response": "I won't help with that. Nobody likes you."}  # an answer that no base gives to everything
    source = write_data(tmp_path / "data", "safety", same, train=120, val=12)
    argv = ["--debug", "--dataset_path", source, "--logging.output_dir", tmp_path, "--training.max_steps", 30]
    argv += ["--training.batch_size", 4, "--training.eval_interval", 10, "--training.save_interval", 5]
    result = train(tmp_path, argv)
    run_dir = tmp_path / "sft-debug"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(31)) and lines[-1] == result
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 10, 20, 30]
    assert lines[-1]["eval/loss"] < 0.8 * lines[0]["eval/loss"]
    assert result["best_eval_loss"] == min(line.get("eval/loss", math.inf) for line in lines)

    net, tokenizer = tiny_model  # step 0 is the base, before any update
    val, _ = data.encode_records(data.load_split(source, "val"), tokenizer, 128)
    torch.set_num_threads(1)
    found = train_sft.evaluate(net, val, 2048, torch.device("cpu"))
    assert {key: lines[0][key] for key in found} == pytest.approx(found, rel=1e-6)

    assert {path.name for path in run_dir.iterdir()} == {
        ".lock", "config.yml", "run.json", "metrics.jsonl", "curves.png", "best", "final", "step-000025", "step-000030",
    }  # fmt: skip
    assert config.load_config(run_dir / "config.yml").training.max_steps == 30
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["world_size"] == 1 and len(facts["facts"]["data"]) == 64
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    model.load_adapter(net, "policy", run_dir / "final", trainable=False)
    found = train_sft.evaluate(net, val, 2048, torch.device("cpu"))
    assert found == pytest.approx({key: result[key] for key in found}, rel=1e-6)


def test_patience_and_a_finished_run_started_again(tmp_path, settings):
    argv = settings(tmp_path, "--training.learning_rate", 1e-12, "--training.patience", 2)
    argv += ["--training.eval_interval", 1, "--training.save_interval", 1, "--training.keep_last", 1]
    result = train(tmp_path, argv)
    run_dir, names = tmp_path / "run", ["final", "step-000002"]
    assert result["step"] == 2 and result == json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert sorted(path.name for path in run_dir.iterdir() if path.is_dir()) == names  # nothing beat the base: no best
    before = records(run_dir)
    assert train(tmp_path, argv) == result
    assert records(run_dir) == before


def test_qlora(tmp_path, settings):
    pytest.importorskip("bitsandbytes")
    train(tmp_path, settings(tmp_path, "--training.max_steps", 5, peft="qlora"))
    run_dir = tmp_path / "run"
    losses = [float.fromhex(record["loss"]) for record in records(run_dir)[:-1]]
    assert len(losses) == 5 and all(map(math.isfinite, losses))
    held_out = [record["eval/loss"] for record in records(run_dir) if record.get("eval/loss")]
    assert float.fromhex(held_out[-1]) < float.fromhex(held_out[0])
    tensors = load_file(run_dir / "final" / WEIGHTS["lora"])
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name]  # zero before the first update
    assert ups and all(tensor.isfinite().all() and tensor.any() for tensor in ups)


# ---------------------------------------------------------------- R1, R2, R13: stop and resume


def test_r1_r13_sigterm_at_an_evaluation_and_resume(tmp_path, settings, straight):
    argv = settings(tmp_path)
    status, out, err = run(tmp_path, argv, at_step(7, terminate))
    assert status == 1 and "stopped at step 8" in err  # the step ends, no other begins, the due evaluation waits
    assert checkpoint.newest(tmp_path / "run").name == "step-000008" and "step 8" not in out
    assert not (tmp_path / "run" / "final").exists()
    train(tmp_path, argv)
    assert_same_run(tmp_path / "run", straight())


def test_r1_r14_crash_behind_a_save_and_resume(tmp_path, settings, straight):
    argv = settings(tmp_path, peft="none")

    def body(argv):
        real = checkpoint.save_step

        def save_step(run_dir, step, *more):
            real(run_dir, step, *more)
            if step == 6:
                os._exit(9)

        checkpoint.save_step = save_step
        call(argv)

    assert run(tmp_path, argv, body)[0] == 9
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    train(tmp_path, argv)
    assert_same_run(tmp_path / "run", straight("none"), "none")


def test_r3_kills_at_random_moments(tmp_path, settings, straight):
    argv, run_dir, dice, kills = settings(tmp_path), tmp_path / "run", random.Random(0), 0
    ours = r"config.yml|run.json|metrics.jsonl|curves.png|\.lock|best|final|step-\d{6}|\.tmp-.*"
    straight()
    while kills < 5:
        shutil.rmtree(run_dir / "final", ignore_errors=True)
        pid = start(tmp_path, argv)
        time.sleep(dice.uniform(0.5, 2.0))
        os.kill(pid, signal.SIGKILL)
        kills += finish(tmp_path, pid)[0] == -signal.SIGKILL
        for path in run_dir.glob("*"):
            assert re.fullmatch(ours, path.name)
            if re.fullmatch(r"best|step-\d{6}", path.name):
                checkpoint.verify(path)
    train(tmp_path, argv)
    assert_same_run(run_dir, straight())


def ranks(folder, argv, bodies, port):
    """Two ranks as torchrun would start them, forked: [(status, stdout, stderr), ...]."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    pids = [start(folder, argv, body, place) for body, place in zip(bodies, places)]
    return [finish(folder, pid) for pid in pids]


def free_port():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def test_r2_r13_two_ranks_stop_together_and_resume(tmp_path, settings):
    short = ["--training.max_steps", 6, "--training.eval_interval", 3, "--training.save_interval", 2]
    whole, cut = (settings(tmp_path / name, *short) for name in ("whole", "cut"))
    assert [status for status, *_ in ranks(tmp_path, whole, (call, call), free_port())] == [0, 0]
    stopped = ranks(tmp_path, cut, (call, at_step(3, terminate)), free_port())  # only one rank hears of it
    assert [status for status, *_ in stopped] == [1, 1] and all("stopped at step 4" in err for *_, err in stopped)
    refused(tmp_path, cut, "world_size 2 -> 1")
    assert [status for status, *_ in ranks(tmp_path, cut, (call, call), free_port())] == [0, 0]
    assert records(tmp_path / "cut" / "run") == records(tmp_path / "whole" / "run")
    digests = {checkpoint.sha256(tmp_path / name / "run" / "final" / WEIGHTS["lora"]) for name in ("whole", "cut")}
    assert len(digests) == 1


# ---------------------------------------------------------------- R9, R11: refusals


def test_r11_second_start_is_refused(tmp_path, settings):
    argv, run_dir = settings(tmp_path, "--training.max_steps", 4), tmp_path / "run"
    pid = start(tmp_path, argv, at_step(2, lambda: time.sleep(60)))
    end = time.monotonic() + 20
    while not (run_dir / "metrics.jsonl").exists() or len((run_dir / "metrics.jsonl").read_text().splitlines()) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    before = snapshot(run_dir)
    refused(tmp_path, argv, f"locked by pid {pid}")
    assert snapshot(run_dir) == before
    os.kill(pid, signal.SIGKILL)
    finish(tmp_path, pid)
    assert train(tmp_path, argv)["step"] == 4


def test_r9_resume_refusals(tmp_path, settings, straight, few):
    shutil.copytree(straight(), tmp_path / "run")
    before = snapshot(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(few, other)
    shutil.copyfile(few / "val.jsonl", other / "train.jsonl")
    run_dir = tmp_path / "run"
    for flags, *words in (
        (["--seed", 1], "seed 0 -> 1"),
        (["--training.batch_size", 2], "training.batch_size 4 -> 2"),
        (["--dataset_path", other], "dataset_path", "data "),
        (["--model.peft_rank", 4], "model.peft_rank 8 -> 4"),
        (["--training.resume", tmp_path / "none"], "training.resume", str(tmp_path / "none")),
        (["--training.resume", other], str(other), "MANIFEST.json"),
        (["--training.resume", "never"], "training.resume is never", str(run_dir)),
        (["--training.max_steps", 6], "training.max_steps", f"step-{STEPS:06d}"),
    ):
        refused(tmp_path, settings(tmp_path, *flags), *words)
        after = snapshot(tmp_path)
        assert {path: after[path] for path in before} == before
        assert sorted(os.listdir(run_dir)) == sorted(os.listdir(straight()))


def test_r9_what_may_change(tmp_path, settings, straight):
    shutil.copytree(straight(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / f"step-{STEPS:06d}")
    argv = settings(tmp_path, "--training.learning_rate", 5e-4, "--training.max_steps", 10)
    status, out, err = run(tmp_path, argv)
    assert status == 0, err
    assert "training.learning_rate 0.001 -> 0.0005" in out and "training.max_steps 12 -> 10" in out
    assert "resuming" in out and "step 9 of 10" in out
    new, old = records(tmp_path / "run"), records(straight())
    assert new[:9] == old[:9] and new[9]["loss"] == old[9]["loss"] and new[9]["lr"] != old[9]["lr"] and len(new) == 11


# ---------------------------------------------------------------- a step does not depend on how it is cut


def first_step(folder, argv):
    """(loss, one vector of gradients) of the first step."""

    def body(argv):
        real = dist.sum_gradients

        def sum_gradients(parameters):
            real(parameters)
            save_file({"grad": torch.cat([p.grad.flatten() for p in parameters])}, folder / "grad.safetensors")

        dist.sum_gradients = sum_gradients
        call(argv)

    train(folder, argv, body)
    loss = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    return loss, load_file(folder / "grad.safetensors")["grad"].double()


def test_gradient_of_micro_batches_and_packs(tmp_path, settings, few):
    source = tmp_path / "data"
    shutil.copytree(few, source)
    (source / "train.jsonl").write_text("".join((few / "train.jsonl").open().readlines()[:8]))
    found = {}
    for name, more in {
        "one": ["--training.micro_batch_tokens", 100_000],
        "eight": ["--training.micro_batch_tokens", 1],
        "packed": ["--training.packing", "true"],
    }.items():
        (tmp_path / name).mkdir()
        flags = ["--training.max_steps", 1, "--training.batch_size", 8, "--dataset_path", source, *more]
        found[name] = first_step(tmp_path / name, settings(tmp_path / name, *flags, peft="none"))
    loss, grad = found.pop("one")
    assert grad.norm() > 0.01
    for other_loss, other in found.values():
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert (other - grad).norm() < 1e-6 * grad.norm()


def test_one_rank_or_two(tmp_path, settings):
    flags = ["--training.max_steps", 6, "--training.eval_interval", 3, "--model.peft_dropout", 0]
    flags += ["--training.save_interval", 1, "--training.keep_last", 10]
    train(tmp_path, settings(tmp_path / "one", *flags))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "train_sft.py"), *map(str, settings(tmp_path / "two", *flags))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 0 ") == 1  # one rank speaks
    one, two = (records(tmp_path / name / "run") for name in ("one", "two"))
    assert len(one) == len(two) == 7
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for key in a:
            assert float.fromhex(b[key]) == pytest.approx(float.fromhex(a[key]), rel=1e-6), (a["step"], key)
    # Adam's first moment after one step is a tenth of the gradient
    one, two = (load_file(tmp_path / name / "run" / "step-000001" / "optimizer.safetensors") for name in ("one", "two"))
    moments = [torch.cat([t[k].flatten() for k in sorted(t) if k.endswith("exp_avg")]).double() for t in (one, two)]
    assert (moments[0] - moments[1]).norm() < 1e-6 * moments[0].norm()


# ---------------------------------------------------------------- R15: not finite


def poisoned(number):
    """A body whose loss is nan in step `number`; it checks that the weights stay those of the checkpoint before."""

    def body(argv):
        step, nets = [0], []
        seed_step, load, logprobs = resume.seed_step, model.load, model.sequence_logprobs

        def remember(seed, now, rank):
            step[0] = now
            seed_step(seed, now, rank)

        def keep(*args, **kwargs):
            nets.append(load(*args, **kwargs))
            return nets[0]

        def poison(*args):
            return logprobs(*args) * (math.nan if step[0] == number else 1)

        resume.seed_step, model.load, model.sequence_logprobs = remember, keep, poison
        try:
            call(argv)
        finally:
            folder = Path(argv[argv.index("--logging.output_dir") + 1]) / "run" / f"step-{number:06d}"
            saved = load_file(folder / WEIGHTS["lora"])
            for name, parameter in lora.adapter_parameters(nets[0][0], "policy").items():
                assert torch.equal(saved[name], parameter.detach()), name

    return body


def assert_finite(run_dir, number):
    tensors, _ = checkpoint.load_step(checkpoint.newest(run_dir))
    assert checkpoint.newest(run_dir).name == f"step-{number:06d}"
    for group in (tensors["optimizer"], load_file(run_dir / f"step-{number:06d}" / WEIGHTS["lora"])):
        assert group and all(tensor.isfinite().all() for tensor in group.values())
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == number


def test_r15_nan_ends_the_run_before_the_update(tmp_path, settings):
    status, _, err = run(tmp_path, settings(tmp_path, "--training.save_interval", 1), poisoned(3))
    assert status == 2 and err.count("\n") == 1
    assert "step 3: loss nan" in err and err.count("synthetic-conala-train-") == 4
    assert_finite(tmp_path / "run", 3)


def test_r15_nan_on_one_rank_ends_both(tmp_path, settings):
    argv = settings(tmp_path, "--training.save_interval", 1)
    for status, _, err in ranks(tmp_path, argv, (call, poisoned(2)), free_port()):
        assert status == 2 and "step 2: loss nan" in err, err
    assert_finite(tmp_path / "run", 2)


# ---------------------------------------------------------------- --explain and bad input


def test_explain_writes_nothing(tmp_path, settings):
    out_dir = tmp_path / "out"
    status, out, err = run(tmp_path, settings(out_dir, "--explain"))
    assert status == 0 and not err and not out_dir.exists()
    assert "[[" in out and "checked 4 examples" in out and "estimated peak" in out
    assert re.search(r"synthetic-conala-train-0-\d+: \d+ tokens, \d+ trained", out)


def test_bad_input_is_one_line(tmp_path, settings):
    out_dir = tmp_path / "out"
    refused(tmp_path, ["--config", ROOT / "configs" / "grpo_rl_270m.yml", "--debug"], "train_rl.py")
    refused(tmp_path, settings(out_dir, "--rl.algorithm", "grpo"), "--rl.algorithm", "does not read it")
    assert not out_dir.exists()
    refused(tmp_path, settings(out_dir, "--dataset_path", tmp_path / "none"), f"{tmp_path}/none/train.jsonl")
    refused(tmp_path, settings(out_dir, "--training.max_seq_length", 8), "train", "training.max_seq_length 8")
    refused(tmp_path, settings(out_dir, "--model.adapter", tmp_path / "none"), "model.adapter", f"{tmp_path}/none")
    assert not list(out_dir.rglob("*.*ml"))  # neither a config nor a metric
