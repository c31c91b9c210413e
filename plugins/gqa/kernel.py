"""Triton kernels of grouped-query attention: `prepare`, then `attend`, then `combine` where `attend` was split.

A single token a row is `decode_kernel`'s, in one launch.

Enter: the op's tensors, caches among them as they lie. Leave: the caches, written in place, and the op's output;
between kernels, prepared queries and partial outputs in scratch memory that the plan asks for. Invariant: grids hang on
shapes alone; what hangs on a row's length is decided inside, so that a CUDA graph can capture the launches.

Names in capitals are compile-time constants. The query heads of one kv head (GROUP of them) are stacked: row m of a kv
head's queries is head m mod GROUP at step m div GROUP, so that all of them share the keys and values that are loaded.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from .attention_block import attend_block, behind_queries, first_slot, load_rows, quantise, turn, turn_and_norm
from .decode_kernel import decode as decode


@triton.jit
def prepare(
    query,
    key,
    value,
    key_cache,
    value_cache,
    past_lengths,
    inv_freq,
    key_scale,
    value_scale,
    queries,
    length,
    capacity,
    chunk,
    eps,
    temperature_scale,
    temperature_floor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    LARGEST: tl.constexpr,
    FOLD: tl.constexpr,
    FUSED: tl.constexpr,
    STEPS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Writes the piece's keys and values to the cache, and its prepared queries [B, K, S·GROUP, D] to `queries`.

    One program serves STEPS steps of one kv head. Where `inv_freq` is None nothing is rotated; where LARGEST is not 0
    the caches are quantised, with that absolute maximum, and queries carry the key's scale times FOLD.

    Queries and keys are rounded to their type after each step, as the op's body rounds them. Over quantised caches they
    stay in float32 until they are stored.
    """
    row = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1)
    step = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    past = tl.load(past_lengths + row)
    position = past + step
    token = row * length + step
    HEADS: tl.constexpr = KV_HEADS * (GROUP + 2) if FUSED else KV_HEADS * GROUP
    KEYS: tl.constexpr = HEADS if FUSED else KV_HEADS
    keys, values = behind_queries(key, value, FUSED, KV_HEADS, GROUP, HEAD_DIM)

    dim = tl.arange(0, PAIRS)[:, None] * 2 + tl.arange(0, 2)[None, :]
    inside = (step < length)[:, None, None] & (dim < HEAD_DIM)[None]

    if inv_freq is not None:
        pair = tl.arange(0, PAIRS)
        sine, cosine = turn(position, tl.load(inv_freq + pair, mask=pair * 2 < HEAD_DIM, other=0.0))
    else:
        sine, cosine = None, None
    if LARGEST:
        scale = kv_head * HEAD_DIM + dim
        key_step = tl.load(key_scale + scale, mask=dim < HEAD_DIM, other=1.0)[None]
        value_step = tl.load(value_scale + scale, mask=dim < HEAD_DIM, other=1.0)[None]

    dtype = query.dtype.element_ty
    rounded: tl.constexpr = tl.float32 if LARGEST else dtype
    for member in tl.static_range(GROUP):
        head = kv_head * GROUP + member
        places = (token * HEADS + head)[:, None, None] * HEAD_DIM + dim[None]
        x = turn_and_norm(tl.load(query + places, mask=inside, other=0.0), sine, cosine, eps, rounded, HEAD_DIM, NORM)
        if TEMPERATURE:
            ahead = tl.floor(tl.div_rn((position + 1).to(tl.float32), temperature_floor))
            factor = tl.log(ahead + 1.0) * temperature_scale + 1.0
            x = (x * factor[:, None, None]).to(rounded).to(tl.float32)
        if LARGEST:
            x = x * (key_step * FOLD)
        stacked = (row * KV_HEADS + kv_head) * length * GROUP + step * GROUP + member
        tl.store(queries + stacked[:, None, None] * HEAD_DIM + dim[None], x.to(dtype), mask=inside)

    slot = first_slot(past, chunk) + step
    slots = ((row * KV_HEADS + kv_head) * capacity + slot)[:, None, None] * HEAD_DIM + dim[None]
    places = (token * KEYS + kv_head)[:, None, None] * HEAD_DIM + dim[None]
    new_key = turn_and_norm(tl.load(keys + places, mask=inside, other=0.0), sine, cosine, eps, rounded, HEAD_DIM, NORM)
    new_value = tl.load(values + places, mask=inside, other=0.0).to(tl.float32)
    if LARGEST:
        new_key = quantise(new_key, key_step, LARGEST)
        new_value = quantise(new_value, value_step, LARGEST)
    tl.store(key_cache + slots, new_key.to(key_cache.dtype.element_ty), mask=inside)
    tl.store(value_cache + slots, new_value.to(value_cache.dtype.element_ty), mask=inside)


