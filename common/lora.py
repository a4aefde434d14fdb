"""LoRA on the seven linears of each layer: inject, name, switch, freeze a copy, read and write PEFT's files.

    y = x W^T + (alpha / r) (x A^T) B^T        Hu et al. 2021, eq. 3; A starts uniform (Kaiming), B starts at zero

Several named adapters share one frozen base (policy, reference, critic, reward). A and B are fp32 masters, products
run in the base's dtype, and the backward keeps only x. On disk an adapter is what `peft` writes and reads.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Keys of adapter_config.json that change no number: notes, and sizes of what another key switches on.
NEUTRAL = {
    *("peft_type", "task_type", "base_model_name_or_path", "auto_mapping", "inference_mode", "peft_version"),
    *("megatron_core", "qalora_group_size"),
}
STARTS = (None, True, False, "gaussian", "orthogonal")  # of init_lora_weights; others, as pissa, change the base itself


class LoraLinear(nn.Module):
    """A frozen linear and its named adapters; `active` is the one in use, None for the bare base."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.active: str | None = None
        self.lora_A, self.lora_B, self.scale, self.dropout = nn.ParameterDict(), nn.ParameterDict(), {}, {}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        if self.active not in self.lora_A:
            return _FrozenLinear.apply(x, self.base)
        a, b, scale = self.lora_A[self.active], self.lora_B[self.active], self.scale[self.active]
        dropout = self.dropout.get(self.active, 0.0) if self.training else 0.0
        if dropout:
            low = F.linear(F.dropout(x, dropout), a.to(x.dtype))
            return _FrozenLinear.apply(x, self.base) + F.linear(low, b.to(x.dtype)) * scale
        return _LoraProduct.apply(x, a, b, self.base, scale)


