"""Gemma 3 one token at a time: weights laid out for decoding, and the keys and values of the rows in flight.

    x += norm(attention(norm(x)));  x += norm(mlp(norm(x)))     as in gemma.py, without gradients, from a cache

Every row has its own length and its own stretch of the cache, and none holds a pad: rows of any lengths stand side by
side, come (`prefill`) and go (`keep`) between two tokens. Linears that read the same input are one product. Rows may
have an adapter each over one base, as in serving: they share the base's products.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from common import products
from common.runtime import resume
from common.runtime.types import Gemma


class Decoder:
    """Reads a model's weights once, with its active adapter, and holds the cache; the model stays as it is."""

    def __init__(
        self,
        model: Gemma,
        rows: int,
        slots: int,
        merge: bool = True,
        adapters: Sequence[str] = (),
        row_invariant: bool = False,
    ):
        """Room for `rows` rows of `slots` tokens each.

        merge: the adapter is added to the weights in fp32 and the sum rounded to their dtype; otherwise it stays beside
        them as a thin product. A 4-bit base is dequantised here, and under autocast fp32 masters are cast here.
        adapters: names of those that rows may take (`prefill`) instead of the active one, which must then be None.
        row_invariant: on a CPU, a row whose prompt was prefilled alone has the same bits whatever rows stand beside it.
        """
        config, body, head = model.config, model.model, model.lm_head.weight
        kind = head.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
        self.config, self.embed, self.head = config, body.embed_tokens, head.detach().to(self.dtype)
        self.layers = [_layer(layer, merge, self.dtype, adapters) for layer in body.layers]
        self.product, self.scorer = products.product, products.pack(self.head)
        self.norm, self.scale = _scale(body.norm), config.query_pre_attn_scalar**-0.5
        positions = torch.arange(slots, device=head.device)[:, None, None]
        angles = {kind: positions * getattr(body.rotary_emb, f"{kind}_inv_freq").float() for kind in config.layer_types}
        self.rotations = {kind: (angle.cos(), angle.sin()) for kind, angle in angles.items()}  # (slots, 1, dim / 2)
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim)
        self.keys = torch.zeros(shape, dtype=self.dtype, device=head.device)  # a masked slot must not hold a NaN
        self.values = torch.zeros_like(self.keys)
        self.lengths = []  # tokens of each row in flight
        self.names = []  # and its adapter, None for the base as it was read
        self.row_invariant = row_invariant and kind == "cpu"
        if self.row_invariant:
            assert all(a is None for layer in self.layers for _, a in layer.products.values()), "an adapter is active"
            self.product = products.row_invariant
        self.parts = {}  # {adapter: places of its tokens} in the product at hand

    @torch.no_grad()
    def prefill(
        self, prompts: Sequence[list[int]], copies: Sequence[int], adapters: Sequence[str | None] | None = None
    ) -> Tensor:
        """Add copies[i] rows that begin with prompts[i] (ids), computed once -> hidden (rows, d) at their ends."""
        adapters = adapters or [None] * len(prompts)
        lengths, device = [len(prompt) for prompt in prompts], self.head.device
        assert len(self.lengths) + sum(copies) <= self.keys.shape[1] and max(lengths) <= self.keys.shape[3], lengths
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])

        def attend(index, q, k, v, window):
            outs, row = [], len(self.lengths)
            for n, length, *one in zip(copies, lengths, *(t.transpose(0, 1).split(lengths, 1) for t in (q, k, v))):
                self.keys[index, row : row + n, :, :length], self.values[index, row : row + n, :, :length] = one[1:]
                outs.append(_causal_attention(*one, self.scale, window))  # type: ignore[call-arg]  # one: q, k, v
                row += n
            return torch.cat(outs)

        self._share([name for name, length in zip(adapters, lengths) for _ in range(length)])
        product = products.product if len(prompts) == 1 else self.product  # alone, a prompt has no rows beside it
        hidden = self._run(tokens, positions, attend, product)[torch.tensor(lengths, device=device).cumsum(0) - 1]
        self.lengths += [length for length, n in zip(lengths, copies) for _ in range(n)]
        self.names += [name for name, n in zip(adapters, copies) for _ in range(n)]
        repeats = torch.tensor(copies, device=device)
        return hidden.repeat_interleave(repeats, 0, output_size=sum(copies))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (rows,) to the rows in flight -> hidden (rows, d) that predict their successors."""
        assert len(tokens) == len(self.lengths) and max(self.lengths) < self.keys.shape[3], (tokens, self.lengths)
        at, rows = torch.tensor(self.lengths, device=tokens.device), torch.arange(len(tokens), device=tokens.device)
        together = [slice(i, i + 1) for i in range(len(rows))] if self.row_invariant else [slice(len(rows))]
        windows = (None, self.config.sliding_window)
        seen = {w: [(some, *self._seen(self.lengths[some], w)) for some in together] for w in windows}

        def attend(index, q, k, v, window):
            keys, values = self.keys[index], self.values[index]
            with resume.other_kernels(k.device):  # no place is written twice
                keys[rows, :, at], values[rows, :, at] = k, v
            q = q.unflatten(1, (keys.shape[1], -1))  # heads that share keys are the queries of one product
            out = []
            for some, slots, mask in seen[window]:
                k, v = keys[some, :, slots], values[some, :, slots]
                out.append(F.scaled_dot_product_attention(q[some], k, v, attn_mask=mask, scale=self.scale))
            return torch.cat(out).flatten(1, 2)

        self._share(self.names)
        hidden = self._run(tokens, at, attend, self.product)
        self.lengths = [length + 1 for length in self.lengths]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (rows, V) of hidden states (rows, d), in the model's dtype."""
        return self.product(hidden, (self.scorer, None))

    def keep(self, rows: list[int]) -> list[int]:
        """Keep only these of the rows in flight; returns which of them stands where now.

        Holes are filled from the end, so no more rows are copied than have left.
        """
        kept = set(rows)
        last = (row for row in range(len(kept), len(self.lengths)) if row in kept)
        order = [row if row in kept else next(last) for row in range(len(kept))]
        for new, old in enumerate(order):
            if new != old:
                used = self.lengths[old]
                self.keys[:, new, :, :used] = self.keys[:, old, :, :used]
                self.values[:, new, :, :used] = self.values[:, old, :, :used]
        self.lengths = [self.lengths[row] for row in order]
        self.names = [self.names[row] for row in order]
        return order

    def _share(self, names):
        """Note which tokens go through which adapter."""
        places = {name: [i for i, other in enumerate(names) if other == name] for name in {*names} - {None}}
        self.parts = {
            name: slice(None) if len(at) == len(names) else torch.tensor(at, device=self.head.device)
            for name, at in places.items()
        }

    def _linear(self, x, layer, kind, product):
        """A layer's product of x (N, in), with what the adapters of its rows add."""
        y = product(x, layer.products[kind])
        for name, rows in self.parts.items():
            if name in layer.adapters[kind]:
                a, b = layer.adapters[kind][name]
                y[rows] += product(product(x[rows], (a, None)), (b, None))
        return y

    def _run(self, tokens, positions, attend, product):
        """The layers over tokens (N,) at positions (N,) -> (N, d); attend(layer's index, q, k, v, window)."""
        config, eps = self.config, self.config.rms_norm_eps
        rotations = {kind: (cos[positions], sin[positions]) for kind, (cos, sin) in self.rotations.items()}
        x = self.embed(tokens).to(self.dtype)
        for index, (layer, kind) in enumerate(zip(self.layers, config.layer_types)):
            window = config.sliding_window if kind == "sliding_attention" else None
            q, k, v = self._heads(_norm(x, layer.before_attention, eps), layer, *rotations[kind], product)
            out = self._linear(attend(index, q, k, v, window).flatten(1), layer, "out", product)
            x = x + _norm(out, layer.after_attention, eps)
            gate, up = self._linear(_norm(x, layer.before_mlp, eps), layer, "gate_up", product).chunk(2, -1)
            x = x + _norm(
                self._linear(F.gelu(gate, approximate="tanh") * up, layer, "down", product), layer.after_mlp, eps
            )
        return _norm(x, self.norm, eps)

    def _heads(self, h, layer, cos, sin, product):
        """(N, d) -> q (N, heads, dim), k and v (N, groups, dim); q and k normed and rotated in fp32."""
        groups, dim = self.config.num_key_value_heads, self.config.head_dim
        qkv = self._linear(h, layer, "qkv", product).unflatten(1, (-1, dim))
        qk = F.rms_norm(qkv[:, :-groups].float(), (dim,), None, self.config.rms_norm_eps) * layer.heads
        a, b = qk.chunk(2, -1)
        qk = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(h.dtype)
        return qk[:, :-groups], qk[:, -groups:], qkv[:, -groups:]

    def _seen(self, lengths, window):
        """(slots, mask): the slots that some of these rows see when they write, and which row sees which."""
        low = 0 if window is None else max(0, min(lengths) + 1 - window)
        slots = slice(low, max(lengths) + 1)
        if min(lengths) == max(lengths):
            return slots, None
        slot = torch.arange(slots.start, slots.stop, device=self.head.device)
        at = torch.tensor(lengths, device=self.head.device)
        mask = slot <= at[:, None]
        if window is not None:
            mask &= slot > at[:, None] - window
        return slots, mask[:, None, None]


