"""evaluate.py --export NAME.gguf: the file is the adapter, by transformers' reader and by llama.cpp."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import evaluate
from common import chat, lora, model, rollouts
from common.evaluation import gguf_file
from common.log import UserError
from common.runtime import base, checkpoint, tiny
from tests import processes, test_export
from tests.test_export import CPU, edit, logits, nothing_left, refused, run, saved_adapter, train

PROBE = Path(__file__).parent / "llama_cpp.mjs"
few, flags, adapter = test_export.few, test_export.flags, test_export.adapter  # fixtures
TEXTS = ["How do I  fix   my car?", "x = [1, 23]\n\n\n  y", "naïve 日本 🫠!", "a</s> <b>\tc"]


def test_the_flag_offers_the_types_that_can_be_written():
    assert dict(evaluate.JOBS)["--gguf_type"]["choices"] == tuple(gguf_file.TYPES)


@pytest.fixture(scope="module")
def marked(tmp_path_factory, micro_folder):
    """The micro base with a tokenizer of Gemma's kind: spaces are marked, unknown characters are bytes."""
    folder = shutil.copytree(micro_folder, tmp_path_factory.mktemp("marked") / "base")
    fixed = tiny.SPECIALS | tiny.TURNS | {"\n": 107, "\n\n": 108, "</s>": 109}
    draft = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    draft.normalizer = normalizers.Replace(" ", "▁")
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    size = tiny.VOCABULARY - len(fixed) + 1
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", *alphabet], show_progress=False)
    dialogues = tiny.pretraining_corpus(300)
    draft.train_from_iterator([turn["content"].replace("\n", " ") for turns in dialogues for turn in turns], trainer)
    learned = json.loads(draft.to_str())["model"]
    free = (i for i in range(tiny.VOCABULARY) if i not in fixed.values())
    spelled = sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = fixed | {word: next(free) for word in spelled if word not in fixed}
    merges = [tuple(pair) for pair in learned["merges"]]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    backend.normalizer, backend.pre_tokenizer = draft.normalizer, pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("\n", "\n\n", "</s>")])
    names = {f"{name.strip('<>')}_token": name for name in tiny.SPECIALS}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, **names, additional_special_tokens=list(tiny.TURNS)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def marked_adapter(tmp_path_factory, marked):
    return saved_adapter(tmp_path_factory.mktemp("adapter") / "final", marked, 0.1)


def gguf_flags(flags, target, adapter, kind):
    return flags(target, f"sft={adapter}", dtype="auto", more=["--gguf_type", kind])


