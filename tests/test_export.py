"""evaluate.py --export: what it writes is the adapter, by plain transformers; what would be another is refused."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import train_sft
from common import chat, lora, model
from common.runtime import base, checkpoint
from tests import inputs, processes
from tests.faults import inject
from tests.inputs import random_adapter, random_reward_model, write_data

CPU = torch.device("cpu")
MAIN = evaluate.main
train, run, refused = (functools.partial(each, MAIN) for each in (processes.train, processes.run, processes.refused))
TOKENS = torch.tensor([[2, 105, 107, 200, 300, 106, 107, 105, 111, 107, 150, 151]])


def saved_adapter(folder, base_folder, std):
    net, tokenizer = model.load(str(base_folder), CPU, torch.float32)
    random_adapter(net, "policy", 1, std)
    folder.mkdir()
    model.save(net, tokenizer, folder, "policy", str(base_folder))
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "few", "safety", train=16, val=8, test=12)


@pytest.fixture(scope="module")
def flags(few):
    def make(target, *checkpoints, dtype="float32", more=()):
        sizes = ["--evaluation.max_items", 8, "--evaluation.max_new_tokens", 12, "--dataset_path", few]
        return ["--debug", *sizes, "--model.dtype", dtype, "--export", target, "--checkpoints", *checkpoints, *more]

    return make


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, micro_folder):
    return saved_adapter(tmp_path_factory.mktemp("adapter") / "final", micro_folder, 0.1)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory, flags, tiny_folder):
    """The tiny base exported in bf16: a whole model, and one whose weights bf16 holds, as Gemma's are."""
    out = tmp_path_factory.mktemp("rounded")
    train(out, flags(out / "base", f"base={tiny_folder}", dtype="bfloat16"))
    return out / "base"


def logits(net, tokens=TOKENS):
    with torch.no_grad():
        return net(tokens, use_cache=False).logits


def nothing_left(target):
    return not list(target.parent.glob(f"*{target.name}*"))


# ---------------------------------------------------------------------------------------------------- what it writes


