"""Linears laid out for decoding: those that read the same input as one, adapters inside the weight or beside it."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from common import lora


@torch.no_grad()
def fused_linear(linears: list, merge: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Linears that read the same input as one (weight, a), each with its active adapter; weight (sum of outs, in).

    With adapters that are not merged it is (W | B, A): y = (x, x A^T) (W | B)^T, one product as well.
    """
    actives = [m.active if isinstance(m, lora.LoraLinear) else None for m in linears]
    bases = [lora.frozen_weight(m.base if isinstance(m, lora.LoraLinear) else m) for m in linears]
    if merge:
        bases = [lora.merged_weight(m, name) if name else w for w, m, name in zip(bases, linears, actives)]
    bases = [w.detach().to(dtype) for w in bases]
    weight = torch.cat(bases) if len(bases) > 1 else bases[0]
    beside = None if merge else adapter_pair(linears, actives[0], dtype)
    return (weight, None) if beside is None else (torch.cat([weight, beside[1]], 1), beside[0])


@torch.no_grad()
def adapter_pair(linears: list, name: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """One adapter of linears that read the same input: A (sum of ranks, in) and B (sum of outs, sum of ranks) with its
    scale, block by block; None where it adapts none of them."""
    adapted = [m if isinstance(m, lora.LoraLinear) and name in m.lora_A else None for m in linears]
    if not any(adapted):
        return None
    bases = [m.base if isinstance(m, lora.LoraLinear) else m for m in linears]
    device = bases[0].weight.device
    a = [torch.zeros(0, w.in_features, device=device) if m is None else m.lora_A[name] for w, m in zip(bases, adapted)]
    b = [
        torch.zeros(w.out_features, 0, device=device) if m is None else m.lora_B[name] * m.scale[name]
        for w, m in zip(bases, adapted)
    ]
    return torch.cat(a).to(dtype), torch.block_diag(*b).to(dtype)


def product(x: Tensor, linear: tuple[Tensor, Tensor | None]) -> Tensor:
    """(rows, in) -> (rows, out); the weight may be packed."""
    weight, a = linear
    if a is not None:
        x = torch.cat([x, F.linear(x, a)], 1)
    return _packed_product(x, weight) if weight.is_mkldnn else F.linear(x, weight)


def can_pack(device: str, dtype: torch.dtype) -> bool:
    """Are there packed weights of this dtype here, and is their product right? In bf16 oneDNN wants AVX512 or newer."""
    return device == "cpu" and dtype in (torch.float32, torch.bfloat16) and _packing_is_right(dtype)


@cache
def _packing_is_right(dtype):
    """Measured once in a process: one packed product beside the plain one, in fp64. Times are not compared: noise would
    then choose the kernel, and with it the last bits and the samples of a run."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x, weight = (torch.linspace(-1, 1, rows * 96, device="cpu").sin().view(rows, 96).to(dtype) for rows in (9, 80))
    plain = x.double() @ weight.double().T
    packed = _packed_product(x, torch.ops.mkldnn._reorder_linear_weight(weight, 8))
    bound = 0.01 if dtype == torch.bfloat16 else 1e-5
    return bool((packed - plain).abs().max() <= bound * plain.abs().max())


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight, laid out for oneDNN's kernels, which torch by itself leaves aside; the weight itself where
    there are none. In fp32, 9 rows against Gemma's head take a quarter of the time; for bf16 see benchmarks/rollout.md.
    """
    there = can_pack(weight.device.type, weight.dtype) and weight.numel()
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8) if there else weight


def row_invariant(x: Tensor, linear: tuple[Tensor, Tensor | None]) -> Tensor:
    """As `product`, of weights that `pack` made, but the bits of a row do not depend on the rows beside it.

    Otherwise the number of rows chooses the kernel, and with it the order of a sum. oneDNN adds in the same order for 2
    or more rows (bf16: for 2 to 32), so a single row gets an empty one beside it, and products are cut at 64 rows
    (bf16: at 32). Weights that are not packed: fp32 products have exactly 4 rows; in other dtypes at most 64 rows are
    filled up with empty ones to a multiple of 8.
    """
    weight, _ = linear
    if weight.is_mkldnn:
        cuts = x.split(32 if x.dtype == torch.bfloat16 else 64)
        parts = [_packed_product(F.pad(cut, (0, 0, 0, int(len(cut) == 1))), weight)[: len(cut)] for cut in cuts]
    elif x.dtype != torch.float32:
        parts = [F.linear(F.pad(cut, (0, 0, 0, -len(cut) % 8)), weight)[: len(cut)] for cut in x.split(64)]
    else:
        padded = F.pad(x, (0, 0, 0, -len(x) % 4))
        return torch.cat([weight @ cut.T for cut in padded.split(4)], 1).T[: len(x)].contiguous()  # norms sum by layout
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _packed_product(x, weight):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
