"""Everything that has to be seen on a GPU once, by one command: no network, under 8 minutes on one data-centre GPU.

    python benchmarks/gpu.py --report gpu.md                              on the GPU
    python benchmarks/gpu.py --device cpu --small --report small.md       a rehearsal: every row's code at tiny shapes

Bases have the exact shapes of Gemma 3 270M and 1B and random weights; a small tokenizer is made here. Each row runs in
a process of its own with a time limit, so that one that fails or hangs costs no other. It needs torch, transformers,
peft, safetensors, tokenizers, numpy and PyYAML; a row that wants more says "not installed". The report is written
again after each row.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork

import bench_dpo  # noqa: E402
import bench_grpo  # noqa: E402
import bench_serve  # noqa: E402
import bench_sft  # noqa: E402
import step_1b  # noqa: E402
import torch  # noqa: E402

import train_reward  # noqa: E402
import train_rl  # noqa: E402
import train_sft  # noqa: E402
from benchmarks.graph import GraphDecoder  # noqa: E402
from common import log, lora, model, pairs, prompts, rollouts  # noqa: E402
from common.decoder import Decoder  # noqa: E402
from common.runtime import checkpoint, explain, resume, tiny  # noqa: E402

DECODERS = {"plain": Decoder, "captured": GraphDecoder}
SHAPES = {
    "270m": step_1b.SHAPE | {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "1b": step_1b.SHAPE,
    "micro": step_1b.SHAPE
    | {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "head_dim": 32}
    | {"query_pre_attn_scalar": 32, "sliding_window": 16, "max_position_embeddings": 512},
}
ALGORITHMS = ("sft", "grpo", "ppo", "dpo", "reward")  # in the order of their worth
KILLED = ("sft", "grpo", "ppo")
# of a step: rows, pairs or prompts; tokens of a row; new ones among them; completions of a prompt; of a micro-batch
SIZES = {
    "sft": (16, 1024, 0, 1, 8192),
    "reward": (8, 512, 0, 1, 8192),
    "dpo": (8, 512, 0, 1, 8192),
    "grpo": (16, 192, 128, 8, 8192),
    "ppo": (16, 192, 128, 8, 8192),
}
SMALL = {name: (2, 48, 8 if name in ("grpo", "ppo") else 0, 2, 128) for name in ALGORITHMS}
# largest difference from the CPU's fp32 of a loss in its first three steps, and of log-probs (mean of a token's)
LOSS_BOUND = {"float32": 1e-4, "bfloat16": 0.1}
LOGPROB_BOUND = {"float32": 1e-4, "bfloat16": 0.05}
GRADIENT_BOUND = {"float32": 1e-3, "bfloat16": 0.1}  # of its norm
SAMPLER_BOUND = {"float32": 1e-4, "bfloat16": 0.05}
WORDS = "soup house garden river music paper window letter bridge summer winter yellow green blue small quiet".split()
NO_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")


@dataclasses.dataclass
class Setting:
    device: str
    small: bool
    work: Path  # folder of bases, data, runs and logs

    @property
    def shapes(self):
        """Whose speed is measured."""
        return ("micro",) if self.small else ("270m", "1b")

    @property
    def on_gpu(self):
        return self.device == "cuda"

    def base(self, shape):
        return str(self.work / f"base-{shape}")


# ---------------------------------------------------------------- bases and data


def make_bases(setting):
    """The bases of all shapes, with one small tokenizer; the data of every algorithm."""
    dialogues = tiny.pretraining_corpus(400)
    tokenizer = tiny.make_tokenizer([turn["content"] for turns in dialogues for turn in turns])
    tokenizer.save_pretrained(setting.work / "tokenizer")
    for shape in dict.fromkeys(("micro", *setting.shapes)):
        started, folder = time.perf_counter(), Path(setting.base(shape))
        folder.mkdir()
        step_1b.write_random(folder, setting.work / "tokenizer", SHAPES[shape], setting.device)
        yield f"- {shape}: written in {time.perf_counter() - started:.1f} s"
    (setting.work / "reward.py").write_text(
        "import zlib\n\n\ndef varied(prompt, completion, reference):\n"
        "    return zlib.crc32(completion.encode()) % 1000 / 1000\n"
    )


def write_data(folder, sizes, steps):
    """Rows that fill their tokens: answers are cut there, and prompts of online RL leave room for new ones."""
    rows, length, *_ = sizes
    folder.mkdir()
    for split, numbers in (("train", range(rows * steps)), ("val", range(1000, 1002))):
        records = []
        for i in numbers:
            question = " ".join(WORDS[(i + n) % len(WORDS)] for n in range(max(2, length // 24)))
            answers = [" ".join(WORDS[(i * k + n) % len(WORDS)] for n in range(length)) for k in (3, 5)]
            turns = [{"role": "user", "content": f"{i} {question}"}]
            records.append({"id": f"{split}-{i}", "prompt": turns, "response": answers[0], "rejected": answers[1]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def run_trainer(setting, name, algorithm, shape, device, dtype, peft="lora", steps=3, sizes=None, more=()):
    """The records of a trainer's run; its folder is work/name."""
    sizes = sizes or (SMALL if setting.small else SIZES)[algorithm]
    rows, length, new, group, budget = sizes
    dataset = setting.work / f"data-{name}"
    if not dataset.is_dir():
        write_data(dataset, sizes, steps)
    settings = {
        "model.base_checkpoint": setting.base(shape),
        "model.dtype": dtype,
        "model.peft_type": peft,
        "training.mode": algorithm if algorithm in ("sft", "reward") else "rl",
        "dataset_path": dataset,
        "device": device,
        "training.max_steps": steps,
        "training.max_seq_length": length,
        "training.micro_batch_tokens": budget,
        "training.batch_size": rows,
        "training.eval_interval": 1000,
        "training.save_interval": 1000,
        "logging.output_dir": setting.work,
        "logging.run_name": name,
    }
    main = {"sft": train_sft.main, "reward": train_reward.main}.get(algorithm, train_rl.main)
    if main is train_rl.main:
        settings |= {"rl.algorithm": algorithm, "evaluation.max_items": 2, "evaluation.best_metric": "reward"}
        settings |= {"reward.function": f"{setting.work / 'reward.py'}:varied"}
    if new:
        settings |= {"rl.rollout_size": rows, "rl.group_size": group, "rl.max_new_tokens": new, "rl.critic_warmup": 0}
        settings |= {"rl.minibatches": 2, "evaluation.max_new_tokens": new}
    if algorithm == "dpo":
        del settings["evaluation.best_metric"]
    main([*(word for key, value in settings.items() for word in (f"--{key}", str(value))), *more])
    return log.read_records(setting.work / name / "metrics.jsonl")


