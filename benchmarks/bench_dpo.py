"""DPO against TRL's DPOTrainer: the same model, adapter, token ids and order of pairs, each in its own process.

    python benchmarks/bench_dpo.py --base gemma-3-270m.gguf --data data/safety --trl-python other-venv/bin/python

Both sides start from one saved LoRA adapter (r 8, q/k/v/o, fp32 on a frozen base of --dtype) and take the same batches
of 4 HH pairs (<= 512 tokens a side, similar lengths together), beta 0.1, AdamW, constant learning rate, and both pay
for the reference's log-probs of these pairs once: TRL in its loop, ours in a pass before it, whose seconds are added.
Ours is train_rl.py as anyone runs it; TRL runs with its best settings found here: weights of --dtype, no gradient
checkpointing. The sides take turns, `--rounds` times, and the report quotes medians. benchmarks/dpo.md holds what it
prints.
"""

import json
import os
import platform
import statistics
import sys
from pathlib import Path

from bench_sft import LENGTH, ROOT, SEED, TARGETS, VALIDATION, drive, matrix_rate, trl_clock

BATCH, RATE, BETA = 4, 1e-4, 0.1


def ours(base, work, steps):
    """train_rl.py on the prepared pairs; its own metrics.jsonl is the measurement."""
    sys.path.insert(0, str(ROOT))
    run = f"ours-{os.getpid()}"
    os.environ["GEMMA_ALIGNMENT_CACHE"] = f"{work}/{run}-cache"  # no reference of an earlier round
    import train_rl

    train_rl.main([
        "--rl.algorithm", "dpo", "--training.mode", "rl", "--model.base_checkpoint", base,
        "--model.adapter", f"{work}/adapter", "--model.dtype", os.environ["BENCH_DTYPE"],
        "--dataset_path", f"{work}/data", "--seed", str(SEED),
        "--device", os.environ["BENCH_DEVICE"],
        "--rl.dpo_beta", str(BETA), "--training.batch_size", str(BATCH),
        "--training.max_seq_length", str(LENGTH), "--rl.max_steps", str(steps), "--rl.learning_rate", str(RATE),
        "--training.schedule", "constant", "--training.warmup_ratio", "0", "--training.eval_interval", "1000000",
        "--training.save_interval", "1000000", "--logging.output_dir", work, "--logging.run_name", run,
    ])  # fmt: skip
    records = [json.loads(line) for line in Path(work, run, "metrics.jsonl").read_text().splitlines()]
    steps = [{"loss": r["loss"], "margin": r["margin"], "seconds": r["seconds"]} for r in records if "loss" in r]
    steps[0]["reference_seconds"] = records[0]["reference_seconds"]
    return steps


