"""Decoding against llama.cpp: the same weights in the same dtype, greedy, in turns, each in its own process.

    NODE_LLAMA_CPP=node_modules/node-llama-cpp python benchmarks/bench_decode.py --base gemma-3-270m.gguf

llama.cpp is the build that node-llama-cpp brings (npm install node-llama-cpp); the base is written as a .gguf of
--dtype for it. Every row continues one prompt by --tokens tokens after its first, and never stops early. What counts
is the time after the first token of the last row: no loading, no packing, no prompt. benchmarks/decode.md holds what
it prints.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from bench_sft import matrix_rate  # noqa: E402

from common import chat, model, rollouts  # noqa: E402
from common.decoder import Decoder  # noqa: E402
from common.evaluation import gguf_file  # noqa: E402
from common.runtime import base as bases  # noqa: E402

QUESTION = "Write a short story about a lighthouse keeper who finds a message in a bottle."
GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16"}


@torch.no_grad()
def ours(net, prompt, rows, tokens):
    """(seconds of `tokens` greedy tokens of each row after its first, ids of the first row)"""
    decoder = Decoder(net, rows, len(prompt) + tokens + 1)
    hidden = decoder.prefill([prompt], [rows])
    drawn, _ = rollouts.draw(decoder.logits(hidden), torch.zeros(rows), greedy=True)
    answer, started = [int(drawn[0])], time.perf_counter()
    for _ in range(tokens):
        hidden = decoder.step(drawn)
        drawn, _ = rollouts.draw(decoder.logits(hidden), torch.zeros(rows), greedy=True)
        answer.append(int(drawn[0]))
    return time.perf_counter() - started, answer


def measure_ours(folder, asked, dtype):
    net, _ = model.load(folder, torch.device("cpu"), dtype)
    ours(net, asked["prompt"], asked["rows"], 4)  # warms up
    rounds = [ours(net, asked["prompt"], asked["rows"], asked["tokens"]) for _ in range(asked["rounds"])]
    return {"seconds": [seconds for seconds, _ in rounds], "answer": rounds[-1][1]}


def last_line(command, threads):
    """What a process prints as JSON in its last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the real 270M: folder or .gguf")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=tuple(GGUF_TYPES), default="bfloat16")
    parser.add_argument("--asked", help=argparse.SUPPRESS)  # of a process of our side
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.asked:
        print(json.dumps(measure_ours(args.base, json.loads(args.asked), dtype)))
        return
    node, package = shutil.which("node"), os.environ.get("NODE_LLAMA_CPP")
    if not node or not package:
        raise SystemExit("bench_decode.py needs node, and NODE_LLAMA_CPP that names the folder of node-llama-cpp")
    folder, lines = bases.resolve(args.base), []
    net, tokenizer = model.load(str(folder), torch.device("cpu"), torch.float32)
    prompt = chat.encode_prompt(tokenizer, [{"role": "user", "content": QUESTION}])
    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "base.gguf")
        gguf_file.write(file, net, tokenizer, model.plain_state(net), GGUF_TYPES[args.dtype])
        del net
        for rows in args.rows:
            asked = {"prompt": prompt, "rows": rows, "tokens": args.tokens, "rounds": 1, "threads": args.threads}
            words = json.dumps(asked)
            again = [sys.executable, __file__, "--base", str(folder), "--dtype", args.dtype, "--asked", words]
            sides = {"llama.cpp": [node, str(ROOT / "benchmarks" / "decode.mjs"), str(file), words], "ours": again}
            rates, answers = {name: [] for name in sides}, {}
            for number in range(args.rounds):
                for name in list(sides)[:: 1 if number % 2 else -1]:  # both orders
                    found = last_line(sides[name], args.threads)
                    rates[name].append(rows * args.tokens / found["seconds"][0])
                    answers[name] = found["answer"]
                    print(rows, name, f"{rates[name][-1]:.1f} tokens/s", flush=True)
            equal = sum(a == b for a, b in zip(answers["ours"], answers["llama.cpp"], strict=True))
            median = {name: statistics.median(each) for name, each in rates.items()}
            cells = [f"{median[name]:.1f} ({', '.join(f'{rate:.1f}' for rate in rates[name])})" for name in sides]
            ratio = median["ours"] / median["llama.cpp"]
            lines.append(f"| {rows} | {' | '.join(cells)} | {ratio:.2f} | {equal} of {args.tokens + 1} |")
    os.environ["BENCH_DTYPE"] = args.dtype
    torch.set_num_threads(args.threads)
    sizes = " ".join(map(str, args.rows))
    text = "\n".join(
        [
            "# Decoding against llama.cpp",
            "",
            f"`python benchmarks/bench_decode.py --base gemma-3-270m.gguf --rows {sizes} --tokens {args.tokens} "
            f"--rounds {args.rounds} --threads {args.threads} --dtype {args.dtype}`",
            "",
            f"{platform.machine()}, {os.cpu_count()} cores, threads: {args.threads}; {args.dtype} matrix products at "
            f"{matrix_rate():.0f} GFLOP/s; Gemma 3 270M in {args.dtype} on both sides; tokens/s, medians, rounds in "
            "brackets. Equal: the greedy ids of the first row.",
            "",
            "| rows | llama.cpp | ours | ours / llama.cpp | equal |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
    )
    print(text)


if __name__ == "__main__":
    main()
