"""Values of settings as people and files give them: taken rightly, or refused with what was expected.

Enters: a setting's name and any value. Leaves: the value in one type. Invariant: whatever comes in, a `SessionError` is
all that comes out beside it.
"""

from collections.abc import Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import SessionError, shortened

BEYOND = 10**100
"""No number of anything that is counted, nor of a float that stands for one."""


def refuse(name: str, value: Any, expected: str) -> NoReturn:
    """Raises the error for a value that cannot be taken."""
    raise SessionError(f"{name} is {shortened(value)}, expected {expected}")


def whole(name: str, value: Any, expected: str = "a whole number from 0 up", *, least: int = 0) -> int:
    """A whole number; 50.0 is one, True, "50" and 1e308 are none."""
    taken = _integer(value)
    if taken is None or not least <= taken < BEYOND:
        refuse(name, value, expected)
    return taken


def number(name: str, value: Any, expected: str, least: float, most: float = float("inf")) -> float:
    """A finite number from `least` to `most`."""
    value = _scalar(value)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        refuse(name, value, expected)
    try:
        taken = float(value)
    except (OverflowError, ValueError):
        refuse(name, value, expected)
    if not np.isfinite(taken) or not least <= taken <= most:
        refuse(name, value, expected)
    return taken


def flag(name: str, value: Any) -> bool:
    """True or False."""
    value = _scalar(value)
    if not isinstance(value, (bool, np.bool_)):
        refuse(name, value, "True or False")
    return bool(value)


def token_ids(name: str, value: Any, vocabulary: int | None = None) -> tuple[int, ...]:
    """One token id or several, each once; where a vocabulary is given, of its tokens."""
    expected = "one token id or a list of them"
    taken = [_integer(each) for each in _several(value)]
    if any(each is None or each < 0 for each in taken):
        refuse(name, value, expected)
    if vocabulary is not None and (outside := [each for each in taken if each is not None and each >= vocabulary]):
        raise SessionError(f"{name}: token id {shortened(outside[0])} is outside the vocabulary of {vocabulary}")
    return tuple(dict.fromkeys(each for each in taken if each is not None))


def token_lists(name: str, value: Any, vocabulary: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Lists of token ids; empty ones are ignored."""
    expected = "a list of lists of token ids"
    rows: list[tuple[int, ...]] = []
    for each in _several(value):
        if not _is_several(each):
            refuse(name, value, expected)
        taken = [_integer(token) for token in _several(each)]
        if any(token is None or token < 0 for token in taken):
            refuse(name, value, expected)
        rows.append(tuple(token for token in taken if token is not None))
        if vocabulary is not None and any(token >= vocabulary for token in rows[-1]):
            raise SessionError(f"{name}: token id {shortened(max(rows[-1]))} is outside the vocabulary of {vocabulary}")
    return tuple(dict.fromkeys(row for row in rows if row))


def texts(name: str, value: Any) -> tuple[str, ...]:
    """One text or several; empty ones are ignored."""
    several = (value,) if isinstance(value, str) else _several(value)
    if not all(isinstance(each, str) for each in several):
        refuse(name, value, "a text or a list of texts")
    return tuple(dict.fromkeys(str(each) for each in several if each))


def biases(name: str, value: Any, vocabulary: int | None = None) -> dict[int, float]:
    """Numbers that are added to tokens' logits; an id may be a text of digits, as JSON has it."""
    expected = "numbers from -100 to 100 by token id"
    if not isinstance(value, Mapping):
        refuse(name, value, expected)
    taken: dict[int, float] = {}
    for key, bias in value.items():
        digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
        token = int(key) if digits else _integer(key)
        if token is None or token < 0:
            refuse(name, value, expected)
        taken[token] = number(name, bias, expected, -100.0, 100.0)
    if vocabulary is not None and taken and max(taken) >= vocabulary:
        raise SessionError(f"{name}: token id {shortened(max(taken))} is outside the vocabulary of {vocabulary}")
    return taken


def array(values: Any) -> NDArray[Any]:
    """Values as an array; those that make none, as rows of unlike lengths, as one without dimensions."""
    try:
        return np.asarray(values)
    except Exception:  # of whatever kind: another library's object may raise anything
        return np.array(None)


def is_whole(values: NDArray[Any]) -> bool:
    """Whether all values are whole numbers, of any size."""
    if values.dtype.kind == "O":
        return all(isinstance(each, int) for each in values.flat)
    return values.dtype.kind in "iu"


def _scalar(value: Any) -> Any:
    """An array of no dimensions as its number."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _integer(value: Any) -> int | None:
    """A whole number, None for all else."""
    value = _scalar(value)
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, Integral):
        return int(value)
    return int(value) if isinstance(value, (float, np.floating)) and float(value).is_integer() else None


def _is_several(value: Any) -> bool:
    """Whether a value is a collection of values: a text, bytes and a mapping are none."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes, bytearray))


def _several(value: Any) -> list[Any]:
    """The values of a collection, or the one value."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return list(value) if _is_several(value) else [value]
