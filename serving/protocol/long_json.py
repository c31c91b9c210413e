"""JSON of any length read piece by piece, so that no other thread waits for the whole of it.

Enters: a body's bytes. Leaves: the data that `json.loads` makes of them. Invariant: between two pieces other threads
may run, and objects are too few for collecting garbage to stop them. C holds the interpreter while it reads, about
half a second for a body of 32 MB: here it gets some numbers of a list, or some characters of a text, at a time, and
Python reads what stands around them.
"""

import codecs
import json
import re
from collections.abc import Callable
from json.decoder import JSONDecodeError, JSONObject, scanstring  # type: ignore[attr-defined]
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

Scan = Callable[[str, int], tuple[Any, int]]
"""Reads the value at a place of a text. Returns it, and the place behind it."""

SHORT = 1 << 16
"""Bytes that C reads at once; a millisecond."""

PIECE = 1 << 18
"""Bytes and plain characters of a piece."""

NUMBERS = re.compile(r"(?:\s{0,9}-?(?:0|[1-9]\d{0,17})\s{0,9},){1,4096}")
"""Whole numbers of a list, each with its comma."""

PLAIN = re.compile(rf'[^"\\\x00-\x1f]{{0,{PIECE}}}')
HALVES = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
"""A character that is written in two halves, which no piece may part."""

ESCAPED = re.compile(rf'(?:[^"\\\x00-\x1f]{{0,16}}(?:{HALVES}|\\(?:u[0-9a-fA-F]{{4}}|["\\/bfnrt]))){{1,4096}}')
MOST_VALUES = 1 << 19
"""Values of a long body at most, beside whole numbers that follow one another."""

SPACE = re.compile(r"[ \t\n\r]*")


def read_json(body: bytes | bytearray) -> Any:
    """Reads a body.

    Raises:
        ValueError: It is no JSON, or not in UTF-8.
        RecursionError: It is too deep.
    """
    if len(body) <= SHORT:
        return json.loads(bytes(body), parse_constant=_no_constant)
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    view = memoryview(body)
    pieces = [decoder.decode(view[start : start + PIECE]) for start in range(0, len(body), PIECE)]
    text = "".join([*pieces, decoder.decode(b"", final=True)])
    return _Reader().decode(text)


class _Reader(json.JSONDecoder):
    """The standard library's decoder in Python, its lists and texts in pieces."""

    def __init__(self) -> None:
        super().__init__(parse_constant=_no_constant)
        self.values = 0
        self.parse_array = lambda where, scan: _array(where, self._counted(scan))
        self.parse_object = lambda where, strict, scan, *rest: JSONObject(where, strict, self._counted(scan), *rest)
        self.parse_string = _string
        self.scan_once = py_make_scanner(self)

    def _counted(self, scan: Scan) -> Scan:
        def scan_once(text: str, end: int) -> tuple[Any, int]:
            self.values += 1
            if self.values > MOST_VALUES:
                raise ValueError(f"more than {MOST_VALUES} values")
            return scan(text, end)

        return scan_once


def _array(where: tuple[str, int], scan_once: Scan) -> tuple[list[Any], int]:
    """Reads a list from behind its bracket."""
    text, end = where
    found: list[Any] = []
    end = _skip(text, end)
    if text[end : end + 1] == "]":
        return found, end + 1
    while True:
        if numbers := NUMBERS.match(text, end):
            found += json.loads(f"[{numbers[0][:-1]}]")
            end = _skip(text, numbers.end())
        try:
            value, end = scan_once(text, end)
        except StopIteration as error:
            raise JSONDecodeError("Expecting value", text, error.value) from None
        found.append(value)
        end = _skip(text, end)
        sign = text[end : end + 1]
        if sign == "]":
            return found, end + 1
        if sign != ",":
            raise JSONDecodeError("Expecting ',' delimiter", text, end)
        end = _skip(text, end + 1)


def _string(text: str, end: int, strict: bool = True) -> tuple[str, int]:
    """Reads a text from behind its quote."""
    close = text.find('"', end, end + SHORT)
    if close >= 0 and text[close - 1] != "\\":
        return scanstring(text, end, strict)
    parts: list[str] = []
    while True:
        start = end
        end = PLAIN.match(text, end).end()  # type: ignore[union-attr] # the empty text matches
        parts.append(text[start:end])
        if text[end : end + 1] == '"':
            return "".join(parts), end + 1
        escaped = ESCAPED.match(text, end)
        if escaped is None:
            if end == start:
                return scanstring(text, end, strict)[0], end  # raises what is wrong
            continue
        parts.append(scanstring(f'{escaped[0]}"', 0, strict)[0])
        end = escaped.end()


def _skip(text: str, end: int) -> int:
    """The place behind white space."""
    return SPACE.match(text, end).end()  # type: ignore[union-attr] # the empty text matches


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
