"""One tile of a product of tokens and an expert's weights, in Triton: what the kernels of `kernel` are made of.

Enter: operands as device pointers, and which rows and columns. Leaves: a tile [M, N] in float32. Invariant: sums over
K are in float32 (int32 where both operands are int8), and each weight is read as it is stored: [K, N], quantised ones
[N, K]. A byte of `int4` holds two inputs of one column, so the left operand's rows lie apart in scratch memory: the
inputs that come first in their bytes in one half, those that come second in the other. Names are as in `kernel`.
"""

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)
"""1.5 · 2^23: added to a float32 of less than 2^22 and taken away again, it leaves the nearest even integer."""


@triton.jit
def tile_and_column(tiles, columns):
    """Which tile of rows and which of columns a program has; eight tiles of rows take each weight from the L2 cache."""
    program = tl.program_id(0)
    first = program // (8 * columns) * 8
    height = tl.minimum(tiles - first, 8)
    within = program % (8 * columns)
    return first + within % height, within // height


@triton.jit
def arranged_rows(order, tile_expert, tile, pairs, BLOCK_M: tl.constexpr):
    """A tile's expert and pairs; rows of no pair repeat pair 0, and are not inside."""
    expert = tl.load(tile_expert + tile)
    rows_M = tl.load(order + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    inside_M = rows_M < pairs
    return expert, tl.where(inside_M, rows_M, 0), inside_M


@triton.jit
def weights_before(expert, KIND: tl.constexpr, DEPTH: tl.constexpr, N: tl.constexpr):
    """Stored elements that lie before an expert's weight; `int4` has two weights a byte."""
    size: tl.constexpr = DEPTH * N // 2 if KIND == "int4" else DEPTH * N
    return expert.to(tl.int64) * size


@triton.jit
def scales_before(expert, GROUP: tl.constexpr, DEPTH: tl.constexpr, N: tl.constexpr):
    """Scales that lie before an expert's [N, K / group], or [K / group, N] in 16 bits."""
    return expert.to(tl.int64) * ((DEPTH // GROUP if GROUP else 1) * N)


@triton.jit
def zero(KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """An empty sum of products."""
    return tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if KIND == "int8" else tl.float32)


@triton.jit
def place_in_row(columns_N, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """Where the values of a row lie that is a product's left operand."""
    if KIND == "int4":
        return columns_N % 2 * (WIDTH // 2) + columns_N // 2
    else:
        return columns_N


@triton.jit
def depths_of(start, KIND: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which stored elements of a weight's row one step of K takes; a dot takes 16 at least, what is beyond masked."""
    if KIND != "int4":
        return start + tl.arange(0, BLOCK_K)
    else:
        SIZE: tl.constexpr = 16 if BLOCK_K < 32 else BLOCK_K // 2
        return start // 2 + tl.arange(0, SIZE)


@triton.jit
def load_x(x, rows_M, start, KIND: tl.constexpr, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile [M, K] of the left operand; for `int4` two: of inputs that come first in their bytes, and second."""
    if KIND == "int4":
        first_MK = load_half(x, rows_M, start, 0, KIND, DEPTH, BLOCK_K)
        return first_MK, load_half(x, rows_M, start, 1, KIND, DEPTH, BLOCK_K)
    else:
        return load_half(x, rows_M, start, 0, KIND, DEPTH, BLOCK_K)


@triton.jit
def load_half(x, rows_M, start, SECOND: tl.constexpr, KIND: tl.constexpr, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """One such tile."""
    PACK: tl.constexpr = 2 if KIND == "int4" else 1
    depths_K = depths_of(start, KIND, BLOCK_K)
    places_MK = rows_M.to(tl.int64)[:, None] * DEPTH + (depths_K + SECOND * (DEPTH // 2))[None, :]
    if (DEPTH % BLOCK_K == 0) and ((PACK == 1) or (BLOCK_K >= 32)):
        return tl.load(x + places_MK)
    return tl.load(x + places_MK, mask=depths_K[None, :] < tl.minimum(start + BLOCK_K, DEPTH) // PACK, other=0.0)


@triton.jit
def add_product(
    total_MN,
    x_MK,
    weight,
    weight_scale,
    start,
    column,
    shift: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds x · weight over one step of K, the columns being WIDTH of STRIDE from `shift` on.

    The integers of `int4` are exact in the model's type; a group's scale, in either, multiplies its float32 product.
    """
    PACK: tl.constexpr = 2 if KIND == "int4" else 1
    depths_K = depths_of(start, KIND, BLOCK_K)
    columns_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
    if KIND == "none":
        places_KN = depths_K[:, None] * STRIDE + (shift + columns_N)[None, :]
    else:
        places_KN = (shift + columns_N)[None, :] * (DEPTH // PACK) + depths_K[:, None]
    if (DEPTH % BLOCK_K == 0) and (WIDTH % BLOCK_N == 0) and ((PACK == 1) or (BLOCK_K >= 32)):
        weight_KN = tl.load(weight + places_KN)
    else:
        end = tl.minimum(start + BLOCK_K, DEPTH) // PACK
        weight_KN = tl.load(
            weight + places_KN, mask=(depths_K < end)[:, None] & (columns_N < WIDTH)[None, :], other=0.0
        )
    if KIND == "int8":
        return tl.dot(x_MK, weight_KN, total_MN, out_dtype=tl.int32)
    elif KIND == "fp8":
        return tl.dot(x_MK, weight_KN, total_MN, max_num_imprecise_acc=BLOCK_K)
    elif KIND == "int4":
        first_MK, second_MK = x_MK
        if GROUP == 0:
            total_MN = tl.dot(first_MK, integers(weight_KN, first_MK.dtype), total_MN)
            return tl.dot(second_MK, integers(weight_KN >> 4, first_MK.dtype), total_MN)
        else:
            product_MN = tl.dot(first_MK, integers(weight_KN, first_MK.dtype))
            product_MN = tl.dot(second_MK, integers(weight_KN >> 4, first_MK.dtype), product_MN)
            if weight_scale.dtype.element_ty == tl.float32:
                places_N = (shift + columns_N) * (DEPTH // GROUP) + start // GROUP
            else:
                places_N = start // GROUP * STRIDE + shift + columns_N
            scale_N = tl.load(weight_scale + places_N, mask=columns_N < WIDTH, other=0.0)
            return total_MN + product_MN * scale_N.to(tl.float32)[None, :]
    else:
        return tl.dot(x_MK, weight_KN, total_MN)


@triton.jit
def integers(bytes_KN, dtype: tl.constexpr):
    """The signed integers of four bits in the low halves of bytes, as bf16 or fp16.

    An integer with its sign flipped is itself plus 8. As the last bits of a float whose last bit is worth 1 it adds
    that much to the float, and needs no conversion.
    """
    if dtype == tl.float16:
        BITS: tl.constexpr = 0x6408  # 1024, and the sign
        OFFSET: tl.constexpr = 1032.0
    else:
        BITS: tl.constexpr = 0x4308  # 128, and the sign
        OFFSET: tl.constexpr = 136.0
    return ((bytes_KN.to(tl.int16) & 15) ^ BITS).to(dtype, bitcast=True) - tl.full([1, 1], OFFSET, dtype)


@triton.jit
def scaled(
    total_MN,
    x_scale,
    weight_scale,
    expert,
    rows_M,
    columns_N,
    inside_N,
    KIND: tl.constexpr,
    STATIC: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A product in float32 under the scales that hold over all of its depth."""
    total_MN = total_MN.to(tl.float32)
    if (KIND != "none") and (GROUP == 0):
        total_MN *= tl.load(weight_scale + columns_N, mask=inside_N, other=0.0)[None, :]
    if (KIND == "int8") or (KIND == "fp8"):
        if STATIC:
            total_MN *= tl.load(x_scale + expert)
        else:
            total_MN *= tl.load(x_scale + rows_M)[:, None]
    return total_MN


@triton.jit
def store_tile(x_MN, output, rows_M, inside_M, places_N, inside_N, WIDTH: tl.constexpr):
    """Stores those rows and columns of a tile that are inside."""
    places_MN = rows_M.to(tl.int64)[:, None] * WIDTH + places_N[None, :]
    tl.store(output + places_MN, x_MN.to(output.dtype.element_ty), mask=inside_M[:, None] & inside_N[None, :])


@triton.jit
def step_scale(largest, KIND: tl.constexpr, BOUND: tl.constexpr):
    """The scale of what has such a largest magnitude; BOUND is the largest that it is chosen for, 0 is none."""
    LARGEST: tl.constexpr = 127.0 if KIND == "int8" else 448.0
    if BOUND > 0:
        largest = tl.minimum(largest, BOUND)
    return tl.where(largest == 0, 1.0, largest / LARGEST)


@triton.jit
def quantised(x, scale, KIND: tl.constexpr):
    """Values of x / scale within the stored type's range, still in float32: whole numbers in `int8`."""
    x = tl.div_rn(x, tl.zeros_like(x) + scale)
    if KIND == "int8":
        return tl.clamp(x, -128.0, 127.0) + ROUNDER - ROUNDER
    return tl.clamp(x, -448.0, 448.0)


@triton.jit
def silu(x):
    """The sigmoid-weighted linear unit."""
    return x / (1 + tl.exp(-x))


@triton.jit
def let_next_start():
    """Lets the next launch of the stream start before this one ends, where it was asked to."""
    tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, False, 1)


@triton.jit
def wait_for_earlier():
    """Waits until the launch before has ended, and what it wrote is seen."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], tl.int32, False, 1)
