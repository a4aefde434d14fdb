"""A script's main in a child: start it, wait for it, stop it, on one rank or two.

Every run is a forked child of the warmed parent: locks, signal handlers and patches of one end with it. What a child
does is a body(main, argv), `call` if nothing is to go wrong; `main` is a script's.
"""

import copy
import functools
import gc
import importlib.metadata
import json
import os
import re
import signal
import socket
import sys
import traceback
from types import SimpleNamespace

import torch
import yaml

from common import config, log, model
from common.evaluation import answers

config.load_config()  # every child would read configs/defaults.yml anew, which is a third of a short one's time
importlib.metadata.version = functools.cache(importlib.metadata.version)
log.versions()  # and these files
_doors, _load = [], model.load
bases = {}  # by folder, [(model, tokenizer), ...] as `model.load` gives them: a third of a short run is to load a base
COPIES = 6  # of each, for the runs of several stages
COMMIT = log.provenance()["commit"]
answers.SHOWN_TOKENS = 12  # of the answers that each stage shows before and after it


def call(main, argv):
    print("RESULT " + json.dumps(main([str(word) for word in argv])))


def keep(folder):
    """Load a base for all children -> its folder."""
    net, tokenizer = _load(str(folder), torch.device("cpu"), torch.float32)
    bases[str(folder)] = [(net, tokenizer), *((copy.deepcopy(net), tokenizer) for _ in range(COPIES - 1))]
    return folder


def load(checkpoint, device, dtype, quantize=False):
    """model.load of a child: it has the first copies of each of `bases` from its parent."""
    kept = device.type == "cpu" and dtype == torch.float32 and not quantize and bases.get(str(checkpoint))
    return kept.pop() if kept else _load(checkpoint, device, dtype, quantize)


def start(main, folder, argv, body=call, environment=(), pictures=False):
    """Fork a child that runs body(main, argv) as a script would and prints to files in `folder`; returns its pid.

    Pictures are drawn only with `pictures`: they take longer than a short run.
    """
    import rouge_score.rouge_scorer  # noqa: F401  # once, for all children: scripts import these late
    import scipy.stats  # noqa: F401
    from transformers import Gemma3ForCausalLM  # noqa: F401

    if pictures:
        import matplotlib.figure  # noqa: F401
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / f"{name}-{os.getpid()}", os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            gc.freeze()  # what the parent holds is not the child's to look through
            model.load = load
            log.subprocess = SimpleNamespace(run=lambda *_, **__: SimpleNamespace(stdout=COMMIT or ""))  # git's answer
            yaml.SafeLoader = yaml.CSafeLoader  # a stage's config is read many times
            traceback.format_stack = list  # torch.manual_seed keeps three of them, for devices that are not there
            os.fsync = lambda number: None  # it waits for the disk, and a child that dies loses nothing it wrote
            torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
            os.environ.update(environment)
            if not pictures:
                log.save_picture = lambda path, draw: path.write_bytes(b"")
            body(main, argv)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
            sys.stderr.write("" if isinstance(error.code, int) else f"{error.code}\n")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def finish(folder, pid):
    """Wait for a child of `start` -> (exit status, stdout, stderr)."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    files = [folder / f"{name}-{pid}" for name in ("out", "err")]
    return status, *(file.read_text() if file.exists() else "" for file in files)  # none yet where it died at once


def run(main, folder, argv, body=call, **options):
    return finish(folder, start(main, folder, argv, body, **options))


def train(main, folder, argv, body=call, **options):
    """A run that must end well; returns what main returned."""
    status, out, err = run(main, folder, argv, body, **options)
    assert status == 0, err
    return json.loads(out.partition("RESULT ")[2])


def steps(out):
    """The steps that the console's table shows."""
    return [int(number) for number in re.findall(r"(?m)^ {0,4}(\d+)  ", out)]


def refused(main, folder, argv, *words):
    """A run that must end with status 2 and one line that has all `words`."""
    status, out, err = run(main, folder, argv)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, (status, out[-500:], err)
    assert all(word in err for word in words), err
    assert not steps(out) and "RESULT" not in out, out
    return err


def start_ranks(main, folder, argv, bodies=(call, call), environment=()):
    """Two ranks as torchrun would start them, forked; returns their pids."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **dict(environment)}
    places = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    return [start(main, folder, argv, body, place) for body, place in zip(bodies, places)]


def ranks(main, folder, argv, bodies=(call, call)):
    """[(status, stdout, stderr), ...] of start_ranks."""
    return [finish(folder, pid) for pid in start_ranks(main, folder, argv, bodies)]


def train_ranks(main, folder, argv):
    """Two ranks that must end well, of which one speaks."""
    done = ranks(main, folder, argv)
    assert [status for status, *_ in done] == [0, 0], done
    assert [5 in steps(out) for _, out, _ in done] == [True, False], done


def free_port():
    """A port that no other process is given as long as this one lives; its children may listen on it."""
    door = socket.socket()
    door.bind(("127.0.0.1", 0))
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # listeners with the same option share it
    _doors.append(door)
    return door.getsockname()[1]


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
