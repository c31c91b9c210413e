"""A draft beside a decoder: an EAGLE-3 head that follows sequences, and guesses how they go on.

Enters: the decoder's hidden states of each token, as its steps compute them. Leaves: guesses of the next tokens, for
the decoder to verify. The head reads a token beside the state of the token before it; so a row's newest state waits
until the token after it is known. Invariant: in each row, tokens that the head has read and states that wait are
together as many as the decoder holds, counted from where the head began to follow.

Where the head loses its place, behind tokens that are taken back after it has read them, say, it begins anew there: its
positions count from its own beginning, which changes nothing, since only distances count. Of a beginning that is kept
for other sequences its own keys and values are kept too, where it has read the sequence from the first token on. The
last of these may stand beside another token than the other sequence's: that is a guess a little worse, and no text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .backends.interface import Caches, DraftBackend, DraftBinding, Slots

WAITING = 32
"""States of a row that wait at most. More of a prompt are read at once; more of single tokens, after none of which a
guess was asked for, are not worth it, and the head begins anew among them."""

LONGEST_DRAFT = 16
"""Tokens of a draft at most, whatever a caller allows."""

DRAFT = "draft."
"""Beginning of the names of a draft's slots beside a decoder's."""

SLACK = 2 * WAITING
"""Positions of the head's caches beyond those of a row: for pads beside other rows' tokens, and for guesses."""

Choice = Callable[[int, int, NDArray[np.float32]], tuple[int | None, bool]]
"""A function that chooses a guess: of a row, at a step from 0 on, from the head's logits [V']. It returns one of the
model's tokens, or None where none is to be trusted; and whether a guess behind it is worth its step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A loaded draft, and the model's token that each of its own stands for; None where they are the same."""

    backend: DraftBackend
    tokens: NDArray[np.int64] | None = None


class DraftedCaches:
    """A decoder's caches and its draft's, counted, moved, read and written together.

    Args:
        own: The decoder's.
        followed: The draft's rows.
    """

    def __init__(self, own: Caches, followed: "Followed") -> None:
        self.own, self.followed, self.draft = own, followed, followed.caches
        self.batch, self.positions = own.batch, own.positions

    def copy(self, source: int, target: int, past: int) -> None:
        """Copies a row that holds `past` tokens over another; the head has read no more of it than that."""
        self.own.copy(source, target, past)
        self.draft.copy(source, target, past)

    def read(self, row: int, start: int, stop: int) -> Slots:
        """Copies some positions of one chunk in a row, the draft's where it has read the row from its beginning."""
        slots = dict(self.own.read(row, start, stop))
        if self.followed.is_whole(row):
            slots |= {DRAFT + name: each for name, each in self.draft.read(row, start, stop).items()}
        return slots

    def write(self, row: int, start: int, slots: Slots, past: int) -> None:
        """Puts back what `read` gave."""
        self.own.write(row, start, own_slots(slots), past)
        drafted = {name.removeprefix(DRAFT): each for name, each in slots.items() if name.startswith(DRAFT)}
        self.draft.write(row, start, drafted, past)

    def row_bytes(self, tokens: int) -> int:
        """Bytes that a row takes at most while it holds this number of tokens."""
        return self.own.row_bytes(tokens) + self.draft.row_bytes(tokens + SLACK)

    def release(self, row: int) -> None:
        """Gives back the memory of a row that nobody has."""
        self.own.release(row)
        self.draft.release(row)


def own_slots(slots: Slots) -> Slots:
    """The decoder's own among slots that were read beside a draft's."""
    return {name: each for name, each in slots.items() if not name.startswith(DRAFT)}


def holds_draft(slots: Slots) -> bool:
    """Whether a draft's slots are among these."""
    return any(name.startswith(DRAFT) for name in slots)


