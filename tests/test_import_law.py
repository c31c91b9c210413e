"""The import law: a room imports only rooms below it, root modules included, and no modules form a circle.

errors, version ← spec ← files ← plugins ← export | engine | runtime ← loading | walk | pages
    ← serving | calibration | accuracy | measuring ← cli
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STOREYS = (
    {"errors", "__version__"},
    {"spec"},
    {"files"},
    {"plugins"},
    {"export", "engine", "runtime"},
    {"loading", "walk", "pages"},
    {"serving", "calibration", "accuracy", "measuring"},
    {"cli"},
)
"""From the ground up. A room imports those of lower storeys, never its neighbours."""

BELOW = {room: set().union(*STOREYS[:height]) for height, storey in enumerate(STOREYS) for room in storey}
GROUND = ("errors", "spec", "files")
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "triton", "ml_dtypes"}


def modules() -> dict[str, Path]:
    """The package's modules by their names without `arriero.`; the package itself is the empty name."""
    paths = [*ROOT.glob("*.py"), *(path for room in BELOW for path in (ROOT / room).rglob("*.py"))]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").strip("."): path
        for path in paths
    }


MODULES = modules()


def imports_of(module: str, *, at_import: bool = False) -> set[str]:
    """The package's modules that a module imports, wherever the import stands.

    Args:
        module: Its name.
        at_import: Only those that are imported when the module is: neither in a function nor for types alone.
    """
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in _walk(ast.parse(path.read_text("utf-8")), at_import):
        if isinstance(node, ast.ImportFrom) and node.level:
            around = [part for part in package if part][: len(package) - node.level + 1]
            target = ".".join([*around, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{target}.{alias.name}".strip(".")
                found.add(inner if inner in MODULES or inner == "__version__" else target)
    return found - {module}


def _walk(node: ast.AST, at_import: bool) -> list[ast.AST]:
    if not at_import:
        return list(ast.walk(node))
    found = []
    for child in ast.iter_child_nodes(node):
        is_type_checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if not is_type_checking and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            found += [child, *_walk(child, at_import)]
    return found


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_rooms_name_each_other_relatively() -> None:
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.partition(".")[0] == "arriero"], path


def test_every_module_has_a_storey() -> None:
    assert {room_of(module) for module in MODULES} - {"", "__main__"} == set(BELOW) - {"__version__"}


@pytest.mark.parametrize("room", sorted(BELOW))
def test_a_room_imports_only_what_the_import_law_allows(room: str) -> None:
    for module in MODULES:
        if room_of(module) == room:
            above = {each for each in imports_of(module) if room_of(each) not in BELOW[room] | {room}}
            assert not above, module


def test_the_package_itself_imports_nothing() -> None:
    assert not imports_of("", at_import=True)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: imports_of(module) for module in MODULES if module not in ("", "__main__")}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join([*way[way.index(module) :], module])
        if module in graph and module not in done:
            for each in graph[module]:
                visit(each, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_a_token_session_knows_nothing_of_text() -> None:
    known, found = set(), {"runtime.token_session"}
    while new := found - known:
        known |= new
        found = set().union(*(imports_of(module) for module in new if module in MODULES))
    assert not known & {f"runtime.{module}" for module in ("text", "prompt", "stopping", "continuation", "session")}


def test_few_modules_stand_at_the_root() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py", "loading.py"}


def test_rooms_are_reached_from_the_package() -> None:
    code = "import arriero; print(arriero.export.export_checkpoint.__name__, arriero.engine.build_bundle.__name__)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.split() == ["export_checkpoint", "build_bundle"]


def test_the_ground_floor_needs_the_standard_library_only() -> None:
    for module, path in MODULES.items():
        if room_of(module) in GROUND:
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert all(name.partition(".")[0] in sys.stdlib_module_names for name in names), module


def loaded_by(statement: str, libraries: set[str]) -> set[str]:
    """Which of the libraries a statement loads in a process of its own."""
    code = f"import sys\n{statement}\nprint(*({libraries} & set(sys.modules)))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_runtime_and_serving_import_no_torch_onnx_or_transformers() -> None:
    names = [f"arriero.{module}" for module in MODULES if room_of(module) in ("runtime", "loading", "serving")]
    assert not loaded_by(f"for name in {names}: __import__(name)", HEAVY)


def test_the_command_line_imports_no_room_until_a_verb_needs_it() -> None:
    assert not loaded_by("import arriero.cli.app", HEAVY | {"onnxruntime", "numpy"})


def test_folders_are_inspected_without_onnx() -> None:
    assert not loaded_by("import arriero.measuring.contents", HEAVY)


@pytest.mark.parametrize(
    "asked",
    ["'/nowhere', 'out'", "TINY, 'out', dtype='int8'", "TINY, 'out', tp=4", "TINY, TINY", "TINY, 'out', tokenizer='/'"],
)
def test_an_export_is_refused_without_waiting_for_torch(asked: str, tiny: Path) -> None:
    statement = (
        "from arriero.errors import ArrieroError\n"
        "from arriero.export import export_checkpoint\n"
        f"TINY = {str(tiny)!r}\n"
        f"try: export_checkpoint({asked})\n"
        "except ArrieroError: pass\n"
        "else: raise AssertionError('it is not refused')"
    )
    assert not loaded_by(statement, HEAVY - {"ml_dtypes"})


def test_windows_of_text_and_images_are_read_without_torch() -> None:
    assert not loaded_by("import arriero.walk.windows", HEAVY)
