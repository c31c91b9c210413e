"""Tensors as a safetensors file, quantised ones under the format's own type names.

int4 has no name in the format: two values lie in a byte of `U8`, the first in the low half, as ONNX packs them.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..files.safetensors import encode_header
from ..spec.types import TYPES

CODES = {getattr(torch, each.torch): each.safetensors for each in TYPES.values() if each.bits >= 8}
"""Safetensors codes by torch's types."""


def pack_int4(values: Tensor) -> Tensor:
    """Values of -8 to 7 in int8, [..., N] with N even → [..., N / 2] uint8, which `unpack_int4` reads."""
    nibbles = values.view(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file, whole on the disk when it returns."""
    with path.open("wb") as file:
        file.write(encode_header({name: (CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}))
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
