"""The systems of evaluate.py: names and seeds as they were typed; the best of several answers, counted by hand."""

import json
from pathlib import Path

import pytest
import torch

from common import config, tasks
from common.evaluation import measure, systems
from common.log import UserError
from tests import inputs

ROOT = Path(systems.__file__).parents[2]


def test_a_name_given_again_is_another_seed():
    named = systems.parse(["base=tiny", "sft=a/final", "sft=b/final", "rl=c=d", "rl=e"])
    assert named == {"base": ["tiny"], "sft": ["a/final", "b/final"], "rl": ["c=d", "e"]}
    with pytest.raises(UserError, match=r"--checkpoints: systems have \[2, 3\] seeds"):
        systems.parse(["a=1", "a=2", "b=1", "b=2", "b=3"])
    for wrong in ("outputs/x", "=x", "sft="):
        with pytest.raises(UserError, match="expected NAME=CHECKPOINT"):
            systems.parse([wrong])


def test_without_a_base_it_is_that_of_the_adapters(tmp_path, micro_folder):
    cfg = config.load_config(None, {})  # its base is one of the hub
    inputs.random_start(tmp_path / "sft", micro_folder)
    about = tmp_path / "sft" / "adapter_config.json"
    about.write_text(about.read_text().replace('"base"', json.dumps(str(micro_folder))))
    named = {"sft": [str(tmp_path / "sft")]}
    folder, (system,) = systems.locate(named, cfg, None)
    assert folder == micro_folder and not system.is_whole
    other = inputs.another_base(tmp_path / "other", micro_folder)
    with pytest.raises(UserError, match="other"):  # which is not the one that it was trained on
        systems.locate(named, config.load_config(None, {"model.base_checkpoint": str(other)}), str(other))


def test_the_best_answer_has_the_highest_reward(micro_model):
    """By a reward that counts tokens, the best of n is the longest of the first n samples; of one, a random one."""
    net, tokenizer = micro_model
    flags = {"evaluation.max_new_tokens": 8, "evaluation.temperature": 0.5}
    cfg = config.load_config(ROOT / "configs" / "sft_lora_270m.yml", flags)
    items, _ = measure.items(tasks.records("safety", "test", 6), tokenizer, 118, 6, 0)

    def count(records, answers):
        return torch.tensor([float(len(ids)) for ids in answers])

    best = dict(systems.best_of(net, tokenizer, items, cfg, {"reward": count}))
    whole = {"seed": cfg.seed, "max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0}
    samples, _ = measure.generate(net, items, whole, 4)
    for n, name in ((1, "base, 1 of 4 at random"), (2, "base, best of 2"), (4, "base, best of 4")):
        assert [line["tokens"] for line in best[name]] == [max(map(len, group[:n])) for group in samples]
