"""Number types by the names that folders give them, and the callback that long work reports to."""

from collections.abc import Callable
from typing import Literal

DType = Literal["float32", "float16", "bfloat16"]
"""Types that a model's floats may have."""

Stored = Literal["float32", "float16", "bfloat16", "int8", "uint8", "fp8", "int4", "uint4"]
"""Types that a tensor may be stored in."""

BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "uint8": 8, "fp8": 8, "int4": 4, "uint4": 4}
"""Bits per element of each stored type."""

Progress = Callable[[str, int, int], None]
"""Called with the phase, the units of work done, and the units in all."""
