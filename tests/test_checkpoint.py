"""Faults that a training run meets: kills at every write, full disks, damaged files, second starts, signals."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch

from common import checkpoint, resume
from common.log import UserError

CRASHED = 9


def spawn(function, *arguments):
    """Run function in a forked child (no 3 s import of torch) and return its pid; its result is the exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
            os._exit(function(*arguments) or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
    return pid


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(path, seconds=10):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)


def write_model(folder):
    (folder / "adapter_config.json").write_text('{"r": 8}')
    checkpoint.save_file({"w": torch.ones(4, 4)}, folder / "adapter_model.safetensors")


def save(run_dir, step, extra=None):
    tensors = {"optimizer": {"exp_avg": torch.full((50, 7), float(step))}, "rng": {"torch": torch.arange(9)}}
    return checkpoint.save_step(run_dir, step, tensors, {"step": step, "extra": extra}, write_model)


def assert_is(folder, step, extra=None):
    tensors, state = checkpoint.load_step(folder)
    assert state == {"step": step, "extra": extra}
    assert torch.equal(tensors["optimizer"]["exp_avg"], torch.full((50, 7), float(step)))


def relock(run_dir):
    os.close(checkpoint.lock_run(run_dir))


def strays(run_dir):
    return sorted(path.name for path in Path(run_dir).glob(".tmp-*"))


def crash_points(prepare, act):
    """Call act in children that die before the n-th system call that matters, n = 1, 2, ...; yield after each death."""
    for n in range(1, 100):
        run_dir = prepare()

        def child(n=n, run_dir=run_dir):
            left = [n]

            def deadly(function):
                def wrapped(*args, **kwargs):
                    left[0] -= 1
                    if left[0] == 0:
                        os._exit(CRASHED)
                    return function(*args, **kwargs)

                return wrapped

            for module, name in [
                *((os, name) for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")),
                (checkpoint, "save_file"),
                (shutil, "copyfile"),
            ]:
                setattr(module, name, deadly(getattr(module, name)))
            act(run_dir)

        status = wait(spawn(child))
        assert status in (0, CRASHED)
        yield n, run_dir, status == CRASHED
        if status == 0:
            assert n > 3, "the hooks were never reached"
            return
    raise AssertionError("never completed")


@pytest.fixture
def fresh(tmp_path):
    """A function that makes run folders with a complete step 100, and on request more (copied: fsync is slow)."""
    counter = iter(range(1000))

    def make(*more):
        run_dir = tmp_path / f"run{next(counter)}"
        for step in (100, *more):
            if not (tmp_path / "saved" / f"step-{step:06d}").exists():
                save(tmp_path / "saved", step)
            shutil.copytree(tmp_path / "saved" / f"step-{step:06d}", run_dir / f"step-{step:06d}")
        return run_dir

    return make


# ---------------------------------------------------------------- round trip


def test_round_trip_layout_and_modes(tmp_path):
    tensors = {
        "optimizer": {"m": torch.randn(3, 5).T, "step": torch.tensor(7.0), "b": torch.randn(4).bfloat16()},
        "rng": {"torch": torch.get_rng_state()},
        "empty": {},
    }
    state = {"step": 3, "lr": 0.1 + 0.2, "nan": [1e300, -0.0], "text": "ü"}
    folder = checkpoint.save_step(tmp_path / "a" / "b", 3, tensors, state, write_model)
    assert folder == tmp_path / "a" / "b" / "step-000003"
    back, back_state = checkpoint.load_step(folder)
    assert back_state == state and set(back) == set(tensors)  # the model's own safetensors are not training state
    for stem, group in tensors.items():
        assert set(back[stem]) == set(group)
        assert all(torch.equal(back[stem][k], t) and back[stem][k].dtype == t.dtype for k, t in group.items())
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["step"] == 3 and set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"MANIFEST.json"}
    content = (folder / "state.json").read_bytes()
    assert manifest["files"]["state.json"] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert {oct(p.stat().st_mode & 0o777) for p in folder.iterdir()} == {oct(folder.stat().st_mode & 0o666)}
    assert not strays(folder.parent)


