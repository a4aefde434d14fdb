"""Merge a trained adapter into its base, and prove on the written files that they say what the adapter says.

    W' = W + (alpha / r) B A in fp32, rounded once to the type asked for;   d = log p'(token) - log p(token)

p is the adapter beside its base, p' what is on disk, a folder or a .gguf file, as plain transformers computes it, both
in fp32, so d is what merging and rounding did. What lies beyond LIMITS is not kept. An adapter that was trained on a
4-bit base belongs to the weights that the 4 bits stand for: it is merged into those, and d of the unquantised base is
reported.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from common import chat, data, log, lora, losses, model, rollouts
from common.evaluation import comparison, gguf_file, measure, metrics, statistics, systems
from common.log import UserError, say
from common.runtime import base, card, checkpoint, resume

PROBES = 32  # held-out items that are compared
EXACT, ROUNDED = {"mean": 1e-4, "largest": 1e-3, "tie": 2e-3}, {"mean": 0.02}  # nats
LIMITS = {"float32": EXACT, "f32": EXACT, "bfloat16": ROUNDED, "bf16": ROUNDED, "f16": ROUNDED, "q8_0": {"mean": 0.04}}
# What rounds less, to be tried where a type rounds too much; f16 takes no more room than bf16.
FINER = {
    "q8_0": "--gguf_type f16",
    "bf16": "--gguf_type f16",
    "f16": "--gguf_type f32",
    "bfloat16": "--model.dtype float32",
}
SURVIVES, NOISE = 0.5, 0.5  # of an adapter: the least share that rounding leaves, the most that it may drown
BESIDE = (".json", ".Modelfile", ".md")  # what lies beside NAME.gguf
NAME = "policy"
DRAWS = 2000  # of the bootstrap


def run(cfg, job):
    """The job of evaluate.py --export: write the one checkpoint to a new folder or NAME.gguf -> figures of the check.

    UserError, and nothing is written, where the files are not what the adapter says.
    """
    source, target, kind = asked_for(cfg, job)
    is_file = target.suffix == ".gguf"

    # --- what the adapter says, beside its base
    device = model.pick_device(cfg.device)
    resume.prepare(device)
    folder, adapter = base.locate(source, job.flags.get("model.base_checkpoint"))
    quantized = adapter is not None and model.trained_quantised(adapter)
    net, tokenizer = load(folder, adapter, quantized, device)
    asked = questions(cfg, tokenizer)
    right = answers(net, adapter, asked)

    # --- the files, read back and compared
    needed = model.memory_bytes(net) + checkpoint.MARGIN
    draft = checkpoint.files_beside(target, needed) if is_file else checkpoint.commit(target, {"tensors": []}, needed)
    with draft as temp:
        if is_file:
            weights = temp / target.name
            state = model.plain_state(net, NAME if adapter else None, torch.float32)
            gguf_file.write(weights, net, tokenizer, state, kind)
            plain = gguf_file.read_model(weights, net)
            log.write(temp / f"{target.stem}.Modelfile", gguf_file.MODELFILE.format(name=target.name))
        else:
            weights = temp / "model.safetensors"
            plain = write_folder(temp, net, tokenizer, adapter, folder, getattr(torch, kind))
        figures = compare(net, adapter, asked, right, plain.to(device).eval().requires_grad_(False))
        figures["survives"] = rollouts.merge_survival(net, NAME, rounding(kind)) if adapter else None
        if quantized:
            other, _ = load(folder, adapter, False, device)
            figures["unquantised"] = gap(right["logprobs"], score(other, asked["examples"], model.sequence_logprobs))
        tell(figures)
        refuse(figures, kind, target)
        facts = {
            "source": str(source),
            "base": str(folder),
            "base_sha256": base.fingerprint(folder),
            "adapter_sha256": model.adapter_fingerprint(adapter),
            "merged_into": "the 4-bit base, dequantised" if quantized else "the base" if adapter else None,
            "limits": LIMITS[kind] | {"survives": SURVIVES, "noise": NOISE},
            **log.provenance(),
            "type" if is_file else "dtype": kind,
            "model_sha256": checkpoint.sha256(weights),
            "check": figures,
        }
        log.write_json(temp / (f"{target.stem}.json" if is_file else "export.json"), facts)
        readme = model_card(folder, adapter, facts["base_sha256"], held_out(right, asked, figures, kind))
        log.write(temp / (f"{target.stem}.md" if is_file else card.NAME), readme)
    if is_file:
        say(f"wrote {target} for llama.cpp, and {target.stem}.Modelfile for `ollama create`")
    else:
        say(f"wrote {target}: opens with transformers' AutoModelForCausalLM and AutoTokenizer")
    if job.push_to_hub:
        push(target, job.push_to_hub)
    return figures


def asked_for(cfg, job):
    """(checkpoint, Path to write to, type of the weights); UserError for flags that do not go together."""
    named = systems.parse(job.checkpoints or [])
    if [len(sources) for sources in named.values()] != [1] or job.items or job.human_eval or job.human_results:
        raise UserError("--export: needs --checkpoints NAME=CHECKPOINT with one checkpoint, and does nothing beside it")
    ((source,),), target = named.values(), Path(job.export)
    is_file = target.suffix == ".gguf"
    if job.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", job.push_to_hub):
        raise UserError(f"--push_to_hub: expected OWNER/NAME, got {job.push_to_hub!r:.80}")
    if job.gguf_type and not is_file:
        raise UserError(f"--gguf_type {job.gguf_type}: is of --export NAME.gguf; the type of a folder is --model.dtype")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--export: runs in one process: start it with python, not with torchrun")
    refuse_target(target)
    if is_file:
        return source, target, job.gguf_type or "bf16"
    return source, target, "bfloat16" if cfg.model.dtype == "bfloat16" else "float32"  # auto is float32


def write_folder(folder, net, tokenizer, adapter, base_folder, dtype):
    """A folder that plain transformers opens -> what that makes of it, in fp32.

    UserError unless the files hold, bit for bit, the weights that were merged, and the same tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model.save_model(net, tokenizer, folder, NAME if adapter else None, dtype)
    if (base_folder / "tokenizer.model").is_file():  # read by nothing here, but by llama.cpp's converter
        shutil.copyfile(base_folder / "tokenizer.model", folder / "tokenizer.model")
    state = model.plain_state(net, NAME if adapter else None, dtype)
    with safe_open(folder / "model.safetensors", "pt") as file:
        odd = sorted(state.keys() ^ set(file.keys()))
        odd += [name for name in state.keys() & set(file.keys()) if not torch.equal(file.get_tensor(name), state[name])]
    if odd:
        raise UserError(f"--export: {len(odd)} weights were not written as they were merged, the first is {odd[0]}")
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    same = theirs.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    if not same or theirs.chat_template != chat.TEMPLATE:
        raise UserError("--export: the tokenizer was not written as it was read")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True, local_files_only=True
    )


