"""The weights of a bundle whose graph computes with the CPU's own kernels, written as these read them.

Nothing is converted when it is loaded, and the model it was built from is not needed any more.

Enters: a lowered graph's weights and the model's files. Leaves: a safetensors file, and the weights with their new
places. What is only widened (bf16 that the graph computes with in float32) is copied as it is.
"""

import dataclasses
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..files.agreement import check_weights
from ..files.mapping import map_file
from ..files.safetensors import encode_header, identity
from ..plugins.cpu.panels import lay_out
from ..spec.stored_weights import Weight, WeightFile
from ..spec.types import BITS, CODES

FILE = "weights.safetensors"


def write_packed(
    weights: Sequence[Weight], files: Mapping[str, Path], folder: Path, *, name: str = FILE, of_rank: bool = False
) -> tuple[dict[str, Weight], WeightFile]:
    """Writes a graph's weights.

    Args:
        weights: The weights.
        files: The model's weight files, by name.
        folder: Where the file is written.
        name: The file's name.
        of_rank: Whether they are one rank's, as in `check_weights`.

    Returns:
        The weights by name, in their new places, and the file.
    """
    check_weights(weights, files, of_rank=of_rank)
    ordered = sorted(weights, key=_order)
    header = encode_header({weight.name: (_type(weight), _shape(weight)) for weight in ordered})
    placed, offset = {}, len(header)
    for weight in ordered:
        moved = dataclasses.replace(weight, file=name, offset=offset, is_made=weight.layout != "rows")
        placed[weight.name], offset = moved, offset + moved.size
    path = folder / name
    with path.open("xb") as file:
        file.write(header)
        for data in _written(ordered, files):
            file.write(data.reshape(-1).view(np.uint8).data)
    return placed, WeightFile(name=name, path="", size=offset, identity=identity(path))


def _order(weight: Weight) -> int:
    """Larger elements first, so that each is aligned; before them panels and scales, whole cache lines."""
    return -64 if weight.layout != "rows" else -BITS[weight.dtype]


def _type(weight: Weight) -> str:
    """The name that safetensors files have for the type that a weight is written in."""
    if weight.layout == "panels":
        return CODES["uint8"]
    return CODES[weight.dtype if weight.layout == "rows" else weight.convert]


def _shape(weight: Weight) -> tuple[int, ...]:
    """The shape that a weight is written in."""
    if weight.dtype == "int4" and weight.layout == "rows":
        return (*weight.shape[:-1], weight.shape[-1] // 2)
    return weight.given_shape


def _written(weights: Iterable[Weight], files: Mapping[str, Path]) -> Iterator[np.ndarray]:
    """The bytes of each weight as they are written; afterwards the pages of its source are released."""
    maps: dict[str, mmap.mmap] = {}
    for weight in weights:
        if weight.file not in maps:
            maps[weight.file] = map_file(files[weight.file])
        data = np.frombuffer(maps[weight.file], np.uint8, weight.size, weight.offset)
        if weight.layout == "rows":
            yield data
        else:
            yield lay_out(data if weight.offset % max(1, BITS[weight.dtype] // 8) == 0 else data.copy(), weight)
        if hasattr(mmap, "MADV_DONTNEED"):
            maps[weight.file].madvise(mmap.MADV_DONTNEED)
