"""The meaning of quantising in Arriero's ops, in numpy: symmetric, round to nearest even, saturating.

A stored value `q` stands for `q * scale`. Scales are float32 and positive; they lie along the axes that each op's
contract names. Leaves: arrays of the stored type, or float64 values that they stand for.
"""

from typing import Any, Literal

import ml_dtypes  # noqa: F401 - makes its types known to numpy
import numpy as np
from numpy.typing import NDArray

from ..spec.types import TYPES

Kind = Literal["none", "int8", "fp8", "int4"]

STORED: dict[str, np.dtype[Any]] = {kind: np.dtype(TYPES[kind].numpy) for kind in ("int8", "fp8", "int4")}
"""The numpy type of each kind; ONNX packs two of `int4` into a byte, the first in the low half."""

LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
"""The value that an absolute maximum is scaled to. Of the integers one more exists below zero, and is used too."""

SMALLEST = {"int8": -128.0, "fp8": -448.0, "int4": -8.0}


def quantise(x: NDArray[Any], scale: NDArray[Any] | float, kind: str) -> NDArray[Any]:
    """The stored values of `x / scale`, whose shapes broadcast."""
    scaled = np.clip(x.astype(np.float64) / scale, SMALLEST[kind], LARGEST[kind])
    if kind != "fp8":
        return np.rint(scaled).astype(STORED[kind])
    return round_fp8(scaled).astype(STORED[kind])


def round_fp8(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rounds to the nearest E4M3 value, once: a cast by way of float32 would round twice.

    Between 2^e and 2^(e+1) E4M3 has steps of 2^(e-3); below 2^-6 its steps stay at 2^-9 (Micikevicius et al. 2022,
    arXiv:2209.05433, table 1). `x` lies within ±448.
    """
    _, exponent = np.frexp(x)
    step = np.exp2(np.maximum(exponent - 1, -6) - 3.0)
    return np.asarray(np.rint(x / step) * step)


def dequantise(stored: NDArray[Any], scale: NDArray[Any]) -> NDArray[np.float64]:
    """The values that weights [..., N, K] stand for, under scales [..., N, K / block]."""
    block = stored.shape[-1] // scale.shape[-1]
    return stored.astype(np.float64) * np.repeat(scale.astype(np.float64), block, axis=-1)


def fake_quantise(
    x_TK: NDArray[Any], scale: NDArray[Any] | float | None, kind: str, bound: float = 0.0
) -> NDArray[np.float64]:
    """Activations [T, K] rounded to the values that they have in a quantised product.

    Args:
        x_TK: Activations.
        scale: The static scale; None takes each token's own, its absolute maximum over `LARGEST`.
        kind: `none` and `int4` leave the activations as they are.
        bound: The largest magnitude that a token's own scale is chosen for; what is larger saturates. 0 is none.
    """
    x_TK = x_TK.astype(np.float64)
    if kind in ("none", "int4"):
        return x_TK
    if scale is None:
        scale = np.minimum(np.abs(x_TK).max(axis=-1, keepdims=True), bound or np.inf) / LARGEST[kind]
        scale = np.where(scale == 0, 1.0, scale)
    return np.asarray(quantise(x_TK, scale, kind).astype(np.float64) * scale)
