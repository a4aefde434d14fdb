"""A scalar head on a LoRA adapter: the reward model, r = h_last w with h_last the state of a row's last token.

The adapter shares the frozen base with the policy. On disk it is PEFT's SEQ_CLS adapter, which plain peft opens over
Gemma3TextForSequenceClassification, with reward.json beside it: mean and deviation on held-out reference answers.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Config

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from common import chat, config, data, lora, model, rewards
from common.log import UserError, warn, write_json
from common.runtime import base, checkpoint
from common.runtime.types import Gemma, Tokenizer

ALIKE = (
    "its held-out reference answers all have the same reward, so scores are not divided by their deviation: "
    "train it with more held-out pairs"
)
HEAD = "base_model.model.score.weight"  # where PEFT keeps the head of a SEQ_CLS adapter


def new_head(width: int, device: torch.device, generator: torch.Generator | None = None) -> Parameter:
    """(1, d) fp32 from N(0, 1 / sqrt(d + 1)), so that first rewards have unit size (Stiennon et al. 2020, app. B)."""
    draw = torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
    return torch.nn.Parameter(draw.to(device))


def parameters(net: Gemma, name: str, head: Parameter) -> dict[str, Parameter]:
    """{PEFT's name on disk: parameter} of adapter `name` and its head, in a fixed order."""
    return lora.adapter_parameters(net, name) | {HEAD: head}


def scores(net: Gemma, head: Parameter, tokens: Tensor, mask: Tensor) -> Tensor:
    """Reward of each row (B,) fp32, read at its last masked token; a prompt shared by neighbours is computed once.

    tokens (B, T), mask (B, T-1) with at least one 1 per row, as for model.sequence_logprobs. What lies after the last
    masked token has no influence. Runs the active adapter.
    """
    at = torch.arange(1, tokens.shape[1], device=tokens.device)
    last = (mask.bool() * at).amax(1)
    assert last.all(), "a row without an answer has no reward"
    hidden, index = model.sequence_hidden(net, tokens, mask, last=True)
    state = hidden[index.gather(1, last[:, None])[:, 0]]  # (B, d)
    return (state.float() * head).sum(-1)  # no product that autocast would round


def values(net: Gemma, head: Parameter, tokens: Tensor, mask: Tensor) -> Tensor:
    """V before each token where mask is 1, else 0 -> (B, T-1) fp32: a critic reads the state before the token."""
    hidden, _ = model.target_states(net, tokens, mask)
    return model.spread((hidden.float() * head).sum(-1), mask)


@torch.no_grad()
def score_completions(
    net: Gemma, head: Parameter, prompts: list[list[int]], completions: list[list[int]], budget: int
) -> Tensor:
    """Rewards (n,) fp32 on the CPU of completions after their prompts (lists of ids), `budget` tokens per pass."""
    examples = [{"ids": [*p, *c], "mask": [0] * len(p) + [1] * len(c)} for p, c in zip(prompts, completions)]
    lengths, rewards = [len(example["ids"]) for example in examples], torch.zeros(len(examples))
    for rows in data.micro_batches(range(len(examples)), lengths, budget, sort=False):
        tokens, mask = data.collate([examples[i] for i in rows], head.device)
        rewards[rows] = scores(net, head, tokens, mask).cpu()
    return rewards


def save(net: Gemma, tokenizer: Tokenizer, folder: Path | str, name: str, head: Parameter, reward_stats: dict) -> None:
    """Adapter, head, tokenizer and reward.json: a folder that plain peft and `load` read.

    reward_stats: what reward.json holds: {"base_checkpoint", "base": its fingerprint, "task", "mean", "std"}, the last
    two of the rewards of held-out reference answers.
    """
    model.save_adapter(net, tokenizer, folder, name, reward_stats["base_checkpoint"])
    tensors = {key: p.detach().cpu().contiguous() for key, p in parameters(net, name, head).items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    config = lora.adapter_config(net, name, reward_stats["base_checkpoint"])
    write_json(Path(folder) / "adapter_config.json", config | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]})
    write_json(Path(folder) / "reward.json", reward_stats)


@torch.no_grad()
def restore(net: Gemma, name: str, head: Parameter, folder: Path | str) -> dict:
    """Put back, bit for bit, what `save` wrote, into adapter and head of the same shape; returns its reward_stats."""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    head.copy_(tensors.pop(HEAD))
    lora.fill(lora.adapter_parameters(net, name), tensors)
    return json.loads((Path(folder) / "reward.json").read_text())


