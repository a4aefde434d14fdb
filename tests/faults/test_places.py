"""Where a run reads and writes: disks without fsync, caches that may not be written, data and bases that were moved."""

import errno
import functools
import os
import shutil
import stat
import sys

import pytest

import train_rl
import train_sft
from common.runtime import base, cache, checkpoint
from tests import checks, inputs, processes
from tests.faults import inject, trainers

MAIN = train_sft.main
train, run, refused = (functools.partial(each, MAIN) for each in (processes.train, processes.run, processes.refused))
few, settings, straight = trainers.fixtures("sft")
own_cache, judge, start = trainers.cache, trainers.judge, trainers.start
SHORT = ["--training.max_steps", 2, "--training.eval_interval", 2]


def answering(number, folders_only=True):
    """A body in which fsync, of folders alone or of files too, answers with an error of this number."""

    def body(main, argv):
        real = os.fsync

        def fsync(fd):
            if not folders_only or stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(number, os.strerror(number))
            real(fd)

        os.fsync = fsync
        processes.call(main, argv)

    return body


# ---------------------------------------------------------------- where it writes


@pytest.mark.parametrize(("number", "folders_only"), [(errno.EINVAL, True), (errno.ENOTSUP, False)])
def test_D14_a_disk_without_fsync(tmp_path, settings, straight, number, folders_only):
    train(tmp_path, settings(tmp_path), answering(number, folders_only))
    checks.assert_same_run(tmp_path / "run", straight())


def test_D14_an_unwritable_place_is_found_before_a_step(tmp_path, settings):
    """A new run, and one that goes on; nothing is left of the trial."""
    for _ in range(2):
        status, out, err = run(tmp_path, settings(tmp_path / "out", *SHORT), answering(errno.EIO))
        assert status == 2 and err.count("\n") == 1 and "cannot save" in err and str(tmp_path) in err, err
        assert not processes.steps(out) and "parameters" not in out
        assert not list(tmp_path.rglob(".tmp-*"))
        (tmp_path / "out" / "run").mkdir(parents=True, exist_ok=True)
    (tmp_path / "file").write_text("")
    refused(tmp_path, settings(tmp_path / "file" / "out"), str(tmp_path / "file"))
    train(tmp_path, settings(tmp_path / "new" / "deep", *SHORT))
    assert not list(tmp_path.rglob(".tmp-*"))


def test_D14_explain_tries_nothing(tmp_path, settings):
    assert run(tmp_path, settings(tmp_path / "out", "--explain"), answering(errno.EIO))[0] == 0


