"""The Triton kernels of calls so small that all their pairs fit into one tile of rows, as in decoding.

Enter: the op's inputs as device pointers. Leaves: the op's output. Invariants: each chosen expert's weights are read
once; every sum has one order, whichever program comes last. Names are as in `kernel`.

A product is cut along columns and depth, so that one expert keeps the whole GPU busy. The program that finishes last of
those that share columns, which a counter tells, adds up what they left: no launch is needed for it. Counters are zeros
between launches, since that program leaves them so.
"""

import triton
import triton.language as tl

from ..last_program import is_last
from .tile import (
    add_product,
    let_next_start,
    load_x,
    place_in_row,
    quantised,
    scales_before,
    silu,
    step_scale,
    wait_for_earlier,
    weights_before,
    zero,
)


@triton.jit
def gate_and_up_few(
    x,
    x_scale,
    weight,
    weight_scale,
    router_logits,
    first_expert,
    activated_scale,
    chosen,
    counters,
    pairs,
    parts,
    activated,
    peaks,
    KIND: tl.constexpr,
    STATIC: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    LOCAL: tl.constexpr,
    TOP_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """PART rows of a weight's gate and up columns times all pairs of one expert; the last part: up · silu(gate) [P, I].

    `x` are what `route` left where activations are quantised, else tokens that are routed here. The program of an
    expert's first pair does the work of all of its pairs. What is activated is stored as the next product takes it in;
    where a token's own scale is to follow in float32, with its columns' largest magnitude.
    """
    ROUNDED: tl.constexpr = (KIND == "int8") or (KIND == "fp8")
    if DEPENDENT:
        let_next_start()
        if ROUNDED:
            wait_for_earlier()
    column = tl.program_id(0)
    part = tl.program_id(1)
    pair = tl.program_id(2)
    rows_M = tl.arange(0, BLOCK_M)
    if ROUNDED:
        experts_M = tl.load(chosen + rows_M, mask=rows_M < pairs, other=LOCAL)
    else:
        best_M, experts_M = routed(router_logits, first_expert, rows_M, pairs, EXPERTS, LOCAL, TOP_K, BLOCK_M, BLOCK_E)
    expert = tl.sum(tl.where(rows_M == pair, experts_M, 0), axis=0)
    inside_M = (rows_M < pairs) & (experts_M == expert)
    if not ROUNDED and (column == 0) & (part == 0):
        tl.store(chosen + pair, expert)
    if (expert == LOCAL) | (tl.min(tl.where(inside_M, rows_M, BLOCK_M), axis=0) != pair):
        return

    near_M = tl.where(inside_M, rows_M, pair)
    scale_M = tl.full([BLOCK_M], 1.0, tl.float32)
    if STATIC:
        scale_M *= tl.load(x_scale + expert)
    elif ROUNDED:
        scale_M = tl.load(x_scale + near_M)
    else:
        scale_M = (1 / (1 + tl.exp(-best_M))).to(x.dtype.element_ty).to(tl.float32)
    STRIDE: tl.constexpr = 2 * WIDTH
    weight += weights_before(expert, KIND, DEPTH, STRIDE)
    if KIND != "none":
        weight_scale += scales_before(expert, GROUP, DEPTH, STRIDE)
    gate_MN = zero(KIND, BLOCK_M, BLOCK_N)
    up_MN = zero(KIND, BLOCK_M, BLOCK_N)
    for start in tl.range(part * PART, tl.minimum(part * PART + PART, DEPTH), BLOCK_K):
        if ROUNDED:
            x_MK = load_x(x, near_M, start, KIND, DEPTH, BLOCK_K)
        else:
            x_MK = scored(x, scale_M, rows_M // TOP_K, inside_M, start, KIND, DEPTH, BLOCK_K)
        gate_MN = add_product(
            gate_MN, x_MK, weight, weight_scale, start, column, 0, KIND, GROUP, DEPTH, WIDTH, STRIDE, BLOCK_N, BLOCK_K
        )
        up_MN = add_product(
            up_MN, x_MK, weight, weight_scale, start, column, WIDTH, KIND, GROUP, DEPTH, WIDTH, STRIDE, BLOCK_N, BLOCK_K
        )
    columns_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = columns_N < WIDTH
    gate_MN = rescaled(gate_MN, scale_M, weight_scale, columns_N, inside_N, KIND, GROUP)
    up_MN = rescaled(up_MN, scale_M, weight_scale, WIDTH + columns_N, inside_N, KIND, GROUP)

    inside_MN = inside_M[:, None] & inside_N[None, :]
    if PARTS > 1:
        mine_MN = parts + (part * pairs + rows_M).to(tl.int64)[:, None] * STRIDE + columns_N[None, :]
        tl.store(mine_MN, gate_MN, mask=inside_MN)
        tl.store(mine_MN + WIDTH, up_MN, mask=inside_MN)
        if not is_last(counters + pair * tl.num_programs(0) + column, PARTS):
            return
        gate_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for each in tl.static_range(PARTS):
            place_MN = parts + (each * pairs + rows_M).to(tl.int64)[:, None] * STRIDE + columns_N[None, :]
            gate_MN += tl.load(place_MN, mask=inside_MN, other=0.0, cache_modifier=".cg")
            up_MN += tl.load(place_MN + WIDTH, mask=inside_MN, other=0.0, cache_modifier=".cg")
    activated_MN = up_MN * silu(gate_MN)
    if STATIC:
        activated_MN = quantised(activated_MN, tl.load(activated_scale + expert), KIND)
    elif ROUNDED:
        largest_M = tl.max(tl.where(inside_N[None, :], tl.abs(activated_MN), 0.0), axis=1)
        tl.store(peaks + rows_M * tl.num_programs(0) + column, largest_M, mask=inside_M)
    places_N = place_in_row(columns_N, KIND, WIDTH)
    places_MN = rows_M[:, None] * WIDTH + places_N[None, :]
    tl.store(activated + places_MN, activated_MN.to(activated.dtype.element_ty), mask=inside_MN)


@triton.jit
def down_few(
    activated,
    peaks,
    weight,
    weight_scale,
    parts,
    activated_scale,
    chosen,
    output,
    counters,
    pairs,
    KIND: tl.constexpr,
    STATIC: tl.constexpr,
    GROUP: tl.constexpr,
    BOUND: tl.constexpr,
    LOCAL: tl.constexpr,
    TOP_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PEAKS: tl.constexpr,
    BLOCK_PEAKS: tl.constexpr,
):
    """PART rows of a weight times all pairs of one expert; the last program of some columns: their outputs, [T, H].

    A token's experts are added in their order, each in its parts' order, in float32.
    """
    if DEPENDENT:
        wait_for_earlier()
    column = tl.program_id(0)
    part = tl.program_id(1)
    pair = tl.program_id(2)
    rows_M = tl.arange(0, BLOCK_M)
    experts_M = tl.load(chosen + rows_M, mask=rows_M < pairs, other=LOCAL)
    expert = tl.sum(tl.where(rows_M == pair, experts_M, 0), axis=0)
    inside_M = (rows_M < pairs) & (experts_M == expert)
    columns_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = columns_N < WIDTH
    if (expert != LOCAL) & (tl.min(tl.where(inside_M, rows_M, BLOCK_M), axis=0) == pair):
        scale_M = tl.full([BLOCK_M], 1.0, tl.float32)
        if STATIC:
            scale_M *= tl.load(activated_scale + expert)
        elif (KIND == "int8") or (KIND == "fp8"):
            each = tl.arange(0, BLOCK_PEAKS)
            inside_MP = inside_M[:, None] & (each < PEAKS)[None, :]
            peaks_MP = tl.load(peaks + rows_M[:, None] * PEAKS + each[None, :], mask=inside_MP, other=0.0)
            scale_M = step_scale(tl.max(peaks_MP, axis=1), KIND, BOUND)
        own = weight + weights_before(expert, KIND, DEPTH, WIDTH)
        own_scale = weight_scale
        if KIND != "none":
            own_scale += scales_before(expert, GROUP, DEPTH, WIDTH)
        total_MN = zero(KIND, BLOCK_M, BLOCK_N)
        near_M = tl.where(inside_M, rows_M, pair)
        x_M = activated + near_M * DEPTH
        for start in tl.range(part * PART, tl.minimum(part * PART + PART, DEPTH), BLOCK_K):
            if ((KIND == "int8") or (KIND == "fp8")) and not STATIC:
                depths_K = start + tl.arange(0, BLOCK_K)
                wide_MK = tl.load(x_M[:, None] + depths_K[None, :], mask=(depths_K < DEPTH)[None, :], other=0.0)
                x_MK = quantised(wide_MK, scale_M[:, None], KIND).to(own.dtype.element_ty)
            else:
                x_MK = load_x(activated, near_M, start, KIND, DEPTH, BLOCK_K)
            total_MN = add_product(
                total_MN, x_MK, own, own_scale, start, column, 0,
                KIND, GROUP, DEPTH, WIDTH, WIDTH, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        total_MN = rescaled(total_MN, scale_M, own_scale, columns_N, inside_N, KIND, GROUP)
        places_MN = (part * pairs + rows_M).to(tl.int64)[:, None] * WIDTH + columns_N[None, :]
        tl.store(parts + places_MN, total_MN, mask=inside_M[:, None] & inside_N[None, :])
    if not is_last(counters + column, PARTS * pairs):
        return

    tokens_M = tl.arange(0, BLOCK_M)  # as many as pairs, where each token has one
    inside_M = tokens_M * TOP_K < pairs
    total_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for choice in tl.static_range(TOP_K):
        pairs_M = tokens_M * TOP_K + choice
        held_M = tl.load(chosen + pairs_M, mask=inside_M, other=LOCAL) != LOCAL
        for each in tl.static_range(PARTS):
            places_MN = (each * pairs + pairs_M).to(tl.int64)[:, None] * WIDTH + columns_N[None, :]
            held_MN = held_M[:, None] & inside_N[None, :]
            total_MN += tl.load(parts + places_MN, mask=held_MN, other=0.0, cache_modifier=".cg")
    places_MN = tokens_M.to(tl.int64)[:, None] * WIDTH + columns_N[None, :]
    tl.store(output + places_MN, total_MN.to(output.dtype.element_ty), mask=inside_M[:, None] & inside_N[None, :])


@triton.jit
def routed(
    router_logits,
    first_expert,
    rows_M,
    pairs,
    EXPERTS: tl.constexpr,
    LOCAL: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Each pair's router logit and expert, LOCAL where its weights are elsewhere."""
    experts_E = tl.arange(0, BLOCK_E)
    places_ME = (rows_M // TOP_K)[:, None] * EXPERTS + experts_E[None, :]
    inside_ME = (rows_M < pairs)[:, None] & (experts_E < EXPERTS)[None, :]
    logits_ME = tl.load(router_logits + places_ME, mask=inside_ME, other=float("-inf")).to(tl.float32)
    best_M = tl.zeros([BLOCK_M], tl.float32)
    chosen_M = tl.zeros([BLOCK_M], tl.int32)
    for choice in tl.static_range(TOP_K):
        largest_M = tl.max(logits_ME, axis=1)
        of_largest_ME = tl.where(logits_ME == largest_M[:, None], experts_E[None, :], BLOCK_E)
        expert_M = tl.min(of_largest_ME, axis=1)  # of equal logits the lower expert
        logits_ME = tl.where(experts_E[None, :] == expert_M[:, None], float("-inf"), logits_ME)
        best_M = tl.where(rows_M % TOP_K == choice, largest_M, best_M)
        chosen_M = tl.where(rows_M % TOP_K == choice, expert_M, chosen_M)
    here_M = (chosen_M >= first_expert) & (chosen_M < first_expert + LOCAL)
    return best_M, tl.where(here_M, chosen_M - first_expert, LOCAL)


@triton.jit
def scored(
    x, score_M, tokens_M, inside_M, start, KIND: tl.constexpr, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """A tile [M, K] of tokens times their scores, in the tokens' type; for `int4` two, as `load_x` gives them."""
    SIZE: tl.constexpr = 32 if (KIND == "int4") and (BLOCK_K < 32) else BLOCK_K
    depths_K = start + tl.arange(0, SIZE)
    inside_MK = inside_M[:, None] & (depths_K < tl.minimum(start + BLOCK_K, DEPTH))[None, :]
    x_MK = tl.load(x + tokens_M.to(tl.int64)[:, None] * DEPTH + depths_K[None, :], mask=inside_MK, other=0.0)
    x_MK = (x_MK.to(tl.float32) * score_M[:, None]).to(x_MK.dtype)
    if KIND == "int4":
        return tl.split(tl.reshape(x_MK, [x_MK.shape[0], SIZE // 2, 2]))
    else:
        return x_MK


@triton.jit
def rescaled(total_MN, scale_M, weight_scale, columns_N, inside_N, KIND: tl.constexpr, GROUP: tl.constexpr):
    """A product in float32 under the scales that hold over all of its depth."""
    total_MN = total_MN.to(tl.float32)
    if (KIND != "none") and (GROUP == 0):
        total_MN *= tl.load(weight_scale + columns_N, mask=inside_N, other=0.0)[None, :]
    if (KIND == "int8") or (KIND == "fp8"):
        total_MN *= scale_M[:, None]
    return total_MN
