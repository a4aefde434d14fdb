"""How OpenMP's threads wait: the setting is made before torch is loaded, and leaves a user's own alone."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("evaluate", "serve", "train_reward", "train_rl", "train_sft", "train_staged")


def times(*used):
    """A reader of /proc/stat that gives these ticks, (busy, idle) each, one after the other."""
    rows = iter([[busy, 0, 0, idle, 0, 0, 0] for busy, idle in used])
    return lambda: next(rows)


@pytest.mark.parametrize(
    ("cores", "busy", "idle", "expected"),
    [(2, 0, 20, False), (2, 4, 16, False), (2, 5, 15, True), (2, 20, 0, True), (8, 4, 76, False), (8, 10, 70, True)],
)
def test_half_a_processor_is_a_neighbour(monkeypatch, cores, busy, idle, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(common, "processor_times", times((100, 900), (100 + busy, 900 + idle)))
    assert common.has_neighbour(0.0) is expected


def test_only_a_debug_run_alone_spins(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "STAT", str(tmp_path / "none"))
    assert common.has_neighbour(0.0)  # a system that does not tell
    assert common.choose_spin(["train_sft.py", "--debug"]) == "0"
    monkeypatch.setattr(common, "has_neighbour", lambda: False)
    assert common.choose_spin(["train_sft.py", "--debug"]) == "300000"
    assert common.choose_spin(["train_sft.py", "--device", "cpu"]) == "0"


def test_a_users_own_setting_stays():
    def told(**own):
        code = "import os, common; print(os.environ.get('GOMP_SPINCOUNT'))"
        others = {
            name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        }
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=others | own
        )
        return run.stdout.strip()

    assert told() == "0"
    assert told(GOMP_SPINCOUNT="7") == "7"
    assert told(OMP_WAIT_POLICY="active") == "None"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_load_common_before_torch(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text("utf-8"))
    names = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names.append(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            names += [name.name.partition(".")[0] for name in node.names]
    assert "common" in names and "torch" not in names[: names.index("common")]
