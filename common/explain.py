"""What `--explain` shows: which tokens are trained, the checks on them, and the memory a step will take, by formula."""

import itertools
import shutil
import sys

from common import chat
from common.log import UserError, say

GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"
LIBRARIES = 0.5e9  # bytes of Python, torch and transformers before any weight


def token_view(tokenizer, example, colour=True, limit=400):
    """One example as text, trained tokens in colour (or in [[ ]]) and the others dim; long ones are cut with a mark."""
    pairs = list(zip(example["ids"], example["mask"]))
    parts = []
    for trained, run in itertools.groupby(pairs[:limit], key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run])
        before, after = (GREEN if trained else DIM, PLAIN) if colour else ("[[", "]]") if trained else ("", "")
        parts.append(before + text + after)
    cut = len(pairs) - limit
    return "".join(parts) + (f" ... and {cut} more tokens" if cut > 0 else "")


def check_example(example):
    """What must hold in every example; returns the list of what does not, in words."""
    ids, mask = example["ids"], example["mask"]
    stops = [i for i, token in enumerate(ids) if token == chat.END_OF_TURN and mask[i]]
    wrong = []
    if ids[0] != chat.BOS or ids.count(chat.BOS) != 1:
        wrong.append(f"has {ids.count(chat.BOS)} BOS tokens, first token {ids[0]}; expected exactly one, in front")
    if not any(mask):
        wrong.append("has no trained token")
    if any(m and token in chat.CONTROL_TOKENS - {chat.END_OF_TURN} for token, m in zip(ids, mask)):
        wrong.append("trains a control token other than <end_of_turn>")
    if not stops and not mask[-1]:
        wrong.append("trains no <end_of_turn>, so the model would not learn to stop")
    if mask[0]:
        wrong.append("trains its first token, which nothing predicts")
    return wrong


def activation_bytes_per_token(config, bytes_per_value, length):
    """What the backward keeps of one token in all layers, in a sequence of `length` tokens (see common/gemma.py)."""
    heads, groups, d = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
        config.hidden_size,
    )
    norms = 4 * d + 2 * d  # inputs of the four norms, and of the adapters behind two of them
    attention = (heads + groups) + (heads + 2 * groups) + heads  # before and after norm and rotation; the output
    weights = config.num_attention_heads * min(length, length / 2 + 64)  # softmax, its upper half never made
    mlp = 4 * config.intermediate_size  # gate, up, the activation, and the input of down's adapter
    return config.num_hidden_layers * (norms + attention + weights + mlp) * bytes_per_value


def memory_plan(net, trainable, tokens, length, logits=True):
    """[(what, bytes)] of a step of `tokens` tokens, the longest of `length`: what holds the memory at its peak.

    `logits` is false for a reward model, which never meets the vocabulary.
    """
    config, head = net.config, net.lm_head.weight
    numbers = sum(p.numel() for p in trainable)
    rows, copied = (256, 16) if head.device.type == "cpu" else (1024, 1024)  # of logits, and of their fp32 copy
    chunk = config.vocab_size * (min(rows, tokens) * head.element_size() + min(copied, tokens) * 4)
    if head.requires_grad:  # full fine-tuning: the head's own gradient on its way to the embedding
        chunk += head.numel() * 4
    activations = tokens * activation_bytes_per_token(config, head.element_size(), length)
    return [
        ("libraries", LIBRARIES),
        ("weights", sum(p.numel() * p.element_size() for p in net.parameters())),
        ("gradients and Adam moments of what is trained, fp32", numbers * 4 * 3),
        *([("one chunk of logits", chunk)] if logits else []),
        (f"activations of {tokens} tokens", activations),
    ]


def show(examples, tokenizer, net, named, budget, logits=True):
    """Print the first batch as it will be trained and the memory plan; returns the number of examples shown.

    UserError with the reason if an example breaks a rule of the format.
    """
    width, colour = shutil.get_terminal_size((100, 24)).columns, sys.stdout.isatty()
    for example in examples:
        say("-" * width)
        mark = f"{GREEN}green{PLAIN}" if colour else "[[so]]"
        say(f"{example['id']}: {len(example['ids'])} tokens, {sum(example['mask'])} trained, {mark}")
        say(token_view(tokenizer, example, colour))
        wrong = [] if example.get("sampled") else check_example(example)  # a sample holds what it holds
        if wrong:
            raise UserError(f"example {example['id']} {'; '.join(wrong)}")
    say("-" * width)
    stopless = sum(example["ids"][-1] != chat.END_OF_TURN for example in examples)
    say(f"checked {len(examples)} examples: one BOS each, a trained stop token in all but {stopless} cut ones")
    trainable = list(named.values())
    numbers = sum(p.numel() for p in trainable)
    say(f"trainable: {numbers:,} parameters in {len(trainable)} tensors, the first {next(iter(named))}")
    tokens = min(budget, sum(len(example["ids"]) for example in examples))
    plan = memory_plan(net, trainable, tokens, max(len(example["ids"]) for example in examples), logits)
    for what, size in [*plan, ("estimated peak of a step", sum(size for _, size in plan))]:
        say(f"{size / 1e9:8.2f} GB  {what}")
    return len(examples)
