"""training.recompute: not a bit of a run changes, the backward keeps less, and auto looks at what is free."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from common import gemma
from common.runtime import explain, recompute
from tests import checks, inputs, processes
from tests.faults import trainers
from tests.test_gemma import LENGTHS, random_gemma, sequences

own_cache = trainers.cache
PARENTS = [None, 0, 0, None, 3, None]


def gradients(again):
    """({name: gradient}, bytes that autograd's graph holds before the backward) with prompts that rows share."""
    net = random_gemma()
    inputs.random_adapter(net, "policy", 1, dropout=0.3)
    net.train()
    if again:
        net.model.gradient_checkpointing = True
    torch.manual_seed(5)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        hidden = gemma.hidden_states(net, torch.cat(sequences()), LENGTHS, PARENTS)
    hidden.square().sum().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}, sum(kept)


def test_gradients_keep_their_bits_and_the_graph_holds_less():
    (plain, whole), (again, inputs_only) = gradients(False), gradients(True)
    assert plain.keys() == again.keys() and len(plain) > 40
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert inputs_only < whole / 10


@pytest.mark.parametrize("kind", trainers.KINDS)
def test_a_run_keeps_its_bits(tmp_path, micro_folder, kind):
    main, source = trainers.main_of(kind), trainers.write_data(tmp_path / "data", kind)
    flags = trainers.settings(kind, micro_folder, source, "--training.max_steps", 2)
    for choice in ("never", "always"):
        processes.train(main, tmp_path, flags(tmp_path / choice, "--training.recompute", choice))
    checks.assert_same_run(tmp_path / "always" / "run", tmp_path / "never" / "run")


def chosen(choice, free, monkeypatch, tokens=64):
    monkeypatch.setattr(recompute, "free_bytes", lambda device: free)
    net = random_gemma()
    training = SimpleNamespace(recompute=choice, micro_batch_tokens=32)
    run = SimpleNamespace(cfg=SimpleNamespace(training=training), autocast=contextlib.nullcontext())
    assert recompute.choose(run, net, [*net.parameters()], [8, tokens], 100.0) == net.model.gradient_checkpointing
    return net.model.gradient_checkpointing


def test_auto_compares_the_plan_with_what_is_free(monkeypatch, capfd):
    net = random_gemma()
    plan = explain.memory_plan(net, [*net.parameters()], (64, 64, True))["update"]
    needed = sum(size for _, size in plan)
    assert chosen("auto", needed / 0.89, monkeypatch) is False and capfd.readouterr().err == ""
    assert chosen("auto", needed / 0.91, monkeypatch) is True
    said = capfd.readouterr()
    assert "layers are computed again in the backward" in said.out + said.err
    assert chosen("auto", None, monkeypatch) is False  # a system that does not say
    assert chosen("never", 0, monkeypatch) is False and chosen("always", 1e15, monkeypatch) is True


def test_free_memory_is_the_smaller_of_machine_and_container(tmp_path, monkeypatch):
    machine = tmp_path / "meminfo"
    machine.write_text("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:   7 kB\n")
    assert recompute.available_of_machine(machine) == 7 * 1024
    for name, text in (
        ("memory.max", "9000"),
        ("memory.current", "5000"),
        ("memory.stat", "anon 4\ninactive_file 700"),
    ):
        (tmp_path / name).write_text(f"{text}\n")
    assert recompute.available_of_container(tmp_path) == 4700
    (tmp_path / "memory.max").write_text("max\n")
    assert recompute.available_of_container(tmp_path) is None
    assert recompute.available_of_machine(tmp_path / "none") is None


def test_a_wrong_choice_is_named(tmp_path, micro_folder):
    source = trainers.write_data(tmp_path / "data", "sft")
    argv = trainers.settings("sft", micro_folder, source)(tmp_path, "--training.recompute", "sometimes")
    line = processes.refused(trainers.main_of("sft"), tmp_path, argv)
    assert "training.recompute" in line and "auto | always | never" in line
