"""What README.md and docs/ name exists: functions, tests, files, flags, links. (.ci/run runs README's two commands.)"""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from common import config, tasks

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "data" / "README.md"]
)
SOURCES = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py")] if path.name != "__init__.py"]


def names(path):
    """Top-level functions, classes and constants of a Python file."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
        found |= {target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)}
    return found


def test_the_pages_and_sources_are_found():
    assert {"docs/algorithms.md", "docs/faults.md", "docs/seed.md", "README.md", "SECURITY.md"} <= set(PAGES)
    assert {ROOT / "train_rl.py", ROOT / "common/losses.py", ROOT / "common/runtime/resume.py"} <= set(SOURCES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert all(link.startswith("https://") or (ROOT / page).parent.joinpath(link).exists() for link in links), links


@pytest.mark.parametrize("page", PAGES)
def test_functions_and_tests_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    keys = config.flatten(config.load_config())
    for module, name in re.findall(r"`(\w+)\.(\w+)[`(]", text):
        files = [path for path in SOURCES if path.stem == module]
        if files and name not in ("py", "md", "json", "jsonl", "yml", "html") and f"{module}.{name}" not in keys:
            assert any(name in names(path) for path in files), f"{page}: {module}.{name}"
    for path in re.findall(r"`((?:common|configs|data|docs|tests|benchmarks)/[\w/]+\.(?:py|md|yml))`", text):
        assert (ROOT / path).is_file() or path.startswith("benchmarks/compare_"), f"{page}: {path}"
    for name in re.findall(r"`(?:tests/)?(test_\w+\.py)", text):
        assert (ROOT / "tests" / name).is_file(), f"{page}: {name}"


def test_every_row_of_the_table_names_a_test():
    rows = [
        line for line in (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "
    ]
    assert len(rows) > 40 and all(row.count("|") == 5 for row in rows)
    assert all("test_" in row or "the same" in row for row in rows[1:])


def test_every_claim_about_security_names_a_test_that_exists():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    files = [*ROOT.glob("tests/**/test_*.py")]
    assert {ROOT / "tests/test_serve.py", ROOT / "tests/faults/test_hostile.py"} <= set(files)
    tests = {name for path in files for name in names(path) if name.startswith("test_")}
    claims = [line for line in page.splitlines() if line.startswith("| ") and line.count("|") == 4][1:]
    rows = claims[: next(i for i, line in enumerate(claims) if line.startswith("| library"))]
    assert len(rows) > 10 and all(re.search(r"`test_\w+`", row.split("|")[3]) for row in rows), rows
    assert not set(re.findall(r"`(test_\w+)`", page)) - tests


def blocks(page, language):
    """The code blocks of a page, continued lines joined."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_scripts_configs_and_flags_that_exist(page):
    keys = set(config.flatten(config.load_config()))
    keys |= {f"task_options.{option}" for task in tasks.NAMES for option in tasks.load(task).options}
    keys |= {f"reward.heuristic.{part}" for task in tasks.NAMES for part in tasks.load(task).parts}
    commands = "\n".join(blocks(page, "bash"))
    for script in re.findall(r"(?:python|nproc-per-node \d+|HOST:\d+|requirements.txt) ((?:\w+/)*\w+\.py)", commands):
        assert (ROOT / script).is_file(), f"{page}: {script}"
    for path in re.findall(r"\bconfigs/\w+\.yml", commands):
        assert (ROOT / path).is_file(), f"{page}: {path}"
    for key in re.findall(r"--(\w+(?:\.\w+)+)", (ROOT / page).read_text(encoding="utf-8")):
        assert key in keys, f"{page}: --{key}"


def test_every_page_of_docs_is_in_the_readmes_index():
    index = (ROOT / "README.md").read_text(encoding="utf-8").split("## Documentation")[1]
    assert {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")} <= set(re.findall(r"\((docs/\w+\.md)\)", index))


def test_readme_is_short_and_has_the_two_commands_of_ci():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180
    commands = [line for line in lines if line.startswith("pip install -r requirements")]
    assert len(commands) == 2 and commands[1] == "pip install -r requirements.txt -r requirements-dev.txt && pytest"
    assert commands[0].startswith("pip install -r requirements.txt && python train_staged.py --config configs/")
    assert "grep '^pip install -r requirements' README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readmes_three_lines_of_grpo_are_those_of_the_script():
    lines = next(block for block in blocks("README.md", "python") if "policy_loss" in block).splitlines()
    script = [line.strip() for line in (ROOT / "train_rl.py").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 3 and set(lines) <= set(script)


@pytest.mark.parametrize("page", ["README.md", "docs/evaluation.md"])
def test_the_evaluation_from_python_runs(page, monkeypatch, capsys):
    def load_small(path, load=config.load_config):
        cfg = load(path)
        cfg.evaluation.max_items, cfg.evaluation.max_new_tokens, cfg.evaluation.draws = 4, 8, 100
        return cfg

    monkeypatch.setattr(config, "load_config", load_small)
    code = next(block for block in blocks(page, "python") if "evaluate.evaluate(" in block)
    assert "data.load(task=cfg.task, folder=None, split=" in code
    exec(code, {})
    assert {"value", "low", "high", "n"} <= set(ast.literal_eval(capsys.readouterr().out.splitlines()[-1]))


def requirements(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_requirements_are_exact_and_pyproject_reads_them():
    run, dev = requirements("requirements.txt"), requirements("requirements-dev.txt")
    assert all(re.fullmatch(r"==[\w.]+", str(one.specifier)) for one in [*run, *dev])
    assert not {one.name for one in run} & {one.name for one in dev}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    dynamic = project["tool"]["setuptools"]["dynamic"]
    assert dynamic["dependencies"] == {"file": "requirements.txt"}
    assert dynamic["optional-dependencies"] == {"dev": {"file": "requirements-dev.txt"}}
    assert set(project["project"]["dynamic"]) == set(dynamic)
    assert set(project["tool"]["setuptools"]["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}


def test_what_the_product_imports_is_in_requirements():
    pinned = {one.name.lower().replace("_", "-") for one in requirements("requirements.txt")}
    owners = importlib.metadata.packages_distributions()
    ours = {path.stem for path in ROOT.glob("*.py")} | {"common"}
    optional = {"wandb", "tensorboard", "pyarrow"}  # trackers that a user switches on, data that a user has
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.split(".")[0] for name in names} - ours - set(sys.stdlib_module_names) - optional:
                found = {owner.lower().replace("_", "-") for owner in owners.get(name, [])}
                assert found & pinned, f"{path.name} imports {name}"


def test_ci_refuses_a_skip_whose_reason_is_not_listed(tmp_path):
    # what pytest itself writes, for a reason in the list and for one that is not
    (tmp_path / "test_a.py").write_text(
        "import pytest\n\n\ndef test_gpu():\n    pytest.skip('no CUDA device here')\n\n\n"
        "def test_oracle():\n    pytest.importorskip('no_such_library')\n"
    )

    def skips(*words):
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "test_a.py", *words]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        (tmp_path / "log").write_text(done.stdout)
        done = subprocess.run([ROOT / ".ci" / "skips", tmp_path / "log"], check=False, capture_output=True, text=True)
        return done.returncode, done.stdout

    assert skips("-k", "gpu") == (0, "")
    status, said = skips()
    assert status == 1 and "no_such_library" in said and "CUDA" not in said
    assert "-rs" in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
