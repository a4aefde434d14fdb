"""Floating-point operations (FLOPs) by formula: what sampling, scoring and training cost, whatever machine runs them.

A multiply and its add are two. Of a model with n numbers in the linears of its layers, a numbers in an adapter, h
numbers in a token's heads, hidden size d and vocabulary V:

    forward    2 (n + a) for each token, 4 h for each key that a token sees in a layer, 2 d V for each token with logits
    backward   all weights: twice the forward (gradients of inputs and of weights)
               adapter: 2 n and 2 d V once more (inputs only), attention and adapter twice

Kaplan et al. 2020, table 1; Chowdhery et al. 2022, appendix B. Left out: norms, activations, softmax, the optimizer,
and what is computed a second time to save memory. That sampling is bound by memory shows in seconds, not here.
"""

from collections.abc import Sequence

from common.runtime.types import GemmaConfig

Span = tuple[int, int]  # the tokens from position `start` to before `end` of a sequence


def linears(config: GemmaConfig) -> dict[str, int]:
    """Numbers in the four products of one layer, as rollouts fuse them: {"qkv", "o_proj", "gate_up", "down_proj"}."""
    d, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    return {
        "qkv": d * (heads + 2 * groups) * config.head_dim,
        "o_proj": heads * config.head_dim * d,
        "gate_up": 2 * d * config.intermediate_size,
        "down_proj": config.intermediate_size * d,
    }


def shared_prompt(prompt: int, answers: Sequence[int]) -> list[Span]:
    """The spans of answers of so many tokens to one prompt, which is computed once."""
    return [(0, prompt), *((prompt, prompt + tokens) for tokens in answers)]


def forward(config: GemmaConfig, spans: Sequence[Span], logits: int = 0, adapter: int = 0) -> float:
    """FLOPs of one forward over `spans`, of whose tokens `logits` meet the vocabulary. adapter: its numbers.

    Sampling costs the same: spans of prompts and answers, logits for each sampled token.
    """
    return _linear(config, spans) + _attention(config, spans) + _head(config, logits) + _adapter(spans, adapter)


def backward(
    config: GemmaConfig, spans: Sequence[Span], logits: int = 0, adapter: int = 0, full: bool = False
) -> float:
    """FLOPs of the backward of such a forward. full: all weights are trained, else the adapter alone."""
    if full:
        return 2 * forward(config, spans, logits)
    once = _linear(config, spans) + _head(config, logits)
    return once + 2 * (_attention(config, spans) + _adapter(spans, adapter))


def update(config: GemmaConfig, spans: Sequence[Span], logits: int = 0, adapter: int = 0, full: bool = False) -> float:
    """FLOPs of a forward and its backward."""
    return forward(config, spans, logits, adapter) + backward(config, spans, logits, adapter, full)


def per_token(config: GemmaConfig, length: int, adapter: int, full: bool) -> float:
    """FLOPs of training on a token, all of a row of `length` being supervised: what is expected before any was seen."""
    return update(config, [(0, length)], length, adapter, full) / length


def _tokens(spans):
    return sum(end - start for start, end in spans)


def _linear(config, spans):
    return 2.0 * config.num_hidden_layers * sum(linears(config).values()) * _tokens(spans)


def _adapter(spans, numbers):
    return 2.0 * numbers * _tokens(spans)


def _head(config, logits):
    return 2.0 * config.hidden_size * config.vocab_size * logits


def _attention(config, spans):
    """q k^T and the weighted sum of v."""
    reach = {"full_attention": None, "sliding_attention": config.sliding_window}
    keys = sum(
        _keys(end, reach[kind]) - _keys(start, reach[kind]) for start, end in spans for kind in config.layer_types
    )
    return 4.0 * config.num_attention_heads * config.head_dim * keys


def _keys(tokens, window):
    """Keys that the first `tokens` tokens of a sequence see together: each itself and what is before it."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window
