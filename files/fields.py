"""Fields of JSON that a reader needs, held against what they must be before any is used.

Enters: a value of a parsed file, and its form: a type; a tuple of a form and None, for one that may be null or
missing; a list of one form, for each element; a dictionary of forms by name, or of one form for any name under `str`.
Leaves: nothing, or a `ValueError` that names the field, the value found and what was expected.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import shortened, shortened_text

Form = Any
"""A kind of values, as above."""

WORDS: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
MISSING = object()

LARGEST = 1e100
"""A float at most: nothing that is measured comes near, and what is drawn of it stays finite."""


def check_fields(value: Any, form: Form, where: str = "it") -> None:
    """Holds a value against a form.

    Args:
        value: The value.
        form: What it must be; other names than a dictionary's are let pass.
        where: The value's name.

    Raises:
        ValueError: It is another.
    """
    if isinstance(form, tuple):
        if value is not None and value is not MISSING:
            check_fields(value, next(each for each in form if each is not None), where)
    elif isinstance(form, dict):
        _check_kind(value, dict, where)
        names = value if str in form else form
        for name in names:
            inner = form[str] if str in form else form[name]
            check_fields(value.get(name, MISSING), inner, name if where == "it" else f"{where}.{name}")
    elif isinstance(form, list):
        _check_kind(value, list, where)
        for number, each in enumerate(value):
            check_fields(each, form[0], f"{where}[{number}]")
    else:
        _check_kind(value, form, where)


def _check_kind(value: Any, kind: type, where: str) -> None:
    is_right = isinstance(value, int | float if kind is float else Mapping if kind is dict else kind)
    if kind is not bool and isinstance(value, bool):
        is_right = False
    if is_right and kind is float and not -LARGEST <= value <= LARGEST:
        is_right = False
    if value is MISSING:
        raise ValueError(f"{shortened_text(where, 100)} is missing")
    if not is_right:
        raise ValueError(f"{shortened_text(where, 100)} is {shortened(value)}, expected {WORDS[kind]}")
