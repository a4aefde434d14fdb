"""train_rl.py end to end, DPO: where it starts, what it leaves behind, its reference, exact resume, refusals."""

import functools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_rl
from common import config, data, lora, model, pairs, reward_model
from common.runtime import base, cache
from tests import checks, inputs, processes
from tests.checks import lines
from tests.faults import inject, trainers
from tests.inputs import write_data

ROOT = Path(train_rl.__file__).parent
MAIN = train_rl.main
train, run, refused = (functools.partial(each, MAIN) for each in (processes.train, processes.run, processes.refused))
few, settings, straight = trainers.fixtures("dpo")
own_cache = trainers.cache
LOG2 = math.log(2)


def plain_model(base_folder, adapter=None):
    """The base, or a full fine-tune's folder, by plain transformers, with an adapter by plain peft."""
    import peft
    import transformers

    torch.set_num_threads(1)
    net = transformers.Gemma3ForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    return (peft.PeftModel.from_pretrained(net, adapter) if adapter else net).eval()


@pytest.fixture(scope="module")
def bare(micro_folder):
    return plain_model(micro_folder)


@torch.no_grad()
def answer_logprobs(net, example):
    """Log-softmax (n, V) at each of the n tokens of an answer, and the tokens."""
    ids, mask = torch.tensor(example["ids"]), torch.tensor(example["mask"]).bool()
    return torch.log_softmax(net(ids[None]).logits[0, :-1].double(), -1)[mask[1:]], ids[mask]


def oracle(policy, ref, encoded):
    """Sums of log-probs (pairs, 2) under policy and reference, sizes (pairs, 2), and KL a token of chosen answers."""
    sums, ref_sums, sizes, kl = [], [], [], []
    for pair in encoded:
        for side in ("chosen", "rejected"):
            (p, ids), (q, _) = answer_logprobs(policy, pair[side]), answer_logprobs(ref, pair[side])
            for found, logprobs in ((sums, p), (ref_sums, q)):
                found.append(logprobs.gather(1, ids[:, None]).sum().item())
            sizes.append(len(ids))
            if side == "chosen":
                kl.append((p.exp() * (p - q)).sum(-1))
    sums, ref_sums, sizes = (torch.tensor(each, dtype=torch.float64).view(-1, 2) for each in (sums, ref_sums, sizes))
    return sums, ref_sums, sizes, torch.cat(kl).mean().item()


def first_batch(source, tokenizer, size=4):
    """The pairs of step 0."""
    encoded = inputs.pairs_of(source, "train", tokenizer)
    rows = data.epoch_batches([data.pair_tokens(pair) for pair in encoded], size, 0, 0)[0]
    return [encoded[i] for i in rows]


# ---------------------------------------------------------------- a run, and what it leaves behind


def test_it_learns_and_leaves_its_files(tmp_path, tiny_folder, tokenizer):
    source = write_data(tmp_path / "data", "safety", train=128, val=40)
    argv = ["--config", ROOT / "configs" / "dpo_270m.yml", "--debug", "--dataset_path", source]
    argv += ["--logging.output_dir", tmp_path, "--model.base_checkpoint", tiny_folder, "--rl.max_steps", 16]
    argv += ["--rl.learning_rate", 1.5e-3, "--training.batch_size", 8]
    argv += ["--training.eval_interval", 8, "--training.save_interval", 4]
    status, out, err = run(tmp_path, argv, pictures=True)
    assert status == 0, err
    run_dir = tmp_path / "dpo_270m-debug"
    assert {path.name for path in run_dir.iterdir()} == {
        ".lock",
        "config.yml",
        "run.json",
        "metrics.jsonl",
        "curves.png",
        "report.json",
        "best",
        "final",
        "step-000012",
        "step-000016",
    }
    log, report = lines(run_dir), json.loads((run_dir / "report.json").read_text())
    assert [line["step"] for line in log] == list(range(17))
    assert [line["step"] for line in log if "eval/loss" in line] == [0, 8, 16]
    first, *_, last = log
    assert last == json.loads(out.partition("RESULT ")[2])
    assert first["eval/margin"] == 0 and last["eval/margin"] > 0.15 and last["eval/loss"] < 0.63
    assert last["eval/accuracy"] > 0.75 and last["eval/rejected_change"] < -0.05 and last["eval/kl"] > 1e-3
    assert last["best_eval_loss"] == min(line.get("eval/loss", math.inf) for line in log)
    assert not any("warning" in line for line in log) and "less likely" not in out
    assert config.load_config(run_dir / "config.yml").rl.max_steps == 16
    assert len(json.loads((run_dir / "run.json").read_text())["facts"]["data"]) == 64
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")

    encoded = inputs.pairs_of(source, "val", tokenizer)
    found = oracle(plain_model(tiny_folder, run_dir / "final"), plain_model(tiny_folder), encoded)
    assert_metrics(last, *found)
    assert_worth(report, *found[:3])
    assert (
        "implicit accuracy: {:.3f} [{:.3f}, {:.3f}] of 40 val pairs".format(
            report["implicit_accuracy"]["accuracy"], *report["implicit_accuracy"]["interval"]
        )
        in out
    )


