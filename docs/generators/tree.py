"""The tree's page: every source file with the first line of its docstring, or of its first comment."""

import ast
import re
from pathlib import Path

from .markdown import escape

ROOT = Path(__file__).parent.parent.parent
ROOMS = (
    "spec",
    "files",
    "plugins",
    "export",
    "engine",
    "runtime",
    "walk",
    "calibration",
    "accuracy",
    "measuring",
    "pages",
    "cli",
)
"""From the ground up; a room that is missing here comes behind them."""

APART = {"build", "demo", "tests", "docs", "benchmarks", "examples"}
HEAD = """# The tree

Every source file and its first line. [Architecture](architecture.md) says which room may import which, and what the
words mean.
"""


def page() -> str:
    """The whole page."""
    rooms = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/__init__.py")} - APART
    ordered = [room for room in ROOMS if room in rooms] + sorted(rooms - set(ROOMS))
    parts = [HEAD, "## The root\n", _listed(ROOT.glob("*.py"))]
    for room in ordered:
        for folder in _folders(ROOT / room):
            where = folder.relative_to(ROOT).as_posix()
            parts += [f"## {where}/\n", f"{escape(first_line(folder / '__init__.py'))}\n", _listed(_sources(folder))]
    parts += ["## benchmarks/\n", _listed((ROOT / "benchmarks").rglob("*.py"), ROOT / "benchmarks")]
    parts += ["## examples/\n", _listed((ROOT / "examples").rglob("*.py"), ROOT / "examples")]
    return "\n".join(parts)


def _folders(room: Path) -> list[Path]:
    return sorted(path.parent for path in room.rglob("__init__.py"))


def _sources(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in (".py", ".h", ".cpp") and path.name != "__init__.py"]


def _listed(paths: object, base: Path | None = None) -> str:
    assert hasattr(paths, "__iter__")
    files = sorted(path for path in paths if path.name != "__init__.py" or path.parent == ROOT)
    lines = [
        f"- `{path.relative_to(base).as_posix() if base else path.name}`: {escape(first_line(path))}" for path in files
    ]
    return "\n".join(lines) + "\n"


def first_line(path: Path) -> str:
    """The first sentence or line that a file says of itself."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    comment = re.match(r"(?://[^\n]*\n)+", text)
    words = " ".join(line.lstrip("/ ") for line in (comment[0] if comment else "").splitlines())
    return re.split(r"(?<=[.:]) ", words)[0].rstrip(":")
