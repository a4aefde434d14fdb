"""The house in docs and code: which folder may import which, no circles, a test file for every module, short names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common import tasks

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"evaluation", "human", "runtime", "serving", "tasks"}
OF_SCRIPTS = {"evaluation", "human", "serving"}  # imported by scripts and by themselves, not by the core
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
TESTS = sorted(ROOT.glob("tests/**/*.py"))


def modules():
    """{dotted name: file} of common/ and its folders, packages without their .py left out."""
    files = [path for path in ROOT.glob("common/**/*.py") if path.name != "__init__.py"]
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(files)}
    assert {"common.losses", "common.run", "common.human.study", "common.runtime.cache"} <= set(found)
    return found


def imported(path, top_only=False):
    """Dotted names that a file imports, `from x import y` as x and as x.y; top_only: when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def folder_of(name):
    """ "human" of common.human.study, "" of what lies flat."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 and parts[1] in FOLDERS else ""


def test_common_is_a_flat_core_and_five_folders():
    flat = [path for path in ROOT.glob("common/*.py") if path.name != "__init__.py"]
    assert 0 < len(flat) <= 26, sorted(path.name for path in flat)
    folders = {path.name for path in (ROOT / "common").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == FOLDERS and all((ROOT / "common" / name / "__init__.py").is_file() for name in FOLDERS)


def test_nothing_in_common_imports_a_script():
    assert {"train_sft", "train_rl", "evaluate", "serve"} <= SCRIPTS
    for name, path in modules().items():
        assert not {found.split(".")[0] for found in imported(path)} & SCRIPTS, name


def test_the_core_imports_no_folder_of_the_scripts():
    seen = set()
    for name, path in modules().items():
        if name == "common.manifest":  # the name that users import
            continue
        theirs = {folder_of(found) for found in imported(path)} & OF_SCRIPTS
        assert theirs <= {folder_of(name)}, f"{name} imports {sorted(theirs)}"
        seen |= theirs
    assert seen == OF_SCRIPTS


def test_no_circle_of_imports():
    known = modules()
    needs = {name: imported(path, top_only=True) & set(known) - {name} for name, path in known.items()}
    assert needs["common.prompts"] >= {"common.experience", "common.runtime.resume"}
    while free := {name for name, wanted in needs.items() if not wanted}:
        needs = {name: wanted - free for name, wanted in needs.items() if name not in free}
    assert not needs, f"in a circle, or above one: {needs}"


def test_every_module_has_a_test_file_of_its_name():
    tests = {path.name for path in TESTS}
    assert {"test_losses.py", "test_hostile.py"} <= tests
    names = [name for name in modules() if name != "common.manifest"]
    missing = [name for name in names if f"test_{name.split('.')[-1]}.py" not in tests]
    assert not missing


def test_no_product_file_knows_a_task_by_name():
    """A task is one file: nothing outside common/tasks/ asks for one of them, but for the corpus of the tiny base."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py"), *ROOT.glob("data/**/*.py")]
    files = [path for path in files if path.parent != ROOT / "common" / "tasks"]
    assert {ROOT / "evaluate.py", ROOT / "common/rewards.py", ROOT / "data/download_datasets.py"} <= set(files)
    assert set(tasks.NAMES) <= {path.stem for path in ROOT.glob("common/tasks/*.py")}
    modules_of_tasks = {f"common.tasks.{name}" for name in tasks.NAMES}
    known = {}
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        named = {node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant)}
        assert not named & set(tasks.NAMES), name
        if theirs := imported(path) & modules_of_tasks:
            known[name] = theirs
    assert known == {"common/runtime/tiny.py": {f"common.tasks.{name}" for name in ("clinical", "conala", "safety")}}


def test_task_files_load_without_torch_or_numpy():
    code = "import sys; from common import tasks; [tasks.load(n) for n in tasks.NAMES]; print(sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "'common.tasks.gsm8k'" in run.stdout
    assert not re.findall(r"'(?:torch|numpy|transformers|rouge_score|sacrebleu)'", run.stdout)


