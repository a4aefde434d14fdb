"""Gemma 3 (text) on one page: the forward pass that every trainer runs, over the weights of a transformers model.

    x = embedding * sqrt(d);  each layer:  x += norm(attention(norm(x)));  x += norm(mlp(norm(x)));  norm(x)

It equals `transformers`' Gemma3TextModel (tests/test_gemma.py) and is faster and smaller in training for three
reasons: sequences lie end to end with no padding between them, so no product is spent on a pad and no mask exists;
attention runs inside each sequence, so neighbours cannot see each other; and norms, rotation and gated activation keep
their input instead of fp32 intermediates for the backward. Weights are read from the model, nothing is patched.
"""

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common import lora
from common.runtime.types import Gemma


def hidden_states(model: Gemma, tokens: Tensor, lengths: list[int], parents: list[int | None] | None = None) -> Tensor:
    """Final hidden states (N, d) of sequences laid end to end.

    model: Gemma3ForCausalLM, with or without our adapters; tokens (N,) int64; lengths: list of ints, sum N.
    parents: for each sequence the number of the earlier one that it continues, or None, where positions start at 0: a
    prompt is computed once, and each of its answers sees it and itself. Gradients reach what requires them.
    """
    assert tokens.ndim == 1 and sum(lengths) == len(tokens), (tokens.shape, lengths)
    parents = parents or [None] * len(lengths)
    starts = [0 if parent is None else lengths[parent] for parent in parents]
    body, config = model.model, model.config
    layout = (lengths, parents)
    if tokens.device.type != "cpu":
        layout = _padded(lengths, parents, {None, config.sliding_window}, tokens.device)
    positions = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, lengths)]).to(tokens.device)
    rotations = {kind: _rotation(body.rotary_emb, positions, kind) for kind in set(config.layer_types)}
    x = body.embed_tokens(tokens)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    run_layer = recomputed_layer if body.gradient_checkpointing and torch.is_grad_enabled() else transformer_layer
    for layer, kind in zip(body.layers, config.layer_types):
        window = config.sliding_window if kind == "sliding_attention" else None
        x = run_layer(x, layer, rotations[kind], layout, window)
    return norm(x, body.norm)


def transformer_layer(
    x: Tensor, layer: Any, rotation: tuple[Tensor, Tensor], layout: "tuple[list, list] | Padded", window: int | None
) -> Tensor:
    """One layer of (N, d) -> (N, d)."""
    h = norm(x, layer.input_layernorm)
    h = attention(h, layer.self_attn, rotation, layout, window)
    x = x + norm(h, layer.post_attention_layernorm)
    h = norm(x, layer.pre_feedforward_layernorm)
    h = _GatedGelu.apply(layer.mlp.gate_proj(h), layer.mlp.up_proj(h))
    return x + norm(layer.mlp.down_proj(h), layer.post_feedforward_layernorm)


def recomputed_layer(x: Tensor, layer: Any, *arguments: Any) -> Tensor:
    """transformer_layer that keeps only x, and runs again in the backward with the adapter that is active now."""
    adapter = lora.active(layer)

    def contexts():
        return contextlib.nullcontext(), lora.using(layer, adapter)  # of the forward, of its repetition

    return checkpoint(transformer_layer, x, layer, *arguments, use_reentrant=False, context_fn=contexts)


def attention(
    h: Tensor, module: Any, rotation: tuple[Tensor, Tensor], layout: "tuple[list, list] | Padded", window: int | None
) -> Tensor:
    """Grouped-query causal attention inside each sequence of (N, d) -> (N, d); `window` tokens back, or all if None.

    layout: (lengths, parents) of hidden_states; Padded where not on a CPU.
    """
    heads, groups, dim = module.config.num_attention_heads, module.config.num_key_value_heads, module.head_dim
    q = _NormRotate.apply(module.q_proj(h).view(-1, heads, dim), module.q_norm.weight, *rotation, module.q_norm.eps)
    k = _NormRotate.apply(module.k_proj(h).view(-1, groups, dim), module.k_norm.weight, *rotation, module.k_norm.eps)
    v = module.v_proj(h).view(-1, groups, dim)
    attend = _attend_each if h.device.type == "cpu" else _attend_padded
    return module.o_proj(attend(q, k, v, layout, module.scaling, window).flatten(1))


