"""The long forms of the fault tests: many kills, signals, flips and hostile inputs, drawn at random; prints one table.

    python benchmarks/soak.py [--trials 50] [--only R03,R07] [--seed 0] > benchmarks/soak.md

A row of tests/faults/ proves its pass line once, in seconds; here the same line has to hold in every one of many trials
whose moments, places and texts are random. Runs are those of the tiny base, forked from this process. Progress and what
went wrong are printed to stderr. Nothing is left behind; exit status 1 if a row failed.
"""

import argparse
import contextlib
import ctypes
import hashlib
import itertools
import os
import platform
import random
import re
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from benchmarks import deaths, soak_clients  # noqa: E402
from common import config, data, log, model, rewards, tasks  # noqa: E402
from common.human import study  # noqa: E402
from common.log import UserError  # noqa: E402
from common.runtime import base, checkpoint  # noqa: E402
from tests import checks, inputs, processes  # noqa: E402
from tests.faults import children, inject, test_hostile, trainers  # noqa: E402

PAD = 50 * 2**20  # bytes beside every save, so that it takes long enough to be hit
EVERY, LAST = 3, f"step-{inputs.STEPS:06d}"  # training.save_interval, the last step


# ---------------------------------------------------------------- the bench: runs that nothing stopped, and trials


class Bench:
    """Folders, data and undisturbed runs, each made once."""

    def __init__(self, folder, tiny, seed):
        self.folder, self.base, self.dice = folder, tiny, random.Random(seed)
        self.made, self.count = {}, 0

    def new(self):
        self.count += 1
        path = self.folder / f"{self.count}"
        path.mkdir()
        return path

    def flags(self, kind):
        """(output folder, *more) -> the flags of a run, or of the stages of `staged`."""
        source = self.folder / f"data-{kind}"
        if not source.exists():
            trainers.write_data(source, kind)
        return trainers.settings(kind, self.base, source)

    def whole(self, kind, body=processes.call):
        """(folder of a run that nothing stopped, seconds that it takes)."""
        if (kind, body) not in self.made:
            out, started = self.new(), time.monotonic()
            processes.train(trainers.main_of(kind), out, self.flags(kind)(out), body)
            self.made[kind, body] = out, time.monotonic() - started
        return self.made[kind, body]


