"""Safetensors files, read without trust: where each tensor lies, proven to be inside the file before anyone maps it.

Enters: a path. Leaves: a `Shard` whose regions cover the file's data without gap or overlap, as the format demands
(8 bytes of header length, a JSON header, the data). Nothing of the data is read. Standard library only.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from ..errors import CheckpointError, shortened_text
from ..spec.json_text import parse_json
from .reading import open_regular

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6,
}  # fmt: skip
"""Bits of one element, by the format's type names."""

LONGEST_HEADER = 1 << 25
"""Bytes: ten times those of a model with its experts one by one in a single file."""

MOST_TENSORS = 100_000
"""Tensors of a file: three times those of such a model, whose experts have scales and zero points beside them."""

LONGEST_NAME = 250
"""Characters of a tensor's name; a longer one is damage, and no error repeats it."""

POINTER = b"version https://git-lfs"
"""Beginning of the text that git leaves in place of a large file."""


@dataclass(frozen=True, slots=True)
class Region:
    """One tensor in a file.

    Attributes:
        dtype: The format's type name, as in `BF16`.
        shape: Dimensions, row-major.
        offset: First byte, counted from the start of the file.
        size: Bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file, its tensors by name, and the texts that its writer put beside them."""

    path: Path
    size: int
    tensors: dict[str, Region]
    metadata: dict[str, str]


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The beginning of a file whose tensors, given by type and shape, lie one behind another in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * ITEM_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the first tensor lies at the beginning of a cache line
    return len(text).to_bytes(8, "little") + text


def open_shard(path: Path) -> Shard:
    """Reads and checks a file's header.

    Raises:
        CheckpointError: The file is missing, truncated, or its header is damaged or lies about the data.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = 8 + _header_length(path, file.read(8), size)
            text = file.read(start - 8)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}: restore the file") from error
    header = _parse(path, text)
    tensors = {name: _region(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"}
    _check_cover(path, tensors, start, size)
    texts = header.get("__metadata__")
    return Shard(path, size, tensors, texts if isinstance(texts, dict) else {})


def identity(path: Path) -> str:
    """A cheap fingerprint of a file of any size: SHA-256 over its length, header, and 16 samples of its data.

    It tells a file from another one; it does not prove that no byte changed.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            digest = hashlib.sha256(str(size).encode() + start)
            header_end = 8 + _header_length(path, start, size)
            digest.update(file.read(header_end - 8))
            for sample in samples(file, header_end, size):
                digest.update(sample)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}: restore the file") from error
    return digest.hexdigest()


def samples(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """16 samples of 4 KB at most of what lies between two places of a file."""
    for part in range(16):
        file.seek(start + (end - start) * part // 16)
        yield file.read(4096)


class PointerError(CheckpointError):
    """A file is what git leaves in place of a large one."""


def check_downloaded(path: Path, start: bytes) -> None:
    """Refuses what git leaves in place of a large file.

    Args:
        path: The file.
        start: Its first bytes, 8 at least.

    Raises:
        PointerError: It is such a pointer.
    """
    if len(start) >= 8 and POINTER.startswith(start[: len(POINTER)]):
        raise PointerError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")


def _header_length(path: Path, start: bytes, size: int) -> int:
    check_downloaded(path, start)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or 8 + length > size:
        raise CheckpointError(f"{path}: truncated or no safetensors file ({size} bytes): download it again")
    if length > LONGEST_HEADER:
        raise CheckpointError(f"{path}: damaged, its header claims {length} bytes: download it again")
    return length


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    if text.count(b"{") > MOST_TENSORS + 2:
        raise CheckpointError(f"{path}: damaged header (more than {MOST_TENSORS} tensors): download it again")
    try:
        header = parse_json(text.decode("utf-8"), unique=True)
    except ValueError as error:
        said = shortened_text(str(error), 100)
        raise CheckpointError(f"{path}: damaged header ({said}): download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged header (not an object): download it again")
    return header


def _region(path: Path, name: str, entry: Any, start: int) -> Region:
    def damaged(what: str) -> CheckpointError:
        what = what if len(what) <= 100 else f"{what[:100]}…"
        return CheckpointError(f"{path}: damaged header, tensor {name!r} has {what}: download it again")

    if len(name) > LONGEST_NAME:
        raise CheckpointError(f"{path}: damaged header, a tensor's name has {len(name)} characters: download it again")
    if not isinstance(entry, dict):
        raise damaged(f"the entry {entry!r}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise damaged(f"dtype {dtype!r}")
    if not _are_counts(shape):
        raise damaged(f"shape {shape!r}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(f"data_offsets {offsets!r}")
    size = offsets[1] - offsets[0]
    if math.prod(shape) * ITEM_BITS[dtype] != size * 8:
        raise damaged(f"{size} bytes for {dtype} {shape}")
    return Region(dtype, tuple(shape), start + offsets[0], size)


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_cover(path: Path, tensors: dict[str, Region], start: int, size: int) -> None:
    """The regions must follow each other from the end of the header to the end of the file."""
    end = start
    for name, region in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if region.offset != end:
            what = "overlaps another" if region.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: damaged header, the data of {name!r} {what}: download it again")
        end += region.size
    if end != size:
        what = "truncated" if end > size else "too long"
        raise CheckpointError(f"{path}: {what}, {size} bytes where its header says {end}: download it again")
