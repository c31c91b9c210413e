"""The CPU's own kernels against float64, over shapes that fit their panels and such that do not."""

import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from custom_ops import in_panels, initializer, run_graph

from arriero.plugins.cpu.kernel_nodes import (
    Fp8,
    dispatch,
    dispatch_fp8,
    dispatch_plain,
    multiply,
    multiply_fp8,
    multiply_plain,
)
from arriero.plugins.moe.meaning import moe_dispatch
from arriero.plugins.moe.op import Attributes
from arriero.plugins.nodes import Nodes
from arriero.plugins.quantisation import fake_quantise

Array = np.ndarray[Any, Any]
FLOAT = ir.DataType.FLOAT
ROOT = Path(__file__).parents[3]
PLAIN = [np.float32, np.float16, ml_dtypes.bfloat16]
SIZES = [(32, 32), (64, 48), (96, 7), (40, 33), (160, 96), (2048, 80)]


def product(
    x: Array, stored: Array, scale: Array | None, bits: int, group: int = 0, x_scale: Array | None = None
) -> Array:
    """The op's product of rows [T, K] with a matrix [N, K] of integers, or of floats."""
    matrix = in_panels(stored, scale, bits, group, x_scale=x_scale)
    value, y, nodes = ir.val("x", FLOAT, ["tokens", x.shape[1]]), ir.val("y", FLOAT, ["tokens", len(stored)]), Nodes()
    multiply(nodes, value, matrix, len(stored), y)
    given = [each for each in (matrix.weight, matrix.scale, matrix.input_scale) if each is not None]
    return run_graph([value], y, nodes, given, {"x": x})


def plain_product(x: Array, weight: Array) -> Array:
    """The op's product of rows [T, K] with a matrix [N, K] of floats as it lies."""
    value, y, nodes = ir.val("x", FLOAT, ["tokens", x.shape[1]]), ir.val("y", FLOAT, ["tokens", len(weight)]), Nodes()
    given = initializer("weight", weight)
    multiply_plain(nodes, value, given, y)
    return run_graph([value], y, nodes, [given], {"x": x})


def drawn(bits: int, size: tuple[int, int], groups: int, seed: int = 0) -> tuple[Array, Array]:
    """Integers [N, K], and scales [N, groups]."""
    inputs, outputs = size
    rng = np.random.default_rng(seed)
    limit = 1 << (bits - 1)
    stored = rng.integers(-limit, limit, (outputs, inputs), dtype=np.int8)
    return stored, rng.uniform(0.5, 1.5, (outputs, groups)).astype(np.float32)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 13, 70])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_multiplied_as_float64_does(bits: int, size: tuple[int, int], tokens: int) -> None:
    inputs, _ = size
    for group in (0, 8, 16, 32, 64) if bits == 4 else (0, 32, 64):
        if group and inputs % group:
            continue
        stored, scale = drawn(bits, size, inputs // group if group else 1)
        x = np.random.default_rng(1).standard_normal((tokens, inputs)).astype(np.float32)
        found = product(x, stored, scale, bits, group)
        wide = stored * np.repeat(scale.astype(np.float64), inputs // scale.shape[1], axis=1)
        expected = rounded(x, min(group or 32, 32)) @ wide.T
        assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max() * np.sqrt(inputs)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "bits"), [(ml_dtypes.bfloat16, 16), (np.float32, 32)])