def test_a_gguf_holds_the_adapter(tmp_path, monkeypatch, flags, marked, marked_adapter):
    """Read back by the way that a .gguf base takes, which is transformers' own."""
    import gguf

    figures = train(tmp_path, gguf_flags(flags, tmp_path / "new.gguf", marked_adapter, "f32"))
    assert figures["mean"] < 1e-5 and figures["equal_texts"] == figures["texts"] == 8
    assert figures["adapter_moves"] > 0.05 and figures["survives"] == pytest.approx(1, abs=1e-4)
    assert {path.name for path in tmp_path.glob("*new*")} == {"new.gguf", "new.json", "new.md", "new.Modelfile"}
    written = json.loads((tmp_path / "new.json").read_text())
    assert written["check"] == figures and written["model_sha256"] == checkpoint.sha256(tmp_path / "new.gguf")
    assert written["type"] == "f32" and written["adapter_sha256"] == model.adapter_fingerprint(marked_adapter)

    reader = gguf.GGUFReader(tmp_path / "new.gguf")
    assert reader.get_field("tokenizer.chat_template").contents() == chat.TEMPLATE
    assert reader.get_field("tokenizer.ggml.eot_token_id").contents() == chat.END_OF_TURN
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert [types[i] for i in (0, 1, 2, 3, 4, 105, 106, 107, 108, 109)] == [3] * 7 + [4, 4, 3]
    assert types.count(6) == 256 and set(types) == {1, 3, 4, 6}

    monkeypatch.setenv("GEMMA_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    bare = gguf.GGUFWriter(tmp_path / "bare.gguf", "gemma3")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            bare.add_key_value(field.name, field.contents(), field.types[0], inner)
    bare.write_header_to_file()
    bare.write_kv_data_to_file()
    bare.write_tensors_to_file()
    bare.close()
    with pytest.raises(UserError, match=r"bare\.gguf lacks \d+ weights, the first is lm_head\.weight"):
        base.resolve(str(tmp_path / "bare.gguf"))
    assert not list((tmp_path / "cache").glob("bare-*"))

    folder = base.resolve(str(tmp_path / "new.gguf"))  # in bf16
    with monkeypatch.context() as upgraded:
        upgraded.setattr("transformers.configuration_utils.__version__", "5.99.0")
        upgraded.setenv("GEMMA_ALIGNMENT_CACHE", str(tmp_path / "elsewhere"))
        again = base.resolve(str(tmp_path / "new.gguf"))
    assert again != folder and base.fingerprint(again) == base.fingerprint(folder)  # adapters know it again
    net, tokenizer = model.load(str(marked), CPU, torch.float32)
    model.load_adapter(net, "policy", marked_adapter)
    right = model.plain_state(net, "policy", torch.float32)
    found = load_file(folder / "model.safetensors")
    assert found.keys() == right.keys()
    for name, tensor in right.items():  # of a norm GGUF holds 1 + w, so 2^-24 may be lost
        apart = (found[name].float() - tensor.bfloat16().float()).abs().max()
        assert apart <= 1e-7 * name.endswith("norm.weight"), name
    edit(folder / "config.json", query_pre_attn_scalar=net.config.query_pre_attn_scalar)  # GGUF knows only Gemma's 256
    plain, _ = model.load(str(marked), CPU, torch.float32)
    plain.load_state_dict({name: tensor.bfloat16().float() for name, tensor in right.items()}, strict=False)
    assert (logits(model.load(str(folder), CPU, torch.float32)[0]) - logits(plain)).abs().max() < 1e-4
    theirs = base.load_tokenizer(folder)
    for text in TEXTS[:3]:  # the last has a </s>, whose token is of control type in the file
        assert chat.encode_text(theirs, text) == chat.encode_text(tokenizer, text)


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0"])
def test_what_a_gguf_of_fewer_bits_rounds(tmp_path, flags, adapter, micro_folder, kind):
    """The weights by hand, the figures not those of fp32."""
    import gguf

    figures = train(tmp_path, gguf_flags(flags, tmp_path / "new.gguf", adapter, kind))
    assert 1e-5 < figures["mean"] < 0.02 and 0.5 < figures["survives"] < 1.5
    net, _ = model.load(str(micro_folder), CPU, torch.float32)
    model.load_adapter(net, "policy", adapter)
    right = lora.merged_weight(lora.lora_modules(net)["model.layers.1.mlp.down_proj"], "policy")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "new.gguf").tensors}
    stored = tensors["blk.1.ffn_down.weight"]
    assert stored.tensor_type.name.lower() == kind
    found = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
    blocks = right.view(-1, 32).abs().amax(1, keepdim=True).expand(-1, 32).reshape(right.shape)
    # of q8_0 half a step, and what the fp16 of the step itself rounds
    steps = {"bf16": right.abs() * 2**-8, "f16": right.abs() * 2**-11 + 1e-7, "q8_0": blocks / 127 * 0.57}
    assert ((found - right).abs() <= steps[kind]).all() and not torch.equal(found, right)
    assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize("kind", ["q8_0", "bf16"])
def test_a_type_that_drowns_a_young_adapter_names_the_finer_one(tmp_path, flags, micro_folder, kind):
    young = saved_adapter(tmp_path / "young", micro_folder, 5e-4)
    words = ("new.gguf was not written", "export it with --gguf_type f16")
    refused(tmp_path, gguf_flags(flags, tmp_path / "new.gguf", young, kind), *words)
    assert nothing_left(tmp_path / "new.gguf")
    assert train(tmp_path, gguf_flags(flags, tmp_path / "new.gguf", young, "f16"))["survives"] > 0.9


