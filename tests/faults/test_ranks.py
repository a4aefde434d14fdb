"""What one rank does to the others (R11, R12 and the like): it hangs, returns, fails or dies; none of them waits long.

Ranks are forked from the warmed parent; those that torchrun starts are in benchmarks/deaths.py.
"""

import datetime
import os
import re
import shutil
import signal
import time
from unittest import mock

import pytest
import torch

import evaluate
import train_sft
from common import dist, rewards
from common.log import UserError
from tests import checks, inputs, processes
from tests.faults import inject

TIMEOUT = 2  # training.timeout
SLACK = 6  # seconds more that a busy machine may need, of which 3 pass until a hung rank has heard of it


@pytest.fixture(scope="module", autouse=True)
def looks_often():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "POLL", 0.1)
        yield


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return inputs.write_data(tmp_path_factory.mktemp("data") / "few", "safety", train=12, val=4, test=4)


@pytest.fixture(scope="module")
def settings(few, micro_folder):
    return inputs.settings(micro_folder, few, "--training.timeout", TIMEOUT)


def together(main, folder, argv, bodies, limit):
    """Two ranks that must both have ended `limit` seconds after one did `act` -> [(status, out, err), ...]."""
    pids = processes.start_ranks(main, folder, argv, bodies)
    mark, end = folder / "mark", time.monotonic() + 60
    while not mark.exists():
        assert time.monotonic() < end, [processes.finish(folder, kill(pid)) for pid in pids]
        time.sleep(0.02)
    end, done = time.monotonic() + limit, {}
    while len(done) < len(pids) and time.monotonic() < end:
        for pid in set(pids) - set(done):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                done[pid] = processes.finish(folder, pid)
        time.sleep(0.02)
    late = {pid: processes.finish(folder, kill(pid)) for pid in pids if pid not in done}
    assert not late, (late, done)
    return [done[pid] for pid in pids]


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    return pid


def marked(folder, act):
    def marking():
        (folder / "mark").touch()
        act()

    return marking


def hang():
    while True:
        time.sleep(3600)


def leave():
    os._exit(0)


def check_hang(folder, argv, number, body):
    bodies = [body, body]
    bodies[number] = lambda main, argv: inject.at_step(2, marked(folder, hang))(lambda argv: body(main, argv), argv)
    with mock.patch.object(dist, "GRACE", 0.5):  # the hung rank never ends by itself
        ends = together(train_sft.main, folder, argv, bodies, TIMEOUT + SLACK)
    for status, _, err in ends:
        assert status == 1 and err.count("\n") == 1, err
        assert f"rank {number} hangs or is busy: the others have waited for 2 s (training.timeout)" in err, err


def test_R12_a_rank_that_hangs_ends_the_run(tmp_path, settings):
    check_hang(tmp_path, settings(tmp_path), 1, lambda main, argv: main([str(word) for word in argv]))


def test_R12_a_backend_that_goes_on_waiting_is_ended(tmp_path, settings):
    """As NCCL may, which cannot be tried here: the backend's own limit is an hour. It is rank 0 that hangs."""

    def patient(main, argv):
        real = torch.distributed.init_process_group

        def init_process_group(*args, timeout, **more):
            return real(*args, timeout=datetime.timedelta(hours=1), **more)

        torch.distributed.init_process_group = init_process_group
        main([str(word) for word in argv])

    check_hang(tmp_path, settings(tmp_path), 0, patient)


@pytest.mark.parametrize("number", [0, 1])
def test_R12_a_rank_that_leaves_ends_the_run_at_once(tmp_path, settings, number):
    bodies = [processes.call, processes.call]
    bodies[number] = inject.at_step(2, marked(tmp_path, leave))
    argv = settings(tmp_path, "--training.timeout", 120)
    found = together(train_sft.main, tmp_path, argv, bodies, SLACK)
    status, _, err = found[1 - number]
    assert found[number][0] == 0 and status == 1, found
    last = err.splitlines()[-1]  # before it torch's own words about the store, where that went with rank 0
    assert re.fullmatch(f"error: (rank {number}|another rank) has ended.*", last) and "Traceback" not in err, err


def test_a_rank_that_never_comes_ends_the_start(tmp_path, settings):
    def absent(main, argv):
        (tmp_path / "mark").touch()

    argv = settings(tmp_path)
    (status, _, err), _ = together(train_sft.main, tmp_path, argv, (processes.call, absent), 2 * TIMEOUT + SLACK)
    assert status == 1 and "not all of 2 ranks joined within training.timeout, 2 s" in err, err


