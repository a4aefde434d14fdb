"""GRPO against TRL's GRPOTrainer, and PPO beside it: the same model, adapter, prompts, sizes and reward.

    python benchmarks/bench_grpo.py --base gemma-3-270m.gguf --data data/safety --trl-python other-venv/bin/python

A step: 4 HH prompts x 4 samples x 64 tokens at temperature 1, heuristic reward, KL to the reference (0.04), one update,
LoRA r 8 (q/k/v/o, fp32 on a frozen base of --dtype), AdamW. No sample stops early, so that both sides do the same work.
PPO makes the same step with a critic, one epoch and one minibatch. Ours is train_rl.py as anyone runs it; TRL runs with
its best settings found here: no gradient checkpointing, one batch. The first step of each run warms up and is left out.
The sides take turns, `--rounds` times, and the report quotes medians. benchmarks/grpo.md holds what it prints.
"""

import json
import os
import platform
import statistics
import sys
from pathlib import Path

from bench_sft import ROOT, SEED, TARGETS, drive, matrix_rate, trl_clock

PROMPTS, GROUP, TOKENS, RATE, BETA = 4, 4, 64, 1e-5, 0.04
WEIGHTS = {"toxicity": 1.0, "length": 0.2, "repetition": 0.5, "refusal": 0.5}
HELD_OUT = 2  # prompts of the evaluation that train_rl.py makes at step 0; not timed


def ours(base, work, steps, algorithm="grpo"):
    """train_rl.py on the prepared prompts; its own metrics.jsonl is the measurement."""
    sys.path.insert(0, str(ROOT))
    run = f"{algorithm}-{os.getpid()}"
    import train_rl
    from common import rollouts

    rollouts.sample.__wrapped__.__kwdefaults__["stop"] = ()  # no sample stops early
    train_rl.main([
        "--rl.algorithm", algorithm, "--training.mode", "rl", "--model.base_checkpoint", base,
        "--model.adapter", f"{work}/adapter", "--model.dtype", os.environ["BENCH_DTYPE"], "--reward.type", "heuristic",
        "--dataset_path", f"{work}/data", "--seed", str(SEED), "--rl.missing_stop_penalty", "0",
        "--device", os.environ["BENCH_DEVICE"],
        "--rl.rollout_size", str(PROMPTS), "--rl.group_size", str(GROUP), "--rl.max_new_tokens", str(TOKENS),
        "--rl.num_ppo_epochs", "1", "--rl.minibatches", "1", "--rl.kl_coef", str(BETA), "--rl.critic_warmup", "0",
        "--rl.max_steps", str(steps + 1), "--rl.learning_rate", str(RATE), "--training.schedule", "constant",
        "--training.warmup_ratio", "0", "--evaluation.max_items", str(HELD_OUT), "--evaluation.max_new_tokens", "8",
        "--evaluation.draws", "100", "--training.eval_interval", "1000000", "--training.save_interval", "1000000",
        "--logging.output_dir", work, "--logging.run_name", run,
    ])  # fmt: skip
    records = [json.loads(line) for line in Path(work, run, "metrics.jsonl").read_text().splitlines()]
    keys = ("seconds", "seconds_rollout", "seconds_reward", "seconds_update", "reward", "length", "entropy")
    return [{key: record[key] for key in keys} for record in records[1:-1]]


def ppo(base, work, steps):
    return ours(base, work, steps, "ppo")


