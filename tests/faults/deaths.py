"""R10: a worker of `torchrun --max-restarts 1` dies by SIGKILL or exit 3 at a random step, and the run ends the same.

    python tests/faults/deaths.py 10            that many trials, one line each; exit status 1 unless all passed

Each trial is a real torchrun of train_sft.py on two ranks with the tiny base. One rank dies once, at a step drawn at
random; torchrun starts both again, they resume from the last save, and the final adapter must have the SHA-256 of a run
in which nobody died.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVES = 12, 3
LIMIT = 300  # seconds for one run: more is a hang

# what each worker runs: the script's main, and its death in the midst of a step of the first attempt
WORKER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
import train_sft
from common import resume
number, step, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
real = resume.seed_step
def seed_step(seed, now, rank):
    real(seed, now, rank)
    if (rank, now, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (number, step, "0"):
        print("died at step", now, flush=True)
        os.kill(os.getpid(), signal.SIGKILL) if how == "SIGKILL" else sys.exit(3)
resume.seed_step = seed_step
train_sft.main(sys.argv[4:])
"""


def launch(folder, name, rank=-1, step=-1, how="nothing"):
    """One torchrun -> (exit status, or None after LIMIT; its output; seconds)."""
    worker = folder / "worker.py"
    worker.write_text(WORKER.format(root=str(ROOT)))
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "1", str(worker)]
    words += [str(rank), str(step), how, "--debug", "--training.max_steps", str(STEPS), "--training.batch_size", "4"]
    words += ["--training.save_interval", str(SAVES), "--training.eval_interval", "6", "--model.peft_dropout", "0.1"]
    words += ["--training.timeout", "60", "--logging.output_dir", str(folder), "--logging.run_name", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    with open(folder / f"{name}.log", "w+") as log:
        agent = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        try:
            status = agent.wait(LIMIT)
        except subprocess.TimeoutExpired:
            agent.terminate()  # it ends its workers, by force after 30 s
            agent.wait()
            status = None
        log.seek(0)
        return status, log.read(), time.monotonic() - started


def trial(folder, number, expected):
    """One death -> (passed, seconds, what happened)."""
    from common import checkpoint

    dice, name = random.Random(number), f"trial-{number}"
    rank, step, how = dice.randrange(2), dice.randrange(1, STEPS), ("SIGKILL", "exit 3")[number % 2]
    status, text, seconds = launch(folder, name, rank, step, how)
    final = folder / name / "final" / "adapter_model.safetensors"
    last = f"resuming {folder / name} at step {step - step % SAVES} of {STEPS}"
    checks = {
        "it ended with status 0": status == 0,
        "the worker died": f"died at step {step}" in text,
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


def worker_deaths(trials=10, folder=None):
    """[(id, what, trials, passed, seconds, remark)] for the soak program's table."""
    from common import checkpoint

    folder = Path(folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    status, text, _ = launch(folder, "straight")
    assert status == 0, text[-2000:]
    expected = checkpoint.sha256(folder / "straight" / "final" / "adapter_model.safetensors")
    found = []
    for number in range(trials):
        found.append(trial(folder, number, expected))
        passed, seconds, remark = found[-1]
        print(f"trial {number}: {'passed' if passed else 'FAILED'} in {seconds:.0f} s, {remark}", flush=True)
    failed = [remark for passed, _, remark in found if not passed]
    seconds = time.monotonic() - started
    what = "a worker dies under torchrun --max-restarts 1: resumed, same SHA-256"
    return [("R10", what, trials, trials - len(failed), seconds, "; ".join(failed))]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    rows = worker_deaths(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
    for row in rows:
        print("{}: {}: {} trials, {} passed, {:.0f} s {}".format(*row))
    sys.exit(any(row[2] != row[3] for row in rows))