class PlanIsKnown(Exception):
    """Ends a run of --explain as soon as its plan is there."""


def planned_gb(*args):
    """The peak of the same run by the formula of docs/scaling.md, without Python's own memory on a GPU."""
    kept = {}

    def keep(plan):
        kept.update(plan)
        raise PlanIsKnown

    with mock.patch.object(explain, "say_plan", keep):
        try:
            run_trainer(*args, more=["--explain"])
        except PlanIsKnown:
            pass
    return explain.peak(kept)[0] / 1e9


# ---------------------------------------------------------------- the rows: setting -> lines of Markdown, one by one


def machine(setting):
    """What the machine can do; the rates are kept for the other rows."""
    yield from [f"- {name} {number}" for name, number in log.versions().items()]
    if setting.on_gpu and shutil.which("nvidia-smi"):
        asked = "name,driver_version,memory.total,clocks.max.sm,mig.mode.current"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        yield "- " + subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    rates, size = {}, 256 if setting.small else 8192
    for dtype in ("bfloat16", "float32"):
        a = torch.randn(size, size, dtype=getattr(torch, dtype), device=setting.device)
        seconds = best_of(setting, 5, torch.matmul, a, a)
        rates[dtype] = 2 * size**3 / seconds
        yield f"- {dtype} matrix products, {size} x {size}: {rates[dtype] / 1e12:.1f} TFLOP/s"
    x = torch.zeros(2**20 if setting.small else 2**30, dtype=torch.uint8, device=setting.device)
    y = torch.empty_like(x)
    rates["bytes"] = 2 * len(x) / best_of(setting, 5, y.copy_, x)
    yield f"- memory: {rates['bytes'] / 1e9:.0f} GB/s, read and written by a copy"
    (setting.work / "rates.json").write_text(json.dumps(rates))


