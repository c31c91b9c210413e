"""NaN and infinity among stored numbers, found by their bits.

Enters: an array as it is stored, under safetensors' name of its type. Leaves: whether each number is one. Integers
always are.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spec.stored_weights import Weight
from ..spec.types import CODES

EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E4M3": (np.uint8, 0x7F),
}
"""The unsigned type of a number's bits, and the bits that are all set in what is none."""

PIECE = 1 << 22
"""Numbers looked at together, so that no mask of a whole tensor is made."""


def all_finite(values: NDArray[Any], dtype: str) -> bool:
    """Whether an array holds numbers alone.

    Args:
        values: The array, contiguous, of any type of the same size.
        dtype: Safetensors' name of the type that it is stored in.
    """
    if dtype not in EXPONENTS:
        return True
    bits, mask = EXPONENTS[dtype]
    flat = np.ascontiguousarray(values).reshape(-1).view(bits)
    pieces = (flat[start : start + PIECE] for start in range(0, len(flat), PIECE))
    return not any(bool(((piece & bits(mask)) == mask).any()) for piece in pieces)


def first_damaged(weights: Sequence[Weight], files: Mapping[str, Path]) -> str | None:
    """The name of the first tensor of a lowered graph that holds NaN or infinity, or None."""
    for weight in weights:
        code = CODES[weight.convert if weight.is_made else weight.dtype]
        data = np.memmap(files[weight.file], np.uint8, "r", weight.offset, (weight.size,))
        if not all_finite(data, code):
            return weight.name.partition(":")[0]
    return None
