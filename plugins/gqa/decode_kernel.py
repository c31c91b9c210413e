"""The Triton kernel of grouped-query attention over one new token a row: prepared, attended and joined in one launch.

Enter: the op's tensors, caches among them as they lie. Leave: the caches with the token written, and the op's output.
Invariants: the token's key and value are written by the program that attends their slot; the program that finishes last
of a kv head's joins the others, in their order. Names are as in `kernel`; row m is query head m of the kv head's.
"""

import triton
import triton.language as tl

from ..last_program import is_last
from .attention_block import attend_block, behind_queries, first_slot, quantise, turn, turn_and_norm


@triton.jit
def decode(
    query,
    key,
    value,
    key_cache,
    value_cache,
    past_lengths,
    inv_freq,
    key_scale,
    value_scale,
    output,
    partial,
    partial_log,
    counters,
    capacity,
    chunk,
    eps,
    temperature_scale,
    temperature_floor,
    scale,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    LARGEST: tl.constexpr,
    FOLD: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """Attends a kv head's queries over one of `splits` equal shares of the slots they see.

    What a program found is left in `partial` [B, K, splits, GROUP, D], normalised, and its weight's base-2 logarithm in
    `partial_log`. `scale` is the op's, times log2(e), over FOLD; see `kernel.prepare` for quantised caches.
    """
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    head = row * KV_HEADS + kv_head
    past = tl.load(past_lengths + row)
    slot = first_slot(past, chunk)
    share = tl.cdiv(tl.cdiv(slot + 1, splits), BLOCK_N) * BLOCK_N
    start = split * share
    end = tl.minimum(slot + 1, start + share)

    dtype: tl.constexpr = query.dtype.element_ty
    rounded: tl.constexpr = tl.float32 if LARGEST else dtype
    PAIRS: tl.constexpr = BLOCK_D // 2
    dim = tl.arange(0, PAIRS)[:, None] * 2 + tl.arange(0, 2)[None, :]
    member = tl.arange(0, BLOCK_M)
    inside = (member < GROUP)[:, None, None] & (dim < HEAD_DIM)[None]
    if inv_freq is not None:
        pair = tl.arange(0, PAIRS)
        position = past + tl.arange(0, 1)
        sine, cosine = turn(position, tl.load(inv_freq + pair, mask=pair * 2 < HEAD_DIM, other=0.0))
    else:
        sine, cosine = None, None
    if LARGEST:
        places = kv_head * HEAD_DIM + dim
        key_step = tl.load(key_scale + places, mask=dim < HEAD_DIM, other=1.0)[None]
        value_step = tl.load(value_scale + places, mask=dim < HEAD_DIM, other=1.0)[None]

    HEADS: tl.constexpr = KV_HEADS * (GROUP + 2) if FUSED else KV_HEADS * GROUP
    KEYS: tl.constexpr = HEADS if FUSED else KV_HEADS
    new_keys, new_values = behind_queries(key, value, FUSED, KV_HEADS, GROUP, HEAD_DIM)
    places = ((row * HEADS + kv_head * GROUP + member) * HEAD_DIM)[:, None, None] + dim[None]
    x = turn_and_norm(tl.load(query + places, mask=inside, other=0.0), sine, cosine, eps, rounded, HEAD_DIM, NORM)
    if TEMPERATURE:
        ahead = tl.floor(tl.div_rn((past + 1).to(tl.float32), temperature_floor))
        x = (x * (tl.log(ahead + 1.0) * temperature_scale + 1.0)).to(rounded).to(tl.float32)
    if LARGEST:
        x = x * (key_step * FOLD)
    x_MD = tl.reshape(x.to(dtype), [BLOCK_M, BLOCK_D])

    cached = head * capacity * HEAD_DIM
    if (start <= slot) & (slot < end):
        new = ((row * KEYS + kv_head) * HEAD_DIM + dim)[None]
        stored = (cached + slot.to(tl.int64) * HEAD_DIM + dim)[None]
        whole = (dim < HEAD_DIM)[None]
        new_key = turn_and_norm(
            tl.load(new_keys + new, mask=whole, other=0.0), sine, cosine, eps, rounded, HEAD_DIM, NORM
        )
        new_value = tl.load(new_values + new, mask=whole, other=0.0).to(tl.float32)
        if LARGEST:
            new_key = quantise(new_key, key_step, LARGEST)
            new_value = quantise(new_value, value_step, LARGEST)
        tl.store(key_cache + stored, new_key.to(key_cache.dtype.element_ty), mask=whole)
        tl.store(value_cache + stored, new_value.to(value_cache.dtype.element_ty), mask=whole)
    tl.debug_barrier()  # its other threads read what some have written

    sum_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    peak_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    last_M = tl.zeros([BLOCK_M], tl.int32) + slot
    keys = key_cache + cached
    values = value_cache + cached
    for n in tl.range(start, end, BLOCK_N):
        sum_MD, total_M, peak_M = attend_block(
            x_MD, keys, values, n, end, last_M, sum_MD, total_M, peak_M, scale,
            HEAD_DIM, BLOCK_N, BLOCK_D, MASKED=True,
        )  # fmt: skip
    total_M = tl.where(total_M > 0, total_M, 1.0)  # nothing seen: a sum of 0 and a peak of -inf
    dim_D = tl.arange(0, BLOCK_D)
    result_MD = sum_MD / total_M[:, None]
    if value_scale is not None:
        result_MD *= tl.load(value_scale + kv_head * HEAD_DIM + dim_D, mask=dim_D < HEAD_DIM, other=0.0)[None, :]
    inside_MD = (member < GROUP)[:, None] & (dim_D < HEAD_DIM)[None, :]
    if splits == 1:
        places_MD = ((head * GROUP + member) * HEAD_DIM)[:, None] + dim_D[None, :]
        tl.store(output + places_MD, result_MD.to(output.dtype.element_ty), mask=inside_MD)
        return
    first = head * splits * GROUP
    places_M = first + split * GROUP + member
    tl.store(partial + places_M[:, None] * HEAD_DIM + dim_D[None, :], result_MD, mask=inside_MD)
    tl.store(partial_log + places_M, peak_M + tl.log2(total_M), mask=member < GROUP)
    if not is_last(counters + head, splits):
        return
    join(
        partial + first * HEAD_DIM, partial_log + first, output + head * GROUP * HEAD_DIM, splits,
        GROUP, HEAD_DIM, BLOCK_D, BLOCK_GROUP, BLOCK_SPLITS, MOST_SPLITS,
    )  # fmt: skip


@triton.jit
def join(
    partial,
    partial_log,
    output,
    splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """Joins the splits of a kv head: their outputs, weighed by what each saw of the softmax's sum."""
    member = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_D)
    every = tl.arange(0, MOST_SPLITS)
    inside_GE = (member < GROUP)[:, None] & (every < splits)[None, :]
    places_GE = every[None, :] * GROUP + member[:, None]
    every_GE = tl.load(partial_log + places_GE, mask=inside_GE, other=float("-inf"), cache_modifier=".cg")
    peak_G = tl.max(every_GE, axis=1)
    peak_G = tl.where(member < GROUP, peak_G, 0.0)
    total_G = tl.sum(tl.exp2(every_GE - peak_G[:, None]), axis=1)
    joined_GD = tl.zeros([BLOCK_GROUP, BLOCK_D], tl.float32)
    for start in tl.range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        inside_GS = (member < GROUP)[:, None] & (split < splits)[None, :]
        places_GS = split[None, :] * GROUP + member[:, None]
        logs_GS = tl.load(partial_log + places_GS, mask=inside_GS, other=float("-inf"), cache_modifier=".cg")
        weight_GS = tl.exp2(logs_GS - peak_G[:, None])
        inside_GSD = inside_GS[:, :, None] & (dim < HEAD_DIM)[None, None, :]
        places_GSD = places_GS[:, :, None] * HEAD_DIM + dim[None, None, :]
        part_GSD = tl.load(partial + places_GSD, mask=inside_GSD, other=0.0, cache_modifier=".cg")
        joined_GD += tl.sum(part_GSD * weight_GS[:, :, None], axis=1)
    total_G = tl.where(member < GROUP, total_G, 1.0)
    places_GD = member[:, None] * HEAD_DIM + dim[None, :]
    inside_GD = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(output + places_GD, (joined_GD / total_G[:, None]).to(output.dtype.element_ty), mask=inside_GD)
