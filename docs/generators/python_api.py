"""The Python interface's page, from the docstrings of what each room gives away under its own name."""

import ast
from dataclasses import dataclass
from pathlib import Path

from .markdown import escape, paragraphs, parse

ROOT = Path(__file__).parent.parent.parent
ROOMS = {
    "": "The package",
    "export": "Exporting",
    "calibration": "Calibrating",
    "engine": "Building",
    "runtime": "Running",
    "accuracy": "Checking",
}
MORE = {
    "engine": [("engine/polygraphy.py", "Scripts")],
    "runtime": [("runtime/continuation.py", "Settings"), ("runtime/chat/settings.py", "ChatSettings")],
}
"""Classes on a room's page that its package does not export: reached by their module's name, or explaining settings."""

ERRORS = "errors.py"
HEAD = """# Python interface

The public names of each room, as their docstrings describe them. A verb of the [command line](command-line.md) is a
thin skin over the function of its room. Arrays carry their shape in their names: B batch, S sequence, T tokens,
H hidden, V vocabulary, R positions that get logits.

`import arriero` loads nothing but the package; `arriero.load`, and a room such as `arriero.export`, load when they are
first used.
"""


@dataclass
class Found:
    """A definition, and the module that it stands in."""

    module: Path
    node: ast.FunctionDef | ast.ClassDef


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for room, title in ROOMS.items():
        name = f"arriero.{room}".rstrip(".")
        parts.append(f"## {title}: {name}\n")
        public = _public(room)
        for found in public:
            parts.append(_entry(name, found, {each.node.name for each in public}))
        for module, symbol in MORE.get(room, ()):
            where = "arriero." + module.removesuffix(".py").replace("/", ".")
            parts.append(_entry(where, _define(ROOT / module, symbol), set()))
    parts.append(_errors())
    return "\n".join(parts)


def _public(room: str) -> list[Found]:
    module = ROOT / room / "__init__.py"
    tree = ast.parse(module.read_text("utf-8"))
    names = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    )
    return [_define(module, name) for name in names if not name.startswith("__") and name != "ArrieroError"]


def _define(module: Path, name: str) -> Found:
    """Follows a name through relative imports to where it is defined."""
    tree = ast.parse(module.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return Found(module, node)
    for each in ast.walk(tree):
        if isinstance(each, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in each.names):
            original = next(alias.name for alias in each.names if (alias.asname or alias.name) == name)
            folder = module.parent
            for _ in range(each.level - 1):
                folder = folder.parent
            target = folder.joinpath(*(each.module or "").split("."))
            return _define(
                target.with_suffix(".py") if target.with_suffix(".py").exists() else target / "__init__.py", original
            )
    raise LookupError(f"{name} is not defined in {module}")


def _entry(where: str, found: Found, neighbours: set[str]) -> str:
    """A function or class; methods of a base that stands on the page itself are not repeated."""
    node = found.node
    if isinstance(node, ast.FunctionDef):
        return _function(f"{where}.{node.name}", node, level=3)
    parts = [f"### {where}.{node.name}\n", _described(ast.get_docstring(node))]
    if fields := [each for each in node.body if isinstance(each, ast.AnnAssign)]:
        lines = "\n".join(f"{ast.unparse(each)}" for each in fields)
        parts.insert(1, f"```python\n{lines}\n```\n")
    elif signature := _constructor(node):
        parts.insert(1, f"```python\n{signature}\n```\n")
    bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in neighbours]
    parts += [f"It has the methods of [{base}](#{(where + base).replace('.', '').lower()}) too.\n" for base in bases]
    parts += _members(found, set(bases))
    return "\n".join(parts)


def _members(found: Found, seen: set[str]) -> list[str]:
    """Public methods and properties, those inherited behind; what is `seen`, methods and bases, is left out."""
    parts: list[str] = []
    assert isinstance(found.node, ast.ClassDef)
    for each in found.node.body:
        if not isinstance(each, ast.FunctionDef) or each.name.startswith("_") or each.name in seen:
            continue
        seen.add(each.name)
        decorators = {ast.unparse(decorator) for decorator in each.decorator_list}
        title = f"{found.node.name}.{each.name}"
        if "property" in decorators:
            kind = f": `{ast.unparse(each.returns)}`" if each.returns else ""
            parts.append(f"#### {title}\n\nProperty{kind}. {_described(ast.get_docstring(each))}")
        else:
            parts.append(_function(title, each, level=4, is_method="staticmethod" not in decorators))
    for base in found.node.bases:
        if isinstance(base, ast.Name) and base.id not in {"Protocol", "TypedDict", "NamedTuple", "Exception"} | seen:
            try:
                inherited = _define(found.module, base.id)
            except LookupError:
                continue
            parts += _members(inherited, seen)
    return parts


def _constructor(node: ast.ClassDef) -> str:
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return _signature(each, node.name, is_method=True).removesuffix(" -> None")
    return ""


def _function(title: str, node: ast.FunctionDef, *, level: int, is_method: bool = False) -> str:
    signature = _signature(node, node.name, is_method=is_method)
    return f"{'#' * level} {title}\n\n```python\n{signature}\n```\n\n{_described(ast.get_docstring(node))}"


def _signature(node: ast.FunctionDef, name: str, *, is_method: bool) -> str:
    """A call as it may be written, on one line or a line an argument."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
    defaults += given.defaults
    parts = [_argument(each, default) for each, default in zip(positional, defaults, strict=True)]
    if is_method:
        parts = parts[1:]
    if given.vararg:
        parts.append("*" + _argument(given.vararg, None))
    elif given.kwonlyargs:
        parts.append("*")
    parts += [_argument(each, default) for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        parts.append("**" + _argument(given.kwarg, None))
    returned = f" -> {ast.unparse(node.returns)}".replace("'", "") if node.returns else ""
    line = f"{name}({', '.join(parts)}){returned}"
    if len(line) <= 88:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returned}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(argument.annotation).strip(chr(39))}" if argument.annotation else ""
    value = "" if default is None else (" = " if kind else "=") + ast.unparse(default)
    return f"{argument.arg}{kind}{value}"


def _described(docstring: str | None) -> str:
    """A docstring with its sections as lists."""
    parsed = parse(docstring)
    parts = [paragraphs(parsed.text)]
    for section, items in parsed.items.items():
        title = {"Args": "Arguments", "Attributes": "Fields"}.get(section, section)
        parts.append(f"{title}:\n\n" + "\n".join(f"- `{name}`: {escape(said)}" for name, said in items.items()))
    for section, text in parsed.prose.items():
        parts.append(f"{section}: {escape(text[:1].lower() + text[1:] if text[1:2].islower() else text)}")
    return "\n\n".join(parts) + "\n"


def _errors() -> str:
    tree = ast.parse((ROOT / ERRORS).read_text("utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    lines = "\n".join(
        f"- `{node.name}`: {escape(' '.join((ast.get_docstring(node) or '').split()))}" for node in classes
    )
    return (
        "## Errors: arriero.errors\n\n"
        "One class a stage, all under `arriero.ArrieroError`; a message is one line and names the remedy.\n\n" + lines
    )