def test_same_step_again(fresh):
    run_dir = fresh()
    folder = run_dir / "step-000100"
    inode = folder.stat().st_ino
    save(run_dir, 100)
    assert folder.stat().st_ino == inode  # whole and the same: left
    save(run_dir, 100, extra="another run")
    assert_is(folder, 100, "another run")
    (folder / "optimizer.safetensors").write_bytes(b"damaged")
    save(run_dir, 100, extra="another run")
    assert_is(folder, 100, "another run")
    assert not strays(run_dir)


# ---------------------------------------------------------------- R3, R4: kills


def test_r4_kill_at_every_point_of_a_save(fresh, capfd):
    for _, run_dir, crashed in crash_points(fresh, lambda run_dir: save(run_dir, 200)):
        found = checkpoint.newest(run_dir)
        assert found.name in ("step-000100", "step-000200")
        assert_is(found, int(found.name[5:]))
        assert crashed or found.name == "step-000200"
        relock(run_dir)
        assert not strays(run_dir)
        save(run_dir, 200)
        assert_is(checkpoint.newest(run_dir), 200)
    assert "warning" not in capfd.readouterr().err  # a half-written folder never has a final name


def test_r4_kill_at_every_point_of_a_replacement(fresh):
    seen = set()
    for _, run_dir, _ in crash_points(lambda: fresh(200), lambda run_dir: save(run_dir, 200, "new")):
        relock(run_dir)  # between the two renames only this brings the old one back
        assert not strays(run_dir)
        seen.add(checkpoint.load_step(run_dir / "step-000200")[1]["extra"])
    assert seen == {None, "new"}


def test_r4_kill_at_every_point_of_publish(fresh):
    def prepare():
        run_dir = fresh(200)
        checkpoint.publish(run_dir / "step-000100", run_dir, "best")
        return run_dir

    seen = []
    for _, run_dir, _ in crash_points(
        prepare, lambda run_dir: checkpoint.publish(run_dir / "step-000200", run_dir, "best")
    ):
        relock(run_dir)
        assert not strays(run_dir)
        seen.append(checkpoint.verify(run_dir / "best")["step"])
    assert seen == sorted(seen) and set(seen) == {100, 200}


def test_r4_kill_at_every_point_of_prune(fresh):
    for _, run_dir, crashed in crash_points(lambda: fresh(200, 300), lambda run_dir: checkpoint.prune(run_dir, 1)):
        assert_is(checkpoint.newest(run_dir), 300)
        for folder in run_dir.glob("step-*"):  # a folder that still has its name is whole
            checkpoint.verify(folder)
        relock(run_dir)
        assert not strays(run_dir)
        assert crashed or sorted(p.name for p in run_dir.glob("step-*")) == ["step-000300"]


def train_until_killed(run_dir):
    """Resume, then save a step with 5 MB after another, each tensor filled with its step's number."""
    checkpoint.lock_run(run_dir)
    assert not strays(run_dir)
    step, folder = 0, checkpoint.newest(run_dir)
    if folder:
        tensors, state = checkpoint.load_step(folder)
        step = state["step"]
        assert tensors["optimizer"]["m"].eq(step).all()
    while True:
        step += 1
        checkpoint.save_step(run_dir, step, {"optimizer": {"m": torch.full((1_250_000,), step)}}, {"step": step})
        checkpoint.prune(run_dir, 2)


def test_r3_sigkill_at_random_moments(tmp_path):
    dice, hits, last = random.Random(0), 0, 0
    for _ in range(8):
        pid = spawn(train_until_killed, tmp_path)
        wait_for(tmp_path / f"step-{last + 1:06d}")
        time.sleep(dice.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
        hits += bool(strays(tmp_path))
        last = checkpoint.load_step(checkpoint.newest(tmp_path))[1]["step"]
        assert 1 <= len(list(tmp_path.glob("step-*"))) <= 3
    assert hits >= 2, "the kills missed the saves"
    relock(tmp_path)
    assert not strays(tmp_path)


# ---------------------------------------------------------------- R5: no room


def test_r5_file_size_limit(fresh):
    run_dir = fresh()

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        big = {"optimizer": {"m": torch.zeros(2**19)}}
        for tensors, writer in ((big, None), ({}, lambda folder: (folder / "x").write_bytes(b"0" * 2**21))):
            with pytest.raises(UserError, match=r"step-000200: .*File too large.*\d+ bytes needed, \d+ free"):
                checkpoint.save_step(run_dir, 200, tensors, {}, writer)
            assert not strays(run_dir) and not (run_dir / "step-000200").exists()

    assert wait(spawn(child)) == 0
    assert_is(checkpoint.newest(run_dir), 100)


def test_r5_free_space_is_checked_before_writing(fresh, monkeypatch):
    run_dir, real = fresh(), os.statvfs
    small = os.statvfs_result((512, 512, 10**6, 10**6, 100, *real(fresh())[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: pytest.fail("wrote"))
    with pytest.raises(UserError) as caught:
        save(run_dir, 200)
    needed = checkpoint.MARGIN + 50 * 7 * 4 + 9 * 8
    assert all(text in str(caught.value) for text in (f"{run_dir}/step-000200", f"{needed} bytes", f"{100 * 512} free"))
    with pytest.raises(UserError):
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((512, 512, 10, 10, 0, *small[5:])))
        checkpoint.publish(run_dir / "step-000100", run_dir, "best")
    assert sorted(p.name for p in run_dir.iterdir()) == ["step-000100"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), Exception("No space left (os error 28)")])
