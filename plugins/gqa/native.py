"""Grouped-query attention in TensorRT's own layers, `TRT_KVCacheUpdate` and `TRT_Attention`.

The cache is a network input that is updated in place. A row attends slots below its length, slot + S, and the causal
mask is aligned to that length: query i sees slots up to slot + i. TensorRT's attention does not scale scores, so the
queries are scaled, in float32, before their one rounding.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..nodes import Nodes, cast, ints, number
from .body import normalise, rotate, split_heads, steps, temperature, turn
from .op import Attributes

DOMAIN = "trt"
INT32, INT64, FLOAT = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT


def lower(
    nodes: Nodes,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    attributes: Attributes,
    head_dim: int,
    dtype: ir.DataType,
) -> None:
    """Writes the nodes of one layer whose caches are not quantised.

    Args:
        nodes: Where they go.
        inputs: The op's inputs; without the last one there is no rotation.
        outputs: The values to produce.
        attributes: The op's.
        head_dim: D.
        dtype: Type of query, key, value and caches.
    """
    query, key, value, key_cache, value_cache, past_lengths, *rest = inputs
    output, present_key, present_value = outputs
    past_B = nodes.Cast(past_lengths, to=INT64)
    positions_BS = nodes.Add(nodes.Unsqueeze(past_B, ints(1)), steps(nodes, query))
    slot_B = nodes.Mod(past_lengths, number(attributes.chunk, np.int32)) if attributes.chunk else past_lengths
    length = nodes.Cast(nodes.Shape(query, start=1, end=2), to=INT32)

    query = cast(nodes, split_heads(nodes, query, attributes.heads, head_dim), dtype, FLOAT)
    key = split_heads(nodes, key, attributes.kv_heads, head_dim)
    if rest:
        cos, sin = turn(nodes, positions_BS, rest[0])
        query, key = rotate(nodes, query, cos, sin, FLOAT), rotate(nodes, key, cos, sin, dtype)
    if attributes.qk_norm_eps:
        query = normalise(nodes, query, attributes.qk_norm_eps, head_dim, FLOAT)
        key = normalise(nodes, key, attributes.qk_norm_eps, head_dim, dtype)
    factor = number(attributes.scale)
    if attributes.temperature_scale:
        factor_BS = nodes.Mul(temperature(nodes, positions_BS, attributes), factor)
        query = nodes.Mul(query, nodes.Unsqueeze(factor_BS, ints(1, 3)))
    else:
        query = nodes.Mul(query, factor)
    query = cast(nodes, query, FLOAT, dtype)

    value = split_heads(nodes, value, attributes.kv_heads, head_dim)
    for cache, new, present in ((key_cache, key, present_key), (value_cache, value, present_value)):
        nodes.node("TRT_KVCacheUpdate", [cache, new, slot_B], outputs=[present], domain=DOMAIN)
    seen_B = nodes.Add(slot_B, length)
    attended_BQSD = nodes.node(
        "TRT_Attention",
        [query, present_key, present_value, None, None, seen_B],
        domain=DOMAIN,
        # TensorRT has no fused kernel for float32.
        attributes={"causal_kind": "lower_right", "TRT_decomposable": int(dtype == FLOAT)},
    )
    merged = nodes.Transpose(attended_BQSD, perm=[0, 2, 1, 3])
    nodes.node("Reshape", [merged, nodes.constant(ints(0, 0, -1))], outputs=[output])
