"""Grouped-query attention in PyTorch: the op `arriero::grouped_query_attention` and its uncached sibling.

The op is what export traces; it computes for real on any device. `attend_whole` is the same attention over whole
sequences with no cache, masked as `transformers` masks it and through the same kernels, so that a bf16 model agrees
with `transformers` bit for bit.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .op import Attributes


def rotate(x_BSND: Tensor, positions_BS: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotates interleaved pairs in float32 and casts back (RoPE, Su et al. 2021), as a product of complex numbers."""
    angle = positions_BS[..., None].float() * inv_freq
    turn = torch.polar(torch.ones_like(angle), angle)[:, :, None]
    pairs = torch.view_as_complex(x_BSND.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x_BSND)


def normalise(x: Tensor, eps: float) -> Tensor:
    """Weightless RMS norm in float32, cast back."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x)


def tune_temperature(query_BSQD: Tensor, positions_BS: Tensor, attributes: Attributes) -> Tensor:
    """Scales queries by their position's temperature in float32, cast back."""
    steps_BS = torch.floor((positions_BS.float() + 1.0) / attributes.temperature_floor)
    factor_BS = torch.log1p(steps_BS) * attributes.temperature_scale + 1.0
    return (query_BSQD * factor_BS[..., None, None]).type_as(query_BSQD)


def prepare(
    query: Tensor, key: Tensor, value: Tensor, positions_BS: Tensor, inv_freq: Tensor | None, attributes: Attributes
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits heads, rotates, normalises and scales: [B, S, N·D] each to [B, N, S, D] each."""
    query_BSQD = query.unflatten(-1, (attributes.heads, -1))
    key_BSKD = key.unflatten(-1, (attributes.kv_heads, -1))
    value_BSKD = value.unflatten(-1, (attributes.kv_heads, -1))
    if inv_freq is not None:
        query_BSQD, key_BSKD = rotate(query_BSQD, positions_BS, inv_freq), rotate(key_BSKD, positions_BS, inv_freq)
    if attributes.qk_norm_eps:
        query_BSQD = normalise(query_BSQD, attributes.qk_norm_eps)
        key_BSKD = normalise(key_BSKD, attributes.qk_norm_eps)
    if attributes.temperature_scale:
        query_BSQD = tune_temperature(query_BSQD, positions_BS, attributes)
    return query_BSQD.transpose(1, 2), key_BSKD.transpose(1, 2), value_BSKD.transpose(1, 2)


def attend_whole(query: Tensor, key: Tensor, value: Tensor, inv_freq: Tensor | None, attributes: Attributes) -> Tensor:
    """Attends whole sequences from position 0, with no cache. Returns [B, S, Q·D].

    Where a mask is needed, keys and values are repeated to the query heads, since PyTorch's CPU kernels take either a
    mask or grouped heads in their fast form.
    """
    length = query.shape[1]
    positions_BS = torch.arange(length, device=query.device)[None]
    query, key, value = prepare(query, key, value, positions_BS, inv_freq, attributes)
    group = attributes.heads // attributes.kv_heads
    if attributes.chunk and length >= attributes.chunk:
        chunk_S = positions_BS[0] // attributes.chunk
        mask_SS = (chunk_S[:, None] == chunk_S) & (positions_BS[0][:, None] >= positions_BS[0])
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask_SS, scale=attributes.scale)
    else:
        output = scaled_dot_product_attention(
            query, key, value, is_causal=length > 1, scale=attributes.scale, enable_gqa=group > 1
        )
    return output.transpose(1, 2).flatten(2)


@torch.library.custom_op("arriero::grouped_query_attention", mutates_args=())
def grouped_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    past_lengths: Tensor,
    inv_freq: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    chunk: int,
    qk_norm_eps: float,
    temperature_scale: float,
    temperature_floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attends one piece over its caches; see `op` for shapes and promises. The returned caches are new tensors."""
    attributes = Attributes(
        heads=heads,
        kv_heads=kv_heads,
        scale=scale,
        chunk=chunk,
        qk_norm_eps=qk_norm_eps,
        temperature_scale=temperature_scale,
        temperature_floor=temperature_floor,
    )
    steps_S = torch.arange(query.shape[1], device=query.device)
    positions_BS = past_lengths[:, None] + steps_S
    slots_BS = (past_lengths % chunk if chunk else past_lengths)[:, None] + steps_S
    query, key, value = prepare(query, key, value, positions_BS, inv_freq, attributes)
    present_key, present_value = key_cache.clone(), value_cache.clone()
    rows_B1 = torch.arange(query.shape[0], device=query.device)[:, None]
    present_key[rows_B1, :, slots_BS] = key.transpose(1, 2)
    present_value[rows_B1, :, slots_BS] = value.transpose(1, 2)

    used = int(slots_BS.max()) + 1
    mask_BSC = torch.arange(used, device=query.device) <= slots_BS[..., None]
    group = heads // kv_heads
    output = scaled_dot_product_attention(
        query,
        present_key[:, :, :used].repeat_interleave(group, 1),
        present_value[:, :, :used].repeat_interleave(group, 1),
        attn_mask=mask_BSC[:, None],
        scale=scale,
    )
    return output.transpose(1, 2).flatten(2), present_key, present_value


@grouped_query_attention.register_fake
def _(query, key, value, key_cache, value_cache, past_lengths, inv_freq, heads, *attributes):  # type: ignore[no-untyped-def]
    return torch.empty_like(query), torch.empty_like(key_cache), torch.empty_like(value_cache)
