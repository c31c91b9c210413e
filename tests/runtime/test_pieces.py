from hypothesis import given
from hypothesis import strategies as st

from arriero.runtime.pieces import cut

rows = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=4)


@given(rows, st.integers(0, 20), st.integers(1, 16), st.none() | st.integers(1, 48))
def test_pieces_add_up_and_keep_their_promises(
    batch: list[tuple[int, int]], chunk: int, longest: int, most: int | None
) -> None:
    past, new = [row[0] for row in batch], [row[1] for row in batch]
    filled = list(past)
    for piece in cut(past, new, chunk, longest, most):
        covered = range(len(past))[piece.rows]
        assert len(covered) == len(piece.lengths)
        width = max(piece.lengths)
        assert width <= longest
        if len(covered) > 1:
            assert not any(filled[piece.rows])
            assert most is None or len(covered) * width <= most
        for row, length in zip(covered, piece.lengths, strict=True):
            if chunk and length:
                assert filled[row] // chunk == (filled[row] + length - 1) // chunk
            if chunk:
                assert filled[row] % chunk + width <= chunk  # pads stay inside the chunk's slots as well
            filled[row] += length
    assert filled == [a + b for a, b in batch]


def test_a_long_prompt_is_cut_at_its_chunks() -> None:
    assert [piece.lengths for piece in cut([5], [40], 16, 512)] == [(11,), (16,), (13,)]


def test_fresh_rows_share_their_first_piece() -> None:
    pieces = list(cut([0, 0], [20, 3], 16, 512))
    assert [piece.lengths for piece in pieces] == [(16, 3), (4,)]
    assert pieces[1].rows == slice(0, 1)


def test_fresh_rows_that_are_too_many_for_one_piece_take_several() -> None:
    pieces = list(cut([0, 0, 0, 0, 0], [4, 5, 3, 20, 1], 0, 512, 12))
    assert [(piece.rows, piece.lengths) for piece in pieces] == [
        (slice(0, 2), (4, 5)),
        (slice(2, 3), (3,)),
        (slice(3, 4), (20,)),
        (slice(4, 5), (1,)),
    ]
