"""torchrun: form the group, sum over ranks, add up gradients. Everything is the identity in a single process.

A rank that fails says so in the group's store, and every other ends with its words, whatever it was doing. A rank that
waits for longer than training.timeout names those that it waits for, and ends the run in the same way.
"""

import contextlib
import datetime
import json
import os
import threading
import time
import uuid
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn import Parameter

POLL = 0.5  # seconds between two looks at what the other ranks say
GRACE = 2.0  # seconds for a rank to end by itself, with words of its own, after another has failed

_group = SimpleNamespace(store=None, timeout=0, since=None, ended=None, listener=None)


class RankError(Exception):
    """The group is broken: another rank hangs, has ended or has failed. One line says which and why."""

    def __init__(self, words: str, status: int | str = 1):
        super().__init__(words)
        self.status = int(status)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on the one process that prints and writes; before `init`, by torchrun's RANK."""
    return rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"


def init(device: torch.device, timeout: float) -> None:
    """Join torchrun's process group (gloo on CPU, NCCL on CUDA); a hung rank ends the run after `timeout` seconds.

    Does nothing without torchrun, or when the group exists.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    where, limit = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), datetime.timedelta(seconds=timeout)
    try:
        store: Any = dist.TCPStore(*where, size, is_master=number == 0 and not agent_store, timeout=limit)
        store = dist.PrefixStore(_agree(dist.PrefixStore("attempt", store), number, size, timeout), store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=limit)
        barrier()  # NCCL connects at the first use
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise RankError(f"not all of {size} ranks joined within training.timeout, {timeout} s: {first}") from error
    _group.store, _group.timeout, _group.ended = store, timeout, threading.Event()
    _group.listener = threading.Thread(target=_listen, args=(store.clone(), agent_store), daemon=True)
    _group.listener.start()


def _agree(store, number, size, timeout):
    """A name that the ranks of this attempt have in common with no earlier one.

    After a restart by `--max-restarts` the agent's store still holds the dead workers' addresses, so every attempt
    writes under a prefix of its own. The count of restarts cannot be it: each machine's agent counts its own. Rank 0
    draws a name; it holds once it has answered with what every other rank has drawn, which a dead rank 0 cannot.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + timeout
    if number == 0:
        store.set("name", mine)
    while time.monotonic() < until:
        name = store.get("name").decode()
        if number:
            store.set(f"{name}/{number}", mine)
            if store.check([f"{name}/all"]) and mine in store.get(f"{name}/all").decode():
                return name
        elif store.check(keys := [f"{name}/{other}" for other in range(1, size)]):
            store.set(f"{name}/all", b" ".join(store.get(key) for key in keys))
            return name
        time.sleep(0.05)
    raise RuntimeError("a rank is missing")


def end() -> None:
    if _group.store is not None:
        _group.ended.set()
        _group.listener.join()  # in a call of the store it must not meet the end of the interpreter
        _group.store = None
    if dist.is_initialized():
        dist.destroy_process_group()


def fail(words: str, status: int) -> None:
    """Tell the other ranks why this one is about to end with `status`; they end too. The first words are kept."""
    if _group.store is not None:
        with contextlib.suppress(RuntimeError):  # the store may be gone
            if not _group.store.check(["failed"]):
                _group.store.set("failed", f"{status} {words}")


def _listen(store, agent_store):
    """End this process when another rank has failed, or its own main thread is stuck in a collective that the backend
    does not end. A thread of its own: the main one may hang, or compute for long."""
    words = None
    while words is None and not _group.ended.wait(POLL):
        since = _group.since
        try:
            if store.check(["failed"]):
                words = store.get("failed").decode()  # status and words
            elif since is not None and time.monotonic() - since > _group.timeout + POLL:
                words = _absent(store, True)
                store.set("failed", words)
        except RuntimeError:
            if agent_store:  # torchrun has died: go on without, the lock of the run folder holds off its successor
                return
            words = "1 rank 0 has ended"
    if words is not None and not _group.ended.wait(GRACE):
        status, _, words = words.partition(" ")
        os.write(2, f"error: {words}\n".encode())
        os._exit(int(status))


def _absent(store, late):
    """Why a collective broke, as a status and one line: what another rank has said, else who did not take part."""
    names = [f"waiting/{number}" for number in range(world_size())]
    try:
        store.set(names[rank()], "")
        time.sleep(2 * POLL)  # for the others, whose connections broke with this one's
        if store.check(["failed"]):
            return store.get("failed").decode()
        who = ", ".join(str(number) for number, name in enumerate(names) if not store.check([name]))
    except RuntimeError:  # the store went with rank 0
        who = ""
    who = f"rank {who}" if who else "another rank"
    if late:
        return f"1 {who} hangs or is busy: the others have waited for {_group.timeout} s (training.timeout)"
    return f"1 {who} has ended: see what it said"


@contextlib.contextmanager
def _together():
    """Around a collective: the backend's error becomes a RankError."""
    _group.since = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        if _group.store is None:
            raise
        late = "imed out" in str(error) or "timeout" in str(error)
        status, _, words = _absent(_group.store, late).partition(" ")
        raise RankError(words, status) from error
    finally:
        _group.since = None


def _device():
    """Where tensors must lie that the backend exchanges."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def barrier() -> None:
    if dist.is_initialized():
        with _together():
            dist.barrier()


def sum_all(*values: float | torch.Tensor) -> list[float]:
    """Floats (or one-element tensors) summed over ranks -> list of floats; exact in fp64 for counts below 2^53."""
    return sum_tensor(torch.tensor([float(v) for v in values], dtype=torch.float64)).tolist()


def sum_tensor(values: torch.Tensor) -> torch.Tensor:
    """A fp64 tensor on the CPU, summed over ranks: each rank fills in its own rows and leaves zeros elsewhere."""
    if world_size() == 1:
        return values
    total = values.to(_device(), torch.float64, copy=True)
    with _together():
        dist.all_reduce(total)
        return total.cpu()  # where NCCL waits


def gather_rows(rows: list) -> list:
    """Lists of what JSON can hold, one of each rank -> all of them on every rank, in the order of ranks."""
    if world_size() == 1:
        return rows
    text = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8).to(_device())
    sizes = [int(size) for size in sum_all(*(len(text) * (r == rank()) for r in range(world_size())))]
    parts = [text.new_empty(max(sizes)) for _ in sizes]
    with _together():
        dist.all_gather(parts, F.pad(text, (0, max(sizes) - len(text))))
    return [row for part, size in zip(parts, sizes) for row in json.loads(bytes(part[:size].cpu().numpy()))]


def sum_named(sums: Mapping[str, float]) -> dict[str, float]:
    """{name: float} summed over ranks, whose names may differ."""
    total = {}
    for row in gather_rows([dict(sums)]):
        total = {name: total.get(name, 0.0) + row.get(name, 0.0) for name in total | row}
    return total


def any_rank(flag: bool | torch.Tensor) -> bool:
    """True everywhere as soon as it is true on one rank: stop decisions and failed checks are taken together."""
    return sum_all(float(bool(flag)))[0] > 0


def sum_gradients(parameters: list[Parameter]) -> None:
    """Add up .grad over ranks in one all-reduce of a fixed list: an absent gradient counts as zeros, so a rank
    without rows neither hangs the others nor changes the sum."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world_size() == 1:
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    with _together():
        dist.all_reduce(flat)
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad.copy_(grad.view_as(parameter))