def _attend_each(q, k, v, layout, scale, window):
    """(N, heads, dim) -> the same: one sequence after the other, by our own products (faster than sdpa on CPU)."""
    lengths, parents = layout
    q, k, v = q.split(lengths), k.split(lengths), v.split(lengths)
    out = []
    for i, parent in enumerate(parents):
        keys, values = (k[i], v[i]) if parent is None else (torch.cat((t[parent], t[i])) for t in (k, v))
        out.append(_CausalAttention.apply(q[i], keys, values, scale, window))
    return torch.cat(out)


@dataclass
class Padded:
    """Sequences as rows of one sdpa call: each with its parent in front, right-padded to the longest, L tokens."""

    index: Tensor  # (B, L): which token stands there, 0 after the end
    places: Tensor  # (N,): where each token's own output lies among the B * L
    masks: dict  # {window: (L, L) bool, or None where a causal mask does}


def _padded(lengths, parents, windows, device):
    """The layout that _attend_padded takes. A causal mask already hides every pad."""
    starts = [0, *itertools.accumulate(lengths)]
    whole = [[*range(starts[i], starts[i + 1])] for i in range(len(lengths))]
    rows = [(whole[p] if p is not None else []) + own for p, own in zip(parents, whole)]
    longest = max(map(len, rows))
    index = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    ends = [i * longest + len(row) for i, row in enumerate(rows)]
    places = torch.tensor([place for end, n in zip(ends, lengths) for place in range(end - n, end)], device=device)
    at = torch.arange(longest, device=device)
    masks = {
        window: (at[:, None] >= at) & (at[:, None] - at < window) if window and longest > window else None
        for window in windows
    }
    return Padded(index, places, masks)