def frozen_weight(base: nn.Linear) -> Tensor:
    """The weight (out, in) of a base linear in its compute dtype; a 4-bit one is dequantised on the way."""
    if hasattr(base.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(base.weight.data, base.weight.quant_state)
    return base.weight


class _FrozenLinear(torch.autograd.Function):
    """x W^T with frozen W, which is dequantised again in the backward rather than kept."""

    @staticmethod
    def forward(ctx, x, base):
        ctx.base = base
        return F.linear(x, frozen_weight(base).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return (grad @ frozen_weight(ctx.base).to(grad.dtype)) if ctx.needs_input_grad[0] else None, None


class _LoraProduct(torch.autograd.Function):
    """The formula at the top with frozen W; products in x's dtype from fp32 A and B; keeps x, A and B."""

    @staticmethod
    def forward(ctx, x, a, b, base, scale):
        ctx.base, ctx.scale = base, scale
        ctx.save_for_backward(x, a, b)
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ frozen_weight(base).to(x.dtype).T
        y.addmm_(flat @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=scale)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, a, b = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        a_low, b_low = a.to(x.dtype), b.to(x.dtype)
        grad_low = (grad @ b_low).mul_(ctx.scale)  # (N, r)
        grad_a = (grad_low.T @ flat).to(a.dtype) if ctx.needs_input_grad[1] else None
        grad_b = (grad.T @ (flat @ a_low.T)).to(b.dtype).mul_(ctx.scale) if ctx.needs_input_grad[2] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ frozen_weight(ctx.base).to(x.dtype)).addmm_(grad_low, a_low).view(x.shape)
        return grad_x, grad_a, grad_b, None, None


def lora_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """{name in the plain model: LoraLinear}, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def inject(
    model: nn.Module, name: str, rank: int, alpha: float, targets: Sequence[str] = TARGETS, dropout: float = 0.0
) -> None:
    """Add the adapter `name` to every target linear, freeze everything else the first time, and make it active.

    B is zero, so the model's output does not change. A comes from torch's global generator. Raises ValueError for a
    target that is not one of the seven linears: LoRA on Gemma's tied embedding or head merges to a different model.
    """
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown or not targets:
        raise ValueError(f"LoRA targets are among {', '.join(TARGETS)}; not {', '.join(unknown) or 'an empty list'}")
    if not lora_modules(model):
        model.requires_grad_(False)
        wrap(model)
    for module_name, module in lora_modules(model).items():
        if module_name.rsplit(".", 1)[-1] in targets:
            device = module.base.weight.device
            a = torch.empty(rank, module.base.in_features, device="cpu")  # drawn there: the same on every device
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            module.lora_A[name] = nn.Parameter(a.to(device))
            module.lora_B[name] = nn.Parameter(torch.zeros(module.base.out_features, rank, device=device))
            module.scale[name] = alpha / rank
            module.dropout[name] = dropout
    use(model, name)


def wrap(model: nn.Module) -> None:
    """Put a LoraLinear around each of the seven linears of each layer (a 4-bit base needs its backward even bare)."""
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in TARGETS and not isinstance(module, LoraLinear):
            setattr(model.get_submodule(parent), child, LoraLinear(module).train(model.training))


def use(model: nn.Module, name: str | None) -> None:
    """Make adapter `name` the active one everywhere; None switches all adapters off."""
    for module in lora_modules(model).values():
        module.active = name


def active(model: nn.Module) -> str | None:
    """The adapter that is active in `model`, or in a part of it."""
    return next((module.active for module in lora_modules(model).values()), None)


@contextlib.contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[nn.Module]:
    """`with using(model, "reference"):` switches for one block; run forward and backward of an adapter inside one."""
    before = {module: module.active for module in lora_modules(model).values()}
    use(model, name)
    try:
        yield model
    finally:
        for module, active in before.items():
            module.active = active


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """{PEFT's name on disk: parameter} of one adapter, in a fixed order (optimizers and all-reduce rely on it)."""
    parameters = {}
    for module_name, module in lora_modules(model).items():
        if name in module.lora_A:
            parameters[f"base_model.model.{module_name}.lora_A.weight"] = module.lora_A[name]
            parameters[f"base_model.model.{module_name}.lora_B.weight"] = module.lora_B[name]
    return parameters


def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """A frozen copy of adapter `source` under the name `target`: the reference of a stage."""
    for module in lora_modules(model).values():
        if source in module.lora_A:
            module.lora_A[target] = nn.Parameter(module.lora_A[source].detach().clone(), requires_grad=False)
            module.lora_B[target] = nn.Parameter(module.lora_B[source].detach().clone(), requires_grad=False)
            module.scale[target] = module.scale[source]


@torch.no_grad()
def merged_weight(module: LoraLinear, name: str | None) -> Tensor:
    """W + (alpha / r) B A of one LoraLinear in fp32; the base stays as it is (W alone if it has no such adapter)."""
    weight = frozen_weight(module.base).float()
    if name not in module.lora_A:
        return weight
    return torch.addmm(weight, module.lora_B[name].float(), module.lora_A[name].float(), alpha=module.scale[name])


def adapter_config(model: nn.Module, name: str, base_checkpoint: str) -> dict:
    """What goes into adapter_config.json, in PEFT's words."""
    modules = {k: m for k, m in lora_modules(model).items() if name in m.lora_A}
    first = next(iter(modules.values()))
    rank = first.lora_A[name].shape[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_checkpoint),
        "r": rank,
        "lora_alpha": first.scale[name] * rank,
        "lora_dropout": first.dropout.get(name, 0.0),
        "target_modules": sorted({k.rsplit(".", 1)[-1] for k in modules}),
        "bias": "none",
        "inference_mode": True,
    }


def read_config(text: str) -> tuple[int, float, list[str], float]:
    """adapter_config.json -> (rank, alpha, targets, dropout); ValueError for what this LoRA does not do.

    Every key that is not known here must be off: so a method that a later peft brings is refused, not passed over.
    """
    config = json.loads(text)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError("adapter_config.json: not a LoRA adapter (peft_type is not LORA)")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    dropout = config.get("lora_dropout", 0.0)
    fine = {
        "r": type(rank) is int and 0 < rank <= 1024,
        "lora_alpha": type(alpha) in (int, float) and math.isfinite(alpha),
        "lora_dropout": type(dropout) in (int, float) and 0 <= dropout < 1,
        "target_modules": isinstance(targets, list) and set(map(str, targets)) <= set(TARGETS),
        "bias": config.get("bias") in (None, "none"),
        "revision": config.get("revision") in (None, "", "main"),  # of the base
        "init_lora_weights": config.get("init_lora_weights") in STARTS,
    }
    off = {key for key, value in config.items() if value is None or value is False or value in ("", [], {})}
    wrong = [key for key in config.keys() - off - NEUTRAL - fine.keys()] + [key for key in fine if not fine[key]]
    if wrong:
        shown = ", ".join(f"{key}={config.get(key)!r:.80}" for key in sorted(wrong))
        raise ValueError(f"adapter_config.json: the adapter uses what is not supported here: {shown}")
    return rank, float(alpha), [str(target) for target in targets], float(dropout)


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Put tensors into the parameters of their names; ValueError names what is missing, unknown or of another shape."""
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())
        raise ValueError(f"the tensors do not fit this model: {len(odd)} missing or unknown, first {odd[0]}")
    for key, parameter in parameters.items():
        if tensors[key].shape != parameter.shape:
            raise ValueError(f"{key} has shape {tuple(tensors[key].shape)}, this model's is {tuple(parameter.shape)}")
        parameter.copy_(tensors[key])
