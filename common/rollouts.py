"""Completions sampled from a policy, with their log-probabilities: exact, and each row from its own random numbers.

    token = F^-1(u),  F the distribution function of softmax(logits / temperature),  u uniform of (seed, step, row, t)

Weights are read anew for each call with the active adapter (decoder.Decoder); prompts are computed once for a whole
group, finished rows leave at once and waiting ones take their place. Neither changes a row's text.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import chat, lora
from common.decoder import Decoder
from common.runtime import resume
from common.runtime.types import Gemma

WIDTH = 512  # words of a block: Gemma's 262,144 are 512 blocks, so both searches are short
PART = 16 * WIDTH  # words reduced at a time on CPU
ROWS = 32  # whose logits exist at a time on CPU
PROMPTS = 8  # computed at a time


@torch.no_grad()
def sample(
    model: Gemma,
    prompts: list[list[int]],
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    *,
    greedy: bool = False,
    top_p: float = 1.0,
    stop: Sequence[int] = chat.STOP_TOKENS,
    merge: Any = "auto",
    decoder_class: type[Decoder] = Decoder,
) -> dict:
    """`group_size` completions of each prompt (a list of ids) -> the batch that trainers take; prompt 0's rows first.

    tokens, attention_mask (B, T); mask, sampled_logprobs (B, T-1); completions (B lists of ids, with the stop token if
    one came); stopped (B,) bool. uniforms (B, max_new_tokens) as `uniforms` makes them; None draws from torch's global
    generator. greedy and top_p are for evaluation and serving: a ratio needs the whole distribution, and the
    log-probs are always those of softmax(logits / temperature).
    merge: the adapter inside the weights (True), beside them (False), or auto: inside in fp32, beside in bf16, where
    rounding swallows a young adapter (benchmarks/rollout.md).
    decoder_class: another class of decoder, as benchmarks/graph.py has one for CUDA graphs.
    """
    if not prompts or not all(prompts) or group_size < 1 or max_new_tokens < 1 or temperature <= 0:
        raise ValueError("sample needs prompts, none of them empty, and counts and a temperature above zero")
    rows, device = len(prompts) * group_size, model.lm_head.weight.device
    if uniforms is None:
        uniforms = torch.rand(rows, max_new_tokens, dtype=torch.float64)
    assert uniforms.shape == (rows, max_new_tokens), (uniforms.shape, rows, max_new_tokens)
    if merge == "auto":
        merge = model.lm_head.weight.dtype == torch.float32
    slots = max(map(len, prompts)) + max_new_tokens
    decoder = decoder_class(model, min(rows, 64 if device.type == "cpu" else 256), slots, merge)
    choose = functools.partial(draw, temperature=temperature, greedy=greedy, top_p=top_p)
    with torch.autocast(device.type, enabled=False):
        completions, logprobs = _generate(decoder, prompts, uniforms.cpu(), set(stop), choose)
    every = [prompt for prompt in prompts for _ in range(group_size)]
    return {
        **{name: tensor.to(device) for name, tensor in _batch(every, completions, logprobs).items()},
        "completions": completions,
        "stopped": torch.tensor([ids[-1] in stop for ids in completions], device=device),
    }


def uniforms(seed: int, step: int | str, rows: Sequence[int], max_new_tokens: int) -> Tensor:
    """(len(rows), max_new_tokens) fp64 in [0, 1): one generator for each (seed, step, number of the row in the step).

    Row numbers count over all ranks, so neither ranks nor the rows beside it can change what a row draws.
    """
    out = torch.empty(len(rows), max_new_tokens, dtype=torch.float64)
    for values, row in zip(out, rows):
        number = hashlib.sha256(f"rollout/{seed}/{step}/{row}".encode()).digest()[:8]
        values.uniform_(generator=torch.Generator().manual_seed(int.from_bytes(number, "little", signed=True)))
    return out


def _generate(decoder, prompts, uniforms, stop, choose):
    """(completions, log-probs), B lists each. The decoder is kept full while rows wait."""
    total, limit = uniforms.shape
    group, room = total // len(prompts), decoder.keys.shape[1]
    completions, logprobs = [[] for _ in range(total)], [[] for _ in range(total)]
    running, waiting = [], list(range(total))  # rows, by their place in the decoder and in line
    hidden = decoder.head[:0]
    while running or waiting:
        free = room - len(running)
        free -= free % group if group <= room else 0  # whole groups, so that a prompt is computed once
        if waiting and (not running or free >= max(1, room // 4)):
            enter, waiting = waiting[:free], waiting[free:]
            hidden, running = torch.cat([hidden, *_prefill(decoder, prompts, group, enter)]), running + enter
        at = [len(completions[row]) for row in running]
        many = ROWS if hidden.device.type == "cpu" else len(hidden)
        pairs = zip(hidden.split(many), uniforms[running, at].to(hidden.device).split(many))
        drawn = [choose(decoder.logits(some), u) for some, u in pairs]
        tokens, token_logprobs = (torch.cat(column) for column in zip(*drawn))
        both = torch.stack([tokens.double(), token_logprobs.double()]).tolist()  # one transfer; both are exact
        for row, token, logprob in zip(running, *both):
            completions[row].append(int(token))
            logprobs[row].append(logprob)
        done = [completions[row][-1] in stop or len(completions[row]) == limit for row in running]
        alive = [i for i, ended in enumerate(done) if not ended]
        order = decoder.keep(alive)
        running = [running[i] for i in order]
        hidden = decoder.step(tokens[order]) if running else hidden[:0]
    return completions, logprobs


def _prefill(decoder, prompts, group, rows):
    """Yields the hidden states at the end of these rows' prompts."""
    jobs = [(prompts[i], len(list(members))) for i, members in groupby(rows, lambda row: row // group)]
    for start in range(0, len(jobs), PROMPTS):
        yield decoder.prefill(*zip(*jobs[start : start + PROMPTS]))


def draw(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, greedy: bool = False, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token per row by the inverse of the distribution function -> (tokens (rows,), log-probs (rows,) fp32).

    logits (rows, V), uniforms (rows,) in [0, 1). First a block of WIDTH words, then the word in it, both sums in fp64:
    exact, and a sixteenth of what `multinomial` costs over 262,144 words. A word of probability zero is never drawn.
    The log-prob is that of softmax(logits / temperature), whatever greedy and top_p leave of it.
    """
    if logits.shape[1] % WIDTH:
        logits = F.pad(logits, (0, -logits.shape[1] % WIDTH), value=-torch.inf)
    blocks = _reduce(logits, torch.logsumexp, temperature).double()
    total = blocks.logsumexp(1)
    if not torch.isfinite(total).all():
        raise FloatingPointError("logits are not finite: the model has diverged")
    rows = torch.arange(len(logits), device=logits.device)
    if greedy:
        block = _reduce(logits, torch.amax).argmax(1)
    else:
        if top_p < 1:
            logits, temperature = _warped(logits.float() / temperature, top_p), 1.0
            blocks = _reduce(logits, torch.logsumexp).double()
        block, rest = _invert(blocks.softmax(1), uniforms.double())
    words = logits.unflatten(1, (-1, WIDTH))[rows, block].float().div(temperature).double()
    word = words.argmax(1) if greedy else _invert(words.softmax(1), rest)[0]
    return block * WIDTH + word, (words[rows, word] - total).float()


def _reduce(logits, function, temperature=1.0):
    """function(logits / temperature) over each block -> (rows, V / WIDTH) fp32, by parts that stay in the cache.

    A part is laid out row by row first: the head's product on CPU comes with the words as its rows.
    """
    size = PART if logits.device.type == "cpu" else logits.shape[1]
    parts = (part.float().contiguous() for part in logits.split(size, 1))
    scaled = (part if temperature == 1.0 else part / temperature for part in parts)
    return torch.cat([function(part.unflatten(1, (-1, WIDTH)), 2) for part in scaled], 1)


def _invert(weights, u):
    """Index i of weights (rows, n) with P(i) = weight_i / sum, and where u falls inside i's share, again in [0, 1]."""
    edges = _running_sum(weights)
    point = (u * edges[:, -1])[:, None]
    last = torch.searchsorted(edges, edges[:, -1:].clone())  # the last with a weight, where u rounded up to 1
    index = torch.minimum(torch.searchsorted(edges, point, right=True), last)
    weight = weights.gather(1, index)
    rest = (point - edges.gather(1, index) + weight) / weight
    return index[:, 0], rest[:, 0].clamp(0, 1)


def _running_sum(x):
    """x (rows, n) -> its cumulative sum over n. On CUDA that of one row alone need not repeat to the bit."""
    with resume.other_kernels(x.device):
        return F.pad(x, (0, 0, 0, 1)).cumsum(1)[:-1] if x.is_cuda else x.cumsum(1)


def _warped(z, top_p):
    """Logits z (rows, V), -inf but for the fewest words of at least top_p mass in all.

    Words tied with the last one in stay in. No sort of V words: the candidates grow until they hold the mass.
    """
    n, total = 1024, z.logsumexp(1, keepdim=True)
    while True:
        best = z.topk(min(n, z.shape[1])).values
        mass = _running_sum((best - total).double().exp())
        if n >= z.shape[1] or mass[:, -1].min() >= top_p:
            break
        n *= 8
    kept = (mass[:, :-1] < top_p).sum(1, keepdim=True)  # the first word always stays
    return z.masked_fill(z < best.gather(1, kept), -torch.inf)


@torch.no_grad()
def merge_survival(model: Gemma, adapter: str, rounded: Callable[[Tensor], Tensor] | None = None) -> float:
    """Share of an adapter that reaches rounded weights: sum <W' - W, D> / sum <D, D>.

    rounded: a weight in fp32 -> the same as it is stored; None rounds to the base's dtype.

    D = (alpha / r) B A and W' = W + D, both rounded: 1 if every change arrives, 0 if all are lost. The projection on D
    and not the norm of what arrives, since that counts noise as well. 1 for an adapter that is still zero.
    """
    dtype, arrived, whole = model.lm_head.weight.dtype, 0.0, 0.0
    rounded = rounded or (lambda weight: weight.to(dtype).float())
    for module in lora.lora_modules(model).values():
        if adapter in module.lora_A:
            delta = (module.lora_B[adapter] * module.scale[adapter]) @ module.lora_A[adapter]
            weight = rounded(lora.frozen_weight(module.base).float())
            change = rounded(weight + delta) - weight
            arrived, whole = arrived + (change * delta).sum().item(), whole + delta.square().sum().item()
    return arrived / whole if whole else 1.0


def _batch(prompts, completions, logprobs):
    """Rows of ids right-padded into the tensors of `sample`; the mask comes from lengths alone."""
    width = max(len(prompt) + len(ids) for prompt, ids in zip(prompts, completions))
    tokens = torch.full((len(prompts), width), chat.PAD)
    attention_mask = torch.zeros_like(tokens)
    mask, sampled = torch.zeros(len(prompts), width - 1), torch.zeros(len(prompts), width - 1)
    for i, (prompt, ids, row_logprobs) in enumerate(zip(prompts, completions, logprobs)):
        start, end = len(prompt), len(prompt) + len(ids)
        tokens[i, :end] = torch.tensor([*prompt, *ids])
        attention_mask[i, :end] = 1
        mask[i, start - 1 : end - 1] = 1
        sampled[i, start - 1 : end - 1] = torch.tensor(row_logprobs)
    return {"tokens": tokens, "attention_mask": attention_mask, "mask": mask, "sampled_logprobs": sampled}
