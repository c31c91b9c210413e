"""Checks of what a description says, shared by its dataclasses: file names, counts, hashes. Standard library only."""

import math
import re
from collections.abc import Iterable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import shortened

MOST = 2**31 - 1
"""The largest size of anything that a graph has a dimension of."""

LONGEST_NAME = 250
"""Characters of a file's name at most."""

HASH = re.compile(r"[0-9a-f]{64}")
"""SHA-256 in hexadecimal digits."""


def check_name(what: str, name: str) -> None:
    """Refuses what is not the plain name of a file, on any system.

    Raises:
        ValueError: It is empty, too long, or leads to another folder.
    """
    is_plain = name not in ("", ".", "..") and not any(sign in "/\\:" or ord(sign) < 32 for sign in name)
    if not is_plain or len(name) > LONGEST_NAME:
        raise ValueError(f"{what} is {shortened(name)}, expected a plain file name")


def is_absolute(path: str) -> bool:
    """Whether a path is an absolute one, of this system or another, without steps upwards."""
    places = (PurePosixPath(path), PureWindowsPath(path))
    return "\0" not in path and any(place.is_absolute() and ".." not in place.parts for place in places)


def check_sizes(owner: Any, names: Iterable[str], least: int = 1, most: int = MOST) -> None:
    """Refuses whole numbers of a dataclass that are out of range.

    Raises:
        ValueError: One is; it is named.
    """
    for name in names:
        value = getattr(owner, name)
        if not least <= value <= most:
            raise ValueError(f"{name} is {shortened(value)}, expected {least} to {most}")


def check_positive(owner: Any, names: Iterable[str]) -> None:
    """Refuses numbers of a dataclass that are not above 0.

    Raises:
        ValueError: One is not; it is named.
    """
    for name in names:
        value = getattr(owner, name)
        if not value > 0:
            raise ValueError(f"{name} is {shortened(value)}, expected a number above 0")


def check_shape(what: str, shape: tuple[int, ...]) -> None:
    """Refuses dimensions that no tensor has.

    Raises:
        ValueError: One is negative, there are more than eight, or their product is out of all range.
    """
    if len(shape) > 8 or any(not 0 <= size <= MOST for size in shape) or math.prod(shape) > 2**48:
        raise ValueError(f"{what} has the shape {shortened(list(shape))}, which no tensor has")


def check_hash(what: str, text: str) -> None:
    """Refuses what is no SHA-256.

    Raises:
        ValueError: It is none.
    """
    if not HASH.fullmatch(text):
        raise ValueError(f"{what} is {shortened(text)}, expected 64 hexadecimal digits")
