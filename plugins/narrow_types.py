"""Stored types narrower than numpy's own: bfloat16, E4M3 and 4-bit integers, widened and narrowed in numpy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spec.types import TYPES

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(each.held) for name, each in TYPES.items()}
"""How numpy holds each type: bfloat16 and E4M3 as bits; two of the 4-bit integers lie in a byte, the first low."""

PIECE = 1 << 20
"""Elements widened at a time, so that the piece stays in the processor's cache."""

Bytes = NDArray[np.uint8]


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


def unpack_int4(packed: Bytes) -> np.ndarray:
    """Values of -8 to 7 in int8, [2 N], from bytes [N] whose low halves come first."""
    unsigned = packed ^ np.uint8(0x88)
    values: np.ndarray = np.stack([unsigned & 15, unsigned >> 4], axis=-1).reshape(-1).view(np.int8) - np.int8(8)
    return values
