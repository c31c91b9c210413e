"""A shard's tensors written anew: in another type, the portions of them that each rank has, or both.

Enters: a shard, and for each file to write the portions of its tensors. Leaves: those files. The shard is read once, a
piece at a time, whatever the number of files; where it is a hole, so are they.
"""

import errno
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import ml_dtypes  # noqa: F401 - makes its types known to numpy
import numpy as np
from numpy.typing import NDArray

from ..errors import ExportError
from ..files.safetensors import Region, Shard, encode_header
from ..plugins.finite import all_finite
from ..spec.types import CODES, FLOATS, TYPES, DType
from .split import WHOLE, Portion

Array = np.ndarray[Any, Any]

FLOAT_DTYPES = {CODES[name]: np.dtype(TYPES[name].numpy) for name in FLOATS}
"""Numpy's float types by their safetensors codes."""

PIECE = 16 << 20
"""Elements read at a time."""


def convert_shard(source: Shard, target: Path, names: Collection[str], dtype: DType) -> None:
    """Writes the named tensors of a shard in another type, rounded to nearest even.

    Args:
        source: The shard to read.
        target: The file to write.
        names: Tensors to take; others of the shard are left out.
        dtype: The type to write.
    """
    chosen = {name: region for name, region in source.tensors.items() if name in names}
    whole = {name: WHOLE.portion(name, region.shape, 0) for name, region in chosen.items()}
    write_portions(source, {target: whole}, dict.fromkeys(chosen, CODES[dtype]))


def write_portions(source: Shard, targets: Mapping[Path, Mapping[str, Portion]], codes: Mapping[str, str]) -> None:
    """Writes portions of a shard's tensors.

    Args:
        source: The shard to read.
        targets: For each file to write, the portions by tensor name.
        codes: Safetensors' names of the types to write; floats are rounded to nearest even, others kept.

    Raises:
        ExportError: A value does not fit the type, or the shard changed while it was read.
    """
    ordered = sorted(source.tensors.items(), key=lambda item: item[1].offset)
    with ExitStack() as stack:
        reader = stack.enter_context(source.path.open("rb", buffering=0))
        writers = [(stack.enter_context(path.open("xb")), portions) for path, portions in targets.items()]
        for writer, portions in writers:
            writer.write(_header(source, portions, codes))
        for name, region in ordered:
            takers = [(writer, portions[name]) for writer, portions in writers if name in portions]
            written = held(codes.get(name, region.dtype))
            for row, count, piece in _pieces(source, reader, region) if takers else ():
                for writer, portion in takers:
                    if piece is None:
                        rows = int(rows_taken(portion, row, count).sum())
                        width = portion.shape[-1] if portion.shape else 1
                        writer.seek(rows * width * written.itemsize, os.SEEK_CUR)
                        continue
                    values = take(portion, row, piece)
                    writer.write(converted(name, values, region.dtype, codes[name]).view(np.uint8).data)
        for writer, _ in writers:
            writer.truncate(writer.tell())  # a hole at the end is part of the file


def take(portion: Portion, first_row: int, rows_RC: Array) -> Array:
    """A portion's part of some rows of its tensor, seen as a matrix of all axes but the last by the last.

    Args:
        portion: Portion of a tensor [..., C].
        first_row: The matrix's row that `rows_RC` begins with.
        rows_RC: Rows [R, C].
    """
    chosen_R = rows_taken(portion, first_row, len(rows_RC))
    taken_RC = rows_RC if chosen_R.all() else rows_RC[chosen_R]
    if not portion.spans:
        return taken_RC  # a scalar
    return np.concatenate([taken_RC[:, start:stop] for start, stop in portion.spans[-1]], axis=1)


def rows_taken(portion: Portion, first_row: int, count: int) -> NDArray[np.bool_]:
    """Which of some rows of that matrix a portion takes from, [R]."""
    chosen_R = np.ones(count, dtype=np.bool_)
    if leading := portion.spans[:-1]:
        numbers_R = np.arange(first_row, first_row + count)
        for index_R, spans in zip(np.unravel_index(numbers_R, portion.whole[:-1]), leading, strict=True):
            chosen_R &= np.logical_or.reduce([(start <= index_R) & (index_R < stop) for start, stop in spans])
    return chosen_R


def _header(source: Shard, portions: Mapping[str, Portion], codes: Mapping[str, str]) -> bytes:
    """The head of a safetensors file that holds the portions in their tensors' order."""
    in_order = sorted(source.tensors.items(), key=lambda item: item[1].offset)
    return encode_header({name: (codes[name], portions[name].shape) for name, _ in in_order if name in portions})


def held(code: str) -> np.dtype[Any]:
    """Numpy's type of a float, by its safetensors code; bytes of what is quantised."""
    return FLOAT_DTYPES.get(code, np.dtype(np.uint8))


def _pieces(source: Shard, reader: IO[bytes], region: Region) -> Iterator[tuple[int, int, Array | None]]:
    """A tensor's rows, some at a time: the number of the first, how many, the rows, or None where all are zero."""
    stored, columns = held(region.dtype), region.shape[-1] if region.shape else 1
    row_size = columns * stored.itemsize
    rows, step = region.size // row_size, max(1, PIECE // columns)
    for row in range(0, rows, step):
        count, start = min(step, rows - row), region.offset + row * row_size
        if _is_hole(reader, start, start + count * row_size):
            yield row, count, None
            continue
        reader.seek(start)
        piece = np.fromfile(reader, stored, count * columns)
        if len(piece) < count * columns:
            raise ExportError(f"{source.path}: shrank while it was read: export again")
        stored_bytes = piece.view(np.uint8)  # the first row tells of nearly every piece that it is not zero
        empty = not stored_bytes[:row_size].any() and not stored_bytes.any()
        yield row, count, None if empty else piece.reshape(-1, columns)


def converted(name: str, values: Array, stored: str, written: str) -> Array:
    """Values in another type, as they are where that is their own.

    Args:
        name: The tensor's name.
        values: Its values, or some of them.
        stored: Safetensors' name of their type.
        written: The name of the type that they are to have.

    Raises:
        ExportError: One is NaN or infinite, or does not fit the type.
    """
    if stored not in FLOAT_DTYPES:
        return values
    if not all_finite(values, stored):
        raise ExportError(f"tensor {name!r} holds NaN or infinity: its file is damaged, download it again")
    dtype = FLOAT_DTYPES[written]
    with np.errstate(over="ignore"):
        found = values.astype(dtype, copy=False)
    if found is not values and not all_finite(found, written):
        largest = np.abs(values.astype(np.float32)).max()
        raise ExportError(
            f"{name!r} holds {largest}, which does not fit {dtype}: export with --dtype bfloat16 or float32"
        )
    return found


def _is_hole(reader: IO[bytes], start: int, end: int) -> bool:
    """Whether nothing is stored between two places of a file: all is zero there."""
    if not hasattr(os, "SEEK_DATA"):
        return False  # then it is read
    try:
        return os.lseek(reader.fileno(), start, os.SEEK_DATA) >= end
    except OSError as error:
        if error.errno == errno.ENXIO:  # a hole up to the end
            return end <= os.fstat(reader.fileno()).st_size
        raise
