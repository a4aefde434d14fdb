"""R03 to R09 and S1 of common/runtime/checkpoint.py alone: kills at every write, no room, damage, what is kept."""

import json
import os
import random
import resource
import signal
import subprocess
import time

import pytest
import torch

from common.log import UserError
from common.runtime import checkpoint
from tests.faults import children
from tests.faults.children import (
    assert_is,
    crash_points,
    load_step,
    relock,
    save,
    save_step,
    spawn,
    strays,
    wait,
    wait_for,
)

# ---------------------------------------------------------------- R03, R04: kills


def test_R04_kill_at_every_point_of_a_save(fresh, capfd):
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


def test_R04_kill_at_every_point_of_a_replacement(fresh):
    seen = set()
    for _, run_dir, _ in crash_points(lambda: fresh(200), lambda run_dir: save(run_dir, 200, "new")):
        relock(run_dir)  # between the two renames only this brings the old one back
        assert not strays(run_dir)
        seen.add(load_step(run_dir / "step-000200")[1]["extra"])
    assert seen == {None, "new"}


def test_R04_kill_at_every_point_of_publish(fresh):
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


def test_R04_R08_kill_at_every_point_of_prune(fresh):
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
        tensors, state = load_step(folder)
        step = state["step"]
        assert tensors["optimizer"]["m"].eq(step).all()
    while True:
        step += 1
        save_step(run_dir, step, {"optimizer": {"m": torch.full((1_250_000,), step)}}, {"step": step})
        checkpoint.prune(run_dir, 2)


