"""The meaning of grouped-query attention, in numpy float64: the reference for every implementation of the op.

Written for reading, not for speed: one row, one position at a time. The invariant: the output of a token depends on
its row's tokens within its chunk (or within its row, where there are no chunks) and on nothing else.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quantisation import quantise
from .op import Attributes

Array = NDArray[np.float64]


def grouped_query_attention(
    query: NDArray[np.floating],
    key: NDArray[np.floating],
    value: NDArray[np.floating],
    key_cache: NDArray[Any],
    value_cache: NDArray[Any],
    past_lengths: NDArray[np.integer],
    inv_freq: NDArray[np.floating] | None,
    key_scale: NDArray[np.float32] | None = None,
    value_scale: NDArray[np.float32] | None = None,
    *,
    attributes: Attributes,
) -> tuple[Array, Array, Array]:
    """Attends one piece; see `op` for the shapes.

    Returns:
        Output [B, S, Q·D] and the two caches as float64, new arrays; of quantised caches the stored numbers, unscaled.
    """
    batch, length, _ = query.shape
    head_dim = key_cache.shape[3]
    query_BSQD = query.astype(np.float64).reshape(batch, length, attributes.heads, head_dim)
    key_BSKD = key.astype(np.float64).reshape(batch, length, attributes.kv_heads, head_dim)
    value_BSKD = value.astype(np.float64).reshape(batch, length, attributes.kv_heads, head_dim)
    present_key, present_value = key_cache.astype(np.float64), value_cache.astype(np.float64)
    output_BSQD = np.zeros_like(query_BSQD)
    group = attributes.heads // attributes.kv_heads

    for row in range(batch):
        first_slot = int(past_lengths[row]) % attributes.chunk if attributes.chunk else int(past_lengths[row])
        for step in range(length):
            position, slot = int(past_lengths[row]) + step, first_slot + step
            query_QD, key_KD = query_BSQD[row, step], key_BSKD[row, step]
            if inv_freq is not None:
                query_QD, key_KD = rotate(query_QD, position, inv_freq), rotate(key_KD, position, inv_freq)
            if attributes.qk_norm_eps:
                query_QD, key_KD = (normalise(x, attributes.qk_norm_eps) for x in (query_QD, key_KD))
            query_QD = query_QD * temperature(position, attributes)
            present_key[row, :, slot] = stored(key_KD, key_scale, key_cache.dtype)
            present_value[row, :, slot] = stored(value_BSKD[row, step], value_scale, value_cache.dtype)
            for head in range(attributes.heads):
                seen_key_CD = present_key[row, head // group, : slot + 1] * scale_of(key_scale, head // group)
                seen_value_CD = present_value[row, head // group, : slot + 1] * scale_of(value_scale, head // group)
                weights_C = softmax(seen_key_CD @ query_QD[head] * attributes.scale)
                output_BSQD[row, step, head] = weights_C @ seen_value_CD
    return output_BSQD.reshape(batch, length, -1), present_key, present_value


def stored(x_KD: Array, scale_KD: NDArray[np.float32] | None, dtype: np.dtype[Any]) -> Array:
    """The numbers that a cache of this dtype holds for keys or values."""
    if scale_KD is None:
        return x_KD
    return quantise(x_KD, scale_KD, "int8" if dtype == np.int8 else "fp8").astype(np.float64)


def scale_of(scale_KD: NDArray[np.float32] | None, kv_head: int) -> NDArray[np.float32] | float:
    """Factors of one head's stored numbers."""
    return 1.0 if scale_KD is None else scale_KD[kv_head]


def rotate(x_ND: Array, position: int, inv_freq: NDArray[np.floating]) -> Array:
    """Rotates the interleaved pairs (2i, 2i+1) of each head by `position * inv_freq[i]` (Su et al. 2021, eq. 15)."""
    angle = position * inv_freq.astype(np.float64)
    even, odd = x_ND[:, 0::2], x_ND[:, 1::2]
    rotated = np.empty_like(x_ND)
    rotated[:, 0::2] = even * np.cos(angle) - odd * np.sin(angle)
    rotated[:, 1::2] = even * np.sin(angle) + odd * np.cos(angle)
    return rotated


def normalise(x_ND: Array, eps: float) -> Array:
    """Divides each head by its root mean square; there is no weight."""
    return x_ND / np.sqrt(np.mean(x_ND**2, axis=-1, keepdims=True) + eps)


def temperature(position: int, attributes: Attributes) -> float:
    """The factor on a query at a position (Nakanishi 2025, arXiv:2501.19399, as Llama 4 steps it)."""
    steps = np.floor((position + 1) / attributes.temperature_floor)
    return float(np.log1p(steps) * attributes.temperature_scale + 1)


def softmax(scores: Array) -> Array:
    """Softmax over the last axis."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
