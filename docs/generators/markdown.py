"""Docstrings in Google's style, taken apart and written as Markdown that a forge and the site read alike."""

import inspect
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field

SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$")
ITEM = re.compile(r"^(\*{0,2}\w+)(?: \([^)]*\))?: (.*)$")
CODE = re.compile(r"(`[^`]*`)")
MEANT = re.compile(r"(\*|<(?=[A-Za-z/!])|(?<!\w)_|_(?!\w)|\[(?=[^\[\]]*\]\())")
"""Characters that begin emphasis, markup or a link."""


@dataclass
class Docstring:
    """A docstring's parts.

    Attributes:
        text: All that stands in front of the sections, in paragraphs.
        items: By section, names and what is said of them.
        prose: By section (`Returns`, `Yields`), its text.
    """

    text: list[str] = field(default_factory=list)
    items: dict[str, dict[str, str]] = field(default_factory=dict)
    prose: dict[str, str] = field(default_factory=dict)


def parse(docstring: str | None) -> Docstring:
    """Takes a docstring apart."""
    parsed, section = Docstring(), ""
    body: dict[str, list[str]] = {"": []}
    for line in inspect.cleandoc(docstring or "").splitlines():
        if match := SECTION.match(line):
            section = match[1]
            body[section] = []
        elif section and line and not line.startswith(" "):
            section = ""  # prose again
            body[""].append(line)
        else:
            body[section].append(line)
    parsed.text = [part for part in re.split(r"\n\s*\n", "\n".join(body.pop(""))) if part.strip()]
    for name, lines in body.items():
        text = textwrap.dedent("\n".join(lines)).strip()
        if name in ("Returns", "Yields"):
            parsed.prose[name] = " ".join(text.split())
        else:
            parsed.items[name] = _items(text)
    return parsed


def _items(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    last = ""
    for line in text.splitlines():
        if match := ITEM.match(line):
            last = match[1]
            found[last] = match[2]
        elif last:
            found[last] += " " + line.strip()
    return {name: " ".join(said.split()) for name, said in found.items()}


def escape(text: str) -> str:
    """Plain text as Markdown: what has a meaning there is escaped, code in backticks is left alone."""
    return "".join(part if part.startswith("`") else MEANT.sub(r"\\\1", part) for part in CODE.split(text))


def paragraphs(parts: Iterable[str]) -> str:
    """Paragraphs of a docstring; indented ones are code."""
    written = []
    for part in parts:
        if part.startswith("    "):
            written.append("```text\n" + textwrap.dedent(part).rstrip() + "\n```")
        else:
            written.append(escape(" ".join(part.split())))
    return "\n\n".join(written)


def table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; pipes within cells are escaped."""
    heads = list(headers)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)
