"""R20: hostile and mistaken YAML is one line that names file, line and key, within a second, and runs nothing."""

import os

import pytest

from common import config
from tests.test_config import refusal, write


@pytest.mark.parametrize("marker_call", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
def test_R20_python_tags_are_refused_and_never_run(marker_call, tmp_path):
    marker = tmp_path / "marker"
    path = write(tmp_path, f"task: safety\nseed: {marker_call} ['touch {marker}']\n")
    message = refusal(config.load_config, path)
    assert f"{path}:2:" in message and "tag" in message and "seed" in message
    assert not marker.exists()


HOSTILE = {
    "unknown key": ("training:\n  learning_rat: 1\n", 2, ["training.learning_rat", "training.learning_rate"]),
    "abbreviated key": ("training:\n  lr: 5e-5\n", 2, ["training.lr", "training.learning_rate"]),
    "key without its section": ("seed: 1\nkl_coef: 0.1\n", 2, ["kl_coef", "rl.kl_coef"]),
    "key of another section": ("training:\n  kl_coef: 0.1\n", 2, ["training.kl_coef", "rl.kl_coef"]),
    "unknown section": ("seed: 1\ntrainin:\n  epochs: 1\n", 2, ["trainin", "nearest known one is training"]),
    "terminal escape as a key": ('seed: 1\n"\\x1b[2J": 1\n', 2, ["\\x1b[2J"]),
    "text for a float": ('training:\n  learning_rate: "abc"\n', 2, ["training.learning_rate", "float > 0", "abc"]),
    "no for a bool": ("training:\n  packing: no\n", 2, ["training.packing", "true | false", "'no'"]),
    "1 for a bool": ("training:\n  packing: 1\n", 2, ["training.packing", "true | false"]),
    "bool for an int": ("training:\n  batch_size: true\n", 2, ["training.batch_size", "int >= 1", "'true'"]),
    "bool for a float": ("training:\n  learning_rate: true\n", 2, ["training.learning_rate", "float > 0"]),
    "float for an int": ("training:\n  epochs: 2.0\n", 2, ["training.epochs", "int >= 1"]),
    "octal": ("seed: 010\n", 1, ["seed", "int", "010"]),
    "sexagesimal": ("training:\n  epochs: 12:30\n", 2, ["training.epochs", "int", "12:30"]),
    "endless int": (f"seed: {'9' * 5000}\n", 1, ["seed", "int"]),
    "infinite": ("training:\n  learning_rate: .inf\n", 2, ["training.learning_rate", "float"]),
    "overflowing": ("training:\n  learning_rate: 1e999\n", 2, ["training.learning_rate", "float"]),
    "nan": ("training:\n  learning_rate: .nan\n", 2, ["training.learning_rate", "float"]),
    "null where none may be": ("training:\n  epochs:\n", 2, ["training.epochs", "int >= 1", "null"]),
    "null for a text": ("model:\n  base_checkpoint: ~\n", 2, ["model.base_checkpoint", "expected path"]),
    "bool for a path": ("model:\n  adapter: true\n", 2, ["model.adapter", "path | null"]),
    "wrong choice": ("rl:\n  algorithm: pppo\n", 2, ["rl.algorithm", "ppo | grpo | dpo", "pppo"]),
    "list for a number": ("seed: [1]\n", 1, ["seed", "int"]),
    "section for a number": ("seed: {a: 1}\n", 1, ["seed", "int"]),
    "number for a section": ("seed: 1\nrl: 3\n", 2, ["rl", "keys"]),
    "empty section": ("rl:\nseed: 1\n", 1, ["rl", "keys"]),
    "duplicate key": ("training:\n  epochs: 1\n  packing: true\n  epochs: 2\n", 4, ["training.epochs", "line 2"]),
    "duplicate section": ("rl:\n  gamma: 1\nseed: 1\nrl:\n  lam: 1\n", 4, ["rl", "line 1"]),
    "duplicate in two spellings": ("rl:\n  gamma: 1\nrl.gamma: 0.9\n", 3, ["rl.gamma", "line 2"]),
    "not a linear": ("model:\n  peft_target_modules: [q_proj, embed_tokens]\n", 2, ["tied", "merges", "embed_tokens"]),
    "linear twice": ("model:\n  peft_target_modules: [q_proj, q_proj]\n", 2, ["model.peft_target_modules"]),
    "no linear": ("model:\n  peft_target_modules: []\n", 2, ["model.peft_target_modules"]),
    "nested list": ("model:\n  peft_target_modules: [[q_proj]]\n", 2, ["model.peft_target_modules", "q_proj"]),
    "tag of YAML's own": ("task: safety\nseed: !!int 3\n", 2, ["tag", "seed"]),
    "local tag": ("task: !include /etc/passwd\n", 1, ["tag", "task"]),
    "tag on a section": ("rl: !!map\n  gamma: 1\n", 1, ["tag", "rl"]),
    "anchor": ("task: &t safety\n", 1, ["anchor", "task"]),
    "alias bomb": ("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b]\n", 1, ["alias"]),
    "merge key": ("<<: {seed: 1}\n", 1, ["<<"]),
    "list as a key": ("seed: 1\n? [a]\n: 1\n", 2, ["unknown key"]),
    "deep brackets": ("[" * 60_000, 1, ["levels"]),
    "deep blocks": ("? " * 30_000, 1, ["levels"]),
    "deep sections": ("a:\n" + "".join(" " * n + "a:\n" for n in range(1, 300)), 5, ["levels"]),
    "endless list": (f"model:\n  peft_target_modules: [{'a,' * 30_000}]\n", 2, ["lists"]),
    "endless text": (f"task: {'a ' * 30_000}\n", 1, ["task", "safety | clinical | conala"]),
    "endless key": (f"? {'x' * 60_000}\n: 1\n", 1, ["unknown key"]),
    "blank lines": ("\n" * 65_000, 1, ["got none"]),
    "comments only": ("#a\n" * 20_000, 1, ["got none"]),
    "nothing": ("", 1, ["got none"]),
    "a list": ("- a\n", 1, ["got none"]),
    "a word": ("seed\n", 1, ["got none"]),
    "two documents": ("seed: 1\n---\nseed: 2\n", 2, ["document"]),
    "broken quote": ("seed: 1\ntask: 'abc\n", 3, ["not valid YAML"]),
    "tab": ("rl:\n\tgamma: 1\n", 2, ["not valid YAML"]),
    "NUL": ("seed: 1\ntask: a\0b\n", 2, ["control character"]),
    "escape": ("seed: 1\ntask: \x1b[2J\n", 2, ["control character"]),
    "not UTF-8": (b"seed: 1\ntask: \xff\xfe\n", 2, ["UTF-8"]),
    "UTF-16": ("seed: 1\n".encode("utf-16"), 1, ["UTF-8"]),
}


@pytest.mark.parametrize(("text", "line", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_R20_hostile_yaml_is_one_line_with_file_line_and_key(text, line, words, tmp_path):
    path = write(tmp_path, text)
    message = refusal(config.load_config, path)
    assert message.startswith(f"{path}:{line}: ")
    assert all(word in message for word in words), message
    assert message.isprintable() and len(message) < 600


def test_R20_a_number_in_scientific_notation_is_a_float(tmp_path):
    cfg = config.load_config(write(tmp_path, "training:\n  learning_rate: 5e-5\nrl:\n  kl_coef: 1E3\n  gamma: 1\n"))
    assert (cfg.training.learning_rate, cfg.rl.kl_coef, cfg.rl.gamma) == (5e-5, 1000.0, 1.0)
    assert type(cfg.rl.gamma) is float


def test_R20_files_that_are_too_large_or_not_there(tmp_path):
    large = write(tmp_path, "# a\n" * 500_000)  # 2 MB
    assert str(large) in refusal(config.load_config, large) and "KiB" in refusal(config.load_config, large)
    assert str(tmp_path / "no.yml") in refusal(config.load_config, tmp_path / "no.yml")
    assert str(tmp_path) in refusal(config.load_config, tmp_path)
    if os.path.exists("/dev/zero"):
        assert "KiB" in refusal(config.load_config, "/dev/zero")
