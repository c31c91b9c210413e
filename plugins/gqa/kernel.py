"""Triton kernels of grouped-query attention: `prepare`, then `attend`, then `combine` where `attend` was split.

Enter: the op's tensors, caches among them as they lie. Leave: the caches, written in place, and the op's output;
between kernels, prepared queries and partial outputs in scratch memory that the plan asks for. Invariant: grids hang on
shapes alone; what hangs on a row's length is decided inside, so that a CUDA graph can capture the launches.

Names in capitals are compile-time constants. The query heads of one kv head (GROUP of them) are stacked: row m of a kv
head's queries is head m mod GROUP at step m div GROUP, so that all of them share the keys and values that are loaded.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

# Triton reads these as compile-time constants.
HALF_PI = tl.constexpr(1.5707963267948966)
TWO_OVER_PI = tl.constexpr(0.6366197723675814)
ROUNDER = tl.constexpr(1.5 * 2.0**23)


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
        places = (token * (KV_HEADS * GROUP) + head)[:, None, None] * HEAD_DIM + dim[None]
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
    places = (token * KV_HEADS + kv_head)[:, None, None] * HEAD_DIM + dim[None]
    new_key = turn_and_norm(tl.load(key + places, mask=inside, other=0.0), sine, cosine, eps, rounded, HEAD_DIM, NORM)
    new_value = tl.load(value + places, mask=inside, other=0.0).to(tl.float32)
    if LARGEST:
        new_key = quantise(new_key, key_step, LARGEST)
        new_value = quantise(new_value, value_step, LARGEST)
    tl.store(key_cache + slots, new_key.to(key_cache.dtype.element_ty), mask=inside)
    tl.store(value_cache + slots, new_value.to(value_cache.dtype.element_ty), mask=inside)


@triton.jit
def first_slot(past, chunk):
    """The slot of a row's first new token."""
    return tl.where(chunk > 0, past % tl.maximum(chunk, 1), past)


@triton.jit
def turn(position, inv_freq):
    """Sine and cosine [S, D/2] of `position * inv_freq`, to float32's last bits at any position.

    The product is taken and reduced to a quarter turn in float64: in float32 an angle of 10^6 would be off by 0.06.
    Taylor's polynomials over ±π/4 are then off by less than 3e-8.
    """
    quarters = position.to(tl.float64)[:, None] * (inv_freq.to(tl.float64) * TWO_OVER_PI)[None, :]
    whole = tl.floor(quarters + 0.5)
    x = ((quarters - whole) * HALF_PI).to(tl.float32)
    quadrant = whole.to(tl.int32)
    z = x * x
    sine = x + x * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    cosine = 1.0 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320))))
    odd = (quadrant & 1) != 0
    sine, cosine = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return tl.where((quadrant & 2) != 0, -sine, sine), tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def turn_and_norm(x, sine, cosine, eps, dtype: tl.constexpr, HEAD_DIM: tl.constexpr, NORM: tl.constexpr):
    """Rotates pairs [S, D/2, 2], then divides by their root mean square, rounding to `dtype` after each."""
    even, odd = tl.split(x.to(tl.float32))
    if sine is not None:
        even, odd = even * cosine - odd * sine, even * sine + odd * cosine
        even, odd = even.to(dtype).to(tl.float32), odd.to(dtype).to(tl.float32)
    if NORM:
        mean = tl.sum(even * even + odd * odd, axis=1) / HEAD_DIM
        factor = tl.rsqrt(mean + eps)[:, None]
        even, odd = (even * factor).to(dtype).to(tl.float32), (odd * factor).to(dtype).to(tl.float32)
    return tl.join(even, odd)


@triton.jit
def quantise(x, scale, LARGEST: tl.constexpr):
    """The numbers that a cache holds for `x / scale`: to nearest even, saturating, still in float32.

    LARGEST says the type: 127 is int8, 448 E4M3, whose steps are 2^(e-3) from 2^e on and 2^-9 below 2^-6. Adding and
    subtracting 1.5 · 2^23 steps leaves whole steps, so the cast that follows has nothing to round.
    """
    if LARGEST == 127:
        bounded = tl.minimum(tl.maximum(tl.div_rn(x, scale), -128.0), 127.0)
        return (bounded + ROUNDER) - ROUNDER
    bounded = tl.minimum(tl.maximum(tl.div_rn(x, scale), -LARGEST), LARGEST)
    exponent = tl.maximum((bounded.to(tl.int32, bitcast=True) >> 23) & 255, 127 - 6)
    rounder = ((exponent - 3) << 23).to(tl.float32, bitcast=True) * ROUNDER
    return (bounded + rounder) - rounder


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
def attend_block(
    x_MD, keys, values, n, end, last_M, sum_MD, total_M, peak_M, scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes BLOCK_N slots from `n` on into the running sums. Query m sees the slots up to `last_M`."""
    key_ND = load_rows(keys, n, end, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED).to(x_MD.dtype)
    score_MN = tl.dot(x_MD, tl.trans(key_ND)) * scale
    if MASKED:
        score_MN = tl.where((n + tl.arange(0, BLOCK_N))[None, :] <= last_M[:, None], score_MN, float("-inf"))
    new_peak_M = tl.maximum(peak_M, tl.max(score_MN, axis=1))
    # A query that sees nothing of a split's share has no peak yet.
    reference_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M) if MASKED else new_peak_M
    weight_MN = tl.exp2(score_MN - reference_M[:, None])
    fade_M = tl.exp2(peak_M - reference_M)
    total_M = total_M * fade_M + tl.sum(weight_MN, axis=1)
    value_ND = load_rows(values, n, end, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED).to(x_MD.dtype)
    sum_MD = tl.dot(weight_MN.to(x_MD.dtype), value_ND, sum_MD * fade_M[:, None])
    return sum_MD, total_M, new_peak_M


@triton.jit
def load_rows(
    matrix, first, end, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """Rows of a matrix [_, HEAD_DIM] from `first` on: zeros from column HEAD_DIM on and, if masked, from row `end` on.

    The matrix may have more than 2^31 elements, the tile has not, so its offsets are narrow and the same in each round.
    """
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    places = matrix + tl.cast(first, tl.int64) * HEAD_DIM + (row[:, None] * HEAD_DIM + dim[None, :])
    if HEAD_DIM != BLOCK_D:
        return tl.load(places, mask=(row < end - first)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    if MASKED:
        return tl.load(places, mask=(row < end - first)[:, None], other=0.0)
    return tl.load(places)


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