def trl(base, work, steps):
    """DPOTrainer on the same ids and order."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = json.loads(Path(work, "rows.json").read_text())[: steps * BATCH]
    cut = [(row["prompt_tokens"], row["chosen"]["ids"], row["rejected"]["ids"]) for row in rows]
    dataset = Dataset.from_list(
        [{"prompt_ids": a[:n], "chosen_ids": a[n:], "rejected_ids": b[n:], "prompt": "-"} for n, a, b in cut]
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, os.environ["BENCH_DTYPE"]))
    model = PeftModel.from_pretrained(model, f"{work}/adapter", is_trainable=True)
    clock, times = trl_clock()

    class Ready(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # it is tokenised

    config = DPOConfig(
        f"{work}/trl", max_steps=steps, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, beta=BETA,
        learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
        optim="adamw_torch", max_length=LENGTH, gradient_checkpointing=False, bf16=False, seed=SEED,
        use_cpu=os.environ["BENCH_DEVICE"] == "cpu",
        train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = Ready(model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{"loss": entry["loss"], "margin": entry["rewards/margins"], "seconds": seconds}
            for entry, seconds in zip(logs, times)]  # fmt: skip


def prepare(base, data_folder, work, steps):
    """Fix the pairs and their order, and write one initial adapter; returns the pairs of the run."""
    sys.path.insert(0, str(ROOT))
    import torch

    from common import data, lora, model

    (work / "data").mkdir()
    net, tokenizer = model.load(base, torch.device("cpu"), torch.bfloat16)
    torch.manual_seed(SEED)
    lora.inject(net, "policy", 8, 16, TARGETS)
    (work / "adapter").mkdir()
    model.save_adapter(net, tokenizer, work / "adapter", "policy", base)
    records = data.load_split(data_folder, "train")
    usable = [record for record in records if data.encode_pairs([record], tokenizer, LENGTH)[0]]
    usable = usable[: VALIDATION + (len(usable) - VALIDATION) // BATCH * BATCH]  # whole batches on both sides
    for split, part in (("val", usable[:VALIDATION]), ("train", usable[VALIDATION:])):
        (work / "data" / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    pairs, _ = data.encode_pairs(usable[VALIDATION:], tokenizer, LENGTH)
    lengths = [data.pair_tokens(pair) for pair in pairs]
    order = [i for batch in data.epoch_batches(lengths, BATCH, SEED, 0) for i in batch]
    if len(order) < steps * BATCH:
        raise SystemExit(f"{len(order)} pairs do not make {steps} batches of {BATCH}")
    rows = [pairs[i] for i in order][: steps * BATCH]
    (work / "rows.json").write_text(json.dumps(rows))
    return rows


def report(rows, results, args):
    tokens = sum(len(row[side]["ids"]) for row in rows for side in ("chosen", "rejected"))
    prompts = sum(row["prompt_tokens"] for row in rows)
    answers = sum(sum(row[side]["mask"]) for row in rows for side in ("chosen", "rejected"))
    lines = [
        "# DPO against TRL 1.16",
        "",
        f"`python benchmarks/bench_dpo.py --base gemma-3-270m.gguf --data data/safety --trl-python PYTHON "
        f"--steps {args.steps} --rounds {args.rounds} --dtype {args.dtype}`",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, {args.dtype} matrix products at {matrix_rate():.0f} GFLOP/s; "
        f"Gemma 3 270M, LoRA r 8 on q/k/v/o; {args.steps} steps of {BATCH} HH pairs: {tokens} tokens with each prompt "
        f"counted twice, {prompts} in prompts, {answers} in answers. The reference's log-probs are part of both times.",
        "",
        "| | pairs/s (median round) | rounds | peak memory GB | mean loss | mean margin |",
        "|---|---|---|---|---|---|",
    ]
    medians = {}
    for side, runs in results.items():
        speeds = [len(rows) / sum(s["seconds"] + s.get("reference_seconds", 0) for s in run["steps"]) for run in runs]
        peak = statistics.median(run["peak_gb"] for run in runs)
        loss, margin = (statistics.mean(step[key] for step in runs[0]["steps"]) for key in ("loss", "margin"))
        medians[side] = (statistics.median(speeds), peak, loss)
        spread = ", ".join(f"{speed:.3f}" for speed in speeds)
        lines.append(f"| {side} | {medians[side][0]:.3f} | {spread} | {peak:.2f} | {loss:.4f} | {margin:.4f} |")
    fast, small, near = (medians["ours"][i] / medians["trl"][i] for i in range(3))
    first = results["ours"][0]["steps"]
    share = first[0]["reference_seconds"] / sum(s["seconds"] + s.get("reference_seconds", 0) for s in first)
    lines += ["", f"**{fast:.2f} times TRL's pairs/s, {small:.0%} of its peak memory, mean loss {near - 1:+.2%}.** "
              f"Of our time {share:.0%} is the reference's pass.", ""]  # fmt: skip
    lines += ["| step | loss ours | loss TRL | margin ours | margin TRL | seconds ours | seconds TRL |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for i, (a, b) in enumerate(zip(first, results["trl"][0]["steps"])):
        lines.append(f"| {i} | {a['loss']:.4f} | {b['loss']:.4f} | {a['margin']:+.4f} | {b['margin']:+.4f} | "
                     f"{a['seconds']:.2f} | {b['seconds']:.2f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    drive(__file__, __doc__, {"ours": ours, "trl": trl}, prepare, report)
