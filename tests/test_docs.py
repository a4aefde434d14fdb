"""What docs/ names exists: functions, tests, files behind links. (README.md has its commands run by .ci/run.)"""

import ast
import re
from pathlib import Path

import pytest

from common import config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("docs/**/*.md"), ROOT / "data" / "README.md", ROOT / "SECURITY.md"]
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
    assert {"docs/algorithms.md", "docs/faults.md"} <= set(PAGES)
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
        if files and name not in ("py", "md", "json", "jsonl", "yml") and f"{module}.{name}" not in keys:
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


def test_the_table_of_files_names_every_module_and_nothing_else():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    table = page[page.index("## Files") : page.index("## Licence")]
    named = set(re.findall(r"`((?:common/)?[\w/]+\.py)`", table.split("\n| `configs/defaults.yml`")[0]))
    assert named == {path.relative_to(ROOT).as_posix() for path in SOURCES}