def assert_metrics(line, sums, ref_sums, sizes, kl, beta=0.1):
    """A record's held-out figures, computed anew from log-probs of plain transformers and peft."""
    change = sums - ref_sums
    h = change[:, 0] - change[:, 1]
    expected = {"loss": F.softplus(-beta * h), "margin": beta * h, "accuracy": (h > 0).double()}
    for at, side in enumerate(("chosen", "rejected")):
        expected |= {f"{side}_logprob": (sums / sizes)[:, at], f"{side}_change": (change / sizes)[:, at]}
    for name, values in expected.items():
        assert line[f"eval/{name}"] == pytest.approx(values.mean().item(), rel=1e-4, abs=1e-5), name
    assert line["eval/kl"] == pytest.approx(kl, rel=1e-3)


def assert_worth(report, sums, ref_sums, sizes):
    change, n, z = sums - ref_sums, len(sums), 1.959964
    longer = (sizes[:, 0] - sizes[:, 1]).numpy()
    for name, values in {
        "implicit_accuracy": (change[:, 0] - change[:, 1]).numpy(),
        "implicit_accuracy_of_averages": ((change / sizes)[:, 0] - (change / sizes)[:, 1]).numpy(),
        "floor_shorter_answer": -longer,
    }.items():
        rate = (values > 0).mean() + 0.5 * (values == 0).mean()
        centre, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
        assert report[name]["accuracy"] == pytest.approx(rate) and report[name]["pairs"] == n, name
        assert report[name]["interval"] == pytest.approx(
            [(centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)]
        )
    assert report["implicit_accuracy"]["interval"][0] > report["floor_shorter_answer"]["accuracy"]
    assert report["correlation_of_margin_and_length_difference"] == pytest.approx(
        np.corrcoef((change[:, 0] - change[:, 1]).numpy(), longer)[0, 1], abs=1e-3
    )


# ---------------------------------------------------------------- B-26, B-34: it starts at its reference, which stays


def test_kl_of_full_fine_tuning_is_to_the_base_with_its_own_head(straight, bare, few, tokenizer):
    """Embedding and head are trained too, so the reference's states belong under the reference's head."""
    found = oracle(plain_model(straight("none") / "final"), bare, inputs.pairs_of(few, "val", tokenizer))
    assert_metrics(lines(straight("none"))[-1], *found)


def test_another_scale_is_another_reference(tmp_path, settings, straight):
    """Adapters of equal tensors and other alpha: neither may get the other's log-probs from the cache."""
    for name, alpha in (("one", 16), ("two", 4)):
        adapter = shutil.copytree(straight() / "final", tmp_path / name)
        text = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(text | {"lora_alpha": alpha}))
        (adapter / "MANIFEST.json").unlink()  # as one must who changes it by hand
        out = tmp_path / f"{name}-out"
        train(tmp_path, settings(out, "--model.adapter", adapter, "--training.max_steps", 1))
        assert lines(out / "run")[0]["margin"] == 0 and lines(out / "run")[0]["eval/kl"] == 0, name


# ---------------------------------------------------------------- B-26, B-27: objectives


KINDS = {
    "smoothed": lambda h, beta: 0.7 * F.softplus(-beta * h) + 0.3 * F.softplus(beta * h),
    "ipo": lambda h, beta: (h - 1 / (2 * beta)).square(),
    "length_normalised": lambda h, beta: F.softplus(-beta * h),
}


