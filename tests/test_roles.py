"""Policy, reference and critic on one frozen base: what is trained, what is shared, what is put back."""

from types import SimpleNamespace

import pytest
import torch

from common import lora, roles
from common.log import UserError
from tests import inputs

CPU = torch.device("cpu")
PEFT = {"peft_rank": 4, "peft_alpha": 8, "peft_target_modules": list(lora.TARGETS), "peft_dropout": 0.0}


def section(**changes):
    """Section `model` of a config."""
    return SimpleNamespace(**{**PEFT, "peft_type": "lora", "adapter": None, **changes})


def built(tiny_folder, peft, reference=True, critic=True, reward=False, seed=0):
    return roles.build(tiny_folder, CPU, torch.float32, peft, seed, reference, critic, reward)


def test_adapters_share_the_frozen_base(tiny_folder):
    models = built(tiny_folder, section())
    assert models.frozen is models.net and models.adapter == "policy" and models.has_reference
    assert set(models.trained) == {"policy", "critic"} and not models.net.training
    trained = {id(parameter) for named in models.trained.values() for parameter in named.values()}
    assert {id(p) for p in models.net.parameters() if p.requires_grad} | {id(models.head)} == trained
    assert models.head.shape == (1, models.net.config.hidden_size) and not models.head.any()  # V = 0 at first
    assert models.parameters["policy"] == list(models.trained["policy"].values())
    assert list(models.named)[: len(models.trained["policy"])] == list(models.trained["policy"])
    assert sum(name.startswith("critic.") for name in models.named) == len(models.trained["critic"])


def test_a_critic_leaves_the_policy_s_start_as_it_is(tiny_folder):
    alone, beside = built(tiny_folder, section(), critic=False), built(tiny_folder, section())
    assert set(alone.trained) == {"policy"} and alone.head is None
    for name, parameter in alone.trained["policy"].items():
        assert torch.equal(parameter, beside.trained["policy"][name]), name
    other = built(tiny_folder, section(), critic=False, seed=1)
    assert any(not torch.equal(p, other.trained["policy"][name]) for name, p in alone.trained["policy"].items())


def test_a_saved_adapter_is_policy_and_reference(tmp_path, tiny_folder, capsys):
    start = inputs.random_start(tmp_path / "start", tiny_folder)
    models = built(tiny_folder, section(adapter=str(start)))
    assert f"starting from {start}, whose sizes the adapter takes" in capsys.readouterr().out
    frozen = lora.adapter_parameters(models.net, "reference")
    assert not any(parameter.requires_grad for parameter in frozen.values())
    for name, parameter in models.trained["policy"].items():
        assert torch.equal(parameter, frozen[name]) and parameter is not frozen[name]


def test_full_fine_tuning_holds_a_second_base_only_where_needed(tiny_folder):
    whole = section(peft_type="none")
    models = built(tiny_folder, whole)
    assert models.adapter is None and models.frozen is not models.net
    assert all(parameter.requires_grad for parameter in models.trained["policy"].values())
    assert all("lora" in name for name, p in models.frozen.named_parameters() if p.requires_grad)  # the critic's
    assert built(tiny_folder, whole, reference=False, critic=False).frozen is None
    with pytest.raises(UserError, match=r"model\.adapter: full fine-tuning starts from a whole model"):
        built(tiny_folder, section(peft_type="none", adapter="some/adapter"))


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_restore_puts_back_every_bit(tmp_path, tiny_folder, kind):
    models = built(tiny_folder, section(peft_type=kind))
    with torch.no_grad():
        for parameter in models.named.values():
            parameter.add_(torch.randn_like(parameter))
    optimizer = torch.optim.AdamW([*models.named.values()])
    for parameter in models.named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    roles.save(models, optimizer, tmp_path, "tiny")
    assert (tmp_path / "critic.safetensors").is_file()
    again = built(tiny_folder, section(peft_type=kind), seed=1)
    fresh = torch.optim.AdamW([*again.named.values()])
    roles.restore(again, fresh, tmp_path)
    assert list(again.named) == list(models.named)
    for name, parameter in models.named.items():
        assert torch.equal(parameter, again.named[name]), name
        moments = optimizer.state[parameter], fresh.state[again.named[name]]
        assert all(torch.equal(moments[0][key], moments[1][key]) for key in ("step", "exp_avg", "exp_avg_sq")), name
