"""Memory by measurement beside memory by formula: short real runs of the trainers, each in a process of its own.

    python benchmarks/memory.py --tokenizer FOLDER_OF_A_REAL_GEMMA_3 [--only 270m] [--limit_gb 9]

Bases have the exact shapes of Gemma 3 270M and 1B and random weights, written once (bf16) beside the converted bases in
the cache. A run is train_sft.py or train_rl.py itself, two steps, in a forked child. Measured is the highest resident
memory, before the first step (`loading`) and from it to the end; computed is what the same command says with --explain.
A run that would take more than the limit, or than is free, is left out and said to be. Results are kept as JSON lines,
so an interrupted grid goes on where it was. benchmarks/memory.md holds what it prints.
"""

import argparse
import functools
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # the children are forks, which other threads would not survive

import step_1b  # noqa: E402
import torch  # noqa: E402
from transformers import Gemma3ForCausalLM, Gemma3TextConfig  # noqa: E402

import train_rl  # noqa: E402
import train_sft  # noqa: E402
from common import log, lora  # noqa: E402
from common.runtime import cache, explain, resume  # noqa: E402

STEPS, BOUND, SPARE = 2, 0.15, 1.0
NARROW = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18}  # where the 270M differs from the 1B
WORDS = "soup house garden river music paper window letter bridge summer winter yellow green blue small quiet".split()
# of a step: rows, pairs or completions; tokens of each; new ones among them
SIZES = {"sft": (2, 128, 0), "dpo": (1, 128, 0), "grpo": (8, 64, 16), "ppo": (8, 64, 16)}
LARGE = {("270m", "float32", "lora", "sft"): (3, 256, 0)}  # where activations are a third of the peak
ALGORITHMS = ("sft", "dpo", "grpo", "ppo")
GRID = [
    *(("270m", "float32", peft, algorithm) for peft in ("lora", "qlora", "none") for algorithm in ALGORITHMS),
    *(("270m", "bfloat16", peft, algorithm) for peft, algorithm in
      (("lora", "sft"), ("qlora", "sft"), ("none", "sft"), ("lora", "grpo"), ("none", "grpo"))),
    *(("1b", "bfloat16", peft, algorithm) for peft in ("lora", "qlora") for algorithm in ALGORITHMS),
    ("1b", "float32", "none", "sft"),
]  # fmt: skip
NEED = {
    "270m": {"lora": 3.2, "qlora": 3.2, "none": 7.5},
    "1b": {"lora": 5, "qlora": 5, "none": 19},
}  # GB, by the formula


def shape_of(case):
    return LARGE.get(case, SIZES[case[3]])


def records(split, count, algorithm, length, new):
    """Rows that fill `length` tokens: answers are cut there, and prompts of online RL leave room for `new` tokens."""
    for i in range(count):
        draw = random.Random(f"{split}/{i}")
        prompt = length - new - 12 if new else length // 4
        texts = [" ".join(draw.choice(WORDS) for _ in range(n)) for n in (prompt, length + 20, length + 20)]
        turns = [{"role": "user", "content": texts[0]}]
        yield {"id": f"{split}-{i}", "prompt": turns, "response": texts[1], "rejected": texts[2], "reference": texts[1]}


def flags(case, base, work):
    _, dtype, peft, algorithm = case
    rows, length, new = shape_of(case)
    common = {"model.base_checkpoint": base, "model.dtype": dtype, "model.peft_type": peft, "dataset_path": work,
              "training.max_steps": STEPS, "training.max_seq_length": length, "training.micro_batch_tokens": 4096,
              "training.eval_interval": 1000, "training.save_interval": 1000, "logging.output_dir": work,
              "device": "cpu"}  # fmt: skip
    if algorithm == "sft":
        more = {"training.batch_size": rows}
    else:
        more = {"training.mode": "rl", "rl.algorithm": algorithm, "evaluation.draws": 100}
    if algorithm == "dpo":
        more |= {"training.batch_size": rows}
    elif new:
        more |= {"rl.rollout_size": rows // 4, "rl.group_size": 4, "rl.max_new_tokens": new, "rl.num_ppo_epochs": 1,
                 "rl.minibatches": 1, "rl.critic_warmup": 0, "evaluation.max_new_tokens": new,
                 "reward.type": "heuristic"}  # fmt: skip
    return [word for key, value in (common | more).items() for word in (f"--{key}", str(value))]


