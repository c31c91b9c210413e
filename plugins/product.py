"""A quantised product on ONNX Runtime's CPU: integers multiplied as integers, E4M3 as the float32 that it stands for.

Enters: float32 activations and a weight in the layout that its kernel takes. Leaves: float32. In int8 the activations
are stored as uint8 with a zero point of 128, which stands for the same values and is what the kernels are fast in. In
int4 the kernel quantises them itself, to int8 with a scale for each block of a token's inputs, so that it multiplies
integers: several times as fast as with float32 activations, and finer than the weights by far.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .layout import SMALLEST
from .linear import token_scale
from .nodes import Nodes, dims, ints, number

MICROSOFT = "com.microsoft"
FP8 = ir.DataType.FLOAT8E4M3FN
BLOCKS = (16, 32, 64, 128, 256)
"""Inputs that may share a scale in the kernels of block-wise weights."""
INT8_ACTIVATIONS = 4
"""The `accuracy_level` of those kernels that lets them quantise activations to int8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A weight as a product takes it.

    Attributes:
        kind: `none`, `int8`, `fp8` or `int4`.
        weight: [K, N] float32 in `none` and `fp8` (in `fp8` the stored values), [K, N] int8, or in `int4` bytes
            [N, K / block, block / 2].
        scale: float32 [N], in `int4` [N, K / block]; None in `none`.
        input_scale: The input's static scale, float32; None takes each token's own.
        input_bound: The largest magnitude that such a scale is chosen for; 0 is none.
        is_turned: Whether a float32 weight lies as [N, K].
        has_blocks: Whether an int8 weight is uint8 about 128 [N, K / block, block], with a scale for each block.
    """

    kind: str
    weight: ir.Value
    scale: ir.Value | None = None
    input_scale: ir.Value | None = None
    input_bound: float = 0.0
    is_turned: bool = False
    has_blocks: bool = False

    @property
    def is_blockwise(self) -> bool:
        """Whether the kernel is the one of block-wise weights, which quantises activations itself."""
        return self.kind == "int4" or self.has_blocks


def multiply(nodes: Nodes, x: ir.Value, matrix: Matrix) -> ir.Value:
    """Writes x [..., K] times a matrix, [..., N]."""
    if matrix.kind == "none":
        return _float_product(nodes, x, matrix)
    if matrix.is_blockwise:
        count, blocks, size = dims(matrix.weight)
        bits = 4 if matrix.kind == "int4" else 8
        block = size * 8 // bits
        product: ir.Value = nodes.MatMulNBits(
            x,
            matrix.weight,
            matrix.scale,
            domain=MICROSOFT,
            K=blocks * block,
            N=count,
            bits=bits,
            block_size=block,
            accuracy_level=INT8_ACTIVATIONS,
        )
        return product
    if matrix.input_scale is not None:
        return multiply_stored(nodes, quantise(nodes, x, matrix.input_scale, matrix.kind), matrix.input_scale, matrix)
    own_scale = token_scale(nodes, x, matrix.kind, matrix.input_bound)
    one = nodes.constant(number(1))
    stored = quantise(nodes, nodes.Div(x, own_scale), one, matrix.kind)
    scaled: ir.Value = nodes.Mul(multiply_stored(nodes, stored, one, matrix), own_scale)
    return scaled


def multiply_planes(nodes: Nodes, x: ir.Value, high: Matrix, low: Matrix) -> ir.Value:
    """Writes x [B, S, K] times a weight that is the sum of two int8 ones, to 16 bits of both.

    Two bytes a weight are read where float32 takes four: a step that decodes one token is bound by them. The kernel
    rounds activations to int8 by blocks, so they go in as two rows: what it keeps exactly, and what that leaves. The
    product of both remainders, 1/64516 of the whole, is left out.
    """
    _, blocks, block = dims(high.weight)
    parts = nodes.Reshape(x, ints(0, 0, blocks, block))
    largest = nodes.ReduceMax(nodes.Abs(parts), ints(-1), keepdims=1)
    step = nodes.Div(nodes.Max(largest, number(SMALLEST)), number(127))
    kept = nodes.Reshape(nodes.Mul(nodes.Round(nodes.Div(parts, step)), step), ints(0, 0, -1))
    both = multiply(nodes, nodes.Concat(kept, nodes.Sub(x, kept), axis=0), high)
    of_kept, of_rest = nodes.Split(both, axis=0, num_outputs=2, outputs=2)
    product: ir.Value = nodes.Sum(of_kept, of_rest, multiply(nodes, kept, low))
    return product


def quantise(nodes: Nodes, x: ir.Value, scale: ir.Value, kind: str) -> ir.Value:
    """Activations as `multiply_stored` takes them: int8 as uint8 about 128, E4M3 as float32."""
    if kind == "int8":
        stored: ir.Value = nodes.QuantizeLinear(x, scale, np.array(128, dtype=np.uint8))
        return stored
    return nodes.Cast(nodes.QuantizeLinear(x, scale, output_dtype=FP8), to=ir.DataType.FLOAT)


def multiply_stored(nodes: Nodes, stored: ir.Value, x_scale: ir.Value, matrix: Matrix) -> ir.Value:
    """Writes the product of activations that `quantise` has made of one scale."""
    if matrix.kind == "int8":
        middle = np.array(128, dtype=np.uint8)
        product: ir.Value = nodes.MatMulIntegerToFloat(
            stored, matrix.weight, x_scale, matrix.scale, middle, domain=MICROSOFT
        )
        return product
    # Not times the product of the two scales: ONNX Runtime would fold that from the initializers' placeholders.
    return nodes.Mul(nodes.Mul(_float_product(nodes, stored, matrix), matrix.scale), x_scale)


def _float_product(nodes: Nodes, x: ir.Value, matrix: Matrix) -> ir.Value:
    if matrix.is_turned:
        turned: ir.Value = nodes.FusedMatMul(x, matrix.weight, domain=MICROSOFT, transB=1)
        return turned
    product: ir.Value = nodes.MatMul(x, matrix.weight)
    return product


def largest_block(*sizes: int) -> int:
    """The largest block that divides all these numbers of inputs; 0 where none does."""
    return next((block for block in reversed(BLOCKS) if not any(size % block for size in sizes)), 0)
