"""The text that every Python ships, as documents split into training and held-out parts.

Enters: the running Python's own documentation (`pydoc_data.topics`, the docstrings of the standard library and of the
built-in types). Leaves: `Document`s. A document's part is chosen by a hash of its name, so a document that is held out
here is held out on every machine.

Run it to write the held-out text to a file: `python corpus.py held_out.txt`.
"""

import ast
import hashlib
import importlib
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_SHARE = 16
"""One document in this many is never trained on."""

SHORTEST = 60
"""Docstrings with fewer characters say little and are left out."""

SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data", "encodings"}


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of documentation: a dotted name (or a topic) and its text."""

    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """Whether the document is kept for measuring, by its name alone."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big") % HELD_OUT_SHARE == 0


def topic_documents() -> Iterator[Document]:
    """The language reference, as `help("while")` shows it."""
    for name, text in sorted(topics.items()):
        yield Document(f"topic {name}", text.strip())


def source_documents() -> Iterator[Document]:
    """The docstrings of the standard library's modules, classes and functions, read without importing them."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(path.read_text("utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
        module = ".".join(part for part in parts if part != "__init__")
        yield from _docstrings(tree, module)


def _docstrings(node: ast.AST, name: str) -> Iterator[Document]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and len(text) >= SHORTEST:
            signature = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
            yield Document(name, f"{name}{signature}\n\n{text}")
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child, f"{name}.{child.name}" if hasattr(child, "name") else name)


def builtin_documents() -> Iterator[Document]:
    """The docstrings of what is written in C: the built-in types and modules."""
    for module_name in sorted(sys.builtin_module_names):
        module = importlib.import_module(module_name)
        for name, value in sorted(vars(module).items()):
            if name.startswith("_"):
                continue
            members = sorted(vars(value).items()) if inspect.isclass(value) else []
            for member, documented in [("", value), *members]:
                text = getattr(documented, "__doc__", None)
                if callable(documented) and isinstance(text, str) and len(text) >= SHORTEST:
                    full_name = ".".join(filter(None, (module_name.lstrip("_"), name, member)))
                    yield Document(full_name, f"{full_name}\n\n{inspect.cleandoc(text)}")


def documents() -> list[Document]:
    """All documents, each text once, in an order that does not depend on the machine."""
    seen: set[str] = set()
    unique = []
    for document in (*topic_documents(), *builtin_documents(), *source_documents()):
        body = document.text.partition("\n\n")[2]
        if body not in seen:
            seen.add(body)
            unique.append(document)
    return unique


def held_out_text() -> str:
    """The held-out documents as one text, topics first."""
    return "\n\n\n".join(document.text for document in documents() if document.is_held_out)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(held_out_text(), "utf-8")