def best_of(setting, rounds, function, *args, **options):
    """Seconds of the quickest call of function(*args, **options)."""
    seconds = []
    for _ in range(rounds):
        synchronise(setting)
        started = time.perf_counter()
        function(*args, **options)
        synchronise(setting)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def synchronise(setting):
    if setting.on_gpu:
        torch.cuda.synchronize()


def cuda_tests(setting):
    """The tests that are marked `cuda`."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.cuda" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "-m", "cuda"]
    run = subprocess.run([*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (run.stdout + run.stderr).strip().splitlines()[-1:]
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return [f"- {lines[0]}"]


def trainers(setting):
    """Every trainer on a small base: the losses of three steps beside those of the CPU in fp32."""
    yield from ["| | dtype | trained | losses | CPU, fp32 | difference | bound |", "|---|---|---|---|---|---|---|"]
    cases = [(algorithm, "float32", "lora") for algorithm in ALGORITHMS]
    cases += [("sft", "bfloat16", "none"), ("grpo", "bfloat16", "lora")]
    if not setting.small:
        cases += [("sft", "bfloat16", "lora"), ("sft", "float32", "none"), ("dpo", "bfloat16", "lora")]
        cases += [("grpo", "float32", "none"), ("ppo", "float32", "none")]
    right = {}
    for algorithm, dtype, peft in cases:
        name, sizes = f"{algorithm}-{dtype}-{peft}", SMALL[algorithm]
        if (algorithm, peft) not in right:
            run = run_trainer(setting, f"cpu-{name}", algorithm, "micro", "cpu", "float32", peft, sizes=sizes)
            right[algorithm, peft] = [row["loss"] for row in run if "loss" in row]
        run = run_trainer(setting, f"here-{name}", algorithm, "micro", setting.device, dtype, peft, sizes=sizes)
        here = [row["loss"] for row in run if "loss" in row]
        difference = max(abs(a - b) for a, b in zip(here, right[algorithm, peft], strict=True))
        bound, shown = LOSS_BOUND[dtype], [", ".join(f"{x:.4f}" for x in row) for row in (here, right[algorithm, peft])]
        verdict = judged(difference, bound)
        if dtype == "bfloat16" and algorithm in ("grpo", "ppo"):
            verdict = "none: rounding draws other tokens"
        yield f"| {algorithm} | {dtype} | {peft} | {shown[0]} | {shown[1]} | {difference:.1e} | {verdict} |"


def random_adapter(net):
    """A LoRA adapter whose effect is not zero, from a seed of the CPU's generator."""
    lora.inject(net, "policy", 8, 16)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora.adapter_parameters(net, "policy").items():
            scale = 1e-2 if "lora_B" in name else net.config.hidden_size**-0.5
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)
    return net


def agreement(setting):
    """Log-probs and LoRA gradients of the real shapes beside the CPU's in fp32: 2 rows, one beyond the window."""
    yield from [
        "| shape | dtype | log-prob, mean (largest) difference | bound | gradient, relative | bound |",
        "|" + "---|" * 6,
    ]
    for shape in setting.shapes:
        lengths, right = ((40, 12) if setting.small else (640, 100)), None
        for device, dtype in (("cpu", "float32"), (setting.device, "float32"), (setting.device, "bfloat16")):
            net, _ = model.load(setting.base(shape), torch.device(device), getattr(torch, dtype))
            random_adapter(net)
            draw = torch.Generator().manual_seed(0)
            tokens = torch.randint(SHAPES[shape]["vocab_size"], (2, max(lengths)), generator=draw).to(device)
            mask = (torch.arange(1, max(lengths)) < torch.tensor(lengths)[:, None]).float().to(device)
            logprobs = model.sequence_logprobs(net, tokens, mask)
            ((logprobs * mask).sum() / mask.sum()).backward()
            gradient = torch.cat([p.grad.flatten().cpu() for p in lora.adapter_parameters(net, "policy").values()])
            logprobs = logprobs.detach()[mask.bool()].cpu()
            if right is None:
                right = logprobs, gradient
                continue
            gap, wrong = (logprobs - right[0]).abs(), (gradient - right[1]).norm() / right[1].norm()
            cells = [f"{gap.mean():.1e} ({gap.max():.1e})", judged(gap.mean(), LOGPROB_BOUND[dtype])]
            cells += [f"{wrong:.1e}", judged(wrong, GRADIENT_BOUND[dtype])]
            yield f"| {shape} | {dtype} | {' | '.join(cells)} |"
            del net