def test_R10_started_again_in_the_store_of_the_dead(tmp_path, settings):
    """As --max-restarts does: the agent's store outlives the workers, one of which was killed between two saves."""
    port, short = processes.free_port(), ["--training.max_steps", 6, "--training.save_interval", 2]
    keeper = processes.start(lambda argv: None, tmp_path, [], lambda *_: keep_store(port))
    agent = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    killed = inject.at_step(3, lambda: kill(os.getpid()))
    try:
        pids = processes.start_ranks(
            train_sft.main, tmp_path, settings(tmp_path, *short), (processes.call, killed), agent
        )
        (status, _, err), dead = (processes.finish(tmp_path, pid) for pid in pids)
        assert dead[0] == -signal.SIGKILL and status == 1 and err == "error: rank 1 has ended: see what it said\n", err
        pids = processes.start_ranks(
            train_sft.main, tmp_path, settings(tmp_path, *short), (processes.call, processes.call), agent
        )
        done = [processes.finish(tmp_path, pid) for pid in pids]
    finally:
        processes.finish(tmp_path, kill(keeper))
    assert [status for status, *_ in done] == [0, 0] and "at step 2 of 6" in done[0][1], done
    processes.ranks(train_sft.main, tmp_path, settings(tmp_path / "whole", *short))
    checks.assert_same_run(tmp_path / "run", tmp_path / "whole" / "run")


def keep_store(port):
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store:
        time.sleep(3600)


def test_a_bug_on_one_rank_is_told_to_the_others(tmp_path, settings):
    def act():
        raise ValueError("a bug")

    body = inject.at_step(2, marked(tmp_path, act))
    first, second = together(train_sft.main, tmp_path, settings(tmp_path), (processes.call, body), SLACK)
    assert first[0] == 1 and first[2] == "error: another rank failed: ValueError: a bug\n", first
    assert "Traceback" in second[2], second


def test_a_score_that_fails_on_one_rank_ends_the_evaluation(tmp_path, few, micro_folder):
    """The others end with its words, long before training.timeout."""

    def body(main, argv):
        def scorer(*args):
            def score(records, answers):
                if dist.rank() == 1:
                    (tmp_path / "mark").touch()
                    raise UserError("no score for this")
                return torch.zeros(len(records)), [{}] * len(records)

            return score

        rewards.scorer = scorer
        processes.call(main, argv)

    argv = ["--debug", "--model.base_checkpoint", micro_folder, "--dataset_path", few, "--reward.type", "heuristic"]
    argv += ["--evaluation.max_new_tokens", 8, "--evaluation.draws", 100, "--logging.output_dir", tmp_path]
    argv += ["--checkpoints", f"base={micro_folder}"]
    for status, _, err in together(evaluate.main, tmp_path, argv, (body, body), SLACK):
        assert status == 2 and err == "error: no score for this\n", (status, err)


def test_machines_without_a_shared_folder_may_not_resume(tmp_path, settings):
    def elsewhere(main, argv):
        at = argv.index("--logging.output_dir") + 1
        processes.call(main, [*argv[:at], tmp_path / "elsewhere", *argv[at + 1 :]])

    argv = settings(tmp_path, "--training.save_interval", 1, "--training.max_steps")
    done = processes.ranks(train_sft.main, tmp_path, [*argv, 2], (processes.call, elsewhere))
    assert [status for status, *_ in done] == [0, 0] and not (tmp_path / "elsewhere").exists(), done
    before = checks.snapshot(tmp_path / "run")
    for status, _, err in processes.ranks(train_sft.main, tmp_path, [*argv, 4], (processes.call, elsewhere)):
        assert status == 2 and err.count("\n") == 1, err
        assert "training.resume is step-000002 on rank 0, None on rank 1" in err and "logging.output_dir" in err, err
    assert checks.snapshot(tmp_path / "run") == before


def test_machines_with_other_data_do_not_train(tmp_path, settings, few):
    other = shutil.copytree(few, tmp_path / "other")
    shutil.copyfile(few / "val.jsonl", other / "train.jsonl")

    def another(main, argv):
        at = argv.index("--dataset_path") + 1
        processes.call(main, [*argv[:at], other, *argv[at + 1 :]])

    for status, _, err in processes.ranks(train_sft.main, tmp_path, settings(tmp_path), (processes.call, another)):
        assert status == 2 and "the ranks would not train the same: dataset_path is" in err and "; data is" in err, err
