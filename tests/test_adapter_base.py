"""An adapter belongs to the base it was trained on, in 4 bits or not: every script that takes one minds it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import serve
import train_reward
import train_rl
import train_sft
import train_staged
from common import config, data, log, lora, model
from common.log import UserError
from common.runtime import base, checkpoint
from tests import checks, inputs, processes
from tests.faults import inject, trainers

SHORT = ["--training.max_steps", 2, "--training.eval_interval", 2]
DPO = ["--rl.algorithm", "dpo", "--rl.max_steps", 2]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return inputs.write_data(tmp_path_factory.mktemp("data") / "few", "safety", train=20, val=6, test=8)


@pytest.fixture(scope="module")
def other(tmp_path_factory, micro_folder):
    """A base of the same shape with another weight."""
    return inputs.another_base(tmp_path_factory.mktemp("other") / "base", micro_folder)


@pytest.fixture(scope="module")
def settings(few, micro_folder):
    return inputs.settings(micro_folder, few)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, settings):
    """The final/ of SFT."""
    out = tmp_path_factory.mktemp("trained")
    processes.train(train_sft.main, out, settings(out, *SHORT))
    return out / "run" / "final"


def asked(folder, few, *checkpoints):
    """The flags of evaluate.py; each adapter stands on the base that its files name."""
    sizes = ["--evaluation.max_items", 4, "--evaluation.max_new_tokens", 8, "--evaluation.draws", 100]
    where = ["--dataset_path", few, "--logging.output_dir", folder]
    kind = ["--logging.run_name", "run", "--reward.type", "heuristic", "--model.dtype", "float32"]
    return ["--debug", *sizes, *where, *kind, "--checkpoints", *checkpoints]


def without_record(folder, target):
    """A copy of a sealed folder as it was before there were records."""
    sealed = checkpoint.verify(folder)
    facts = {key: sealed[key] for key in ("step", "tensors") if key in sealed}
    with checkpoint.commit(target, facts, 0) as temp:
        for name in sealed["files"].keys() - {base.RECORD}:
            shutil.copyfile(folder / name, temp / name)
    return target


# ---------------------------------------------------------------- what is written


def test_the_record_names_the_base_and_peft_passes_it_by(trained, micro_folder):
    import peft

    record = json.loads((trained / "base.json").read_text())
    assert record == {
        "base_checkpoint": str(micro_folder),
        "fingerprint": base.fingerprint(micro_folder),
        "quantised": None,
    }
    assert "base.json" in checkpoint.verify(trained)["files"]
    net, _ = model.load(str(micro_folder), torch.device("cpu"), torch.float32)
    assert peft.PeftModel.from_pretrained(net, trained).peft_config["default"].r == 8


def test_a_record_that_is_changed_or_damaged_is_one_line(tmp_path, trained, settings):
    folder = shutil.copytree(trained, tmp_path / "changed")
    (folder / "base.json").write_text("{}")
    flags = settings(tmp_path, "--model.adapter", folder)
    processes.refused(train_sft.main, tmp_path, flags, "base.json is damaged")
    (folder / "MANIFEST.json").unlink()
    for text in ("{}", "[", '{"base_checkpoint": 1, "fingerprint": "", "quantised": null}', "[" * 10**5):
        (folder / "base.json").write_text(text)
        processes.refused(train_sft.main, tmp_path, flags, "base.json", "does not say which base")


# ---------------------------------------------------------------- where an adapter meets a base


def test_training_from_an_adapter_of_another_base_is_refused(tmp_path, trained, few, micro_folder, other):
    words = [str(trained), "another base", str(micro_folder), str(other), f"--model.base_checkpoint {micro_folder}"]
    start = ["--model.adapter", trained, *SHORT]
    for mode, main in (("sft", train_sft.main), ("reward", train_reward.main), ("rl", train_rl.main)):
        flags = [*start, "--training.mode", mode, *(DPO if mode == "rl" else [])]
        processes.refused(main, tmp_path, inputs.settings(other, few)(tmp_path / mode, *flags), *words)
        processes.train(main, tmp_path, inputs.settings(micro_folder, few)(tmp_path / mode, *flags))
    flags = [*start, "--training.mode", "staged", "--rl.algorithm", "dpo"]
    processes.refused(train_staged.main, tmp_path, inputs.settings(other, few)(tmp_path / "staged", *flags), *words)


def test_it_starts_from_its_own_base_wherever_that_lies(tmp_path, trained, few, micro_folder):
    moved = shutil.copytree(micro_folder, tmp_path / "moved")
    flags = inputs.settings(moved, few)(tmp_path, "--model.adapter", trained, *SHORT)
    processes.train(train_sft.main, tmp_path, flags)
    record = json.loads((tmp_path / "run" / "final" / "base.json").read_text())
    assert record["base_checkpoint"] == str(moved) and record["fingerprint"] == base.fingerprint(micro_folder)


@pytest.fixture
def changed(tmp_path, micro_folder, few):
    """The final/ of DPO from an adapter on a base whose files have changed since."""
    home = shutil.copytree(micro_folder, tmp_path / "home")
    flags = inputs.settings(home, few)
    processes.train(train_sft.main, tmp_path, flags(tmp_path / "sft", *SHORT))
    more = ["--training.mode", "rl", *DPO, "--model.adapter", tmp_path / "sft" / "run" / "final"]
    processes.train(train_rl.main, tmp_path, flags(tmp_path / "rl", *SHORT, *more))
    shutil.rmtree(home)
    inputs.another_base(home, micro_folder)
    return tmp_path / "rl" / "run" / "final"


def test_a_changed_base_is_refused_by_evaluate_export_and_serve(tmp_path, changed, few, micro_folder):
    words = [str(changed), "another base", str(tmp_path / "home"), "have changed since"]
    for home in (micro_folder, tmp_path / "home"):
        flags = asked(tmp_path / "out", few, f"base={home}", f"rl={changed}")
        status, _, err = processes.run(evaluate.main, tmp_path, flags)
        assert status == 2 and err.count("\n") == 1 and "have changed since" in err, err
    flags = asked(tmp_path, few, f"rl={changed}", "--export", tmp_path / "merged")
    processes.refused(evaluate.main, tmp_path, flags, *words)
    assert not (tmp_path / "merged").exists()
    processes.refused(serve.main, tmp_path, ["--port", 0, "--checkpoint", changed], *words)


def test_a_reference_stands_on_the_base_of_its_policy(tmp_path, few, micro_folder, other):
    """RL on one base, compared on another: the KL to the reference is that of the run, as if its base were home."""
    flags = inputs.settings(other, few)
    processes.train(train_sft.main, tmp_path, flags(tmp_path / "sft", *SHORT))
    more = ["--training.mode", "rl", *DPO, "--model.adapter", tmp_path / "sft" / "run" / "final"]
    processes.train(train_rl.main, tmp_path, flags(tmp_path / "rl", *SHORT, *more))
    found = []
    for number, home in enumerate((other, micro_folder)):
        system = f"rl={tmp_path / 'rl' / 'run' / 'final'}"
        argv = asked(tmp_path / str(number), few, f"base={home}", system)
        found.append(processes.train(evaluate.main, tmp_path, argv)["cells"])
    own, foreign = (cells["kl_reference"]["rl"]["value"] for cells in found)
    assert own == foreign > 0
    assert found[0]["kl_base"]["rl"]["value"] != found[1]["kl_base"]["rl"]["value"]


@pytest.fixture
def moved(tmp_path, micro_folder, few):
    """(final/ of SFT on a base that was moved since, where the base lies now)"""
    home, away = shutil.copytree(micro_folder, tmp_path / "X"), tmp_path / "Y"
    processes.train(train_sft.main, tmp_path, inputs.settings(home, few)(tmp_path / "sft", *SHORT))
    return tmp_path / "sft" / "run" / "final", home.rename(away)


def test_a_base_that_was_moved_is_named_by_the_flag(tmp_path, moved, few, other):
    """B12: evaluate, export, serve and training take the flag's base, if it is the one."""
    final, away = moved
    argv = asked(tmp_path, few, f"base={away}", f"sft={final}")
    words = [str(final), "is gone", str(tmp_path / "X"), "--model.base_checkpoint"]
    processes.refused(evaluate.main, tmp_path, argv, *words)
    here = ["--model.base_checkpoint", away]
    cells = processes.train(evaluate.main, tmp_path, [*argv, *here])["cells"]
    assert cells["kl_base"]["sft"]["value"] > 0 == cells["kl_base"]["base"]["value"]
    export = asked(tmp_path, few, f"sft={final}", "--export", tmp_path / "merged")
    processes.train(evaluate.main, tmp_path, [*export, *here])
    assert json.loads((tmp_path / "merged" / "export.json").read_text())["base"] == str(away)
    found, _ = serve.load({"sft": str(final)}, torch.device("cpu"), torch.float32, str(away))
    assert found["sft"][0].base_folder == away
    flags = inputs.settings(away, few)(tmp_path / "more", *SHORT, "--model.adapter", final)
    processes.train(train_sft.main, tmp_path, flags)

    words = [str(final), "another base", str(tmp_path / "X"), str(other)]
    wrong = ["--model.base_checkpoint", other]
    processes.refused(evaluate.main, tmp_path, [*argv, *wrong], *words)
    shutil.rmtree(tmp_path / "merged")
    processes.refused(evaluate.main, tmp_path, [*export, *wrong], *words)
    assert not (tmp_path / "merged").exists()
    processes.refused(serve.main, tmp_path, ["--port", 0, "--checkpoint", final, *wrong], *words)
    away.rename(tmp_path / "X")  # back at home: the flag wins all the same
    processes.refused(evaluate.main, tmp_path, [*export, *wrong], *words)


