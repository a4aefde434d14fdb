"""serve.py under load against transformers' `generate`, one request at a time: same weights, prompts and lengths.

    python benchmarks/bench_serve.py --checkpoint outputs/sft_lora_270m/final
    python benchmarks/bench_serve.py --checkpoint outputs/sft_lora_270m/final --beside ../older     another checkout

8 clients send requests of at most 64 tokens to a server in a process of its own; a ninth streams and measures its first
token, a tenth polls /health. Between these rounds the same requests go through `generate` of a plain transformers
model, into which peft has merged the adapter, one after the other. Both sides end where the model ends, sample from the
whole distribution, and count the tokens that they made. Then each request is sent again alone: which texts are the
same? benchmarks/serve.md holds what it prints. --beside measures this server and that of another checkout in turns
instead.
"""

import argparse
import http.client
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.bench_rollout import QUESTIONS  # noqa: E402
from common import chat  # noqa: E402
from common.runtime import base  # noqa: E402


def post(port, path, body):
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    line.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return line.getresponse()


def request(index, tokens, **more):
    """The index-th request: one of the questions with a seed of its own."""
    messages = [{"role": "user", "content": QUESTIONS[index % len(QUESTIONS)]}]
    return {"messages": messages, "seed": index, "max_tokens": tokens, "temperature": 1.0, "top_p": 1.0, **more}


def ask(port, index, tokens):
    """(text, tokens) of a request."""
    found = json.loads(post(port, "/v1/chat/completions", request(index, tokens)).read())
    return found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]


def first_token(port, index, tokens):
    """Seconds until the first piece of a streamed answer; the rest is read as well."""
    began, seconds = time.perf_counter(), None
    for line in post(port, "/v1/chat/completions", request(index, tokens, stream=True)):
        if seconds is None and b'"content"' in line:
            seconds = time.perf_counter() - began
    return seconds


def health(port):
    began = time.perf_counter()
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line.request("GET", "/health")
    assert line.getresponse().status == 200
    return time.perf_counter() - began


def repeat(function, done, pause):
    """What function(0), function(1), ... return until `done` is set."""
    found = []
    while not done.is_set():
        found.append(function(len(found)))
        done.wait(pause)
    return found


def under_load(port, args):
    """{"speed", "texts", "first", "health"} of all requests by args.clients clients at once."""
    done = threading.Event()
    with ThreadPoolExecutor(args.clients) as clients, ThreadPoolExecutor(2) as watchers:
        first = watchers.submit(repeat, lambda i: first_token(port, 1000 + i, args.tokens), done, 0.5)
        polled = watchers.submit(repeat, lambda i: health(port), done, 0.02)
        began = time.perf_counter()
        try:
            answers = list(clients.map(lambda i: ask(port, i, args.tokens), range(args.requests)))
            seconds = time.perf_counter() - began
        finally:  # the watchers end where a request fails, too
            done.set()
        return {"speed": sum(n for _, n in answers) / seconds, "texts": [text for text, _ in answers],
                "first": first.result(), "health": polled.result()}  # fmt: skip


def one_at_a_time(net, tokenizer, args):
    """Tokens per second of `generate`, request after request."""
    made, began = 0, time.perf_counter()
    for index in range(args.alone):
        ids = chat.encode_prompt(tokenizer, request(index, 1)["messages"])
        torch.manual_seed(index)
        ids_tensor = torch.tensor([ids], device=net.device)
        out = net.generate(ids_tensor, attention_mask=torch.ones_like(ids_tensor), do_sample=True,
                           temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.tokens, pad_token_id=chat.PAD,
                           eos_token_id=sorted(chat.STOP_TOKENS))  # fmt: skip
        made += out.shape[1] - len(ids)
    return made / (time.perf_counter() - began)


