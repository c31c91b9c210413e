"""A dataclass rebuilt from plain JSON, its fields checked against their annotations. Standard library only."""

import dataclasses
import types
import typing
from typing import Any, Literal


def decode(kind: Any, value: Any) -> Any:
    """Rebuilds a value of an annotated type from plain JSON; unknown or missing fields are errors."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is no object")
        hints = typing.get_type_hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise ValueError(f"unknown field {unknown[0]!r} in {kind.__name__}")
        return kind(**{name: decode(hints[name], item) for name, item in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{value!r} is no list")
        return tuple(decode(arguments[0], item) for item in value)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else decode(arguments[0], value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{value!r} is none of {', '.join(map(repr, arguments))}")
    elif origin is dict:
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise ValueError(f"{value!r} is no object of texts")
    elif type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value
