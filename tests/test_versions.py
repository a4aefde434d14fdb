"""Libraries with known holes are refused by every script, before a model is opened."""

import sys

import pytest
import transformers

import evaluate
import train_reward
import train_rl
import train_sft
import train_staged
from common import log
from common.log import UserError
from common.runtime import tiny, versions
from tests import processes

OLD = {"torch": ("2.9.1+cu128", "CVE-2026-24747"), "transformers": ("5.2.0", "CVE-2026-4372")}
TRAINERS = {"sft": train_sft, "reward": train_reward, "rl": train_rl, "staged": train_staged}
JOBS = [*((script.main, ("--training.mode", mode)) for mode, script in TRAINERS.items())]
JOBS += [(evaluate.main, ("--checkpoints", "base=tiny", *more)) for more in ((), ("--export", "merged"))]


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("job", range(len(JOBS)))
def test_old_libraries_are_refused_before_a_model_is_opened(tmp_path, name, job):
    old, hole = OLD[name]
    main, more = JOBS[job]

    def body(main, argv):
        sys.modules[name].__version__ = old
        transformers.Gemma3ForCausalLM.from_pretrained = tiny.ensure = None  # who calls them ends with a traceback
        processes.call(main, argv)

    argv = ["--debug", "--logging.output_dir", tmp_path / "out", *more]
    status, _, err = processes.run(main, tmp_path, argv, body)
    assert status == 2 and err.startswith(f"error: {name} {old} is refused") and err.count("\n") == 1, (status, err)
    assert hole in err and "SECURITY.md" in err and "requirements.txt" in err


@pytest.mark.parametrize(
    ("library", "version", "fine"),
    [
        ("torch", "2.10.0", True),
        ("torch", "2.13.0+cpu", True),
        ("torch", "3.0", True),
        ("torch", "2.9.9", False),
        ("torch", "2.5.1", False),
        ("torch", "2.10.0a0+git1234567", False),  # built before the fix, or not: nobody can tell
        ("transformers", "5.3.0", True),
        ("transformers", "5.23.0", True),
        ("transformers", "5.2.9", False),
        ("transformers", "5.3.0.dev0", False),
        ("transformers", "4.57.6", False),
    ],
)
def test_the_order_of_versions(monkeypatch, library, version, fine):
    monkeypatch.setattr(sys.modules[library], "__version__", version)
    if fine:
        versions.check()
    else:
        with pytest.raises(UserError, match=f"{library} {version[:5]}"):
            versions.check()


def test_the_pinned_versions_are_allowed():
    versions.check()
    assert set(versions.OLDEST) <= set(log.PACKAGES)  # and run.json says which they were