def judged(value, bound):
    return f"{bound:g}" if value <= bound else f"{bound:g}, **exceeded**"


STEPS_HEADER = [
    "| | s / step | trained tokens / s | TFLOP/s | of the matrix rate | peak GB | computed GB | loss, first and last |",
    "|" + "---|" * 8,
]


def steps(setting, shape, algorithm, peft="lora"):
    """Seconds and memory of a trainer's step in bf16; the first two of six steps warm up."""
    name, count = f"speed-{shape}-{algorithm}-{peft}", 3 if setting.small else 6
    how = setting, name, algorithm, shape, setting.device, "bfloat16", peft, count
    planned = planned_gb(*how) - (explain.LIBRARIES / 1e9 if setting.on_gpu else 0)
    log.reset_peak_memory()
    records = [row for row in run_trainer(*how) if "loss" in row]
    measured = records[count // 3 :]
    seconds = statistics.median(row["seconds"] for row in measured)
    tokens = statistics.median(row["tokens_per_second"] for row in measured)
    flops = (records[-1]["flops_seen"] - records[0]["flops_seen"]) / (count - 1) / seconds
    rate = json.loads((setting.work / "rates.json").read_text())["bfloat16"]
    cells = [f"{seconds:.3f}", f"{tokens:.0f}", f"{flops / 1e12:.1f}", f"{flops / rate:.1%}"]
    cells += [f"{records[-1]['peak_memory_gb']:.2f}", f"{planned:.2f}"]
    if "seconds_rollout" in records[0]:
        cells[0] += f" ({statistics.median(row['seconds_rollout'] for row in measured):.3f} sampling)"
    return [
        f"| {shape} {algorithm} {peft} | {' | '.join(cells)} | {records[0]['loss']:.3f}, {records[-1]['loss']:.3f} |"
    ]


def killed_and_resumed(setting):
    """kill -9 at step 2 of 4, then the same command again: are the weights those of an undisturbed run?"""
    yield from ["| | undisturbed | killed and resumed | |", "|---|---|---|---|"]
    for algorithm in KILLED:
        dtype, more = "bfloat16", ["--training.save_interval", "1"]
        hashes = []
        for name in ("whole", "killed"):
            how = setting, f"{name}-{algorithm}", algorithm, "micro", setting.device, dtype, "lora", 4, SMALL[algorithm]
            if name == "killed":
                status, _ = in_child(setting, f"kill-{algorithm}", run_killed, (*how, more), 100)
                assert status == f"ended by signal {signal.SIGKILL.value}", status
                assert not (setting.work / f"{name}-{algorithm}" / "final").exists()
            status, _ = in_child(setting, f"{name}-run-{algorithm}", run_quietly, (*how, more), 100)
            assert status == "done", status
            hashes.append(checkpoint.sha256(setting.work / how[1] / "final" / "adapter_model.safetensors")[:16])
        same = "equal" if hashes[0] == hashes[1] else "**different**"
        yield f"| {algorithm} | {hashes[0]} | {hashes[1]} | {same} |"


def run_quietly(*args):
    run_trainer(*args)
    return []


def run_killed(*args):
    seed_step = resume.seed_step

    def killed(seed, step, rank):
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        seed_step(seed, step, rank)

    with mock.patch.object(resume, "seed_step", killed):
        return run_quietly(*args)


def sampler(setting):
    """The sampler's log-probs beside the trainer's own forward, with an adapter; plain steps and captured ones."""
    yield from ["| shape | dtype | steps | mean (largest) difference | bound | rows with the plain steps' tokens |"]
    yield "|" + "---|" * 6
    rows, new = (4, 8) if setting.small else (16, 64)
    for shape in setting.shapes:
        for dtype in ("float32", "bfloat16"):
            net, _ = model.load(setting.base(shape), torch.device(setting.device), getattr(torch, dtype))
            random_adapter(net)
            plain = None
            for kind, decoder in DECODERS.items():
                uniforms = rollouts.uniforms(0, 0, range(rows), new)
                ids = [[2, *range(200, 200 + n)] for n in (5, 20)]
                out = rollouts.sample(net, ids, rows // 2, new, uniforms=uniforms, stop=(), decoder_class=decoder)
                with torch.no_grad():
                    right = model.sequence_logprobs(net, out["tokens"], out["mask"])
                gap = (out["sampled_logprobs"] - right)[out["mask"].bool()].abs()
                plain = plain or out["completions"]
                same = sum(a == b for a, b in zip(plain, out["completions"], strict=True))
                bound = judged(gap.mean(), SAMPLER_BOUND[dtype])
                cells = [f"{gap.mean():.1e} ({gap.max():.1e})", bound, f"{same}/{rows}"]
                yield f"| {shape} | {dtype} | {kind} | {' | '.join(cells)} |"
            del net


def decoding(setting):
    """Tokens/s of rollouts.sample in bf16, prompts of 20 tokens, no stop; the floor reads all weights once a token.

    A step's time is that of the later steps alone: the prompt, and the graph's recording, are in both of two calls.
    """
    yield from [
        "| shape | rows | plain, tokens/s | captured | captured / plain | captured, ms a step | floor, ms |",
        "|" + "---|" * 7,
    ]
    few, new, sizes = (4, 8, (1, 4)) if setting.small else (16, 80, (1, 16, 64, 256))
    rate = json.loads((setting.work / "rates.json").read_text())["bytes"]
    for shape in setting.shapes:
        net, _ = model.load(setting.base(shape), torch.device(setting.device), torch.bfloat16)
        random_adapter(net)
        floor = 1000 * model.memory_bytes(net) / rate
        for rows in sizes:
            speeds = []
            for decoder in DECODERS.values():
                seconds = []
                for tokens in (few, new):
                    uniforms = rollouts.uniforms(0, 0, range(rows), tokens)
                    how = {"uniforms": uniforms, "stop": (), "decoder_class": decoder}
                    prompt = [[2, *range(200, 219)]]
                    seconds.append(best_of(setting, 3, rollouts.sample, net, prompt, rows, tokens, **how))
                speeds.append(rows * (new - few) / (seconds[1] - seconds[0] or -1.0))
            cells = [f"{speeds[0]:.0f}", f"{speeds[1]:.0f}", f"{speeds[1] / speeds[0]:.2f}"]
            cells += [f"{1000 * rows / speeds[1]:.2f}", f"{floor:.2f}"]
            if min(speeds) < 0:  # the longer call was the quicker one
                cells = ["not measurable"] * len(cells)
            yield f"| {shape} | {rows} | {' | '.join(cells)} |"
        del net


def synchronisations(setting):
    """Which lines made the host wait for the GPU: 16 sampled tokens of 4 rows, then one step of SFT's loss."""
    net, _ = model.load(setting.base(setting.shapes[0]), torch.device(setting.device), torch.bfloat16)
    random_adapter(net)
    for kind, decoder in DECODERS.items():
        how = {"uniforms": rollouts.uniforms(0, 0, range(4), 16), "stop": (), "decoder_class": decoder}
        yield f"- sampling, {kind}: " + waits(setting, rollouts.sample, net, [[2, 200]], 4, 16, **how)
    yield "- log-probs and backward: " + waits(setting, loss_and_backward, setting, net)


def waits(setting, function, *args, **options):
    """How often function(*args, **options) made the host wait, by torch's own warnings: in all, and by line."""
    if setting.on_gpu:
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args, **options)
    if setting.on_gpu:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w.message)]
    return f"{len(places)}; " + ", ".join(f"{place} {count}" for place, count in Counter(places).most_common())


