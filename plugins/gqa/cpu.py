"""Grouped-query attention for ONNX Runtime's CPU: the contrib op `com.microsoft.GroupQueryAttention`.

Rotation, norm and temperature stand before it, on [B, S, N·D] as it lies, since the contrib op has no QK norm on the
CPU and its own rotation honours only the first row's position. It writes the cache in place when past and present are
bound to one buffer.

Exact where all rows have S = 1, or start with an empty cache, or there is but one row; a session therefore feeds
longer pieces over filled caches row by row. The contrib op takes head dims that are multiples of 8; others, and
quantised caches, get the function's body in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ..nodes import Nodes, ints, number
from . import op
from .body import present_of, steps, temperature, turn, write_body
from .op import Attributes

INT32, INT64, FLOAT = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT


@dataclass(slots=True)
class Shared:
    """What all layers of a graph compute alike, computed once."""

    positions: ir.Value | None = None
    turns: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    lengths: dict[int, tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    temperatures: dict[tuple[float, float], ir.Value] = field(default_factory=dict)


def lower(
    nodes: Nodes,
    inputs: Sequence[ir.Value | None],
    outputs: Sequence[ir.Value],
    attributes: Attributes,
    shared: Shared,
) -> None:
    """Writes the nodes of one layer in float32.

    Args:
        nodes: Where they go.
        inputs: The op's inputs; without `inv_freq` there is no rotation.
        outputs: The values to produce.
        attributes: The op's.
        shared: Values of earlier layers; extended here.
    """
    given = dict(zip(op.INPUTS + op.CACHE_SCALES, inputs, strict=False))
    query, key, value, key_cache, value_cache, past_lengths = (present_of(given, name) for name in op.INPUTS[:6])
    head_dim, is_quantised = cache_head_dim(key_cache), given.get("key_scale") is not None
    if head_dim % 8 or is_quantised:
        cache = key_cache.dtype if is_quantised else None
        write_body(nodes, inputs, outputs, attributes=attributes, head_dim=head_dim, dtype=FLOAT, cache=cache)
        return
    inv_freq = given.get("inv_freq")
    if shared.positions is None:
        past_B = nodes.Cast(past_lengths, to=INT64)
        shared.positions = nodes.Add(nodes.Unsqueeze(past_B, ints(1)), steps(nodes, query))
    if inv_freq is not None:
        cos, sin = _turn(nodes, inv_freq, shared)
        query = nodes.RotaryEmbedding(query, cos, sin, interleaved=1, num_heads=attributes.heads)
        key = nodes.RotaryEmbedding(key, cos, sin, interleaved=1, num_heads=attributes.kv_heads)
    if attributes.qk_norm_eps:
        query = _normalise(nodes, query, head_dim, attributes.qk_norm_eps)
        key = _normalise(nodes, key, head_dim, attributes.qk_norm_eps)
    if attributes.temperature_scale:
        query = nodes.Mul(query, _temperature(nodes, attributes, shared))
    seqlens_B, total = _lengths(nodes, query, past_lengths, attributes.chunk, shared)
    nodes.node(
        "GroupQueryAttention",
        [query, key, value, key_cache, value_cache, seqlens_B, total],
        outputs=outputs,
        domain="com.microsoft",
        attributes={
            "num_heads": attributes.heads,
            "kv_num_heads": attributes.kv_heads,
            "scale": attributes.scale,
            "do_rotary": 0,
        },
    )


def cache_head_dim(cache: ir.Value) -> int:
    """D of a cache [B, K, C, D], the only dimension that is known besides K."""
    assert cache.shape is not None
    head_dim = cache.shape[3]
    assert isinstance(head_dim, int)
    return head_dim


def _turn(nodes: Nodes, inv_freq: ir.Value, shared: Shared) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine of each position's angles, [B, S, D/2]."""
    assert shared.positions is not None
    if inv_freq not in shared.turns:
        shared.turns[inv_freq] = turn(nodes, shared.positions, inv_freq)
    return shared.turns[inv_freq]


def _temperature(nodes: Nodes, attributes: Attributes, shared: Shared) -> ir.Value:
    """Each position's factor on the query, [B, S, 1]."""
    assert shared.positions is not None
    tuning = (attributes.temperature_scale, attributes.temperature_floor)
    if tuning not in shared.temperatures:
        factor_BS = temperature(nodes, shared.positions, attributes)
        shared.temperatures[tuning] = nodes.Unsqueeze(factor_BS, ints(2))
    return shared.temperatures[tuning]


def _normalise(nodes: Nodes, x: ir.Value, head_dim: int, eps: float) -> ir.Value:
    """Weightless RMS norm of each head in [B, S, N·D]."""
    heads = nodes.Reshape(x, ints(0, 0, -1, head_dim))
    normed = nodes.RMSNormalization(heads, np.ones(head_dim, dtype=np.float32), epsilon=eps)
    flat: ir.Value = nodes.Reshape(normed, ints(0, 0, -1))
    return flat


def _lengths(
    nodes: Nodes, query: ir.Value, past_lengths: ir.Value, chunk: int, shared: Shared
) -> tuple[ir.Value, ir.Value]:
    """The contrib op's `seqlens_k` (slots filled after the piece, less one) and `total_sequence_length`."""
    if chunk not in shared.lengths:
        slot_B = nodes.Mod(past_lengths, number(chunk, np.int32)) if chunk else past_lengths
        length = nodes.Cast(nodes.Squeeze(nodes.Shape(query, start=1, end=2)), to=INT32)
        filled_B = nodes.Add(slot_B, length)
        seqlens_B = nodes.Sub(filled_B, number(1, np.int32))
        shared.lengths[chunk] = seqlens_B, nodes.ReduceMax(filled_B, keepdims=0)
    return shared.lengths[chunk]