def _causal_attention(q, k, v, scale, window):
    """One prompt: q (heads, L, dim), k and v (groups, L, dim) -> (L, heads, dim); `window` tokens back, or all."""
    at, mask = torch.arange(q.shape[1], device=q.device), None
    if window is not None and len(at) > window:
        mask = (at[:, None] >= at) & (at[:, None] - at < window)
    causal, k, v = mask is None, *(t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, is_causal=causal, scale=scale)
    return out[0].transpose(0, 1)


def _layer(layer, merge, dtype, adapters):
    """One layer's products, and Gemma's 1 + w of its norms in fp32; that of q and k is (heads + groups, dim)."""
    attention, mlp = layer.self_attn, layer.mlp
    heads, groups = attention.config.num_attention_heads, attention.config.num_key_value_heads
    linears = {
        "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
        "out": [attention.o_proj],
        "gate_up": [mlp.gate_proj, mlp.up_proj],
        "down": [mlp.down_proj],
    }
    pairs_of = {
        kind: {name: products.adapter_pair(some, name, dtype) for name in adapters} for kind, some in linears.items()
    }
    fused = {kind: products.fused_linear(some, merge, dtype) for kind, some in linears.items()}
    return SimpleNamespace(
        products={kind: (products.pack(weight), a) for kind, (weight, a) in fused.items()},
        adapters={
            kind: {name: tuple(map(products.pack, pair)) for name, pair in pairs.items() if pair}
            for kind, pairs in pairs_of.items()
        },
        before_attention=_scale(layer.input_layernorm),
        after_attention=_scale(layer.post_attention_layernorm),
        before_mlp=_scale(layer.pre_feedforward_layernorm),
        after_mlp=_scale(layer.post_feedforward_layernorm),
        heads=torch.cat([_scale(attention.q_norm).expand(heads, -1), _scale(attention.k_norm).expand(groups, -1)]),
    )


def _norm(x, scale, eps):
    """RMSNorm over the last dimension in fp32; `scale` is 1 + w."""
    return F.rms_norm(x.float(), scale.shape, scale, eps).to(x.dtype)


def _scale(module):
    return 1 + module.weight.detach().float()
