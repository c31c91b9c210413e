"""Damage to files, drawn from a seed: bytes of any file, values of a JSON file, and things that are no files."""

import json
import os
import random
import socket
from pathlib import Path
from typing import Any

TEXTS = [
    *("", "\0", "../../outside", "/etc/passwd", "..\\x", "a" * 5000, "\ud800", "\x1b[2J", "é" * 300, "C:\\x", "."),
    *("{{ 1 }}", "(a+)+$", "model.safetensors", "spec.json", "float32", "int4", "F32", "<|image|>"),
]
NUMBERS = [0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e308, 1e-320]
RAW = [
    "1e999",
    "-1e999",
    "NaN",
    "9" * 5000,
    "[" * 3000 + "]" * 3000,
    '{"a":' * 500 + "1" + "}" * 500,
    "tru",
    '"\\ud800"',
]
"""Values that only stand in a file's text."""
MARK = "THE-MARK-OF-A-RAW-VALUE"
PIECES = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"{",
    b"}",
    b"[",
    b'"',
    b"\\",
    b"\n",
    b"\x80",
    b"-",
    b"1e999",
    b"\xff" * 8,
]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with some changed, left out, put in, said twice or moved."""
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, count = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 8, 100])
        match rng.randrange(7):
            case 0:
                data = data[:at] + bytes(rng.randrange(256) for _ in range(count)) + data[at + count :]
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + data[at + count :]
            case 3:
                data = data[:at] + rng.choice(PIECES) + data[at:]
            case 4:
                data = data[:at] + data[at : at + count] * 3 + data[at + count :]
            case 5 if data:
                at = min(at, len(data) - 1)
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case _:
                other = rng.randrange(len(data) + 1)
                data = data[:at] + data[other : other + count] + data[at + count :]
    return data


def mutate_json(value: Any, rng: random.Random) -> bytes:
    """A JSON value with some of its parts replaced, left out, renamed, exchanged or nested."""
    value = json.loads(json.dumps(value))
    raws = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = _places(value)
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(8):
            case 0 | 1:
                holder[key] = _junk(rng)
            case 2:
                holder[key] = MARK
                raws.append(rng.choice(RAW))
            case 3:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[rng.choice([*TEXTS, *holder])] = holder.pop(key)
            case 5:
                other, place = rng.choice(places)
                if isinstance(other, dict) == isinstance(holder, dict) and place in (
                    other if isinstance(other, dict) else range(len(other))
                ):
                    holder[key] = json.loads(json.dumps(other[place]))
            case 6 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] += rng.choice([1, -1, 8, holder[key]])
            case _:
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    text = json.dumps(value)
    for raw in raws:
        text = text.replace(f'"{MARK}"', raw, 1)
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each part of a JSON value: what holds it, and its key; of long lists some."""
    found, pending = [], [value]
    while pending and len(found) < 3000:
        each = pending.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        for key in keys:
            found.append((each, key))
            pending.append(each[key])
    return found


def _junk(rng: random.Random) -> Any:
    return rng.choice([None, True, False, [], {}, [[]], rng.choice(TEXTS), rng.choice(NUMBERS), [rng.choice(NUMBERS)]])


def put_no_file(path: Path, rng: random.Random) -> None:
    """Puts something in a file's place that is no regular file of a sane size, or none of the folder's."""
    path.unlink(missing_ok=True)
    match rng.randrange(7):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to("/dev/zero")
        case 2:
            path.mkdir()
        case 3:
            path.symlink_to(path.name)
        case 4:
            path.symlink_to("/nowhere/at/all")
        case 5:
            with path.open("wb") as file:
                file.truncate(3 << 30)
        case _:
            server = socket.socket(socket.AF_UNIX)
            try:
                server.bind(str(path))
            except OSError:  # a path too long for one
                path.symlink_to("/etc/hostname")
            server.close()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file's content damaged: as JSON where it is some, mostly, and else its bytes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict | list) and rng.random() < 0.7:
        return mutate_json(value, rng)
    return mutate_bytes(data, rng)


def mutated_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its header's JSON damaged, the length before it right or wrong."""
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(json.loads(data[8 : 8 + length]), rng)
    said = len(header) if rng.random() < 0.8 else rng.choice([0, 1, len(header) + 1, 2**63, 10**8 + 1, len(data)])
    return said.to_bytes(8, "little", signed=False) + header + data[8 + length :]
