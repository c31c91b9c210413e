"""What a reader may rely on: short files, short functions, docstrings whose first words are their subject."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
APART = {"tests", "benchmarks", "examples", "docs", "build", ".venv"}
SOURCES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in APART]
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
HEADLESS = re.compile(r"(What|Of|Those|Told|The same)\b")
WORN = re.compile(r"\b(reckon\w*|let(s|ting)? go of|told|so many|had come to)\b", re.IGNORECASE)


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Those of modules, classes and functions, and the texts under constants and attributes."""
    for node in ast.walk(tree):
        for child in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                yield child.value.value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short_and_docstrings_name_their_subject(path: Path) -> None:
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= LONGEST_FILE
    is_kernel = path.name.endswith("kernel.py") or path.name in ("tile.py", "attention_block.py")  # Triton's functions
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not is_kernel and node.name != "_plugin_class":
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name
    for docstring in docstrings(tree):
        assert not HEADLESS.match(docstring.strip()), docstring
        assert not WORN.search(docstring), docstring