def test_an_export_in_fp32_is_the_adapter_in_plain_transformers(tmp_path, flags, adapter, micro_folder):
    figures = train(tmp_path, flags(tmp_path / "merged", f"sft={adapter}"))
    net, tokenizer = model.load(str(micro_folder), CPU, torch.float32)
    model.load_adapter(net, "policy", adapter)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == torch.float32 and plain.lm_head.weight is plain.model.embed_tokens.weight
    assert (logits(plain) - logits(net)).abs().max() < 1e-4
    lora.use(net, None)
    assert (logits(plain) - logits(net)).abs().max() > 0.1  # the adapter does something
    assert figures["mean"] < 1e-5 and figures["largest"] < 1e-4 and figures["adapter_moves"] > 0.05
    assert figures["equal_texts"] == figures["texts"] == 8 and figures["survives"] == pytest.approx(1, abs=1e-4)
    assert "unquantised" not in figures

    theirs = AutoTokenizer.from_pretrained(tmp_path / "merged")
    turns = [{"role": "user", "content": "How do I fix my car?"}]
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    right, _ = chat.encode(tokenizer, [*turns, {"role": "assistant", "content": "x"}])
    assert ids == right[: len(ids)] and len(right) - len(ids) <= 3  # x, its stop and the newline

    written = json.loads((tmp_path / "merged" / "export.json").read_text())
    files = checkpoint.verify(tmp_path / "merged")["files"]
    assert written["check"] == figures and written["model_sha256"] == files["model.safetensors"]["sha256"]
    assert written["base_sha256"] == base.fingerprint(micro_folder) and "export.json" in files
    assert written["adapter_sha256"] == model.adapter_fingerprint(adapter) and written["merged_into"] == "the base"
    assert written["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in written["versions"]["torch"]
    assert {path.name for path in tmp_path.glob("*merged*")} == {"merged"}


def test_the_figures_are_those_of_plain_transformers(tmp_path, flags, adapter, micro_folder, few):
    """In bf16, where they are not zero: by hand from logits, and the share that survives from the files."""
    more = ["--evaluation.max_items", 12]
    figures = train(tmp_path, flags(tmp_path / "merged", f"sft={adapter}", dtype="bfloat16", more=more))
    net, tokenizer = model.load(str(micro_folder), CPU, torch.float32)
    model.load_adapter(net, "policy", adapter)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    apart = []
    for line in (few / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        turns, _ = chat.normalise([*record["prompt"], {"role": "assistant", "content": record["response"]}])
        ids, mask = (each[:128] for each in chat.encode(tokenizer, turns, last_turn_only=True))  # max_seq_length
        at = torch.tensor([i for i, m in enumerate(mask) if m])
        found = [logits(one, torch.tensor([ids]))[0].double().log_softmax(-1) for one in (net, plain)]
        apart.append((found[0] - found[1])[at - 1, torch.tensor(ids)[at]].abs())
    apart = torch.cat(apart)
    assert figures["tokens"] == len(apart) and figures["texts"] == 12
    assert figures["mean"] == pytest.approx(apart.mean().item(), abs=1e-6)
    assert figures["largest"] == pytest.approx(apart.max().item(), abs=1e-5)
    assert figures["mean"] > 1e-4 and 0.9 < figures["survives"] < 1.1

    state, arrived, whole = load_file(tmp_path / "merged" / "model.safetensors"), 0.0, 0.0
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    for name, module in lora.lora_modules(net).items():
        a, b = module.lora_A["policy"].detach().double(), module.lora_B["policy"].detach().double()
        delta, weight = 2 * (b @ a), module.base.weight.detach()
        assert torch.equal(state[f"{name}.weight"], lora.merged_weight(module, "policy").to(torch.bfloat16))
        arrived += ((state[f"{name}.weight"].double() - weight.to(torch.bfloat16).double()) * delta).sum().item()
        whole += delta.square().sum().item()
    assert figures["survives"] == pytest.approx(arrived / whole, rel=1e-4)


def test_a_whole_model_is_exported_and_stops_by_itself(rounded, tiny_folder, few):
    plain, theirs = AutoModelForCausalLM.from_pretrained(rounded), AutoTokenizer.from_pretrained(rounded)
    assert plain.dtype == torch.bfloat16 and plain.generation_config.eos_token_id == [1, 106]
    source = load_file(tiny_folder / "model.safetensors")
    for name, tensor in load_file(rounded / "model.safetensors").items():
        assert torch.equal(tensor, source[name].to(torch.bfloat16)), name
    written = json.loads((rounded / "export.json").read_text())
    assert written["merged_into"] is written["adapter_sha256"] is written["check"]["survives"] is None
    stopped = []
    for line in (few / "test.jsonl").read_text().splitlines()[:4]:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in json.loads(line)["prompt"]]
        encoded = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        out = plain.generate(**encoded, max_new_tokens=60, do_sample=False)[0].tolist()
        stopped.append(out[-1] == chat.END_OF_TURN and chat.END_OF_TURN not in out[encoded["input_ids"].shape[1] : -1])
    assert all(stopped), stopped


# ------------------------------------------------------------------------------------------------- what it does not


@pytest.mark.parametrize(
    ("size", "words"),
    [(1e-4, ("% of the adapter survives", "limit 50%")), (7e-4, ("rounding moves log-probs by", "over 50% of what"))],
)
def test_a_young_adapter_is_not_rounded_away(tmp_path, flags, rounded, size, words):
    """bf16 weights would lose it, or drown it in noise; in fp32 all of it arrives."""
    young = saved_adapter(tmp_path / "young", rounded, size)
    words = ("merged was not written", *words, "--model.dtype float32")
    refused(tmp_path, flags(tmp_path / "merged", f"sft={young}", dtype="bfloat16"), *words)
    assert nothing_left(tmp_path / "merged")
    assert train(tmp_path, flags(tmp_path / "merged", f"sft={young}"))["survives"] > 0.99


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_bit(folder):
    """One bit of one weight, far below what log-probs show."""
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 1
    path.write_bytes(raw)


def rope(folder):
    config = json.loads((folder / "config.json").read_text())["rope_parameters"]
    config["sliding_attention"]["rope_theta"] = 500.0
    edit(folder / "config.json", rope_parameters=config)


def words(folder):
    config = json.loads((folder / "tokenizer.json").read_text())
    config["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("tamper", "line"),
    [
        (flip_bit, "1 weights were not written as they were merged"),
        (rope, "mean |difference| of log-probs"),
        (words, "the tokenizer was not written as it was read"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), "the tokenizer was not written"),
    ],
    ids=["bit", "rope", "tokenizer", "template"],
)
def test_what_a_broken_writer_wrote_is_not_kept(tmp_path, flags, adapter, tamper, line):
    target = tmp_path / "merged"

    def body(main, argv):
        real = model.save_model

        def save_model(net, tokenizer, folder, *more):
            real(net, tokenizer, folder, *more)
            tamper(folder)

        model.save_model = save_model
        processes.call(main, argv)

    status, out, err = run(tmp_path, flags(target, f"sft={adapter}"), body)
    assert status == 2 and err.startswith("error: --export: ") and err.count("\n") == 1 and line in err, err
    assert nothing_left(target) and "RESULT" not in out


UP = "model.layers.1.mlp.up_proj.weight"


def left_out(state, bare):
    state[UP] = bare[UP]


def scaled(state, bare):
    for name in state:
        state[name] = state[name] + 0.02 * (state[name] - bare[name])


def not_a_number(state, bare):
    state[UP][0, 0] = float("nan")


