"""Proof that a refactor changed no bit: the same short runs with the old and the new code, on this machine.

    python benchmarks/oracle.py OLD_COMMIT                  about 20 runs of the tiny base, two processes at a time
    python benchmarks/oracle.py OLD_COMMIT --resume         also: begun by the old code, finished by the new one
    python benchmarks/oracle.py OLD_COMMIT --only 'grpo|ppo'

The old code is checked out into a temporary git worktree; the new code is the working tree this file stands in.
Both sides train from the tiny base that the old code resolves, on the same few records. Equal means: every number of
every record (metrics, samples, held-out answers, report) and every file of final/ is the same to the bit. Left out are
the fields of time, speed and memory, and the order of the keys of state.json. The exit status is 1 if a row differs.

Nothing is recorded in the repository, as bits differ between processors. What the old code left is kept in the user's
cache under its commit, so a second comparison runs only the new side; --fresh runs it again. Of the code, this file
needs main(argv) of three scripts, base.resolve and tasks.records (of an older commit: synthetic.records). Not
compared: CUDA, QLoRA, trained rewards.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SLOTS, LIMIT = 2, 300  # processes at a time; seconds after which one is ended
RECORDS = ("metrics.jsonl", "samples.jsonl", "held_out.jsonl", "report.json")
CLOCK = re.compile("seconds(_.*)?|reference_seconds|(tokens|pairs)_per_second|peak_memory_gb")

# ---------------------------------------------------------------- what is run; step 5 begins a second epoch

EVERY = "--debug --model.base_checkpoint BASE --dataset_path DATA --logging.output_dir . --logging.run_name run "
EVERY += "--model.peft_dropout 0.1 --training.batch_size 4 --training.micro_batch_tokens 256 --training.max_steps 6 "
EVERY += "--training.eval_interval 3 --training.save_interval 2 --training.keep_last 9 "
RL = "--training.mode rl --rl.max_steps null --reward.type heuristic --rl.group_size 4 --rl.max_new_tokens 24 "
DPO = RL + "--rl.algorithm dpo "
ONLINE = RL + "--rl.rollout_size 4 --evaluation.max_items 5 --evaluation.max_new_tokens 16 --evaluation.draws 100 "
GRPO = ONLINE + "--rl.algorithm grpo --rl.minibatches 1 "
SEVERAL = ONLINE + "--rl.algorithm grpo --rl.minibatches 2 --rl.num_ppo_epochs 2 "
PPO = ONLINE + "--rl.algorithm ppo --rl.critic_warmup 0 "
ALL_WEIGHTS = "--model.peft_type none --training.learning_rate 1e-4 "
RL_ALL_WEIGHTS = ALL_WEIGHTS + "--rl.learning_rate 1e-4 "
RUNS = {  # name: (script, flags behind EVERY, numbers of ranks)
    "sft-lora": ("train_sft", "", (1, 2)),
    "sft-all-weights": ("train_sft", ALL_WEIGHTS, (1,)),
    "sft-packing": ("train_sft", "--training.packing true ", (1,)),
    "reward": ("train_reward", "--training.mode reward ", (1, 2)),
    "dpo-lora": ("train_rl", DPO, (1, 2)),
    "dpo-all-weights": ("train_rl", DPO + RL_ALL_WEIGHTS, (1,)),
    "dpo-sft-term": ("train_rl", DPO + "--rl.dpo_sft_coeff 0.5 ", (1,)),
    "dpo-sampled-pairs": ("train_rl", DPO + "--rl.pairs sampled ", (1, 2)),
    "grpo-one-update": ("train_rl", GRPO, (1, 2)),
    "grpo-several-updates": ("train_rl", SEVERAL, (1, 2)),
    "grpo-all-weights": ("train_rl", GRPO + RL_ALL_WEIGHTS, (1,)),
    "grpo-no-kl": ("train_rl", GRPO + "--rl.kl_coef 0 ", (1,)),
    "grpo-entropy": ("train_rl", GRPO + "--rl.entropy_coeff 0.01 ", (1,)),
    "grpo-dynamic-sampling": ("train_rl", GRPO + "--rl.dynamic_sampling true ", (1,)),
    "grpo-mask-truncated": ("train_rl", GRPO + "--rl.mask_truncated true ", (1,)),
    "ppo-one-minibatch": ("train_rl", PPO + "--rl.minibatches 1 ", (1,)),
    "ppo-two-minibatches": ("train_rl", PPO + "--rl.minibatches 2 ", (1, 2)),
    "ppo-critic-warmup": ("train_rl", PPO + "--rl.minibatches 2 --rl.critic_warmup 2 ", (1,)),
}
RESUMED, HALF = ("sft-lora", "reward", "grpo-several-updates", "ppo-two-minibatches", "dpo-lora"), 4


def make_jobs(pattern):
    jobs = []
    for name, (script, flags, numbers) in RUNS.items():
        for ranks in numbers:
            full_name = name if ranks == 1 else f"{name}-{ranks}-ranks"
            jobs.append({"name": full_name, "script": script, "argv": (EVERY + flags).split(), "ranks": ranks})
    return [job for job in jobs if re.search(pattern, job["name"])]


# ---------------------------------------------------------------- one side: a process that imports its code once


def work(root, plan_file):
    """Import the code at `root`, write what it says of base and data, and run the plan's jobs in forked children.

    A job of two ranks gets the environment that torchrun would give it.
    """
    sys.path[0] = root
    import matplotlib.pyplot
    import torch

    import train_reward
    import train_rl
    import train_sft

    base = importlib.import_module(module_name(root, "base"))
    records = importlib.import_module(module_name(root, "synthetic") or "common.tasks").records

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    mains = {module.__name__: module.main for module in (train_sft, train_reward, train_rl)}
    plan = json.loads(Path(plan_file).read_text())
    names = [(task, split) for task in ("safety", "clinical", "conala") for split in ("train", "val")]
    rows = {f"{task}/{split}": records(task, split, 100, 0) for task, split in names}
    folder = Path(base.resolve("tiny"))
    setup = {"base": str(folder), "base files": hashes(folder), "data": {key: digest(rows[key]) for key in rows}}
    if not Path(plan["data"]).exists():
        Path(plan["data"]).mkdir(parents=True)
        for split, count in (("train", 20), ("val", 6)):
            lines = [json.dumps(row) + "\n" for row in rows[f"safety/{split}"][:count]]
            Path(plan["data"], f"{split}.jsonl").write_text("".join(lines))
    Path(plan["setup"]).write_text(json.dumps(setup))

    places = {"BASE": plan["base"] or setup["base"], "DATA": plan["data"]}
    waiting, running, started = plan["jobs"], {}, time.perf_counter()
    while waiting or running:
        while waiting and len(running) + waiting[0]["ranks"] <= SLOTS:
            job = waiting.pop(0)
            job["argv"] = [places.get(word, word) for word in job["argv"]]
            job["left"], job["status"] = job["ranks"], 0
            with socket.socket() as door:
                door.bind(("127.0.0.1", 0))
                port = door.getsockname()[1]
            for rank in range(job["ranks"]):
                running[run_rank(mains[job["script"]], job, rank, port)] = job
        pid, status = os.wait()
        job = running.pop(pid)
        job["left"], job["status"] = job["left"] - 1, job["status"] or status
        if not job["left"]:
            Path(job["folder"], "status").write_text(str(job["status"]))
            print(f"  {time.perf_counter() - started:4.0f} s  {job['name']}", flush=True)


def module_name(root, name):
    """The dotted name of a module of `common`, in whichever folder the code at `root` has it; "" where it has none."""
    path = next(Path(root, "common").rglob(f"{name}.py"), None)
    return ".".join(path.relative_to(root).with_suffix("").parts) if path else ""


def run_rank(main, job, rank, port):
    """Fork one rank of a job; returns its pid. Its folder is its working folder and holds its cache and its output."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(LIMIT)
        os.chdir(job["folder"])
        os.environ["GEMMA_ALIGNMENT_CACHE"] = f"{job['folder']}/cache"  # no reference or pair of another run
        if job["ranks"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), number)
        main(job["argv"])
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_side(root, title, jobs, plan_file, **plan):
    """Run `jobs` with the code at `root`, in a process of its own; returns what it says of base and data."""
    print(f"{title}: {len(jobs)} runs", file=sys.stderr)
    for job in jobs:
        Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    plan_file.write_text(json.dumps({**plan, "jobs": jobs}))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, __file__, "--worker", str(root), str(plan_file)]
    if subprocess.run(words, env=environment, stdout=sys.stderr, check=False).returncode:
        sys.exit(f"{title} could not be run")
    return json.loads(Path(plan["setup"]).read_text())