def test_r5_errors_of_the_model_writer(fresh, error):
    run_dir = fresh()

    def failing(folder):
        (folder / "half").write_text("x")
        raise error

    with pytest.raises(UserError, match="step-000200"):
        checkpoint.save_step(run_dir, 200, {}, {}, failing)
    with pytest.raises(ZeroDivisionError):  # a bug stays a bug, but leaves nothing behind
        checkpoint.save_step(run_dir, 200, {}, {}, lambda folder: 1 / 0)
    assert sorted(p.name for p in run_dir.iterdir()) == ["step-000100"]


def test_r5_failing_rename_keeps_the_old_copy(fresh, monkeypatch):
    run_dir, rename = fresh(), os.rename

    def refuse(source, target):
        if ".tmp-old-" not in str(source) and ".tmp-old-" not in str(target):
            raise OSError(30, "Read-only file system")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="Read-only"):
        save(run_dir, 100, "new")
    assert_is(run_dir / "step-000100", 100)
    assert not strays(run_dir)


def test_r5_run_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for act in (checkpoint.lock_run, lambda path: save(path, 1)):
        with pytest.raises(UserError, match="file/run"):
            act(tmp_path / "file" / "run")


# ---------------------------------------------------------------- R6, R7: damage


def test_r6_truncated_files_fall_back(fresh, capsys):
    run_dir = fresh(200)
    for path in sorted((run_dir / "step-000200").iterdir()):
        content = path.read_bytes()
        for size in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            assert checkpoint.newest(run_dir).name == "step-000100"
            warning = capsys.readouterr().err
            assert warning.count("\n") == 1 and path.name in warning
            with pytest.raises(UserError, match=path.name):
                checkpoint.load_step(path.parent)
        path.unlink()
        with pytest.raises(UserError, match=path.name):
            checkpoint.verify(path.parent)
        path.write_bytes(content)
    assert_is(checkpoint.newest(run_dir), 200)


def test_r7_every_flipped_bit_is_refused(fresh, capsys):
    run_dir, dice = fresh(200), random.Random(0)
    checkpoint.publish(run_dir / "step-000200", run_dir, "best")
    for path in sorted([*(run_dir / "step-000200").iterdir(), *(run_dir / "best").iterdir()]):
        content = path.read_bytes()
        everywhere = path.name == "MANIFEST.json"  # no checksum of another file covers it
        for position in range(len(content)) if everywhere else dice.sample(range(len(content)), 8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << dice.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(UserError):
                checkpoint.verify(path.parent)
        if path.parent.name != "best":
            assert checkpoint.newest(run_dir).name == "step-000100"
            assert path.name in capsys.readouterr().err
        path.write_bytes(content)


def forge(folder, files):
    """A manifest that is consistent in itself."""
    manifest = {"version": 1, "step": 100, "tensors": [], "files": files}
    manifest["sha256"] = checkpoint._digest(manifest)
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


def test_manifest_cannot_point_outside(tmp_path):
    folder, outside = tmp_path / "step-000100", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.write_text("secret")
    (folder / "link").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "fifo")
    (folder / "sub" / "fine").write_text("secret")
    facts = {"bytes": 6, "sha256": checkpoint.sha256(outside)}
    forge(folder, {"sub/fine": facts})
    assert checkpoint.verify(folder)["files"] == {"sub/fine": facts}
    for name in (
        "../outside",
        str(outside),
        "link",
        "up/outside",
        "fifo",
        "sub",
        ".",
        "",
        "a\0b",
        "\ud800",
        "sub/../../outside",
    ):
        forge(folder, {name: facts})
        with pytest.raises(UserError):
            checkpoint.verify(folder)
    forge(folder, {"sub/fine": {"bytes": 6}})
    with pytest.raises(UserError):
        checkpoint.verify(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000, '{"sha256": 1, "version": 1}', "\0" * 50])
