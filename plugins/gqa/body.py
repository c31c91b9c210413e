"""Grouped-query attention as an ONNX function of standard operators, so that any runtime of opset 24 executes it.

The attributes shape the body (a layer without RoPE has no rotation to skip), so each set of attributes has a body of
its own, an overload of the function. The cache is written with `TensorScatter`, which a runtime may do in place.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from ..nodes import Nodes, function, ints, number
from . import op
from .op import Attributes

INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


def body(attributes: Attributes, head_dim: int, rope: bool, dtype: ir.DataType, overload: str) -> ir.Function:
    """The function body for one set of attributes.

    Args:
        attributes: As on the nodes that call it.
        head_dim: D.
        rope: Whether the nodes have `inv_freq`.
        dtype: Type of query, key, value and caches.
        overload: Name that tells this body from those of other attributes.
    """
    inputs = op.INPUTS if rope else op.INPUTS[:-1]
    write = partial(write_body, attributes=attributes, head_dim=head_dim, dtype=dtype)
    return function(op.DOMAIN, op.NAME, overload, inputs, op.OUTPUTS, write)


def write_body(
    nodes: Nodes,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    *,
    attributes: Attributes,
    head_dim: int,
    dtype: ir.DataType,
) -> None:
    """Writes the body's nodes from the op's inputs (the last one absent without RoPE) to its outputs."""
    query, key, value, key_cache, value_cache, past_lengths, *rest = inputs
    output, present_key, present_value = outputs
    past_B = nodes.Cast(past_lengths, to=INT64)
    steps_S = steps(nodes, query)
    positions_BS = nodes.Add(nodes.Unsqueeze(past_B, ints(1)), steps_S)
    slot_B = nodes.Mod(past_B, number(attributes.chunk, np.int64)) if attributes.chunk else past_B

    inv_freq = rest[0] if rest else None
    query, key = prepare(nodes, query, key, positions_BS, inv_freq, attributes, head_dim, dtype)
    value = split_heads(nodes, value, attributes.kv_heads, head_dim)
    for cache, new, present in ((key_cache, key, present_key), (value_cache, value, present_value)):
        where = {"axis": 2, "mode": "linear"}
        nodes.node("TensorScatter", [cache, new, slot_B], outputs=[present], attributes=where)

    slots_BS1 = nodes.Unsqueeze(nodes.Add(nodes.Unsqueeze(slot_B, ints(1)), steps_S), ints(1, 3))
    capacity = nodes.Squeeze(nodes.Shape(key_cache, start=2, end=3))
    slots_C = nodes.Range(number(0, np.int64), capacity, number(1, np.int64))
    seen_B1SC = nodes.LessOrEqual(slots_C, slots_BS1)
    attended_BQSD = nodes.Attention(query, present_key, present_value, seen_B1SC, scale=attributes.scale)
    merged = nodes.Transpose(attended_BQSD, perm=[0, 2, 1, 3])
    nodes.node("Reshape", [merged, nodes.constant(ints(0, 0, -1))], outputs=[output])


def prepare(
    nodes: Nodes,
    query: ir.Value,
    key: ir.Value,
    positions_BS: ir.Value,
    inv_freq: ir.Value | None,
    attributes: Attributes,
    head_dim: int,
    dtype: ir.DataType,
) -> tuple[ir.Value, ir.Value]:
    """Splits heads, rotates, normalises and scales: [B, S, N·D] each to [B, N, S, D] each."""
    query = split_heads(nodes, query, attributes.heads, head_dim)
    key = split_heads(nodes, key, attributes.kv_heads, head_dim)
    if inv_freq is not None:
        cos, sin = turn(nodes, positions_BS, inv_freq)
        query, key = (rotate(nodes, x, cos, sin, dtype) for x in (query, key))
    if attributes.qk_norm_eps:
        query, key = (normalise(nodes, x, attributes.qk_norm_eps, head_dim, dtype) for x in (query, key))
    if attributes.temperature_scale:
        query = tune_temperature(nodes, query, positions_BS, attributes, dtype)
    return query, key


def steps(nodes: Nodes, query: ir.Value) -> ir.Value:
    """The numbers 0 … S-1."""
    length = nodes.Squeeze(nodes.Shape(query, start=1, end=2))
    steps_S: ir.Value = nodes.Range(number(0, np.int64), length, number(1, np.int64))
    return steps_S


def split_heads(nodes: Nodes, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """[B, S, N·D] to [B, N, S, D]."""
    split: ir.Value = nodes.Transpose(nodes.Reshape(x, ints(0, 0, heads, head_dim)), perm=[0, 2, 1, 3])
    return split


def rotate(nodes: Nodes, x: ir.Value, cos: ir.Value, sin: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Rotates interleaved pairs in float32 by the angles [B, S, D/2], and casts back."""
    rotated = nodes.RotaryEmbedding(cast(nodes, x, dtype, FLOAT), cos, sin, interleaved=1)
    return cast(nodes, rotated, FLOAT, dtype)


def normalise(nodes: Nodes, x: ir.Value, eps: float, head_dim: int, dtype: ir.DataType) -> ir.Value:
    """Weightless RMS norm over a head in float32, cast back."""
    ones = np.ones(head_dim, dtype=np.float32)
    wide = nodes.RMSNormalization(cast(nodes, x, dtype, FLOAT), ones, epsilon=eps)
    return cast(nodes, wide, FLOAT, dtype)


def tune_temperature(
    nodes: Nodes, query: ir.Value, positions_BS: ir.Value, attributes: Attributes, dtype: ir.DataType
) -> ir.Value:
    """Scales queries [B, Q, S, D] by their position's temperature in float32, and casts back."""
    factor_B1S1 = nodes.Unsqueeze(temperature(nodes, positions_BS, attributes), ints(1, 3))
    return cast(nodes, nodes.Mul(cast(nodes, query, dtype, FLOAT), factor_B1S1), FLOAT, dtype)


def turn(nodes: Nodes, positions_BS: ir.Value, inv_freq: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine of each position's angles in float32, [B, S, D/2]."""
    angle = nodes.Mul(nodes.Unsqueeze(nodes.Cast(positions_BS, to=FLOAT), ints(2)), inv_freq)
    return nodes.Cos(angle), nodes.Sin(angle)


def temperature(nodes: Nodes, positions_BS: ir.Value, attributes: Attributes) -> ir.Value:
    """Each position's factor on the query in float32, [B, S]."""
    ahead_BS = nodes.Cast(nodes.Add(positions_BS, number(1, np.int64)), to=FLOAT)
    steps_BS = nodes.Floor(nodes.Div(ahead_BS, number(attributes.temperature_floor)))
    log_BS = nodes.Log(nodes.Add(steps_BS, number(1)))
    factor_BS: ir.Value = nodes.Add(nodes.Mul(log_BS, number(attributes.temperature_scale)), number(1))
    return factor_BS


def cast(nodes: Nodes, x: ir.Value, source: ir.DataType, target: ir.DataType) -> ir.Value:
    """A Cast, or nothing where the types are equal."""
    if source == target:
        return x
    converted: ir.Value = nodes.Cast(x, to=target)
    return converted