@pytest.mark.parametrize("kind", KINDS)
def test_objectives(tmp_path, settings, micro_folder, bare, few, tokenizer, kind):
    name, smoothing = ("sigmoid", 0.3) if kind == "smoothed" else (kind, 0)
    flags = [
        "--rl.dpo_loss",
        name,
        "--rl.dpo_label_smoothing",
        smoothing,
        "--rl.dpo_sft_coeff",
        1,
        "--rl.dpo_beta",
        0.5,
    ]
    train(tmp_path, settings(tmp_path, *flags, "--training.max_steps", 3))
    *steps, last = lines(tmp_path / "run")
    assert all(math.isfinite(line[key]) for line in steps for key in ("loss", "grad_norm", "margin"))

    batch = first_batch(few, tokenizer)
    nll = torch.cat(
        [-p.gather(1, ids[:, None]) for p, ids in (answer_logprobs(bare, pair["chosen"]) for pair in batch)]
    )
    assert steps[0]["margin"] == steps[0]["eval/margin"] == 0 and steps[0]["eval/accuracy"] == 0.5
    start = KINDS[kind](torch.zeros(()), 0.5).item()
    assert start == pytest.approx(1.0 if kind == "ipo" else LOG2)
    assert nll.mean() > 0.05
    assert steps[0]["loss"] == pytest.approx(start + nll.mean().item(), rel=1e-5)  # of the step's tokens, not answers

    tuned = plain_model(micro_folder, tmp_path / "run" / "final")
    sums, ref_sums, sizes, _ = oracle(tuned, bare, inputs.pairs_of(few, "val", tokenizer))
    change = (sums - ref_sums) / (1 if name == "sigmoid" else sizes)
    h = change[:, 0] - change[:, 1]
    val = [answer_logprobs(tuned, pair["chosen"]) for pair in inputs.pairs_of(few, "val", tokenizer)]
    nll = torch.cat([-p.gather(1, ids[:, None]) for p, ids in val]).mean()
    assert last["eval/loss"] == pytest.approx(KINDS[kind](h, 0.5).mean().item() + nll.item(), rel=1e-4)
    assert last["eval/margin"] == pytest.approx(0.5 * h.mean().item(), rel=1e-3)


def test_b27_only_sums_know_the_length():
    """An answer said twice has the same averages."""
    torch.manual_seed(0)
    logprobs, ref = -torch.rand(2, 6, dtype=torch.float64), -torch.rand(2, 6, dtype=torch.float64)
    for kind, same in (("ipo", True), ("length_normalised", True), ("sigmoid", False)):
        rl = config.load_config(None, {"rl.dpo_loss": kind}).rl
        found = []
        for times in (1, 2):
            row, ref_row = logprobs.repeat(1, times), ref.repeat(1, times)
            micro = pairs.PairMicroBatch(["pair"], None, torch.ones_like(row), ref_row.sum(1))
            found.append(train_rl.dpo_objective(row, micro, rl)[0].item())
        assert (found[0] == pytest.approx(found[1], rel=1e-12)) == same, kind


# ---------------------------------------------------------------- the reference's log-probs are kept


def counting(main, argv):
    calls, real = [], cache.records

    def records(path, name, make):
        def counted():
            calls.append(path)
            return make()

        return real(path, name, counted)

    cache.records = records
    processes.call(main, argv)
    print(f"COMPUTED {len(calls)}")


