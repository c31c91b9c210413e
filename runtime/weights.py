"""Weight files mapped into memory, and handed to a session by name.

A tensor whose stored type and layout the graph takes is a view of the mapped file: its pages are read when they are
used and belong to the page cache. Others are converted in memory of their own (floats and E4M3 widened to float32, int4
made unsigned, matrices turned), and the pages they came from are let go. What an engine takes and gives is converted
here too: numpy has no bfloat16.
"""

import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..errors import FolderError
from ..spec import Weight

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(np.uint8),
    "int4": np.dtype(np.uint8),
}
ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int8": 3, "uint4": 2}
PIECE = 1 << 20
"""Elements widened at a time, so that the piece stays in the processor's cache."""


def map_weights(weights: Iterable[Weight], files: dict[str, Path]) -> dict[str, ort.OrtValue]:
    """Maps the weights as ONNX Runtime values by initializer name. The files stay mapped as long as the values live.

    Raises:
        FolderError: A region lies outside its file.
    """
    weights = list(weights)
    maps = {name: _map(path) for name, path in files.items()}
    for weight in weights:
        if weight.file not in maps or not 0 <= weight.offset <= len(maps[weight.file]) - weight.size:
            raise FolderError(f"spec.json puts {weight.name!r} outside {weight.file!r}: build the bundle again")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        values = pool.map(lambda weight: _value(weight, maps[weight.file]), weights)
        return {weight.name: value for weight, value in zip(weights, values, strict=True)}


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _value(weight: Weight, file: mmap.mmap) -> ort.OrtValue:
    stored, size = NUMPY_DTYPES[weight.dtype], weight.size
    data = np.frombuffer(file, np.uint8, size, weight.offset)
    if weight.offset % stored.itemsize:
        data = data.copy()  # a view of misaligned elements is not one that kernels may read
    array = data.view(stored)
    converts = weight.dtype != weight.convert or weight.transposed
    if weight.convert == "uint4":
        array = unsigned_int4(array, weight.shape, transposed=weight.transposed)
    else:
        array = widen(array, weight.dtype) if weight.dtype != weight.convert else array
        array = array.reshape(weight.shape)
        if weight.transposed:
            array = np.ascontiguousarray(np.moveaxis(array, -1, 0))
    if converts:
        _release(file, weight.offset, size)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ONNX_TYPES[weight.convert])


def _release(file: mmap.mmap, offset: int, size: int) -> None:
    """Lets go of the pages of a region that has been read; they come back from the file where they are still used."""
    start = offset - offset % mmap.PAGESIZE
    file.madvise(mmap.MADV_DONTNEED, start, offset + size - start)


def widen(array: np.ndarray, dtype: str) -> np.ndarray:
    """A float16 array, or a bfloat16 or E4M3 one given as its bits, in float32; exact."""
    if dtype == "fp8":
        wide: np.ndarray = FP8_VALUES[array]
        return wide
    wide = np.empty(array.shape, dtype=np.float32)
    source, target = array.reshape(-1), wide.reshape(-1)
    for start in range(0, source.size, PIECE):
        piece = source[start : start + PIECE]
        if dtype == "bfloat16":
            bits = target[start : start + PIECE].view(np.uint32)
            bits[:] = piece
            bits <<= 16
        else:
            target[start : start + PIECE] = piece
    return wide


def narrow(array: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """A float32 array as float16 or as the bits of bfloat16, rounded to nearest, ties to even; float32 as it is."""
    if dtype != "bfloat16":
        return array.astype(NUMPY_DTYPES[dtype], copy=False)
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    quiet = bits | np.uint32(0x400000)  # a NaN stays one: the sum could carry it over into a number
    return (np.where(np.isnan(array), quiet, rounded) >> 16).astype(np.uint16)


def fp8_values() -> np.ndarray:
    """The 256 values of E4M3 (Micikevicius et al. 2022, arXiv:2209.05433, table 1) by their bits."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    magnitude = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    magnitude[(bits & 127) == 127] = np.nan
    return np.where(bits & 128, -magnitude, magnitude).astype(np.float32)


FP8_VALUES = fp8_values()


def unsigned_int4(packed: np.ndarray, shape: tuple[int, ...], *, transposed: bool) -> np.ndarray:
    """Packed int4 as packed uint4, eight added to each value.

    Args:
        packed: Two values in a byte, the first in the low half.
        shape: Of the values.
        transposed: Whether the last dimension comes first in what is returned.

    Returns:
        Bytes, half as many in the last dimension.
    """
    flipped = packed ^ np.uint8(0x88)  # -8 … 7 in two's complement is 0 … 15 with the sign bit turned
    if not transposed:
        return flipped.reshape(*shape[:-1], shape[-1] // 2)
    values = np.moveaxis(halves_of(flipped).reshape(shape), -1, 0)
    return np.ascontiguousarray(values[..., 0::2] | (values[..., 1::2] << 4))


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """Values of -8 to 7 in int8, [2 N], from bytes [N] whose low halves come first."""
    values: np.ndarray = (halves_of(packed ^ np.uint8(0x88)).view(np.int8)) - np.int8(8)
    return values


def halves_of(packed: np.ndarray) -> np.ndarray:
    """The low and the high half of each byte, [2 N]."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)
