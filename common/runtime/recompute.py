"""training.recompute: keep only each layer's input for the backward, and compute the layer again there.

    kept of a token: layers * d numbers, in place of all activations     (Chen et al. 2016, "sublinear memory cost")

The layers run twice, so a step takes up to a third longer. No number changes: the same products are made again. The
switch is transformers' own, `net.model.gradient_checkpointing`; gemma.hidden_states reads it.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from common.log import say
from common.runtime import explain
from common.runtime.types import Gemma

SHARE = 0.9  # of the free memory that a step may take before the layers are computed again
CGROUP = Path("/sys/fs/cgroup")  # of a container


def choose(
    run: Any,
    net: Gemma,
    trainable: list[Parameter],
    lengths: list[int],
    tokens_per_step: float,
    logits: bool = True,
) -> bool:
    """Switch recomputation on or off for a run, say so where it is on, and return it.

    run: the common.run.Run. auto switches it on where the update's memory plan exceeds what is free once
    the weights are loaded. lengths: tokens of the rows; logits: as for explain.memory_plan. Ranks may choose
    differently, since no number depends on it.
    """
    cfg, longest = run.cfg, max(lengths)
    choice = cfg.training.recompute
    net.model.gradient_checkpointing = False
    tokens = min(cfg.training.micro_batch_tokens, round(tokens_per_step))
    tokens = max(tokens, longest)  # a longer row goes through the model alone
    batch = tokens, longest, tokens_per_step > tokens
    with run.autocast:
        plan = explain.memory_plan(net, trainable, batch, logits=logits)
    needed, free = sum(size for _, size in plan["update"]), free_bytes(net.lm_head.weight.device)
    on = choice == "always" or (choice == "auto" and free is not None and needed > SHARE * free)
    net.model.gradient_checkpointing = on
    if on:
        reason = "by training.recompute"
        if choice == "auto":
            reason = f"a step would take {needed / 1e9:.1f} GB beside the weights, and {free / 1e9:.1f} GB are free"
        say(f"layers are computed again in the backward, which saves memory and costs time: {reason}")
    return on


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process can still take: the GPU's, or the machine's and its container's. None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [
        size
        for size in (available_of_machine(Path("/proc/meminfo")), available_of_container(CGROUP))
        if size is not None
    ]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # that share this machine's memory
    return min(known) // ranks if known else None


def available_of_machine(file: Path) -> int | None:
    """MemAvailable: what is free, and what the system would free of its caches."""
    lines = _read(file).splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def available_of_container(folder: Path) -> int | None:
    """What a container's limit leaves (cgroup v2), the cache of its files not counted."""
    limit, used = _read(folder / "memory.max").strip(), _read(folder / "memory.current").strip()
    if not limit.isdigit() or not used.isdigit():
        return None  # no container, or no limit
    stat: dict[str, Any] = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    return max(0, int(limit) - int(used) + int(stat.get("inactive_file", 0)))


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