def plain(checkpoint, dtype, device):
    """The checkpoint as transformers and peft load it, the adapter merged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, adapter = base.locate(checkpoint)
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return (PeftModel.from_pretrained(net, adapter).merge_and_unload() if adapter else net).eval().to(device)


def start(args, dtype, root=ROOT):
    """(process, port) of a server that is ready."""
    words = [sys.executable, "serve.py", "--checkpoint", args.checkpoint, "--port", "0", "--model.dtype", dtype]
    words += ["--device", args.device]
    server = subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    port = None
    for line in server.stdout:
        port = port or int(re.search(r"listening on \S+:(\d+)", line)[1])
        if line.startswith("ready"):
            return server, port
    raise SystemExit("the server did not start")


def measure(args, dtype):
    """Lines of the table for one dtype."""
    net = plain(args.checkpoint, getattr(torch, dtype), args.device)
    tokenizer = base.load_tokenizer(base.locate(args.checkpoint)[0])
    server, port = start(args, dtype)
    loaded, slow = [], []
    try:
        ask(port, 0, 4)  # the first products cost more
        one_at_a_time(net, tokenizer, argparse.Namespace(alone=1, tokens=4))
        for _ in range(args.rounds):
            slow.append(one_at_a_time(net, tokenizer, args))
            loaded.append(under_load(port, args))
            print(dtype, f"generate {slow[-1]:.1f}, served {loaded[-1]['speed']:.1f} tokens/s", flush=True)
        alone = [ask(port, index, args.tokens)[0] for index in range(args.requests)]
        quiet = [first_token(port, 2000 + i, 2) for i in range(8)]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    speeds, first, polled = [each["speed"] for each in loaded], *(
        [s for each in loaded for s in each[name]] for name in ("first", "health"))  # fmt: skip
    same = [text == right for each in loaded for text, right in zip(each["texts"], alone)]
    ratio = statistics.median(a / b for a, b in zip(speeds, slow))
    show = lambda values: f"{statistics.median(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"  # noqa: E731
    p99 = statistics.quantiles(polled, n=100)[98] * 1000
    return [f"| {dtype} | {show(slow)} | {show(speeds)} | **{ratio:.2f}** | {statistics.median(quiet):.2f} | "
            f"{statistics.median(first):.2f} ({max(first):.2f}) | {p99:.0f} of {len(polled)} polls | "
            f"{sum(same)} of {len(same)} |"]  # fmt: skip


def beside(args, dtype):
    """This server and that of another checkout, in turns, each started anew -> lines of a table."""
    rounds = {"before": [], "now": []}
    for number in range(args.rounds):
        sides = [("before", args.beside), ("now", ROOT)]
        for side, root in sides[:: -1 if number % 2 else 1]:
            server, port = start(args, dtype, root)
            try:
                ask(port, 0, 8)
                busy = under_load(port, args)
                alone = statistics.median(first_token(port, 2000 + i, 2) for i in range(6))
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait()
            p99 = statistics.quantiles(busy["health"], n=100)[98] * 1000
            rounds[side].append((busy["speed"], alone, statistics.median(busy["first"]), p99))
    lines = [f"{dtype}, medians, rounds in brackets:", "", "| | before | now | ratio |", "|---|---|---|---|"]
    names = ("tokens/s", "first token alone, s", "first token under load, s", "p99 of /health, ms")
    for name, before, now in zip(names, zip(*rounds["before"]), zip(*rounds["now"]), strict=True):
        cells = [f"{statistics.median(side):.3g} ({', '.join(f'{x:.3g}' for x in side)})" for side in (before, now)]
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.median(now) / statistics.median(before):.2f} |")
    return [*lines, ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a fine-tuned 270M: adapter, folder or .gguf")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=32, help="in a round of all clients")
    parser.add_argument("--alone", type=int, default=6, help="in a round of generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--beside", metavar="CHECKOUT", help="measure its server too, in turns with this one")
    args = parser.parse_args()
    if Path(args.checkpoint).exists():
        args.checkpoint = str(Path(args.checkpoint).resolve())  # servers start in folders of their own
    if args.beside:
        print("\n".join(line for dtype in args.dtypes for line in beside(args, dtype)))
        return
    rows = [line for dtype in args.dtypes for line in measure(args, dtype)]
    text = "\n".join([
        "# The server under load against generate, one request at a time",
        "",
        f"`python benchmarks/bench_serve.py --checkpoint outputs/sft_lora_270m/final --clients {args.clients} "
        f"--tokens {args.tokens} --requests {args.requests} --alone {args.alone} --rounds "
        f"{args.rounds}`",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}; a LoRA fine-tune of Gemma "
        f"3 270M, {args.clients} clients at once with {args.requests} requests of at most {args.tokens} tokens, one "
        "that streams, one that polls /health; medians, rounds in brackets.",
        "",
        "| dtype | generate, tokens/s | served, tokens/s | ratio | first token alone, s | under load, s (longest) | "
        "p99 of /health, ms | texts as alone |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ])  # fmt: skip
    print(text)


if __name__ == "__main__":
    main()
