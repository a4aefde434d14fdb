"""What `--explain` shows: which tokens are trained, checks on them, and the memory of a step by formula.

The script then runs its loop for a step or a few, which Run times and forgets.
"""

import itertools
import math
import shutil
import sys
from collections.abc import Sequence
from types import SimpleNamespace as Config
from typing import Any

import torch
from torch.nn import Parameter

from common import chat, dist, lora, model, products
from common.log import UserError, say
from common.runtime import watch
from common.runtime.flops import linears
from common.runtime.types import Gemma, GemmaConfig, Tokenizer

NEARLY_ALL = 0.95  # right answers
PROMPTS = 16  # sampled by --explain of online RL, to say whether it can learn
GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"
LIBRARIES = 0.5e9  # bytes of Python, torch, transformers and Gemma's tokenizer before any weight
WORD = 1200  # bytes a word that reading a tokenizer leaves in the heap until the first step trims it: 0.3 GB of Gemma's

Plan = dict[str, list[tuple[str, float]]]  # {phase: [(what, bytes)]}


def token_view(tokenizer: Tokenizer, example: dict, colour: bool = True, limit: int = 400) -> str:
    """One example as text, trained tokens in colour (or in [[ ]]) and the others dim; long ones are cut with a mark."""
    pairs = list(zip(example["ids"], example["mask"]))
    parts = []
    for trained, run in itertools.groupby(pairs[:limit], key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run])
        before, after = (GREEN if trained else DIM, PLAIN) if colour else ("[[", "]]") if trained else ("", "")
        parts.append(f"{before}{text}{after}")
    cut = len(pairs) - limit
    return "".join(parts) + (f" ... and {cut} more tokens" if cut > 0 else "")


def check_example(example: dict) -> list[str]:
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


def activation_bytes_per_token(
    config: GemmaConfig, bytes_per_value: int, length: int, full: bool = False
) -> list[float]:
    """What the backward keeps of one token in each layer, in a sequence of `length` tokens (see common/gemma.py).

    full: the norms are trained as well, and transformers' own keep their input and what they normalised in fp32.
    """
    d, dim = config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads * dim, config.num_key_value_heads * dim
    norms = 4 * d * (8 if full else bytes_per_value)  # inputs of the four norms
    inputs = 2 * d  # of the adapters, or trained linears, behind two of them
    attention = (heads + groups) + (heads + 2 * groups) + heads  # before and after norm and rotation; the output
    mlp = 4 * config.intermediate_size  # gate, up, the activation, and the input of down's adapter
    each = norms + (inputs + attention + mlp) * bytes_per_value
    softmax = [config.num_attention_heads * keys * bytes_per_value for keys in _keys(config, length)]
    return [each + weights for weights in softmax]


def _keys(config, length):
    """For each layer, the keys that a token of a sequence of `length` is multiplied with, on average.

    Queries go in blocks of 128 (gemma.py): the half of the square that no query sees is left out but for the blocks.
    """
    reach = {"full_attention": length, "sliding_attention": config.sliding_window + 127}
    return [min(length, length / 2 + 64, reach[kind]) for kind in config.layer_types]


def memory_plan(
    net: Gemma,
    trainable: list[Parameter],
    batch: tuple[int, int, bool],
    frozen: Gemma | None = None,
    logits: bool = True,
    decodes: Sequence[tuple[int, int]] = (),
) -> Plan:
    """{phase: [(what, bytes)]} of a step: "always", and for each phase what it holds beside that. docs/scaling.md.

    batch: (tokens, longest length, are there more micro-batches) of a micro-batch; frozen: what holds the other roles,
    if it is not `net`; logits: false for a reward model, which never meets the vocabulary; decodes: [(rows, slots)] of
    rollouts and held-out answers. Autocast counts where it is switched on, as it does in the step.
    """
    config, head, kind = net.config, net.lm_head.weight, net.lm_head.weight.device.type
    full, cast, cpu = head.requires_grad, torch.is_autocast_enabled(kind), kind == "cpu"
    width, tokens = 2 if cast else head.element_size(), batch[0]
    numbers, body = sum(p.numel() for p in trainable), sum(linears(config).values()) * config.num_hidden_layers
    # rows of logits, of their fp32 copy, and of the distributions that the KL is measured between
    rows, copied, both_rows = (min(n, tokens) for n in ((256, 4, 16) if cpu else (1024, 1024, 1024)))
    copied = 0 if width == 4 else copied
    optimizer: list[tuple[str, float]] = [("gradients and Adam moments of what is trained, fp32", numbers * 4 * 3)]
    moments = [("Adam moments of what is trained, fp32", numbers * 4 * 2)]
    update = [*(moments if full and not batch[2] else optimizer)]  # of all weights the first backward makes gradients
    update += [("one chunk of logits", config.vocab_size * (rows * width + copied * 4))] if logits else []
    update += [("the head's gradient and one chunk's part of it", head.numel() * (4 + width))] if full else []
    update += [("weights cast to bf16", (body + head.numel()) * 2)] if cast else []
    kept = activation_bytes_per_token(config, width, batch[1], full)
    if net.model.gradient_checkpointing:  # the inputs of all layers, and one layer's activations
        update += [
            (f"inputs of the layers, {tokens} tokens", tokens * config.num_hidden_layers * config.hidden_size * width)
        ]
        kept = [max(kept)]
    update += [(f"activations of {tokens} tokens", tokens * sum(kept))]
    update += [("the layer at work", tokens * 4 * config.intermediate_size * width)]
    plan = {"always": _held(net, frozen, body), "loading": _loading(net, body) if cpu else [], "update": update}
    if full:
        roots = head.numel() * 2 if cpu else numbers  # tensor by tensor, or of all at once
        plan["optimizer"] = [*optimizer, ("roots of Adam's second moments", roots * 4)]
    if dist.world_size() > 1:
        plan["all-reduce"] = [*optimizer, ("the gradients once more, in one piece", numbers * 4)]
    if frozen is not None:
        both = [("two chunks of logits", 2 * rows * config.vocab_size * head.element_size())]
        plan["measuring the KL"] = [*optimizer, *both, ("their distributions", 6 * both_rows * config.vocab_size * 4)]
    if decodes:
        plan["sampling"] = optimizer + _sampling(net, decodes, width)
    return plan


