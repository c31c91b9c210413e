"""Nodes of the ops of products in `library.cpp`, and the matrices that they take.

For integers activations are rounded to int8, 32 inputs of a row by their own largest magnitude, or all by a static
scale; integers are multiplied as integers. That is finer than a scale a token. For E4M3 they are rounded to E4M3 by the
model's own scales. A row is computed alike whatever stands beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ..moe.op import Attributes
from ..nodes import Nodes
from .library import DOMAIN

VERSION = 1
SMALLEST_GROUP = 8
"""Divisor of the number of inputs that share a scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panels:
    """A matrix, or all experts' matrices of one kind, in panels of 32 outputs; `matrix.h` says how these lie.

    Attributes:
        weight: Bytes [.., panels, bytes of one].
        bits: Bits of a weight: 4 or 8; in bundles built before also 16 (bfloat16) and 32 (float32).
        scale: [.., panels, groups, 32]; None of floats.
        group: Inputs that share a scale; 0 where all of an output do.
        input_scale: Static scale of the inputs, float32, of experts [E]; None rounds each 32 inputs by their own.
    """

    weight: ir.Value
    bits: int
    scale: ir.Value | None = None
    group: int = 0
    input_scale: ir.Value | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8:
    """A matrix, or all experts' matrices of one kind, in E4M3 as it lies.

    Attributes:
        weight: [.., N, K].
        scale: float32 [N], of experts [E, N, 1].
        input_scale: Static scale of the inputs, float32, of experts [E]; None rounds a token by its own.
        bound: The largest magnitude that such a scale is chosen for; 0 is none.
    """

    weight: ir.Value
    scale: ir.Value
    input_scale: ir.Value | None = None
    bound: float = 0.0


def multiply(nodes: Nodes, x: ir.Value, matrix: Panels, count: int, product: ir.Value) -> None:
    """Writes float32 x [..., K] times a matrix of `count` outputs.

    Args:
        nodes: Where the node goes.
        x: The activations.
        matrix: The matrix.
        count: N.
        product: The value to produce, [..., N].
    """
    attributes = {"bits": matrix.bits, "group": matrix.group, "outputs": count}
    _node(nodes, "Linear", [x, matrix.weight, matrix.scale, matrix.input_scale], attributes, product)


def multiply_plain(nodes: Nodes, x: ir.Value, weight: ir.Value, product: ir.Value) -> None:
    """Writes float32 x [..., K] times a matrix of floats as it lies.

    Args:
        nodes: Where the node goes.
        x: The activations.
        weight: [N, K] in float32, float16 or bfloat16.
        product: The value to produce, [..., N].
    """
    _node(nodes, "PlainLinear", [x, weight], {}, product)


def multiply_fp8(nodes: Nodes, x: ir.Value, matrix: Fp8, product: ir.Value) -> None:
    """Writes x [..., K], rounded to E4M3, times a matrix of E4M3 as it lies.

    Args:
        nodes: Where the node goes.
        x: The activations, float32.
        matrix: The matrix [N, K].
        product: The value to produce, [..., N].
    """
    inputs = [x, matrix.weight, matrix.scale, matrix.input_scale]
    _node(nodes, "Fp8Linear", inputs, {"bound": matrix.bound}, product)


def dispatch(
    nodes: Nodes,
    hidden: ir.Value,
    router_logits: ir.Value,
    gate_up: Panels,
    down: Panels,
    output: ir.Value,
    attributes: Attributes,
    *,
    experts: int,
    width: int,
) -> None:
    """Writes the node of one layer of experts.

    Args:
        nodes: Where the node goes.
        hidden: [T, H].
        router_logits: [T, E].
        gate_up: The first product's matrices, gates and ups interleaved.
        down: The second product's matrices.
        output: The value to produce, [T, H].
        attributes: The canonical op's attributes.
        experts: Number of experts whose weights are given.
        width: I.
    """
    inputs = [hidden, router_logits, gate_up.weight, gate_up.scale, down.weight, down.scale]
    settings = {
        "bits": gate_up.bits,
        "group": gate_up.group,
        "down_group": down.group,
        **_routing(attributes),
        "experts": experts,
        "width": width,
    }
    statics = [gate_up.input_scale, down.input_scale]
    _node(nodes, "MoeDispatch", [*inputs, *statics], settings, output)


def dispatch_plain(
    nodes: Nodes,
    hidden: ir.Value,
    router_logits: ir.Value,
    gate_up: ir.Value,
    down: ir.Value,
    output: ir.Value,
    attributes: Attributes,
) -> None:
    """Writes the node of one layer of experts of floats as they lie; those that no token chose are not read.

    Args:
        nodes: Where the node goes.
        hidden: [T, H].
        router_logits: [T, E].
        gate_up: [E, H, 2I] in float32, float16 or bfloat16.
        down: [E, I, H] likewise.
        output: The value to produce, [T, H].
        attributes: The canonical op's attributes.
    """
    _node(nodes, "PlainMoeDispatch", [hidden, router_logits, gate_up, down], _routing(attributes), output)


def dispatch_fp8(
    nodes: Nodes,
    hidden: ir.Value,
    router_logits: ir.Value,
    gate_up: Fp8,
    down: Fp8,
    output: ir.Value,
    attributes: Attributes,
) -> None:
    """Writes the node of one layer of experts in E4M3 as they lie; those that no token chose are not read.

    Args:
        nodes: Where the node goes.
        hidden: [T, H].
        router_logits: [T, E].
        gate_up: [E, 2I, H].
        down: [E, H, I].
        output: The value to produce, [T, H].
        attributes: The canonical op's attributes.
    """
    settings = {**_routing(attributes), "bound": attributes.activation_bound}
    inputs = [hidden, router_logits, gate_up.weight, gate_up.scale, down.weight, down.scale]
    _node(nodes, "Fp8MoeDispatch", [*inputs, gate_up.input_scale, down.input_scale], settings, output)


def _routing(attributes: Attributes) -> dict[str, Any]:
    """Which experts a token chooses, as all three ops of experts have it."""
    return {"top_k": attributes.top_k, "first_expert": attributes.first_expert}


def _node(
    nodes: Nodes, name: str, inputs: list[ir.Value | None], attributes: Mapping[str, Any], output: ir.Value
) -> None:
    while inputs[-1] is None:
        inputs.pop()
    nodes.node(name, inputs, domain=DOMAIN, attributes=dict(attributes), outputs=[output])