def loss_and_backward(setting, net):
    tokens = torch.arange(200, 264, device=setting.device).view(2, 32)
    mask = torch.ones(2, 31, device=setting.device)
    (-model.sequence_logprobs(net, tokens, mask)).sum().backward()


def beside_trl(setting, algorithm):
    """The sides of benchmarks/bench_{sft,dpo,grpo}.py, both on this device."""
    os.environ |= {"BENCH_DTYPE": "bfloat16", "BENCH_DEVICE": setting.device}
    bench = {"sft": bench_sft, "dpo": bench_dpo, "grpo": bench_grpo}[algorithm]
    count, work, base = (2 if setting.small else 12), setting.work / f"trl-{algorithm}", setting.base(setting.shapes[0])
    work.mkdir()
    write_data(work / "source", (4, 48 if setting.small else 512, 0), count + 3)
    bench.prepare(base, work / "source", work, count)
    net, _ = model.load(base, torch.device(setting.device), torch.bfloat16)
    loss_and_backward(setting, net)  # the device's first work is slow, and no part of either side
    del net
    for name, side in (("ours", bench.ours), ("TRL", bench.trl)):
        torch.use_deterministic_algorithms(name == "ours" and setting.on_gpu)  # TRL runs as it comes
        measured = side(base, str(work), count)
        seconds = statistics.median(step["seconds"] for step in measured[count // 3 :])
        seconds += measured[0].get("reference_seconds", 0) / count  # DPO's pass before the first step
        key = "loss" if "loss" in measured[0] else "reward"
        yield f"| {algorithm} | {name} | {seconds:.3f} | {key} {statistics.mean(step[key] for step in measured):.4f} |"


def serving(setting):
    """serve.py under the load of benchmarks/bench_serve.py."""
    few = 4 if setting.small else 32
    args = argparse.Namespace(checkpoint=setting.base(setting.shapes[0]), device=setting.device, clients=few // 2)
    args.tokens, args.requests = (4, few) if setting.small else (64, few)
    server, port = bench_serve.start(args, "bfloat16")
    try:
        bench_serve.ask(port, 0, 4)
        found = bench_serve.under_load(port, args)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    first, polls = statistics.median(found["first"]), sorted(found["health"])
    return [
        f"- {args.clients} clients, {args.requests} requests of at most {args.tokens} tokens: {found['speed']:.0f} "
        f"tokens/s; first token after {first:.3f} s (median of {len(found['first'])})",
        f"- slowest /health: {polls[-1]:.3f} s",
    ]


# ---------------------------------------------------------------- one row after the other


@dataclasses.dataclass
class Row:
    title: str  # of its section
    name: str
    limit: float  # seconds
    function: object
    args: tuple = ()  # beside the setting
    needs: tuple = ()  # libraries
    result: str = "not reached"
    lines: list = dataclasses.field(default_factory=list)


def all_rows(setting):
    """In the order of their worth: the last ones may not be reached."""
    numbers = "Numbers beside the CPU's"
    rows = [
        Row("Bases", "bases", 90, make_bases),
        Row("Machine", "machine", 60, machine),
        Row(numbers, "trainers", 120, trainers),
        Row("Log-probs and gradients", "agreement", 90, agreement),
        Row("Killed and resumed", "resume", 100, killed_and_resumed),
        Row("Sampler against trainer", "sampler", 60, sampler),
        Row("Decoding", "decoding", 90, decoding),
        Row("Waiting for the GPU", "synchronisations", 40, synchronisations),
    ]
    cases = [(shape, algorithm, "lora") for shape in setting.shapes for algorithm in ALGORITHMS]
    cases += [(setting.shapes[0], "sft", "none"), *((shape, "sft", "qlora") for shape in setting.shapes)]
    for case in cases:
        needs = ("bitsandbytes",) if case[2] == "qlora" else ()
        rows.append(Row("Steps", "-".join(case), 60, steps, case, needs))
    rows.insert(len(ALGORITHMS) - len(cases), Row("Serving", "serving", 60, serving))  # after the first shape
    rows.append(Row("Tests that are marked cuda", "tests", 60, cuda_tests, needs=("pytest",)))
    for algorithm in ("sft", "dpo", "grpo"):
        rows.append(Row("Beside TRL", f"trl-{algorithm}", 90, beside_trl, (algorithm,), ("trl", "datasets")))
    return rows


def in_child(setting, name, function, args, limit, apart=False):
    """(what came of it, the lines of function(*args)) in a forked process; apart: it may start others.

    What it prints is in work/name.log. A child may use CUDA because this process never does.
    """
    log_file, result = setting.work / f"{name}.log", setting.work / f"{name}.lines"
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if apart:
                os.setpgid(0, 0)
            for number in (1, 2):
                os.dup2(os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            # a forked child makes its thread pool anew; loading from several threads at once, it fails at times
            torch.set_num_threads(torch.get_num_threads())
            resume.prepare(torch.device(setting.device))
            with result.open("w") as file:
                for line in function(*args):
                    file.write(json.dumps(line) + "\n")
                    file.flush()  # kept, whatever the next one brings
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    until, code = time.monotonic() + limit, None
    try:
        while code is None and time.monotonic() < until:
            ended, status = os.waitpid(pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if ended else None
            time.sleep(0.02)
    finally:
        if code is None:
            (os.killpg if apart else os.kill)(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    lines = log.read_records(result) if result.exists() else []
    if code is None:
        return f"not within {limit:.0f} s", lines
    return ("done" if code == 0 else "failed" if code > 0 else f"ended by signal {-code}"), lines


def without_missing_libraries():
    """The reports that end a run want scipy and draw with matplotlib: without them, the run ends without."""
    if not importlib.util.find_spec("scipy"):
        prompts.report = pairs.report = train_reward.report = train_reward.write_report = lambda *_, **__: None
    if not importlib.util.find_spec("matplotlib"):
        log.save_picture = lambda *_, **__: False


HEADERS = {
    steps: STEPS_HEADER,
    beside_trl: ["| | | median s / step | mean |", "|---|---|---|---|"],
}


def write_report(path, setting, rows, started):
    where = "a GPU" if setting.on_gpu else "the CPU"
    lines = ["# A run on a GPU" if setting.on_gpu else "# A rehearsal on a CPU: no figure here means anything", ""]
    options = ["", f" --device {setting.device}"][not setting.on_gpu] + " --small" * setting.small
    done = sum(row.result == "done" for row in rows)
    lines += [f"`python benchmarks/gpu.py{options}`", ""]
    lines += [f"{done} of {len(rows)} rows done on {where} in {time.monotonic() - started:.0f} s. Random weights.", ""]
    for title in dict.fromkeys(row.title for row in rows):
        mine = [row for row in rows if row.title == title]
        lines += [f"## {title}", "", mine[0].function.__doc__.strip().replace("\n    ", " "), ""]
        lines += HEADERS.get(mine[0].function, []) if any(row.lines for row in mine) else []
        lines += [line for row in mine for line in row.lines]
        lines += ["", *(f"- {row.name}: **{row.result}**" for row in mine if row.result != "done")]
        for row in mine:
            if row.result not in ("done", "not reached") and "installed" not in row.result:
                said = (setting.work / f"{row.name}.log").read_text(errors="replace").splitlines()
                refused = [line for line in said[:-12] if line.startswith("error: ")]
                lines += ["", "```", *refused, *said[-12:], "```"]
        lines.append("")
    logs = [file.read_text(errors="replace") for file in sorted(setting.work.glob("*.log"))]
    names = sorted({name for text in logs for name in NO_KERNEL.findall(text)})
    lines += ["## Operations without a deterministic kernel", "", ", ".join(names) or "torch warned of none.", ""]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).replace(str(setting.work), "WORK").replace(str(ROOT), "REPO")
    path.write_text(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that every row runs")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, help="rows that would begin later are not reached [450; --small: no limit]"
    )
    parser.add_argument("--only", default="", help="the first two rows, and those whose names hold this")
    parser.add_argument(
        "--work", type=Path, help="folder for bases and runs, which must not exist [REPORT's name .work]"
    )
    args = parser.parse_args(argv)
    setting = Setting(args.device, args.small, (args.work or args.report.with_suffix(".work")).resolve())
    setting.work.mkdir(parents=True)
    seconds = args.seconds or (1e9 if args.small else 450)
    without_missing_libraries()
    started, rows = time.monotonic(), all_rows(setting)
    rows = [row for number, row in enumerate(rows) if number < 2 or args.only in row.name]
    try:
        for row in rows:
            began, left = time.monotonic(), seconds - (time.monotonic() - started)
            missing = [name for name in row.needs if not importlib.util.find_spec(name)]
            if missing:
                row.result = f"not installed: {', '.join(missing)}"
            elif left > 5:
                limit = min(5 * row.limit if setting.small else row.limit, left)  # a rehearsal may be on a slow machine
                how = setting, row.name, row.function, (setting, *row.args), limit, True
                row.result, row.lines = in_child(*how)
            print(f"{row.name}: {row.result}, {time.monotonic() - began:.1f} s", flush=True)
            write_report(args.report, setting, rows, started)
    finally:
        for folder in setting.work.glob("base-*"):  # gigabytes
            shutil.rmtree(folder)
    return 1 if any(row.result == "failed" or "within" in row.result or "signal" in row.result for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