def _held(net, frozen, body):
    """What is there from the first step to the last."""
    parts = [("libraries and tokenizer", LIBRARIES), ("weights", model.memory_bytes(net))]
    if frozen is not None and frozen is not net:
        parts.append(("the frozen second copy, with what is on it", model.memory_bytes(frozen)))
    head = net.lm_head.weight
    if model.is_quantised(net) and head.device.type == "cpu":
        places = "places in the heap that the linears had before they were 4-bit, until the first step gives them back"
        parts.append((places, body * head.element_size()))
        if head.dtype == torch.bfloat16:
            parts.append(("pages of the weight file behind the linears, which the system may drop", body * 2))
    return parts


def _loading(net, body):
    """What reading a bf16 file takes until the first step. In bf16 the weights are the file's own pages."""
    head, tokenizer = net.lm_head.weight, ("what reading the tokenizer leaves", WORD * net.config.vocab_size)
    if head.dtype == torch.bfloat16:
        return [tokenizer]
    return [("the weight file", (body + head.numel()) * 2), tokenizer]


def _sampling(net, decodes, width):
    """decoder.Decoder's copy of the weights, its cache, and the logits of rollouts.sample."""
    config, head = net.config, net.lm_head.weight
    cpu, modules = head.device.type == "cpu", lora.lora_modules(net)
    adapted = {name.rsplit(".", 1)[-1] for name, module in modules.items() if module.active in module.lora_A}
    packed = products.can_pack(head.device.type, {2: torch.bfloat16, 4: torch.float32}[width])
    every = packed or model.is_quantised(net) or width != head.element_size()  # otherwise some are the model's own
    copied = sum(n for name, n in linears(config).items() if every or name in adapted or "_proj" not in name)
    heads = int(packed) + int(width != head.element_size())  # the packed one, the cast one
    weights = copied * config.num_hidden_layers + heads * head.numel()
    most = [(min(rows, 64 if cpu else 256), slots) for rows, slots in decodes]
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width
    at_once = max(min(rows, 32) if cpu else rows for rows, _ in most)
    return [
        ("the sampler's copy of the weights", weights * width),
        ("its keys and values", max(rows * slots for rows, slots in most) * slot),
        ("logits of the rows", at_once * config.vocab_size * (width if cpu else width + 4)),
        *([("what reading the tokenizer left, in the first step", WORD * config.vocab_size)] if cpu else []),
    ]


