"""Mixture-of-experts dispatch as an ONNX function of standard operators, so that any ONNX runtime executes it.

Every expert sees every token, scaled by zero where it was not chosen: batched matrix products that any back end runs
well, and the exact result, at the price of E times the work. Lowerings and plugins compute the chosen ones only.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from ..linear import STORED, token_scale
from ..nodes import Nodes, cast, function, ints, number
from . import op
from .op import Attributes

FLOAT = ir.DataType.FLOAT


def body(
    attributes: Attributes, dtype: ir.DataType, *, static: bool = False, in_part: bool = False, overload: str = ""
) -> ir.Function:
    """The function body for one set of attributes.

    Args:
        attributes: As on the nodes that call it.
        dtype: Type of the tokens; of the weights too, where these are not quantised.
        static: Whether the nodes have activation scales.
        in_part: Whether the nodes hold some of the router's experts only.
        overload: Name that tells this body from those of other attributes.
    """
    inputs: tuple[str, ...] = op.INPUTS if attributes.quantisation == "none" else op.INPUTS + op.WEIGHT_SCALES
    if static:
        inputs += op.ACTIVATION_SCALES

    def write(nodes: Nodes, values: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> None:
        named = dict(zip(inputs, values, strict=True))
        write_body(nodes, named, outputs[0], attributes=attributes, dtype=dtype, in_part=in_part)

    return function(op.DOMAIN, op.NAME, overload, inputs, op.OUTPUTS, write)


def write_body(
    nodes: Nodes,
    inputs: Mapping[str, ir.Value],
    output: ir.Value,
    *,
    attributes: Attributes,
    dtype: ir.DataType,
    in_part: bool = False,
) -> None:
    """Writes the body's nodes from the op's inputs, by name, to its output."""
    hidden, router_logits = inputs["hidden"], inputs["router_logits"]
    scores_TK, experts_TK = route(nodes, router_logits, attributes, dtype)
    zeros_TE = nodes.Expand(np.array(0, dtype=dtype.numpy()), nodes.Shape(router_logits))
    scores_TE = nodes.ScatterElements(zeros_TE, experts_TK, scores_TK, axis=1)
    if in_part:
        scores_TE = _held(nodes, scores_TE, inputs["gate_up"], attributes.first_expert)
    scores_ET1 = nodes.Unsqueeze(nodes.Transpose(scores_TE, perm=[1, 0]), ints(2))
    expert_input_ETH = nodes.Mul(hidden, scores_ET1)
    linear = partial(_linear, nodes, inputs, attributes=attributes, dtype=dtype)
    gate_ETI, up_ETI = nodes.Split(linear(expert_input_ETH, "gate_up", "hidden"), axis=2, num_outputs=2, outputs=2)
    activated_ETI = nodes.Mul(up_ETI, nodes.Mul(gate_ETI, nodes.Sigmoid(gate_ETI)))
    expert_output_ETH = linear(activated_ETI, "down", "activated")
    over_experts = nodes.constant(ints(0))
    nodes.node("ReduceSum", [expert_output_ETH, over_experts], outputs=[output], attributes={"keepdims": 0})


def _held(nodes: Nodes, scores_TE: ir.Value, gate_up: ir.Value, first_expert: int) -> ir.Value:
    """The columns of the experts whose weights are given, as many as there are."""
    end = nodes.Add(nodes.Shape(gate_up, end=1), ints(first_expert))
    held: ir.Value = nodes.Slice(scores_TE, ints(first_expert), end, ints(1))
    return held


def _linear(
    nodes: Nodes,
    inputs: Mapping[str, ir.Value],
    x_ETK: ir.Value,
    weight: str,
    x: str,
    *,
    attributes: Attributes,
    dtype: ir.DataType,
) -> ir.Value:
    """All experts' products of one kind, [E, T, K] → [E, T, N], in `dtype`; quantised ones as float32 products."""
    kind = attributes.quantisation
    if kind == "none":
        product: ir.Value = nodes.MatMul(x_ETK, inputs[weight])
        return product
    if kind != "int4":
        x_ETK = _fake_quantise(nodes, cast(nodes, x_ETK, dtype, FLOAT), inputs.get(f"{x}_scale"), attributes)
    else:
        x_ETK = cast(nodes, x_ETK, dtype, FLOAT)
    wide_ENK = _dequantise(nodes, inputs[weight], inputs[f"{weight}_scale"])
    return cast(nodes, nodes.MatMul(x_ETK, nodes.Transpose(wide_ENK, perm=[0, 2, 1])), FLOAT, dtype)


def _fake_quantise(nodes: Nodes, x_ETK: ir.Value, scale_E: ir.Value | None, attributes: Attributes) -> ir.Value:
    """Activations rounded to the values that their stored form has, in float32."""
    kind = attributes.quantisation
    if scale_E is None:
        scale = token_scale(nodes, x_ETK, kind, attributes.activation_bound)
    else:
        scale = nodes.Unsqueeze(scale_E, ints(1, 2))
    stored = nodes.QuantizeLinear(nodes.Div(x_ETK, scale), number(1), output_dtype=STORED[kind])
    rounded: ir.Value = nodes.Mul(nodes.Cast(stored, to=FLOAT), scale)
    return rounded


def _dequantise(nodes: Nodes, weight_ENK: ir.Value, scale: ir.Value) -> ir.Value:
    """Weights in float32; each scale [E, N, K / block] serves a block of inputs."""
    blocks = nodes.Reshape(nodes.Cast(weight_ENK, to=FLOAT), nodes.Concat(nodes.Shape(scale), ints(-1), axis=0))
    wide: ir.Value = nodes.Mul(blocks, nodes.Unsqueeze(scale, ints(3)))
    return nodes.Reshape(wide, nodes.Shape(weight_ENK))


def route(
    nodes: Nodes, router_logits: ir.Value, attributes: Attributes, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """The chosen experts' scores (sigmoid in float32, cast to `dtype`) and numbers, [T, top_k] each."""
    logits_TK, experts_TK = nodes.TopK(router_logits, ints(attributes.top_k), axis=1, outputs=2)
    if dtype == FLOAT:
        return nodes.Sigmoid(logits_TK), experts_TK
    return nodes.Cast(nodes.Sigmoid(nodes.Cast(logits_TK, to=FLOAT)), to=dtype), experts_TK