def run_one(case, base):
    """One run and then its plan -> {"loading", "steps": peaks in GB, "plan": {phase: GB}}."""
    device, found, begin = torch.device("cpu"), {}, resume.write_run_info

    def first_step(*arguments):
        found["loading"] = log.peak_memory_gb(device)
        log.reset_peak_memory()
        begin(*arguments)

    def keep(plan):
        parts = {phase: sum(size for _, size in of) / 1e9 for phase, of in plan.items()}
        found["plan"] = {phase: parts["always"] + size for phase, size in parts.items() if phase != "always"}

    resume.write_run_info, explain.say_plan = first_step, keep
    with tempfile.TemporaryDirectory() as work:
        rows, length, new = shape_of(case)
        for split, count in (("train", STEPS * rows), ("val", 1)):
            lines = [json.dumps(record) for record in records(split, count, case[3], length, new)]
            Path(work, f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        main = train_sft.main if case[3] == "sft" else train_rl.main
        main(flags(case, base, work))
        found["steps"] = log.peak_memory_gb(device)
        resume.write_run_info = begin
        main([*flags(case, base, work), "--explain"])
    return found


def shapes():
    return {"270m": step_1b.SHAPE | NARROW, "1b": dict(step_1b.SHAPE)}


def write_bases(tokenizer):
    """{size: folder} of the two random bases."""
    found = {}
    for size, shape in shapes().items():
        write = functools.partial(step_1b.write_random, tokenizer=tokenizer, shape=shape)
        found[size] = str(cache.build_once(cache.root() / f"random-{size}", write))
    return found


def in_child(function, *arguments):
    """function(*arguments) in a forked child, whose memory is its own -> its result, or {"failed": the error}."""
    with tempfile.TemporaryFile() as file:
        pid = os.fork()
        if pid == 0:
            try:
                found = function(*arguments)
            except BaseException as error:
                found = {"failed": repr(error)}
            file.write(json.dumps(found).encode())
            file.flush()
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        file.seek(0)
        return json.loads(file.read() or json.dumps({"failed": f"ended with status {status}"}))


def free_gb():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024 / 1e9


def computed(shape, full, batch, rows):
    """{phase: GB} of a card on which a step of this shape runs in bf16; weights are never made."""
    with torch.device("meta"):  # no CPU, so planned as a GPU; it has no autocast, so that is answered for it
        net = Gemma3ForCausalLM(Gemma3TextConfig(**shape)).to(torch.float32 if full else torch.bfloat16)
        net.tie_weights()
        if full:
            net.requires_grad_(True)
        else:
            lora.inject(net, "policy", 8, 16)
    trained = [p for p in net.parameters() if p.requires_grad]
    with mock.patch.object(torch, "is_autocast_enabled", lambda kind: full):
        plan = explain.memory_plan(net, trained, (*batch, True), net, decodes=[(rows, batch[1])])
    sums = {phase: sum(size for _, size in parts) / 1e9 for phase, parts in plan.items()}
    return {phase: sums["always"] + size for phase, size in sums.items()} | {"trained": sum(p.numel() for p in trained)}


def plan_table():
    """Markdown: peaks of a GPU by formula, and the largest micro-batches that fit."""
    length, rows = 1024, 256
    lines = [
        "## Computed for one GPU, not measured",
        "",
        f"bf16, rows of {length} tokens, LoRA of rank 8 on all linears or all weights; GB. `fits` is the largest "
        "`--training.micro_batch_tokens`, a power of two, whose update takes at most nine tenths of the card. Sampling "
        f"is of {rows} rows at once.",
        "",
        "| | trained | parameters | update, 2,048 tokens | 8,192 | 32,768 | sampling | measuring the KL | fits 8 GB "
        "| 80 GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size, shape in shapes().items():
        for full in (False, True):
            found = {n: computed(shape, full, (n, length), rows) for n in (2**i for i in range(9, 18))}
            fits = [max((n for n, plan in found.items() if plan["update"] <= 0.9 * card), default=None)
                    for card in (8, 80)]  # fmt: skip
            plan = found[2048]
            cells = [f"{found[n]['update']:.1f}" for n in (2048, 8192, 32768)]
            cells += [f"{plan[phase]:.1f}" for phase in ("sampling", "measuring the KL")]
            cells += [f"{n:,}" if n else "no" for n in fits]
            lines.append(
                f"| {size} | {'all' if full else 'LoRA'} | {plan['trained'] / 1e6:.1f} M | {' | '.join(cells)} |"
            )
    return lines


def report(results):
    lines = [
        "# Memory, measured and computed",
        "",
        "`python benchmarks/memory.py --tokenizer FOLDER_OF_A_REAL_GEMMA_3`",
        "",
        f"CPU, one thread, peak resident memory in GB; random weights of the exact shapes; {STEPS} steps. `tokens` is "
        "rows x tokens of SFT, pairs x tokens of an answer with its prompt of DPO, completions x (prompt + new tokens) "
        "of GRPO and PPO, four completions a prompt. `computed` is what `--explain` says of the same command, `phase` "
        "where it has its peak. The ratio is computed / measured, of the higher of loading and steps.",
        "",
        "| | dtype | trained | algorithm | tokens | loading: measured | computed | steps: measured | computed | phase "
        "| ratio of the peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ratios = []
    for case, found in results.items():
        size, dtype, peft, algorithm = case
        rows, length, new = shape_of(case)
        shape = f"{rows} x ({length - new} + {new})" if new else f"{rows} x {length}"
        start = f"| {size} | {dtype} | {'all' if peft == 'none' else peft} | {algorithm} | {shape} | "
        if "plan" not in found:
            lines.append(start + f"{found.get('left_out') or found['failed']} | | | | | |")
            continue
        plan = dict(found["plan"])
        loading = plan.pop("loading")
        phase = max(plan, key=plan.get)
        ratio = max(loading, plan[phase]) / max(found["loading"], found["steps"])
        ratios.append(ratio)
        lines.append(start + f"{found['loading']:.2f} | {loading:.2f} | {found['steps']:.2f} | {plan[phase]:.2f} "
                     f"| {phase} | {ratio:.2f}{'' if abs(ratio - 1) <= BOUND else ' (outside)'} |")  # fmt: skip
    inside = sum(abs(ratio - 1) <= BOUND for ratio in ratios)
    low, high = (min(ratios), max(ratios)) if ratios else (0, 0)
    lines += ["", f"**{inside} of {len(ratios)} within {BOUND:.0%}; the ratios go from {low:.2f} to {high:.2f}.**"]
    print("\n".join([*lines, "", *plan_table()]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder with Gemma's tokenizer.json")
    parser.add_argument("--only", default="", help="run the cases whose name holds this, such as 1b or qlora-ppo")
    parser.add_argument("--limit_gb", default=9, type=float)
    parser.add_argument("--results", default="memory.jsonl", help="where results are kept from one call to the next")
    args = parser.parse_args()
    kept = Path(args.results)
    known = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    results = {tuple(line.pop("case")): line for line in known}
    bases = in_child(write_bases, args.tokenizer)
    if "failed" in bases:
        raise SystemExit(bases["failed"])
    for case in GRID:
        name = "-".join(case)
        if case in results or args.only not in name:
            continue
        need = NEED[case[0]][case[2]]
        if need > args.limit_gb or need + SPARE > free_gb():
            most = f"a run was allowed {args.limit_gb:g}" if need > args.limit_gb else f"{free_gb():.0f} GB were free"
            results[case] = {"left_out": f"left out: {need} GB by the formula, {most}"}
            continue
        results[case] = in_child(run_one, case, bases[case[0]])
        with kept.open("a") as file:
            file.write(json.dumps({"case": case} | results[case]) + "\n")
        print(name, json.dumps(results[case]), flush=True)
    report({case: results[case] for case in GRID if case in results})


if __name__ == "__main__":
    main()
