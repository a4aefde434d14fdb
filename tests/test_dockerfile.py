"""The Dockerfile, as far as it can be checked without building it."""

import fnmatch
import importlib.metadata
import json
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def steps():
    """[(instruction, its words as text)], comments dropped and continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def ignored(path):
    """As Docker reads .dockerignore: the last pattern that matches the path, or a folder above it, decides."""
    parts, verdict = path.split("/"), False
    for line in (ROOT / ".dockerignore").read_text().split("\n"):
        pattern = line.removeprefix("!")
        if pattern and not pattern.startswith("#"):
            want = pattern.removeprefix("**/").split("/")
            starts = range(len(parts)) if pattern.startswith("**/") else (0,)
            tails = [parts[i : i + len(want)] for i in starts]
            if any(len(t) == len(want) and all(map(fnmatch.fnmatchcase, t, want)) for t in tails):
                verdict = not line.startswith("!")
    return verdict


def test_what_it_copies_and_starts_exists(steps):
    copied = [words.split()[:-1] for name, words in steps if name == "COPY"]
    assert copied == [["requirements.txt"], ["."]]
    assert all((ROOT / source).exists() and not ignored(source) for sources in copied for source in sources)
    assert dict(steps)["WORKDIR"] == "/app"  # outputs are mounted at /app/outputs
    python, script = json.loads(dict(steps)["ENTRYPOINT"])
    assert python == "python" and (ROOT / script).is_file()
    order = [name for name, _ in steps]
    assert order[0] == "FROM" and order[-1] == "ENTRYPOINT"
    pip = [i for i, (name, words) in enumerate(steps) if name == "RUN" and "pip install" in words]
    assert len(pip) == 1 and "-r requirements.txt" in steps[pip[0]][1] and steps[pip[0] - 1][1].startswith("require")


def test_its_python_is_one_that_every_pinned_package_takes(steps):
    runs = " ".join(words for name, words in steps if name == "RUN")
    versions = set(re.findall(r"python(3\.\d+)", runs))
    assert len(versions) == 1 and "ubuntu24.04" in dict(steps)["FROM"] and versions == {"3.12"}  # what that one has
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            needs = importlib.metadata.metadata(Requirement(line).name)["Requires-Python"]
            assert needs is None or Requirement(f"python{needs}").specifier.contains(f"{min(versions)}.0"), line


def test_the_image_holds_the_project_and_nothing_of_this_machine():
    patterns = ("*.py", "*.txt", "*.md", "common/**/*.py", "configs/*", "tests/**/*.py", "docs/**/*.md", "data/*.py")
    found = {pattern: [path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)] for pattern in patterns}
    tracked = [name for names in found.values() for name in names] + ["data/README.md"]
    assert all(found.values()) and {"train_staged.py", "common/runtime/base.py", "docs/algorithms.md"} <= set(tracked)
    assert not any(map(ignored, [*tracked, "common", "common/human", "web/chat.html", ".git", ".gitignore", "data"]))
    assert not any(map(ignored, ("data/safety/train.jsonl", "data/clinical/report.json", "data/conala", "data/gsm8k")))
    mine = (
        "outputs",
        ".venv",
        "venv",
        "data/raw",
        "data/hh2000",
        "common/__pycache__",
        "common/human/__pycache__",
        "train_sft.pyc",
        ".coverage",
    )
    assert all(map(ignored, mine))


def test_its_cache_is_where_the_code_looks(steps):
    found = dict(word.split("=") for word in next(words for name, words in steps if name == "ENV").split())
    assert dict(steps)["VOLUME"] == "/cache" == found["HOME"]
    assert all(Path("/cache") in Path(found[name]).parents for name in ("GEMMA_ALIGNMENT_CACHE", "HF_HOME"))
    assert 'os.environ.get("GEMMA_ALIGNMENT_CACHE"' in (ROOT / "common" / "runtime" / "cache.py").read_text()
