"""Policy, reference, critic and reward model as adapters on one frozen base; full fine-tuning alone holds a second one.

policy     trained from zero or from a saved adapter, or all weights
reference  what the policy is at the start: a frozen copy of its adapter, or the bare base
critic     trained, with a scalar head that starts at zero: V = 0
reward     frozen, with its own head (reward_model.load)
"""

import copy
from types import SimpleNamespace

import torch

from common import lora, model, reward_model
from common.log import UserError, say


def build(folder, device, dtype, peft, wanted):
    """The roles of a run -> namespace: net (the policy), frozen (what holds the others, net itself but for full
    fine-tuning), tokenizer, adapter (the policy's name or None), head (the critic's), trained ({role: {name: tensor}}),
    referred (is there a reference).

    peft: section `model`; wanted: which of reference, critic, reward. Adapters are drawn from torch's generator.
    """
    full = peft.peft_type == "none"
    if full and peft.adapter:
        raise UserError(
            "model.adapter: full fine-tuning starts from a whole model; merge the adapter first (see README)"
        )
    dtype = torch.float32 if full else dtype  # full fine-tuning keeps fp32 masters, or small steps vanish
    net, tokenizer = model.load(folder, device, dtype, quantize=peft.peft_type == "qlora")
    adapter, frozen, head = None if full else "policy", net, None
    if full:
        frozen = copy.deepcopy(net).requires_grad_(False) if wanted else None
        net.requires_grad_(True)
    elif peft.adapter:
        rank, alpha, targets = model.load_adapter(net, adapter, peft.adapter)
        if "reference" in wanted:
            lora.copy_adapter(net, adapter, "reference")
        say(f"adapter sizes are those of {peft.adapter}: r {rank}, alpha {alpha:g}, {', '.join(targets)}")
    else:
        lora.inject(net, adapter, peft.peft_rank, peft.peft_alpha, peft.peft_target_modules, peft.peft_dropout)
    trained = {"policy": dict(net.named_parameters()) if full else lora.adapter_parameters(net, adapter)}
    if "critic" in wanted:
        lora.inject(frozen, "critic", peft.peft_rank, peft.peft_alpha, peft.peft_target_modules)
        head = torch.nn.Parameter(torch.zeros(1, net.config.hidden_size, device=device))
        trained["critic"] = reward_model.parameters(frozen, "critic", head)
    lora.use(net, adapter)
    net.eval()  # no dropout: policy and reference must agree before the first update
    return SimpleNamespace(net=net, frozen=frozen, tokenizer=tokenizer, adapter=adapter, head=head, trained=trained,
                           referred="reference" in wanted)  # fmt: skip


def named(trained):
    """{name: parameter} of all roles for an optimizer's state: the policy's as on disk, others behind their role."""
    others = {f"{role}.{name}": p for role, part in trained.items() if role != "policy" for name, p in part.items()}
    return trained["policy"] | others


def forward(roles, role, tokens, mask, temperature=1.0, entropy=False):
    """What a role says of tokens (B, T) and mask: {"logprobs": (B, T-1)}, or {"values"}.

    With `entropy`, that of each distribution too, where there is a gradient: it has a price in the loss.
    """
    net = roles.net if role == "policy" else roles.frozen
    with lora.using(net, role):
        if role == "critic":
            return {"values": reward_model.values(net, roles.head, tokens, mask)}
        if role == "policy" and entropy and torch.is_grad_enabled():
            return dict(zip(("logprobs", "entropy"),
                            model.sequence_logprobs_and_entropy(net, tokens, mask, temperature)))  # fmt: skip
        return {"logprobs": model.sequence_logprobs(net, tokens, mask, temperature)}