def load(net: Gemma, name: str, folder: Path | str, fingerprint: str) -> tuple[Parameter, dict]:
    """Add a trained reward model to `net` as the frozen adapter `name` -> (head, reward_stats).

    `fingerprint` is that of the base in `net`: a reward model belongs to the base it was trained on. UserError if the
    folder is none of ours or does not fit. The adapter that was active stays so.
    """
    folder, active = Path(folder), lora.active(net)
    key = "evaluation.reward_checkpoint" if name == "judge" else "reward.checkpoint"
    checkpoint.verify(folder, optional=True)
    base.check_adapter(folder, key)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        reward_stats = json.loads((folder / "reward.json").read_text())
        if config.get("task_type") != "SEQ_CLS" or not {"mean", "std", "base"} <= reward_stats.keys():
            raise ValueError("not a reward model of train_reward.py")
        state = folder / "state.json"  # of a step-N/, or of best/
        if state.is_file() and json.loads(state.read_text()).get("evaluation", True) is None:
            raise ValueError("saved between two evaluations, with the mean of the one before: name best/ or final/")
        if not all(math.isfinite(reward_stats[name]) for name in ("mean", "std")):
            raise ValueError("its rewards of reference answers have no mean or no deviation")
        if reward_stats["base"] != fingerprint:
            raise ValueError(f"it was trained on another base, {reward_stats['base_checkpoint']}")
        model.check_base(net, folder, key)
        rank, alpha, targets, _ = lora.read_config(json.dumps(config | {"modules_to_save": None}))
        head = torch.nn.Parameter(torch.zeros(1, net.config.hidden_size, device=net.lm_head.weight.device))
        lora.inject(net, name, rank, alpha, targets)
        restore(net, name, head, folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{key}: {folder} cannot be used ({error})") from error
    for parameter in parameters(net, name, head).values():
        parameter.requires_grad_(False)
    lora.use(net, active)
    return head, reward_stats


def check_judge(judge: str, trained: str | list | None) -> None:
    """UserError unless evaluation.reward_checkpoint is a reward model, and none of reward.checkpoint."""
    base.check_adapter(judge, "evaluation.reward_checkpoint")
    for folder in config.paths(trained):
        base.check_adapter(folder, "reward.checkpoint")
        if model.adapter_fingerprint(judge) == model.adapter_fingerprint(folder):
            raise UserError(
                f"evaluation.reward_checkpoint is the model of reward.checkpoint, {folder}: a judge must be another one"
            )


def member(name: str, number: int) -> str:
    """What the adapter of a reward model is called, the first of an ensemble being 0."""
    return f"{name}-{number}" if number else name


def scorer(
    net: Gemma, tokenizer: Tokenizer, reward: Config, fingerprint: str, budget: int, name: str = "reward"
) -> Callable:
    """A function (records, answers as ids) -> (n,): the scores of the model in reward.checkpoint, `name` in `net`.

    With reward.normalize_rewards they have mean 0 and deviation 1 on the model's own held-out reference answers. Of
    several models, each an adapter on the base in `net`, the scores become one by reward.ensemble.
    """
    folders, members = config.paths(reward.checkpoint), {}
    for number, folder in enumerate(folders):
        adapter = member(name, number)
        members[adapter] = load(net, adapter, folder, fingerprint)
        if reward.normalize_rewards and members[adapter][1]["std"] < rewards.SMALLEST_STD:
            warn(f"{folder}: {ALIKE}")
    if len({tuple(model.adapter_fingerprint(folder)) for folder in folders}) < len(folders):
        raise UserError(f"reward.checkpoint: the same model twice among {', '.join(folders)}")

    def score(records, answers):
        prompts = [chat.encode_prompt(tokenizer, record["prompt"]) for record in records]
        rows = []
        for adapter, (head, reward_stats) in members.items():
            with lora.using(net, adapter):
                scores = score_completions(net, head, prompts, answers, budget)
            if reward.normalize_rewards:
                scores = rewards.normalise(scores, reward_stats["mean"], reward_stats["std"])
            rows.append(scores)
        return rows[0] if len(rows) == 1 else rewards.ensemble(torch.stack(rows), reward.ensemble)

    return score