@pytest.mark.parametrize("fault", [left_out, scaled, not_a_number])
def test_what_a_broken_merge_made_is_not_kept(tmp_path, flags, adapter, fault):
    """The files hold what was merged, but that is not the adapter."""
    target = tmp_path / "merged"

    def body(main, argv):
        real = model.plain_state

        def plain_state(net, name=None, dtype=None):
            state = real(net, name, dtype)
            fault(state, real(net, None, dtype))
            return state

        model.plain_state = plain_state
        processes.call(main, argv)

    status, out, err = run(tmp_path, flags(target, f"sft={adapter}"), body)
    assert status == 2 and err.startswith("error: --export: ") and err.count("\n") == 1, (status, err)
    assert nothing_left(target) and "RESULT" not in out


def test_a_kill_leaves_a_whole_export_or_none(tmp_path, flags, adapter):
    """R4: death at each call that makes something durable."""
    argv = ["--logging.output_dir", tmp_path / "out"]
    train(tmp_path, flags(tmp_path / "whole", f"sft={adapter}", more=argv), inject.dying(10**9))
    count, seen = int((tmp_path / "calls").read_text()), set()
    assert count > 5
    for number in range(1, count + 1, 3):
        target = tmp_path / f"merged-{number}"
        status, _, err = run(tmp_path, flags(target, f"sft={adapter}", more=argv), inject.dying(number))
        assert status == 9, err
        seen.add(target.exists())
        if target.exists():
            checkpoint.verify(target)
    assert False in seen


def test_what_cannot_be_exported(tmp_path, flags, adapter, micro_folder):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    for name in ("full", "file", "link"):
        refused(tmp_path, flags(tmp_path / name, f"sft={adapter}"), f"{name} is there already", "name a new folder")
    assert (tmp_path / "full" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"

    judge = random_reward_model(tmp_path / "judge", micro_folder)
    one = f"sft={adapter}"
    for checkpoints, more, line in (
        ([f"judge={judge}"], (), "is a reward model, not a policy"),
        ([one, f"rl={adapter}"], (), "one checkpoint"),
        ([one, one], (), "one checkpoint"),
        ([one], ["--human_eval"], "nothing beside it"),
        ([one], ["--human_results", "x.csv"], "nothing beside it"),
        ([one], ["--items", "x.jsonl"], "nothing beside it"),
        ([f"sft={tmp_path / 'absent'}"], (), "no such folder"),
    ):
        refused(tmp_path, flags(tmp_path / "merged", *checkpoints, more=more), line)
    argv = [word for word in flags(tmp_path / "merged") if word != "--checkpoints"]
    refused(tmp_path, argv, "--export", "--checkpoints NAME=CHECKPOINT")
    status, _, err = run(tmp_path, flags(tmp_path / "merged", one), environment={"WORLD_SIZE": "2", "RANK": "0"})
    assert status == 2 and "not with torchrun" in err, err
    for text in ("{", "[]", "{}"):
        (tmp_path / "full" / "adapter_config.json").write_text(text)
        refused(tmp_path, flags(tmp_path / "merged", f"sft={tmp_path / 'full'}"), "names no base_model_name_or_path")
    assert nothing_left(tmp_path / "merged")


# ------------------------------------------------------------------------------------------------------------ QLoRA


def test_a_qlora_adapter_is_merged_into_its_own_base(tmp_path, flags, few, micro_folder):
    from bitsandbytes import functional

    settings = inputs.settings(micro_folder, few, rate=1e-2)
    processes.train(train_sft.main, tmp_path, settings(tmp_path, "--training.max_steps", 6, peft="qlora"))
    final = tmp_path / "run" / "final"
    figures = train(tmp_path, flags(tmp_path / "merged", f"sft={final}"))
    assert figures["mean"] < 1e-5 and figures["equal_texts"] == figures["texts"]
    assert figures["unquantised"]["mean"] > 100 * figures["mean"]  # of the quantisation, not of the merge
    assert figures["unquantised"]["loss"] == figures["loss"]
    written = json.loads((tmp_path / "merged" / "export.json").read_text())
    assert written["merged_into"] == "the 4-bit base, dequantised"

    name = "model.layers.1.mlp.down_proj"
    weight = load_file(micro_folder / "model.safetensors")[f"{name}.weight"].float()
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    tensors = load_file(final / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    right = functional.dequantize_4bit(packed, state).float() + 2 * (b @ a)
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    assert (merged - right).abs().max() < 1e-6 < (merged - weight).abs().max()

    shutil.copytree(final, tmp_path / "alone" / "final")  # away from its run it is still known for QLoRA
    figures = train(tmp_path, flags(tmp_path / "again", f"sft={tmp_path / 'alone' / 'final'}"))
    assert figures["unquantised"]["mean"] > 100 * figures["mean"]
    for name in ("base.json", "MANIFEST.json"):  # without its record, too, nothing says that it was
        (tmp_path / "alone" / "final" / name).unlink()
    figures = train(tmp_path, flags(tmp_path / "plain", f"sft={tmp_path / 'alone' / 'final'}"))
    assert "unquantised" not in figures and figures["mean"] < 1e-5
