"""Mixture-of-experts dispatch on a GPU: the Triton functions that `plan` puts in order.

A pair is one token at one of its experts, number token · top_k + choice. Enter: the op's inputs as device pointers.
Leaves: the op's output. Invariant: the number of programs follows from the number of tokens alone, and every sum has
one fixed order, so that a call can be captured and gives the same bits again.

Legend beside the house's: P pairs, M rows of a tile, K and N the depth and width of a product. Sizes are compile-time
constants; expert numbers count from the first expert whose weights are here, and LOCAL, one past the last, is nobody.
"""

import triton
import triton.language as tl

from .few_kernel import down_few as down_few
from .few_kernel import gate_and_up_few as gate_and_up_few
from .tile import (
    add_product,
    arranged_rows,
    let_next_start,
    load_x,
    place_in_row,
    quantised,
    scaled,
    scales_before,
    silu,
    step_scale,
    store_tile,
    tile_and_column,
    weights_before,
    zero,
)


@triton.jit
def route(
    hidden,
    router_logits,
    hidden_scale,
    chosen,
    expert_input,
    input_row_scale,
    first_expert,
    KIND: tl.constexpr,
    BOUND: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    LOCAL: tl.constexpr,
    TOP_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One token: its experts, and what each of them takes in, [P, H], scaled by the score and quantised."""
    if DEPENDENT:
        let_next_start()
    token = tl.program_id(0)
    experts_E = tl.arange(0, BLOCK_E)
    logits_E = tl.load(router_logits + token * EXPERTS + experts_E, mask=experts_E < EXPERTS, other=float("-inf"))
    logits_E = logits_E.to(tl.float32)
    columns_H = tl.arange(0, BLOCK_H)
    inside_H = columns_H < HIDDEN
    hidden_H = tl.load(hidden + token.to(tl.int64) * HIDDEN + columns_H, mask=inside_H, other=0.0)
    for choice in tl.static_range(TOP_K):
        best = tl.max(logits_E, axis=0)
        expert = tl.min(tl.where(logits_E == best, experts_E, BLOCK_E), axis=0)  # of equal logits the lower expert
        logits_E = tl.where(experts_E == expert, float("-inf"), logits_E)
        here = (expert >= first_expert) & (expert < first_expert + LOCAL)
        expert = tl.where(here, expert - first_expert, LOCAL)
        pair = token * TOP_K + choice
        tl.store(chosen + pair, expert)
        if here:
            score = (1 / (1 + tl.exp(-best))).to(hidden.dtype.element_ty)
            x_H = (hidden_H.to(tl.float32) * score.to(tl.float32)).to(hidden.dtype.element_ty)
            row_scale, scale = input_row_scale, hidden_scale
            store_row(x_H, expert_input, row_scale, scale, pair, expert, columns_H, inside_H, KIND, BOUND, HIDDEN)


@triton.jit
def arrange(
    chosen,
    order,
    tile_expert,
    pairs,
    tiles,
    LOCAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One expert: its pairs in their order, as whole tiles of BLOCK_M rows behind the tiles of the experts before it.

    Leaves the pair of each row, `pairs` where a tile has none, and the expert of each tile, LOCAL behind the last.
    """
    expert = tl.program_id(0)
    experts_E = tl.arange(0, BLOCK_E)
    places_P = tl.arange(0, BLOCK_P)
    counts_E = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, pairs, BLOCK_P):
        inside_P = start + places_P < pairs
        chosen_P = tl.load(chosen + start + places_P, mask=inside_P, other=LOCAL)
        counts_E += tl.histogram(chosen_P, BLOCK_E, mask=inside_P)
    counts_E = tl.where(experts_E < LOCAL, counts_E, 0)
    tiles_E = (counts_E + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(experts_E < expert, tiles_E, 0), axis=0)
    behind = first + tl.sum(tl.where(experts_E == expert, tiles_E, 0), axis=0)

    place = first * BLOCK_M
    for start in range(0, pairs, BLOCK_P):
        pairs_P = start + places_P
        mine_P = tl.load(chosen + pairs_P, mask=pairs_P < pairs, other=LOCAL) == expert
        rank_P = tl.cumsum(mine_P.to(tl.int32), axis=0)
        tl.store(order + place + rank_P - 1, pairs_P, mask=mine_P)
        place += tl.sum(mine_P.to(tl.int32), axis=0)
    rows_M = tl.arange(0, BLOCK_M)
    tl.store(order + place + rows_M, pairs + tl.zeros([BLOCK_M], tl.int32), mask=place + rows_M < behind * BLOCK_M)

    for start in range(first, behind, BLOCK_P):
        tl.store(tile_expert + start + places_P, expert, mask=start + places_P < behind)
    if expert == LOCAL - 1:
        for start in range(behind, tiles, BLOCK_P):
            tl.store(tile_expert + start + places_P, LOCAL, mask=start + places_P < tiles)


