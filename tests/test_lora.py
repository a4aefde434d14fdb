"""LoRA algebra, switching, and PEFT as the oracle: its own library must open our files and agree."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common import lora, model
from common.log import UserError
from tests.test_gemma import random_gemma, sequences

TOKENS = torch.stack([row[:7] for row in sequences() if len(row) >= 7])


def adapted(name="policy", rank=4, targets=lora.TARGETS, dropout=0.0, noise=0.2):
    net = random_gemma()
    lora.inject(net, name, rank, 8, targets, dropout)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(net, name).values():
            parameter.add_(torch.randn_like(parameter) * noise)
    return net


def logits(net):
    with torch.no_grad():
        return net(TOKENS, use_cache=False).logits


def test_a_fresh_adapter_changes_nothing_and_only_it_trains():
    net = random_gemma()
    before = logits(net)
    lora.inject(net, "policy", 4, 8)
    assert torch.equal(logits(net), before)
    trainable = [name for name, p in net.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * 6 and all("lora_" in name for name in trainable)


def test_the_start_is_drawn_by_the_cpu_on_every_device():
    """So a run begins with the same adapter on a GPU; here on a device that has no generator."""
    after = []
    for device in ("cpu", "meta"):
        net = random_gemma().to(device)
        torch.manual_seed(0)
        lora.inject(net, "policy", 4, 8)
        after.append(torch.rand(3))
    torch.manual_seed(0)
    assert torch.equal(*after) and not torch.equal(after[0], torch.rand(3))


def test_forward_and_gradients_equal_the_formula():
    torch.manual_seed(0)
    base, x = nn.Linear(10, 6, bias=False), torch.randn(3, 5, 10, requires_grad=True)
    base.requires_grad_(False)
    module = lora.LoraLinear(base)
    module.lora_A["p"], module.lora_B["p"] = nn.Parameter(torch.randn(2, 10)), nn.Parameter(torch.randn(6, 2))
    module.scale["p"], module.active = 1.7, "p"
    a, b, weights = module.lora_A["p"], module.lora_B["p"], torch.randn(3, 5, 6)
    ours = torch.autograd.grad((module(x) * weights).sum(), (x, a, b))
    formula = x @ base.weight.T + 1.7 * (x @ a.T) @ b.T
    theirs = torch.autograd.grad((formula * weights).sum(), (x, a, b))
    assert (module(x) - formula).abs().max() < 1e-5
    for mine, right in zip(ours, theirs):
        assert (mine - right).abs().max() < 1e-4


def test_switching_off_is_the_base_and_a_copy_is_the_reference():
    net, base = adapted(), logits(random_gemma())
    trained = logits(net)
    assert (trained - base).abs().max() > 0.1
    lora.copy_adapter(net, "policy", "reference")
    with lora.using(net, None):
        assert torch.equal(logits(net), base)
    with lora.using(net, "reference"):
        assert torch.equal(logits(net), trained)
        with torch.no_grad():
            next(iter(lora.adapter_parameters(net, "policy").values())).add_(1.0)
        assert torch.equal(logits(net), trained)
    assert not torch.equal(logits(net), trained)
    assert not any(p.requires_grad for p in lora.adapter_parameters(net, "reference").values())


def test_each_adapter_gets_its_own_gradient():
    """The trap of switching before the backward: here the graph remembers which adapter made it."""
    net = adapted()
    lora.inject(net, "critic", 2, 2)
    with lora.using(net, "policy"):
        loss = net(TOKENS, use_cache=False).logits.square().mean()
    with lora.using(net, "critic"):
        loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in lora.adapter_parameters(net, "policy").values())
    assert all(p.grad is None for p in lora.adapter_parameters(net, "critic").values())


def test_merged_equals_adapter_and_leaves_the_base_alone(tmp_path):
    from transformers import Gemma3ForCausalLM

    net = adapted()
    state = model.plain_state(net, "policy")
    fresh = random_gemma(seed=9)
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    assert isinstance(fresh, Gemma3ForCausalLM)
    assert (logits(fresh) - logits(net)).abs().max() < 1e-4
    again = model.plain_state(net, "policy")
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_dropout_only_while_training():
    net = adapted(dropout=0.5)
    torch.manual_seed(0)
    assert torch.equal(logits(net), logits(net))
    net.train()
    assert not torch.equal(logits(net), logits(net))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], list(lora.TARGETS)])
def test_plain_peft_opens_the_files_and_agrees(tmp_path, targets, tiny_model):
    import peft
    from transformers import AutoModelForCausalLM

    net, tokenizer = tiny_model
    folder = model.base.resolve("tiny")
    lora.inject(net, "policy", 4, 8, targets)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(net, "policy").values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_adapter(net, tokenizer, tmp_path, "policy", folder)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    with torch.no_grad():
        right = theirs(TOKENS, use_cache=False).logits
    assert (logits(net) - right).abs().max() < 1e-4
    ours_names = set(load_file(tmp_path / "adapter_model.safetensors"))
    theirs.save_pretrained(tmp_path / "again")
    assert ours_names == set(load_file(tmp_path / "again" / "adapter_model.safetensors"))

    back, _ = model.load("tiny", torch.device("cpu"), torch.float32)  # and what peft wrote opens here
    model.load_adapter(back, "policy", tmp_path / "again")
    assert torch.equal(logits(back), logits(net))

    model.save_model(back, tokenizer, tmp_path / "merged", "policy")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with torch.no_grad():
        assert (merged(TOKENS, use_cache=False).logits - right).abs().max() < 1e-4


def test_targets_outside_the_seven_linears_are_refused():
    for targets in (["embed_tokens"], ["q_proj", "lm_head"], []):
        with pytest.raises(ValueError, match="targets"):
            lora.inject(random_gemma(), "policy", 4, 8, targets)


def peft_adapter(folder, **changes):
    """An adapter that peft makes on the tiny base, with all its numbers drawn anew, as it saves it; -> its logits."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model.base.resolve("tiny"))
    kind = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    net = peft.get_peft_model(base, peft.LoraConfig(**kind | changes)).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
        right = net(TOKENS, use_cache=False).logits
    net.save_pretrained(folder)
    return right


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"task_type": None},  # then it notes in auto_mapping what the base was
        {"layers_to_transform": [], "rank_pattern": {}, "revision": "main", "megatron_core": "megatron.core"},
    ],
)
def test_what_peft_writes_of_a_plain_lora_loads_and_agrees(tmp_path, tiny_model, changes):
    right = peft_adapter(tmp_path, **changes)
    path = tmp_path / "adapter_config.json"
    model.load_adapter(tiny_model[0], "policy", tmp_path)
    assert (logits(tiny_model[0]) - right).abs().max() < 1e-4
    later = {"use_next": False, "next_config": None, "next_pattern": {}, "next_layers": [], "layers_pattern": ""}
    path.write_text(json.dumps(json.loads(path.read_text()) | later))
    model.load_adapter(tiny_model[0], "again", tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "lora_only"},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": 0},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"exclude_modules": ["k_proj"]},
        {"trainable_token_indices": [1, 2]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()),
)
def test_another_method_of_peft_is_refused_by_file_and_key(tmp_path, tiny_model, changes):
    """D2: PiSSA and OLoRA change the base itself: without a word, log-probs were up to 3.4 nats from peft's."""
    peft_adapter(tmp_path, **changes)
    (key,) = changes
    with pytest.raises(UserError, match=rf"cannot be used \(adapter_config\.json: .* not supported here: {key}="):
        model.load_adapter(tiny_model[0], "policy", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"r": "8"},
        {"lora_dropout": 1.5},
        {"lora_alpha": math.nan},
        {"init_lora_weights": "corda"},
        {"loftq_config": {"loftq_bits": 4}},
        {"target_modules": "all-linear"},
        {"lora_bias": True},
        {"layer_replication": [[0, 4], [2, 6]]},
        {"of_a_later_peft": 1},
        {"of_a_later_peft": 0},
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path, change, tiny_model):
    net, tokenizer = tiny_model
    lora.inject(net, "policy", 2, 4)
    model.save_adapter(net, tokenizer, tmp_path, "policy", "tiny")
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"cannot be used \(adapter_config\.json: .*{next(iter(change))}"):
        model.load_adapter(net, "other", tmp_path)


