"""The model card of final/ and of exports, and what is sent to the hub: a server on this machine."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard

import train_sft
from common import config
from common.runtime import card, checkpoint
from tests import inputs, processes, test_export, test_sources
from tests.test_export import nothing_left, refused, run, train

few, flags, adapter, hub = test_export.few, test_export.flags, test_export.adapter, test_sources.hub  # fixtures


def card_of(path):
    """(the card's metadata as huggingface_hub reads it, its text); what it read writes the same again."""
    content = path.read_text(encoding="utf-8")
    loaded = ModelCard(content)
    assert ModelCard(f"---\n{loaded.data.to_yaml()}\n---\n{loaded.text}").data.to_dict() == loaded.data.to_dict()
    return loaded.data.to_dict(), loaded.text


def test_the_cards_of_a_run_and_of_its_export(tmp_path, flags, few, micro_folder):
    settings = inputs.settings(micro_folder, few, rate=1e-2)
    ends = "--training.max_steps", 6, "--training.budget_flops", 1e15, "--training.patience", 9
    processes.train(train_sft.main, tmp_path, settings(tmp_path, *ends))
    run_dir = tmp_path / "run"
    metadata, text = card_of(run_dir / "final" / "README.md")
    assert metadata == {
        "library_name": "peft",
        "license": "gemma",
        "pipeline_tag": "text-generation",
        "tags": ["gemma3", "sft"],
    }  # a local base has no name on the hub
    facts = json.loads((run_dir / "run.json").read_text())["facts"]
    last = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][-1]
    for words in (
        facts["model"],
        facts["data"],
        f"| loss (val) | {last['eval/loss']:.4g} |",
        "ai.google.dev/gemma/terms",
        "LoRA, rank 8",
        "must not be used",
        f"torch {torch.__version__}",
        "under the licence of its source",
    ):
        assert words in text, words
    assert str(tmp_path) not in text and str(micro_folder) not in text
    (words,) = re.findall("```bash\n(.*)\n```", text)
    assert words.startswith("python train_sft.py --debug --task safety") and "--training.max_steps 6" in words
    assert "--training.budget_flops 1000000000000000.0" in words and "--training.patience 9" in words
    assert "--logging" not in words and "--training.save_interval" not in words
    assert "README.md" in checkpoint.verify(run_dir / "final")["files"]

    figures = train(tmp_path, flags(tmp_path / "merged", f"sft={run_dir}"))
    metadata, text = card_of(tmp_path / "merged" / "README.md")
    assert metadata["library_name"] == "transformers" and words in text and facts["data"] in text
    value, low, high = map(float, re.search(r"this model's loss.*\| (\S+) \[(\S+), (\S+)\] nats", text).groups())
    assert low < value < high and value == pytest.approx(figures["loss"], abs=6e-4)
    assert "the base's loss on" in text and f"{figures['mean']:.2g} nats per token on average" in text


def test_a_hub_base_and_hub_data_are_named(tmp_path):
    overrides = {"task": "gsm8k", "dataset_path": "hub:some/sums:main", "training.mode": "rl", "rl.algorithm": "grpo"}
    overrides |= {"reward.checkpoint": f"{tmp_path}/a/final,{tmp_path}/b/final"}
    cfg = config.load_config(None, overrides)
    path = tmp_path / "README.md"
    path.write_text(card.of_run(cfg, {"model": "ab", "data": "cd"}, "google/gemma-3-270m-it", {"eval/reward": 0.25}))
    metadata, text = card_of(path)
    assert metadata["base_model"] == "google/gemma-3-270m-it" and metadata["datasets"] == ["some/sums"]
    assert metadata["tags"] == ["gemma3", "grpo"] and "| reward (val) | 0.25 |" in text
    assert "python train_rl.py --task gsm8k --dataset_path hub:some/sums:main --training.mode rl" in text
    assert "--reward.checkpoint a/final,b/final" in text and str(tmp_path) not in text


@pytest.mark.parametrize("name", ["merged", "new.gguf"])
def test_an_export_is_sent_to_the_hub(tmp_path, monkeypatch, flags, adapter, hub, name):
    monkeypatch.setenv("HF_TOKEN", "secret")
    more = (
        ["--push_to_hub", "some/model", "--gguf_type", "f32"] if name == "new.gguf" else ["--push_to_hub", "some/model"]
    )
    status, out, err = run(tmp_path, flags(tmp_path / name, f"sft={adapter}", more=more))
    assert status == 0 and "sent " in out, err
    assert hub.made["visibility"] == "private" and (hub.made["organization"], hub.made["name"]) == ("some", "model")
    (sent,) = hub.repos.values()
    folder = tmp_path / name if name == "merged" else tmp_path
    there = {
        path.name: path.read_bytes() for path in folder.iterdir() if name == "merged" or path.name.startswith("new.")
    }
    if name == "new.gguf":
        there["README.md"] = there.pop("new.md")
    assert sent == there and len(there) >= 4

    hub.closed = True
    status, out, err = run(tmp_path, flags(tmp_path / f"second-{name}", f"sft={adapter}", more=more))
    assert status == 2 and err.count("\n") == 1 and "is written, but not sent to some/model" in err, err
    assert "401" in err and "hf auth login" in err and (tmp_path / f"second-{name}").exists()


def test_what_cannot_be_sent(tmp_path, flags, adapter):
    refused(
        tmp_path, flags(tmp_path / "merged", f"sft={adapter}", more=["--push_to_hub", "model"]), "expected OWNER/NAME"
    )
    argv = [
        word for word in flags(tmp_path / "merged", f"sft={adapter}") if word not in ("--export", tmp_path / "merged")
    ]
    refused(tmp_path, [*argv, "--push_to_hub", "some/model"], "go with --export")
    assert nothing_left(tmp_path / "merged")