def test_what_full_rl_started_from_is_found_where_it_was_moved(tmp_path, micro_folder, few, other):
    home, away = shutil.copytree(micro_folder, tmp_path / "X"), tmp_path / "Y"
    flags = inputs.settings(home, few)(tmp_path / "rl", *SHORT, "--training.mode", "rl", *DPO, peft="none")
    processes.train(train_rl.main, tmp_path, flags)
    home.rename(away)
    argv = asked(tmp_path, few, f"base={away}", f"rl={tmp_path / 'rl' / 'run' / 'final'}")
    processes.refused(evaluate.main, tmp_path, [*argv, "--model.base_checkpoint", other], str(home))
    cells = processes.train(evaluate.main, tmp_path, [*argv, "--model.base_checkpoint", away])["cells"]
    assert cells["kl_reference"]["rl"]["value"] == cells["kl_base"]["rl"]["value"] > 0


def test_packed_runs_work_elsewhere(tmp_path, micro_folder, few):
    """Two stages and their base, in an archive; nothing is left where they were trained."""
    home = shutil.copytree(micro_folder, tmp_path / "old" / "base")
    flags = inputs.settings(home, few)
    processes.train(train_sft.main, tmp_path, flags(tmp_path / "old" / "sft", *SHORT))
    more = ["--training.mode", "rl", *DPO, *SHORT]
    start = ["--model.adapter", f"{tmp_path / 'old' / 'sft' / 'run' / 'final'}@0.5"]
    processes.train(train_rl.main, tmp_path, flags(tmp_path / "old" / "rl", *more, *start))
    argv = asked(tmp_path / "first", few, f"base={home}", f"rl={tmp_path / 'old' / 'rl' / 'run' / 'final'}")
    right = processes.train(evaluate.main, tmp_path, argv)["cells"]

    archive = shutil.make_archive(str(tmp_path / "packed"), "gztar", tmp_path / "old")
    shutil.rmtree(tmp_path / "old")
    new = tmp_path / "new"
    shutil.unpack_archive(archive, new)
    here = ["--model.base_checkpoint", new / "base"]
    system = f"rl={new / 'rl' / 'run' / 'final'}"
    cells = processes.train(evaluate.main, tmp_path, [*asked(tmp_path, few, f"base={new / 'base'}", system), *here])[
        "cells"
    ]
    assert cells == right and cells["kl_reference"]["rl"]["value"] > 0
    cost = json.loads((tmp_path / "run" / "results.json").read_text())["cost"]["rl"]
    assert [stage["name"] for stage in cost["stages"]] == ["run", "run"]  # both stages were found
    processes.train(evaluate.main, tmp_path, [*asked(tmp_path, few, system, "--export", tmp_path / "merged"), *here])
    assert serve.load({"rl": str(new / "rl" / "run")}, torch.device("cpu"), torch.float32, str(new / "base"))[0]["rl"][
        1
    ]
    more += ["--rl.max_steps", 4, "--model.adapter", f"{new / 'sft' / 'run' / 'final'}@0.5"]
    flags = inputs.settings(new / "base", few)(new / "rl", *more)
    (new / "sft").rename(new / "not packed")
    status, out, err = processes.run(evaluate.main, tmp_path, [*asked(tmp_path / "alone", few, system), *here])
    left = f"rl started from {tmp_path / 'old' / 'sft' / 'run' / 'final'}@0.5, which is gone: the KL to it"
    assert status == 0 and left in out, (out, err)
    alone = json.loads((tmp_path / "alone" / "run" / "results.json").read_text())
    assert [note for note in alone["notes"] if note.startswith(left)]
    assert alone["cells"].keys() == cells.keys() - {"kl_reference"}
    assert all(row["rl"] == cells[name]["rl"] for name, row in alone["cells"].items())
    assert [stage["name"] for stage in alone["cost"]["rl"]["stages"]] == ["run"]
    processes.refused(train_rl.main, tmp_path, flags, "model.adapter", "sft", "no such folder")

    (new / "not packed").rename(new / "sft")
    status, out, err = processes.run(train_rl.main, tmp_path, flags)
    assert status == 0 and "at step 2 of 4" in out, (out, err)