def test_damaged_or_foreign_adapter_files_are_refused(tmp_path, tiny_model):
    net, tokenizer = tiny_model
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        model.load_adapter(net, "p", tmp_path)
    lora.inject(net, "policy", 2, 4)
    model.save_adapter(net, tokenizer, tmp_path, "policy", "tiny")
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be used"):
        model.load_adapter(net, "p", tmp_path)
    model.save_adapter(adapted(rank=2), tokenizer, tmp_path, "policy", "tiny")  # made for another size
    with pytest.raises(UserError, match="shape"):
        model.load_adapter(net, "q", tmp_path)


def test_qlora_matches_its_dequantised_self_and_trains(tiny_model):
    """The 4-bit base: outputs and adapter gradients equal those of a plain model holding the dequantised weights."""
    net, _ = tiny_model
    model.quantise(net)
    torch.manual_seed(1)
    lora.inject(net, "policy", 4, 8, ["q_proj", "down_proj"])
    plain, _ = model.load("tiny", torch.device("cpu"), torch.float32)
    lora.wrap(plain)
    with torch.no_grad():
        for name, module in lora.lora_modules(net).items():
            lora.lora_modules(plain)[name].base.weight.copy_(lora.frozen_weight(module.base))
    torch.manual_seed(1)
    lora.inject(plain, "policy", 4, 8, ["q_proj", "down_proj"])
    mask = torch.ones(len(TOKENS), TOKENS.shape[1] - 1)
    grads = []
    for one in (net, plain):
        with torch.no_grad():
            model.sequence_logprobs(one, TOKENS, mask)  # a forward without gradients first: the 4-bit trap on CPU
        loss = -model.sequence_logprobs(one, TOKENS, mask).mean()
        loss.backward()
        grads.append([p.grad for p in lora.adapter_parameters(one, "policy").values()])
    assert all(a is not None and (a - b).abs().max() < 1e-5 for a, b in zip(*grads))
    assert sum(g.abs().sum() for g in grads[0]) > 0
    assert net.model.embed_tokens.weight.dtype == torch.float32  # as it was loaded: nothing upcasts the embedding