def test_D15_a_cache_that_cannot_be_written_loses_nothing(tmp_path, micro_folder, monkeypatch):
    """DPO keeps the reference's log-probs there, and pairs that it samples: it goes on without, to the same end."""
    source = trainers.write_data(tmp_path / "few", "dpo")
    flags = trainers.settings("dpo", micro_folder, source, *SHORT, "--rl.pairs", "sampled", *trainers.SIZES)
    processes.train(train_rl.main, tmp_path, flags(tmp_path / "whole"))
    filled = cache.root()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMMA_ALIGNMENT_CACHE", str(tmp_path / "file" / "cache"))
    status, out, err = processes.run(train_rl.main, tmp_path, flags(tmp_path / "none"))
    assert status == 0 and out.count("warning: not kept for the next run: ") >= 2, (out, err)
    checks.assert_same_records(tmp_path / "none" / "run", tmp_path / "whole" / "run")

    monkeypatch.setenv("GEMMA_ALIGNMENT_CACHE", str(filled))

    def no_lock(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    def read_only(main, argv):
        cache.FileLock = no_lock
        processes.call(main, argv)

    status, out, err = processes.run(train_rl.main, tmp_path, flags(tmp_path / "filled"), read_only)
    assert status == 0 and "warning" not in out and "pairs from" in out, (out, err)


# ---------------------------------------------------------------- what it reads, and where that lies


def copied(folder, few, micro_folder):
    """Flags of the same data and base at other places."""
    places = shutil.copytree(few, folder / "data"), shutil.copytree(micro_folder, folder / "base")
    return ["--dataset_path", places[0], "--model.base_checkpoint", places[1]]


def test_D20_content_decides_not_its_path(tmp_path, settings, straight, few, micro_folder):
    argv = settings(tmp_path)
    assert run(tmp_path, argv, inject.at_step(7, processes.terminate))[0] == 1
    moved = copied(tmp_path, few, micro_folder)
    status, out, err = run(tmp_path, [*argv, *moved])
    assert status == 0 and f"dataset_path {few} -> {tmp_path / 'data'}" in out, (out, err)
    checks.assert_same_records(tmp_path / "run", straight())
    weights = [
        checkpoint.sha256(folder / "final" / inputs.WEIGHTS["lora"]) for folder in (tmp_path / "run", straight())
    ]
    assert weights[0] == weights[1]
    assert base.record(tmp_path / "run" / "final")["base_checkpoint"] == str(tmp_path / "base")

    rows = (tmp_path / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data" / "train.jsonl").write_text("".join(rows[1:]))
    then = checkpoint.load_state(checkpoint.newest(tmp_path / "run"))["facts"]
    refused(tmp_path, [*argv, *moved], f"data {then['data']} -> ", "this is another run")
    other = inputs.another_base(tmp_path / "other", micro_folder)
    words = [f"model {then['model']} -> {base.fingerprint(other)}"]  # whole
    refused(tmp_path, [*argv, "--model.base_checkpoint", other], *words)


def test_D20_adapters_reward_models_and_functions_too(tmp_path, few, micro_folder, start, judge):
    source = trainers.write_data(tmp_path / "few", "grpo")
    flags = trainers.settings("grpo", micro_folder, source, "--training.max_steps", 3, "--reward.type", "hybrid")
    first = flags(tmp_path, "--model.adapter", start, "--reward.checkpoint", judge)
    assert processes.run(train_rl.main, tmp_path, first, inject.at_step(1, processes.terminate))[0] == 1
    moved = [shutil.copytree(folder, tmp_path / name) for folder, name in ((start, "start"), (judge, "judge"))]
    second = flags(tmp_path, "--model.adapter", moved[0], "--reward.checkpoint", moved[1])
    processes.train(train_rl.main, tmp_path, second)
    other = inputs.random_start(tmp_path / "other", micro_folder)
    (other / "adapter_model.safetensors").write_bytes(
        inputs.flipped((start / "adapter_model.safetensors").read_bytes())
    )
    wrong = flags(tmp_path, "--model.adapter", other, "--reward.checkpoint", judge)
    processes.refused(train_rl.main, tmp_path, wrong, "start [", "this is another run")

    text = "def one(prompt, completion, reference):\n    return 1.0\n\n\n" + "two = one\n"
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(text)
    flags = trainers.settings("grpo", micro_folder, source, "--training.max_steps", 3)
    argv = flags(tmp_path / "mine", "--reward.function", f"{tmp_path}/a.py:one")
    assert processes.run(train_rl.main, tmp_path, argv, inject.at_step(1, processes.terminate))[0] == 1
    argv = flags(tmp_path / "mine", "--reward.function", f"{tmp_path}/b.py:two")
    processes.refused(train_rl.main, tmp_path, argv, "reward.function", "this is another run")
    processes.train(train_rl.main, tmp_path, flags(tmp_path / "mine", "--reward.function", f"{tmp_path}/b.py:one"))


# ---------------------------------------------------------------- what it needs


def test_D17_bitsandbytes_is_asked_for_by_qlora_alone(tmp_path, settings):
    def without(main, argv):
        for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
            del sys.modules[name]
        sys.modules["bitsandbytes"] = None
        processes.call(main, argv)

    train(tmp_path, settings(tmp_path / "lora", *SHORT), without)
    train(tmp_path, settings(tmp_path / "full", *SHORT, peft="none"), without)
    status, _, err = run(tmp_path, settings(tmp_path / "qlora", *SHORT, peft="qlora"), without)
    assert status == 2 and err.count("\n") == 1 and "qlora needs bitsandbytes: pip install" in err, err
