"""Mixture-of-experts dispatch for ONNX Runtime's CPU, so that only chosen experts are computed.

This is the form of experts in E4M3: one `If` an expert. (Others are one op of `plugins.cpu`.)
Each expert's weights are initializers of their own, matrices that lie in the checkpoint as they are used: nothing is
gathered. An expert without tokens costs one branch. The branches return their tokens' outputs, which one scatter puts
back in order.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..cpu.float_products import MICROSOFT, Matrix, multiply
from ..nodes import OPSET, Nodes, ints, number
from .body import route
from .op import Attributes

INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


def lower(
    nodes: Nodes,
    hidden: ir.Value,
    router_logits: ir.Value,
    experts: Sequence[tuple[Matrix, Matrix]],
    hidden_size: int,
    output: ir.Value,
    attributes: Attributes,
    *,
    in_part: bool = False,
) -> None:
    """Writes the nodes of one layer.

    Args:
        nodes: Where they go.
        hidden: [T, H].
        router_logits: [T, E].
        experts: Each held expert's gate_up [2I, H] and down [H, I].
        hidden_size: H.
        output: The value to produce, [T, H].
        attributes: The op's attributes.
        in_part: Whether these are some of the router's experts only.
    """
    count, first = len(experts), attributes.first_expert
    scores_TK, experts_TK = route(nodes, router_logits, attributes, FLOAT)
    chosen_TKE = nodes.OneHot(experts_TK, number(first + count, np.int64), ints(0, 1))
    busy_E = nodes.Greater(nodes.ReduceSum(chosen_TKE, ints(0, 1), keepdims=0), number(0, np.int64))
    if first:
        busy_E = nodes.Slice(busy_E, ints(first), ints(first + count), ints(0))
    busy = nodes.Split(busy_E, axis=0, num_outputs=count, outputs=count) if count > 1 else [busy_E]
    parts = [
        nodes.If(
            busy[index],
            outputs=2,
            then_branch=_expert(
                f"{nodes.prefix}expert.{index}/",
                first + index,
                attributes.top_k,
                hidden,
                scores_TK,
                experts_TK,
                *experts[index],
            ),
            else_branch=_nothing(f"{nodes.prefix}expert.{index}/idle/", hidden_size),
        )
        for index in range(count)
    ]
    places_N1 = nodes.Concat(*(places for places, _ in parts), axis=0)
    unordered_NH = nodes.Concat(*(outputs for _, outputs in parts), axis=0)
    # Each pair (token, choice) is written once: ONNX Runtime adds in ScatterND without guarding against races.
    blank_NH = _zeros(nodes, hidden, attributes.top_k) if in_part else unordered_NH
    if attributes.top_k == 1:
        nodes.node("ScatterND", [blank_NH, places_N1, unordered_NH], outputs=[output])
        return
    pairs_NH = nodes.ScatterND(blank_NH, places_N1, unordered_NH)
    pairs_TKH = nodes.Reshape(pairs_NH, ints(-1, attributes.top_k, hidden_size))
    over_choices = nodes.constant(ints(1))
    nodes.node("ReduceSum", [pairs_TKH, over_choices], outputs=[output], attributes={"keepdims": 0})


def _zeros(nodes: Nodes, hidden: ir.Value, top_k: int) -> ir.Value:
    """A row of zeros a pair (token, choice), for those that go to experts held elsewhere."""
    zeros: ir.Value = nodes.Expand(number(0), nodes.Mul(nodes.Shape(hidden), ints(top_k, 1)))
    return zeros


def _expert(
    prefix: str,
    index: int,
    top_k: int,
    hidden: ir.Value,
    scores_TK: ir.Value,
    experts_TK: ir.Value,
    gate_up: Matrix,
    down: Matrix,
) -> ir.Graph:
    """The branch of an expert that has tokens: places [N, 1] among the pairs (token, choice), and outputs [N, H]."""
    nodes = Nodes(prefix)
    pairs_2N = nodes.NonZero(nodes.Equal(experts_TK, number(index, np.int64)))
    pairs_N2 = nodes.Transpose(pairs_2N, perm=[1, 0])
    tokens_N1 = nodes.Slice(pairs_N2, ints(0), ints(1), ints(1))
    choices_N1 = nodes.Slice(pairs_N2, ints(1), ints(2), ints(1))
    places_N1 = nodes.Add(nodes.Mul(tokens_N1, number(top_k, np.int64)), choices_N1)
    scores_N1 = nodes.Unsqueeze(nodes.GatherND(scores_TK, pairs_N2), ints(1))
    expert_input_NH = nodes.Mul(nodes.GatherND(hidden, tokens_N1), scores_N1)
    gate_NI, up_NI = nodes.Split(multiply(nodes, expert_input_NH, gate_up), axis=1, num_outputs=2, outputs=2)
    activated_NI = nodes.Mul(up_NI, nodes.Mul(gate_NI, nodes.Sigmoid(gate_NI)))
    return _branch(prefix, nodes, places_N1, multiply(nodes, activated_NI, down))


def _nothing(prefix: str, hidden_size: int) -> ir.Graph:
    """The branch of an expert without tokens."""
    nodes = Nodes(prefix)
    places_N1 = nodes.constant(np.empty((0, 1), dtype=np.int64))
    return _branch(prefix, nodes, places_N1, nodes.constant(np.empty((0, hidden_size), dtype=np.float32)))


def _branch(prefix: str, nodes: Nodes, *outputs: ir.Value) -> ir.Graph:
    imports = {"": OPSET, MICROSOFT: 1}
    return ir.Graph([], outputs, nodes=nodes.list, opset_imports=imports, name=prefix.rstrip("/"))