def _attend_padded(q, k, v, layout, scale, window):
    """The same in one sdpa call; what a parent's copy puts out is thrown away."""
    mask = layout.masks[window]
    padded = [t[layout.index] for t in (q, k, v)]
    if mask is not None:  # GPU kernels that take a mask do not share keys among heads
        padded[1:] = [t.repeat_interleave(q.shape[1] // k.shape[1], 2) for t in padded[1:]]
    q, k, v = (t.transpose(1, 2) for t in padded)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=mask is None,
    )
    return out.transpose(1, 2).flatten(0, 1)[layout.places]


class _CausalAttention(torch.autograd.Function):
    """softmax(q k^T scale) v of one sequence; k and v (L, groups, dim), q (its last n <= L tokens, heads, dim).

    Queries go in blocks against the keys they may see, so nearly half of the products are never made, and the heads of
    a group are rows of one product, so keys are never repeated.
    """

    BLOCK = 128

    @staticmethod
    def forward(ctx, q, k, v, scale, window):
        groups, shared = k.shape[1], q.shape[1] // k.shape[1]
        q = (q * scale).unflatten(1, (groups, shared)).permute(1, 2, 0, 3).contiguous()  # (G, H/G, L, D)
        k, v = k.transpose(0, 1), v.transpose(0, 1)  # (G, L, D)
        out, kept = torch.empty_like(q), []
        for rows, keys, hidden in _blocks(q.shape[2], k.shape[1], window, k.device):
            scores = (q[:, :, rows].flatten(1, 2) @ k[:, keys].mT).unflatten(1, (shared, -1))
            scores.masked_fill_(hidden, -torch.inf)
            kept.append(torch.softmax(scores, -1).flatten(1, 2))
            out[:, :, rows] = (kept[-1] @ v[:, keys]).unflatten(1, (shared, -1))
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.window = scale, window
        return out.permute(2, 0, 1, 3).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        groups, shared = q.shape[:2]
        grad = grad.unflatten(1, (groups, shared)).permute(1, 2, 0, 3).contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (rows, keys, _), p in zip(_blocks(q.shape[2], k.shape[1], ctx.window, k.device), kept):
            one = grad[:, :, rows].flatten(1, 2)
            grad_v[:, keys] += p.mT @ one
            s = torch.ops.aten._softmax_backward_data(one @ v[:, keys].mT, p, -1, p.dtype)
            grad_q[:, :, rows] = (s @ k[:, keys]).unflatten(1, (shared, -1))
            grad_k[:, keys] += s.mT @ q[:, :, rows].flatten(1, 2)
        grad_q = grad_q.permute(2, 0, 1, 3).flatten(1, 2).mul_(ctx.scale)
        return grad_q, grad_k.transpose(0, 1), grad_v.transpose(0, 1), None, None


def _blocks(queries, length, window, device):
    """Yields (query rows, key rows, (rows, keys) bool: hidden from the query); the queries are the last of `length`."""
    before = length - queries
    for start in range(before, length, _CausalAttention.BLOCK):
        end = min(start + _CausalAttention.BLOCK, length)
        first = 0 if window is None else max(0, start + 1 - window)
        row, key = torch.arange(start, end, device=device)[:, None], torch.arange(first, end, device=device)
        hidden = key > row
        hidden = hidden if window is None else hidden | (row - key >= window)
        yield slice(start - before, end - before), slice(first, end), hidden


def share_prompts(
    tokens: Tensor, starts: list[int], lengths: list[int]
) -> tuple[Tensor, list[int], list[int | None], Tensor]:
    """Lay rows end to end with the prompt of neighbours that share it stored once, for hidden_states.

    tokens (B, T); of row b the first lengths[b] count, of them the first starts[b] are its prompt (both lists of ints).
    -> (flat tokens (N,), lengths, parents, index (B, T): where a row's token lies in flat; 0 after its end).
    """
    words, index = tokens.tolist(), torch.zeros(tokens.shape, dtype=torch.long)
    pieces, sizes, parents = [], [], []

    def add(rows, first, last, parent):
        index[rows, first:last] = sum(sizes) + torch.arange(last - first)
        pieces.append(tokens[rows[0], first:last])
        sizes.append(last - first)
        parents.append(parent)

    def prompt(row):
        return words[row][: starts[row]] if starts[row] <= lengths[row] else row

    for _, group in itertools.groupby(range(len(words)), key=prompt):
        rows, parent, shared = [*group], None, 0
        if len(rows) > 1:
            parent, shared = len(sizes), starts[rows[0]]
            add(rows, 0, shared, None)
        for row in rows:
            if lengths[row] > shared:
                add([row], shared, lengths[row], parent)
    return torch.cat(pieces), sizes, parents, index.to(tokens.device)


def _rotation(rotary, positions, kind):
    """cos and sin (N, 1, dim / 2), fp32: the two halves of a head rotate by the same angles."""
    angles = positions[:, None].float() * getattr(rotary, f"{kind}_inv_freq").float()
    return angles.cos()[:, None], angles.sin()[:, None]


def norm(x: Tensor, module: torch.nn.Module) -> Tensor:
    """RMSNorm over the last dimension with Gemma's (1 + w), in fp32."""
    if module.weight.requires_grad:
        return module(x)
    return _Norm.apply(x, module.weight, module.eps)


class _Norm(torch.autograd.Function):
    """y = x / rms(x) * (1 + w) with frozen w; keeps x as it came and one number per row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y = x.float()
        inverse = (y.square().mean(-1, keepdim=True) + eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        y = y * inverse if y.dtype == x.dtype else y.mul_(inverse)
        return y.mul_(1 + weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        return _norm_backward(grad.float() * (1 + weight.float()), x.float() * inverse, inverse).to(x.dtype), None, None


def _norm_backward(grad, unit, inverse):
    """Gradient of unit = x * inverse with inverse = 1 / rms(x): (grad - unit * mean(grad * unit)) * inverse."""
    dot = (grad * unit).mean(-1, keepdim=True)
    return grad.addcmul_(unit, dot, value=-1).mul_(inverse)


class _NormRotate(torch.autograd.Function):
    """RMSNorm of each head, then the rotary embedding; (N, heads, dim). Keeps only its input."""

    @staticmethod
    def forward(ctx, x, weight, cos, sin, eps):
        y = x.float()
        inverse = (y.square().mean(-1, keepdim=True) + eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse, cos, sin)
        y = y * inverse
        return _rotate(y.mul_(1 + weight.float()), cos, sin).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse, cos, sin = ctx.saved_tensors
        grad = _rotate(grad.float(), cos, -sin)  # the transposed rotation
        unit = x.float() * inverse
        grad_weight = (grad * unit).sum((0, 1)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return _norm_backward(grad.mul_(1 + weight.float()), unit, inverse).to(x.dtype), grad_weight, None, None, None


def _rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class _GatedGelu(torch.autograd.Function):
    """gelu_tanh(gate) * up; keeps gate, up and the activation in their own dtype."""

    @staticmethod
    def forward(ctx, gate, up):
        active = F.gelu(gate, approximate="tanh")
        ctx.save_for_backward(gate, up, active)
        return active * up

    @staticmethod
    def backward(ctx, grad):
        gate, up, active = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"), grad * active
