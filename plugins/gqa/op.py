"""Grouped-query attention as one op of domain `arriero`: its name, attributes, inputs and outputs.

One call attends a piece of S new tokens a row, over a cache of C slots a row that it also writes:

    queries and keys are rotated (RoPE), then normalised (QK norm); in layers without RoPE the queries are scaled by
    the temperature of their position; keys and values go to their cache slots; attention is causal.

With `chunk` = 0, position p lives in slot p and sees every position before it. With a chunk, p lives in slot
p mod chunk and sees the positions of its own chunk only, so the cache never needs more than `chunk` slots.

The caller keeps two promises: no row's piece crosses a chunk boundary, and `slot + S <= C`. Rows are right-padded to S;
what a pad writes lies beyond its row's real tokens and is overwritten by them later.

A quantised cache (int8 or E4M3) holds keys and values divided by their scales and rounded; attention sees what the
cache holds, the piece's own tokens included. Queries, products and softmax stay in high precision.
"""

from dataclasses import dataclass

DOMAIN = "arriero"
NAME = "GroupedQueryAttention"
VERSION = 1

INPUTS = ("query", "key", "value", "key_cache", "value_cache", "past_lengths", "inv_freq")
"""query [B, S, Q·D]; key, value [B, S, K·D]; caches [B, K, C, D]; past_lengths [B] int32; inv_freq [D/2] float32,
absent in layers without RoPE."""

CACHE_SCALES = ("key_scale", "value_scale")
"""float32 [K, D] each, behind `inv_freq` where the caches are quantised: of keys (rotated and normed) and values."""

OUTPUTS = ("output", "present_key", "present_value")
"""output [B, S, Q·D]; the caches with the piece written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """The attributes of one `GroupedQueryAttention` node.

    Attributes:
        heads: Query heads (Q).
        kv_heads: Key and value heads (K); each serves Q / K query heads.
        scale: Factor on the scores, head_dim ** -0.5 in Llama 4.
        chunk: Positions a chunk; 0 is full attention.
        qk_norm_eps: Epsilon of the norm on rotated queries and keys; 0 is no norm.
        temperature_scale: `attn_scale` of the temperature tuning; 0 is none.
        temperature_floor: `floor_scale` of the temperature tuning, in positions.
    """

    heads: int
    kv_heads: int
    scale: float
    chunk: int = 0
    qk_norm_eps: float = 0.0
    temperature_scale: float = 0.0
    temperature_floor: float = 1.0

    def __post_init__(self) -> None:
        assert self.heads % self.kv_heads == 0
        assert self.chunk >= 0
        assert self.temperature_floor > 0
