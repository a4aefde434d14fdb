"""Rollouts against transformers' `generate`: the same base, prompts and number of tokens, taking turns in one process.

    python benchmarks/bench_rollout.py --base gemma-3-270m.gguf

Both sides sample from the whole distribution at temperature 1 and never stop early. Ours carries a LoRA adapter
(r 8, all seven linears) merged and unmerged, rebuilds its weights in every call and returns log-probs;
`generate` runs the bare base, as if merged, and returns none. Beside the speed: how far the log-probs of the sampler
lie from the trainer's own forward with a young adapter (B of --noise). benchmarks/rollout.md holds what it prints.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from common import chat, lora, model, rollouts  # noqa: E402
from common.runtime import base as bases  # noqa: E402

QUESTIONS = [
    "How do I store passwords safely in a small web application?",
    "Summarise: the patient is a 54 year old woman with a dry cough for three weeks and no fever.",
    "Write Python that sorts a list of dictionaries by the value of the key 'age', the largest first.",
    "My neighbour plays loud music every night. What can I say to him?",
]


def generate(net, prompts, rows, tokens):
    """transformers' sampling of the same rows, with every filter off."""
    width, group = max(map(len, prompts)), rows // len(prompts)
    ids = torch.tensor([[chat.PAD] * (width - len(prompt)) + prompt for prompt in prompts]).repeat_interleave(group, 0)
    out = net.generate(
        ids, attention_mask=(ids != chat.PAD).long(), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None, pad_token_id=chat.PAD,
    )  # fmt: skip
    assert out.shape == (rows, width + tokens), out.shape


def floor(net, rows):
    """Seconds of one token's matrix products alone, each the faster way round."""
    linears = [m for name, m in net.named_modules() if name.rsplit(".", 1)[-1] in {"lm_head", *lora.TARGETS}]
    seconds = []
    for turned in (False, True):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            for linear in linears:
                weight = linear.base.weight if isinstance(linear, lora.LoraLinear) else linear.weight
                x = torch.zeros(rows, weight.shape[1], dtype=weight.dtype)
                weight @ x.T if turned else x @ weight.T
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times))
    return min(seconds)


def differences(net, prompts, rows, noises):
    """Lines of the second table: |sampler - trainer| a token and the share of the adapter that survives merging."""
    uniforms = rollouts.uniforms(0, 0, range(rows), 32)
    for noise in noises:
        torch.manual_seed(1)
        for name, parameter in lora.adapter_parameters(net, "policy").items():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * noise)
        cells = []
        for merge in (True, False):
            out = rollouts.sample(net, prompts, rows // len(prompts), 32, uniforms=uniforms, merge=merge)
            trainer = model.sequence_logprobs(net, out["tokens"], out["mask"])
            gap = (out["sampled_logprobs"] - trainer)[out["mask"].bool()].abs()
            cells += [f"{gap.mean():.4f} ({gap.max():.2f})"]
        yield f"| {noise:g} | {rollouts.merge_survival(net, 'policy'):.0%} | {' | '.join(cells)} |"


def table(results, floors, args):
    sizes = " ".join(map(str, args.rows))
    lines = [
        "# Rollouts against transformers' generate",
        "",
        f"`python benchmarks/bench_rollout.py --base gemma-3-270m.gguf --rows {sizes} --tokens {args.tokens} "
        f"--rounds {args.rounds} --threads {args.threads} --dtype {args.dtype}`",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, threads: {args.threads}; Gemma 3 270M in {args.dtype}, rows of "
        f"up to {len(QUESTIONS)} prompts, {args.tokens} new tokens each, temperature 1, whole distribution; tokens/s, "
        "medians, rounds in brackets.",
        "",
        "| rows | generate | ours, unmerged | ours, merged | plain products alone | ours (the better) / generate |",
        "|---|---|---|---|---|---|",
    ]
    for rows in args.rows:
        speeds = {name: [rows * args.tokens / s for s in times] for name, times in results[rows].items()}
        median = {name: statistics.median(each) for name, each in speeds.items()}
        cells = [f"{median[name]:.0f} ({', '.join(f'{s:.0f}' for s in each)})" for name, each in speeds.items()]
        best = max(median["ours, unmerged"], median["ours, merged"]) / median["generate"]
        lines.append(f"| {rows} | {' | '.join(cells)} | {rows / floors[rows]:.0f} | {best:.2f} |")
    return [*lines, ""]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the real 270M: folder or .gguf")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--noise", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = str(bases.resolve(args.base))
    dtype = getattr(torch, args.dtype)
    plain, tokenizer = model.load(folder, torch.device("cpu"), dtype)
    net, _ = model.load(folder, torch.device("cpu"), dtype)
    torch.manual_seed(0)
    lora.inject(net, "policy", 8, 16)
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [chat.encode(tokenizer, turn, add_generation_prompt=True)[0] for turn in turns]
    results, floors = {}, {}
    for rows in args.rows:
        few, group = prompts[:rows], max(1, rows // len(prompts))
        sides = {
            "generate": lambda tokens, few=few, rows=rows: generate(plain, few, rows, tokens),
            "ours, unmerged": lambda tokens, few=few, group=group: rollouts.sample(
                net, few, group, tokens, stop=(), merge=False),
            "ours, merged": lambda tokens, few=few, group=group: rollouts.sample(
                net, few, group, tokens, stop=(), merge=True),
        }  # fmt: skip
        results[rows], floors[rows] = {name: [] for name in sides}, floor(plain, rows)
        for side in sides.values():  # the first products of each shape cost more
            side(2)
        for _ in range(args.rounds):
            for name, side in sides.items():
                start = time.perf_counter()
                side(args.tokens)
                results[rows][name].append(time.perf_counter() - start)
                print(rows, name, f"{rows * args.tokens / results[rows][name][-1]:.0f} tokens/s", flush=True)
    lines = table(results, floors, args)
    lines += [
        f"Sampler against the trainer's own forward in {args.dtype}, 16 rows of 32 tokens: mean (largest) difference "
        "of a log-prob, by the standard deviation of B, and the share of the adapter that merging leaves "
        "(`merge_survival`).",
        "",
        "| B | survives merging | merged | unmerged |",
        "|---|---|---|---|",
        *differences(net, prompts, 16, args.noise),
    ]
    text = "\n".join(lines) + "\n"
    print(text)


if __name__ == "__main__":
    main()