def rollout_sizes(prompts: Any, rl: Config, evaluation: Config) -> dict:
    """What `show` wants to know of online RL: {"total": tokens of an update, "decodes"}, of one rank.

    prompts: a PromptDataset; its longest prompts count, and every answer as if it ran to its limit.
    """
    longest = {split: max(len(prompt.ids) for prompt in getattr(prompts, split)) for split in ("train", "val")}
    per_rank = max(1, rl.rollout_size // dist.world_size())
    mean = sum(len(prompt.ids) for prompt in prompts.train) / len(prompts.train)
    total = math.ceil(per_rank / rl.minibatches) * (mean + rl.group_size * rl.max_new_tokens)
    decodes = [
        (per_rank * rl.group_size, longest["train"] + rl.max_new_tokens),
        (math.ceil(len(prompts.val) / dist.world_size()), longest["val"] + evaluation.max_new_tokens),
    ]
    return {"total": round(total), "decodes": decodes}


def peak(plan: Plan) -> tuple[float, str]:
    """(bytes, phase) of the phase of a memory_plan that holds most."""
    sums = {phase: sum(size for _, size in parts) for phase, parts in plan.items()}
    always = sums.pop("always")
    return max((always + size, phase) for phase, size in sums.items())


def show(
    examples: list[dict],
    tokenizer: Tokenizer,
    net: Gemma,
    named: dict[str, Parameter],
    budget: int,
    total: int | None = None,
    **plan: Any,
) -> None:
    """Print the first batch as it will be trained, and the memory plan.

    budget: tokens of a micro-batch; total: tokens of a whole update where these examples are not all of it; plan:
    options of memory_plan. UserError with the reason if an example breaks a rule of the format.
    """
    width, colour = shutil.get_terminal_size((100, 24)).columns, sys.stdout.isatty()
    for example in examples:
        say("-" * width)
        mark = f"in {GREEN}green{PLAIN}" if colour else "in [[ ]]"
        say(f"{example['id']}: {len(example['ids'])} tokens, {sum(example['mask'])} of them trained, shown {mark}")
        say(token_view(tokenizer, example, colour))
        wrong = [] if example.get("sampled") else check_example(example)  # a sample holds what it holds
        if wrong:
            raise UserError(f"example {example['id']} {'; '.join(wrong)}")
    say("-" * width)
    checked = [example for example in examples if not example.get("sampled")]
    ends = [[token for token, m in zip(example["ids"], example["mask"]) if m][-1] for example in examples]
    stopped = sum(token in chat.STOP_TOKENS for token in ends)
    if checked:
        say(f"checked {len(checked)} examples: one BOS token each, of control tokens only <end_of_turn> is trained")
    say(f"{stopped} of {len(examples)} examples end with a stop token, the others were cut off before one")
    trainable = list(named.values())
    numbers = sum(p.numel() for p in trainable)
    say(f"trainable: {numbers:,} parameters in {len(trainable)} tensors, the first {next(iter(named))}")
    total = total or sum(len(example["ids"]) for example in examples)
    longest = max(len(example["ids"]) for example in examples)
    say_plan(memory_plan(net, trainable, (min(budget, total), longest, total > budget), **plan))


def say_prospects(signs: dict[str, float], correct: str | None) -> None:
    """Say what the policy's own answers earn before any training, and in one line whether RL can learn from them.

    signs: of experience.summary and group_metrics; correct: the part of the reward that is 1 for a right answer.
    """
    named = {"reward": "reward", "reward_std": "its deviation", "group_spread": "share of groups with any spread"}
    named |= {name: name for name in signs if name.startswith("pass@")}
    named |= {"stop_rate": "share that stops", "length": "tokens"}
    shown = [f"{words} {signs[name]:.3g}" for name, words in named.items() if name in signs]
    say(f"answers before training have {', '.join(shown)}")
    say(f"verdict: {verdict(signs, signs.get(f'reward/{correct}', 0.0))}")


def verdict(signs: dict[str, float], right: float) -> str:
    """Can RL learn, and what to do if not. right: share of right answers, 0 where none are known."""
    what_to_do = "SFT first, take easier data, or larger groups"
    spread = signs.get("group_spread")
    if right > NEARLY_ALL:
        return f"{right:.0%} of the answers are right already: take harder data"
    if spread is None:  # a critic compares answers to different prompts
        flat = signs["reward_std"] == 0
        return f"all rewards are equal: {what_to_do}" if flat else "the rewards differ: RL can learn"
    if any(name.startswith("pass@") and share == 0 for name, share in signs.items()):
        return f"no group has a right answer, RL could learn no more than their form: {what_to_do}"
    if spread == 0:
        return f"within no group do the rewards differ, RL would learn nothing: {what_to_do}"
    if spread < watch.FEW_GROUPS:
        return f"in only {spread:.0%} of the groups do the rewards differ, RL would learn slowly: {what_to_do}"
    return f"in {spread:.0%} of the groups the rewards differ: RL can learn"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 99.5:  # "%.2g" of more is 1e+02
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def say_plan(plan: Plan) -> None:
    """Each part of the plan that is not 0.00 GB, and the sum of what is there at the worst moment."""
    for phase, parts in plan.items():
        for what, size in parts:
            if size >= 5e6:
                say(f"{size / 1e9:8.2f} GB  {phase}: {what}")
    size, phase = peak(plan)
    say(f"{size / 1e9:8.2f} GB  estimated peak, in the phase `{phase}`")
