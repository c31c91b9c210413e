"""Stored weights as the graph for a CPU is given them: in which type, and laid out how.

Enters: the bytes of one region of a weight file. Leaves: an array. What a kernel takes as it is stored is a view of
those bytes; everything else is made here.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spec import Weight

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "fp8": np.dtype(np.uint8),
    "int4": np.dtype(np.uint8),
    "uint4": np.dtype(np.uint8),
}
"""How numpy holds each type: bfloat16 and E4M3 as bits; two of the 4-bit integers lie in a byte, the first low."""

FORMAT_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
    "fp8": "F8_E4M3",
    "int4": "U8",
    "uint4": "U8",
}
"""What safetensors files call each type; two of the 4-bit integers lie in a byte."""

PIECE = 1 << 20
"""Elements widened at a time, so that the piece stays in the processor's cache."""
SMALLEST = 1e-30
"""What a block of zeros is taken to be as large as."""
TILE = 32
"""Rows transposed at a time: what they write lies in as many cache lines as the cache holds."""

Bytes = NDArray[np.uint8]


def lay_out(data: Bytes, weight: Weight) -> np.ndarray:
    """A region's bytes as the graph is given them."""
    if not weight.is_converted:
        return data.view(NUMPY_DTYPES[weight.convert]).reshape(weight.given_shape)
    parts = weight.shape[0] if weight.stacked else 1
    shape = weight.shape[1:] if weight.stacked else weight.shape
    stored = data.view(NUMPY_DTYPES[weight.dtype]).reshape(parts, -1)
    if not weight.stacked:
        return _converted(stored[0], weight, shape).reshape(weight.given_shape)
    made = np.empty(weight.given_shape, dtype=NUMPY_DTYPES[weight.convert])
    for part, source in zip(made, stored, strict=True):
        part[...] = _converted(source, weight, shape).reshape(part.shape)
    return made


def stored_values(data: Bytes, weight: Weight, index: int | None = None) -> np.ndarray:
    """The values, of integers as int8, that a weight was made from by `lay_out`; of a stacked one those of a part.

    Args:
        data: The bytes of what was made.
        weight: What says how it was; no plane.
        index: Which part.
    """
    made = data.view(NUMPY_DTYPES[weight.convert]).reshape(weight.given_shape)
    made = made if index is None else made[index]
    shape = weight.shape if index is None else weight.shape[1:]
    if weight.convert == "uint4":
        made = unpack_int4(made.reshape(-1) ^ np.uint8(0x88))
    elif weight.convert == "uint8":
        made = (made ^ np.uint8(0x80)).view(np.int8)
    if weight.transposed:
        made = made.reshape(shape[-1], -1)
    made = made[..., :: weight.repeats]
    if weight.interleaved:
        made = made.reshape(shape[-1] // 2, 2, -1).swapaxes(0, 1).reshape(shape[-1], -1)
    return np.ascontiguousarray(made.T if weight.transposed else made).reshape(shape)


def _converted(values: np.ndarray, weight: Weight, shape: tuple[int, ...]) -> np.ndarray:
    """One matrix, or a whole weight that is not stacked."""
    if weight.plane != "whole":
        return _plane(values, weight)
    if weight.convert == "uint4":
        values = values ^ np.uint8(0x88)  # -8 … 7 in two's complement is 0 … 15 with the sign bit turned
        if weight.transposed:
            values = transpose_halves(values.reshape(-1, shape[-1] // 2))
    else:
        values = _typed(values, weight)
        if weight.transposed:
            values = transpose(values.reshape(-1, shape[-1]))
    if weight.interleaved:
        values = np.stack(np.split(values.reshape(shape[-1], -1), 2), axis=1)
    return np.repeat(values, weight.repeats, axis=-1) if weight.repeats > 1 else values


def _plane(values: np.ndarray, weight: Weight) -> np.ndarray:
    """8 of the 16 bits that a float weight is given in, or the scales of their blocks.

    In a block of largest magnitude m the high plane has steps of s = m / 127, the low one, for what it leaves, of
    s / 254: together they are off by m / 64516 at most, where bfloat16 rounds a value of that size by m / 512.
    """
    count, blocks, block = weight.shape
    made = np.empty(weight.given_shape, dtype=np.float32 if weight.is_plane_scale else np.uint8)
    rows = max(1, PIECE // (blocks * block))
    for start in range(0, count, rows):
        part = values[start * blocks * block : (start + rows) * blocks * block]
        wide = widen(part, weight.dtype).reshape(-1, blocks, block)
        step = np.maximum(np.abs(wide).max(axis=2), SMALLEST) / np.float32(127)
        high = np.rint(wide / step[..., None])
        if weight.plane == "low":
            wide, step = wide - high * step[..., None], step / np.float32(254)
            high = np.clip(np.rint(wide / step[..., None]), -127, 127)
        made[start : start + rows] = step if weight.is_plane_scale else high + np.float32(128)
    return made


def _typed(values: np.ndarray, weight: Weight) -> np.ndarray:
    """Values in the type wanted."""
    if weight.dtype == weight.convert:
        return values
    if weight.convert == "uint8":
        return values.view(np.uint8) ^ np.uint8(0x80)
    return widen(values, weight.dtype)


def transpose(matrix: np.ndarray) -> np.ndarray:
    """A matrix's transpose in memory of its own, a few rows at a time, which is ten times as fast as all at once."""
    rows, columns = matrix.shape
    turned = np.empty((columns, rows), dtype=matrix.dtype)
    for start in range(0, rows, TILE):
        turned[:, start : start + TILE] = matrix[start : start + TILE].T
    return turned


def transpose_halves(packed: Bytes) -> Bytes:
    """The transpose of a matrix [K, N] of 4-bit values, two in a byte: [K, N / 2] bytes to [N, K / 2]."""
    even, odd = packed[0::2], packed[1::2]  # a byte of the transpose holds a column's values of two neighbouring rows
    turned = np.empty((packed.shape[1], 2, len(even)), dtype=np.uint8)
    turned[:, 0] = transpose(even & 0x0F | odd << 4)
    turned[:, 1] = transpose(even >> 4 | odd & 0xF0)
    return turned.reshape(-1, len(even))


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


def fp8_values() -> np.ndarray:
    """The 256 values of E4M3 (Micikevicius et al. 2022, arXiv:2209.05433, table 1) by their bits."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    magnitude = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    magnitude[(bits & 127) == 127] = np.nan
    return np.where(bits & 128, -magnitude, magnitude).astype(np.float32)


FP8_VALUES = fp8_values()


def unpack_int4(packed: Bytes) -> np.ndarray:
    """Values of -8 to 7 in int8, [2 N], from bytes [N] whose low halves come first."""
    unsigned = packed ^ np.uint8(0x88)
    values: np.ndarray = np.stack([unsigned & 15, unsigned >> 4], axis=-1).reshape(-1).view(np.int8) - np.int8(8)
    return values