def test_the_modelfile_says_what_the_template_says(tokenizer):
    """Ollama fills in .System and .Prompt, and writes <bos> itself."""
    lines = gguf_file.MODELFILE.format(name="x.gguf").splitlines(keepends=True)
    assert lines[0] == "FROM ./x.gguf\n" and lines[-2:] == [
        'PARAMETER stop "<end_of_turn>"\n',
        'PARAMETER stop "<eos>"\n',
    ]
    template = "".join(lines)[len(lines[0]) :].partition('"""')[2].partition('"""')[0]
    optional = re.compile(r"\{\{ if \.System \}\}(.*?)\{\{ end \}\}", re.S)
    for system, filled in (("", ""), ("Be brief.", r"\1")):
        turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "Hi"}]
        text = optional.sub(filled, template).replace("{{ .System }}", system).replace("{{ .Prompt }}", "Hi")
        asked, answered = text.split("{{ .Response }}")
        assert "<bos>" + asked == tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert answered == "<end_of_turn>\n"


@pytest.mark.parametrize("fault", ["weights", "keys"])
def test_a_gguf_that_a_broken_writer_wrote_is_not_kept(tmp_path, flags, adapter, fault):
    def body(main, argv):
        class Broken(gguf_file.GGUFWriter):
            def add_tensor(self, name, tensor, **more):
                if fault == "weights" and name == "blk.1.ffn_up.weight":
                    tensor = tensor.copy()
                    tensor.view("uint8")[0, 0] ^= 1
                super().add_tensor(name, tensor, **more)

            def write_header_to_file(self):
                if fault == "keys":
                    del self.kv_data[0]["tokenizer.ggml.eot_token_id"]
                super().write_header_to_file()

        gguf_file.GGUFWriter = Broken
        processes.call(main, argv)

    status, out, err = run(tmp_path, gguf_flags(flags, tmp_path / "new.gguf", adapter, "f32"), body)
    assert status == 2 and err.startswith("error: --export: ") and err.count("\n") == 1, (status, err)
    assert "was not written as it was meant: 1 entries" in err and "RESULT" not in out
    assert nothing_left(tmp_path / "new.gguf")


def test_what_no_gguf_can_be(tmp_path, flags, adapter):
    (tmp_path / "new.gguf").write_text("mine")
    argv = gguf_flags(flags, tmp_path / "new.gguf", adapter, "bf16")
    refused(tmp_path, argv, "new.gguf is there already", "name a new file")
    assert (tmp_path / "new.gguf").read_text() == "mine"
    (tmp_path / "README.md").write_text("mine")
    refused(tmp_path, gguf_flags(flags, tmp_path / "README.gguf", adapter, "bf16"), "README.md is there already")
    assert (tmp_path / "README.md").read_text() == "mine"
    refused(tmp_path, gguf_flags(flags, tmp_path / "merged", adapter, "bf16"), "--gguf_type bf16", "--model.dtype")
    refused(tmp_path, gguf_flags(flags, tmp_path / "other.gguf", adapter, "q4_0"), "--gguf_type", "q8_0")
    assert nothing_left(tmp_path / "other.gguf") and nothing_left(tmp_path / "merged")


@pytest.mark.parametrize("kind", ["marked", "byte_level"])
def test_llama_cpp_says_what_the_adapter_says(tmp_path, flags, request, tiny_folder, kind):
    """The same ids of texts, the same greedy ids, and no warning."""
    node, package = shutil.which("node"), os.environ.get("NODE_LLAMA_CPP")
    if not node or not package:
        pytest.skip("no node here, or NODE_LLAMA_CPP does not name the folder of node-llama-cpp")
    folder = request.getfixturevalue("marked") if kind == "marked" else tiny_folder
    adapter = saved_adapter(tmp_path / "final", folder, 0.03)
    train(tmp_path, gguf_flags(flags, tmp_path / "new.gguf", adapter, "f32"))
    net, tokenizer = model.load(str(folder), CPU, torch.float32)
    model.load_adapter(net, "policy", adapter)
    asked = [chat.encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in TEXTS[:2]]
    words = json.dumps({"prompts": asked, "texts": TEXTS[:3], "most": 24})
    done = subprocess.run(
        [node, PROBE, tmp_path / "new.gguf", words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["log"] == []
    assert found["texts"] == [chat.encode_text(tokenizer, text) for text in TEXTS[:3]]
    right = rollouts.sample(net, asked, 1, 24, greedy=True)["completions"]
    assert found["answers"] == right and len(right) == 2
