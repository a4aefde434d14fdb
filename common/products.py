"""Linears laid out for decoding: those that read the same input as one, adapters inside the weight or beside it."""

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
    """(rows, in) -> (rows, out); the weight may be packed.

    Of a few rows in bf16, oneDNN's products cost the same for 1 to 16 with the weight in front, else a price per row:
    16 rows against Gemma's head take 73 ms of one core instead of 99, and up to ten the other way is as fast.
    """
    weight, a = linear
    if a is not None:
        x = torch.cat([x, F.linear(x, a)], 1)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(x) <= 64 and -len(x) % 16 < 6:
        return (weight @ x.T).T
    return F.linear(x, weight)


def pack(weight: Tensor) -> Tensor:
    """A weight laid out for oneDNN's fp32 kernels, which torch by itself leaves aside: 9 rows against Gemma's head take
    a quarter of the time. The weight itself where there is no such kernel (bf16 has one already), and on a GPU."""
    there = (
        weight.device.type == "cpu" and weight.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8) if there and weight.numel() else weight


def row_invariant(x: Tensor, linear: tuple[Tensor, Tensor | None]) -> Tensor:
    """As `product`, of weights that `pack` made, but the bits of a row do not depend on the rows beside it.

    Otherwise the number of rows chooses the kernel, and with it the order of a sum. oneDNN's sum alike from 2 rows on;
    without them every product has 4 rows. Rows that are missing are empty.
    """
    weight, _ = linear
    if weight.is_mkldnn:
        padded = F.pad(x, (0, 0, 0, int(len(x) == 1)))
        return torch.ops.mkldnn._linear_pointwise(padded, weight, None, "none", [], "")[: len(x)]
    if len(x) > 64:  # a prompt, which is computed alone
        return product(x, linear)
    if x.dtype != torch.float32:
        return F.linear(F.pad(x, (0, 0, 0, -len(x) % 8)), weight)[: len(x)]
    padded = F.pad(x, (0, 0, 0, -len(x) % 4))
    return torch.cat([weight @ part.T for part in padded.split(4)], 1).T[: len(x)].contiguous()  # norms sum by layout
