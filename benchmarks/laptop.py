"""Seconds of training until a held-out target, on one laptop: SFT, DPO and GRPO, a row of docs/leaderboard.md.

    python benchmarks/laptop.py                                                      the embedded base: minutes
    python benchmarks/laptop.py --base gemma-3-270m-q4_k_m.gguf --data data/hh2000   the real 270M: half an hour

Each event is a trainer as anyone runs it, in a process of its own, from one base to one target. What counts is
the `seconds` of its records: the updates, with sampling and rewards, without evaluations and checkpoints. A run ends at
the first evaluation that reaches the target. On the 270M GRPO starts from a short SFT on sums, which does not count.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

# {event: (script, config, metric, target, flags)}; the loss falls, reward and share of right answers rise
TINY = {
    "sft": ("train_sft", "sft_lora_270m", "eval/loss", 0.145, "--training.max_steps 200 --training.eval_interval 5"),
    "dpo": ("train_rl", "dpo_270m", "eval/loss", 0.60, "--rl.max_steps 200 --training.eval_interval 5"),
    "grpo": (
        "train_rl",
        "grpo_rl_270m",
        "eval/reward",
        0.60,
        "--rl.max_steps 60 --training.eval_interval 2 --reward.type heuristic",
    ),
}
REAL = {
    "sft": ("train_sft", "sft_lora_270m", "eval/loss", 2.40, "--training.max_steps 225 --training.eval_interval 15"),
    "dpo": (
        "train_rl",
        "dpo_270m",
        "eval/loss",
        0.68,
        "--rl.max_steps 128 --training.eval_interval 8 --training.batch_size 8",
    ),
    "grpo": ("train_rl", "grpo_arithmetic_270m", "eval/exact", 0.75, "--training.eval_interval 5"),
}


def reached(metric, target, value):
    return value is not None and (value <= target if metric == "eval/loss" else value >= target)


def run_event(event, args):
    """One event -> {"seconds", "steps", "peak_gb", "curve": [[seconds, value], ...]}; no seconds: not reached."""
    if not args.base:
        sys.argv.append("--debug")  # common/__init__.py asks it how threads wait
    import train_rl
    import train_sft
    from common import log
    from common.run import Run

    script, config, metric, target, flags = (REAL if args.base else TINY)[event]
    if args.base:
        start = ["--model.base_checkpoint", args.base]
        start += [] if event == "grpo" else ["--dataset_path", args.data]
    else:
        start = ["--debug"]
    start += ["--device", "cpu", "--logging.output_dir", args.work]
    start += ["--model.dtype", args.dtype] if args.dtype else []
    if event == "grpo" and args.base:
        before = ["--config", f"{ROOT}/configs/sft_arithmetic_270m.yml", "--logging.run_name", "before"]
        train_sft.main([*before, *start])
        start += ["--model.adapter", f"{args.work}/before/final"]
        log.reset_peak_memory()
    finished = Run.finished

    def finished_or_reached(run, step):
        return finished(run, step) or reached(metric, target, (run.state.evaluation or {}).get(metric))

    with mock.patch.object(Run, "finished", finished_or_reached):
        main = {"train_sft": train_sft, "train_rl": train_rl}[script].main
        argv = ["--config", f"{ROOT}/configs/{config}.yml", *start, *flags.split(), *args.more]
        main([*argv, "--logging.run_name", event])
    result, seconds = {"seconds": None, "peak_gb": 0.0, "curve": []}, 0.0
    for record in log.read_records(Path(args.work, event, "metrics.jsonl")):
        if metric in record:
            result["curve"].append([round(seconds, 1), record[metric]])
            if result["seconds"] is None and reached(metric, target, record[metric]):
                result |= {"seconds": seconds, "steps": record["step"]}
        seconds += record.get("seconds", 0.0)
        result["peak_gb"] = max(result["peak_gb"], record.get("peak_memory_gb") or 0.0)
    return result


def cpu_name():
    """What the system calls this processor."""
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return asked.stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def rates():
    """{dtype: GFLOP/s of this machine's matrix products}"""
    import bench_sft

    found = {}
    for dtype in ("float32", "bfloat16"):
        os.environ["BENCH_DTYPE"] = dtype
        found[dtype] = bench_sft.matrix_rate()
    return found


def row(results, args):
    """The Markdown row; an event that did not reach its target says so."""
    import torch

    from common import log

    speed = rates()
    cells = [args.name, f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    cells += [f"{speed['float32']:.0f}, {speed['bfloat16']:.0f}", "270M" if args.base else "tiny"]
    for event in ("sft", "dpo", "grpo"):
        if event not in results:
            cells.append("")
            continue
        result = results[event]
        at = f"{result['seconds']:.1f} ({result['steps']} steps)" if result["seconds"] is not None else "not reached"
        cells.append(f"{at}, {result['peak_gb']:.1f} GB")
    return f"| {' | '.join([*cells, log.provenance()['commit'] or ''])} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the real 270M: folder or .gguf; without it, the embedded base")
    parser.add_argument("--data", help="with --base: folder of HH-RLHF, made as docs/leaderboard.md says")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of the frozen weights [what the trainer takes]"
    )
    parser.add_argument("--events", nargs="+", default=["sft", "dpo", "grpo"], choices=("sft", "dpo", "grpo"))
    parser.add_argument("--name", default="", help="who ran it, for the row")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="flags for the trainers: what you changed")
    parser.add_argument("--event", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.event:
        Path(args.work, f"{args.event}.json").write_text(json.dumps(run_event(args.event, args)))
        return
    if bool(args.base) != bool(args.data):
        parser.error("--base and --data go together")
    results = {}
    with tempfile.TemporaryDirectory() as work:
        for event in args.events:
            words = [sys.executable, __file__, "--event", event, "--work", work, *sys.argv[1:]]
            subprocess.run(words, check=True)
            results[event] = json.loads(Path(work, f"{event}.json").read_text())
            points = ", ".join(f"{seconds:.0f} s {value:.3f}" for seconds, value in results[event]["curve"])
            print(f"{event}: {points}", flush=True)
    print(row(results, args))


if __name__ == "__main__":
    main()
