"""The tokens of a batch cut into pieces that a decoder may take.

Enters: the tokens that each row holds and gets. Leaves: pieces, in the order to run them. Invariants: no row's piece
crosses a boundary of its chunk; a piece of several tokens over a filled cache is one row alone (the CPU's attention
asks for it); pads are written only where the row's own tokens come later.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows' next tokens: `lengths[i]` tokens of row `rows.start + i`, padded to the longest."""

    rows: slice
    lengths: tuple[int, ...]


def cut(past: Sequence[int], new: Sequence[int], chunk: int, longest: int, most: int | None = None) -> Iterator[Piece]:
    """Cuts each row's new tokens into pieces, in the order to run them.

    Args:
        past: Number of tokens in each row's cache.
        new: Number of tokens to add to each row.
        chunk: Positions that no piece may cross; 0 where there are none.
        longest: Tokens of a row's piece at most.
        most: Tokens of a piece of several rows at most, pads included; None is no limit.
    """
    past, left = list(past), list(new)
    if len(past) > 1 and not any(past):
        longest_first = min(longest, chunk) if chunk else longest
        lengths = tuple(min(tokens, longest_first) for tokens in left)
        start = 0
        for stop in range(1, len(lengths) + 1):
            wider = lengths[start : stop + 1]
            if stop == len(lengths) or (most is not None and len(wider) * max(wider) > most):
                yield Piece(slice(start, stop), lengths[start:stop])
                start = stop
        past = list(lengths)
        left = [tokens - length for tokens, length in zip(left, lengths, strict=True)]
    for row, tokens in enumerate(left):
        while tokens:
            length = min(tokens, longest, chunk - past[row] % chunk if chunk else tokens)
            yield Piece(slice(row, row + 1), (length,))
            past[row] += length
            tokens -= length
