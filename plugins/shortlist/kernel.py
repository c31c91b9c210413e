"""Triton kernels that shorten rows of logits to their largest: `shorten` block by block, then `join` row by row.

Enter: logits [B, V] in float32. Leaves: for each row its COUNT largest logits with their tokens, the sum of all tokens'
weights where the likeliest weighs 1, and the number of logits that are no finite numbers. Invariant: equal logits are
in the order of their tokens, as a stable sort leaves them.

A key is a logit's bits, made to sort as whole numbers do, and behind them the token, the lower the larger.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

LOW = tl.constexpr(0x7FFFFFFF)


@triton.jit
def shorten(
    logits, sharpness, keys, peaks, sums, odds, vocabulary, blocks, BLOCK: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """One block of a row: its COUNT largest keys, its peak, its weights' sum below it, its odd logits.

    `sharpness` [B] is one over the temperature.
    """
    block = tl.program_id(0)
    row = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    x = tl.load(logits + row.to(tl.int64) * vocabulary + token, mask=inside, other=float("-inf"))
    odd = inside & ((x != x) | (tl.abs(x) == float("inf")))
    x = tl.where(x == 0, 0.0, x)  # of the two zeros neither is larger
    key = (ordered(x.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | (token ^ LOW).to(tl.int64)
    place = row * blocks + block
    best = tl.topk(key, COUNT)
    tl.store(keys + place * COUNT + tl.arange(0, COUNT), best)
    peak = tl.max(x, axis=0)
    weight = tl.where(inside, tl.exp((x - peak) * tl.load(sharpness + row)), 0.0)
    tl.store(peaks + place, peak)
    tl.store(sums + place, tl.sum(weight, axis=0))
    tl.store(odds + place, tl.sum(odd.to(tl.int32), axis=0))


@triton.jit
def join(
    keys, peaks, sums, odds, sharpness, shortlist, blocks,
    KEYS: tl.constexpr, BLOCKS: tl.constexpr, COUNT: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One row: COUNT tokens, their logits, the weights' sum and the number of odd logits, each a word of 32 bits."""
    row = tl.program_id(0)
    each = tl.arange(0, KEYS)
    least = tl.full([KEYS], -(2**63), tl.int64)
    found = tl.load(keys + row * blocks * COUNT + each, mask=each < blocks * COUNT, other=0)
    best = tl.topk(tl.where(each < blocks * COUNT, found, least), COUNT)
    bits = ordered((best >> 32).to(tl.int32))
    words = shortlist + row * WORDS
    number = tl.arange(0, COUNT)
    tl.store(words + number, (best & LOW).to(tl.int32) ^ LOW)
    tl.store(words + COUNT + number, bits)
    block = tl.arange(0, BLOCKS)
    peak = tl.load(peaks + row * blocks + block, mask=block < blocks, other=float("-inf"))
    total = tl.load(sums + row * blocks + block, mask=block < blocks, other=0.0)
    odd = tl.load(odds + row * blocks + block, mask=block < blocks, other=0)
    top = tl.max(peak, axis=0)
    total = tl.sum(total * tl.exp((peak - top) * tl.load(sharpness + row)), axis=0)
    tl.store(words + 2 * COUNT, total.to(tl.int32, bitcast=True))
    tl.store(words + 2 * COUNT + 1, tl.sum(odd, axis=0))


@triton.jit
def ordered(bits):
    """A float's bits as a whole number that sorts as the float does, and back again."""
    return tl.where(bits < 0, bits ^ LOW, bits)