@triton.jit
def attend(
    queries,
    key_cache,
    value_cache,
    past_lengths,
    value_scale,
    output,
    partial,
    partial_log,
    length,
    capacity,
    chunk,
    scale,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attends BLOCK_M stacked queries of one kv head over the slots they see, with a running softmax in float32.

    Where `partial` is None a program sees all slots and writes its part of the output (Dao 2023, arXiv:2307.08691).
    Where it is not, a program sees one of `splits` equal shares of them and leaves what it found to `combine`: its
    normalised outputs [B, K, splits, S·GROUP, D] in `partial`, base-2 logarithms of their weights in `partial_log`.

    `scale` is the op's, times log2(e), over `prepare`'s FOLD.
    """
    row = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1)
    head = row * KV_HEADS + kv_head
    # Unsplit tiles run longest first, so that the short ones fill the gaps at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if partial is None else tl.program_id(0) // splits
    rows = length * GROUP
    first = tile * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    stacked = head * rows * HEAD_DIM
    x_MD = load_rows(queries + stacked, first, rows, HEAD_DIM, BLOCK_M, BLOCK_D, MASKED=True)

    slot = first_slot(tl.load(past_lengths + row), chunk)
    last_M = slot + tl.minimum(m // GROUP, length - 1)
    end = slot + tl.minimum((first + BLOCK_M - 1) // GROUP, length - 1) + 1
    start = 0
    if partial is not None:
        share = tl.cdiv(tl.cdiv(end, splits), BLOCK_N) * BLOCK_N
        start = tl.program_id(0) % splits * share
        end = tl.minimum(end, start + share)

    keys = key_cache + head * capacity * HEAD_DIM
    values = value_cache + head * capacity * HEAD_DIM
    sum_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    peak_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if partial is None:  # slots that every query of the tile sees need no mask
        seen_by_all = (slot + first // GROUP + 1) // BLOCK_N * BLOCK_N
        for n in tl.range(0, seen_by_all, BLOCK_N):
            sum_MD, total_M, peak_M = attend_block(
                x_MD, keys, values, n, end, last_M, sum_MD, total_M, peak_M, scale,
                HEAD_DIM, BLOCK_N, BLOCK_D, MASKED=False,
            )  # fmt: skip
        start = seen_by_all
    for n in tl.range(start, end, BLOCK_N):
        sum_MD, total_M, peak_M = attend_block(
            x_MD, keys, values, n, end, last_M, sum_MD, total_M, peak_M, scale,
            HEAD_DIM, BLOCK_N, BLOCK_D, MASKED=True,
        )  # fmt: skip

    total_M = tl.where(total_M > 0, total_M, 1.0)  # nothing seen: a sum of 0 and a peak of -inf
    result_MD = sum_MD / total_M[:, None]
    if value_scale is not None:
        result_MD *= tl.load(value_scale + kv_head * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)[None, :]
    inside = (m < rows)[:, None] & (dim < HEAD_DIM)[None, :]
    if partial is None:
        head_M = kv_head * GROUP + m % GROUP
        places_M = (row * length + m // GROUP) * (KV_HEADS * GROUP) + head_M
        tl.store(
            output + places_M[:, None] * HEAD_DIM + dim[None, :], result_MD.to(output.dtype.element_ty), mask=inside
        )
    else:
        places_M = (head * splits + tl.program_id(0) % splits) * rows + m
        tl.store(partial + places_M[:, None] * HEAD_DIM + dim[None, :], result_MD, mask=inside)
        tl.store(partial_log + places_M, peak_M + tl.log2(total_M), mask=m < rows)


@triton.jit
def combine(
    partial,
    partial_log,
    output,
    length,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Joins the splits of one stacked query: their outputs, weighed by what each saw of the softmax's sum."""
    row = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1)
    m = tl.program_id(0)
    rows = length * GROUP
    dim = tl.arange(0, BLOCK_D)
    first = (row * KV_HEADS + kv_head) * splits * rows + m

    every = tl.arange(0, MOST_SPLITS)
    logs = tl.load(partial_log + first + every * rows, mask=every < splits, other=float("-inf"))
    peak = tl.max(logs, axis=0)
    total = tl.sum(tl.exp2(logs - peak), axis=0)
    joined = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        places = first + split * rows
        weight = tl.exp2(tl.load(partial_log + places, mask=split < splits, other=float("-inf")) - peak)
        inside = (split < splits)[:, None] & (dim < HEAD_DIM)[None, :]
        part = tl.load(partial + places[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
        joined += tl.sum(part * weight[:, None], axis=0)

    place = (row * length + m // GROUP) * (KV_HEADS * GROUP) + kv_head * GROUP + m % GROUP
    tl.store(output + place * HEAD_DIM + dim, (joined / total).to(output.dtype.element_ty), mask=dim < HEAD_DIM)
