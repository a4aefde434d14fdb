"""run_experiment.sh with stand-ins for python, torchrun and nvidia-smi on PATH: what it starts, in which order."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "run_experiment.sh"
# Notes how it was called, in its folder; makes a .venv of itself; fails as pip where a file `no-network` lies.
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
    "-m pip --version") [ ! -e broken-venv ]; exit ;;
    *load_config*) echo conala; exit ;;
    -c*) exit ${PYTHON_EXIT:-0} ;;
esac
printf '%s\0' "$(basename "$0")" "$@" >>"$LOG"
printf '\n' >>"$LOG"
case "$*" in
    "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && rm -f broken-venv ;;
    "-m pip install"*) [ ! -e no-network ] ;;
esac
"""
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")


@pytest.fixture
def checkout(tmp_path):
    """A folder like the repository's, whose name holds a space, and stand-ins that know nothing of this machine."""
    top = tmp_path / "my checkout"
    for folder in (top / "configs", tmp_path / "bin"):
        folder.mkdir(parents=True)
    shutil.copy(SCRIPT, top)
    (top / "requirements.txt").write_text("torch==2\n")
    (top / "configs" / "a run.yml").write_text("task: conala\n")
    for name in ("python3", "python", "torchrun"):
        (tmp_path / "bin" / name).write_text(PYTHON)
    gpus(tmp_path, 0)
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    return top


def gpus(folder, count):
    lines = "".join(f"echo 'GPU {i}: a card (UUID: GPU-{i})'\n" for i in range(count))
    (folder / "bin" / "nvidia-smi").write_text(f"#!/usr/bin/env bash\n{lines}" + "exit 9\n" * (not count))
    (folder / "bin" / "nvidia-smi").chmod(0o755)


def start(checkout, *words, cwd=None, **environment):
    """-> (exit status, [words of each call of a stand-in], what it printed)."""
    log = checkout.parent / "log"
    log.unlink(missing_ok=True)
    dropped = ("VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_VISIBLE_DEVICES", "PYTHON")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    path = f"{checkout.parent / 'bin'}:/usr/bin:/bin"
    done = subprocess.run(
        [checkout / "run_experiment.sh", *words],
        cwd=cwd or checkout,
        check=False,
        text=True,
        env=kept | {"PATH": path, "LOG": str(log)} | environment,
        capture_output=True,
    )
    calls = log.read_text().split("\0\n")[:-1] if log.exists() else []
    return done.returncode, [call.split("\0") for call in calls], done.stdout + done.stderr


def train(checkout, *flags):
    return ["python", "train_staged.py", "--config", str(checkout / "configs" / "a run.yml"), *flags]


def test_it_makes_an_environment_once_and_passes_every_word_on(checkout):
    status, calls, out = start(checkout, "configs/a run.yml", "--debug", "--logging.run_name", "two  words", "")
    assert status == 0, out
    assert calls == [
        ["python3", "-m", "venv", "--clear", ".venv"],
        ["python", "-m", "pip", "install", "-r", ".venv/requirements.installed.new"],
        train(checkout, "--debug", "--logging.run_name", "two  words", ""),
    ]
    status, calls, out = start(checkout, "configs/a run.yml")
    assert status == 0 and calls == [train(checkout)], out
    (checkout / "requirements.txt").write_text("torch==3\n")
    _, calls, _ = start(checkout, "configs/a run.yml")
    assert [call[1:4] for call in calls] == [["-m", "pip", "install"], train(checkout)[1:4]]


def test_an_interrupted_installation_is_not_a_finished_one(checkout):
    (checkout / "no-network").touch()
    status, calls, _ = start(checkout, "configs/a run.yml")
    assert status == 1 and calls[-1][1:4] == ["-m", "pip", "install"]
    (checkout / "no-network").unlink()
    status, calls, _ = start(checkout, "configs/a run.yml")
    assert status == 0 and [call[2] for call in calls] == ["pip", "--config"]  # the folder itself was whole
    # an update that breaks off, and a folder that was left without pip
    (checkout / "requirements.txt").write_text("torch==3\n")
    (checkout / "no-network").touch()
    assert start(checkout, "configs/a run.yml")[0] == 1
    (checkout / "requirements.txt").write_text("torch==2\n")
    assert start(checkout, "configs/a run.yml")[0] == 1  # half an update: no longer the old list either
    (checkout / "no-network").unlink()
    (checkout / "broken-venv").touch()
    status, calls, _ = start(checkout, "configs/a run.yml")
    assert status == 0 and [call[2] for call in calls] == ["venv", "pip", "--config"]


def test_an_active_environment_is_used_as_it_is(checkout):
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        status, calls, _ = start(checkout, "configs/a run.yml", **{name: "/somewhere"})
        assert status == 0 and calls == [train(checkout)] and not (checkout / ".venv").exists()
    status, calls, out = start(checkout, "configs/a run.yml", VIRTUAL_ENV="/somewhere", PYTHON_EXIT="1")
    assert status == 2 and not calls and out.startswith("error: the active environment lacks") and out.count("\n") == 1


