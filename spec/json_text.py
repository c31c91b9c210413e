"""JSON of files that others wrote, parsed within bounds: nesting, digits of a number. Standard library only."""

import json
import re
from typing import Any

DEEPEST = 64
"""Lists and objects within one another at most; no file of a checkpoint or a stage has more than ten."""

MOST = 4_000_000
"""Lists and objects at most: each takes 60 bytes of memory, however little it holds; a tokenizer has half a million."""

HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""The beginning of an escape for half of a character beyond the first 65,536, which needs its other half."""

LONG_NUMBER = re.compile(r"\d{41}")
DIGITS = 40
"""Digits of a whole number at most; `model_max_length` is 31 digits long in many tokenizers' configs."""


def parse_json(text: str, *, unique: bool = False) -> Any:
    """Parses JSON.

    Args:
        text: The text; a byte order mark at its beginning is passed over.
        unique: Whether an object that has a name twice is refused; otherwise the last counts.

    Raises:
        ValueError: It is not JSON, nested deeper than `DEEPEST`, of more parts than `MOST`, has a number of more
            than `DIGITS` digits, or a text that is no valid Unicode.
    """
    if text.count("[") + text.count("{") > MOST:
        raise ValueError(f"more than {MOST} lists and objects")
    text = text.removeprefix("\ufeff")
    try:
        whole = _whole if LONG_NUMBER.search(text) else None  # a call for each number takes most of the time
        value = json.loads(text, parse_int=whole, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(value)
    if HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")  # of paths that are not UTF-8
        except UnicodeEncodeError:
            raise ValueError("a text with half a character") from None
    return value


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(named := dict(pairs)) != len(pairs):
        raise ValueError("a name appears twice")
    return named


def _check_depth(value: Any) -> None:
    """Refuses what is nested too deeply, level by level, so that no depth is one of Python's calls."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {DEEPEST} deep")
