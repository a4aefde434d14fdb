"""common/config.py and configs/: precedence, strictness against hostile YAML, flags, and a schema without dead keys."""

import ast
import re
import time
from pathlib import Path

import pytest
import yaml

from common import config
from common.log import UserError, command

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yml"))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
README = """task: safety              # safety | clinical | conala
model:
  base_checkpoint: google/gemma-3-270m-it
  peft_type: lora         # lora | qlora | none
  peft_rank: 8
training:
  mode: sft               # sft | rl | staged
  epochs: 3
  batch_size: 4
rl:
  algorithm: ppo          # ppo | grpo | dpo
reward:
  type: hybrid            # heuristic | trainable | hybrid
"""


def write(folder, text):
    path = folder / "run.yml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(call, *args):
    """The message of the UserError that the call must raise: one line, within a second."""
    start = time.process_time()  # not the clock's: other tests run beside
    with pytest.raises(UserError) as caught:
        call(*args)
    assert time.process_time() - start < 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sft(*argv, jobs=()):
    return config.parse_args("train_sft.py", "doc", ("model", "training", "logging"), ("sft",), list(argv), jobs)


# --- what a config resolves to


def test_defaults_are_typed_as_written():
    cfg = config.load_config()
    assert (cfg.training.learning_rate, cfg.training.max_steps, cfg.training.packing) == (2e-4, None, False)
    assert cfg.model.peft_target_modules == LINEARS
    assert type(cfg.model.peft_alpha) is int and type(cfg.rl.gamma) is float
    assert vars(cfg.reward.heuristic)["toxicity"] == 1.0


def test_readme_example_is_valid(tmp_path):
    cfg = config.load_config(write(tmp_path, README))
    assert (cfg.task, cfg.model.peft_rank, cfg.training.batch_size, cfg.reward.type) == ("safety", 8, 4, "hybrid")


def test_precedence_defaults_file_debug_flags(tmp_path):
    path = write(tmp_path, "seed: 3\nmodel:\n  peft_rank: 4\ntraining:\n  max_steps: 7\n  epochs: 2\n")
    cfg, job = sft("--config", str(path), "--debug", "--training.max_steps", "5")
    assert cfg.training.max_steps == 5  # flag over debug.yml over file
    assert cfg.model.base_checkpoint == "tiny"  # debug.yml over default
    assert (cfg.seed, cfg.model.peft_rank, cfg.training.epochs) == (3, 4, 2)  # file over default
    assert cfg.training.weight_decay == 0.0
    assert cfg.debug is True and job.config == str(path)
    assert sft("--config", str(path))[0].training.max_steps == 7


def test_overrides_from_python_are_checked_like_a_file():
    cfg = config.load_config(
        ROOT / "configs" / "sft_lora_270m.yml",
        {"training.learning_rate": "5e-5", "rl.gamma": 1, "training.packing": True, "training.patience": None}
        | {"model.peft_target_modules": ("q_proj", "v_proj"), "training.max_steps": 10},
    )
    assert (cfg.training.learning_rate, cfg.rl.gamma, cfg.training.packing) == (5e-5, 1.0, True)
    assert (cfg.training.patience, cfg.training.max_steps) == (None, 10)
    assert cfg.model.peft_target_modules == ["q_proj", "v_proj"]
    for bad in (True, 2.0, "4x", [4], {"a": 1}, None):
        message = refusal(config.load_config, None, {"training.batch_size": bad})
        assert "override training.batch_size: expected int >= 1" in message
    assert "rl.kl_coef" in refusal(config.load_config, None, {"rl.kl_coeff": 0.1})


