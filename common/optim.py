"""AdamW as every trainer uses it: parameter groups, learning rate, one update over all ranks, its state on disk."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace as Config

import torch
from safetensors.torch import load_file, save_file
from torch.nn import Parameter

from common import dist
from common.log import UserError, listed

FILE = "optimizer.safetensors"


def adamw_groups(named: dict[str, Parameter], peak_lr: float, weight_decay: float) -> list[dict]:
    """Parameter groups of {name: parameter}: weight decay on matrices, none on vectors (norms).

    peak_lr: the learning rate after warm-up, for set_learning_rate. Groups of several roles are added as lists.
    """
    matrices = [p for p in named.values() if p.ndim > 1]
    vectors = [p for p in named.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "peak_lr": peak_lr},
        {"params": vectors, "weight_decay": 0.0, "peak_lr": peak_lr},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(step: float, steps: int, peak: float, warmup_ratio: float, shape: str) -> float:
    """Linear warm-up over warmup_ratio * steps, then `shape`: cosine or linear decay to zero, or constant.

    Counts steps of the loop; all updates of one rollout are one. step may lie between two whole ones, see Run.position.
    """
    warmup = round(warmup_ratio * steps)
    if step < warmup:
        return min(peak, peak * (step + 1) / warmup)
    left = 1 - (step - warmup) / max(1, steps - warmup)
    return peak * {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}[shape]


def expected_steps(step: int, steps: int, spent: float, budget: float | None, per_step: float) -> int:
    """The step at which a run of at most `steps` will have spent its budget of tokens or of FLOPs (None: no budget).

    spent: by the first `step` steps; per_step: what a step is expected to take before any was made. A function of what
    a checkpoint holds, so resume is exact.
    """
    if budget is None:
        return steps
    return min(steps, math.ceil(budget / (spent / step if spent else per_step)))


def set_learning_rate(optimizer: torch.optim.Optimizer, step: float, steps: int, training: Config) -> float:
    """Set the learning rate of each group for this step of `steps`; returns that of the first group.

    In SFT and RL step and steps are Run.position and Run.planned_end, which also follow a budget of tokens or FLOPs.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, group["peak_lr"], training.warmup_ratio, training.schedule)
    return optimizer.param_groups[0]["lr"]


def clip_gradients(parameters: list[Parameter], max_norm: float) -> float:
    """Sum the gradients over ranks and scale them down to max_norm; returns their norm before as a float."""
    dist.sum_gradients(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()


@dataclass
class Update:
    """What one update measures: on this rank (add), then over all ranks (optimizer_step)."""

    forward_tokens: float  # through the policy, prompts included; of all ranks after sum_over_ranks
    loss: float = 0.0
    norms: dict = field(default_factory=dict)  # {"grad_norm": before clipping, ...}: filled by optimizer_step
    sums: Counter = field(default_factory=Counter)  # of the metrics that are means ...
    counts: Counter = field(default_factory=Counter)  # ... over so many tokens or pairs
    ids: list = field(default_factory=list)  # names of the rows, for error messages
    suspects: list = field(default_factory=list)  # names of the rows of micro-batches without a finite loss
    taken: bool = False  # has the optimizer made its step

    def add(self, ids: list[str], loss: torch.Tensor, **metrics: torch.Tensor) -> None:
        """Add one backward pass over the rows `ids`.

        The loss is already divided by the whole minibatch's divisor, so it is summed. A metric is a tensor of values;
        it is logged as the mean over the values of the whole minibatch.
        """
        self.loss += loss.item()
        self.ids += ids
        self.suspects += [] if loss.isfinite() else ids
        for name, values in metrics.items():
            self.sums[name] += values.double().sum().item()  # type: ignore[assignment]  # Counter holds floats too
            self.counts[name] += values.numel()

    def sum_over_ranks(self) -> None:
        """Loss, tokens and metrics in one exchange; a rank without rows has no metric of its own."""
        counts = {f"count/{name}": count for name, count in self.counts.items()}
        total = dist.sum_named({"loss": self.loss, "tokens": self.forward_tokens, **self.sums, **counts})
        self.loss, self.forward_tokens = total["loss"], total["tokens"]
        self.sums = Counter({name: total[name] for name in total if f"count/{name}" in total})
        self.counts = Counter({name: total[f"count/{name}"] for name in self.sums})


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, list],
    update: Update,
    step: int,
    max_grad_norm: float,
    target_kl: float | None = None,
) -> bool:
    """Sum loss, metrics and gradients over ranks, clip each role by its own norm, and step. Returns: was it made?

    parameters: {role: its tensors}. No step is made where the mean of `policy_kl` is above target_kl: the policy has
    then moved far enough from the one that sampled. UserError on all ranks where the loss or a norm is not finite; then
    nothing was updated.
    """
    update.sum_over_ranks()
    for role, tensors in parameters.items():
        norm = clip_gradients(tensors, max_grad_norm)
        update.norms["grad_norm" if role == "policy" else f"{role}_grad_norm"] = norm
        if not math.isfinite(update.loss) or not math.isfinite(norm):
            ids = dist.gather_rows(update.suspects) or dist.gather_rows(update.ids)
            raise UserError(
                f"step {step}: loss {update.loss} or gradient norm {norm} is not finite; not updated; of "
                f"{listed(sorted(set(ids)))}"
            )
    if target_kl is not None and update.sums["policy_kl"] > target_kl * update.counts["policy_kl"]:
        return False
    optimizer.step()
    update.taken = True
    return True


def mean_metrics(updates: list[Update]) -> dict[str, float]:
    """{name: mean over a step's updates}. What is a mean over tokens or pairs is one over those of all updates."""
    sums, counts = Counter(), Counter()
    for update in updates:
        for name, value in {"loss": update.loss, **update.norms}.items():
            sums[name] += value
            counts[name] += 1
        sums.update(update.sums)
        counts.update(update.counts)
    return {name: value / counts[name] for name, value in sums.items() if counts[name]}


def save(optimizer: torch.optim.Optimizer, named: dict[str, Parameter], folder: Path | str) -> None:
    """Write the moments of each parameter of {name: parameter} into a step folder."""
    tensors = {
        f"{name}.{moment}": value.detach().cpu().contiguous()
        for name, parameter in named.items()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, Path(folder) / FILE)


def load(optimizer: torch.optim.Optimizer, named: dict[str, Parameter], folder: Path | str) -> None:
    """Put back, bit for bit, what `save` wrote; ValueError if a tensor belongs to no parameter."""
    for key, value in load_file(Path(folder) / FILE).items():
        name, _, moment = key.rpartition(".")
        if name not in named:
            raise ValueError(f"optimizer state of an unknown parameter: {key}")
        where = "cpu" if moment == "step" else named[name].device  # AdamW counts its steps on the CPU
        optimizer.state[named[name]][moment] = value.to(where)
