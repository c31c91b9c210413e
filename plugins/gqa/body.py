"""Grouped-query attention as an ONNX function of standard operators, so that any runtime of opset 24 executes it.

The attributes shape the body (a layer without RoPE has no rotation to skip), so each set of attributes has a body of
its own, an overload of the function. The cache is written with `TensorScatter`, which a runtime may do in place.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from ..nodes import Nodes, cast, function, ints, number
from . import op
from .op import Attributes

INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


def body(
    attributes: Attributes,
    head_dim: int,
    rope: bool,
    dtype: ir.DataType,
    overload: str,
    cache: ir.DataType | None = None,
) -> ir.Function:
    """The function body for one set of attributes.

    Args:
        attributes: As on the nodes that call it.
        head_dim: D.
        rope: Whether the nodes have `inv_freq`.
        dtype: Type of query, key, value, and of caches that are not quantised.
        overload: Name that tells this body from those of other attributes.
        cache: Type of quantised caches; None where they are not. The body then has all the op's inputs, and reads
            `inv_freq` where there is RoPE.
    """
    inputs = op.INPUTS + op.CACHE_SCALES if cache else op.INPUTS if rope else op.INPUTS[:-1]

    def write(nodes: Nodes, values: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> None:
        used = [value if rope or name != "inv_freq" else None for name, value in zip(inputs, values, strict=True)]
        write_body(nodes, used, outputs, attributes=attributes, head_dim=head_dim, dtype=dtype, cache=cache)

    return function(op.DOMAIN, op.NAME, overload, inputs, op.OUTPUTS, write)


def write_body(
    nodes: Nodes,
    inputs: Sequence[ir.Value | None],
    outputs: Sequence[ir.Value],
    *,
    attributes: Attributes,
    head_dim: int,
    dtype: ir.DataType,
    cache: ir.DataType | None = None,
) -> None:
    """Writes the body's nodes from the op's inputs (`inv_freq` None or absent without RoPE) to its outputs."""
    given = dict(zip(op.INPUTS + op.CACHE_SCALES, inputs, strict=False))
    query, key, value, key_cache, value_cache, past_lengths = (present_of(given, name) for name in op.INPUTS[:6])
    inv_freq, key_scale, value_scale = (given.get(name) for name in ("inv_freq", *op.CACHE_SCALES))
    output, present_key, present_value = outputs
    past_B = nodes.Cast(past_lengths, to=INT64)
    steps_S = steps(nodes, query)
    positions_BS = nodes.Add(nodes.Unsqueeze(past_B, ints(1)), steps_S)
    slot_B = nodes.Mod(past_B, number(attributes.chunk, np.int64)) if attributes.chunk else past_B

    query, key = prepare(nodes, query, key, positions_BS, inv_freq, attributes, head_dim, dtype)
    value = split_heads(nodes, value, attributes.kv_heads, head_dim)
    write = partial(_write_cache, nodes, slot_B=slot_B, dtype=dtype, cache=cache)
    keys = write(key_cache, key, key_scale, present_key)
    values = write(value_cache, value, value_scale, present_value)

    slots_BS1 = nodes.Unsqueeze(nodes.Add(nodes.Unsqueeze(slot_B, ints(1)), steps_S), ints(1, 3))
    capacity = nodes.Squeeze(nodes.Shape(key_cache, start=2, end=3))
    slots_C = nodes.Range(number(0, np.int64), capacity, number(1, np.int64))
    seen_B1SC = nodes.LessOrEqual(slots_C, slots_BS1)
    attended_BQSD = nodes.Attention(query, keys, values, seen_B1SC, scale=attributes.scale)
    merged = nodes.Transpose(attended_BQSD, perm=[0, 2, 1, 3])
    nodes.node("Reshape", [merged, nodes.constant(ints(0, 0, -1))], outputs=[output])


def present_of(given: Mapping[str, ir.Value | None], name: str) -> ir.Value:
    """An input that the op always has."""
    value = given[name]
    assert value is not None
    return value


def _write_cache(
    nodes: Nodes,
    past: ir.Value,
    new_BKSD: ir.Value,
    scale_KD: ir.Value | None,
    present: ir.Value,
    *,
    slot_B: ir.Value,
    dtype: ir.DataType,
    cache: ir.DataType | None,
) -> ir.Value:
    """Writes keys or values to their slots and returns what attention sees, [B, K, C, D] in `dtype`."""
    where = {"axis": 2, "mode": "linear"}
    if scale_KD is None:
        nodes.node("TensorScatter", [past, new_BKSD, slot_B], outputs=[present], attributes=where)
        return present
    scale_K1D = nodes.Unsqueeze(scale_KD, ints(1))
    scaled = nodes.Div(cast(nodes, new_BKSD, dtype, FLOAT), scale_K1D)
    stored = nodes.QuantizeLinear(scaled, number(1), output_dtype=cache)
    if cache == ir.DataType.INT8:
        nodes.node("TensorScatter", [past, stored, slot_B], outputs=[present], attributes=where)
        wide = nodes.Cast(present, to=FLOAT)
    else:  # ONNX Runtime scatters no E4M3: by way of float32, which holds each of its values
        wide = nodes.TensorScatter(nodes.Cast(past, to=FLOAT), nodes.Cast(stored, to=FLOAT), slot_B, **where)
        nodes.node("Cast", [wide], outputs=[present], attributes={"to": cache})
    return cast(nodes, nodes.Mul(wide, scale_K1D), FLOAT, dtype)


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