class Followed:
    """Rows that a draft follows.

    Args:
        draft: The draft.
        batch: Rows.
        positions: Tokens that each can hold.
        sparse: Whether a row takes memory for the tokens that it holds alone.
    """

    def __init__(self, draft: Draft, batch: int, positions: int, *, sparse: bool = False) -> None:
        self.backend = draft.backend
        self.caches = draft.backend.caches(batch, positions + SLACK, sparse=sparse)
        self.read_B = np.zeros(batch, np.int32)
        self.began_B = np.zeros(batch, np.int32)  # the decoder's token where each began to follow
        self.is_idle = [False] * batch
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.states: list[list[NDArray[np.float32]]] = [[] for _ in range(batch)]
        self._bindings: dict[tuple[int, int], DraftBinding] = {}

    def heed(self, row: int, past: int | np.int32, is_wanted: bool) -> None:
        """Leaves a row alone that holds `past` tokens, or follows it, again from here on."""
        if is_wanted == self.is_idle[row]:
            self.is_idle[row] = not is_wanted
            self.forget(row, past)

    def follows(self, first: int, count: int) -> bool:
        """Whether any of some rows is followed."""
        return not all(self.is_idle[first : first + count])

    def add(self, row: int, tokens: NDArray[np.int64], states_SW: NDArray[np.float32]) -> None:
        """Takes tokens that the decoder has read, and its states behind each of them [S, L·H]."""
        if self.is_idle[row]:
            return
        self.tokens[row] += tokens.tolist()
        self.states[row].append(states_SW.copy())
        if len(self.tokens[row]) <= WAITING:
            return
        if len(tokens) == 1:
            self._skip(row)
        else:
            self._catch_up(row)

    def rewind(self, row: int, count: int) -> None:
        """Forgets a row's last tokens, or all where one that follows what is kept has been read."""
        kept = len(self.tokens[row]) - count
        if self.is_idle[row]:
            return
        if count and (kept < 0 or (kept == 0 and self.read_B[row])):
            self.forget(row, int(self.began_B[row] + self.read_B[row]) + kept)
        elif count:
            states_SW = np.concatenate(self.states[row])[:kept]
            self.tokens[row], self.states[row] = self.tokens[row][:kept], [states_SW] if kept else []

    def forget(self, row: int, past: int | np.int32) -> None:
        """Begins anew in a row that holds `past` tokens, which were never seen."""
        self.read_B[row], self.began_B[row], self.tokens[row], self.states[row] = 0, past, [], []

    def resume(self, row: int, past: int) -> None:
        """Takes a row's first `past` tokens as read, since the draft's keys and values of them were put there."""
        self.read_B[row], self.began_B[row], self.tokens[row], self.states[row] = past, 0, [], []

    def is_whole(self, row: int) -> bool:
        """Whether the draft follows a row from its first token on; all of it that can be read is read then."""
        if self.is_idle[row] or self.began_B[row]:
            return False
        if len(self.tokens[row]) > 1:
            self._catch_up(row)
        return True

    def move(self, source: int, target: int) -> None:
        """Puts one row's place into another's; the caches move with the decoder's."""
        self.read_B[target], self.began_B[target] = self.read_B[source], self.began_B[source]
        self.is_idle[target] = self.is_idle[source]
        self.tokens[target], self.states[target] = list(self.tokens[source]), list(self.states[source])

    def propose(self, first: int, newest: Sequence[int], wanted: Sequence[int], choose: Choice) -> list[list[int]]:
        """Guesses how rows go on that lie side by side.

        Args:
            first: The first of them.
            newest: Each row's newest token, which the decoder has not read.
            wanted: Tokens to be guessed at most; a row of which none is known gets none.
            choose: Chooses a token of a row's logits.

        Returns:
            Each row's guesses, tokens of the model.
        """
        waiting = [len(self.tokens[first + row]) for row in range(len(newest))]
        wanted = [min(count, LONGEST_DRAFT) if have else 0 for count, have in zip(wanted, waiting, strict=True)]
        drafts: list[list[int]] = [[] for _ in newest]
        going = [row for row, count in enumerate(wanted) if count]
        if not going:
            return drafts
        binding = self._binding(first, first + len(newest))
        logits_BV, hidden_BH = self._begin(binding, first, newest, waiting, going)
        past_B, step = self.read_B[first : first + len(newest)].copy(), 0
        while True:
            ids_B = np.zeros(len(newest), np.int64)
            for row in list(going):
                token, goes_on = choose(row, step, logits_BV[row])
                if token is not None:
                    ids_B[row] = token
                    drafts[row].append(token)
                if token is None or not goes_on or len(drafts[row]) == wanted[row]:
                    going.remove(row)
            if not going:
                return drafts
            logits_BV, hidden_BH = binding.go_on(ids_B, past_B, hidden_BH)
            past_B, step = past_B + 1, step + 1

    def _begin(
        self, binding: DraftBinding, first: int, newest: Sequence[int], waiting: Sequence[int], going: Sequence[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Reads what waits in some rows, each up to its newest token; other rows get pads, which are overwritten."""
        longest = max(waiting[row] for row in going)
        ids_BS = np.zeros((len(newest), longest), np.int64)
        last_B = np.zeros(len(newest), np.int64)
        width = self.states[first + going[0]][0].shape[1]
        states_BSW = np.zeros((len(newest), longest, width), np.float32)
        for row in going:
            count = waiting[row]
            ids_BS[row, :count] = [*self.tokens[first + row][1:], newest[row]]
            states_BSW[row, :count] = np.concatenate(self.states[first + row])
            last_B[row] = count - 1
        past_B = self.read_B[first : first + len(newest)]
        found = binding.begin(ids_BS, past_B, last_B, states_BSW)
        for row in going:
            self.read_B[first + row] += waiting[row]
            self.tokens[first + row], self.states[first + row] = [], []
        return found

    def _skip(self, row: int) -> None:
        """Leaves out the older half of what waits, and all before, in a row that is not asked for guesses."""
        kept = WAITING // 2
        states_SW = np.concatenate(self.states[row])[-kept:]
        tokens = self.tokens[row][-kept:]
        self.forget(row, int(self.began_B[row] + self.read_B[row]) + len(self.tokens[row]) - kept)
        self.tokens[row], self.states[row] = tokens, [states_SW]

    def _catch_up(self, row: int) -> None:
        """Reads all that waits in a row but the newest state, whose next token is not known."""
        tokens, states_SW = self.tokens[row], np.concatenate(self.states[row])
        count = len(tokens) - 1
        ids_BS, last_B = np.array([tokens[1:]], np.int64), np.array([count - 1])
        past_B = self.read_B[row : row + 1]
        self._binding(row, row + 1).begin(ids_BS, past_B, last_B, states_SW[None, :count])
        self.read_B[row] += count
        self.tokens[row], self.states[row] = tokens[count:], [states_SW[count:].copy()]

    def _binding(self, start: int, stop: int) -> DraftBinding:
        if (start, stop) not in self._bindings:
            self._bindings[start, stop] = self.backend.bind(self.caches, slice(start, stop))
        return self._bindings[start, stop]
