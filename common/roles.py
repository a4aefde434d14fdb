"""Policy, reference, critic and reward model as adapters on one frozen base; full fine-tuning alone holds a second one.

policy     trained from zero or from a saved adapter, or all weights
reference  what the policy is at the start: a frozen copy of its adapter, or the bare base
critic     trained, with a scalar head that starts at zero: V = 0
reward     frozen, with its own head (reward_model.load)
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace as Config

import torch
from safetensors.torch import load_file, save_file
from torch.nn import Parameter

from common import chat, config, lora, model, optim, reward_model, rewards
from common.log import UserError, say
from common.runtime import flops
from common.runtime.types import Gemma, Tokenizer


@dataclass
class Roles:
    """The models of a run. The policy is `net`; the other roles are adapters of `frozen`."""

    net: Gemma
    frozen: Gemma | None  # net itself; in full fine-tuning a copy of the start, or None where nothing is on it
    tokenizer: Tokenizer
    adapter: str | None  # the policy's name in net; None in full fine-tuning
    has_reference: bool
    trained: dict = field(default_factory=dict)  # {role: {name: parameter}}
    head: Parameter | None = None  # (1, d), the critic's
    scorers: list = field(default_factory=list)  # names of the reward models' adapters in frozen
    judge: Callable | None = None  # (records, answers as ids) -> (n,): a reward model that no policy is trained on

    @property
    def parameters(self) -> dict:
        """{role: its parameters}"""
        return {role: list(named.values()) for role, named in self.trained.items()}

    def adapter_size(self, name: str | None) -> int:
        """Numbers in an adapter, for its FLOPs; 0 for none, as of a reference that is the bare base."""
        nets = {self.net, self.frozen} - {None} if name else set()
        return max([0, *(sum(p.numel() for p in lora.adapter_parameters(net, name).values()) for net in nets)])

    @property
    def named(self) -> dict:
        """{name: parameter} of all roles for an optimizer's state: the policy's as on disk, others after their role."""
        others = {
            f"{role}.{name}": parameter
            for role, named in self.trained.items()
            if role != "policy"
            for name, parameter in named.items()
        }
        return self.trained["policy"] | others


def load_policy(
    folder: str, device: torch.device, dtype: torch.dtype, peft: Config, seed: int, name: str = "policy"
) -> tuple[Gemma, Tokenizer, str | None, dict[str, Parameter]]:
    """(net, tokenizer, adapter's name or None, {name: parameter to train}) by section `model` of the config.

    Adapters are drawn from torch's generator, seeded here: the policy's first, then the critic's (build).
    """
    full = peft.peft_type == "none"
    if full and peft.adapter:
        raise UserError(
            "model.adapter: full fine-tuning starts from a whole model; merge the adapter first (see docs/training.md)"
        )
    weights_dtype = torch.float32 if full else dtype  # full fine-tuning keeps fp32 masters, or small steps vanish
    net, tokenizer = model.load(folder, device, weights_dtype, quantize=peft.peft_type == "qlora")
    torch.manual_seed(seed)
    if full:
        net.requires_grad_(True)
        return net, tokenizer, None, dict(net.named_parameters())
    if peft.adapter:
        model.load_adapter(net, name, peft.adapter)
        say(f"starting from {peft.adapter}, whose sizes the adapter takes")
    else:
        lora.inject(net, name, peft.peft_rank, peft.peft_alpha, peft.peft_target_modules, peft.peft_dropout)
    return net, tokenizer, name, lora.adapter_parameters(net, name)


def build(
    folder: str,
    device: torch.device,
    dtype: torch.dtype,
    peft: Config,
    seed: int,
    reference: bool,
    critic: bool,
    reward: bool,
) -> Roles:
    """The models of a run of RL. peft: section `model`; reference, critic, reward: is there such a role?

    The reward model's adapter is loaded later, onto `frozen` (reward_model.scorer).
    """
    net, tokenizer, adapter, named = load_policy(folder, device, dtype, peft, seed)
    frozen = net
    if adapter is None:
        frozen = copy.deepcopy(net).requires_grad_(False) if reference or critic or reward else None
    elif peft.adapter and reference:
        lora.copy_adapter(net, adapter, "reference")
    models = Roles(net, frozen, tokenizer, adapter, reference, {"policy": named})
    if critic:
        lora.inject(frozen, "critic", peft.peft_rank, peft.peft_alpha, peft.peft_target_modules)
        models.head = torch.nn.Parameter(torch.zeros(1, net.config.hidden_size, device=device))
        models.trained["critic"] = reward_model.parameters(frozen, "critic", models.head)
    lora.use(net, adapter)
    net.eval()  # no dropout: policy and reference must agree before the first update
    return models


def load_scorers(models: Roles, cfg: Config, fingerprint: str, trained: bool, judged: bool) -> Callable:
    """The function (records, answers as ids) -> (rewards, parts) of rewards.scorer; fills models.judge if `judged`.

    trained: does section `reward` ask for a reward model; fingerprint: of the base.
    """
    how = fingerprint, cfg.training.micro_batch_tokens
    trained_scorer = None
    if trained:
        count = len(config.paths(cfg.reward.checkpoint))
        models.scorers = [reward_model.member("reward", number) for number in range(count)]
        trained_scorer = reward_model.scorer(models.frozen, models.tokenizer, cfg.reward, *how)
    if judged:
        reward_model.check_judge(cfg.evaluation.reward_checkpoint, cfg.reward.checkpoint if trained else None)
        settings = Config(checkpoint=cfg.evaluation.reward_checkpoint, normalize_rewards=True)
        models.judge = reward_model.scorer(models.frozen, models.tokenizer, settings, *how, "judge")
    return rewards.scorer(cfg.task, cfg.reward, lambda ids: chat.decode(models.tokenizer, ids), trained_scorer)


def make_optimizer(models: Roles, training: Config, rl: Config) -> torch.optim.AdamW:
    """AdamW over policy and critic, each with its own learning rate; no weight decay on norms."""
    policy_lr = training.learning_rate if rl.learning_rate is None else rl.learning_rate
    groups = optim.adamw_groups(models.trained["policy"], policy_lr, training.weight_decay)
    groups += optim.adamw_groups(models.trained.get("critic", {}), rl.critic_learning_rate, training.weight_decay)
    return torch.optim.AdamW(groups)


def flops_per_token(models: Roles, length: int) -> float:
    """What a trained token of the policy is expected to cost, see flops.per_token."""
    return flops.per_token(models.net.config, length, models.adapter_size(models.adapter), models.adapter is None)


def save(models: Roles, optimizer: torch.optim.Optimizer, folder: Path | str, base_name: str) -> None:
    """Write the policy, each other trained role as <role>.safetensors and the optimizer's state into a step folder."""
    model.save(models.net, models.tokenizer, folder, models.adapter, base_name)
    optim.save(optimizer, models.named, folder)
    for role, named in models.trained.items():
        if role != "policy":
            tensors = {name: parameter.detach().contiguous() for name, parameter in named.items()}
            save_file(tensors, Path(folder) / f"{role}.safetensors")


def restore(models: Roles, optimizer: torch.optim.Optimizer, folder: Path | str) -> None:
    """Put back, bit for bit, what `save` wrote."""
    optim.load(optimizer, models.named, folder)
    model.restore(models.net, models.adapter, folder)
    for role, named in models.trained.items():
        if role != "policy":
            lora.fill(named, load_file(Path(folder) / f"{role}.safetensors"))
