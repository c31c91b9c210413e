"""Sequences in progress, and the limits of a session that holds them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import SessionError
from ..spec.geometry import ModelSpec
from .backends.interface import Binding, Caches, DecoderBackend, Slots, StatesBinding
from .draft import Draft, DraftedCaches, Followed, holds_draft, own_slots

DEFAULT_MAX_SEQ = 16384
"""Positions that a session holds where neither the caller nor a shorter context says otherwise."""


class State:
    """Sequences in progress: their caches, and the number of tokens in each row.

    A part of the rows (`rows`) is a state as well; `first` is the number of its first row in the caches.

    Args:
        decoder: The decoder.
        batch: Rows.
        positions: Tokens that each can hold.
        sparse: Whether a row takes memory for the tokens that it holds alone.
        draft: The draft that follows the rows, with caches of its own; None follows none.
    """

    def __init__(
        self,
        decoder: DecoderBackend,
        batch: int,
        positions: int,
        *,
        sparse: bool = False,
        draft: Draft | None = None,
    ) -> None:
        self.own: Caches = decoder.caches(batch, positions, sparse=sparse)
        self.followed = None if draft is None else Followed(draft, batch, positions, sparse=sparse)
        self.caches: Caches = self.own if self.followed is None else DraftedCaches(self.own, self.followed)
        self.past_B = np.zeros(batch, dtype=np.int32)
        self.decoder = decoder
        self.first = 0
        self._bindings: dict[tuple[int, int], Binding] = {}

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.past_B)

    @property
    def is_followed(self) -> bool:
        """Whether a draft follows any row at present."""
        return self.followed is not None and self.followed.follows(self.first, self.batch)

    def rows(self, start: int, stop: int) -> "State":
        """A state of some of the rows, one after another, over the same caches and lengths."""
        part = copy.copy(self)
        part.past_B, part.first = self.past_B[start:stop], self.first + start
        return part

    def move(self, source: int, target: int) -> None:
        """Puts one row's sequence in the place of another's."""
        self.caches.copy(self.first + source, self.first + target, int(self.past_B[source]))
        self.past_B[target] = self.past_B[source]
        if self.followed is not None:
            self.followed.move(self.first + source, self.first + target)

    def rewind(self, past_B: ArrayLike) -> None:
        """Forgets each row's tokens beyond the first `past_B`, as if they had never been added.

        To where a chunk begins is always possible: later tokens attend to none of the chunked layers' slots.

        Raises:
            SessionError: A row has fewer tokens, or a chunk began since, whose tokens lie where older ones lay.
        """
        past = np.asarray(past_B, dtype=np.int32)
        chunk = self.decoder.spec.chunk
        if past.shape != self.past_B.shape or (past < 0).any() or (past > self.past_B).any():
            raise SessionError(f"rewound to {past.tolist()}, the rows hold {self.past_B.tolist()}: give at most that")
        gone = past < self.past_B
        if chunk and (gone & (past % chunk > 0) & (past // chunk != (self.past_B - 1) // chunk)).any():
            raise SessionError(
                f"rewound from {self.past_B.tolist()} to {past.tolist()} over a boundary of {chunk}: start again"
            )
        if self.followed is not None:
            for row, count in enumerate((self.past_B - past).tolist()):
                self.followed.rewind(self.first + row, count)
        self.past_B[:] = past

    def restore(self, row: int, blocks: Sequence[Slots], size: int) -> None:
        """Puts contents of the caches, as they were read, into an empty row, which holds these tokens then.

        Args:
            row: The row.
            blocks: Contents of `size` positions each, from the first on.
            size: Positions of a block.
        """
        past, first = len(blocks) * size, self.first + row
        for index, slots in enumerate(blocks):
            found = own_slots(slots) if self.followed is None else slots
            self.caches.write(first, index * size, found, past)
        self.past_B[row] = past
        if self.followed is not None:
            begin = self.followed.resume if all(map(holds_draft, blocks)) else self.followed.forget
            begin(first, past)

    def run(
        self,
        rows: slice,
        ids_BS: NDArray[np.int64],
        positions_BR: NDArray[np.int64],
        lengths_B: NDArray[np.int32],
        features_MH: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Runs one piece over some rows, whose tokens are held then.

        Args:
            rows: The rows.
            ids_BS: Token ids, right-padded.
            positions_BR: Positions of the piece that get logits.
            lengths_B: Number of each row's tokens.
            features_MH: Image features of the piece's image tokens; None where it has none.

        Returns:
            Logits [B, R, V].
        """
        binding, past_B = self.binding(rows), self.past_B[rows]
        if self.followed is None or not self.followed.follows(self.first + rows.start, len(ids_BS)):
            logits_BRV = binding.step(ids_BS, past_B, positions_BR, features_MH)
        else:
            with_states = cast(StatesBinding, binding)
            logits_BRV, states_BSW = with_states.step_with_states(ids_BS, past_B, positions_BR, features_MH)
            for row, length in enumerate(lengths_B.tolist()):
                self.followed.add(self.first + rows.start + row, ids_BS[row, :length], states_BSW[row, :length])
        self.past_B[rows] += lengths_B
        return logits_BRV

    def binding(self, rows: slice) -> Binding:
        """The decoder bound to some rows, made once."""
        key = (self.first + rows.start, self.first + rows.stop)
        if key not in self._bindings:
            self._bindings[key] = self.decoder.bind(self.own, slice(*key))
        return self._bindings[key]


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a session holds: positions of a sequence, and rows at once (None is no limit)."""

    max_seq: int
    max_batch: int | None

    @classmethod
    def of(cls, spec: ModelSpec, max_seq: int | None, max_batch: int | None) -> Self:
        """Checks the limits that a caller asks for; a `max_seq` of None takes the context, at most `DEFAULT_MAX_SEQ`.

        Raises:
            SessionError: A limit is out of range.
        """
        if max_seq is not None and not 1 <= max_seq <= spec.max_positions:
            raise SessionError(f"max_seq is {max_seq}, expected 1 to {spec.max_positions}, the model's context")
        if max_batch is not None and max_batch < 1:
            raise SessionError(f"max_batch is {max_batch}, expected a whole number from 1 up")
        return cls(max_seq or min(spec.max_positions, DEFAULT_MAX_SEQ), max_batch)
