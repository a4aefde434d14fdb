"""R10, R11, R12 with real launches of torchrun on two ranks: train_sft.py with the tiny base.

    python benchmarks/deaths.py 10            that many trials of R10; exit status 1 unless all held

R10: under --max-restarts 1 a rank dies once by SIGKILL or by exit 3, at a step drawn at random; torchrun starts both
again, they resume from the last save, and the final adapter has the SHA-256 of a run in which nobody died.
R11: torchrun itself is killed, its workers go on; the same command is refused, naming the pid, and goes on after them.
R12: a rank hangs; the run ends soon after training.timeout.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVES = 12, 3
LIMIT = 300  # seconds for one run: more is a hang

# what each worker runs: the script's main, and what befalls one rank in the midst of a step of the first attempt
WORKER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
import train_sft
from common.runtime import resume
number, step, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
real = resume.seed_step
def seed_step(seed, now, rank):
    real(seed, now, rank)
    time.sleep(2 * (how == "slow"))
    if (rank, now, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (number, step, "0"):
        print(how, "at step", now, flush=True)
        while how == "hang":
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGKILL) if how == "SIGKILL" else sys.exit(3)
resume.seed_step = seed_step
train_sft.main(sys.argv[4:])
"""


def start(folder, name, rank=-1, step=-1, how="nothing", *more):
    """A torchrun that writes into folder/name.log."""
    worker = folder / "worker.py"
    worker.write_text(WORKER.format(root=str(ROOT)))
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "1", str(worker)]
    words += [str(rank), str(step), how, "--debug", "--training.max_steps", str(STEPS), "--training.batch_size", "4"]
    words += ["--training.save_interval", str(SAVES), "--training.eval_interval", "6", "--model.peft_dropout", "0.1"]
    words += ["--training.timeout", "60", "--logging.output_dir", str(folder), "--logging.run_name", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen([*words, *map(str, more)], stdout=log, stderr=log, env=environment)


def finish(agent, folder, name):
    """-> (exit status, or None after LIMIT; what it wrote)."""
    try:
        status = agent.wait(LIMIT)
    except subprocess.TimeoutExpired:
        agent.terminate()  # it ends its workers, by force after 30 s
        agent.wait()
        status = None
    return status, (folder / f"{name}.log").read_text()


def trial(folder, number, expected):
    """One death -> (passed, seconds, what happened)."""
    from common.runtime import checkpoint

    dice, name = random.Random(number), f"trial-{number}"
    rank, step, how = dice.randrange(2), dice.randrange(1, STEPS), ("SIGKILL", "exit 3")[number % 2]
    started = time.monotonic()
    status, text = finish(start(folder, name, rank, step, how), folder, name)
    seconds = time.monotonic() - started
    final = folder / name / "final" / "adapter_model.safetensors"
    last = f"resuming {folder / name} at step {step - step % SAVES} of {STEPS}"
    checks = {
        "it ended with status 0": status == 0,
        "the worker died": f"{how} at step {step}" in text,
        f"it said: {last}": step < SAVES or last in text,
        "same SHA-256": final.exists() and checkpoint.sha256(final) == expected,
    }
    wrong = [words for words, held in checks.items() if not held]
    about = f"rank {rank}, {how}, step {step}"
    if wrong:
        tail = " | ".join(text.strip().splitlines()[-3:])[-300:]
        return False, seconds, f"{about}: not: {'; '.join(wrong)}; status {status}: {tail}"
    shutil.rmtree(folder / name)
    return True, seconds, about


def straight(folder):
    """The SHA-256 that a run in which nothing happens ends with."""
    from common.runtime import checkpoint

    status, text = finish(start(folder, "straight"), folder, "straight")
    assert status == 0, text[-2000:]
    return checkpoint.sha256(folder / "straight" / "final" / "adapter_model.safetensors")


def worker_deaths(trials=10, folder=None):
    """[(id, what, trials, passed, seconds, remark)] for the soak program's table."""
    folder = Path(folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    started, found = time.monotonic(), []
    expected = straight(folder)
    for number in range(trials):
        found.append(trial(folder, number, expected))
        passed, seconds, remark = found[-1]
        print(f"trial {number}: {'passed' if passed else 'FAILED'} in {seconds:.0f} s, {remark}", flush=True)
    failed = [remark for passed, _, remark in found if not passed]
    what = "a worker dies under torchrun --max-restarts 1: resumed, same SHA-256"
    seconds = time.monotonic() - started
    return [("R10", what, trials, trials - len(failed), seconds, "; ".join(failed)), orphans(folder), hang(folder)]


def orphans(folder):
    """R11 -> a row as of worker_deaths."""
    name, more = "orphans", ("--training.max_steps", 60, "--logging.run_name", "orphans")
    started, log = time.monotonic(), folder / name / "metrics.jsonl"
    agent = start(folder, name, -1, -1, "slow", *more)
    while not (log.exists() and log.read_text().count("\n") > 1):
        assert agent.poll() is None and time.monotonic() < started + LIMIT
        time.sleep(0.1)
    owner = Path("/proc") / (folder / name / ".lock").read_text()
    agent.kill()
    agent.wait()
    killed = time.monotonic()
    status, text = finish(start(folder, "again", -1, -1, "nothing", *more), folder, "again")
    seconds, alive, ended = time.monotonic() - killed, owner.exists(), time.monotonic()
    if alive:
        os.kill(int(owner.name), signal.SIGTERM)  # it saves; the other one stops with it
    while owner.exists() and time.monotonic() < ended + LIMIT:
        time.sleep(0.1)
    last, words = finish(start(folder, "last", -1, -1, "nothing", *more), folder, "last")
    held = alive and status == 1 and f"is locked by pid {owner.name}" in text and last == 0 and "resuming" in words
    remark = f"refused {seconds:.0f} s after torchrun was started" if held else (text + words)[-600:]
    what = "torchrun killed, its workers go on: a new start is refused, and goes on after them"
    return "R11", what, 1, int(held), time.monotonic() - started, remark


def hang(folder, timeout=10):
    """R12 -> a row as of worker_deaths."""
    started, name = time.monotonic(), "hang"
    agent = start(folder, name, 1, 5, "hang", "--training.timeout", timeout)
    log = folder / f"{name}.log"
    while "hang at step 5" not in log.read_text():
        assert agent.poll() is None and time.monotonic() < started + LIMIT
        time.sleep(0.1)
    hung = time.monotonic()
    while "rank 1 hangs or is busy" not in log.read_text() and time.monotonic() < hung + LIMIT:
        time.sleep(0.1)
    noticed = time.monotonic() - hung
    status, text = finish(agent, folder, name)  # the second attempt goes on
    held = noticed < timeout + 5 and status == 0 and f"resuming {folder / name} at step 3" in text
    remark = f"noticed after {noticed:.1f} s of a timeout of {timeout} s" + ("" if held else f": {text[-300:]}")
    what = "a rank hangs under torchrun --max-restarts 1: named, ended, resumed"
    return "R12", what, 1, int(held), time.monotonic() - started, remark


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    rows = worker_deaths(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
    for row in rows:
        print("{}: {}: {} trials, {} passed, {:.0f} s {}".format(*row))
    sys.exit(any(row[2] != row[3] for row in rows))