def test_hostile_manifests(tmp_path, text):
    folder = tmp_path / "step-000100"
    folder.mkdir()
    (folder / "MANIFEST.json").write_text(text)
    with pytest.raises(UserError, match=r"MANIFEST\.json"):
        checkpoint.verify(folder)


def test_s1_only_safetensors_and_json_are_read(fresh, tmp_path):
    marker = tmp_path / "marker"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()  # what runs a command when it is unpickled
    run_dir = fresh()
    evil = run_dir / "step-000200"
    evil.mkdir()
    for name in ("optimizer.pt", "pytorch_model.bin", "rng_state.pth", "optimizer.safetensors", "state.json"):
        (evil / name).write_bytes(payload)
        if "." in name[-4:]:
            (run_dir / "step-000100" / name).write_bytes(payload)  # beside a good manifest: never opened
    assert_is(checkpoint.newest(run_dir), 100)
    with pytest.raises(UserError):
        checkpoint.load_step(evil)
    facts = {p.name: {"bytes": p.stat().st_size, "sha256": checkpoint.sha256(p)} for p in evil.iterdir()}
    manifest = {"version": 1, "step": 200, "tensors": ["optimizer"], "files": facts}
    (evil / "MANIFEST.json").write_text(json.dumps({**manifest, "sha256": checkpoint._digest(manifest)}))
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load_step(evil)
    assert not marker.exists()


# ---------------------------------------------------------------- R8, publish


