"""torchrun: form the group, sum over ranks, add up gradients. Everything is the identity in a single process."""

import datetime
import json
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """True on the one process that prints and writes; before `init`, by torchrun's RANK."""
    return rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"


def init(device, timeout):
    """Join torchrun's process group (gloo on CPU, NCCL on CUDA); a hung rank ends the run after `timeout` seconds.

    After a restart by `--max-restarts` the agent's store still holds the dead workers' addresses, so every attempt
    writes under a prefix of its own. Does nothing without torchrun, or when the group exists.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=timeout)
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=os.environ["RANK"] == "0" and not agent_store,
        timeout=limit,
    )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=limit,
    )


def end():
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def sum_all(*values):
    """Floats (or one-element tensors) summed over ranks -> list of floats; exact in fp64 for counts below 2^53."""
    if world_size() == 1:
        return [float(v) for v in values]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def sum_tensor(values):
    """A fp64 tensor on the CPU, summed over ranks: each rank fills in its own rows and leaves zeros elsewhere."""
    if world_size() == 1:
        return values
    total = values.to("cuda" if dist.get_backend() == "nccl" else "cpu", torch.float64, copy=True)
    dist.all_reduce(total)
    return total.cpu()


def gather_rows(rows):
    """Lists of what JSON can hold, one of each rank -> all of them on every rank, in the order of ranks."""
    if world_size() == 1:
        return rows
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    text = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8).to(device)
    sizes = [int(size) for size in sum_all(*(len(text) * (r == rank()) for r in range(world_size())))]
    parts = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(parts, F.pad(text, (0, max(sizes) - len(text))))
    return [row for part, size in zip(parts, sizes) for row in json.loads(bytes(part[:size].cpu().numpy()))]


def sum_named(sums):
    """{name: float} summed over ranks, whose names may differ."""
    total = {}
    for row in gather_rows([dict(sums)]):
        total = {name: total.get(name, 0.0) + row.get(name, 0.0) for name in total | row}
    return total


def any_rank(flag):
    """True everywhere as soon as it is true on one rank: stop decisions and failed checks are taken together."""
    return sum_all(float(bool(flag)))[0] > 0


def sum_gradients(parameters):
    """Add up .grad over ranks in one all-reduce of a fixed list: an absent gradient counts as zeros, so a rank
    without rows neither hangs the others nor changes the sum."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world_size() == 1:
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad.copy_(grad.view_as(parameter))