# ---------------------------------------------------------------- a run's folder in place of its final/


def test_a_run_stands_for_its_final_where_one_is_looked_at(tmp_path, trained, few, micro_folder):
    """B13: evaluate, export and serve."""
    run = shutil.copytree(trained.parent, tmp_path / "outputs" / "run")
    status, out, err = processes.run(
        evaluate.main, tmp_path, asked(tmp_path, few, f"base={micro_folder}", f"sft={run}")
    )
    assert status == 0 and f"{run} is a run: its final/ is taken\n" in out, (out, err)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["cost"]["sft"]["tokens"] > 0  # its run was found
    argv = asked(tmp_path, few, f"sft={run}", "--export", tmp_path / "merged")
    status, out, err = processes.run(evaluate.main, tmp_path, argv)
    assert status == 0 and f"{run} is a run: its final/ is taken\n" in out, (out, err)
    sources = serve.parse_models([str(run)])
    assert sources == {"run": str(run)}
    assert serve.load(sources, torch.device("cpu"), torch.float32)[0]["run"][1]

    shutil.rmtree(run / "final")  # stopped before its end
    argv = ["--port", 0, "--checkpoint", run]
    processes.refused(serve.main, tmp_path, argv, f"{run} is no checkpoint: did you mean {run / 'best'}?")
    shutil.copytree(trained.parent, tmp_path / "outputs" / "staged" / "sft")
    staged = tmp_path / "outputs" / "staged"
    argv = ["--port", 0, "--checkpoint", staged]
    processes.refused(serve.main, tmp_path, argv, f"did you mean {staged / 'sft' / 'final'}?")