def test_r8_keep_last(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    run_dir = tmp_path / "run"
    for name in ("step-abc", "step-1", "notes", "step-000002-copy"):
        (run_dir / name).mkdir(parents=True)
    (run_dir / "step-000000").symlink_to(elsewhere)
    foreign = {p.name for p in run_dir.iterdir()}
    for step in range(1, 7):
        save(run_dir, step)
        if step == 2:
            checkpoint.publish(run_dir / "step-000002", run_dir, "best")
        checkpoint.prune(run_dir, 2)
    assert {p.name for p in run_dir.iterdir()} == foreign | {"step-000005", "step-000006", "best"}
    assert (elsewhere / "precious").exists()
    save(run_dir, 7)
    checkpoint.prune(run_dir, 1, keep=[run_dir / "step-000005"])
    checkpoint.prune(run_dir, 0, keep=["step-000005"])
    assert {p.name for p in run_dir.iterdir()} == foreign | {"step-000005", "step-000007", "best"}
    assert checkpoint.verify(run_dir / "best")["step"] == 2


def test_r8_prune_spares_the_last_whole_one(fresh, capsys):
    run_dir = fresh(200, 300, 400)
    for step in (300, 400):
        (run_dir / f"step-{step:06d}" / "state.json").write_text("{}")
    checkpoint.prune(run_dir, 2)
    assert sorted(p.name for p in run_dir.iterdir()) == ["step-000200", "step-000300", "step-000400"]
    assert_is(checkpoint.newest(run_dir), 200)


def test_publish(fresh):
    run_dir = fresh(200)
    best = checkpoint.publish(run_dir / "step-000100", run_dir, "best")
    assert {p.name for p in best.iterdir()} == {
        "MANIFEST.json", "adapter_config.json", "adapter_model.safetensors", "rng.safetensors", "state.json",
    }  # fmt: skip
    assert checkpoint.verify(checkpoint.publish(run_dir / "step-000200", run_dir, "best"))["step"] == 200
    with pytest.raises(UserError, match="published copy"):
        checkpoint.load_step(best)
    (run_dir / "step-000100" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter_config"):
        checkpoint.publish(run_dir / "step-000100", run_dir, "best")
    assert checkpoint.verify(best)["step"] == 200 and not strays(run_dir)


# ---------------------------------------------------------------- R9, R11: targets and locks


def test_r9_missing_empty_and_renamed(fresh, tmp_path):
    with pytest.raises(UserError, match=r"no-such does not exist"):
        checkpoint.load_step(tmp_path / "no-such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is incomplete: 'MANIFEST.json' is missing"):
        checkpoint.load_step(tmp_path / "empty")
    assert checkpoint.newest(tmp_path / "no-such") is None and checkpoint.newest(tmp_path / "empty") is None
    run_dir = fresh()
    (run_dir / "step-000100").rename(run_dir / "step-000900")
    with pytest.raises(UserError, match="renamed"):
        checkpoint.verify(run_dir / "step-000900")


def test_numbers_not_names_decide(tmp_path):
    for step in (999_999, 1_000_000, 5):
        save(tmp_path, step)
    assert checkpoint.newest(tmp_path).name == "step-1000000"


def test_r11_lock(tmp_path):
    run_dir = tmp_path / "deep" / "run"

    def holder():
        checkpoint.lock_run(run_dir)
        (tmp_path / "held").touch()
        time.sleep(60)

    pid = spawn(holder)
    try:
        wait_for(tmp_path / "held")
        start = time.monotonic()
        with pytest.raises(UserError, match=rf"run folder {run_dir} is locked by pid {pid}\b"):
            checkpoint.lock_run(run_dir)
        assert time.monotonic() - start < 1
    finally:
        os.kill(pid, signal.SIGKILL)
        wait(pid)
    fd = checkpoint.lock_run(run_dir)
    with pytest.raises(UserError, match=f"pid {os.getpid()}"):  # also a second run of the same process
        checkpoint.lock_run(run_dir)
    sleeper = subprocess.Popen(["sleep", "60"], close_fds=False)  # an orphan of the run must not keep the lock
    os.close(fd)
    relock(run_dir)
    sleeper.kill()
    sleeper.wait()


def test_lock_clears_only_our_strays(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    run_dir = tmp_path / "run"
    (run_dir / ".tmp-step-000100-1" / "sub").mkdir(parents=True)
    (run_dir / ".tmp-step-000100-1" / "link").symlink_to(outside)
    (run_dir / ".tmp-link").symlink_to(outside)
    (run_dir / ".tmp-metrics.jsonl-1").touch()
    (run_dir / ".tmp-old-best").mkdir()
    (run_dir / ".tmp-old-final").mkdir()
    (run_dir / "final").mkdir()
    (run_dir / "mine.tmp-x").touch()
    relock(run_dir)
    assert {p.name for p in run_dir.iterdir()} == {".lock", "best", "final", "mine.tmp-x"}
    assert (outside / "precious").exists()


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
    start = time.monotonic()
    return wait(pid), time.monotonic() - start


def finish_step(stop):
    for _ in range(500):
        time.sleep(0.01)
        if stop():
            time.sleep(0.3)  # the rest of the step and the save
            return 7
    return 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_r13_one_signal_finishes_the_step(tmp_path, number):
    assert signalled(tmp_path, [number], finish_step)[0] == 7


def test_r13_second_signal_exits_at_once(tmp_path):
    status, seconds = signalled(tmp_path, [signal.SIGTERM, signal.SIGINT], lambda stop: time.sleep(20))
    assert status == 130 and seconds < 1


def test_r13_second_signal_within_one_long_call(tmp_path):
    def body(stop):  # one bytecode of many seconds, without the GIL, like a backward of a big model
        hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)

    status, seconds = signalled(tmp_path, [signal.SIGINT, signal.SIGINT], body)
    assert status == 130 and seconds < 1


def test_r13_grace_for_repeated_signals(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert signalled(tmp_path, [signal.SIGINT, signal.SIGINT, signal.SIGTERM], finish_step, grace=5)[0] == 7


def test_r13_forked_children_die_of_sigterm_alone(tmp_path):
    def body(stop):
        grandchild = spawn(time.sleep, 20)
        time.sleep(0.1)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # none of them may count in the parent
            os.kill(grandchild, number)
            time.sleep(0.05)
        return 5 if wait(grandchild) == -signal.SIGTERM and not stop() else 6

    assert signalled(tmp_path, [], body)[0] == 5


def test_r13_flag_is_set_when_kill_returns_and_threads_get_false():
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


# ---------------------------------------------------------------- R14: logs


def test_r14_torn_log(tmp_path):
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


def test_r14_kill_at_every_point(tmp_path):
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
