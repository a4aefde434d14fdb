"""Checkpoints in forked children, which may die anywhere: what tests of checkpoints, locks and signals share."""

import os
import shutil
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.runtime import checkpoint

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


def save_step(run_dir, step, tensors, state, write_model=None):
    """Save {file stem: {name: tensor}} and what write_model(folder) writes as a checkpoint; returns its folder."""
    with checkpoint.new_step(run_dir, step, state) as folder:
        if write_model is not None:
            write_model(folder)
        for stem, group in tensors.items():
            save_file({name: tensor.contiguous() for name, tensor in group.items()}, folder / f"{stem}.safetensors")
    return Path(run_dir) / f"step-{step:06d}"


def load_step(folder):
    """(tensors of training, state) of a checkpoint, verified."""
    state = checkpoint.load_state(folder)
    stems = checkpoint.verify(folder)["tensors"]
    return {stem: load_file(folder / f"{stem}.safetensors") for stem in stems}, state


def write_model(folder):
    (folder / "adapter_config.json").write_text('{"r": 8}')
    save_file({"w": torch.ones(4, 4)}, folder / "adapter_model.safetensors")


def save(run_dir, step, extra=None):
    tensors = {"optimizer": {"exp_avg": torch.full((50, 7), float(step))}, "rng": {"torch": torch.arange(9)}}
    return save_step(run_dir, step, tensors, {"step": step, "extra": extra}, write_model)


def assert_is(folder, step, extra=None):
    tensors, state = load_step(folder)
    assert state == {"step": step, "extra": extra}
    assert torch.equal(tensors["optimizer"]["exp_avg"], torch.full((50, 7), float(step)))


def relock(run_dir):
    checkpoint.lock_run(run_dir).release()


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
                (sys.modules[__name__], "save_file"),
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
