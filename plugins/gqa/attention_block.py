"""Parts of the Triton kernels of grouped-query attention: rotation, norm, rounding, a block of slots.

Invariant: queries and keys are rounded as the op's body rounds them, whichever kernel prepares them. Names are as in
`kernel`.
"""

import triton
import triton.language as tl

# Triton reads these as compile-time constants.
HALF_PI = tl.constexpr(1.5707963267948966)
TWO_OVER_PI = tl.constexpr(0.6366197723675814)
ROUNDER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def behind_queries(
    key, value, FUSED: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Where keys and values begin: given a projection of all three, behind a token's queries."""
    if FUSED:
        return key + KV_HEADS * GROUP * HEAD_DIM, value + KV_HEADS * (GROUP + 1) * HEAD_DIM
    else:
        return key, value


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