def test_flags_are_answered_before_slow_libraries_are_imported(tmp_path):
    """--help, a wrong flag and a wrong config take a quarter of a second of a core; importing torch alone takes 3."""
    wrong = tmp_path / "wrong.yml"
    wrong.write_text("training:\n  no_such_key: 3\n")
    ends = {("--help",): 0, ("--no-such-flag", "1"): 2, ("--config", str(wrong)): 2}
    scripts = sorted(ROOT.glob("*.py"))
    assert {"train_sft", "train_staged", "evaluate", "serve"} <= SCRIPTS
    runs = [[str(script), *words, status] for script in scripts for words, status in ends.items()]
    runs.append([str(ROOT / "data" / "download_datasets.py"), "--help", 0])
    code = f"""
import runpy, sys
for *argv, status in {runs}:
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        assert (end.code or 0) == status, (argv, end.code)
    else:
        raise AssertionError(argv)
print("imported", *sorted(sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    imported_names = set(run.stdout.rpartition("imported ")[2].split())
    slow = {"torch", "numpy", "transformers", "peft", "scipy", "matplotlib", "safetensors", "tokenizers"}
    slow |= {"huggingface_hub", "jinja2", "gguf", "bitsandbytes", "sacrebleu", "rouge_score", "pyarrow"}
    assert {"common.config", "yaml"} <= imported_names and not imported_names & slow


OPAQUE = set(
    "hear heat pace peaks bring go_on piece aggregation fitting idle everyone found about look worth over".split()
)


def named_in(path):
    """Names of the variables, parameters, functions, classes and attributes that a file makes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def test_names_say_what_they_hold():
    """These words stood for too many things: say scores, rows, metrics, folder, temperature, tokens_per_step, ..."""
    files = [*ROOT.glob("*.py"), *modules().values()]
    assert "grpo_step" in named_in(ROOT / "train_rl.py") and "token_loss" in named_in(ROOT / "train_rl.py")
    assert [(path.name, name) for path in files for name in named_in(path) if name in OPAQUE] == []


def test_no_line_of_trainers_and_server_is_packed():
    half = [*ROOT.glob("train_*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("common/runtime/*.py")]
    half += [ROOT / "serve.py", *ROOT.glob("common/serving/*.py")]
    assert ROOT / "train_rl.py" in half and ROOT / "common" / "run.py" in half
    packed = [path.name for path in half for mark in ("fmt: skip", "isort: split") if mark in path.read_text()]
    assert set(packed) <= {"train_staged.py", "stats.py"}  # of the evaluations' half


def test_steps_and_mains_stay_short():
    limits = {("train_rl.py", "grpo_step"): 60, ("train_rl.py", "ppo_step"): 75, ("train_rl.py", "main"): 40}
    limits |= {("train_sft.py", "main"): 110, ("train_reward.py", "main"): 140}
    lengths = {}
    half = [*ROOT.glob("train_*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("common/runtime/*.py")]
    for path in half:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lengths[path.name, node.name] = node.end_lineno - node.lineno + 1
    assert limits.keys() <= lengths.keys()
    assert {key: n for key, n in lengths.items() if n > limits.get(key, 140 if key[1] == "main" else 100)} == {}
    assert len((ROOT / "train_rl.py").read_text().splitlines()) <= 500


def test_names_of_tests_are_short():
    named = []
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                named.append((node.name, path.relative_to(ROOT).as_posix()))
    assert ("test_names_of_tests_are_short", "tests/test_house.py") in named
    assert [(name, file) for name, file in named if len(name) > 60] == []


def ids(text):
    """Ids of the fault tables: R01 and R1 as R1, B-19 as B-19."""
    found = re.findall(r"(?<![A-Za-z0-9])(?:([RSH])0?|(B-))([1-9][0-9]?)(?![0-9A-Za-z])", text.replace("_", " "))
    return {"".join(parts) for parts in found}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("test_R01_R13_x", {"R1", "R13"}),
        ("(H1-H12)", {"H1", "H12"}),
        ("B-19, S5:", {"B-19", "S5"}),
        ("SHA256 r1 R100 sha-R1x", set()),
    ],
)
def test_ids_are_found_in_names_and_comments(text, right):
    assert ids(text) == right


def test_the_page_of_faults_has_every_id_of_the_tests():
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [re.findall(r"[RSH][0-9]+|B-[0-9]+", line.split("|")[1]) for line in page.splitlines() if line[:2] == "| "]
    listed = [row[0] for row in rows if row]
    used = set()
    for path in TESTS:
        if path != Path(__file__).resolve():
            used |= ids(path.read_text(encoding="utf-8"))
    assert {"R7", "H12", "S3"} <= used and len(listed) == len(set(listed))
    assert used - set(listed) == set() and set(listed) - used == set()
