"""Number types under every name that the stages and their libraries give them, and the callback of long work.

The names of `Stored` are those of `spec.json`. Standard library only: numpy's, torch's and ONNX's types stand here as
their names and numbers, and whoever has the library looks them up in it.
"""

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

DType = Literal["float32", "float16", "bfloat16"]
"""Types that a model's floats may have."""

Stored = Literal["float32", "float16", "bfloat16", "int8", "uint8", "fp8", "int4", "uint4"]
"""Types that a tensor may be stored in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberType:
    """One type under all of its names.

    Attributes:
        bits: Bits per element.
        onnx: Number in ONNX's `TensorProto.DataType`.
        safetensors: Code in a safetensors file; 4-bit integers have none and lie in bytes, two in each, the first low.
        numpy: Name in numpy, which knows those that it lacks once `ml_dtypes` is imported.
        held: Name of the type of numpy's own that holds it, as bits where numpy lacks it.
        torch: Name in torch of the type that holds its values, 4-bit integers not packed.
    """

    bits: int
    onnx: int
    safetensors: str
    numpy: str
    held: str
    torch: str


def _type(bits: int, onnx: int, safetensors: str, numpy: str, held: str = "", torch: str = "") -> NumberType:
    return NumberType(
        bits=bits, onnx=onnx, safetensors=safetensors, numpy=numpy, held=held or numpy, torch=torch or numpy
    )


TYPES: dict[str, NumberType] = {
    "float32": _type(32, 1, "F32", "float32"),
    "float16": _type(16, 10, "F16", "float16"),
    "bfloat16": _type(16, 16, "BF16", "bfloat16", held="uint16"),
    "int8": _type(8, 3, "I8", "int8"),
    "uint8": _type(8, 2, "U8", "uint8"),
    "fp8": _type(8, 17, "F8_E4M3", "float8_e4m3fn", held="uint8"),
    "int4": _type(4, 22, "U8", "int4", held="uint8", torch="int8"),
    "uint4": _type(4, 21, "U8", "uint4", held="uint8", torch="uint8"),
}
"""The one table of them."""

FLOATS: tuple[DType, ...] = typing.get_args(DType)
"""Types that a model's floats may have."""

MODEL_TYPES: tuple[Stored, ...] = (*FLOATS, "int8", "fp8", "int4")
"""Types that a model folder's tensors may have; no two of them share a safetensors code."""

BITS: dict[str, int] = {name: each.bits for name, each in TYPES.items()}
"""Bits per element of each stored type."""

CODES: dict[str, str] = {name: each.safetensors for name, each in TYPES.items()}
"""Safetensors code of each stored type."""

FLOATS_BY_CODE: dict[str, DType] = {CODES[name]: name for name in FLOATS}
"""Float types by their safetensors codes."""

Progress = Callable[[str, int, int], None]
"""Called with the phase, the units of work done, and the units in all."""
