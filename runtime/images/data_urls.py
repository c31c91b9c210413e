"""Images that stand in their own addresses: data URLs.

Enters: a text. Leaves: the bytes of a file, of at most `MAX_BYTES`.
"""

import base64
import re
from urllib.parse import unquote_to_bytes

from ...errors import SessionError, shortened

MAX_BYTES = 8 << 27
"""The largest file of an image: 134 megapixels of four channels of 16 bits, uncompressed. Some decoders read a whole
file at once."""

PIECE = 1 << 20
"""Characters of base64 that are read at once: C holds the interpreter meanwhile."""

SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):", re.ASCII)
"""The beginning of an address; one letter alone is a drive."""


def scheme_of(text: str) -> str | None:
    """The scheme of an address, in small letters; None where a text is a path."""
    found = SCHEME.match(text)
    scheme = found[1].lower() if found else None
    return scheme if scheme in ("data", "file") or (found and text[found.end() :].startswith("//")) else None


def read_data_url(url: str, name: str) -> bytes:
    """The bytes in a data URL.

    Args:
        url: `data:`, a media type, `;base64` where that is so, a comma and the data.
        name: Name of the image, in errors.

    Raises:
        SessionError: There is no data in it, it is damaged, or too large.
    """
    head, comma, data = url.partition(",")
    if not comma or not data:
        raise SessionError(f"{name}: the data URL {shortened(url)} holds no data: give data:image/png;base64,…")
    if head.lower().endswith(";base64"):
        return decode_base64(unquote_to_bytes(data).decode("latin-1") if "%" in data else data, name)
    _check_size(len(data), name)
    try:
        return unquote_to_bytes(data)
    except UnicodeError as error:
        raise SessionError(f"{name}: the data URL {shortened(url)} is damaged: give its data in base64") from error


def decode_base64(text: str, name: str) -> bytes:
    """The bytes that a text is the base64 of, of either alphabet, with or without padding and line breaks.

    Raises:
        SessionError: It is none, or too large.
    """
    _check_size(len(text) * 3 // 4, name)
    text = text.rstrip("= \t\r\n\v\f")
    found, rest = bytearray(), ""
    try:
        for start in range(0, len(text), PIECE):  # between which other threads may run
            rest += "".join(text[start : start + PIECE].split()).replace("-", "+").replace("_", "/")
            if "=" in rest:
                raise ValueError("padding within the data")
            packed, rest = rest[: len(rest) // 4 * 4], rest[len(rest) // 4 * 4 :]
            found += base64.b64decode(packed, validate=True)
        return bytes(found + base64.b64decode(rest + "=" * (-len(rest) % 4), validate=True))
    except ValueError as error:
        raise SessionError(f"{name}: {shortened(text)} is damaged base64 ({error}): give all of it") from error


def _check_size(size: int, name: str) -> None:
    if size > MAX_BYTES:
        raise SessionError(f"{name}: {size} bytes, expected at most {MAX_BYTES}: scale it down")
