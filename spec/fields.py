"""A dataclass rebuilt from plain JSON, its fields checked against their annotations. Standard library only."""

import dataclasses
import functools
import math
import types
import typing
from typing import Any, Literal

from ..errors import shortened

LARGEST = 2**63 - 1
"""The largest magnitude of a whole number; nothing that is counted here comes near it."""


def decode(kind: Any, value: Any) -> Any:
    """Rebuilds a value of an annotated type from plain JSON; unknown or missing fields are errors."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ValueError(f"{shortened(value)} is no object")
        hints = _hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise ValueError(f"unknown field {shortened(unknown[0])} in {kind.__name__}")
        return kind(**{name: _field(hints[name], name, item) for name, item in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{shortened(value)} is no list")
        return tuple(decode(arguments[0], item) for item in value)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else decode(arguments[0], value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{shortened(value)} is none of {', '.join(map(repr, arguments))}")
    elif origin is dict:
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise ValueError(f"{shortened(value)} is no object of texts")
    elif type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{shortened(value)} is no {kind.__name__}")
    if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= LARGEST):
        raise ValueError(f"{shortened(value)} is no number that anything here has")
    return value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _field(kind: Any, name: str, value: Any) -> Any:
    """A field's value; the error of one that cannot be taken names it once."""
    try:
        return decode(kind, value)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith("field ") else f"field {name}: {said}") from error
