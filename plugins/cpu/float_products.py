"""A product of E4M3 on ONNX Runtime's CPU as its own ops compute it: in the float32 that E4M3 stands for.

Enters: float32 activations and a weight as it lies, outputs in front. Leaves: float32.
"""

from dataclasses import dataclass

import onnx_ir as ir

from ..linear import token_scale
from ..nodes import Nodes, number

MICROSOFT = "com.microsoft"
FP8 = ir.DataType.FLOAT8E4M3FN


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A weight as a product takes it.

    Attributes:
        weight: [N, K], the stored values in float32.
        scale: float32 [N].
        input_scale: The input's static scale, float32; None takes each token's own.
        input_bound: The largest magnitude that such a scale is chosen for; 0 is none.
    """

    weight: ir.Value
    scale: ir.Value
    input_scale: ir.Value | None = None
    input_bound: float = 0.0


def multiply(nodes: Nodes, x: ir.Value, matrix: Matrix) -> ir.Value:
    """Writes x [..., K] times a matrix, [..., N]."""
    if matrix.input_scale is not None:
        return multiply_rounded(nodes, round_fp8(nodes, x, matrix.input_scale), matrix.input_scale, matrix)
    own_scale = token_scale(nodes, x, "fp8", matrix.input_bound)
    one = nodes.constant(number(1))
    rounded = round_fp8(nodes, nodes.Div(x, own_scale), one)
    scaled: ir.Value = nodes.Mul(multiply_rounded(nodes, rounded, one, matrix), own_scale)
    return scaled


def round_fp8(nodes: Nodes, x: ir.Value, scale: ir.Value) -> ir.Value:
    """Activations over their scale, rounded to E4M3, in float32."""
    rounded: ir.Value = nodes.Cast(nodes.QuantizeLinear(x, scale, output_dtype=FP8), to=ir.DataType.FLOAT)
    return rounded


def multiply_rounded(nodes: Nodes, rounded: ir.Value, x_scale: ir.Value, matrix: Matrix) -> ir.Value:
    """Writes the product of activations that `round_fp8` has made of one scale."""
    # Not times the product of the two scales: ONNX Runtime would fold that from the initializers' placeholders.
    product = nodes.FusedMatMul(rounded, matrix.weight, domain=MICROSOFT, transB=1)
    return nodes.Mul(nodes.Mul(product, matrix.scale), x_scale)
