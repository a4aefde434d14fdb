"""What `--explain` shows: which tokens are trained, the checks on them, and the memory a step will take, by formula."""

import itertools
import shutil

from common import chat
from common.log import UserError

GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"
LIBRARIES = 0.5e9  # bytes of Python, torch and transformers before any weight
CHUNK, BLOCK = 256, 16  # rows of logits at a time on CPU, and of their fp32 copy (common/losses.py)


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


def memory_plan(net, trainable, training_tokens, length):
    """[(what, bytes)] of one training step: weights, optimizer, logits, activations, libraries."""
    config, head = net.config, net.lm_head.weight
    numbers = sum(p.numel() for p in trainable)
    return [
        ("libraries", LIBRARIES),
        ("weights", sum(p.numel() * p.element_size() for p in net.parameters())),
        ("gradients and Adam moments of what is trained, fp32", numbers * 4 * 3),
        ("one chunk of logits", config.vocab_size * (min(CHUNK, training_tokens) * head.element_size() + BLOCK * 4)),
        (
            f"activations of {training_tokens} tokens",
            training_tokens * activation_bytes_per_token(config, head.element_size(), length),
        ),
    ]


def show(examples, tokenizer, net, named, budget):
    """Print the first batch as it will be trained and the plan; returns the number of examples shown.

    UserError with the reason if an example breaks a rule of the format.
    """
    width = shutil.get_terminal_size((100, 24)).columns
    for example in examples:
        trained = sum(example["mask"])
        print("-" * width)
        print(f"{example['id']}: {len(example['ids'])} tokens, {trained} trained ({GREEN}green{PLAIN})")
        print(token_view(tokenizer, example))
        wrong = check_example(example)
        if wrong:
            raise UserError(f"example {example['id']} {'; '.join(wrong)}")
    print("-" * width)
    print(
        f"checks passed on {len(examples)} examples: one BOS each, a trained stop token, no other control token trained"
    )
    trainable = list(named.values())
    numbers = sum(p.numel() for p in trainable)
    print(f"trainable: {numbers:,} parameters in {len(trainable)} tensors, the first {next(iter(named))}")
    longest = max(len(example["ids"]) for example in examples)
    tokens = min(budget, sum(len(example["ids"]) for example in examples))
    plan = memory_plan(net, trainable, tokens, longest)
    for what, size in plan:
        print(f"{size / 1e9:8.2f} GB  {what}")
    print(f"{sum(size for _, size in plan) / 1e9:8.2f} GB  estimated peak of a step")
    return len(examples)
