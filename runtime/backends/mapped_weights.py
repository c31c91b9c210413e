"""Weight files mapped into memory, and handed to a session by name.

A tensor whose stored type and layout the graph takes is a view of the mapped file: its pages are read when they are
used and belong to the page cache. Others are converted in memory of their own (floats widened to float32, matrices of
integers laid out in panels), and the pages they came from are released.
"""

import mmap
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...errors import FolderError
from ...files.agreement import check_weights
from ...files.mapping import Watched, map_file
from ...files.processors import processors
from ...plugins.cpu.panels import lay_out
from ...plugins.narrow_types import NUMPY_DTYPES
from ...spec.stored_weights import Pages, Weight
from .onnxruntime_package import ort
from .pages import Region, exchange_pages, in_huge_pages

ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "fp8": 17, "uint8": 2}


class MappedWeights(dict[str, ort.OrtValue]):
    """Weights by initializer name, the regions of those that are to lie in huge pages, and their files.

    Args:
        values: The weights.
        regions: The regions.
        watched: The files.
        insist: Whether the regions go into huge pages even if the system has none at hand.
    """

    def __init__(
        self,
        values: Mapping[str, ort.OrtValue],
        regions: Sequence[Region],
        watched: Watched | None = None,
        *,
        insist: bool = False,
    ) -> None:
        super().__init__(values)
        self.regions, self.watched, self.insist = regions, watched or Watched(), insist

    def settle(self) -> None:
        """Begins to move those regions from the file's pages to huge ones, if that has not begun."""
        regions, self.regions = self.regions, []
        if regions:
            exchange_pages(regions, insist=self.insist)


def map_weights(
    weights: Iterable[Weight], files: dict[str, Path], *, of_rank: bool = False, pages: Pages = "auto"
) -> MappedWeights:
    """Maps the weights as ONNX Runtime values by initializer name. The files stay mapped as long as the values live.

    Args:
        weights: The weights.
        files: The files, by name.
        of_rank: Whether they are one rank's, as in `check_weights`.
        pages: Which of them are to lie in huge pages.

    Raises:
        FolderError: A weight is not in its file as it is said to be, or a file has changed meanwhile.
    """
    weights = list(weights)
    watched = Watched.of(files.values())
    check_weights(weights, files, of_rank=of_rank)
    maps = {name: map_file(path) for name, path in files.items()}
    for weight in weights:
        if not 0 <= weight.offset <= len(maps[weight.file]) - weight.size:
            raise FolderError(f"{files[weight.file]} has changed since it was opened: restore it")
    with ThreadPoolExecutor(processors()) as pool:
        values = pool.map(lambda weight: _value(weight, maps[weight.file]), weights)
        named = {weight.name: value for weight, value in zip(weights, values, strict=True)}
    regions = _regions(in_huge_pages(weights, pages), maps)
    return MappedWeights(named, regions, watched, insist=pages == "huge")


def _regions(weights: Sequence[Weight], maps: Mapping[str, mmap.mmap]) -> list[Region]:
    """Weights that lie one behind another in their files, as regions."""
    runs: list[tuple[str, int, int]] = []
    for file, offset, size in sorted((weight.file, weight.offset, weight.size) for weight in weights):
        if runs and runs[-1][0] == file and offset - runs[-1][2] < mmap.PAGESIZE:
            runs[-1] = (file, runs[-1][1], max(runs[-1][2], offset + size))
        else:
            runs.append((file, offset, offset + size))
    starts = {name: np.frombuffer(file, np.uint8).ctypes.data for name, file in maps.items()}
    return [Region(maps[file], starts[file] + start, end - start) for file, start, end in runs]


def _value(weight: Weight, file: mmap.mmap) -> ort.OrtValue:
    data = np.frombuffer(file, np.uint8, weight.size, weight.offset)
    stored = weight.convert if weight.is_made else weight.dtype
    if weight.layout != "panels" and weight.offset % NUMPY_DTYPES[stored].itemsize:
        data = data.copy()  # a view of misaligned elements is not one that kernels may read
    array = lay_out(data, weight)
    if weight.is_converted:
        _release(file, weight.offset, weight.size)
    given = "uint8" if weight.layout == "panels" else weight.convert
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ONNX_TYPES[given])


def _release(file: mmap.mmap, offset: int, size: int) -> None:
    """Releases the pages of a region that has been read; they come back from the file where they are still used."""
    start = offset - offset % mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED"):
        file.madvise(mmap.MADV_DONTNEED, start, offset + size - start)