# ---------------------------------------------------------------- comparison


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hashes(folder):
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def without_clock(value):
    if isinstance(value, list):
        return [without_clock(part) for part in value]
    if isinstance(value, dict):
        return {key: without_clock(part) for key, part in value.items() if not CLOCK.fullmatch(key)}
    return value


def compare_fields(old, new):
    """What differs between two dicts, in words. As JSON text, so that 0.0 and -0.0, or 1 and 1.0, are not equal."""
    words = [f"{key} only in old" for key in old if key not in new]
    words += [f"{key} only in new" for key in new if key not in old]
    for key in [key for key in old if key in new]:
        before, after = (json.dumps(side[key]) for side in (old, new))
        if before != after:
            words.append(f"{key} {before:.60} -> {after:.60}")
    return words


def read_records(path):
    """The records of a JSONL file, or the one of a JSON file, without the fields of time, speed and memory."""
    text = path.read_bytes()
    return [without_clock(json.loads(row)) for row in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def compare_records(path_old, path_new):
    """The first record that differs, in words, and how many others do; None if none does."""
    exist = [path.exists() for path in (path_old, path_new)]
    if exist != [True, True]:
        return f"{path_old.name} only in {'old' if exist[0] else 'new'}" if any(exist) else None
    old, new = read_records(path_old), read_records(path_new)
    found = [(i, words) for i in range(min(len(old), len(new))) if (words := compare_fields(old[i], new[i]))]
    text = f"{path_old.name}: {len(old)} -> {len(new)} records; " if len(old) != len(new) else ""
    if found:
        number, words = found[0]
        where = f" step {old[number]['step']}" if "step" in old[number] else ""
        rest = f" (and {len(words) - 3} more fields)" if len(words) > 3 else ""
        text += f"{path_old.name}{where}: {', '.join(words[:3])}{rest}; {len(found)} of {len(old)} records differ"
    return text.removesuffix("; ") or None


def compare_final(old, new):
    """What differs between two final/ folders: by SHA-256, but state.json by its values, in any order of the keys.

    The manifest's own hash of state.json differs with the order, so it is compared without that entry.
    """
    changed = compare_fields(hashes(old), hashes(new))
    shown = [words if " only in " in words else words.split()[0] for words in changed]
    for name in [name for name in ("state.json", "MANIFEST.json") if name in shown]:
        before, after = (json.loads((folder / name).read_bytes()) for folder in (old, new))
        for manifest in (before, after):
            manifest.pop("sha256", None)
            manifest.get("files", {}).pop("state.json", None)
        shown.remove(name)
        shown += [f"{name}: {words}" for words in compare_fields(before, after)]
    return shown


def compare_runs(folder_old, folder_new):
    """What differs between two runs' folders, as a list of words."""
    for side, folder in (("old", folder_old), ("new", folder_new)):
        if (folder / "status").read_text() != "0":
            lines = [line for path in sorted(folder.glob("err-*")) for line in path.read_text().splitlines()]
            return [f"{side} failed: {(lines or ['no message'])[-1]:.200}"]
    old, new = folder_old / "run", folder_new / "run"
    found = [compare_records(old / name, new / name) for name in RECORDS]
    if not (old / "final").is_dir():
        found.append("old wrote no final/")
    changed = compare_final(old / "final", new / "final")
    if changed:
        found.append("final/: " + ", ".join(changed))
    return [words for words in found if words]


# ---------------------------------------------------------------- both sides


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def run_old(commit, jobs, kept, scratch):
    """Run those jobs of the old code that are not in the cache `kept`, and put what succeeded there."""
    setup = kept / "setup.json"
    if setup.exists() and not Path(json.loads(setup.read_text())["base"]).is_dir():
        shutil.rmtree(kept)  # the base was deleted
    missing = [job for job in jobs if not (kept / job["key"]).exists()]
    if missing or not setup.exists():
        kept.mkdir(parents=True, exist_ok=True)
        git("worktree", "add", "--detach", str(scratch / "code"), commit)
        try:
            todo = [job | {"folder": str(scratch / "old" / job["name"])} for job in missing]
            where = {"setup": str(setup), "data": str(kept / "data"), "base": None}
            run_side(scratch / "code", f"old code, {commit[:9]}", todo, scratch / "old.json", **where)
        finally:
            git("worktree", "remove", "--force", str(scratch / "code"))
        for job in todo:
            folder = Path(job["folder"])
            if (folder / "status").read_text() == "0":
                if job["name"] not in RESUMED:  # step folders are needed only there
                    for path in [*folder.glob("run/step-*"), folder / "run" / "best"]:
                        shutil.rmtree(path, ignore_errors=True)
                os.rename(folder, kept / job["key"])
    stays = {job["name"]: kept / job["key"] for job in jobs}
    folders = {name: path if path.exists() else scratch / "old" / name for name, path in stays.items()}
    return folders, json.loads(setup.read_text())


def half_a_run(source, folder):
    """Copy a whole run's folder as it was when step HALF had been saved."""
    shutil.copytree(
        source / "run", folder / "run", ignore=shutil.ignore_patterns("final", "best", "report.json", ".lock")
    )
    for path in (folder / "run").glob("step-*"):
        if int(path.name[5:]) > HALF:
            shutil.rmtree(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old_commit")
    parser.add_argument("--only", default="", metavar="PATTERN", help="runs whose name matches this regular expression")
    parser.add_argument("--resume", action="store_true", help="also finish by the new code what the old code began")
    parser.add_argument("--fresh", action="store_true", help="ignore what an earlier comparison kept of the old code")
    args = parser.parse_args()
    started, commit = time.perf_counter(), git("rev-parse", "--verify", f"{args.old_commit}^{{commit}}")
    cache = Path(os.environ.get("GEMMA_ALIGNMENT_CACHE", "~/.cache/gemma-alignment")).expanduser().resolve() / "oracle"
    versions = [platform.python_version(), *(version(name) for name in ("torch", "transformers", "numpy"))]
    kept = cache / f"{commit[:12]}-{digest(versions)[:6]}"
    jobs = make_jobs(args.only)
    for job in jobs:
        job["key"] = f"{job['name']}-{digest(job)[:10]}"
    if args.fresh:
        shutil.rmtree(kept, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="work-") as name:
        scratch = Path(name)
        old, setup = run_old(commit, jobs, kept, scratch)
        todo = [job | {"folder": str(scratch / "new" / job["name"])} for job in jobs]
        pairs = [(job["name"], old[job["name"]], Path(job["folder"])) for job in todo]
        for job in jobs if args.resume else ():
            source, folder = old[job["name"]], scratch / "new" / f"{job['name']}-resumed"
            if job["name"] in RESUMED and (source / "status").read_text() == "0":
                half_a_run(source, folder)
                todo.append(job | {"name": folder.name, "folder": str(folder)})
                pairs.append((folder.name, source, folder))
        where = {"setup": str(scratch / "setup.json"), "data": str(kept / "data"), "base": setup["base"]}
        now = run_side(ROOT, "new code, the working tree", todo, scratch / "new.json", **where)
        parts = [compare_fields(setup[name], now[name]) for name in ("base files", "data")]
        table = [("tiny base, embedded data", [words for part in parts for words in part])]
        table += [(name, compare_runs(before, after)) for name, before, after in pairs]
    different = sum(bool(words) for _, words in table)
    print(f"| run | {commit[:9]} against the working tree |\n|---|---|")
    for name, words in table:
        print(f"| {name} | {'; '.join(words).replace('|', '/') or 'equal'} |")
    print(f"\n{len(table)} rows, {different} differ; {time.perf_counter() - started:.0f} s")
    return int(different > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        sys.exit(main())
