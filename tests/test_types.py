"""Names for type hints: they exist in transformers, which a script imports late (test_platforms.py)."""

import ast
from pathlib import Path

import transformers

from common.runtime import types


def test_each_name_stands_for_a_class_of_transformers():
    tree = ast.parse(Path(types.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "transformers"]
    names = {alias.asname: alias.name for node in imports for alias in node.names}
    assert {"Gemma", "GemmaConfig", "Tokenizer"} == names.keys() <= vars(types).keys()
    assert all(isinstance(getattr(transformers, name), type) for name in names.values())