def test_a_config_is_independent_of_the_next_one():
    config.load_config().model.peft_target_modules.clear()
    assert config.load_config().model.peft_target_modules == LINEARS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_file_in_configs_parses_with_and_without_debug(path):
    config.load_config(path)
    cfg, _ = config.parse_args("any.py", "doc", (), (), ["--config", str(path), "--debug"])
    assert (cfg.debug, cfg.model.base_checkpoint, cfg.model.dtype, cfg.device) == (True, "tiny", "float32", "cpu")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_file_in_configs_holds_only_what_differs(path):
    if path.name in ("defaults.yml", "debug.yml"):
        pytest.skip("one is the defaults; the other must also undo what the file under it set")
    written = re.findall(r"^ *\w+: +[^#\s]", path.read_text(), re.MULTILINE)
    assert len(written) == len(config.differences(config.load_config(), config.load_config(path)))


def test_debug_leaves_no_size_of_a_config_standing():
    """What a config sets to train a real model must be brought down by --debug, or a debug run takes hours."""
    sizes = ["training.batch_size", "training.eval_interval", "rl.max_steps", "rl.rollout_size", "rl.group_size"]
    debug = config.load_config(ROOT / "configs" / "debug.yml")
    for path in CONFIGS:
        cfg, _ = config.parse_args("any.py", "doc", (), (), ["--config", str(path), "--debug"])
        assert all(config.flatten(cfg)[key] == config.flatten(debug)[key] for key in sizes), path.name


# --- dump, differences, run_name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_dump_round_trips_through_a_file_in_the_order_of_the_defaults(path, tmp_path):
    cfg = config.load_config(path)
    text = config.dump(cfg)
    assert config.load_config(write(tmp_path, text)) == cfg
    order = yaml.safe_load((ROOT / "configs" / "defaults.yml").read_text())
    assert [(name, list(value or [])) for name, value in yaml.safe_load(text).items() if isinstance(value, dict)] == [
        (name, list(value)) for name, value in order.items() if isinstance(value, dict)
    ]


@pytest.mark.parametrize(
    "name", ["no", "010", "12:30", "5e-5", "a: b # c", "é\n'\"", "-", "x" * 300, "[a]", "2026-01-01"]
)
def test_dump_round_trips_any_text(name, tmp_path):
    cfg = config.load_config(overrides={"logging.run_name": name})
    assert cfg.logging.run_name == name
    assert config.load_config(write(tmp_path, config.dump(cfg))).logging.run_name == name


@pytest.mark.parametrize("number", [5e-324, 1e-5, 0.1 + 0.2, 1e16, 1.7976931348623157e308])
def test_dump_keeps_floats_bit_for_bit(number, tmp_path):
    cfg = config.load_config(overrides={"training.learning_rate": number})
    assert config.load_config(write(tmp_path, config.dump(cfg))).training.learning_rate.hex() == float(number).hex()


def test_differences_name_key_and_both_values():
    a = config.load_config()
    b = config.load_config(overrides={"reward.heuristic.length": 0, "seed": 1})
    assert config.differences(a, a) == []
    assert config.differences(a, b) == [("seed", 0, 1), ("reward.heuristic.length", 0.2, 0.0)]
    del b.training.patience
    b.model.extra = 5
    found = config.differences(config.load_config(overrides={"training.patience": 2}), b)
    assert ("training.patience", 2, None) in found and ("model.extra", None, 5) in found


def test_run_name():
    named = config.load_config(overrides={"logging.run_name": "mine", "debug": True})
    assert config.run_name(named, "configs/sft_lora_270m.yml", "sft") == "mine"
    assert config.run_name(config.load_config(), "configs/sft_lora_270m.yml", "sft") == "sft_lora_270m"
    assert config.run_name(config.load_config(), None, "sft") == "sft"
    assert config.run_name(config.load_config(overrides={"debug": True}), None, "sft") == "sft-debug"


# --- values (R20, hostile YAML: tests/faults/test_configs.py)


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("training.batch_size", "1", "0"),
        ("training.learning_rate", "1e-9", "0"),
        ("training.warmup_ratio", "1", "1.01"),
        ("model.peft_dropout", "0", "1"),
        ("rl.temperature", "0.1", "0"),
        ("rl.gamma", "0", "-0.1"),
        ("rl.dpo_label_smoothing", "0.49", "0.5"),
        ("evaluation.top_p", "1", "0"),
        ("training.patience", "null", "0"),
        ("rl.clip_high", "0.28", "0"),
        ("seed", "4294967295", "4294967296"),
    ],
)
def test_ranges(key, good, bad):
    config.load_config(overrides={key: good})
    assert key in refusal(config.load_config, None, {key: bad})


