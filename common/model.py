"""A Gemma 3 with its tokenizer: load, quantise, save, merge; and the one way from a batch to log-probabilities."""

import contextlib
import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common import chat, config, data, dist, gemma, lora, losses
from common.log import UserError, say, warn
from common.runtime import base, checkpoint, resume
from common.runtime.types import Gemma, Tokenizer

EXACT_KL_ROWS = 128  # held-out answers that an evaluation measures exactly: more would take too long
OF_VERSION_5 = ("backend", "is_local", "local_files_only")  # keys of its tokenizer_config.json


def pick_device(device: str = "auto") -> torch.device:
    """`auto` takes cuda, else cpu; a named device that is not there is refused."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = "cuda" if there["cuda"] else "cpu"
    if device == "mps" and there["mps"]:
        warn("device mps is untried here; on an M4 the CPU decodes a model of this size 6 to 10 times faster")
    if device == "cuda" and int(os.environ.get("LOCAL_RANK", "0")) >= torch.cuda.device_count() > 0:
        raise UserError(f"device: {torch.cuda.device_count()} GPUs here, fewer than torchrun's --nproc-per-node")
    if not there.get(device, False):
        choices = ", ".join(name for name in there if there[name])
        raise UserError(f"device: {device} is not available here; choose from {choices}")
    return torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it natively, else float32. Never fp16: Gemma 3 overflows it."""
    if dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def load(checkpoint: str, device: torch.device, dtype: torch.dtype, quantize: bool = False) -> tuple[Gemma, Tokenizer]:
    """(model, tokenizer) of a base in eval mode on `device`; `quantize` turns its linears into 4-bit NF4 (QLoRA)."""
    folder = base.resolve(checkpoint)
    config, tokenizer = base.read_config(folder), base.load_tokenizer(folder)
    if config.vocab_size < tokenizer.vocab_size:  # Gemma's own has one added mark more, <image_soft_token>
        raise UserError(f"{folder}: the tokenizer knows {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    tokenizer.num_embeddings = config.vocab_size  # for chat: a token that was added beyond them has none
    base.check_weights(folder, config)
    from transformers import Gemma3ForCausalLM, GenerationConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    loaded: Any = Gemma3ForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    model, report = loaded
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    stops = sorted(chat.STOP_TOKENS)
    model.generation_config = GenerationConfig(bos_token_id=chat.BOS, eos_token_id=stops, pad_token_id=chat.PAD)
    if quantize:
        quantise(model)
    model.base_folder = folder
    return model.to(device).eval(), tokenizer


def base_fingerprint(net: Gemma) -> str | None:
    """base.fingerprint of the folder that `load` read; None if `load` read none."""
    folder: Any = getattr(net, "base_folder", None)
    return base.fingerprint(folder) if folder else None


def is_quantised(net: Gemma) -> bool:
    """Are the linears 4-bit ones?"""
    return any(hasattr(parameter, "quant_state") for parameter in net.parameters())


def quantise(model: Gemma) -> None:
    """Every linear of the layers becomes a bitsandbytes NF4 one with double quantisation; prints what that saves.

    The embedding (the head) stays as it is: it is 63 % of the 270M, 30 % of the 1B, and every token reads it.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise UserError(f"model.peft_type: qlora needs bitsandbytes: pip install bitsandbytes ({error})") from error

    before = memory_bytes(model)
    for name, linear in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in lora.TARGETS:
            small = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4", device="meta")
            weight: Any = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            small.weight = weight.to(linear.weight.device)  # which quantises it
            model.get_submodule(parent).register_module(child, small)
    after = memory_bytes(model)
    change = f"{before / 1e6:.0f} -> {after / 1e6:.0f} MB"
    say(f"QLoRA: weights {change} with 4-bit linears ({1 - after / before:.0%} saved)")


def memory_bytes(model: Gemma) -> int:
    """Bytes of the parameters, a 4-bit one with its quantisation constants."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            inner = state.state2.absmax.numel() * 4 if state.nested else 0
            total += state.absmax.numel() * state.absmax.element_size() + inner
    return total


def sequence_logprobs(model: Gemma, tokens: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(tokens[:, 1:] | before) where mask is 1, else 0 -> (B, T-1) fp32. The one way from a batch to log-probs.

    tokens (B, T) int64 right-padded with anything; mask (B, T-1), 1 on supervised targets. Gradients reach whatever
    is trainable. What comes after a row's last supervised target is never computed, nor is any logit of another token.
    """
    if not mask.any():
        return torch.zeros(mask.shape, device=tokens.device)
    hidden, targets = target_states(model, tokens, mask)
    return spread(losses.token_logprobs(hidden, model.lm_head.weight, targets, temperature), mask)


def sequence_logprobs_and_hits(model: Gemma, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As sequence_logprobs, and (B, T-1) bool: was the target the most likely token?"""
    hidden, targets = target_states(model, tokens, mask)
    logprobs, hits = losses.token_logprobs_and_hits(hidden, model.lm_head.weight, targets)
    return spread(logprobs, mask), spread(hits, mask)


def sequence_logprobs_and_entropy(
    model: Gemma, tokens: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As sequence_logprobs, and the exact entropy of each distribution (B, T-1) in nats; both with gradient."""
    hidden, targets = target_states(model, tokens, mask)
    logprobs = losses.token_logprobs(hidden, model.lm_head.weight, targets, temperature)
    return spread(logprobs, mask), spread(losses.entropy(hidden, model.lm_head.weight, temperature), mask)


def target_states(model: Gemma, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states that predict the supervised targets (N, d), and these targets (N,); row by row."""
    supervised = mask.bool()
    if not supervised.any():
        return torch.zeros(0, model.config.hidden_size, device=tokens.device, dtype=model.dtype), tokens.new_zeros(0)
    hidden, index = sequence_hidden(model, tokens, mask)
    return hidden[index[:, :-1][supervised]], tokens[:, 1:][supervised]


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """values (N,) of the supervised tokens, at their places -> (B, T-1), 0 elsewhere."""
    zeros = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return zeros.masked_scatter(mask.bool(), values)


def sequence_hidden(model: Gemma, tokens: Tensor, mask: Tensor, last: bool = False) -> tuple[Tensor, Tensor]:
    """Final hidden states (N, d) of the rows, and index (B, T): where each token's state lies among them.

    tokens and mask as for sequence_logprobs. A row is computed up to the token that predicts its last target, or with
    `last` up to that target itself; a prompt that neighbouring rows share (answers to one question) is computed once.
    """
    assert mask.shape == (tokens.shape[0], tokens.shape[1] - 1), (tokens.shape, mask.shape)
    at = torch.arange(1, tokens.shape[1], device=tokens.device)
    ends = (mask.bool() * at).amax(1)  # inputs up to the one that predicts the row's last target; 0 without targets
    starts = at.expand_as(mask).masked_fill(~mask.bool(), tokens.shape[1]).amin(1)  # and up to its first
    lengths = torch.where(ends > 0, ends + last, 0).tolist()
    flat, sizes, parents, index = gemma.share_prompts(tokens, starts.tolist(), lengths)
    return gemma.hidden_states(model, flat, sizes, parents), index


@torch.no_grad()
def exact_entropy_and_kl(
    net: Gemma,
    frozen: Gemma,
    reference: str | None,
    examples: list[dict],
    micro_batches: list[list[int]],
) -> Tensor:
    """For each example, summed over its supervised tokens: the entropy of `net` and its KL to the reference, in nats.

    -> (n, 3) fp64: entropy, KL, number of tokens. reference: an adapter of `frozen`, or None for the bare base;
    micro_batches: rows that go through together. Rows outside of them stay zero.
    """
    sums = torch.zeros(len(examples), 3, dtype=torch.float64)
    for rows in micro_batches:
        tokens, mask = data.collate([examples[row] for row in rows], net.device)
        hidden, _ = target_states(net, tokens, mask)
        with lora.using(frozen, reference):
            ref_hidden, _ = target_states(frozen, tokens, mask)
        both = losses.entropy_and_kl(hidden, ref_hidden, net.lm_head.weight, ref_head_weight=frozen.lm_head.weight)
        columns = [spread(values, mask).double().sum(1) for values in both]
        sums[rows] = torch.stack([*columns, mask.double().sum(1)], 1).cpu()
    return sums


def mean_entropy_and_kl(
    net: Gemma, frozen: Gemma, examples: list[dict], micro_batches: list[list[int]]
) -> dict[str, float]:
    """Exact entropy of the policy and KL(policy || reference) per supervised token, in nats, over all ranks.

    `frozen` holds the reference: as its adapter of that name, or bare. micro_batches: this rank's rows.
    """
    sums = exact_entropy_and_kl(net, frozen, "reference", examples, micro_batches).sum(0)
    entropy, kl, count = dist.sum_tensor(sums).tolist()
    return {"eval/entropy": entropy / count, "eval/kl": kl / count}


def trim_memory(device: torch.device) -> None:
    """Give freed pages back to the system, which glibc keeps: 0.4 GB in 45 steps of the 270M.

    Faulting them in again takes 7 to 10 % of a step, so `Run.count` does this at every 16th step, and the scripts
    between two runs.
    """
    if device.type == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim:
            trim(0)


def compute_context(
    device: torch.device, dtype: torch.dtype, trainable_weights: bool
) -> contextlib.AbstractContextManager:
    """Autocast where fp32 master weights are trained in bf16; nothing otherwise (a LoRA base has its own dtype)."""
    if trainable_weights and dtype == torch.bfloat16:
        return torch.autocast(device.type, dtype=dtype)
    return contextlib.nullcontext()


def plain_state(model: Gemma, adapter: str | None = None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Weights under the names of a plain Gemma3ForCausalLM, with `adapter` merged in (in fp32, then cast)."""
    wrapped = lora.lora_modules(model)
    state = {f"{name}.weight": lora.merged_weight(module, adapter) for name, module in wrapped.items()}
    inside = tuple(f"{name}." for name in wrapped)
    for name, parameter in model.named_parameters():
        if not name.startswith(inside) and name != "lm_head.weight":
            state[name] = parameter.detach()
    dtype = dtype or model.lm_head.weight.dtype
    return {name: tensor.to("cpu", dtype).contiguous() for name, tensor in state.items()}


def save_model(
    model: Gemma,
    tokenizer: Tokenizer,
    folder: Path | str,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """A folder that plain transformers loads; with `adapter`, that adapter merged into the weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(plain_state(model, adapter, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    config = type(model.config)(**model.config.to_dict())
    config.architectures, config.dtype = ["Gemma3ForCausalLM"], dtype or model.lm_head.weight.dtype
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: Tokenizer, folder: Path | str) -> None:
    """The tokenizer's files, in words that transformers 4 and 5 both read.

    Version 5 names a class and keeps keys that 4 does not know, and a list where 4 expects a dict.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    kept = {key: value for key, value in settings.items() if key not in OF_VERSION_5}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_adapter(model: Gemma, tokenizer: Tokenizer, folder: Path | str, name: str, base_checkpoint: str) -> None:
    """A folder that plain peft loads: adapter_model.safetensors (fp32), adapter_config.json, tokenizer.

    With base.json, which peft ignores: the base that the adapter belongs to, for check_base.
    """
    tensors = {key: p.detach().cpu().contiguous() for key, p in lora.adapter_parameters(model, name).items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(lora.adapter_config(model, name, base_checkpoint), indent=2)
    (Path(folder) / "adapter_config.json").write_text(text + "\n")
    fingerprint = base_fingerprint(model)
    if fingerprint:
        quantised = "nf4" if is_quantised(model) else None
        record = {"base_checkpoint": str(base_checkpoint), "fingerprint": fingerprint, "quantised": quantised}
        (Path(folder) / base.RECORD).write_text(json.dumps(record, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)


def load_adapter(
    model: Gemma, name: str, folder: Path | str, trainable: bool = True, any_bits: bool = False
) -> tuple[int, float, list[str]]:
    """Inject the adapter saved in `folder` as `name`; returns (rank, alpha, targets). UserError if it does not fit.

    folder: may be DIR@0.5, see base.split_scale; alpha is then half of the saved one. any_bits: also where one of base
    and adapter is of 4 bits and the other is not.
    """
    folder, scale = base.split_scale(folder)
    checkpoint.verify(folder, optional=True)
    base.check_adapter(folder, "model.adapter")
    check_base(model, folder, "model.adapter", any_bits)
    try:
        rank, alpha, targets, dropout = lora.read_config((folder / "adapter_config.json").read_text())
        alpha *= scale
        tensors = load_file(folder / "adapter_model.safetensors")
        lora.inject(model, name, rank, alpha, targets, dropout)
        parameters = lora.adapter_parameters(model, name)
        lora.fill(parameters, tensors)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"model.adapter: {folder} cannot be used ({error})") from error
    for parameter in parameters.values():
        parameter.requires_grad_(trainable)
    return rank, alpha, targets


def check_base(net: Gemma, folder: Path | str, key: str, any_bits: bool = False) -> None:
    """Say or refuse what base.check_record finds on the adapter in `folder`, given as setting `key`, and this net.

    any_bits: it does not matter whether base and adapter are both of 4 bits.
    """
    if base.record(folder):
        here, quantised = getattr(net, "base_folder", None), None if any_bits else is_quantised(net)
        base.check_record(folder, key, here, base_fingerprint(net), quantised)


def trained_quantised(folder: Path | str) -> bool:
    """Was the adapter in `folder` trained on a 4-bit base? An older one has no record: then its run's config.yml says,
    and away from its run it counts as trained on the unquantised base."""
    if record := base.record(folder):
        return record["quantised"] is not None
    run = base.split_scale(folder)[0].resolve().parent
    if not (run / "metrics.jsonl").is_file() or not (run / "config.yml").is_file():
        return False
    return config.load_config(run / "config.yml").model.peft_type == "qlora"


def adapter_fingerprint(folder: Path | str | None) -> list | None:
    """What decides an adapter's effect: hashes of its tensors and of rank, alpha and targets, then the scale of
    DIR@SCALE where it is not 1; None without a folder."""
    if not folder:
        return None
    folder, scale = base.split_scale(folder)
    hashes = [checkpoint.sha256(folder / name) for name in ("adapter_model.safetensors", "adapter_config.json")]
    return hashes if scale == 1 else [*hashes, scale]


def adapter_effect(folder: Path | str | None) -> list | None:
    """As adapter_fingerprint, wherever the adapter's base lies: without its place, which adapter_config.json names."""
    if not folder:
        return None
    tensors, _, *scale = adapter_fingerprint(folder)
    path = base.split_scale(folder)[0] / "adapter_config.json"
    return [tensors, resume.fingerprint(json.loads(path.read_text()) | {"base_model_name_or_path": None}), *scale]


def save(model: Gemma, tokenizer: Tokenizer, folder: Path | str, adapter: str | None, base_name: str) -> None:
    """The trained part of a run: the adapter, or the whole model where `adapter` is None."""
    if adapter:
        save_adapter(model, tokenizer, folder, adapter, base_name)
    else:
        save_model(model, tokenizer, folder)


def restore(model: Gemma, adapter: str | None, folder: Path | str) -> None:
    """Put back, bit for bit, what `save` wrote into a step folder, into a model of the same shape."""
    if adapter:
        named = lora.adapter_parameters(model, adapter)
        lora.fill(named, load_file(Path(folder) / "adapter_model.safetensors"))
    else:
        lora.fill(dict(model.named_parameters()), load_file(Path(folder) / "model.safetensors"))
