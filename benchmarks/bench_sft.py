"""SFT against TRL's SFTTrainer: the same model, adapter, token ids, masks and order, each in its own process.

    python benchmarks/bench_sft.py --base gemma-3-270m.gguf --data data/safety --trl-python other-venv/bin/python

Both sides start from one saved LoRA adapter (r 8, q/k/v/o, fp32 on a base of --dtype) and take the same batches of 4 HH
dialogues (BENCH_BATCH=16 takes 16; <= 512 tokens, last answer and its stop token trained, rows of similar length
together), AdamW, constant learning rate. Ours is train_sft.py as anyone runs it; TRL runs with its best settings found
here: --dtype weights, no gradient checkpointing, batches grouped by length. Tokens are real tokens, padding never
counts. The sides take turns, `--rounds` times, and the report quotes medians. benchmarks/sft.md holds what it prints.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
BATCH = int(os.environ.get("BENCH_BATCH", "4"))
SEED, LENGTH, RATE, VALIDATION = 0, 512, 2e-4, 8


def ours(base, work, steps):
    """train_sft.py on the prepared data; its own metrics.jsonl is the measurement."""
    sys.path.insert(0, str(ROOT))
    import train_sft

    train_sft.main([
        "--model.base_checkpoint", base, "--model.adapter", f"{work}/adapter",
        "--model.dtype", os.environ["BENCH_DTYPE"], "--dataset_path", f"{work}/data", "--seed", str(SEED),
        "--device", os.environ["BENCH_DEVICE"], "--training.last_turn_only", "true",
        "--training.batch_size", str(BATCH), "--training.max_seq_length", str(LENGTH),
        "--training.max_steps", str(steps),
        "--training.learning_rate", str(RATE), "--training.schedule", "constant", "--training.warmup_ratio", "0",
        "--training.eval_interval", "1000000", "--training.save_interval", "1000000",
        "--logging.output_dir", work, "--logging.run_name", f"ours-{os.getpid()}",
    ])  # fmt: skip
    records = [json.loads(line) for line in Path(work, f"ours-{os.getpid()}", "metrics.jsonl").read_text().splitlines()]
    return [{"loss": r["loss"], "seconds": r["seconds"]} for r in records if "loss" in r]


def trl_clock():
    """(callback for a Trainer, the list that it fills with the seconds of each step)."""
    from transformers import TrainerCallback

    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(-time.perf_counter())

        def on_step_end(self, *_, **__):
            times[-1] += time.perf_counter()

    return Clock(), times


def trl(base, work, steps):
    """SFTTrainer on the same ids, masks and order."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = json.loads(Path(work, "rows.json").read_text())
    dataset = Dataset.from_list(
        [
            {"input_ids": r["ids"], "labels": [t if m else -100 for t, m in zip(r["ids"], r["mask"])]}
            for r in rows[: steps * BATCH]
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, os.environ["BENCH_DTYPE"]))
    model = PeftModel.from_pretrained(model, f"{work}/adapter", is_trainable=True)
    clock, times = trl_clock()
    config = SFTConfig(
        f"{work}/trl", max_steps=steps, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, packing=False,
        learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
        optim="adamw_torch", max_length=LENGTH, gradient_checkpointing=False, bf16=False, seed=SEED,
        use_cpu=os.environ["BENCH_DEVICE"] == "cpu",
        train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [{"loss": loss, "seconds": seconds} for loss, seconds in zip(losses, times)]


def prepare(base, data_folder, work, steps):
    """Fix the rows and their order, and write one initial adapter; returns the rows of the run."""
    sys.path.insert(0, str(ROOT))
    import torch

    from common import data, lora, model

    (work / "data").mkdir()
    records = (Path(data_folder) / "train.jsonl").read_text().splitlines()
    (work / "data" / "val.jsonl").write_text("\n".join(records[:VALIDATION]) + "\n")
    net, tokenizer = model.load(base, torch.device("cpu"), torch.bfloat16)
    torch.manual_seed(SEED)
    lora.inject(net, "policy", 8, 16, TARGETS)
    (work / "adapter").mkdir()
    model.save_adapter(net, tokenizer, work / "adapter", "policy", base)
    train = [json.loads(line) for line in records[VALIDATION:]]
    kept = [record for record in train if data.encode_records([record], tokenizer, LENGTH, True)[0]]
    kept = kept[: len(kept) // BATCH * BATCH]  # whole batches, so that TRL's sequential batches are ours
    (work / "data" / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    examples, _ = data.encode_records(kept, tokenizer, LENGTH, True)
    lengths = [len(example["ids"]) for example in examples]
    order = [i for batch in data.epoch_batches(lengths, BATCH, SEED, 0) for i in batch]
    if len(order) < steps * BATCH:
        raise SystemExit(f"{len(order)} rows do not make {steps} batches of {BATCH}")
    rows = [examples[i] for i in order]
    (work / "rows.json").write_text(json.dumps(rows))
    return rows[: steps * BATCH]


def matrix_rate():
    """GFLOP/s of this machine's matrix products in the benchmark's dtype, the best of the shapes of a training step."""
    import torch

    best, dtype = 0.0, getattr(torch, os.environ["BENCH_DTYPE"])
    for n, k, m in ((1024, 640, 2048), (1024, 2048, 640), (256, 640, 65536)):
        a, b = torch.randn(n, k, dtype=dtype), torch.randn(m, k, dtype=dtype)
        until = time.perf_counter() + 5.0  # where bf16 is emulated, one product takes seconds
        for _ in range(8):
            start = time.perf_counter()
            for _ in range(10):
                a @ b.T
            end = time.perf_counter()
            best = max(best, 10 * 2 * n * k * m / (end - start) / 1e9)
            if end > until:
                break
    return best


def step_flops(rows):
    """Products of the step that cannot be avoided: body forward and backward to the inputs, head twice on targets."""
    body, head = 100.3e6, 262144 * 640
    tokens, targets = sum(len(r["ids"]) for r in rows), sum(sum(r["mask"]) for r in rows)
    return 4 * body * tokens + 4 * head * targets


def drive(script, doc, sides, prepare, report):
    """Run both sides of a comparison in turns, each in its own process, and print the report.

    sides: {"ours": f, ..., "trl": f}, f(base, work, steps) -> records; prepare(base, data, work, steps) -> rows.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the real 270M: folder or .gguf")
    parser.add_argument("--data", required=True, help="folder with train.jsonl of the safety task")
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has trl==1.16.0")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the frozen weights")
    parser.add_argument("--side", choices=tuple(sides), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"BENCH_DTYPE": args.dtype, "BENCH_DEVICE": "cpu"}  # what the sides read; on a GPU: gpu.py
    if args.side:
        import resource

        steps = sides[args.side](args.base, args.work, args.steps)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        Path(args.work, f"{args.side}.json").write_text(json.dumps({"steps": steps, "peak_gb": peak}))
        return
    # each side chooses for itself how its threads wait, which `common` does by a variable
    environment = dict(os.environ)
    sys.path.insert(0, str(ROOT))
    from common.runtime import base as bases

    base = str(bases.resolve(args.base))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = prepare(base, args.data, work, args.steps)
        results = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                python = args.trl_python if side == "trl" else sys.executable
                command = [python, script, "--side", side, "--work", folder, "--base", base, "--data", args.data]
                command += ["--steps", str(args.steps), "--dtype", args.dtype]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
                results[side].append(json.loads((work / f"{side}.json").read_text()))
                print(side, f"{results[side][-1]['peak_gb']:.2f} GB", flush=True)
    text = report(rows, results, args)
    print(text)


def report(rows, results, args):
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    tokens, targets = sum(len(r["ids"]) for r in rows), sum(sum(r["mask"]) for r in rows)
    rate = matrix_rate()
    lines = [
        "# SFT against TRL 1.16",
        "",
        f"`{'' if BATCH == 4 else f'BENCH_BATCH={BATCH} '}"
        "python benchmarks/bench_sft.py --base gemma-3-270m.gguf --data data/safety --trl-python PYTHON "
        f"--steps {args.steps} --rounds {args.rounds} --dtype {args.dtype}`",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, {args.dtype} matrix products at {rate:.0f} GFLOP/s; Gemma 3 "
        f"270M, LoRA r 8 on q/k/v/o; {args.steps} steps of {BATCH} HH dialogues, {tokens} tokens, {targets} of them "
        "trained.",
        "",
        "| | tokens/s (median round) | rounds | peak memory GB | mean loss | share of the machine's matrix rate |",
        "|---|---|---|---|---|---|",
    ]
    medians = {}
    for side, runs in results.items():
        speeds = [tokens / sum(step["seconds"] for step in run["steps"]) for run in runs]
        peak = statistics.median(run["peak_gb"] for run in runs)
        loss = statistics.mean(step["loss"] for step in runs[0]["steps"])
        seconds = tokens / statistics.median(speeds)
        share = sum(step_flops(batch) for batch in batches) / seconds / 1e9 / rate
        medians[side] = (statistics.median(speeds), peak, loss)
        spread = ", ".join(f"{speed:.1f}" for speed in speeds)
        lines.append(f"| {side} | {medians[side][0]:.1f} | {spread} | {peak:.2f} | {loss:.4f} | {share:.0%} |")
    fast, small, near = (medians["ours"][i] / medians["trl"][i] for i in range(3))
    lines += [
        "",
        f"**{fast:.2f} times TRL's tokens/s, {small:.0%} of its peak memory, mean loss {near - 1:+.2%}.**",
        "",
    ]
    lines += ["| step | tokens | loss ours | loss TRL | seconds ours | seconds TRL |", "|---|---|---|---|---|---|"]
    for i, (a, b) in enumerate(zip(results["ours"][0]["steps"], results["trl"][0]["steps"])):
        count = sum(len(r["ids"]) for r in batches[i])
        lines.append(f"| {i} | {count} | {a['loss']:.4f} | {b['loss']:.4f} | {a['seconds']:.2f} | {b['seconds']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    drive(__file__, __doc__, {"ours": ours, "trl": trl}, prepare, report)