def test_float16_is_refused_with_the_reason(tmp_path):
    message = refusal(config.load_config, write(tmp_path, "model:\n  dtype: float16\n"))
    assert "auto | bfloat16 | float32" in message and "exceed its range" in message
    assert "exceed its range" in refusal(sft, "--model.dtype", "float16")


# --- the command line


def test_help_shows_the_flags_of_the_script_only(capsys):
    with pytest.raises(SystemExit) as caught:
        sft("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    shown = set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)+)", text))
    keys = {key for key in config.flatten(config.load_config()) if key.startswith(("model.", "training.", "logging."))}
    assert shown - {"section.key"} == keys
    assert "--task" in text and "which weights" not in text
    assert "adapters on a frozen base, on one held in 4 bits, or all weights trained" in text
    assert "[lora | qlora | none; default lora]" in text and "default 2e-4]" in text


def test_flags_of_nested_sections():
    cfg, _ = config.parse_args("x.py", "doc", ("reward",), (), ["--reward.heuristic.toxicity", "2"])
    assert cfg.reward.heuristic.toxicity == 2.0


def test_job_flags_are_apart_from_the_config():
    jobs = (("--explain", {"action": "store_true"}), ("--checkpoint", {"metavar": "DIR"}))
    cfg, job = sft("--explain", "--checkpoint", "a/b", jobs=jobs)
    assert vars(job) == {"config": None, "explain": True, "checkpoint": "a/b"}
    assert cfg == config.load_config()


def test_lists_and_nulls_as_flags():
    cfg, _ = sft("--model.peft_target_modules", "q_proj,v_proj", "--training.patience", "null")
    assert (cfg.model.peft_target_modules, cfg.training.patience) == (["q_proj", "v_proj"], None)
    assert "--model.adapter" in refusal(sft, "--model.adapter", "")  # an unset shell variable is no adapter


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--training.batchsize", "8"], ["--training.batchsize", "did you mean --training.batch_size"]),
        (["--batch_size", "8"], ["did you mean --training.batch_size"]),
        (["--training.learning", "1"], ["did you mean --training.learning_rate"]),  # no abbreviations
        (["--explian"], ["did you mean --explain"]),
        (["--rl.kl_coef", "0.1"], ["--rl.kl_coef", "train_sft.py does not read it"]),
        (["--training.epochs"], ["--training.epochs", "expected one argument"]),
        (["--training.epochs", "x"], ["--training.epochs: expected int >= 1, got 'x'"]),
        (["--config", "configs/nope.yml"], ["configs/nope.yml", "No such file"]),
        (["stray"], ["stray"]),
    ],
)
def test_mistakes_in_flags(argv, words):
    message = refusal(lambda: sft(*argv, jobs=(("--explain", {"action": "store_true"}),)))
    assert all(word in message for word in words), message


def test_a_config_for_another_script_names_that_script():
    for mode, script in config.SCRIPTS.items():
        if mode != "sft":
            message = refusal(sft, "--training.mode", mode)
            assert f"training.mode {mode}" in message and script in message and "train_sft.py" in message
    staged = str(ROOT / "configs" / "staged_sft_then_ppo.yml")
    assert "train_staged.py" in refusal(sft, "--config", staged)
    assert sft("--config", staged, "--training.mode", "sft")[0].training.mode == "sft"  # what train_staged.py does
    assert config.parse_args("evaluate.py", "doc", (), (), ["--config", staged])[0].training.mode == "staged"