def test_floats_are_multiplied_as_float64_does(dtype: type, bits: int, size: tuple[int, int]) -> None:
    inputs, outputs = size
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((outputs, inputs)).astype(dtype)
    for tokens in (1, 4, 9):
        x = rng.standard_normal((tokens, inputs)).astype(np.float32)
        expected = x.astype(np.float64) @ weight.astype(np.float64).T
        assert np.abs(product(x, weight, None, bits) - expected).max() < 1e-6 * inputs


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (40, 33), (512, 13), (530, 50), (1100, 100)], ids=str)
@pytest.mark.parametrize("dtype", PLAIN)
def test_floats_are_multiplied_as_they_lie(dtype: type, size: tuple[int, int]) -> None:
    inputs, outputs = size
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((outputs, inputs)).astype(dtype)
    weight[0, 0] = 2.0**-20  # no normal number of float16
    for tokens in (1, 2, 3, 5, 8, 9, 40):
        x = rng.standard_normal((tokens, inputs)).astype(np.float32)
        expected = x.astype(np.float64) @ weight.astype(np.float64).T
        assert np.abs(plain_product(x, weight) - expected).max() < 2e-6 * np.sqrt(inputs)


@pytest.mark.parametrize("dtype", PLAIN)
def test_a_row_of_a_plain_product_knows_of_no_other(dtype: type) -> None:
    rng = np.random.default_rng(1)
    weight, x = rng.standard_normal((101, 1030)).astype(dtype), rng.standard_normal((150, 1030)).astype(np.float32)
    alone = np.concatenate([plain_product(x[row : row + 1], weight) for row in range(0, 150, 6)])
    assert np.array_equal(plain_product(x, weight)[::6], alone)
    for count in range(2, 14):
        assert np.array_equal(plain_product(x[:count], weight)[::6], alone[: -(-count // 6)])
    narrow = plain_product(x, weight[17:20])
    assert np.array_equal(narrow[::6], alone[:, 17:20])
    x[75] = np.nan
    assert np.array_equal(np.flatnonzero(~np.isfinite(plain_product(x, weight)).all(1)), [75])


def fp8_product(x: Array, weight: Array, scale: Array, bound: float = 0.0) -> Array:
    """The op's product of rows [T, K], rounded by their own scales, with a matrix [N, K] of E4M3."""
    value, y, nodes = ir.val("x", FLOAT, ["tokens", x.shape[1]]), ir.val("y", FLOAT, ["tokens", len(weight)]), Nodes()
    given = [initializer("weight", weight), initializer("scale", scale)]
    multiply_fp8(nodes, value, Fp8(weight=given[0], scale=given[1], bound=bound), y)
    return run_graph([value], y, nodes, given, {"x": x})


def drawn_fp8(rng: np.random.Generator, *shape: int) -> Array:
    """Numbers in E4M3, of each size and sign."""
    bits = rng.integers(0, 127, shape, dtype=np.uint8) | rng.integers(0, 2, shape, dtype=np.uint8) << 7
    return bits.view(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (40, 33), (64, 96), (530, 50), (2100, 100)], ids=str)
def test_fp8_numbers_are_multiplied_as_float64_does(size: tuple[int, int]) -> None:
    inputs, outputs = size
    rng = np.random.default_rng(0)
    weight, scale = drawn_fp8(rng, outputs, inputs), rng.uniform(0.5, 1.5, outputs).astype(np.float32)
    for tokens in (1, 2, 3, 5, 8, 9, 40):
        x = drawn_fp8(rng, tokens, inputs).astype(np.float32)
        x[:, 0] = 448  # so that each row's own scale is 1, and rounding changes nothing
        expected = x.astype(np.float64) @ (weight.astype(np.float64) * scale[:, None]).T
        size_of_sums = np.abs(x).astype(np.float64) @ np.abs(weight.astype(np.float64) * scale[:, None]).T
        assert np.all(np.abs(fp8_product(x, weight, scale) - expected) < 1e-6 * size_of_sums)


def test_fp8_activations_are_rounded_to_the_nearest_even_and_saturate() -> None:
    every = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (every[1:] + every[:-1]) / 2  # ties
    x = np.concatenate([every, middles, np.nextafter(middles, 0), np.nextafter(middles, 500), -middles, [448]])
    x = x.astype(np.float32)
    rows = np.diag(x)
    rows[:, -1] = 448  # so that each row's own scale is 1
    weight, scale = np.eye(len(x)).astype(ml_dtypes.float8_e4m3fn), np.ones(len(x), np.float32)
    expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(np.diag(fp8_product(rows, weight, scale)), expected)
    weight, beyond = np.ones((1, 2), ml_dtypes.float8_e4m3fn), np.array([[3.0, 0.75]], np.float32)
    assert fp8_product(beyond, weight, scale[:1], bound=1.5) == 2.25


def test_a_row_of_an_fp8_product_knows_of_no_other() -> None:
    rng = np.random.default_rng(1)
    for inputs in (2070, 333):
        weight, scale = drawn_fp8(rng, 101, inputs), rng.uniform(0.5, 1.5, 101).astype(np.float32)
        x = rng.standard_normal((90, inputs)).astype(np.float32)
        alone = np.concatenate([fp8_product(x[row : row + 1], weight, scale) for row in range(0, 90, 6)])
        assert np.array_equal(fp8_product(x, weight, scale)[::6], alone)
        for count in range(2, 14):
            assert np.array_equal(fp8_product(x[:count], weight, scale)[::6], alone[: -(-count // 6)])
        assert np.array_equal(fp8_product(x, weight[17:20], scale[17:20])[::6], alone[:, 17:20])
        x[75, 3] = np.nan
        assert np.array_equal(np.flatnonzero(~np.isfinite(fp8_product(x, weight, scale)).all(1)), [75])


def fp8_experts(hidden: Array, logits: Array, parts: list[Array], top_k: int) -> Array:
    """The op's output for stacked experts of E4M3; the parts are gate and up, their scales, down and its own."""
    inputs = [ir.val(name, FLOAT, array.shape) for name, array in (("hidden", hidden), ("logits", logits))]
    given = [initializer(f"part{index}", part) for index, part in enumerate(parts)]
    pair = [Fp8(weight=given[index], scale=given[index + 1]) for index in (0, 2)]
    y, nodes = ir.val("y", FLOAT, hidden.shape), Nodes()
    dispatch_fp8(nodes, *inputs, pair[0], pair[1], y, Attributes(top_k=top_k, quantisation="fp8"))
    return run_graph(inputs, y, nodes, given, {"hidden": hidden, "logits": logits})


def test_a_token_of_fp8_experts_knows_of_no_other() -> None:
    rng = np.random.default_rng(2)
    shapes = [(3, 1046, 300), (3, 300, 523)]
    parts = []
    for shape in shapes:
        parts += [drawn_fp8(rng, *shape), (rng.uniform(0.5, 1.5, (*shape[:2], 1)) / 2000).astype(np.float32)]
    hidden = rng.standard_normal((45, 300)).astype(np.float32)
    logits = rng.standard_normal((45, 3)).astype(np.float32)
    logits[:30, 1] += 9  # one expert has many tokens, the others few
    whole = fp8_experts(hidden, logits, parts, 2)
    for first, last in itertools.pairwise((0, 1, 2, 5, 14, 31, 45)):
        some = slice(first, last)
        assert np.array_equal(fp8_experts(hidden[some], logits[some], parts, 2), whole[some])


def plain_experts(hidden: Array, logits: Array, gate_up: Array, down: Array, **settings: int) -> Array:
    """The op's output for stacked experts of floats."""
    inputs = [ir.val(name, FLOAT, array.shape) for name, array in (("hidden", hidden), ("logits", logits))]
    weights = [initializer("gate_up", gate_up), initializer("down", down)]
    y, nodes = ir.val("y", FLOAT, hidden.shape), Nodes()
    dispatch_plain(nodes, *inputs, *weights, y, Attributes(**settings))
    return run_graph(inputs, y, nodes, weights, {"hidden": hidden, "logits": logits})


@pytest.mark.parametrize("dtype", PLAIN)
def test_a_token_of_plain_experts_knows_of_no_other(dtype: type) -> None:
    rng = np.random.default_rng(2)
    gate_up = (rng.standard_normal((3, 300, 1046)) / 17).astype(dtype)
    down = (rng.standard_normal((3, 523, 300)) / 23).astype(dtype)
    hidden = rng.standard_normal((45, 300)).astype(np.float32)
    logits = rng.standard_normal((45, 3)).astype(np.float32)
    logits[:30, 1] += 9  # one expert has many tokens, the others few
    whole = plain_experts(hidden, logits, gate_up, down, top_k=2)
    expected = moe_dispatch(hidden, logits, gate_up, down, attributes=Attributes(top_k=2))
    assert np.abs(whole - expected).max() < 2e-5
    for first, last in itertools.pairwise((0, 1, 2, 5, 14, 31, 45)):
        some = slice(first, last)
        assert np.array_equal(plain_experts(hidden[some], logits[some], gate_up, down, top_k=2), whole[some])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_static_scale_rounds_as_quantize_linear_does(bits: int) -> None:
    stored, scale = drawn(bits, (72, 40), 1)
    x = np.random.default_rng(1).standard_normal((9, 72)).astype(np.float32)
    x_scale = np.array(1.7 / 127, dtype=np.float32)  # some saturate
    found = product(x, stored, scale, bits, x_scale=x_scale)
    expected = fake_quantise(x, float(x_scale), "int8") @ (stored * scale.astype(np.float64)).T
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 0), (8, 32), (16, 0)])
def test_a_row_is_computed_alike_whatever_stands_beside_it(bits: int, group: int) -> None:
    inputs = 256
    stored, scale = drawn(min(bits, 8), (inputs, 100), inputs // group if group else 1)
    weight = stored.astype(ml_dtypes.bfloat16) if bits == 16 else stored
    x = np.random.default_rng(1).standard_normal((23, inputs)).astype(np.float32)
    alone = [product(x[row : row + 1], weight, None if bits == 16 else scale, bits, group) for row in range(len(x))]
    for first, last in itertools.pairwise((0, 1, 3, 6, 10, 23)):
        together = product(x[first:last], weight, None if bits == 16 else scale, bits, group)
        assert np.array_equal(together, np.concatenate(alone[first:last]))


def test_rows_of_zeros_and_huge_ones_stay_finite() -> None:
    stored, scale = drawn(8, (64, 32), 1)
    x = np.zeros((3, 64), dtype=np.float32)
    x[1], x[2, 5] = 1e30, 1e-38
    found = product(x, stored, scale, 8)
    assert not found[0].any()
    assert np.isfinite(found).all()
    wide = stored * scale.astype(np.float64)
    assert np.allclose(found[1], wide.sum(1) * 1e30, rtol=1e-5, atol=1e-5 * 1e33)


def test_scales_may_be_bfloat16() -> None:
    stored, scale = drawn(4, (128, 64), 4)
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    halves = scale.astype(ml_dtypes.bfloat16)
    assert np.array_equal(product(x, stored, halves, 4, 32), product(x, stored, halves.astype(np.float32), 4, 32))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_none(bits: int, bad: float) -> None:
    stored, scale = drawn(min(bits, 8), (64, 32), 1)
    weight = stored.astype(ml_dtypes.bfloat16) if bits == 16 else stored
    x = np.ones((7, 64), dtype=np.float32)
    x[3, 40] = bad
    found = product(x, weight, None if bits == 16 else scale, bits)
    assert not np.isfinite(found[3]).any()
    assert np.isfinite(np.delete(found, 3, axis=0)).all()


def test_experts_whose_products_have_unlike_groups() -> None:
    """A group of 128 is all the inputs of the first product, and half of the second's."""
    hidden, width, experts, tokens = 128, 256, 2, 5
    rng = np.random.default_rng(0)
    parts, wide = [], []
    for gated, inputs, outputs in ((True, hidden, 2 * width), (False, width, hidden)):
        stored = rng.integers(-8, 8, (experts, outputs, inputs), dtype=np.int8)
        scale = rng.uniform(0.01, 0.02, (experts, outputs, inputs // 128)).astype(np.float32)
        parts.append(in_panels(stored, scale, 4, 0 if inputs == 128 else 128, gated=gated, name=f"{inputs}."))
        wide.append(stored * np.repeat(scale, 128, axis=2))
    x, logits = (rng.standard_normal((tokens, size)).astype(np.float32) for size in (hidden, experts))
    inputs = [ir.val("hidden", FLOAT, x.shape), ir.val("router_logits", FLOAT, logits.shape)]
    output, nodes = ir.val("output", FLOAT, [None, None]), Nodes()
    dispatch(nodes, *inputs, parts[0], parts[1], output, Attributes(top_k=1), experts=experts, width=width)
    given = [value for part in parts for value in (part.weight, part.scale) if value is not None]
    found = run_graph(inputs, output, nodes, given, {"hidden": x, "router_logits": logits})
    for token, expert in enumerate(logits.argmax(1)):
        gate, up = np.split(wide[0][expert] @ (x[token] / (1 + np.exp(-logits[token, expert]))), 2)
        expected = wide[1][expert] @ (up * gate / (1 + np.exp(-gate)))
        assert np.abs(found[token] - expected).max() < 0.02 * np.abs(expected).max()


def test_matrices_of_another_size_are_refused() -> None:
    stored, scale = drawn(8, (128, 32), 1)
    for inputs in (64, 96, 256):
        with pytest.raises(Exception, match=r"Linear: weight has the shape \[1, 4096\], and needs \[1, "):
            product(np.zeros((1, inputs), dtype=np.float32), stored, scale, 8)
    stored, scale = drawn(4, (128, 32), 4)
    with pytest.raises(Exception, match=r"Linear: scale has the shape \[1, 4, 32\], and needs \[1, 2, 32\]"):
        product(np.zeros((1, 128), dtype=np.float32), stored, scale, 4, group=64)
    with pytest.raises(Exception, match="128 inputs, which groups of 48 do not divide"):
        product(np.zeros((1, 128), dtype=np.float32), stored, scale, 4, group=48)


SETS = ["avx512_bf16", "avx512", "avx2", "any"]
"""From the best on; a processor takes the next where it has not the one that it is asked for."""


def own_set() -> str:
    """The set of instructions that this processor takes where it is asked for no other; the best where none can say."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text("utf-8").split()) if info.exists() else set()
    if platform.machine() == "aarch64":
        return "avx2"  # one set and `any`, whatever is asked for
    if not flags or {"avx512_bf16", "avx512vbmi", "avx512_vnni", "avx512dq"} <= flags:
        return "avx512_bf16"
    if {"avx512_vnni", "avx512dq"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else "any"


@pytest.mark.skipif("ARRIERO_INSTRUCTION_SET" in os.environ, reason="runs itself")
@pytest.mark.parametrize("instructions", SETS[1:])
def test_other_processors_compute_the_same(instructions: str) -> None:
    """The tests of the kernels once more, with fewer instructions than the processor's own, which other tests run."""
    if SETS.index(instructions) <= SETS.index(own_set()):
        pytest.skip(f"the processor's own set is {own_set()}, which it would take")
    files = [str(Path(__file__).parent / name) for name in ("test_kernels.py", "test_attention.py", "../test_gqa.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *files]
    few = "fp8" if instructions == "avx512" else "not by_torch and not by_function and not by_native"
    command += ["-k", few]
    environment = {**os.environ, "ARRIERO_INSTRUCTION_SET": instructions}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stdout[-3000:]


def rounded(x: Array, block: int) -> Array:
    """Rows [T, K] in int8, each block of inputs by its own absolute maximum."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % block)))
    return fake_quantise(padded.reshape(-1, block), None, "int8").reshape(padded.shape)[:, : x.shape[1]]