def test_an_old_python_is_one_line(checkout):
    for environment in ({"PYTHON_EXIT": "1"}, {"PYTHON": "no-such-python"}):
        status, calls, out = start(checkout, "configs/a run.yml", **environment)
        assert status == 2 and not calls and "older than Python 3.11" in out and out.count("\n") == 1


def test_it_works_from_another_folder(checkout, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "b.yml").write_text("")
    status, calls, out = start(checkout, "mine/b.yml", "--seed", "1", cwd=tmp_path)
    assert status == 0, out
    assert calls[-1] == ["python", "train_staged.py", "--config", str(tmp_path / "mine" / "b.yml"), "--seed", "1"]
    assert (checkout / ".venv").is_dir() and not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    "words, task", [((), "conala"), (("--task", "safety"), "safety"), (("--task=clinical",), "clinical")]
)
def test_download_fetches_the_data_of_the_task(checkout, words, task):
    status, calls, out = start(checkout, "configs/a run.yml", *words, "--download", "--debug", VIRTUAL_ENV="/somewhere")
    assert status == 0, out
    fetch = ["python", "data/download_datasets.py", "--dataset", task, "--splits", "train,val,test"]
    assert calls == [fetch, train(checkout, *words, "--debug")]


def test_the_task_is_read_by_the_projects_own_config_reader(tmp_path, capsys):
    code = re.search(r"python -c '\n(import sys.*?)'", SCRIPT.read_text(), re.S)[1]
    for name, text, said in (("a", "task: clinical\n", "clinical\n"), ("b", "tusk: clinical\n", "error: ")):
        (tmp_path / f"{name}.yml").write_text(text)
        argv, sys.argv = sys.argv, ["-c", str(tmp_path / f"{name}.yml")]
        try:
            exec(code, {})
        except SystemExit as end:
            assert end.code == 2 and name == "b"
        finally:
            sys.argv = argv
        out = capsys.readouterr()
        assert (out.out or out.err).startswith(said) and (out.out + out.err).count("\n") == 1


def test_several_gpus_get_a_process_each(checkout, tmp_path):
    gpus(tmp_path, 3)

    def started(*words, **environment):
        status, calls, out = start(checkout, "configs/a run.yml", *words, VIRTUAL_ENV="/somewhere", **environment)
        assert status == 0 and len(calls) == 1, out
        return calls[0], out

    call, out = started("--seed", "1")
    many = ["torchrun", "--nproc-per-node", "3", *train(checkout, "--seed", "1")[1:]]
    assert call == many and "torchrun --nproc-per-node 3" in out
    assert started(CUDA_VISIBLE_DEVICES="0,2")[0][2] == "2"
    for words in (("--debug",), ("--device", "cpu"), ("--device=cpu",)):
        assert started(*words)[0] == train(checkout, *words)
    for named in ("", "1"):
        assert started(CUDA_VISIBLE_DEVICES=named)[0] == train(checkout)
    gpus(tmp_path, 1)
    assert started("--device", "cuda")[0] == train(checkout, "--device", "cuda")


def test_wrong_calls_are_refused_before_anything_is_made(checkout):
    status, calls, out = start(checkout)
    assert status == 2 and not calls and out.startswith("usage: ")
    status, calls, out = start(checkout, "--help")
    assert status == 0 and not calls and "--download" in out
    for word, said in (
        ("--debug", "CONFIG comes first"),
        ("configs/none.yml", "no such config"),
        ("configs", "no such"),
    ):
        status, calls, out = start(checkout, word)
        assert status == 2 and not calls and out.startswith("error: ") and out.count("\n") == 1 and said in out
    assert not (checkout / ".venv").exists()


def test_its_scripts_exist_and_it_may_be_executed():
    text = SCRIPT.read_text()
    for name in ("train_staged.py", "data/download_datasets.py", "requirements.txt"):
        assert name in text and (ROOT / name).is_file()
    assert os.access(SCRIPT, os.X_OK)
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0


def test_a_clone_with_autocrlf_has_scripts_that_bash_reads(tmp_path):
    names = ("run_experiment.sh", ".ci/run", ".ci/skips", "Dockerfile", "requirements.txt", ".gitattributes")
    for name in names:
        (tmp_path / "old" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "old" / name)

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *words], check=True, capture_output=True)

    git("init", str(tmp_path / "old"))
    git("-C", str(tmp_path / "old"), "add", ".")
    git("-C", str(tmp_path / "old"), "commit", "-m", "all")
    git("clone", "-c", "core.autocrlf=true", str(tmp_path / "old"), str(tmp_path / "new"))
    assert b"\r" in (tmp_path / "new" / ".gitattributes").read_bytes()  # the setting does change other files
    assert not [name for name in names[:-1] if b"\r" in (tmp_path / "new" / name).read_bytes()]
