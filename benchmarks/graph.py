"""The decoder's step at fixed shapes: recorded once as a CUDA graph and replayed, so no kernel waits for Python.

A step of a few rows is hundreds of small kernels, and starting them takes longer than they run. A graph starts them
all at once, but its shapes are fixed. So rows and slots are rounded up: rows that are not in flight compute something
that nobody reads, and a mask hides the slots that a row has not written. Which slot a row writes is a tensor, not a
Python number. On a CPU the same functions run unrecorded, which is how they are tested (tests/test_graph.py); nothing
here has run on CUDA yet, and only benchmarks/gpu.py asks for it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.decoder import Decoder
from common.runtime import resume

SLOTS = 128  # the slots that a graph reads are a multiple of this


@dataclass
class Recorded:
    """A step for one number of rows and slots, with the tensors that it reads and writes."""

    tokens: Tensor  # (rows,)
    at: Tensor  # (rows,), the slot that each row writes
    hidden: Tensor  # (rows, d)
    graph: Any  # torch.cuda.CUDAGraph; None on a CPU


class GraphDecoder(Decoder):
    """A Decoder whose `step` has fixed shapes; rows take no adapters of their own."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.recorded: dict[tuple[int, int], Recorded] = {}
        self.pool: Any = None  # of memory, which the graphs share: one runs at a time

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """As Decoder.step."""
        count, longest = len(tokens), max(self.lengths)
        assert count == len(self.lengths) and longest < self.keys.shape[3], (tokens, self.lengths)
        assert not any(self.names), "an adapter of a row's own"
        rows = min(1 << (count - 1).bit_length(), self.keys.shape[1])  # the next power of two
        slots = min(-(-(longest + 1) // SLOTS) * SLOTS, self.keys.shape[3])
        if (rows, slots) not in self.recorded:
            self.recorded[rows, slots] = self._record(rows, slots)
        step = self.recorded[rows, slots]
        step.tokens[:count] = tokens
        step.at.copy_(torch.tensor(self.lengths + [0] * (rows - count)))  # a row not in flight writes its first slot
        if step.graph is None:
            step.hidden = self._fixed_step(step.tokens, step.at, slots)
        else:
            step.graph.replay()
        self.lengths = [length + 1 for length in self.lengths]
        return step.hidden[:count].clone()  # the next replay writes there

    def _record(self, rows, slots):
        """A recording writes into the first slot of every row; what was there is put back."""
        tokens, at = torch.zeros(2, rows, dtype=torch.long, device=self.head.device)
        first = self.keys[:, :rows, :, :1].clone(), self.values[:, :rows, :, :1].clone()
        hidden, graph = self._capture(tokens, at, slots)
        self.keys[:, :rows, :, :1], self.values[:, :rows, :, :1] = first
        return Recorded(tokens, at, hidden, graph)

    def _capture(self, tokens, at, slots):
        """(hidden, graph) of a step, as in Recorded; a CPU has no graphs."""
        if self.head.device.type != "cuda":
            return self.head[:0], None
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels choose their workspaces before the recording
            for _ in range(2):
                self._fixed_step(tokens, at, slots)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=self.pool):
            hidden = self._fixed_step(tokens, at, slots)
        self.pool = graph.pool()
        return hidden, graph

    def _fixed_step(self, tokens, at, slots):
        """The step of Decoder for all rows of `tokens`, of shapes that no tensor's content decides -> (rows, d)."""
        rows = torch.arange(len(tokens), device=tokens.device)
        slot = torch.arange(slots, device=tokens.device)
        behind = at[:, None] - slot  # (rows, slots): how far before the row's own token; negative is not yet written
        window = self.config.sliding_window
        masks = {None: behind >= 0, window: (behind >= 0) & (behind < window)}

        def attend(index, q, k, v, window):
            keys, values = self.keys[index], self.values[index]
            with resume.other_kernels(k.device):  # no place is written twice
                keys[rows, :, at], values[rows, :, at] = k, v
            q = q.unflatten(1, (keys.shape[1], -1))  # heads that share keys are the queries of one product
            seen = keys[: len(rows), :, :slots], values[: len(rows), :, :slots]
            out = F.scaled_dot_product_attention(q, *seen, attn_mask=masks[window][:, None, None], scale=self.scale)
            return out.flatten(1, 2)

        self._share([None])
        return self._run(tokens, at, attend, self.product)
