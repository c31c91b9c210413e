import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = {"geometry", "fields", "spec", "errors", "shards", "folder"}
ALLOWED = {
    "accuracy": GROUND | {"plugins", "export", "runtime", "loading"},
    "plugins": GROUND,
    "export": GROUND | {"plugins", "runtime"},
    "calibration": GROUND | {"plugins", "export"},
    "engine": GROUND | {"plugins"},
    "runtime": GROUND | {"plugins"},
}
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "triton", "ml_dtypes"}


def imported_rooms(path: Path) -> set[str]:
    """The rooms and root modules that a file imports, wherever in it the import stands."""
    depth = len(path.relative_to(ROOT).parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            rooms |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
    return rooms - {"__version__"}


def test_rooms_name_each_other_relatively() -> None:
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not [name for name in names if name.partition(".")[0] == "arriero"], path


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_the_import_law_allows(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert imported_rooms(path) <= ALLOWED[room], path


def test_rooms_are_reached_from_the_package() -> None:
    code = "import arriero; print(arriero.export.export_checkpoint.__name__, arriero.engine.build_bundle.__name__)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.split() == ["export_checkpoint", "build_bundle"]


def test_spec_and_errors_need_the_standard_library_only() -> None:
    for name in GROUND:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        for node in ast.walk(tree):
            modules = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert all(module.partition(".")[0] in sys.stdlib_module_names for module in modules), name


def test_the_runtime_imports_no_torch_onnx_or_transformers() -> None:
    modules = sorted(f"arriero.runtime.{path.stem}" for path in (ROOT / "runtime").glob("[a-z]*.py"))
    code = f"import sys\nfor name in {modules}: __import__(name)\nprint({HEAVY} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "set()"


def test_the_command_line_imports_no_room_until_a_verb_needs_it() -> None:
    code = f"import sys, arriero.cli\nprint(({HEAVY} | {{'onnxruntime', 'numpy'}}) & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "set()"
