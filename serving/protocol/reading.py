"""JSON read into dataclasses by their annotations, and the JSON schemas that say the same.

Enters: a dataclass, and data of any kind. Leaves: an instance, or a `RequestError` that names the field. Invariant:
what the schema allows is read, and what it does not is refused; so a description never differs from the check.

Annotations may be `bool`, `int`, `float`, `str`, `None`, `Any`, `Literal`, dataclasses, lists, dictionaries by text,
and unions of them; `Annotated` adds `Within` to numbers and `Sized` to texts, lists and dictionaries.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from ...errors import shortened
from ..errors import RequestError

T = TypeVar("T")
FEW = 4096
"""Whole numbers that are looked at together."""

ABSENT = object()
"""The value of an answer's field that is left out."""


@dataclass(frozen=True, slots=True)
class Within:
    """Bounds of a number; `above` is a bound that it must pass."""

    least: float | None = None
    most: float | None = None
    above: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sized:
    """Bounds of a length, and the pattern of a text or of a dictionary's names."""

    least: int = 0
    most: int | None = None
    pattern: str | None = None


def read(cls: type[T], value: Any, where: str = "") -> T:
    """Reads an object.

    Args:
        cls: The dataclass.
        value: Data, as JSON gives it.
        where: The field that it stands in; empty for a whole request.

    Raises:
        RequestError: It is not as the dataclass says.
    """
    if not isinstance(value, dict):
        refuse(where, value, "an object")
    known = _annotations(typing.cast(Any, cls))
    for name in value:
        if name not in known:
            path = _join(where, _named(name))
            raise RequestError(f"{path} is not a field that this server knows: leave it out", path)
    given: dict[str, Any] = {}
    for name, is_needed in _fields(typing.cast(Any, cls)):
        if name in value:
            given[name] = take(known[name], value[name], _join(where, name))
        elif is_needed:
            path = _join(where, name)
            raise RequestError(f"{path} is missing: give it", path)
    return cls(**given)


def take(annotation: Any, value: Any, where: str) -> Any:
    """Reads a value as an annotation says."""
    annotation, marks, origin, arguments, is_object = _parts(annotation)
    if annotation is Any:
        return value
    if annotation is None or annotation is types.NoneType:
        return None if value is None else refuse(where, value, "null")
    if is_object:
        return read(typing.cast(Any, annotation), value, where)
    if origin is Literal:
        for each in arguments:
            if type(each) is type(value) and each == value:
                return each
        return refuse(where, value, _one_of(arguments))
    if origin in (types.UnionType, typing.Union):
        return _take_one(arguments, value, where)
    if origin is list:
        if not isinstance(value, list):
            refuse(where, value, "a list")
        _check_size(marks, value, where, "items")
        taken: list[Any] = []
        for start in range(0, len(value), FEW):  # between which other threads may run
            some = value[start : start + FEW]
            items = enumerate(some, start)
            is_plain = _are_whole(arguments[0], some)
            taken += some if is_plain else [take(arguments[0], each, f"{where}[{index}]") for index, each in items]
        return taken
    if origin is dict or annotation is dict:
        if not isinstance(value, dict):
            refuse(where, value, "an object")
        _check_size(marks, value, where, "entries")
        return {key: take(arguments[1], each, _join(where, _named(key))) for key, each in value.items()}
    return _take_plain(annotation, marks, value, where)


