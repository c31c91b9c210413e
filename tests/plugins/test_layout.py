"""Weights as the graph for a CPU is given them, against the same plainly in numpy."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from arriero.plugins.layout import lay_out, stored_values
from arriero.spec import Stored, Weight

Array = np.ndarray[Any, Any]


def weight(shape: tuple[int, ...], dtype: Stored, convert: Stored, **layout: Any) -> Weight:
    return Weight(name="w", file="f", offset=0, shape=shape, dtype=dtype, convert=convert, **layout)


def packed(values: Array) -> Array:
    """Values of 0 to 15, or of -8 to 7, two in a byte along the last dimension."""
    nibbles = values.astype(np.uint8) & 15
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def given(values: Array, *arguments: Any, **layout: Any) -> Array:
    return lay_out(np.ascontiguousarray(values).reshape(-1).view(np.uint8), weight(*arguments, **layout))


def test_int4_is_made_unsigned() -> None:
    values = np.random.default_rng(0).integers(-8, 8, (6, 4, 16))
    assert np.array_equal(given(packed(values), (6, 4, 16), "int4", "uint4"), packed(values + 8))


def test_int4_is_transposed() -> None:
    values = np.random.default_rng(0).integers(-8, 8, (70, 48))
    found = given(packed(values), (7, 10, 48), "int4", "uint4", transposed=True)
    assert np.array_equal(found, packed(values.T + 8).reshape(48, 7, 5))


@pytest.mark.parametrize("interleaved", [False, True])
def test_stacked_experts_are_transposed_each_for_itself(interleaved: bool) -> None:
    values = np.random.default_rng(0).integers(-8, 8, (3, 64, 20))
    layout = {"transposed": True, "stacked": True, "interleaved": interleaved}
    order = np.arange(20).reshape(2, 10).T.ravel() if interleaved else np.arange(20)
    turned = values.swapaxes(1, 2)[:, order]
    assert np.array_equal(given(packed(values), (3, 64, 20), "int4", "uint4", **layout), packed(turned + 8))
    eight = given(values.astype(np.int8), (3, 64, 20), "int8", "uint8", **layout)
    assert np.array_equal(eight.astype(int), turned + 128)
    scales = np.random.default_rng(1).random((3, 1, 20), dtype=np.float32)
    repeated = given(scales, (3, 1, 20), "float32", "float32", repeats=4, **layout)
    assert np.array_equal(repeated, np.repeat(scales.swapaxes(1, 2)[:, order], 4, axis=2))


def test_two_planes_are_a_float_weight_to_16_bits() -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((40, 3, 64)) * np.exp2(rng.integers(-20, 20, (40, 3, 1)))).astype(ml_dtypes.bfloat16)
    values[7, 1] = 0
    total = np.zeros(values.shape)
    for plane in ("high", "low"):
        stored = given(values, values.shape, "bfloat16", "uint8", plane=plane)
        scale = given(values, values.shape, "bfloat16", "float32", plane=plane)
        assert stored.dtype == np.uint8
        assert scale.shape == (40, 3)
        total += (stored.astype(np.float64) - 128) * scale[..., None].astype(np.float64)
    wide = values.astype(np.float64)
    assert np.all(np.abs(total - wide) <= np.abs(wide).max(axis=2, keepdims=True) / 64000)


def test_what_is_laid_out_leads_back_to_what_was_stored() -> None:
    values = np.random.default_rng(0).integers(-8, 8, (3, 64, 20)).astype(np.int8)
    scales = np.random.default_rng(1).random((3, 2, 20), dtype=np.float32)
    stacked: dict[str, Any] = {"transposed": True, "stacked": True, "interleaved": True}
    for stored, about in (
        (packed(values), weight(values.shape, "int4", "uint4", **stacked)),
        (values, weight(values.shape, "int8", "uint8", **stacked)),
        (scales, weight(scales.shape, "float32", "float32", repeats=4, **stacked)),
    ):
        made = lay_out(stored.reshape(-1).view(np.uint8), about).reshape(-1).view(np.uint8)
        original = scales if stored is scales else values
        assert all(np.array_equal(stored_values(made, about, index), original[index]) for index in range(3))
    for about in (weight((64, 20), "int4", "uint4", transposed=True), weight((64, 20), "int4", "uint4")):
        made = lay_out(packed(values[0]).reshape(-1), about).reshape(-1)
        assert np.array_equal(stored_values(made, about), values[0])