def trl(base, work, steps):
    """GRPOTrainer on the same prompts and reward."""
    sys.path.insert(0, str(ROOT))
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from common import rewards

    rows = [json.loads(line) for line in Path(work, "data", "train.jsonl").read_text().splitlines()]
    frame = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"  # the tokenizer puts <bos> in front
    asked = {frame.format(row["prompt"][0]["content"].strip()): row["prompt"] for row in rows}
    dataset = Dataset.from_list([{"prompt": text} for text in asked])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, os.environ["BENCH_DTYPE"]))
    model = PeftModel.from_pretrained(model, f"{work}/adapter", is_trainable=True)
    clock, times = trl_clock()

    def reward(prompts, completions, **_):
        pairs = zip(prompts, completions)
        return [rewards.heuristic_reward("safety", asked[p], text, None, **WEIGHTS)[0] for p, text in pairs]

    config = GRPOConfig(
        f"{work}/trl", max_steps=steps + 1, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
        gradient_accumulation_steps=1, max_completion_length=TOKENS, beta=BETA, temperature=1.0, top_p=1.0, top_k=0,
        generation_kwargs={"min_new_tokens": TOKENS}, learning_rate=RATE, lr_scheduler_type="constant",
        warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch", gradient_checkpointing=False,
        bf16=False, seed=SEED,
        use_cpu=os.environ["BENCH_DEVICE"] == "cpu",
        shuffle_dataset=False, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = GRPOTrainer(model, reward, config, dataset, processing_class=tokenizer, callbacks=[clock])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    found = [{"seconds": seconds, "reward": entry["reward"], "length": entry["completions/mean_length"],
              "entropy": entry.get("entropy")} for entry, seconds in zip(logs, times)]  # fmt: skip
    return found[1:]


def prepare(base, data_folder, work, steps):
    """Single-turn prompts of at most 100 tokens, and one initial adapter; returns the prompts' token counts."""
    sys.path.insert(0, str(ROOT))
    import torch

    from common import chat, data, lora, model

    (work / "data").mkdir()
    net, tokenizer = model.load(base, torch.device("cpu"), torch.bfloat16)
    torch.manual_seed(SEED)
    lora.inject(net, "policy", 8, 16, TARGETS)
    (work / "adapter").mkdir()
    model.save_adapter(net, tokenizer, work / "adapter", "policy", base)
    records = [record for record in data.load_split(data_folder, "train") if len(record["prompt"]) == 1]
    lengths = {record["id"]: len(chat.encode_prompt(tokenizer, record["prompt"])) for record in records}
    usable = [record for record in records if lengths[record["id"]] <= 100][: PROMPTS * (steps + 1) + HELD_OUT]
    for split, part in (("val", usable[:HELD_OUT]), ("train", usable[HELD_OUT:])):
        (work / "data" / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    return [lengths[record["id"]] for record in usable[HELD_OUT:]]


def step_flops(prompt_tokens, algorithm):
    """Products of one step of ours on the 270M: sampling, reference, policy with gradient, and for PPO three more.

    A token costs 0.2 GFLOP in the layers and 0.336 in the head; the gradient costs the same again in each, and the
    gradient of q/k/v/o adapters little. A prompt is computed once for its group and has no head.
    """
    layers, head, answers = 0.2e9, 0.336e9, PROMPTS * GROUP * TOKENS
    forward = layers * (answers + prompt_tokens) + head * answers
    body = layers * (answers + prompt_tokens)
    passes = {"ours": 4 * forward, "ppo": 5 * forward + 3 * body}  # sampling, reference, policy; old, values, critic
    return passes[algorithm]


def report(rows, results, args):
    rate, prompt_tokens = matrix_rate(), sum(rows) / len(rows) * PROMPTS
    lines = [
        "# GRPO against TRL 1.16, and PPO beside it",
        "",
        f"`python benchmarks/bench_grpo.py --base gemma-3-270m.gguf --data data/safety --trl-python PYTHON "
        f"--steps {args.steps} --rounds {args.rounds} --dtype {args.dtype}`",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, {args.dtype} matrix products at {rate:.0f} GFLOP/s; Gemma 3 "
        f"270M, LoRA r 8 on q/k/v/o; a step is {PROMPTS} HH prompts ({prompt_tokens:.0f} tokens together, on average) "
        f"x {GROUP} samples x {TOKENS} tokens, all of them generated; {args.steps} steps behind one that warms up.",
        "",
        "| | seconds a step (median) | all steps | peak memory GB | mean reward | tokens a sample |",
        "|---|---|---|---|---|---|",
    ]
    medians = {}
    for side, runs in results.items():
        steps = [step for run in runs for step in run["steps"]]
        seconds = [step["seconds"] for step in steps]
        medians[side] = (statistics.median(seconds), statistics.median(run["peak_gb"] for run in runs))
        reward, length = (statistics.mean(step[key] for step in steps) for key in ("reward", "length"))
        spread = ", ".join(f"{s:.1f}" for s in seconds)
        lines.append(
            f"| {side} | {medians[side][0]:.1f} | {spread} | {medians[side][1]:.2f} | {reward:.3f} | {length:.0f} |"
        )
    fast, small = medians["trl"][0] / medians["ours"][0], medians["ours"][1] / medians["trl"][1]
    slower, larger = (medians["ppo"][i] / medians["ours"][i] for i in range(2))
    lines += ["", f"**GRPO: {fast:.2f} times TRL's steps/s, {small:.0%} of its peak memory. PPO: {slower:.2f} times "
              f"the seconds of our GRPO, {larger:.2f} times its memory.**", ""]  # fmt: skip
    lines += ["| median seconds | rollout | reward | update | the rest: reference, old log-probs, values, logs | "
              "arithmetic floor of the step |", "|---|---|---|---|---|---|"]  # fmt: skip
    for side in ("ours", "ppo"):
        steps = [step for run in results[side] for step in run["steps"]]
        parts = [statistics.median(s[f"seconds_{name}"] for s in steps) for name in ("rollout", "reward", "update")]
        floor = step_flops(prompt_tokens, side) / 1e9 / rate
        rest = medians[side][0] - sum(parts)
        cells = " | ".join(f"{part:.1f}" for part in (*parts, rest))
        lines.append(f"| {side} | {cells} | {floor:.1f} ({floor / medians[side][0]:.0%}) |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    drive(__file__, __doc__, {"ours": ours, "ppo": ppo, "trl": trl}, prepare, report)
