"""Mixture-of-experts dispatch as an ONNX function of standard operators, so that any ONNX runtime executes it.

Every expert sees every token, scaled by zero where it was not chosen: batched matrix products that any back end runs
well, and the exact result, at the price of E times the work. Lowerings and plugins compute the chosen ones only.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..nodes import Nodes, function, ints
from . import op
from .op import Attributes

FLOAT = ir.DataType.FLOAT


def body(attributes: Attributes, dtype: ir.DataType) -> ir.Function:
    """The function body for one set of attributes and a dtype of tokens and weights."""

    def write(nodes: Nodes, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> None:
        hidden, router_logits, gate_up, down = inputs
        scores_TK, experts_TK = route(nodes, router_logits, attributes, dtype)
        zeros_TE = nodes.Expand(np.array(0, dtype=dtype.numpy()), nodes.Shape(router_logits))
        scores_TE = nodes.ScatterElements(zeros_TE, experts_TK, scores_TK, axis=1)
        scores_ET1 = nodes.Unsqueeze(nodes.Transpose(scores_TE, perm=[1, 0]), ints(2))
        expert_input_ETH = nodes.Mul(hidden, scores_ET1)
        gate_ETI, up_ETI = nodes.Split(nodes.MatMul(expert_input_ETH, gate_up), axis=2, num_outputs=2, outputs=2)
        activated_ETI = nodes.Mul(up_ETI, nodes.Mul(gate_ETI, nodes.Sigmoid(gate_ETI)))
        expert_output_ETH = nodes.MatMul(activated_ETI, down)
        over_experts = nodes.constant(ints(0))
        nodes.node("ReduceSum", [expert_output_ETH, over_experts], outputs=outputs, attributes={"keepdims": 0})

    return function(op.DOMAIN, op.NAME, "", op.INPUTS, op.OUTPUTS, write)


def route(
    nodes: Nodes, router_logits: ir.Value, attributes: Attributes, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """The chosen experts' scores (sigmoid in float32, cast to `dtype`) and numbers, [T, top_k] each."""
    logits_TK, experts_TK = nodes.TopK(router_logits, ints(attributes.top_k), axis=1, outputs=2)
    if dtype == FLOAT:
        return nodes.Sigmoid(logits_TK), experts_TK
    return nodes.Cast(nodes.Sigmoid(nodes.Cast(logits_TK, to=FLOAT)), to=dtype), experts_TK