def test_reference_cache(tmp_path, settings, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("GEMMA_ALIGNMENT_CACHE", str(folder))

    def go(name, *more):
        argv = settings(tmp_path / name, "--training.max_steps", 3, *more)
        status, out, err = run(tmp_path, argv, counting)
        assert status == 0, err
        return int(out.partition("COMPUTED ")[2]), out, tmp_path / name / "run"

    computed, out, first = go("first")
    files = sorted((folder / "reference").iterdir())
    assert computed == 2 == len(files) and "damaged" not in out  # train and val
    whole = [file.read_bytes() for file in files]

    computed, out, run_dir = go("beta", "--rl.dpo_beta", 0.5)
    assert computed == 0 and "damaged" not in out
    now, then = lines(run_dir)[0], lines(first)[0]
    assert now["margin"] == 0 and all(now[key] == then[key] for key in ("chosen_logprob", "eval/rejected_logprob"))

    files[0].write_bytes(whole[0][: len(whole[0]) // 2])  # half of it, and another number in the other
    head, first_pair, *others = map(json.loads, whole[1].splitlines())
    changed = [head, [first_pair[0] + 1, first_pair[1]], *others]
    files[1].write_text("".join(json.dumps(line) + "\n" for line in changed))
    computed, out, run_dir = go("damaged")
    assert computed == 2 and all(f"{file} is damaged" in out for file in files)
    assert [file.read_bytes() for file in files] == whole and sorted((folder / "reference").iterdir()) == files
    checks.assert_same_records(run_dir, first)

    computed, out, run_dir = go("again")
    assert computed == 0 and "damaged" not in out
    checks.assert_same_records(run_dir, first)


# ---------------------------------------------------------------- a step does not depend on how it is cut


def test_b1_gradient_of_micro_batches(tmp_path, settings, few):
    checks.check_cuts(
        MAIN, tmp_path, lambda *more, **kind: settings(*more, "--rl.dpo_sft_coeff", 1, **kind), few, "none"
    )


def test_padding_does_not_count(micro_folder, tokenizer, few):
    torch.set_num_threads(1)
    net, _ = model.load(micro_folder, torch.device("cpu"), torch.float32)
    tokens, mask = data.collate_pairs(inputs.pairs_of(few, "val", tokenizer))
    anything = torch.randint(0, 640, (len(tokens), 50), generator=torch.Generator().manual_seed(0))
    rl = config.load_config(None, {"rl.dpo_sft_coeff": 1}).rl
    found = []
    for pads in (anything[:, :0], torch.zeros_like(anything), anything):
        wide, wide_mask = torch.cat((tokens, pads), 1), torch.cat((mask, torch.zeros(pads.shape)), 1)
        with torch.no_grad():
            logprobs = model.sequence_logprobs(net, wide, wide_mask)
        micro = pairs.PairMicroBatch([], wide, wide_mask, torch.arange(-len(tokens), 0) * 3.0)
        pair_loss, sft_loss, metrics = train_rl.dpo_objective(logprobs, micro, rl)
        assert not logprobs[:, mask.shape[1] :].any()
        sums = [pair_loss.sum(), sft_loss.sum()]
        found.append([logprobs[:, : mask.shape[1]], pair_loss, *metrics.values(), *sums])
    for other in found[1:]:
        assert len(found[0]) == len(other) == 10
        assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(found[0], other))
        assert torch.equal(found[0][0], other[0])


# ---------------------------------------------------------------- collapse


def test_collapse_is_said_and_survives_a_crash(tmp_path, settings, tiny_folder):
    flags = ["--model.base_checkpoint", tiny_folder]  # its answers are likely enough to become less so
    flags += ["--training.learning_rate", 0.03, "--training.max_steps", 4, "--training.schedule", "constant"]
    argv = [settings(tmp_path / name, *flags) for name in ("whole", "cut")]
    status, out, err = run(tmp_path, argv[0])
    assert status == 0, err
    log = lines(tmp_path / "whole" / "run")
    fallen = {line["step"]: -line["eval/chosen_change"] for line in log if "eval/loss" in line}
    assert list(fallen) == [0, 4] and fallen[4] > 0.5
    for line in log:
        assert ("warning" in line) == (fallen.get(line["step"], 0) > 0.5), line
    assert f"became {fallen[4]:.2f} nats per token less likely" in log[4]["warning"]
    assert f"step 4: {log[4]['warning']}" in out and "rl.dpo_beta" in log[4]["warning"]

    assert run(tmp_path, argv[1], inject.crash_behind_save(4))[0] == 9
    train(tmp_path, argv[1])
    checks.assert_same_records(tmp_path / "cut" / "run", tmp_path / "whole" / "run")


# ---------------------------------------------------------------- --explain and bad input


def test_explain_writes_nothing_and_skips_are_counted(tmp_path, settings, few, monkeypatch):
    monkeypatch.setenv("GEMMA_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    out_dir, source = tmp_path / "out", inputs.odd_pairs(tmp_path / "odd", few)
    before = checks.snapshot(source)
    status, out, err = run(tmp_path, settings(out_dir, "--explain", "--dataset_path", source))
    assert status == 0 and not err and not out_dir.exists() and checks.snapshot(source) == before
    assert not (tmp_path / "cache").exists()
    line = next(line for line in out.splitlines() if line.startswith("train: "))
    for reason in ("no rejected", "empty answer", "equal answers", "prompt too long"):
        assert f"1 left out ({reason})" in line, line
    assert line.startswith("train: 16 kept, "), line
    assert re.search(r"one step takes about \S+ s here, [\d,]+ steps \S+ (s|minutes|hours), evaluations apart", out), (
        out
    )
    assert "[[" in out and "checked 8 examples" in out and "estimated peak" in out  # both answers of four pairs
    assert out.count("/chosen: ") == out.count("/rejected: ") == 4


def test_bad_input_is_one_line(tmp_path, settings, few, micro_folder):
    out_dir = tmp_path / "out"
    refused(tmp_path, ["--config", ROOT / "configs" / "sft_lora_270m.yml", "--debug"], "train_sft.py")
    refused(tmp_path, ["--config", ROOT / "configs" / "reward_270m.yml", "--debug"], "train_reward.py")
    refused(tmp_path, settings(out_dir, "--rl.algorithm", "dpoo"), "rl.algorithm", "ppo | grpo | dpo")
    refused(tmp_path, settings(out_dir, "--rl.dpo_loss", "hinge"), "rl.dpo_loss", "sigmoid | ipo | length_normalised")
    ipo = ["--rl.dpo_loss", "ipo", "--rl.dpo_label_smoothing", 0.1]
    refused(tmp_path, settings(out_dir, *ipo), "rl.dpo_label_smoothing", "ipo")
    for flags in (["packing", "true"], ["last_turn_only", "true"]):
        refused(tmp_path, settings(out_dir, f"--training.{flags[0]}", flags[1]), flags[0])
    assert not out_dir.exists()
    nothing = write_data(tmp_path / "nothing", "safety", {"rejected": None}, train=20, val=6)
    refused(tmp_path, settings(out_dir, "--dataset_path", nothing), "train: no usable pair in 20 records")
    shutil.copyfile(few / "train.jsonl", nothing / "train.jsonl")
    refused(tmp_path, settings(out_dir, "--dataset_path", nothing), "val: no usable pair in 6 records")
    refused(tmp_path, settings(out_dir, "--dataset_path", tmp_path / "none"), f"{tmp_path}/none/train.jsonl")
    refused(tmp_path, settings(out_dir, "--training.max_seq_length", 8), "train: no usable pair in 20 records")

    refused(tmp_path, settings(out_dir, "--model.adapter", tmp_path / "none"), "model.adapter", f"{tmp_path}/none")
    net, tokenizer = model.load(micro_folder, torch.device("cpu"), torch.float32)
    lora.inject(net, "reward", 4, 8)
    for name in ("plain", "reward"):
        (tmp_path / name).mkdir()
    model.save_adapter(net, tokenizer, tmp_path / "plain", "reward", "base")
    head = reward_model.new_head(net.config.hidden_size, net.device)
    about = {"base_checkpoint": "base", "base": base.fingerprint(micro_folder), "mean": 0.0, "std": 1.0}
    reward_model.save(net, tokenizer, tmp_path / "reward", "reward", head, about)
    refused(tmp_path, settings(out_dir, "--model.adapter", tmp_path / "reward"), "model.adapter", f"{tmp_path}/reward")
    full = settings(out_dir, "--model.adapter", tmp_path / "plain", peft="none")
    refused(tmp_path, full, "model.adapter", "merge the adapter first")
    assert not list(out_dir.rglob("*.*ml"))  # neither a config nor a metric


def test_pairs_of_samples_and_a_function(tmp_path, settings):
    """A whole run on the policy's own samples, ranked by a user's function; --explain makes few and keeps none."""
    source = write_data(tmp_path / "data", "conala", train=10, val=4)
    mine = tmp_path / "mine.py"
    mine.write_text("def short(prompt, completion, reference):\n    return -len(completion)\n")
    sampled = ["--task", "conala", "--dataset_path", source, "--rl.pairs", "sampled", "--rl.group_size", 3]
    sampled += ["--rl.max_new_tokens", 10, "--reward.function", f"{mine}:short", "--training.max_steps", 2]
    out_dir = tmp_path / "out"
    kept = cache.root() / "pairs"
    status, out, err = run(tmp_path, settings(out_dir, *sampled, "--explain"))
    assert status == 0 and not err and not out_dir.exists() and not kept.exists(), err
    status, out, err = run(tmp_path, settings(out_dir, *sampled))
    assert status == 0, err
    assert "pairs made and kept" in out and "answers cut off; best: total" in out
    (folder,) = (path for path in kept.iterdir() if path.is_dir())  # beside its lock
    for record in data.load_split(folder, "train"):
        assert len(record["response"]) < len(record["rejected"])
    refused(tmp_path, settings(out_dir, *sampled, "--rl.group_size", 1), "rl.group_size")
    refused(
        tmp_path,
        settings(out_dir, *sampled, "--reward.function", "null", "--reward.type", "hybrid"),
        "reward.checkpoint",
    )
