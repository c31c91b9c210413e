"""Weight files mapped into memory, and handed to a session by name.

A tensor whose stored type and layout the graph takes is a view of the mapped file: its pages are read when they are
used and belong to the page cache. Others are converted in memory of their own (floats and E4M3 widened to float32, int4
made unsigned, matrices turned), and the pages they came from are let go. What an engine takes and gives is converted
here too: numpy has no bfloat16.
"""

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..errors import FolderError
from ..plugins.layout import NUMPY_DTYPES, lay_out
from ..spec import Weight

ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int8": 3, "uint8": 2, "uint4": 2}
RELEASED_EVERY = 0.05
"""Seconds."""


class MappedWeights(dict[str, ort.OrtValue]):
    """Weights by initializer name, and the files that they lie in."""

    def __init__(self, values: Mapping[str, ort.OrtValue], files: Iterable[mmap.mmap]) -> None:
        super().__init__(values)
        self.files = list(files)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Lets go of the files' pages again and again while a session is made of them, and once it is.

        Integer kernels lay weights out anew and read them no more. Pages that are still used come back from the file.
        """
        done = Event()

        def release() -> None:
            while not done.wait(RELEASED_EVERY):
                self.release()

        with ThreadPoolExecutor(1) as pool:
            pool.submit(release)
            try:
                yield
            finally:
                done.set()
        self.release()

    def release(self) -> None:
        """Lets go of all pages of the files."""
        for file in self.files:
            file.madvise(mmap.MADV_DONTNEED)


def map_weights(weights: Iterable[Weight], files: dict[str, Path]) -> MappedWeights:
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
        named = {weight.name: value for weight, value in zip(weights, values, strict=True)}
    return MappedWeights(named, maps.values())


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _value(weight: Weight, file: mmap.mmap) -> ort.OrtValue:
    data = np.frombuffer(file, np.uint8, weight.size, weight.offset)
    if weight.offset % NUMPY_DTYPES[weight.convert if weight.is_made else weight.dtype].itemsize:
        data = data.copy()  # a view of misaligned elements is not one that kernels may read
    array = lay_out(data, weight)
    if weight.is_converted:
        _release(file, weight.offset, weight.size)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ONNX_TYPES[weight.convert])


def _release(file: mmap.mmap, offset: int, size: int) -> None:
    """Lets go of the pages of a region that has been read; they come back from the file where they are still used."""
    start = offset - offset % mmap.PAGESIZE
    file.madvise(mmap.MADV_DONTNEED, start, offset + size - start)


def narrow(array: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """A float32 array as float16 or as the bits of bfloat16, rounded to nearest, ties to even; float32 as it is."""
    if dtype != "bfloat16":
        return array.astype(NUMPY_DTYPES[dtype], copy=False)
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    quiet = bits | np.uint32(0x400000)  # a NaN stays one: the sum could carry it over into a number
    return (np.where(np.isnan(array), quiet, rounded) >> 16).astype(np.uint16)