def test_a_run_named_in_a_setting_is_refused_with_its_final(tmp_path, trained, few, micro_folder, settings):
    """D23: a setting is kept in the run's record, so it has to say which checkpoint."""
    run = trained.parent
    for script, mode in ((train_sft, "sft"), (train_reward, "reward"), (train_rl, "rl")):
        flags = ["--training.mode", mode, "--rl.algorithm", "dpo"] if mode == "rl" else ["--training.mode", mode]
        argv = settings(tmp_path, *SHORT, *flags, "--model.adapter", run)
        processes.refused(script.main, tmp_path, argv, f"model.adapter: {run} ", f"did you mean {trained}?")
    hybrid = ["--reward.type", "hybrid"]
    argv = settings(tmp_path, "--training.mode", "rl", "--rl.algorithm", "grpo", *hybrid, "--reward.checkpoint", run)
    processes.refused(train_rl.main, tmp_path, argv, f"reward.checkpoint: {run} ", f"did you mean {trained}?")
    argv = trainers.staged_settings(micro_folder, few)(tmp_path, *hybrid, "--reward.checkpoint", run)
    processes.refused(train_staged.main, tmp_path, argv, f"reward.checkpoint: {run} ", f"did you mean {trained}?")
    for key in ("evaluation.reward_checkpoint", "reward.checkpoint"):
        argv = asked(tmp_path, few, f"base={micro_folder}", f"--{key}", run, "--reward.type", "trainable")
        processes.refused(evaluate.main, tmp_path, argv, f"{key}: {run} ", f"did you mean {trained}?")
    argv = inputs.settings(run, few)(tmp_path, *SHORT)
    processes.refused(train_sft.main, tmp_path, argv, str(run), f"did you mean {trained}?")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- without a record