def model_card(folder, adapter, base_sha256, measured):
    """The text of the model card, from the last run that led here where there is one."""
    runs, trained_on = comparison.history(adapter or folder), base.record(adapter) if adapter else None
    cfg = comparison.run_config(runs[-1]) if runs else None
    kept = json.loads((runs[-1] / "run.json").read_text(encoding="utf-8"))["facts"] if runs else {}
    name = cfg.model.base_checkpoint if cfg else base.public_name(str(folder), folder)
    name = trained_on["base_checkpoint"] if trained_on else name
    return card.text(name, kept.get("model", base_sha256), measured, cfg, kept, whole=True)


def rounding(kind):
    """A function of a weight in fp32: the weight as it is stored, in fp32."""
    if kind in gguf_file.TYPES:
        return lambda weight: gguf_file.rounded(weight, kind).to(weight.device)
    return lambda weight: weight.to(getattr(torch, kind)).float()


def refuse_target(target):
    """UserError if something is there that the export would have to replace."""
    file = target.suffix == ".gguf"
    places = [target.with_suffix(end) for end in (".gguf", *BESIDE)] if file else [target]
    for place in filter(os.path.lexists, places):
        if file or place.is_symlink() or not place.is_dir() or any(place.iterdir()):
            new = "file" if file else "folder"
            raise UserError(f"--export: {place} is there already and nothing is overwritten: name a new {new}")


