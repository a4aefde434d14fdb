"""What other systems lack: modules and signals that Windows has not, devices by name, a downloader before torch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common import log, model
from common.log import UserError
from common.runtime import resume

ROOT = Path(log.__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def child(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scripts_need_no_posix_modules_and_no_slow_libraries():
    """A wrong flag or --help is answered before transformers, scipy, peft or matplotlib are imported: 3 s, not 8."""
    assert {"train_sft", "train_rl", "evaluate", "serve"} <= {*SCRIPTS}
    slow = ["transformers", "scipy", "peft", "matplotlib", "sympy"]
    out = child(
        "import sys, torch\n"  # torch imports them where they are
        "for name in ('fcntl', 'resource'): sys.modules[name] = None\n"
        f"import {', '.join(SCRIPTS)}\n"
        f"print([name for name in {slow} if name in sys.modules])\n"
        "from common import log; print(log.peak_memory_gb(torch.device('cpu')))"
    )
    assert out.split() == ["[]", "None"]


def test_signals_are_caught_where_nothing_forks(monkeypatch):
    monkeypatch.delattr(os, "register_at_fork")
    before = signal.getsignal(signal.SIGTERM)

    @log.command
    def main(argv):
        stopped = resume.stop_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return stopped()

    assert main() and signal.getsignal(signal.SIGTERM) is before


def test_auto_is_cuda_or_cpu_and_mps_only_by_name(monkeypatch, capsys):
    for cuda, mps, auto in ((False, True, "cpu"), (False, False, "cpu"), (True, True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda cuda=cuda: int(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert model.pick_device("auto").type == auto
        if not mps:
            with pytest.raises(UserError, match="mps is not available here; choose from cpu"):
                model.pick_device("mps")
    assert capsys.readouterr().out == ""
    assert model.pick_device("mps").type == model.pick_device("mps").type == "mps"
    assert capsys.readouterr().out.count("warning: device mps is untried") == 1


def test_kernels_on_cuda_repeat_or_end_the_run():
    """With warn_only, torch would take a backward of attention that does not repeat."""
    out = child(
        "import torch; from common.runtime import resume\n"
        "resume.prepare(torch.device('cuda'))\n"
        "mode = lambda: torch.are_deterministic_algorithms_enabled()\n"
        "print(mode(), torch.is_deterministic_algorithms_warn_only_enabled())\n"
        "try:\n"
        "    with resume.other_kernels(torch.device('cuda')): print(mode()); raise KeyError\n"
        "except KeyError: print(mode(), torch.is_deterministic_algorithms_warn_only_enabled())\n"
        "with resume.other_kernels(torch.device('cpu')): print(mode())\n"
        "torch.use_deterministic_algorithms(False)\n"
        "with resume.other_kernels(torch.device('cuda')): print(mode())\n"
        "print(mode())"
    )
    assert out.split() == ["True", "False", "False", "True", "False", "True", "False", "False"]


def test_the_downloader_needs_the_standard_library_only():
    """Its help, and its refusals, come before anything is installed, and at once."""
    out = child(
        "import runpy, sys, time\n"
        "libraries = 'torch', 'numpy', 'tqdm', 'yaml', 'transformers'\n"
        "for name in libraries: sys.modules[name] = None\n"
        "for arguments in (['--help'], ['--dataset', 'conala', '--source', 'nowhere']):\n"
        "    sys.argv, status = ['download_datasets.py', *arguments], None\n"
        "    try: runpy.run_path('data/download_datasets.py', run_name='__main__')\n"
        "    except SystemExit as error: status = error.code\n"
        "    print(status)\n"
        "assert not [name for name in libraries if sys.modules[name]]"
    )
    assert "--source" in out and [line for line in out.splitlines() if line in ("0", "2")] == ["0", "2"]