def trials(count, one, *arguments):
    """(trials, those that passed, remark) of one(number, *arguments), which raises where the row does not hold."""
    passed, said = 0, []
    for number in range(count):
        try:
            said.append(one(number, *arguments))
            passed += 1
        except Exception:
            traceback.print_exc()
        print(f"\r{number + 1}/{count}, {passed} passed ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return count, passed, said


def padded(main, argv):
    """A body whose saves take longer."""
    real = checkpoint.new_step

    @contextlib.contextmanager
    def new_step(*args):
        with real(*args) as folder:
            yield folder
            save_file({"x": torch.zeros(PAD // 4)}, folder / "padding.safetensors")

    checkpoint.new_step = new_step
    processes.call(main, argv)


def signalled(bench, kind, numbers, body, share, pause=0.2):
    """Start a run and send it signals, `pause` seconds apart -> (folder, status, out, err, seconds).

    The first comes behind `share` of the time that the undisturbed run took. A run that ends before says how long runs
    take now: the machine may have become faster.
    """
    out = bench.new()
    pid, started = processes.start(trainers.main_of(kind), out, bench.flags(kind)(out), body), time.monotonic()
    whole, seconds = bench.whole(kind, body) if (kind, body) in bench.made else bench.whole(kind)
    while time.monotonic() < started + share * seconds:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            bench.made[kind, body] = whole, time.monotonic() - started
            break
        time.sleep(0.002)
    for at, number in enumerate(numbers):
        time.sleep(pause if at else 0)
        os.kill(pid, number)  # a run that has ended waits for us, so the number is still its own
    sent = time.monotonic()
    return out, *processes.finish(out, pid), time.monotonic() - sent


def resume(bench, kind, out, body=processes.call):
    """Run the same command again; returns what it printed. It must go on at the newest whole checkpoint."""
    run_dir = out / "run"
    steps = sorted(run_dir.glob("step-*"))
    for folder in (*steps, *run_dir.glob("best"), *run_dir.glob("final")):
        checkpoint.verify(folder)  # what bears its final name is whole
    status, said, err = processes.run(trainers.main_of(kind), out, bench.flags(kind)(out), body)
    assert status == 0 and not err, (status, err)
    if steps:
        assert f"resuming {run_dir} at step {int(steps[-1].name[5:])} of" in said, said
    return said


def logged(run_dir):
    """Steps whose record was written."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same(run_dir, whole):
    checks.assert_same_run(run_dir, whole)
    trainers.same_files(run_dir, whole)


# ---------------------------------------------------------------- rows: kills and signals


def kill(number, bench, kind):
    """One SIGKILL at a uniformly random moment; True if it hit a save."""
    whole, _ = bench.whole(kind, padded)
    status = 0
    while status != -signal.SIGKILL:  # it may have come to its end before
        out, status, *_ = signalled(bench, kind, [signal.SIGKILL], padded, bench.dice.uniform(0, 1))
    run_dir = out / "run"
    hit = bool([*run_dir.glob(".tmp-*")])
    saved = max((int(path.name[5:]) for path in run_dir.glob("step-*")), default=0)
    assert logged(run_dir) - saved <= EVERY, (logged(run_dir), saved)
    resume(bench, kind, out, padded)
    assert_same(run_dir, whole / "run")
    shutil.rmtree(out)
    return hit, bool(saved)


def r03(bench, count, kind):
    total, passed, said = trials(count, kill, bench, kind)
    hits, late = (sum(column) for column in zip(*said)) if said else (0, 0)
    remark = f"{hits} kills hit a save, {late} came behind the first checkpoint"
    if kind == "sft" and count >= 50 and hits < 15:
        return total, 0, f"{remark}: too few hits"
    return total, passed, remark


def staged(number, bench):
    """One SIGKILL in any stage of train_staged.py."""
    whole, _ = bench.whole("staged")
    status = 0
    while status != -signal.SIGKILL:
        out, status, *_ = signalled(bench, "staged", [signal.SIGKILL], processes.call, bench.dice.uniform(0, 1))
    where = sum((out / "run" / name / "final").exists() for name in ("sft", "rl"))
    processes.train(trainers.main_of("staged"), out, bench.flags("staged")(out))
    for name in ("sft", "rl"):
        checks.assert_same_run(out / "run" / name, whole / "run" / name)
    assert not [*(out / "run").rglob(".tmp-*")]
    shutil.rmtree(out)
    return where


def r03_staged(bench, count):
    total, passed, said = trials(count, staged, bench)
    return total, passed, f"{said.count(0)} in SFT, {said.count(1)} in RL, {said.count(2)} behind both"


def r04(bench, count):
    """Every call that makes something durable, from the first to the last."""
    flags = bench.flags("sft")
    short = ["--training.max_steps", 2, "--training.save_interval", 1, "--training.eval_interval", 1]
    main, whole, out = trainers.main_of("sft"), bench.new(), bench.new()
    processes.train(main, whole, flags(whole / "out", *short), inject.dying(10**9))

    def one(number):
        argv = flags(out / f"{number}", *short)
        assert processes.run(main, out, argv, inject.dying(number + 1))[0] == 9
        processes.train(main, out, argv)
        checks.assert_same_run(out / f"{number}" / "run", whole / "out" / "run")
        shutil.rmtree(out / f"{number}")

    total, passed, _ = trials(int((whole / "calls").read_text()), one)
    return total, passed, "every rename, replace and fsync of a run, then the same command again"


def stop(number, bench, kind, taken):
    """SIGTERM or SIGINT at a random moment of the loop: the step ends, it saves, and goes on bit for bit."""
    whole, _ = bench.whole(kind)
    status = 0
    while status != 1:  # before the loop or behind it there is nothing to save
        numbers = [bench.dice.choice([signal.SIGTERM, signal.SIGINT])]
        out, status, _, err, took = signalled(bench, kind, numbers, processes.call, bench.dice.uniform(0.2, 1))
    step = int(re.search(r"stopped at step (\d+) of 12, saved; run the same command again", err)[1])
    assert checkpoint.newest(out / "run").name == f"step-{step:06d}" and logged(out / "run") == step
    resume(bench, kind, out)
    assert_same(out / "run", whole / "run")
    shutil.rmtree(out)
    taken.append(took)


def r13(bench, count, kind):
    taken = []
    total, passed, _ = trials(count, stop, bench, kind, taken)
    return total, passed, f"{statistics.median(taken or [0]):.2f} s to the exit, at most {max(taken, default=0):.2f}"


def without_the_lock():
    """One call of many seconds that runs no Python, like a backward pass of a large model."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 60_000_000)


def twice(number, bench, taken):
    """The second signal ends a run whose step takes long."""
    numbers = [bench.dice.choice([signal.SIGTERM, signal.SIGINT]) for _ in range(2)]
    long = bench.dice.choice([lambda: time.sleep(30), without_the_lock])
    body, pause = inject.at_step(0, long), bench.dice.uniform(0.05, 1.5)
    bench.whole("sft")
    *_, status, _, err, took = signalled(bench, "sft", numbers, body, 2, pause)  # by then it sleeps
    assert status == 128 + numbers[1] and took <= 1, (status, took, err)
    taken.append(took)


def r13_twice(bench, count):
    taken = []
    total, passed, _ = trials(count, twice, bench, taken)
    return total, passed, f"at most {max(taken, default=9):.2f} s to the exit, of 1 s allowed"


def r10(bench, count):
    """Deaths of torchrun's workers."""
    with contextlib.redirect_stdout(sys.stderr):
        return deaths.worker_deaths(count, bench.new())


def locked(number, bench, taken):
    """A run folder that another process holds is refused at once."""
    run_dir = bench.new() / "run"
    ready = run_dir.parent / "held"
    pid = children.spawn(lambda: (checkpoint.lock_run(run_dir), ready.touch(), time.sleep(60)))
    try:
        children.wait_for(ready)
        started = time.monotonic()
        try:
            checkpoint.lock_run(run_dir)
            raise AssertionError("two hold the lock")
        except UserError as error:
            assert f"locked by pid {pid}" in str(error)
        taken.append(time.monotonic() - started)
        assert taken[-1] < 1, taken[-1]
    finally:
        os.kill(pid, signal.SIGKILL)
        children.wait(pid)


def r11(bench, count):
    taken = []
    total, passed, _ = trials(count, locked, bench, taken)
    return total, passed, f"refused in at most {max(taken, default=9):.3f} s, of 1 s allowed"


# ---------------------------------------------------------------- rows: disks and damage


def on_small_disk(folder, size, extra):
    """A body whose run folder is a tmpfs of `size` bytes that only the child sees, and whose model files are larger."""

    def body(main, argv):
        libc = ctypes.CDLL(None, use_errno=True)
        new_mount, new_user, private = 0x20000, 0x10000000, 0x44000
        for flags in (new_mount, new_mount | new_user):
            if libc.unshare(flags) == 0:
                break
        libc.mount(None, b"/", None, private, None)
        if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()):
            raise SystemExit(77)
        return limited(folder, extra, main, argv)

    return body


def limited(folder, extra, main, argv):
    """Run until the disk is full, free it, look at what is left, and go on to the end."""
    real, freed = checkpoint.new_step, []

    @contextlib.contextmanager
    def new_step(run_dir, step, *more):
        with real(run_dir, step, *more) as temp:
            if step >= 2 * EVERY and not freed:  # not in the space that is checked before
                (temp / "more.bin").write_bytes(bytes(extra))
            yield temp

    checkpoint.new_step = new_step
    try:
        main([str(word) for word in argv])
        raise AssertionError("the disk was never full")
    except SystemExit as error:
        assert error.code == 2, error.code
    run_dir = folder / "run"
    for path in run_dir.glob("step-*"):
        checkpoint.verify(path)
    assert checkpoint.newest(run_dir).name == "step-000004" and not [*run_dir.glob(".tmp-*")]
    freed.append(True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    processes.call(main, argv)
    shutil.copytree(run_dir, folder.parent / "saved" / "run")


def file_limit(folder, size, extra):
    """A body that may write no file larger than `size`; only the soft limit, so that it can be lifted."""

    def body(main, argv):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return limited(folder, extra, main, argv)

    return body


def full(number, bench, how):
    whole, _ = bench.whole("sft")
    out = bench.new()
    (out / "disk").mkdir()
    if how == "tmpfs":
        body = on_small_disk(out / "disk", bench.dice.randrange(100, 140) * 2**20, 150 * 2**20)
    else:
        body = file_limit(out / "disk", bench.dice.randrange(4, 8) * 2**20, 9 * 2**20)
    status, _, err = processes.run(trainers.main_of("sft"), out, bench.flags("sft")(out / "disk"), body)
    if status == 77:
        return "not allowed here"
    assert status == 0, err
    assert re.fullmatch(r"error: cannot save \S+/run/step-000006: .*\(\d+ bytes needed, \d+ free\)\n", err), err
    assert_same(out / "saved" / "run", whole / "run")
    shutil.rmtree(out)
    return ""


def r05(bench, count, how):
    total, passed, said = trials(count, full, bench, how)
    if any(said):
        return 0, 0, "skipped: no tmpfs may be mounted here"
    return total, passed, "one line with path, needed and free bytes; then it goes on bit for bit"


def damage(number, bench, flip):
    """One random bit of one file, or its end, of the checkpoints of a finished run."""
    whole, _ = bench.whole("sft")
    path = bench.dice.choice(
        [path for name in (LAST, "best", "final") for path in sorted((whole / "run" / name).glob("*"))]
    )
    content = path.read_bytes()
    changed = bytearray(content)
    if flip:
        changed[bench.dice.randrange(len(content))] ^= bench.dice.choice([0x40, 1 << bench.dice.randrange(8)])
    else:
        del changed[bench.dice.randrange(len(content)) :]
    path.write_bytes(changed)
    try:
        checkpoint.verify(path.parent)
    except UserError as error:
        assert path.name in str(error), error
    else:
        raise AssertionError(f"{path.name} was taken")
    finally:
        path.write_bytes(content)
    checkpoint.verify(path.parent)


def r07(bench, count, flip):
    total, passed, _ = trials(count, damage, bench, flip)
    return total, passed, "any file of step folder, best and final; refused by name"


def torn(number, bench):
    """A log cut anywhere behind the checkpoint."""
    whole, _ = bench.whole("sft")
    lines = (whole / "run" / "metrics.jsonl").read_bytes().splitlines(True)
    out = shutil.copytree(whole, bench.new() / "copy")
    step = bench.dice.choice([9, 12])
    if step == 9:
        shutil.rmtree(out / "run" / LAST)
    kept, rest = b"".join(lines[:step]), b"".join(lines[step:]) + b'{"step": 13, "loss": 0.5}\n'
    (out / "run" / "metrics.jsonl").write_bytes(kept + rest[: bench.dice.randrange(len(rest))])
    processes.train(trainers.main_of("sft"), out, bench.flags("sft")(out))
    checks.assert_same_records(out / "run", whole / "run")
    shutil.rmtree(out.parent)


def r14(bench, count):
    total, passed, _ = trials(count, torn, bench)
    return total, passed, "every step once, in order, as in the undisturbed run"


# ---------------------------------------------------------------- rows: hostile input


YAML = [
    "!!python/object/apply:os.system ['x']",
    "&a [*a]",
    "<<: *a",
    "{",
    "[",
    "? ",
    "- ",
    "1e999",
    ".nan",
    "~",
    "no",
    "010",
    "12:30",
    "\t",
    "\0",
    '"',
    "'",
    "\ud800",
    "true",
    "0x10",
    "9" * 400,
    "#",
    "---",
    "\u2028",
    "%",
    "|",
    ">",
]


def mutated(dice, text, parts):
    """`text` with a few characters cut out, doubled, or replaced by one of `parts`."""
    for _ in range(dice.randrange(1, 5)):
        at, more = dice.randrange(len(text) + 1), dice.randrange(0, 12)
        new = dice.choice([dice.choice(parts), text[at : at + 40], chr(dice.randrange(256)), ""])
        text = text[:at] + new + text[at + more :]
    return text


def hostile_config(number, bench):
    path = bench.folder / "hostile.yml"
    text = bench.dice.choice([p.read_text() for p in sorted((ROOT / "configs").glob("*.yml"))])
    path.write_bytes(mutated(bench.dice, text, YAML).encode("utf-8", "surrogatepass"))
    started = time.process_time()
    try:
        config.load_config(path)
        taken = True
    except UserError as error:
        assert str(error).startswith(str(path)) and str(error).isprintable(), error
        taken = False
    assert time.process_time() - started < 1
    return taken


def r20(bench, count):
    total, passed, said = trials(count, hostile_config, bench)
    return total, passed, f"{said.count(False)} refused in one line, {said.count(True)} still valid"


def bad_row(number, bench):
    folder = bench.folder / "rows"
    folder.mkdir(exist_ok=True)
    lines = (bench.folder / "data-sft" / "train.jsonl").read_text().splitlines(True)
    at = bench.dice.randrange(len(lines))
    lines[at] = mutated(bench.dice, lines[at][:-1], ['"', "\\ud800", "\0", "{", "]", "null", "1e999", "\\u0000"]) + "\n"
    (folder / "train.jsonl").write_text("".join(lines), "utf-8", "surrogatepass")
    try:
        data.load_split(folder, "train")
        taken = True
    except UserError as error:
        assert re.match(re.escape(f"{folder}/train.jsonl:") + r"\d+: ", str(error)), error
        assert len(str(error)) < 500
        taken = False
    return taken


def s05(bench, count):
    bench.flags("sft")
    total, passed, said = trials(count, bad_row, bench)
    return total, passed, f"{said.count(False)} refused with file and line, {said.count(True)} still valid"


CODE = [
    "(",
    "[",
    "{",
    "-",
    "not ",
    "lambda:",
    ".a",
    "+1",
    "9",
    "\0",
    "\ud800",
    "if 1:\n ",
    "elif 1:\n ",
    "f'{",
    "'''",
    "x=",
    "\\",
    "await ",
    "__import__('os').system('x')",
    "*",
    ":=",
    "\n",
    "\t",
    "é",
    "\U0001f600",
    "#",
    "@",
    "a,",
    "yield ",
]


def fixed(bench):
    """The texts of test_hostile.py, each to every task's reward: at most 50 ms, where no neighbour disturbs."""
    harm, references = [{"role": "user", "content": "how to kill"}], ("x = 1", "a b " * 20_000)
    cases, slowest = [*itertools.product(tasks.NAMES, test_hostile.HOSTILE, references)], []

    def one(number):
        task, text, right = cases[number]
        taken = []
        while len(taken) < 30 and min(taken, default=1) > 0.05:
            time.sleep(0.1 * (len(taken) > 2))
            started = time.thread_time()
            rewards.heuristic_reward(task, harm, text, right)
            taken.append(time.thread_time() - started)
        slowest.append(min(taken))
        assert slowest[-1] <= 0.05, (task, text[:20], slowest[-1])

    for task in tasks.NAMES:
        rewards.heuristic_reward(task, harm, "warm up", "warm up")  # imports
    total, passed, _ = trials(len(cases), one)
    return total, passed, f"{1e3 * max(slowest):.0f} ms at most, of 50 allowed"


def code(number, bench, taken):
    dice, text = bench.dice, ""
    while dice.random() < 0.8:
        text += dice.choice(CODE) * dice.choice([1, 3, 100, 5000, 100_000])
    text, task = text[:10_000_000], dice.choice(tasks.NAMES)
    before, seconds = len(SEEN), []
    while len(seconds) < 3 and min(seconds, default=1) > 0.05:  # where no neighbour disturbs
        started = time.thread_time()
        total, parts = rewards.heuristic_reward(task, [{"role": "user", "content": "how to kill"}], text, "x = 1 mg")
        seconds.append(time.thread_time() - started)
    taken.append(min(seconds))
    assert 0 <= total <= 1 and all(0 <= part <= 1 for part in parts.values()), parts
    assert len(SEEN) == before and taken[-1] <= 0.05, taken[-1]


SEEN = []


def audit(event, arguments):
    if event in ("exec", "subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "socket.connect"):
        SEEN.append(event)


def s06(bench, count):
    for task in tasks.NAMES:
        rewards.heuristic_reward(task, [{"role": "user", "content": "x"}], "warm up", "warm up")  # imports
    sys.addaudithook(audit)
    taken = []
    total, passed, _ = trials(count, code, bench, taken)
    return total, passed, f"nothing executed; {1e3 * max(taken):.0f} ms at most, of 50 allowed"


def cells(number, bench):
    parts = [*test_hostile.ALPHABET, "−", "\ufeff"]
    texts = ["".join(bench.dice.choices(parts, k=bench.dice.randrange(9))) for _ in range(1000)]
    path = bench.folder / "cells.csv"
    study.save(path, [("text",), *((text,) for text in texts)])
    assert [row["text"] for _, row in study.read_csv(path)[1]] == texts
    assert not [
        text
        for text in map(study.neutralise, texts)
        if text.lstrip(" \t\r\n\0\u00a0\u200b\ufeff")[:1] in set("=+-@＝−")
    ]


def s08(bench, count):
    total, passed, _ = trials(count, cells, bench)
    return total, passed, "1,000 cells each: read back exactly, none could be run"


# ---------------------------------------------------------------- the table


def rows(n):
    """(id, what, function of the bench) of every row, by the number of trials."""
    few = max(2, n // 10)
    kinds = {"sft": n, "grpo": few, "ppo": few, "dpo": few, "reward": few}
    yield from (
        (
            "R03",
            f"SIGKILL at a random moment of {kind}, saves padded with 50 MB",
            lambda b, k=kind, c=count: r03(b, c, k),
        )
        for kind, count in kinds.items()
    )
    yield "R03", "SIGKILL at a random moment of train_staged.py", lambda b: r03_staged(b, few)
    yield "R04", "death at every write point of a run", lambda b: r04(b, n)
    yield "R05", "disk full: a tmpfs of random size", lambda b: r05(b, few, "tmpfs")
    yield "R05", "disk full: a limit on the size of a file", lambda b: r05(b, few, "limit")
    yield "R06", "a random file cut at a random byte", lambda b: r07(b, 10 * n, False)
    yield "R07", "a random bit of a random file flipped", lambda b: r07(b, 20 * n, True)
    yield "R10", "a worker dies under torchrun --max-restarts 1", lambda b: r10(b, 2 * few)
    yield "R11", "a run folder that another process holds", lambda b: r11(b, few)
    yield from (
        ("R13", f"SIGTERM or SIGINT at a random moment of {kind}, then resumed", lambda b, k=kind: r13(b, few, k))
        for kind in kinds
    )
    yield "R13", "two signals within a long step", lambda b: r13_twice(b, few)
    yield "R14", "metrics.jsonl cut at a random byte", lambda b: r14(b, few)
    yield "R20", "configs with random damage", lambda b: r20(b, 20 * n)
    yield "S5", "data rows with random damage", lambda b: s05(b, 20 * n)
    yield "S6", "the hostile texts of test_hostile.py to the rewards", fixed
    yield "S6", "random hostile code to the rewards", lambda b: s06(b, 10 * n)
    yield "S8", "random cells of spreadsheets", lambda b: s08(b, n)
    for row, what, one, count in soak_clients.rows(n):
        yield row, what, lambda b, one=one, count=count: (count, *soak_clients.tried(one, b.new(), count, b.base))


def machine(arguments):
    installed = log.versions()
    versions = ", ".join(f"{name} {installed[name]}" for name in ("torch", "transformers", "safetensors", "numpy"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    command = " ".join(["python benchmarks/soak.py", *arguments])
    return (
        f"`{command}` on Python {platform.python_version()}, {versions}; {platform.system()} {platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GB of memory."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="of R03 with SFT; other rows follow")
    parser.add_argument("--only", default="", help="ids of rows, with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and texts")
    job = parser.parse_args()
    torch.set_num_threads(1)
    started, table, failed = time.monotonic(), [], 0
    tiny = base.resolve("tiny")  # in the user's cache; what the runs cache goes with their folder
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.environ["GEMMA_ALIGNMENT_CACHE"] = f"{folder}/cache"
        bench = Bench(Path(folder), tiny, job.seed)
        model.load(str(tiny), torch.device("cpu"), torch.float32)  # what a first load computes, the children then have
        for name, what, row in rows(job.trials):
            if job.only and name not in job.only.split(","):
                continue
            print(f"{name} {what}", file=sys.stderr)
            begun = time.monotonic()
            found = row(bench)
            several = found if isinstance(found, list) else [found] if found else []
            seconds = time.monotonic() - begun
            table += [each if len(each) == 6 else (name, what, *each[:2], seconds, each[2]) for each in several]
    print("# Fault tests, long forms\n\n" + machine(sys.argv[1:]), end="\n\n")
    print("| row | what | trials | passed | seconds | remark |\n|---|---|---:|---:|---:|---|")
    for name, what, total, passed, seconds, remark in table:
        print(f"| {name} | {what} | {total} | {passed} | {seconds:.0f} | {remark} |")
        failed += passed < total or "too few" in remark
    print(f"\n{failed} rows failed; {(time.monotonic() - started) / 60:.1f} minutes.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
