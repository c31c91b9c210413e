"""Weight files mapped into memory, and handed to a session by name.

A tensor whose stored type the graph takes is a view of the mapped file: its pages are read when they are used and
belong to the page cache. Others are widened to float32 in memory of their own, a piece at a time, and the pages they
came from are let go.
"""

import math
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import FolderError
from ..spec import Weight

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
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
        size = math.prod(weight.shape) * NUMPY_DTYPES[weight.dtype].itemsize
        if weight.file not in maps or not 0 <= weight.offset <= len(maps[weight.file]) - size:
            raise FolderError(f"spec.json puts {weight.name!r} outside {weight.file!r}: build the bundle again")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        values = pool.map(lambda weight: _value(weight, maps[weight.file]), weights)
        return {weight.name: value for weight, value in zip(weights, values, strict=True)}


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _value(weight: Weight, file: mmap.mmap) -> ort.OrtValue:
    stored = NUMPY_DTYPES[weight.dtype]
    size = math.prod(weight.shape) * stored.itemsize
    data = np.frombuffer(file, np.uint8, size, weight.offset)
    if weight.offset % stored.itemsize:
        data = data.copy()  # a view of misaligned elements is not one that kernels may read
    array = data.view(stored).reshape(weight.shape)
    if weight.dtype != weight.convert:
        array = widen(array, weight.dtype)
        _release(file, weight.offset, size)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ONNX_TYPES[weight.convert])


def _release(file: mmap.mmap, offset: int, size: int) -> None:
    """Lets go of the pages of a region that has been read; they come back from the file where they are still used."""
    start = offset - offset % mmap.PAGESIZE
    file.madvise(mmap.MADV_DONTNEED, start, offset + size - start)


def widen(array: np.ndarray, dtype: str) -> np.ndarray:
    """A float16 array, or a bfloat16 one given as uint16, in float32; exact."""
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