def push(target, repo):
    """Upload an export to the repository `repo` of the hub, private if it is new, as one commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    if target.is_dir():
        names = {path.name: path for path in sorted(target.iterdir())}
    else:
        names = {f"{target.stem}{end}": target.with_suffix(end) for end in (".gguf", ".json", ".Modelfile")}
        names[card.NAME] = target.with_suffix(".md")
    try:
        hub = HfApi()
        address = hub.create_repo(repo, private=True, exist_ok=True)
        added = [CommitOperationAdd(name, str(path)) for name, path in names.items()]
        hub.create_commit(repo, added, commit_message=f"Upload {target.name}")
    except Exception as error:
        todo = base.hub_remedy(error, f"https://huggingface.co/{repo}")
        raise UserError(f"--push_to_hub: {target} is written, but not sent to {repo}: {todo}") from error
    say(f"sent {len(names)} files to {address}")


def load(folder, adapter, quantized, device):
    """(net, tokenizer) in fp32, the linears in 4 bits if `quantized`; with the adapter saved in `adapter`, if any."""
    net, tokenizer = model.load(str(folder), device, torch.float32, quantize=quantized)
    if adapter:
        model.load_adapter(net, NAME, adapter, trainable=False, any_bits=True)
    return net, tokenizer


def questions(cfg, tokenizer):
    """{"prompts": ids to be continued, "examples": the data's answers as {"ids", "mask"}, "most": tokens to add}"""
    row, most = cfg.training.max_seq_length, cfg.evaluation.max_new_tokens
    count = min(cfg.evaluation.max_items or PROBES, PROBES)
    items, _ = measure.items(data.from_config(cfg, cfg.evaluation.split), tokenizer, row - most, count, cfg.seed)
    examples = measure.data_answers([item.record for item in items], tokenizer, row)
    if not examples:
        raise UserError(f"--export: none of {len(items)} records has an answer to compare log-probabilities on")
    return {"prompts": [item.ids for item in items], "examples": examples, "most": most}


def answers(net, adapter, asked):
    """Log-probs of the data's answers, greedy texts, and the log-probs of the base alone (None for a whole model)."""
    results = {"logprobs": score(net, asked["examples"], model.sequence_logprobs), "texts": greedy(net, asked)}
    with lora.using(net, None):
        results["base"] = score(net, asked["examples"], model.sequence_logprobs) if adapter else None
    return results


@torch.no_grad()
def score(net, examples, function):
    """log p of every supervised token -> (N,) fp64, by function(net, tokens, mask) of one row at a time."""
    logprobs = []
    for example in examples:
        tokens, mask = data.collate([example], net.device)
        logprobs.append(function(net, tokens, mask)[mask.bool()].cpu().double())
    return torch.cat(logprobs)


def by_transformers(net, tokens, mask):
    """As model.sequence_logprobs, by transformers' own forward pass."""
    mask, logprobs = mask.bool(), torch.zeros(mask.shape, device=tokens.device)
    hidden = net.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    logprobs[mask] = losses.token_logprobs(hidden[mask], net.lm_head.weight, tokens[:, 1:][mask])
    return logprobs


def greedy(net, asked):
    """The greedy continuation of each prompt, as ids; an adapter stays beside the weights."""
    return rollouts.sample(net, asked["prompts"], 1, asked["most"], greedy=True, merge=False)["completions"]


def compare(net, adapter, asked, right, plain):
    """What the written model `plain` does differently from `right`, the answers of `net`: the figures of the check."""
    figures = gap(right["logprobs"], score(plain, asked["examples"], by_transformers))
    texts = greedy(plain, asked)
    parted = [
        (i, next(t for t, (a, b) in enumerate(zip(*pair)) if a != b))
        for i, pair in enumerate(zip(right["texts"], texts))
        if pair[0] != pair[1]
    ]
    ties = []
    for i, t in parted:  # how much more likely the adapter finds its own word than the merged model's
        rows = [[*asked["prompts"][i], *right["texts"][i][:t], ids[i][t]] for ids in (right["texts"], texts)]
        ours, theirs = score(
            net, [{"ids": row, "mask": [0] * (len(row) - 1) + [1]} for row in rows], model.sequence_logprobs
        ).tolist()
        ties.append(ours - theirs)
    moved = (right["logprobs"] - right["base"]).abs().mean().item() if adapter else None
    return figures | {
        "tokens": len(right["logprobs"]),
        "adapter_moves": moved,
        "texts": len(texts),
        "equal_texts": len(texts) - len(parted),
        "first_difference": min((t for _, t in parted), default=None),
        "tie": max(ties, default=0.0),
    }


def gap(adapter, merged):
    """{"mean", "largest": of |merged - adapter|, "loss", "loss_merged": -mean log-prob of each} in nats per token."""
    apart = (merged - adapter).abs()
    return {
        "mean": apart.mean().item(),
        "largest": apart.max().item(),
        "loss": -adapter.mean().item(),
        "loss_merged": -merged.mean().item(),
    }


def held_out(right, asked, figures, kind):
    """{what was measured on the held-out answers: its value with a 95 % interval, by a bootstrap over answers}"""
    counts = [sum(example["mask"]) for example in asked["examples"]]
    rows = {}
    for name, logprobs in (("this model's", right["logprobs"]), ("the base's", right["base"])):
        if logprobs is not None:
            sums = [-part.sum().item() for part in logprobs.split(counts)]
            value, low, high = statistics.interval([list(zip(sums, counts, strict=True))], metrics.value, DRAWS)
            between = "" if low is None else f" [{low:.3f}, {high:.3f}]"
            rows[f"{name} loss on {len(counts)} held-out answers"] = f"{value:.3f}{between} nats per token"
    rows[f"difference of the {kind} files from the adapter"] = (
        f"{figures['mean']:.2g} nats per token on average, at most {figures['largest']:.2g}"
    )
    return rows


def tell(figures):
    """The figures as lines on the console."""
    moves = f"; the adapter moves them by {figures['adapter_moves']:.2g}" if figures["adapter_moves"] else ""
    say(
        f"log-probs of {figures['tokens']} tokens, merged against adapter: mean |difference| {figures['mean']:.2g}, "
        f"largest {figures['largest']:.2g} nats{moves}"
    )
    apart = figures["first_difference"]
    rest = "" if apart is None else f"; the others part at token {apart} or later, between words "
    rest += "" if apart is None else f"that the adapter finds at most {figures['tie']:.2g} nats apart"
    say(f"greedy texts: {figures['equal_texts']} of {figures['texts']} equal{rest}")
    if figures["survives"] is not None:
        say(f"share of the adapter that survives rounding: {figures['survives']:.1%}")
    if other := figures.get("unquantised"):
        say(
            f"QLoRA: merged into the dequantised 4-bit base (loss {figures['loss_merged']:.4f}); the unquantised base "
            f"would move log-probs by {other['mean']:.2g}, at most {other['largest']:.2g} nats "
            f"(loss {other['loss_merged']:.4f})"
        )


def refuse(figures, kind, target):
    """UserError that names the first figure beyond its limit; a nan is beyond every limit."""
    labels = {
        "mean": "mean |difference| of log-probs",
        "largest": "largest |difference| of a log-prob",
        "tie": "greedy texts part between words that differ by",
    }
    faults = [
        f"{labels[name]} {figures[name]:.3g} nats, limit {limit:g}"
        for name, limit in LIMITS[kind].items()
        if not figures[name] <= limit
    ]
    if figures["survives"] is not None and not figures["survives"] >= SURVIVES:
        faults.append(f"only {figures['survives']:.1%} of the adapter survives rounding, limit {SURVIVES:.0%}")
    exact = LIMITS[kind] is EXACT
    moves = figures["adapter_moves"] if not exact else None
    if moves and not figures["mean"] <= NOISE * moves:
        faults.append(
            f"rounding moves log-probs by {figures['mean']:.2g} nats, over {NOISE:.0%} of what the adapter does"
        )
    if faults:
        todo = "this merge is wrong, report it" if exact else f"export it with {FINER[kind]}"
        raise UserError(f"--export: {target} was not written, the merged model differs: {faults[0]}; {todo}")
