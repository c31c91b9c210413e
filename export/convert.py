"""A shard's tensors in another floating-point type, written as a new shard, a piece at a time."""

import json
from collections.abc import Collection
from pathlib import Path

import ml_dtypes
import numpy as np

from ..errors import ExportError
from ..shards import Shard
from ..spec import DType

NUMPY_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
FORMAT_NAMES: dict[DType, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
PIECE = 16 << 20
"""Elements converted at a time."""


def convert_shard(source: Shard, target: Path, names: Collection[str], dtype: DType) -> None:
    """Writes the named tensors of a shard in another type, rounded to nearest even.

    Args:
        source: The shard to read.
        target: The file to write.
        names: Tensors to take; others of the shard are left out.
        dtype: The type to write.
    """
    chosen = sorted((item for item in source.tensors.items() if item[0] in names), key=lambda item: item[1].offset)
    written = NUMPY_DTYPES[FORMAT_NAMES[dtype]]
    header, position = {}, 0
    for name, region in chosen:
        size = region.size // NUMPY_DTYPES[region.dtype].itemsize * written.itemsize
        header[name] = {
            "dtype": FORMAT_NAMES[dtype],
            "shape": list(region.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with source.path.open("rb") as reader, target.open("xb") as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for name, region in chosen:
            stored = NUMPY_DTYPES[region.dtype]
            reader.seek(region.offset)
            remaining = region.size // stored.itemsize
            while remaining:
                piece = np.fromfile(reader, stored, min(PIECE, remaining))
                if not len(piece):
                    raise ExportError(f"{source.path}: shrank while it was read: export again")
                with np.errstate(over="ignore"):
                    converted = piece.astype(written)
                if (np.isinf(converted) & ~np.isinf(piece)).any():
                    raise ExportError(f"{name!r} holds {piece[np.isinf(converted)][0]}, which does not fit {dtype}")
                writer.write(converted.view(np.uint8).data)
                remaining -= len(piece)