def test_adapters_without_a_record_are_taken(tmp_path, trained, few, micro_folder, other):
    old = without_record(trained, tmp_path / "old" / "final")
    assert not (old / "base.json").exists()
    for folder in (micro_folder, other):
        net, _ = model.load(str(folder), torch.device("cpu"), torch.float32)
        model.load_adapter(net, "policy", old)
    with pytest.raises(UserError, match="another base"):
        model.load_adapter(net, "next", trained)


def test_a_run_begun_without_records_goes_on_to_the_same_adapter(tmp_path, settings):
    flags = [*SHORT, "--training.save_interval", 1, "--training.max_steps", 4]
    processes.train(train_sft.main, tmp_path, settings(tmp_path / "whole", *flags))
    argv = settings(tmp_path / "cut", *flags)
    assert processes.run(train_sft.main, tmp_path, argv, inject.crash_behind_save(2))[0] == 9
    for step in sorted((tmp_path / "cut" / "run").glob("step-*")):
        without_record(step, tmp_path / "old" / step.name)
        shutil.rmtree(step)
        shutil.copytree(tmp_path / "old" / step.name, step)
    processes.train(train_sft.main, tmp_path, argv)
    checks.assert_same_records(tmp_path / "cut" / "run", tmp_path / "whole" / "run")
    one, two = (load_file(tmp_path / name / "run" / "final" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "cut" / "run" / "final" / "base.json").is_file()


# ---------------------------------------------------------------- at a scale of its own: DIR@0.5


@pytest.fixture(scope="module")
def half(tmp_path_factory, trained):
    """The adapter in `trained` with every B halved: what DIR@0.5 is."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("half") / "final")
    (folder / "MANIFEST.json").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {key: tensor * (0.5 if "lora_B" in key else 1.0) for key, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def on_base(micro_folder, adapter, items):
    net, _ = model.load(str(micro_folder), torch.device("cpu"), torch.float32)
    model.load_adapter(net, "policy", adapter)
    return logprobs(net, items)


def test_an_adapter_at_half_its_scale(trained, half, micro_folder, items):
    whole, right = (on_base(micro_folder, folder, items) for folder in (trained, half))
    assert torch.equal(on_base(micro_folder, f"{trained}@1", items), whole)
    found = on_base(micro_folder, f"{trained}@0.5", items)
    assert (found - right).abs().max() < 1e-5 and (whole - right).abs().max() > 1e-3
    hashes = model.adapter_fingerprint(trained)
    assert model.adapter_fingerprint(f"{trained}@1") == hashes
    assert model.adapter_fingerprint(f"{trained}@0.5") == [*hashes, 0.5]
    named = shutil.copytree(trained, half.parent / "final@2")  # a folder of that very name
    assert torch.equal(on_base(micro_folder, named, items), whole)


def test_a_scale_in_evaluate_and_serve(tmp_path, trained, half, few, micro_folder, items):
    run = trained.parent  # its final/
    argv = asked(tmp_path, few, f"base={micro_folder}", f"sft={run}", f"part={run}@0.5", f"right={half}")
    cells = processes.train(evaluate.main, tmp_path, argv)["cells"]["loss_per_byte"]
    assert cells["part"]["value"] == pytest.approx(cells["right"]["value"], rel=1e-6)
    assert cells["part"]["value"] != pytest.approx(cells["sft"]["value"], rel=1e-6)
    argv = asked(tmp_path, few, f"base={micro_folder}", f"sft={run}@0.25", f"part={run}@0.5")
    status, out, err = processes.run(evaluate.main, tmp_path, argv)
    assert status == 0 and "part-0: answered before" in out and "sft-0: answered before" not in out, (out, err)
    cost = json.loads((tmp_path / "run" / "results.json").read_text())["cost"]
    assert cost["part"] == cost["sft"] and cost["part"]["tokens"] > 0

    served, _ = serve.load({"sft": str(trained), "part": f"{trained}@0.5"}, torch.device("cpu"), torch.float32)
    assert served["sft"][0] is served["part"][0]
    for name, folder in (("sft", trained), ("part", half)):
        net, inner = served[name]
        with lora.using(net, inner):
            assert (logprobs(net, items) - on_base(micro_folder, folder, items)).abs().max() < 1e-5


def test_training_starts_from_an_adapter_at_a_scale(tmp_path, trained, half, settings):
    """It starts as that adapter, keeps the scale in PEFT's words, and is resumed with no other."""
    for name, start in (("right", half), ("cut", f"{trained}@0.5")):
        argv = settings(tmp_path / name, *SHORT, "--model.adapter", start)
        processes.train(train_sft.main, tmp_path, argv)
    first, right = (checks.lines(tmp_path / name / "run")[0]["eval/loss"] for name in ("cut", "right"))
    assert first == pytest.approx(right, rel=1e-6)
    alphas = [
        json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
        for folder in (trained, tmp_path / "cut" / "run" / "final")
    ]
    assert alphas[1] == alphas[0] / 2
    argv = settings(tmp_path / "cut", *SHORT, "--model.adapter", trained, "--training.max_steps", 4)
    processes.refused(train_sft.main, tmp_path, argv, "cannot be resumed", "start", "0.5")


def test_a_bad_scale_is_one_line(tmp_path, trained, few, micro_folder, settings):
    for text in ("0", "-1", "nan", "inf", "11", "half", ""):
        argv = asked(tmp_path, few, f"base={micro_folder}", f"sft={trained}@{text}")
        processes.refused(evaluate.main, tmp_path, argv, f"{trained}@{text}", "DIR@SCALE", "above 0 and at most 10")
    argv = settings(tmp_path, *SHORT, "--model.adapter", f"{trained}@x")
    processes.refused(train_sft.main, tmp_path, argv, "DIR@SCALE")
    processes.refused(serve.main, tmp_path, ["--port", 0, "--checkpoint", f"{micro_folder}@0.5"], "only an adapter")


# ---------------------------------------------------------------- in 4 bits or not


@pytest.fixture(scope="module")
def small(tmp_path_factory, settings):
    """The final/ of QLoRA."""
    out = tmp_path_factory.mktemp("small")
    processes.train(train_sft.main, out, settings(out, *SHORT, peft="qlora"))
    return out / "run" / "final"


@pytest.fixture
def items(few, tokenizer):
    return data.encode_records(data.load_split(few, "test"), tokenizer, 128)[0]


def logprobs(net, items):
    tokens, mask = data.collate(items)
    with torch.no_grad():
        return model.sequence_logprobs(net, tokens, mask)


def test_training_from_a_qlora_adapter_needs_qlora(tmp_path, small, trained, settings):
    assert json.loads((small / "base.json").read_text())["quantised"] == "nf4"
    words = [str(small), "4-bit base", "--model.peft_type qlora"]
    for mode, main in (("sft", train_sft.main), ("reward", train_reward.main), ("rl", train_rl.main)):
        flags = ["--training.mode", mode, *(DPO if mode == "rl" else [])]
        processes.refused(main, tmp_path, settings(tmp_path / mode, *SHORT, *flags, "--model.adapter", small), *words)
    processes.train(
        train_sft.main, tmp_path, settings(tmp_path / "same", *SHORT, "--model.adapter", small, peft="qlora")
    )
    argv = settings(tmp_path / "other", *SHORT, "--model.adapter", trained, peft="qlora")  # usual after LoRA
    status, out, err = processes.run(train_sft.main, tmp_path, argv)
    assert status == 0 and out.count("trained on the unquantised base") == 1, (out, err)


def test_evaluate_measures_each_adapter_on_the_base_it_knows(tmp_path, small, trained, few, micro_folder):
    argv = asked(tmp_path, few, f"base={micro_folder}", f"lora={trained}", f"qlora={small}")
    cells = processes.train(evaluate.main, tmp_path, argv)["cells"]["loss_per_byte"]
    given = {word[2:]: str(value) for word, value in zip(argv[1:-3:2], argv[2:-3:2]) if word.startswith("--eval")}
    cfg = config.load_config("configs/debug.yml", given)
    for name, folder, quantised in (("base", None, False), ("lora", trained, False), ("qlora", small, True)):
        found = []
        for bits in (quantised, not quantised):
            net, tokenizer = model.load(str(micro_folder), torch.device("cpu"), torch.float32, quantize=bits)
            lora.wrap(net)
            if folder:
                model.load_adapter(net, "policy", folder, trainable=False, any_bits=True)
            lines = evaluate.evaluate(net, tokenizer, data.load_split(few, "test"), cfg)
            found.append(lines["metrics"]["loss_per_byte"]["value"])
        assert cells[name]["value"] == pytest.approx(found[0], rel=1e-6), name
        assert cells[name]["value"] != pytest.approx(found[1], rel=1e-4), name
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "measured on it: qlora." in " ".join(results["notes"])


def test_serve_holds_each_adapter_beside_the_base_it_knows(small, trained, micro_folder, items):
    sources = {"base": str(micro_folder), "lora": str(trained), "qlora": str(small)}
    found, _ = serve.load(sources, torch.device("cpu"), torch.float32)
    assert found["base"][0] is found["lora"][0] is not found["qlora"][0]
    net, _ = model.load(str(micro_folder), torch.device("cpu"), torch.float32, quantize=True)
    model.load_adapter(net, "policy", small)
    served, name = found["qlora"]
    with lora.using(served, name):
        assert torch.equal(logprobs(served, items), logprobs(net, items))
    with lora.using(served, None), lora.using(net, "policy"):
        assert not torch.equal(logprobs(served, items), logprobs(net, items))


def test_an_older_qlora_run_is_known_by_its_config(tmp_path, small):
    shutil.copytree(small.parent, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    final = without_record(small, tmp_path / "run" / "final")
    assert base.record(final) is None and model.trained_quantised(final)
    assert not model.trained_quantised(without_record(small, tmp_path / "alone" / "final"))


def test_a_comparison_of_paradigms_in_4_bits_comes_to_its_end(tmp_path, few, micro_folder):
    """With reward model and judge, all trained on the 4-bit base and measured on it."""
    flags = trainers.staged_settings(micro_folder, few)(
        tmp_path, "--model.peft_type", "qlora", "--reward.type", "hybrid"
    )
    more = ["--paradigms", "sft,staged", "--training.budget_tokens", 1500, "--evaluation.max_items", 4]
    cells = processes.train(train_staged.main, tmp_path, [*flags, *more])["cells"]
    assert {"reward", "loss_per_byte"} <= cells.keys() and {"sft", "staged"} <= cells["reward"].keys()
    _, *rows = log.read_records(tmp_path / "run" / "comparison" / "items" / "staged-0.jsonl")
    assert len(rows) == 4 and all("judge" in row["scores"] for row in rows)
    first = checks.lines(tmp_path / "run" / "staged-rl")[0]
    assert first["eval/kl"] == 0  # RL starts from the very policy that SFT ended with

    reward = tmp_path / "run" / "reward" / "final"
    flags = trainers.staged_settings(micro_folder, few)(tmp_path / "lora", "--reward.type", "hybrid")
    words = ["reward.checkpoint", str(reward), "4-bit base"]
    processes.refused(train_staged.main, tmp_path, [*flags, "--reward.checkpoint", reward], *words)
    assert not (tmp_path / "lora" / "run").exists()  # before SFT
