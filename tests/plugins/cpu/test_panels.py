"""Weights as the graph for a CPU is given them, against the same plainly in numpy."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from arriero.plugins.cpu.panels import lay_out, stored_values
from arriero.spec.stored_weights import Weight
from arriero.spec.types import Stored

Array = np.ndarray[Any, Any]


def weight(shape: tuple[int, ...], dtype: Stored, convert: Stored, **layout: Any) -> Weight:
    return Weight(name="w", file="f", offset=0, shape=shape, dtype=dtype, convert=convert, **layout)


def packed(values: Array) -> Array:
    """Values of 0 to 15, or of -8 to 7, two in a byte along the last dimension."""
    nibbles = values.astype(np.uint8) & 15
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def given(values: Array, *arguments: Any, **layout: Any) -> Array:
    return lay_out(np.ascontiguousarray(values).reshape(-1).view(np.uint8), weight(*arguments, **layout))


def panels(values: Array, per_word: int) -> Array:
    """Values [N, K] as [panels, K / per_word, 32, per_word], what is missing as zeros."""
    outputs, inputs = values.shape
    padded = np.pad(values, ((0, -outputs % 32), (0, -inputs % 32)))
    return padded.reshape(-1, 32, padded.shape[1] // per_word, per_word).swapaxes(1, 2)


SIZES = [(32, 32), (64, 96), (40, 72), (7, 34)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matrices_lie_in_panels_of_32_outputs(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(-8, 8, size)
    four = given(packed(values), size, "int4", "uint4", layout="panels")
    assert np.array_equal(four.reshape(-1), packed(panels(values, 8) + 8).reshape(-1))
    eight = given(values.astype(np.int8), size, "int8", "uint8", layout="panels")
    assert np.array_equal(eight.reshape(-1), (panels(values, 4) + 128).astype(np.uint8).reshape(-1))
    halves = values.astype(ml_dtypes.bfloat16)
    sixteen = given(halves, size, "bfloat16", "bfloat16", layout="panels")
    assert np.array_equal(sixteen.reshape(-1).view(ml_dtypes.bfloat16), panels(halves, 2).reshape(-1))
    whole = given(values.astype(np.float16), size, "float16", "float32", layout="panels")
    assert np.array_equal(whole.reshape(-1).view(np.float32), panels(values.astype(np.float32), 1).reshape(-1))


@pytest.mark.parametrize("interleaved", [False, True])
def test_experts_lie_in_panels_each_for_itself(interleaved: bool) -> None:
    values = np.random.default_rng(0).integers(-8, 8, (3, 80, 64))
    layout = {"layout": "panels", "stacked": True, "interleaved": interleaved}
    rows = values
    if interleaved:  # 16 of one half, 16 of the other
        halves = np.pad(rows.reshape(3, 2, 40, 64), ((0, 0), (0, 0), (0, 8), (0, 0)))
        rows = halves.reshape(3, 2, 3, 16, 64).swapaxes(1, 2).reshape(3, 96, 64)
    expected = np.stack([panels(each, 4) + 128 for each in rows])
    eight = given(values.astype(np.int8), (3, 80, 64), "int8", "uint8", **layout)
    assert np.array_equal(eight.reshape(-1), expected.astype(np.uint8).reshape(-1))
    four = given(packed(values), (3, 80, 64), "int4", "uint4", **layout)
    assert np.array_equal(four.reshape(-1), packed(np.stack([panels(each, 8) + 8 for each in rows])).reshape(-1))


def test_scales_lie_as_their_panels_do() -> None:
    scales = np.random.default_rng(1).random((40, 3), dtype=np.float32)
    found = given(scales, (40, 3), "float32", "float32", layout="scales")
    assert np.array_equal(found, np.pad(scales, ((0, 24), (0, 0))).reshape(2, 32, 3).swapaxes(1, 2))
    narrow = given(scales, (40, 3), "float32", "bfloat16", layout="scales")
    assert np.array_equal(narrow.view(ml_dtypes.bfloat16), found.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_laid_out_leads_back_to_what_was_stored(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(-8, 8, size).astype(np.int8)
    for stored, about in (
        (packed(values), weight(size, "int4", "uint4", layout="panels")),
        (values, weight(size, "int8", "uint8", layout="panels")),
        (values.astype(ml_dtypes.bfloat16), weight(size, "bfloat16", "bfloat16", layout="panels")),
        (values.astype(np.float32), weight(size, "float32", "float32", layout="panels")),
        (values.astype(np.float32), weight(size, "float32", "float32", layout="scales")),
    ):
        made = lay_out(np.ascontiguousarray(stored).reshape(-1).view(np.uint8), about).reshape(-1).view(np.uint8)
        assert len(made) == about.given_size
        assert np.array_equal(stored_values(made, about), values)


@pytest.mark.parametrize("interleaved", [False, True])
def test_so_do_experts(interleaved: bool) -> None:
    values = np.random.default_rng(0).integers(-8, 8, (3, 64, 20)).astype(np.int8)
    stacked: dict[str, Any] = {"stacked": True, "interleaved": interleaved}
    for stored, about in (
        (packed(values), weight(values.shape, "int4", "uint4", layout="panels", **stacked)),
        (values, weight(values.shape, "int8", "uint8", layout="panels", **stacked)),
        (values.astype(np.float32), weight(values.shape, "float32", "float32", layout="scales", **stacked)),
    ):
        made = lay_out(np.ascontiguousarray(stored).reshape(-1).view(np.uint8), about).reshape(-1).view(np.uint8)
        assert len(made) == about.given_size
        assert all(np.array_equal(stored_values(made, about, index), values[index]) for index in range(3))