@triton.jit
def gate_and_up(
    x,
    x_scale,
    weight,
    weight_scale,
    activated_scale,
    order,
    tile_expert,
    output,
    pairs,
    tiles,
    KIND: tl.constexpr,
    STATIC: tl.constexpr,
    GROUP: tl.constexpr,
    LOCAL: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of up · silu(gate), [P, I]: WIDTH is I, and the up columns of the weight lie WIDTH behind the gate's.

    Quantised where the scale is static; a token's own scale needs its whole row first.
    """
    tile, column = tile_and_column(tiles, (WIDTH + BLOCK_N - 1) // BLOCK_N)
    expert, rows_M, inside_M = arranged_rows(order, tile_expert, tile, pairs, BLOCK_M)
    if expert == LOCAL:
        return
    STRIDE: tl.constexpr = 2 * WIDTH
    weight += weights_before(expert, KIND, DEPTH, STRIDE)
    if KIND != "none":
        weight_scale += scales_before(expert, GROUP, DEPTH, STRIDE)
    gate_MN = zero(KIND, BLOCK_M, BLOCK_N)
    up_MN = zero(KIND, BLOCK_M, BLOCK_N)
    for start in tl.range(0, DEPTH, BLOCK_K):
        x_MK = load_x(x, rows_M, start, KIND, DEPTH, BLOCK_K)
        gate_MN = add_product(
            gate_MN, x_MK, weight, weight_scale, start, column, 0, KIND, GROUP, DEPTH, WIDTH, STRIDE, BLOCK_N, BLOCK_K
        )
        up_MN = add_product(
            up_MN, x_MK, weight, weight_scale, start, column, WIDTH, KIND, GROUP, DEPTH, WIDTH, STRIDE, BLOCK_N, BLOCK_K
        )
    columns_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = columns_N < WIDTH
    gate_MN = scaled(gate_MN, x_scale, weight_scale, expert, rows_M, columns_N, inside_N, KIND, STATIC, GROUP)
    up_MN = scaled(up_MN, x_scale, weight_scale, expert, rows_M, WIDTH + columns_N, inside_N, KIND, STATIC, GROUP)
    activated_MN = up_MN * silu(gate_MN)
    if STATIC:
        activated_MN = quantised(activated_MN, tl.load(activated_scale + expert), KIND)
    store_tile(activated_MN, output, rows_M, inside_M, place_in_row(columns_N, KIND, WIDTH), inside_N, WIDTH)


@triton.jit
def product(
    x,
    x_scale,
    weight,
    weight_scale,
    order,
    tile_expert,
    output,
    pairs,
    tiles,
    KIND: tl.constexpr,
    STATIC: tl.constexpr,
    GROUP: tl.constexpr,
    LOCAL: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of x · weight of its rows' expert, [P, N]."""
    tile, column = tile_and_column(tiles, (WIDTH + BLOCK_N - 1) // BLOCK_N)
    expert, rows_M, inside_M = arranged_rows(order, tile_expert, tile, pairs, BLOCK_M)
    if expert == LOCAL:
        return
    weight += weights_before(expert, KIND, DEPTH, WIDTH)
    if KIND != "none":
        weight_scale += scales_before(expert, GROUP, DEPTH, WIDTH)
    total_MN = zero(KIND, BLOCK_M, BLOCK_N)
    for start in tl.range(0, DEPTH, BLOCK_K):
        x_MK = load_x(x, rows_M, start, KIND, DEPTH, BLOCK_K)
        total_MN = add_product(
            total_MN, x_MK, weight, weight_scale, start, column, 0, KIND, GROUP, DEPTH, WIDTH, WIDTH, BLOCK_N, BLOCK_K
        )
    columns_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = columns_N < WIDTH
    total_MN = scaled(total_MN, x_scale, weight_scale, expert, rows_M, columns_N, inside_N, KIND, STATIC, GROUP)
    store_tile(total_MN, output, rows_M, inside_M, columns_N, inside_N, WIDTH)


@triton.jit
def quantise_rows(
    wide,
    chosen,
    activated,
    activated_row_scale,
    KIND: tl.constexpr,
    BOUND: tl.constexpr,
    LOCAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One pair's activated intermediate, quantised by its own scale."""
    pair = tl.program_id(0)
    expert = tl.load(chosen + pair)
    if expert == LOCAL:
        return
    columns_I = tl.arange(0, BLOCK_I)
    inside_I = columns_I < WIDTH
    x_I = tl.load(wide + pair.to(tl.int64) * WIDTH + columns_I, mask=inside_I, other=0.0)
    store_row(x_I, activated, activated_row_scale, None, pair, expert, columns_I, inside_I, KIND, BOUND, WIDTH)


@triton.jit
def combine(
    pair_outputs,
    chosen,
    output,
    LOCAL: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One token's output, or a block of it: its experts' outputs, added in order in float32."""
    token = tl.program_id(0)
    columns_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside_H = columns_H < WIDTH
    total_H = tl.zeros([BLOCK_H], tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        if tl.load(chosen + pair) != LOCAL:
            row = pair_outputs + pair.to(tl.int64) * WIDTH
            total_H += tl.load(row + columns_H, mask=inside_H, other=0.0).to(tl.float32)
    tl.store(output + token.to(tl.int64) * WIDTH + columns_H, total_H.to(output.dtype.element_ty), mask=inside_H)


@triton.jit
def store_row(
    x_N,
    output,
    row_scale,
    static_scale,
    row,
    expert,
    columns_N,
    inside_N,
    KIND: tl.constexpr,
    BOUND: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Stores a row, or a block of it, as a product takes it in: quantised by its expert's scale or by its own."""
    if (KIND == "int8") or (KIND == "fp8"):
        x_N = x_N.to(tl.float32)
        if static_scale is None:
            scale = step_scale(tl.max(tl.abs(x_N), axis=0), KIND, BOUND)
            tl.store(row_scale + row, scale)
        else:
            scale = tl.load(static_scale + expert)
        x_N = quantised(x_N, scale, KIND)
    places_N = row.to(tl.int64) * WIDTH + place_in_row(columns_N, KIND, WIDTH)
    tl.store(output + places_N, x_N.to(output.dtype.element_ty), mask=inside_N)
