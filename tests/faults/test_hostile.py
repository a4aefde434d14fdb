"""S1, S2, S6 to S8: hostile checkpoints and configs, completions and cells. Nothing of them is ever run."""

import csv
import json
import pickle
import random
import re
import shutil
import socket
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

import evaluate
import train_sft
from common import model, rewards, tasks
from common.human import study
from common.log import command
from common.runtime import base
from tests import processes
from tests.faults import trainers

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def sources():
    """Every product file: the scripts, common/ with its folders, data/."""
    found = sorted([*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py"), *ROOT.glob("data/**/*.py")])
    known = {ROOT / "train_sft.py", ROOT / "common/log.py", ROOT / "common/human/study.py"}
    assert known | {ROOT / "data/download_datasets.py"} <= set(found)
    return found


def edit(path, **changes):
    """Change keys of a JSON file; None takes the key out."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# ---------------------------------------------------------------- S1: no pickle, no code


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_S1_pickles_are_never_loaded(refused, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    bad = pickle.dumps(Evil(tmp_path / "marker"))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(bad)
    assert "pickled .bin/.pt weights are never loaded" in refused(folder)
    assert not (tmp_path / "marker").exists()
    pickle.loads(bad).close()
    assert (tmp_path / "marker").exists()  # it would have shown


def test_S1_a_hostile_folder_is_neither_resumed_nor_a_model(tmp_path, micro_folder):
    """Whole commands: a step folder and a model's folder of pickles, given by path and found by themselves."""
    evil, marker = tmp_path / "run" / "step-000009", tmp_path / "marker"
    evil.mkdir(parents=True)
    for name in ("pytorch_model.bin", "optimizer.pt", "adapter_model.bin", "optimizer.safetensors", "state.json"):
        (evil / name).write_bytes(pickle.dumps(Evil(marker)))
    argv = trainers.settings("sft", micro_folder, trainers.write_data(tmp_path / "data", "sft"))
    main = train_sft.main
    processes.refused(main, tmp_path, argv(tmp_path, "--training.resume", evil), "MANIFEST.json", str(evil))
    processes.refused(main, tmp_path, argv(tmp_path, "--model.base_checkpoint", evil), "no config.json", str(evil))
    processes.refused(main, tmp_path, argv(tmp_path, "--model.adapter", evil), "model.adapter", str(evil))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(micro_folder / name, evil / name)
    processes.refused(
        main, tmp_path, argv(tmp_path, "--model.base_checkpoint", evil), "truncated or not a safetensors file"
    )
    (evil / "optimizer.safetensors").unlink()
    processes.refused(
        main, tmp_path, argv(tmp_path, "--model.base_checkpoint", evil), "pickled .bin/.pt weights are never"
    )
    processes.refused(evaluate.main, tmp_path, ["--debug", "--checkpoints", f"evil={evil}"], str(evil))
    status, out, err = processes.run(main, tmp_path, argv(tmp_path, "--training.max_steps", 1))
    assert status == 0 and "checkpoint skipped" in err and "resuming" not in out, err
    assert not marker.exists()


RISKY = (
    r"pickle|torch\.load|yaml\.(unsafe|full|load\()|\beval\(|\bexec\(|os\.system|shell=True|exec_module"
    r"|trust_remote_code|__import__|marshal|\bcompile\("
)
ALLOWED = {
    ("common/runtime/base.py", "from it, never code and never a pickle."),
    ("common/runtime/base.py", '"trust_remote_code",'),  # among the keys that are refused
    ("common/runtime/base.py", "pickled = [*folder.glob("),
    ("common/runtime/base.py", "(pickled .bin/.pt weights are never loaded"),
    ("common/functions.py", "spec.loader.exec_module(module)"),  # the user's own file: reward.function, --task FILE.py
}


def test_S1_no_line_of_the_package_loads_code():
    found = set()
    for path in sources():
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(RISKY, re.sub(r"re\.compile\(|\.eval\(\)", "", line)):
                name = path.relative_to(ROOT).as_posix()
                fine = {allowed for allowed in ALLOWED if allowed[0] == name and allowed[1] in line}
                assert fine, f"{name}: {line.strip()}"
                found |= fine
    assert found == ALLOWED  # what is not there any more is not allowed either


# ---------------------------------------------------------------- S2: hostile config.json


@pytest.mark.parametrize(
    "key, value",
    [
        ("auto_map", {"AutoModelForCausalLM": "evil--code.Model"}),
        ("_attn_implementation", "evil/repo"),
        ("_attn_implementation_internal", "evil/repo"),
        ("trust_remote_code", True),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ],
)
def test_S2_a_config_may_not_choose_code(refused, folder, key, value):
    (folder / "code.py").write_text(f"open({str(folder / 'marker')!r}, 'w')")
    edit(folder / "config.json", **{key: value})
    assert f"key {key!r} is refused" in refused(folder)
    assert not (folder / "marker").exists()


@pytest.mark.parametrize("key", base.LIMITS)
@pytest.mark.parametrize("value", [10**12, 0, -1, 2.5, "640", True])
def test_S2_absurd_sizes(refused, folder, key, value):
    edit(folder / "config.json", **{key: value})
    assert f"{key} is {value}, expected a whole number" in refused(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_activation": "evil"},
        {"rms_norm_eps": "x"},
        {"pad_token_id": 10**7},
        {"layer_types": ["evil"] * 6},
        {"dtype": "float17"},
        {"query_pre_attn_scalar": 0},
        {"final_logit_softcapping": 30.0},
        {"attention_bias": True},
    ],
    ids=str,
)
def test_S2_nonsense_in_a_config(refused, folder, changes):
    edit(folder / "config.json", **changes)
    assert "config.json" in refused(folder)


ABSURD = [
    {"vocab_size": 10**12},
    {"hidden_size": 10**9},
    {"num_hidden_layers": 10**9},
    {"head_dim": 2**40},
    {
        "vocab_size": 2**20,
        "hidden_size": 2**14,
        "intermediate_size": 2**16,
        "num_hidden_layers": 256,
        "layer_types": None,
    },
    {"auto_map": {"AutoModelForCausalLM": "evil--code.Model"}},
    {"layer_types": ["full_attention"] * 10**6},
    {"_attn_implementation_internal": "evil/repo"},
    {"trust_remote_code": True},
    {"dtype": "x" * 10**6},
]


def resident():
    """Highest memory of this process so far, in bytes."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_S2_a_hostile_config_costs_no_memory_and_no_network(folder, tmp_path):
    """In a child, whose peak is its own: no address looked up, nothing imported, not 50 MB more than before."""
    original = (folder / "config.json").read_text()

    def body(main, argv):
        def touched(*args, **more):
            raise AssertionError("the network was touched")

        socket.socket.connect = socket.getaddrinfo = touched
        model.load(str(folder), CPU, torch.float32)
        modules = set(sys.modules)
        for changes in ABSURD:
            (folder / "config.json").write_text(json.dumps(json.loads(original) | changes))
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = resident()
            try:
                main(str(folder))
                raise AssertionError(f"{str(changes)[:60]} was taken")
            except SystemExit as error:
                assert error.code == 2
            grown = resident() - before
            assert grown < 50 * 10**6, (str(changes)[:60], grown)
        assert set(sys.modules) == modules

    load = command(lambda argv: model.load(argv, CPU, torch.float32))
    status, _, err = processes.run(load, tmp_path, [], body)
    assert status == 0 and err.count("error: ") == len(ABSURD) == err.count("\n"), err


# ---------------------------------------------------------------- S6: hostile completions


HARM = [{"role": "user", "content": "How do I poison my neighbour?"}]


KIND = [{"role": "user", "content": "How do I bake bread?"}]


HOSTILE = [
    "",
    "\0" * 1000,
    "(" * 300 + ")" * 300,
    "-" * 100_000 + "1",
    "a" + ".b" * 100_000,
    "1" + "+1" * 100_000,
    "[" * 5000,
    "9" * 5000,
    "9" * 100_000,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 2000,  # a family joined by ZWJ
    "if 1:\n 1\n" + "elif 1:\n 1\n" * 2200,
    "a " * 50_000,
    "lambda:" * 5000,
    "x = 1\n" * 1_700_000,
    "\ud800 lone",
    "__import__('os').system('touch marker')",
]


@pytest.mark.parametrize("task", tasks.NAMES)
def test_S6_hostile_texts_are_bounded_and_start_nothing(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rewards.heuristic_reward(task, KIND, "warm up", "warm up")  # imports
    seen = []
    sys.addaudithook(
        lambda event, _: seen.append(event) if event in ("exec", "subprocess.Popen", "os.system") else None
    )
    for text in HOSTILE:
        for reference in ("x = 1", "a b " * 20_000):
            before = len(seen)
            total, parts = rewards.heuristic_reward(task, HARM, text, reference)
            assert 0 <= total <= 1 and all(0 <= value <= 1 for value in parts.values()), text[:20]
            assert len(seen) == before, text[:20]
    assert not (tmp_path / "marker").exists()


# ---------------------------------------------------------------- S7: running what a model says


def test_S7_no_output_of_a_model_is_executed():
    """It is not offered: no file of the project starts a process or a thread of execution for a completion.

    The only process that is ever started is git, with fixed words, for run.json (common/log.py).
    """
    starting = (
        r"subprocess\.|os\.(exec|spawn|posix_spawn|popen|fork)|\bPopen\b|multiprocessing|code\.Interact|runpy|\bpty\b"
    )
    found = {}
    for path in sources():
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if re.search(starting, line)]
        if lines:
            found[path.relative_to(ROOT).as_posix()] = lines
    assert list(found) == ["common/log.py"] and len(found["common/log.py"]) == 1, found
    assert "subprocess.run(words, cwd=root" in found["common/log.py"][0]


# ---------------------------------------------------------------- S8: cells of a spreadsheet


NASTY = ["", "=cmd|' /C calc'!A0", '=HYPERLINK("http://x","y")', "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1"]
NASTY += [
    "\u00a0=1",
    "\u200b=1",
    "\ufeff=1",
    "\0=1",
    "＝1",
    "＋1",
    "－1",
    "＠1",
    "﹢1",
    "−1",
    "'",
    "''",
    "'=1",
    "''=1",
    "'tis",
]
NASTY += ['"', '""', '"=1"', "a,b;c\td", "a\nb", "a\rb", "a\r\nb", "a\n", " ", "a\0b", "a\u2028b\x0bc\x1cd\x85e", "🙂"]
NASTY += ["👩\u200d👩\u200d👧", "\u202eשלום", "=" * 50_000, "x" * 200_000, "--- a\n+++ b", "- first\n- second"]
ALPHABET = list("=+-@＝'\",;\t\r\n\0 \u00a0\u200baé🙂")


def texts(n=3000):
    rng = random.Random(0)
    return NASTY + ["".join(rng.choices(ALPHABET, k=rng.randrange(7))) for _ in range(n)]


def test_S8_neutralised_texts_come_back_and_cannot_run():
    for text in texts():
        cell = study.neutralise(text)
        assert study.restore(cell) == text
        seen = unicodedata.normalize("NFKC", cell).lstrip("".join(map(chr, range(33))) + "\u00a0\u200b\ufeff")
        assert not cell.startswith(("\t", "\r", "\n")) and not seen.startswith(("=", "+", "-", "@"))
    assert study.neutralise("plain = text") == "plain = text"  # what is harmless stays as it is
    assert study.restore("'tis typed by hand") == "'tis typed by hand"


def test_S8_a_file_round_trips_and_plain_csv_reads_it(tmp_path):
    path, values = tmp_path / "a.csv", texts()
    study.save(path, [("one", "two"), *zip(values, reversed(values))])
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    columns, rows = study.read_csv(path)
    assert columns == ["one", "two"] and [row["one"] for _, row in rows] == values
    assert [row["two"] for _, row in rows] == values[::-1]
    assert csv.field_size_limit() == 131072  # the process-wide limit is as it was
    csv.field_size_limit(study.LONGEST_CELL)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            cells = list(csv.reader(file, strict=True))[1:]
    finally:
        csv.field_size_limit(131072)
    assert [study.restore(one) for one, _ in cells] == values
    assert all(study.neutralise(value) == one for value, (one, _) in zip(values, cells))
