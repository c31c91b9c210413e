"""The page of `spec.json`: every field, from the frozen dataclasses that are written as it."""

import dataclasses
import re
import types
import typing
from typing import Any, Literal

from arriero.spec.folder import SCHEMA, FolderSpec

from .markdown import escape, paragraphs, parse, table

PLAIN = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
HEAD = f"""# The fields of spec.json

Every folder that a stage writes holds a `spec.json`: what the folder is, made from what, by which version. Its schema
is {SCHEMA}. Schema 1, where the inputs of quantised experts lay in front of their outputs, is read where that changes
nothing: models and engines with such experts are refused with the verb that makes them anew, bundles for the CPU with
`int8` and `int4` experts are not. A newer one is refused, and so are unknown, missing and wrongly typed fields, each in
one line. [Formats](formats.md) says what else lies in the folders.

[FolderSpec](#folderspec) is the file itself; the other tables are the objects within it, each with the places where it
stands. A field without a default must be there.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    at = places(FolderSpec)
    for kind in nested(FolderSpec):
        parts.append(_section(kind, at.get(kind, [])))
    return "\n".join(parts)


def nested(kind: type, found: dict[type, None] | None = None) -> list[type]:
    """A dataclass and those that its fields hold, the outer before the inner."""
    found = {} if found is None else found
    if kind not in found:
        found[kind] = None
        for annotation in typing.get_type_hints(kind).values():
            for inner in _dataclasses(annotation):
                nested(inner, found)
    return list(found)


def places(kind: type, where: str = "", found: dict[type, list[str]] | None = None) -> dict[type, list[str]]:
    """Where in the file each dataclass stands, as `vision.weights[]`."""
    found = {} if found is None else found
    for name, annotation in typing.get_type_hints(kind).items():
        for inner in _dataclasses(annotation):
            path = f"{where}{name}{'[]' if typing.get_origin(annotation) is tuple else ''}"
            found.setdefault(inner, []).append(path)
            places(inner, f"{path}.", found)
    return found


def undescribed() -> list[str]:
    """Fields that no docstring explains, as `ModelSpec.heads`."""
    found = []
    for kind in nested(FolderSpec):
        said = parse(kind.__doc__).items.get("Attributes", {})
        found += [f"{kind.__name__}.{field.name}" for field in _fields(kind) if field.name not in said]
    return found


def _section(kind: type, at: list[str]) -> str:
    parsed, hints = parse(kind.__doc__), typing.get_type_hints(kind)
    said = parsed.items.get("Attributes", {})
    rows = [
        (f"`{field.name}`", _null(escape(said.get(field.name, ""))), _typed(hints[field.name]), _default(field))
        for field in _fields(kind)
    ]
    where = f"At {', '.join(f'`{path}`' for path in at)}." if at else "The whole file."
    fields = table(("field", "meaning", "type", "default"), rows)
    return f"## {kind.__name__}\n\n{where} {_null(paragraphs(parsed.text))}\n\n{fields}\n"


def _null(text: str) -> str:
    """A docstring's None in JSON's word."""
    return re.sub(r"\bNone\b", "null", text)


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


def _dataclasses(annotation: Any) -> list[type]:
    if dataclasses.is_dataclass(annotation):
        return [typing.cast(type, annotation)]
    return [kind for argument in typing.get_args(annotation) for kind in _dataclasses(argument)]


def _typed(annotation: Any) -> str:
    """A field's type in JSON's words, with a link where it is an object of its own."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        name = typing.cast(type, annotation).__name__
        return f"[{name}](#{name.lower()})"
    if origin is tuple:
        inner = _typed(arguments[0])
        return f"list of {inner + 's' if inner in PLAIN.values() else inner}"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is dict:
        return "object of texts"
    if origin in (types.UnionType, typing.Union):
        return f"{_typed(arguments[0])}, or null"
    return PLAIN[annotation.__name__]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "empty"
    if field.default is dataclasses.MISSING:
        return ""
    if field.default in ("", ()):
        return "empty"
    return {"None": "null", "True": "true", "False": "false"}.get(str(field.default), f"`{field.default}`")