def test_a_mistake_ends_a_command_with_status_2_and_one_line(tmp_path, capsys):
    main = command(lambda argv=None: config.parse_args("train_sft.py", "doc", ("training",), ("sft",), argv))
    path = write(tmp_path, "training:\n  lr: 1\n")
    for argv in (["--config", str(path)], ["--training.lr", "1"], ["--training.epochs"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert sorted(tmp_path.iterdir()) == [path]  # nothing was written


# --- the schema


def test_schema_is_small_unambiguous_and_explained():
    leaves, headings = config._schema()
    assert len(leaves) <= 100
    assert {"", *headings} >= {key.rpartition(".")[0] for key in leaves}
    for key, leaf in leaves.items():
        assert len(leaf.help.split()) >= 2, key
        assert leaf.rule.split()[0] in ("int", "float", "str", "list") or " | " in leaf.rule, key
        again = None if leaf.default is None else leaf.default
        assert config._convert(leaf, again, key) == leaf.default
    assert all(headings.values())


@pytest.mark.parametrize("line", ["new: 3", "new: 3  # no rule", "new: null  # int; not nullable", "new: a  # int; x"])
def test_a_fork_s_mistake_in_the_schema_is_refused_by_line(line, tmp_path, monkeypatch):
    (tmp_path / "defaults.yml").write_text(f"seed: 0  # int; a number\n{line}\n")
    monkeypatch.setattr(config, "CONFIGS", tmp_path)
    assert "defaults.yml:2: new" in refusal(config.load_config)


def test_a_fork_adds_a_key_with_one_line(tmp_path, monkeypatch):
    text = (
        (ROOT / "configs" / "defaults.yml").read_text().replace("\nrl:", "  swa: false  # true | false; average\n\nrl:")
    )
    (tmp_path / "defaults.yml").write_text(text)
    monkeypatch.setattr(config, "CONFIGS", tmp_path)
    assert sft("--training.swa", "true")[0].training.swa is True


def scripts_and_sections():
    """(script, sections that it declares to parse_args) of every script at the root that reads the config."""
    for path in sorted(ROOT.glob("*.py")):
        tree = ast.parse(path.read_text())
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", getattr(call.func, "id", "")) == "parse_args":
                named = [keyword.value for keyword in call.keywords if keyword.arg == "sections"]
                for node in named or call.args[2:3]:
                    yield path.name, ast.literal_eval(constants[node.id] if isinstance(node, ast.Name) else node)


def keys_read(tree):
    """Dotted keys that a program reads as `cfg.a.b`, through `a = cfg.a`, or all at once as `vars(cfg.a)`."""
    names = {"cfg": ""}
    sections = {key.split(".")[0] for key in config.flatten(config.load_config()) if "." in key}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):  # a section handed to a function under its own name
            names |= {arg.arg: f"{arg.arg}." for arg in node.args.args if arg.arg in sections}
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and dotted(node.value, names):
            names[node.targets[0].id] = dotted(node.value, names) + "."
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node, names):
            yield dotted(node, names)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "vars" and dotted(node.args[0], names):
            yield from (
                key for key in config.flatten(config.load_config()) if key.startswith(dotted(node.args[0], names))
            )


def dotted(node, names):
    """`model.dtype` for the expression `cfg.model.dtype`, or None if it does not start at one of `names`."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts, node = [node.attr, *parts], node.value
    return names[node.id] + ".".join(parts) if parts and isinstance(node, ast.Name) and node.id in names else None


def test_every_key_of_the_sections_that_scripts_declare_is_read():
    sections = {section for _, declared in scripts_and_sections() for section in declared}
    if not sections:
        pytest.skip("no script reads the config yet")
    programs = [*ROOT.glob("*.py"), *(ROOT / "common").glob("*.py")]
    read = {key for path in programs for key in keys_read(ast.parse(path.read_text()))}
    offered = {key for key in config.flatten(config.load_config()) if "." not in key or key.split(".")[0] in sections}
    assert offered == offered & read


def test_the_reader_of_reads_sees_every_form():
    text = "rl = cfg.rl\nf(rl.gamma, **vars(cfg.reward.heuristic))\ncfg.seed\nother.training.epochs\n"
    found = set(keys_read(ast.parse(text)))
    assert {"rl.gamma", "seed", "reward.heuristic.toxicity"} <= found and "training.epochs" not in found
