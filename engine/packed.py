"""The weights of a bundle for a CPU whose kernels multiply integers, written as these read them.

Nothing is converted when it is loaded, and the model it was built from is not needed any more.

Enters: a lowered graph's weights and the model's files. Leaves: a safetensors file, and the weights with their new
places. What is only widened (bf16 that the graph computes with in float32) is copied as it is.
"""

import dataclasses
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..plugins.layout import FORMAT_NAMES, NUMPY_DTYPES, lay_out
from ..shards import encode_header, identity
from ..spec import Weight, WeightFile

FILE = "weights.safetensors"


def write_packed(
    weights: Sequence[Weight], files: Mapping[str, Path], folder: Path
) -> tuple[dict[str, Weight], WeightFile]:
    """Writes a graph's weights.

    Args:
        weights: The weights.
        files: The model's weight files, by name.
        folder: Where the file is written.

    Returns:
        The weights by name, in their new places, and the file.
    """
    ordered = sorted(weights, key=lambda weight: -NUMPY_DTYPES[_type(weight)].itemsize)  # so that each is aligned
    header = encode_header({weight.name: (FORMAT_NAMES[_type(weight)], _shape(weight)) for weight in ordered})
    placed, offset = {}, len(header)
    for weight in ordered:
        moved = dataclasses.replace(weight, file=FILE, offset=offset, is_made=weight.is_integer)
        placed[weight.name], offset = moved, offset + moved.size
    path = folder / FILE
    with path.open("xb") as file:
        file.write(header)
        for data in _written(ordered, files):
            file.write(data.reshape(-1).view(np.uint8).data)
    return placed, WeightFile(name=FILE, path="", size=offset, identity=identity(path))


def _type(weight: Weight) -> str:
    """The type that a weight is written in."""
    return weight.convert if weight.is_integer else weight.dtype


def _shape(weight: Weight) -> tuple[int, ...]:
    """The shape that a weight is written in."""
    if weight.is_integer:
        return weight.given_shape
    return (*weight.shape[:-1], weight.shape[-1] // 2) if weight.dtype == "int4" else weight.shape


def _written(weights: Iterable[Weight], files: Mapping[str, Path]) -> Iterator[np.ndarray]:
    """What is written of each weight; the pages it comes from are let go."""
    maps: dict[str, mmap.mmap] = {}
    for weight in weights:
        if weight.file not in maps:
            with files[weight.file].open("rb") as file:
                maps[weight.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(maps[weight.file], np.uint8, weight.size, weight.offset)
        if weight.is_integer:
            aligned = data if weight.offset % NUMPY_DTYPES[weight.dtype].itemsize == 0 else data.copy()
            yield lay_out(aligned, weight)
        else:
            yield data
        maps[weight.file].madvise(mmap.MADV_DONTNEED)
