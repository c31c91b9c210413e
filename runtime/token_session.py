"""A loaded model in tokens: a stateful step over a batch of sequences (`start`, `prefill`, `extend`, `decode`).

Enters: token ids, and tiles of images. Leaves: logits in float32; `logits` and `score` are written with the step.
Invariants: it knows nothing of text, so that who speaks to it in token ids needs no tokenizer. Threads may share a
session: each step, and each look at what the session keeps for all, holds `lock`, so that they go one after another.
A `State` belongs to one thread at a time.
"""

import threading
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import SessionError, shortened
from ..spec.geometry import ModelSpec
from ..spec.parameters import count_parameters
from .backends.interface import DecoderBackend
from .checks import array, is_whole, whole
from .draft import Draft
from .draft_costs import DraftCosts
from .images.features import Features, RowFeatures
from .images.tower import Tower
from .pieces import cut
from .prefix import Prefixes
from .room import check_fits
from .shortlist import Row
from .state import Limits, State
from .step_errors import one_step

USUAL_DRAFT = 5
"""Tokens that a draft guesses at most where nobody says."""


class TokenSession:
    """A loaded model, in tokens.

    Args:
        decoder: The decoder on its back end.
        limits: Positions and rows that the session holds at most.
        tower: The vision tower; None where the model takes no images.
        prefix_bytes: Keys and values of earlier prompts to keep for those that begin alike; 0 keeps none.
        draft: The head that drafts tokens; None where the model has none.
    """

    def __init__(
        self,
        decoder: DecoderBackend,
        limits: Limits,
        tower: Tower | None = None,
        prefix_bytes: int = 0,
        draft: Draft | None = None,
    ) -> None:
        self.decoder, self.tower, self.draft = decoder, tower, draft
        self.limits, self.max_seq, self.max_batch = limits, limits.max_seq, limits.max_batch
        self.lock = threading.RLock()
        self.costs = DraftCosts(0.0 if draft is None else share_of_step(draft, decoder.spec))
        self.prefixes = Prefixes(decoder.spec.chunk, prefix_bytes, self.lock)

    @property
    def spec(self) -> ModelSpec:
        """The model's geometry."""
        return self.decoder.spec

    @property
    def fault(self) -> str | None:
        """Why the session computes nothing any more, whatever it is asked; None while it does."""
        return self.decoder.fault

    @property
    def image_token(self) -> int | None:
        """Id of the token that stands for an image feature; None where the model takes no images."""
        return None if self.tower is None else self.tower.spec.image_token

    @property
    def usual_draft(self) -> int:
        """Tokens that the model's draft guesses at most at a time where nobody says; 0 where it has none."""
        return 0 if self.draft is None else USUAL_DRAFT

    def start(
        self, batch: int = 1, positions: int | None = None, *, sparse: bool = False, drafted: bool = False
    ) -> State:
        """Starts sequences of no tokens.

        Args:
            batch: Number of rows.
            positions: Tokens that each row can hold; None takes `max_seq`.
            sparse: Whether a row takes memory for the tokens that it holds, where the back end can do so, and not for
                all that it could.
            drafted: Whether the model's draft, where it has one, follows the rows, with caches of its own.

        Raises:
            SessionError: The session does not hold that many rows or tokens.
        """
        expected = "a whole number from 1 up"
        batch = whole("batch", batch, expected, least=1)
        positions = None if positions is None else whole("positions", positions, expected, least=1)
        if self.max_batch is not None and batch > self.max_batch:
            raise SessionError(f"{batch} rows are more than max_batch {self.max_batch}: load with a larger one")
        positions = self.max_seq if positions is None else positions
        if positions > self.max_seq:
            limit = f"the model's context is {self.spec.max_positions}"
            raise SessionError(f"{positions} tokens are more than max_seq {self.max_seq}: load with more ({limit})")
        with self.lock:
            return State(self.decoder, batch, positions, sparse=sparse, draft=self.draft if drafted else None)

    def prefill(self, state: State, rows: Sequence[Sequence[int]], features: Features = ()) -> NDArray[np.float32]:
        """Adds tokens to each row, at least one; the arguments are those of `extend`.

        Returns:
            The logits [B, V] after each row's last token.
        """
        if not all(_counts(rows)):
            raise SessionError(f"expected tokens for each of {len(rows)} rows")
        logits_BV = np.empty((len(rows), self.spec.vocab_size), dtype=np.float32)
        for row, _, logits_SV in self._run(state, rows, features, last_only=True):
            logits_BV[row] = logits_SV[-1]
        return logits_BV

    def extend(
        self, state: State, rows: Sequence[Sequence[int]], features: Features = ()
    ) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Adds tokens to each row; a row that holds some already may get none.

        Args:
            state: The sequences.
            rows: Each row's new tokens.
            features: Each row's image features [M, H], one for each image token among the new ones; empty where no row
                has any.

        Yields:
            Row, the number of its new tokens before these, and logits [S, V] after each of the next S. These come in
            pieces: only one piece's logits are in memory, however many tokens there are.
        """
        return self._run(state, rows, features, last_only=False)

    def verify(self, state: State, rows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Adds some tokens to each row, at least one, in one step where the back end takes rows of any lengths.

        Args:
            state: The sequences; in no row do as many tokens as the longest has cross a chunk's boundary or the end of
                its caches.
            rows: Each row's new tokens: the newest, and those that are guessed behind it.

        Returns:
            Each row's logits [S, V] after its new tokens.
        """
        if not self.decoder.takes_ragged:
            found: list[list[NDArray[np.float32]]] = [[] for _ in rows]
            for row, _, logits_SV in self.extend(state, rows):
                found[row].append(logits_SV)
            return [np.concatenate(each) for each in found]
        self._check_rows(state, rows)
        lengths_B = np.array(_counts(rows), np.int32)
        ids_BS = np.zeros((len(rows), lengths_B.max()), np.int64)
        for row, tokens in enumerate(rows):
            ids_BS[row, : len(tokens)] = tokens
        positions_BR = np.broadcast_to(np.arange(ids_BS.shape[1], dtype=np.int64), ids_BS.shape)
        run = partial(state.run, slice(0, len(rows)), ids_BS, positions_BR, lengths_B)
        with self.lock, one_step():
            logits_BRV = self.costs.of_tokens(len(rows), int(lengths_B.sum()) - len(rows), run)
        return [logits_RV[:length] for logits_RV, length in zip(logits_BRV, lengths_B.tolist(), strict=True)]

    def decode(self, state: State, tokens_B: Sequence[int]) -> NDArray[np.float32]:
        """Adds one token to every row. Returns the logits [B, V] after it."""
        ids_B1 = self._next_ids(state, tokens_B)
        with self.lock, one_step():
            logits = state.run(slice(0, len(ids_B1)), ids_B1, np.zeros_like(ids_B1), np.ones_like(state.past_B))
        return logits[:, 0]

    def decode_rows(self, state: State, tokens_B: Sequence[int]) -> Sequence[Row]:
        """Adds one token to every row. Returns each row's logits after it, of a GPU those that a draw looks at."""
        if state.followed is None:
            return self._decode_rows(state, tokens_B)
        decode = self.decode if state.is_followed else self._decode_rows
        with self.lock:
            return list(self.costs.of_tokens(len(tokens_B), 0, partial(decode, state, tokens_B)))

    def _decode_rows(self, state: State, tokens_B: Sequence[int]) -> Sequence[Row]:
        ids_B1 = self._next_ids(state, tokens_B)
        with self.lock, one_step():
            rows = state.binding(slice(0, len(ids_B1))).decode(ids_B1, state.past_B)
            state.past_B += 1
        return rows

    def _next_ids(self, state: State, tokens_B: Sequence[int]) -> NDArray[np.int64]:
        """Checks a token for each row. Returns them as a piece [B, 1]."""
        if (found := array(tokens_B)).shape != (state.batch,):
            raise SessionError(f"{found.size} tokens for {state.batch} rows: give each row one")
        if int(state.past_B.max()) >= state.caches.positions:
            raise SessionError(f"a sequence is full at {state.caches.positions} tokens: start it with more positions")
        self.check_ids(tokens_B)
        return np.asarray(tokens_B, dtype=np.int64)[:, None]

    def logits(self, ids_BS: ArrayLike, lengths_B: ArrayLike | None = None) -> NDArray[np.float32]:
        """Teacher-forced logits of whole sequences.

        Args:
            ids_BS: Token ids [B, S], right-padded where rows are shorter.
            lengths_B: Number of real tokens of each row, 1 to S; None is all.

        Returns:
            Logits [B, S, V] in float32, after each token; zeros at pads.

        Raises:
            SessionError: Wrong shapes, ids outside the vocabulary, or more tokens than the session holds.
        """
        ids = array(ids_BS)
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            found = f"{ids.dtype} {list(ids.shape)}" if ids.ndim else shortened(ids_BS)
            raise SessionError(f"ids are {found}, expected whole numbers [B, S]")
        batch, length = ids.shape
        state = self.start(batch, length)
        needed = 4 * batch * length * self.spec.vocab_size
        check_fits(f"logits of {batch} rows of {length} tokens", needed, "take them piece by piece (score)")
        lengths = np.full(batch, length) if lengths_B is None else array(lengths_B)
        are_whole = lengths.shape == (batch,) and np.issubdtype(lengths.dtype, np.integer)
        if not are_whole or lengths.min() < 1 or lengths.max() > length:
            raise SessionError(f"lengths are {lengths.tolist()}, expected {batch} numbers from 1 to {length}")
        logits_BSV = np.zeros((batch, length, self.spec.vocab_size), dtype=np.float32)
        rows = [row[:count].tolist() for row, count in zip(ids, lengths, strict=True)]
        for row, start, logits_SV in self._run(state, rows, (), last_only=False):
            logits_BSV[row, start : start + len(logits_SV)] = logits_SV
        return logits_BSV

    def score(
        self, ids: Sequence[int], decoded: int = 0, features_MH: NDArray[np.float32] | None = None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Teacher-forced logits of one sequence piece by piece, so that a long one's need not fit in memory.

        Args:
            ids: Token ids.
            decoded: Number of the last tokens that run one at a time, as in generation; those before are prefilled.
                A decoded token is never an image's.
            features_MH: The features of its images; None where it has none.

        Yields:
            The number of a piece's first token, and logits [S, V] after each of its tokens.
        """
        decoded = whole("decoded", decoded)
        if not decoded < len(ids):
            raise SessionError(f"{decoded} of {len(ids)} tokens are to be decoded: one at least is prefilled")
        state, prefilled = self.start(1, len(ids)), len(ids) - decoded
        features = () if features_MH is None else [features_MH]
        for _, start, logits_SV in self.extend(state, [ids[:prefilled]], features):
            yield start, logits_SV
        for at in range(prefilled, len(ids)):
            yield at, self.decode(state, [ids[at]])

    def encode(self, pixels_N3PP: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        """Computes the image features [M, H] of tiles [N, 3, P, P]; None where there are none."""
        if pixels_N3PP is None or not len(pixels_N3PP):
            return None
        assert self.tower is not None
        with self.lock, one_step():
            return self.tower.encode(pixels_N3PP)

    def _run(
        self, state: State, rows: Sequence[Sequence[int]], features: Features, *, last_only: bool
    ) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Adds tokens piece by piece.

        Yields:
            Row, the number of its new tokens before the piece, and logits [S, V] of the piece's tokens (of its last
            one only where `last_only`; then only those of the last piece count).
        """
        self._check_rows(state, rows)
        given = RowFeatures(rows, features, self.image_token, self.spec.hidden_size)
        done, new = [0] * len(rows), [len(row) for row in rows]
        longest = self.decoder.longest if last_only else self.decoder.longest_with_logits
        for piece in cut(state.past_B.tolist(), new, self.spec.chunk, longest, self.decoder.most):
            first, width = piece.rows.start, max(piece.lengths)
            ids_BS = np.zeros((len(piece.lengths), width), dtype=np.int64)
            for index, length in enumerate(piece.lengths):
                start = done[first + index]
                ids_BS[index, :length] = rows[first + index][start : start + length]
            lengths_B = np.array(piece.lengths, dtype=np.int32)
            positions_BR = (
                lengths_B[:, None].astype(np.int64) - 1
                if last_only
                else np.broadcast_to(np.arange(width, dtype=np.int64), ids_BS.shape)
            )
            features_MH = given.take(piece.rows, ids_BS)
            with self.lock, one_step():
                logits = state.run(piece.rows, ids_BS, positions_BR, lengths_B, features_MH)
            for index, length in enumerate(piece.lengths):
                yield first + index, done[first + index], logits[index] if last_only else logits[index, :length]
                done[first + index] += length

    def _check_rows(self, state: State, rows: Sequence[Sequence[int]]) -> None:
        """Refuses new tokens that are not in the vocabulary, that a row has no place for, or that are none at all."""
        held = zip(_counts(rows), state.past_B, strict=False)
        if len(rows) != state.batch or not all(count or past for count, past in held):
            raise SessionError(f"expected tokens for each of {state.batch} rows")
        for row, tokens in enumerate(rows):
            if len(tokens):
                self.check_ids(tokens)
            total = int(state.past_B[row]) + len(tokens)
            if total > state.caches.positions:
                raise SessionError(f"row {row} would have {total} tokens, its caches hold {state.caches.positions}")

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises a `SessionError` where a token is not in the vocabulary; `ids` are one or more."""
        ids_S = array(ids)
        if ids_S.ndim != 1 or not is_whole(ids_S):
            raise SessionError(f"token ids are {shortened(ids)}, expected a list of whole numbers")
        if outside := [token for token in (ids_S.min(), ids_S.max()) if not 0 <= token < self.spec.vocab_size]:
            said = shortened(int(outside[0]))
            raise SessionError(f"token id {said} is outside the vocabulary of {self.spec.vocab_size}")


def share_of_step(draft: Draft, spec: ModelSpec) -> float:
    """A draft's step in steps of the model, by the parameters that each reads, as long as none was timed.

    The head's embedding, which it does not multiply by, is counted in place of the products that its first layer has
    more than a Llama's.
    """
    head = draft.backend.spec.as_model(spec.max_positions)
    return count_parameters(head)[1] / count_parameters(spec)[1]


def _counts(rows: Sequence[Sequence[int]]) -> list[int]:
    """The number of tokens of each row."""
    try:
        return [len(row) for row in rows]
    except TypeError as error:
        raise SessionError(f"rows are {shortened(rows)}, expected a list of token ids for each") from error