def test_R03_sigkill_at_random_moments(tmp_path):
    dice, hits, last = random.Random(0), 0, 0
    for _ in range(8):
        pid = spawn(train_until_killed, tmp_path)
        wait_for(tmp_path / f"step-{last + 1:06d}")
        time.sleep(dice.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
        hits += bool(strays(tmp_path))
        last = load_step(checkpoint.newest(tmp_path))[1]["step"]
        assert 1 <= len(list(tmp_path.glob("step-*"))) <= 3  # a kill between a save and its prune leaves one more
    assert hits >= 2, "the kills missed the saves"
    relock(tmp_path)
    save(tmp_path, last + 1)
    checkpoint.prune(tmp_path, 2)
    assert not strays(tmp_path) and len(list(tmp_path.glob("step-*"))) == 2


# ---------------------------------------------------------------- R05: no room


def test_R05_file_size_limit(fresh):
    run_dir = fresh()

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        big = {"optimizer": {"m": torch.zeros(2**19)}}
        for tensors, writer in ((big, None), ({}, lambda folder: (folder / "x").write_bytes(b"0" * 2**21))):
            with pytest.raises(UserError, match=r"step-000200: .*File too large.*\d+ bytes needed, \d+ free"):
                save_step(run_dir, 200, tensors, {}, writer)
            assert not strays(run_dir) and not (run_dir / "step-000200").exists()

    assert wait(spawn(child)) == 0
    assert_is(checkpoint.newest(run_dir), 100)


def test_R05_free_space_is_checked_before_writing(fresh, monkeypatch):
    run_dir, real = fresh(), os.statvfs
    small = os.statvfs_result((512, 512, 10**6, 10**6, 100, *real(fresh())[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    monkeypatch.setattr(children, "save_file", lambda *args: pytest.fail("wrote"))
    with pytest.raises(UserError) as caught:
        save(run_dir, 200)
    needed = checkpoint.MARGIN
    assert all(text in str(caught.value) for text in (f"{run_dir}/step-000200", f"{needed} bytes", f"{100 * 512} free"))
    with pytest.raises(UserError):
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((512, 512, 10, 10, 0, *small[5:])))
        checkpoint.publish(run_dir / "step-000100", run_dir, "best")
    assert sorted(p.name for p in run_dir.iterdir()) == ["step-000100"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), Exception("No space left (os error 28)")])
def test_R05_errors_of_the_model_writer(fresh, error):
    run_dir = fresh()

    def failing(folder):
        (folder / "half").write_text("x")
        raise error

    with pytest.raises(UserError, match="step-000200"):
        save_step(run_dir, 200, {}, {}, failing)
    with pytest.raises(ZeroDivisionError):  # a bug stays a bug, but leaves nothing behind
        save_step(run_dir, 200, {}, {}, lambda folder: 1 / 0)
    assert sorted(p.name for p in run_dir.iterdir()) == ["step-000100"]


def test_R05_failing_rename_keeps_the_old_copy(fresh, monkeypatch):
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


def test_R05_run_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for act in (checkpoint.lock_run, lambda path: save(path, 1)):
        with pytest.raises(UserError, match="file/run"):
            act(tmp_path / "file" / "run")


# ---------------------------------------------------------------- R06, R07: damage


def test_R06_truncated_files_fall_back(fresh, capsys):
    run_dir = fresh(200)
    for path in sorted((run_dir / "step-000200").iterdir()):
        content = path.read_bytes()
        for size in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            assert checkpoint.newest(run_dir).name == "step-000100"
            warning = capsys.readouterr().err
            assert warning.count("\n") == 1 and path.name in warning
            with pytest.raises(UserError, match=path.name):
                load_step(path.parent)
        path.unlink()
        with pytest.raises(UserError, match=path.name):
            checkpoint.verify(path.parent)
        path.write_bytes(content)
    assert_is(checkpoint.newest(run_dir), 200)


def test_R07_every_flipped_bit_is_refused(fresh, capsys):
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


# ---------------------------------------------------------------- S1: hostile checkpoints


def forge(folder, files):
    """A manifest that is consistent in itself."""
    manifest = {"version": 1, "step": 100, "tensors": [], "files": files}
    manifest["sha256"] = checkpoint._digest(manifest)
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


def test_S1_a_manifest_cannot_point_outside(tmp_path):
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
def test_S1_hostile_manifests(tmp_path, text):
    folder = tmp_path / "step-000100"
    folder.mkdir()
    (folder / "MANIFEST.json").write_text(text)
    with pytest.raises(UserError, match=r"MANIFEST\.json"):
        checkpoint.verify(folder)


def test_S1_only_safetensors_and_json_are_read(fresh, tmp_path):
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
        load_step(evil)
    facts = {p.name: {"bytes": p.stat().st_size, "sha256": checkpoint.sha256(p)} for p in evil.iterdir()}
    manifest = {"version": 1, "step": 200, "tensors": ["optimizer"], "files": facts}
    (evil / "MANIFEST.json").write_text(json.dumps({**manifest, "sha256": checkpoint._digest(manifest)}))
    with pytest.raises(UserError, match="cannot be read"):
        load_step(evil)
    assert not marker.exists()


# ---------------------------------------------------------------- R08: what is kept


def test_R08_keep_last(tmp_path):
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
    checkpoint.prune(run_dir, 1)
    checkpoint.prune(run_dir, 0)
    assert {p.name for p in run_dir.iterdir()} == foreign | {"step-000007", "best"}
    assert checkpoint.verify(run_dir / "best")["step"] == 2


def test_R08_prune_spares_the_last_whole_one(fresh, capsys):
    run_dir = fresh(200, 300, 400)
    for step in (300, 400):
        (run_dir / f"step-{step:06d}" / "state.json").write_text("{}")
    checkpoint.prune(run_dir, 2)
    assert sorted(p.name for p in run_dir.iterdir()) == ["step-000200", "step-000300", "step-000400"]
    assert_is(checkpoint.newest(run_dir), 200)


# ---------------------------------------------------------------- R09: targets


def test_R09_missing_empty_and_renamed(fresh, tmp_path):
    with pytest.raises(UserError, match=r"no-such does not exist"):
        load_step(tmp_path / "no-such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is incomplete: 'MANIFEST.json' is missing"):
        load_step(tmp_path / "empty")
    assert checkpoint.newest(tmp_path / "no-such") is None and checkpoint.newest(tmp_path / "empty") is None
    run_dir = fresh()
    (run_dir / "step-000100").rename(run_dir / "step-000900")
    with pytest.raises(UserError, match="renamed"):
        checkpoint.verify(run_dir / "step-000900")


# ---------------------------------------------------------------- R11: the lock


def test_R11_lock(tmp_path):
    run_dir = tmp_path / "deep" / "run"

    def holder():
        lock = checkpoint.lock_run(run_dir)
        (tmp_path / "held").touch()
        assert lock.is_locked
        time.sleep(60)

    pid = spawn(holder)
    try:
        wait_for(tmp_path / "held")
        with pytest.raises(UserError, match=rf"run folder {run_dir} is locked by pid {pid}\b"):
            checkpoint.lock_run(run_dir)
    finally:
        os.kill(pid, signal.SIGKILL)
        wait(pid)
    lock = checkpoint.lock_run(run_dir)
    with pytest.raises(UserError, match=f"pid {os.getpid()}"):  # also a second run of the same process
        checkpoint.lock_run(run_dir)
    sleeper = subprocess.Popen(["sleep", "60"], close_fds=False)  # an orphan of the run must not keep the lock
    lock.release()
    relock(run_dir)
    sleeper.kill()
    sleeper.wait()