def schema(annotation: Any, components: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an annotation; dataclasses are put into `components` by their names."""
    annotation, marks = _unwrap(annotation)
    if annotation is Any:
        return {}
    if annotation is None or annotation is types.NoneType:
        return {"type": "null"}
    if dataclasses.is_dataclass(annotation):
        name = typing.cast(Any, annotation).__name__
        if name not in components:
            components[name] = {}
            components[name] = _object_schema(annotation, components)
        return {"$ref": f"#/components/schemas/{name}"}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [schema(each, components) for each in arguments]}
    if origin is list:
        return {"type": "array", "items": schema(arguments[0], components), **_size_schema(marks, "Items")}
    if origin is dict or annotation is dict:
        sized = _size_schema(marks, "Properties")
        pattern = sized.pop("pattern", None)
        names = {} if pattern is None else {"propertyNames": {"pattern": pattern}}
        return {"type": "object", "additionalProperties": schema(arguments[1], components), **names, **sized}
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    found: dict[str, Any] = {"type": kinds[annotation]}
    for mark in marks:
        if isinstance(mark, Within):
            bounds = {"minimum": mark.least, "maximum": mark.most, "exclusiveMinimum": mark.above}
            found |= {name: bound for name, bound in bounds.items() if bound is not None}
    return found | (_size_schema(marks, "Length") if annotation is str else {})


def refuse(where: str, value: Any, expected: str) -> typing.NoReturn:
    """Raises the error for a value that is not as it must be."""
    name = where or "the request"
    raise RequestError(f"{name} is {shortened(value)}, expected {expected}", where or None)


def plain(value: Any) -> Any:
    """An answer's dataclass as JSON has it; what is `ABSENT` is left out."""
    if dataclasses.is_dataclass(value):
        fields = ((each.name, getattr(value, each.name)) for each in dataclasses.fields(value))
        return {name: plain(each) for name, each in fields if each is not ABSENT}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


@cache
def _annotations(cls: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@cache
def _fields(cls: type[Any]) -> tuple[tuple[str, bool], ...]:
    """The names of a dataclass's fields, and whether each must be given."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    return tuple((each.name, each.default is missing and each.default_factory is missing) for each in fields)


@cache
def _parts(annotation: Any) -> tuple[Any, tuple[Any, ...], Any, tuple[Any, ...], bool]:
    """An annotation without its marks, these, its origin and arguments, and whether it is a dataclass."""
    inner, marks = _unwrap(annotation)
    return inner, marks, typing.get_origin(inner), typing.get_args(inner), dataclasses.is_dataclass(inner)


def _unwrap(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *marks = typing.get_args(annotation)
        return inner, tuple(marks)
    return annotation, ()


def _take_one(options: tuple[Any, ...], value: Any, where: str) -> Any:
    """Reads a value as the one of several annotations that it is like; the error is that one's."""
    errors: list[tuple[int, RequestError]] = []
    for option in options:
        try:
            return take(option, value, where)
        except RequestError as error:
            errors.append((_likeness(option, value), error))
    likeness, closest = max(errors, key=lambda each: each[0])
    if isinstance(value, dict) and (tags := _tags(options)) and likeness < 3:
        name = "role" if "role" in value and "role" in tags else next(iter(tags))
        if name not in value:
            raise RequestError(f"{_join(where, name)} is missing: give it", _join(where, name))
        refuse(_join(where, name), value[name], _one_of(tags[name]))
    if likeness:
        raise closest
    return refuse(where, value, " or ".join(dict.fromkeys(_kind(each) for each in options)))


def _tags(options: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """The values of the fields by which objects of several kinds are known apart."""
    found: dict[str, tuple[Any, ...]] = {}
    for option in options:
        option, _ = _unwrap(option)
        if dataclasses.is_dataclass(option):
            for name in ("type", "role"):
                values = typing.get_args(_annotations(typing.cast(Any, option)).get(name))
                if all(isinstance(each, str) for each in values):
                    found[name] = (*found.get(name, ()), *values)
    return {name: values for name, values in found.items() if values}


def _likeness(option: Any, value: Any) -> int:
    """The extent to which a value is meant as an annotation says: 0 where it is of another kind."""
    option, _ = _unwrap(option)
    origin = typing.get_origin(option)
    if dataclasses.is_dataclass(option):
        if not isinstance(value, Mapping):
            return 0
        hints = _annotations(typing.cast(Any, option))
        tags = [name for name in ("type", "role") if name in hints and name in value]
        return 1 + sum(value[name] in typing.get_args(hints[name]) for name in tags if _is_plain(value[name])) * 2
    if origin is list:
        return int(isinstance(value, list)) + int(
            isinstance(value, list) and bool(value) and _likeness(typing.get_args(option)[0], value[0]) > 0
        )
    if origin is dict or option is dict:
        return int(isinstance(value, dict))
    if origin is Literal:
        return int(any(type(each) is type(value) for each in typing.get_args(option)))
    if option in (int, float):
        return int(isinstance(value, int | float) and not isinstance(value, bool))
    return int(option in (str, bool) and isinstance(value, option))


def _is_plain(value: Any) -> bool:
    return isinstance(value, str)


def _kind(annotation: Any) -> str:
    """An annotation in words."""
    annotation, _ = _unwrap(annotation)
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return _one_of(typing.get_args(annotation))
    if dataclasses.is_dataclass(annotation) or origin is dict:
        return "an object"
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
    return names.get(origin or annotation, "null")


def _one_of(options: tuple[Any, ...]) -> str:
    return " or ".join(f"{each!r}" if isinstance(each, str) else str(each).lower() for each in options)


def _are_whole(annotation: Any, values: list[Any]) -> bool:
    """Whether values, one or more, are whole numbers within an annotation's bounds: what `take` finds one by one."""
    annotation, marks = _unwrap(annotation)
    if annotation is not int or set(map(type, values)) != {int}:
        return False
    ends = min(values), max(values)
    return not any(isinstance(mark, Within) and _is_beyond(mark, end) for mark in marks for end in ends)


def _take_plain(annotation: Any, marks: tuple[Any, ...], value: Any, where: str) -> Any:
    """Reads a text, a number or a truth."""
    if annotation is bool:
        return value if isinstance(value, bool) else refuse(where, value, "true or false")
    if annotation is str:
        if not isinstance(value, str):
            refuse(where, value, "a text")
        _check_size(marks, value, where, "characters")
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        if not is_number or (isinstance(value, float) and not value.is_integer()):
            refuse(where, value, f"a whole number{_bounds(marks)}")
        value = int(value)
    elif not is_number:
        refuse(where, value, f"a number{_bounds(marks)}")
    for mark in marks:
        if isinstance(mark, Within) and _is_beyond(mark, value):
            refuse(where, value, f"a {'whole ' if annotation is int else ''}number{_bounds(marks)}")
    try:
        return value if annotation is int else float(value)
    except OverflowError:
        refuse(where, value, "a smaller number")


def _is_beyond(bound: Within, value: float) -> bool:
    low = (bound.least is not None and value < bound.least) or (bound.above is not None and value <= bound.above)
    return low or (bound.most is not None and value > bound.most)


def _bounds(marks: tuple[Any, ...]) -> str:
    for mark in marks:
        if isinstance(mark, Within):
            parts = [f"above {mark.above:g}" if mark.above is not None else ""]
            parts += [f"from {mark.least:g}" if mark.least is not None else ""]
            parts += [f"to {mark.most:g}" if mark.most is not None else ""]
            return "".join(f" {part}" for part in parts if part)
    return ""


def _check_size(marks: tuple[Any, ...], value: Any, where: str, of: str) -> None:
    for mark in marks:
        if isinstance(mark, Sized):
            if len(value) < mark.least or (mark.most is not None and len(value) > mark.most):
                most = "" if mark.most is None else f", at most {mark.most}"
                raise RequestError(f"{where} has {len(value)} {of}, expected at least {mark.least}{most}", where)
            names = value if isinstance(value, dict) else [value] if isinstance(value, str) else []
            pattern = (mark.pattern or "").replace("$", r"\Z")  # Python's $ lets a line's end follow
            if wrong := [name for name in names if not re.search(pattern, name)]:
                raise RequestError(f"{where} has {shortened(wrong[0])}, expected it to match {mark.pattern}", where)


def _size_schema(marks: tuple[Any, ...], of: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mark in marks:
        if isinstance(mark, Sized):
            found |= {f"min{of}": mark.least} if mark.least else {}
            found |= {} if mark.most is None else {f"max{of}": mark.most}
            found |= {} if mark.pattern is None else {"pattern": mark.pattern}
    return found


def _object_schema(cls: Any, components: dict[str, Any]) -> dict[str, Any]:
    """The schema of a dataclass; its fields' descriptions are those of its docstring."""
    described = _descriptions(cls)
    properties, required = {}, []
    for name, annotation in _annotations(cls).items():
        about = {"description": described[name]} if name in described else {}
        properties[name] = schema(annotation, components) | about
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            required.append(field.name)
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": required} if required else {}) | {"description": _summary(cls)}


def _summary(cls: Any) -> str:
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def _descriptions(cls: Any) -> dict[str, str]:
    """The descriptions of fields under `Attributes:` in a class's docstring and those of its bases."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        text = (each.__doc__ or "").partition("Attributes:\n")[2].split("\n\n")[0]
        for name, line in re.findall(r"(?m)^        (\w+): ((?:.|\n {12})*)", text):
            found[name] = " ".join(line.split())
    return found


def _named(name: str) -> str:
    """A field's name as errors have it."""
    return shortened(name, 40).strip("'\"")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
