"""Names for type hints: they exist in transformers, and a script starts without importing it."""

import ast
import subprocess
import sys
from pathlib import Path

import transformers

from common.runtime import types

ROOT = Path(__file__).resolve().parents[1]


def test_each_name_stands_for_a_class_of_transformers():
    tree = ast.parse(Path(types.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "transformers"]
    names = {alias.asname: alias.name for node in imports for alias in node.names}
    assert {"Gemma", "GemmaConfig", "Tokenizer"} == names.keys() <= vars(types).keys()
    assert all(isinstance(getattr(transformers, name), type) for name in names.values())


def test_a_script_starts_without_the_slow_libraries():
    """A wrong flag or --help is answered before transformers, scipy, peft or matplotlib are imported: 3 s, not 8."""
    names = [path.stem for path in sorted(ROOT.glob("*.py"))]
    slow = ["transformers", "scipy", "peft", "matplotlib", "sympy"]
    code = f"import sys, {', '.join(names)}; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"train_sft", "evaluate", "serve"} <= set(names) and done.stdout == "[]\n"
