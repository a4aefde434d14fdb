"""What a checkpoint holds, what is published of it, and the lock of a run folder; its faults are in tests/faults/."""

import hashlib
import json

import pytest
import torch

from common.log import UserError
from common.runtime import checkpoint
from tests.faults.children import assert_is, load_step, relock, save, save_step, strays, write_model

# ---------------------------------------------------------------- round trip


def test_round_trip_layout_and_modes(tmp_path):
    tensors = {
        "optimizer": {"m": torch.randn(3, 5).T, "step": torch.tensor(7.0), "b": torch.randn(4).bfloat16()},
        "critic": {"torch": torch.get_rng_state()},
    }
    state = {"step": 3, "lr": 0.1 + 0.2, "nan": [1e300, -0.0], "text": "ü"}
    folder = save_step(tmp_path / "a" / "b", 3, tensors, state, write_model)
    assert folder == tmp_path / "a" / "b" / "step-000003"
    back, back_state = load_step(folder)
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
    save(run_dir, 100)
    assert_is(folder, 100)
    save(run_dir, 100, extra="another run")
    assert_is(folder, 100, "another run")
    (folder / "optimizer.safetensors").write_bytes(b"damaged")
    save(run_dir, 100, extra="another run")
    assert_is(folder, 100, "another run")
    assert not strays(run_dir)


# ---------------------------------------------------------------- publish


def test_publish(fresh):
    run_dir = fresh(200)
    best = checkpoint.publish(run_dir / "step-000100", run_dir, "best")
    assert {p.name for p in best.iterdir()} == {
        "MANIFEST.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "rng.safetensors",
        "state.json",
    }
    assert checkpoint.verify(checkpoint.publish(run_dir / "step-000200", run_dir, "best"))["step"] == 200
    with pytest.raises(UserError, match="published copy"):
        load_step(best)
    (run_dir / "step-000100" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter_config"):
        checkpoint.publish(run_dir / "step-000100", run_dir, "best")
    assert checkpoint.verify(best)["step"] == 200 and not strays(run_dir)


# ---------------------------------------------------------------- numbers and locks


def test_numbers_not_names_decide(tmp_path):
    for step in (999_999, 1_000_000, 5):
        save(tmp_path, step)
    assert checkpoint.newest(tmp_path).name == "step-1000000"


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
