"""Weight files mapped into memory, and handed to a session by name.

A tensor whose stored type and layout the graph takes is a view of the mapped file: its pages are read when they are
used and belong to the page cache. Others are converted in memory of their own (floats and E4M3 widened to float32,
matrices of integers laid out in panels), and the pages they came from are let go. What every token reads of a bundle's
panels is read into huge pages, from which a processor reads a fifth faster; experts stay in the file.
"""

import mmap
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..errors import FolderError
from ..plugins.layout import NUMPY_DTYPES, lay_out
from ..spec import EXPERT, Weight

LINE = 64
"""Bytes of a cache line."""
ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "uint8": 2}


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
    moved = [weight for weight in weights if weight.is_made and not EXPERT.search(weight.name)]
    rooms = _rooms(moved)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda weight: _fill(rooms[weight.name], files[weight.file], weight.offset), moved))
        values = pool.map(lambda weight: _value(weight, maps[weight.file], rooms.get(weight.name)), weights)
        return {weight.name: value for weight, value in zip(weights, values, strict=True)}


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _rooms(weights: Sequence[Weight]) -> dict[str, NDArray[np.uint8]]:
    """Memory for some weights, by name, in one piece, so that it lies in huge pages where the system has them."""
    ends = np.cumsum([-(-weight.size // LINE) * LINE for weight in weights], dtype=np.int64).tolist()
    room = np.empty(ends[-1] + LINE if ends else 0, dtype=np.uint8)  # numpy asks for huge pages
    first = -room.ctypes.data % LINE
    starts = [first, *(first + end for end in ends)]
    return {weight.name: room[start:][: weight.size] for weight, start in zip(weights, starts, strict=False)}


def _fill(room: NDArray[np.uint8], path: Path, offset: int) -> None:
    """Reads a region of a file."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(room) and (count := file.readinto(room[done:].data)):
            done += count


def _value(weight: Weight, file: mmap.mmap, room: NDArray[np.uint8] | None) -> ort.OrtValue:
    data = np.frombuffer(file, np.uint8, weight.size, weight.offset) if room is None else room
    stored = weight.convert if weight.is_made else weight.dtype
    if weight.layout != "panels" and weight.offset % NUMPY_DTYPES[stored].itemsize:
        data = data.copy()  # a view of misaligned elements is not one that kernels may read
    array = lay_out(data, weight)
    if weight.is_converted:
        _release(file, weight.offset, weight.size)
    given = "uint8" if weight.layout == "panels" else weight.convert
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ONNX_TYPES[given])


def _release(file: mmap.mmap, offset: int, size: int) -> None:
    """Lets go of the pages of a region that has been read; they come back from the file where they are still used."""
    start = offset - offset % mmap.PAGESIZE
    file.madvise(mmap.MADV_DONTNEED, start, offset + size - start)
