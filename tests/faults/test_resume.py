"""R13 of runtime/resume.py and R14 of runtime/checkpoint.py alone: signals, and logs that a crash tore."""

import hashlib
import json
import os
import signal
import threading
import time

import pytest

from common import log
from common.log import UserError
from common.runtime import checkpoint, resume
from tests.faults.children import CRASHED, spawn, wait, wait_for


def test_a_state_of_before_may_list_parts_of_other_tasks(tmp_path):
    """Facts once held the weights of all tasks' parts: those that this task never had are no change."""
    now = {"task": "safety", "reward.heuristic.toxicity": 1.0}
    saved = {
        "step": 2,
        "evaluation": None,
        "facts": now | {"reward.heuristic.overlap": 1.0, "reward.heuristic.exact": 1},
    }

    def refuse(facts):
        resume.refuse_changes(tmp_path, tmp_path / "step-000002", saved, facts, 5, resume.FREE_TO_CHANGE, False)

    refuse(now)
    for change in ({"reward.heuristic.toxicity": 2.0}, {"reward.heuristic.overlap": 2.0}, {"reward.heuristic.new": 1}):
        with pytest.raises(UserError, match=f"{next(iter(change))} "):
            refuse(now | change)


# ---------------------------------------------------------------- R13: signals


def signalled(tmp_path, signals, body, grace=0.0):
    """A child calls body(stop) once its handlers stand; return (exit status, seconds since the last signal)."""
    ready = tmp_path / "ready"

    def child():
        stop = resume.stop_signals(grace)
        assert not stop()
        ready.touch()
        return body(stop)

    pid = spawn(child)
    wait_for(ready)
    for number in signals:
        time.sleep(0.1)
        os.kill(pid, number)
    return wait(pid)


def finish_step(stop):
    for _ in range(500):
        time.sleep(0.01)
        if stop():
            time.sleep(0.3)  # the rest of the step and the save
            return 7
    return 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_R13_one_signal_finishes_the_step(tmp_path, number):
    assert signalled(tmp_path, [number], finish_step) == 7


def test_R13_second_signal_exits_at_once(tmp_path):
    assert signalled(tmp_path, [signal.SIGTERM, signal.SIGINT], lambda stop: time.sleep(20)) == 130


def test_R13_second_signal_within_one_long_call(tmp_path):
    def body(stop):  # one bytecode of many seconds, without the GIL, like a backward of a big model
        hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)

    assert signalled(tmp_path, [signal.SIGINT, signal.SIGINT], body) == 130


def test_R13_grace_for_repeated_signals(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert signalled(tmp_path, [signal.SIGINT, signal.SIGINT, signal.SIGTERM], finish_step, grace=5) == 7


def test_R13_forked_children_die_of_sigterm_alone(tmp_path):
    def body(stop):
        grandchild = spawn(time.sleep, 20)
        time.sleep(0.1)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # none of them may count in the parent
            os.kill(grandchild, number)
            time.sleep(0.05)
        return 5 if wait(grandchild) == -signal.SIGTERM and not stop() else 6

    assert signalled(tmp_path, [], body) == 5


def test_R13_flag_is_set_when_kill_returns_and_threads_get_false():
    def child():
        stop = resume.stop_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        return 0 if stop() else 1

    assert wait(spawn(child)) == 0
    answers = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: answers.append(resume.stop_signals()()))
    thread.start()
    thread.join()
    assert answers == [False] and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_a_command_that_ends_leaves_no_file_open():
    """Each stage of train_staged.py is one, and each call in a notebook."""

    def child():
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(5):
            log.command(lambda argv: resume.stop_signals())()
        end = time.monotonic() + 10
        while len(os.listdir("/proc/self/fd")) > len(before) and time.monotonic() < end:
            time.sleep(0.005)
        return 7 if len(os.listdir("/proc/self/fd")) == len(before) else 1

    assert wait(spawn(child)) == 7


# ---------------------------------------------------------------- R14: logs


def test_R14_torn_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / 3, "text": "ü\n"}) for step in range(1, 31)]
    whole = "\n".join(lines).encode() + b"\n"
    for cut in (len(whole), len(whole) - 1, len(whole) - 9, len(whole) - len(lines[-1]) - 2):
        path.write_bytes(whole[:cut])
        checkpoint.truncate_log(path, 20)
        assert path.read_text().splitlines() == lines[:20]
        path.write_bytes(whole[:cut])
        checkpoint.truncate_log(path, 99)
        kept = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert kept == list(range(1, len(kept) + 1)) and len(kept) >= 28 and path.read_bytes().endswith(b"\n")
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": "2"}\n[1]\n{"loss": 2}\n{"step": 3\n\xff\n{"step": 4}')
    checkpoint.truncate_log(path, 10)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 4}\n'
    checkpoint.truncate_log(tmp_path / "none.jsonl", 10)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_R04_R14_kill_at_every_point_of_a_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    old, new = b'{"step": 1}\n{"step": 2}\n{"st', b'{"step": 1}\n'

    def prepare():
        path.write_bytes(old)
        return path

    seen = []
    for n in range(1, 5):
        prepare()

        def child(n=n):
            calls = iter(range(1, 9))
            for name in ("fsync", "replace"):
                real = getattr(os, name)
                setattr(os, name, lambda *a, real=real: os._exit(CRASHED) if next(calls) == n else real(*a))
            checkpoint.truncate_log(path, 1)

        wait(spawn(child))
        seen.append(path.read_bytes())
    assert seen[0] == old and seen[-1] == new and set(seen) == {old, new}
