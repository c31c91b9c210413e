"""The back ends' protocols: a decoder with caches and a step over some of their rows, a draft, and a vision tower.

A session knows these alone; ONNX Runtime on the CPU and TensorRT on a GPU stand behind them.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...spec.draft import DraftSpec
from ...spec.geometry import ModelSpec
from ..shortlist import Row

Slots = dict[str, NDArray[Any]]
"""The contents of some positions of a row in each cache, by the cache's name."""


def cache_chunk(spec: ModelSpec, name: str) -> int:
    """Positions of a chunk in the cache of this name, `LAYER.key` or `LAYER.value`; 0 where attention is full."""
    return spec.layers[int(name.partition(".")[0])].chunk


def slots_of(chunk: int, start: int, stop: int) -> slice:
    """The slots of positions that lie in one chunk."""
    first = start % chunk if chunk else start
    return slice(first, first + stop - start)


def is_standing(chunk: int, start: int, past: int) -> bool:
    """Whether tokens after the first `past` attend to the one at `start`."""
    return not chunk or start // chunk == past // chunk


def standing(chunk: int, past: int) -> int:
    """Slots at a row's beginning that tokens after the first `past` attend to; a `chunk` of 0 is full attention."""
    return past % chunk if chunk else past


class Caches(Protocol):
    """KV buffers: the number of rows, and the positions that each holds."""

    batch: int
    positions: int

    def copy(self, source: int, target: int, past: int) -> None:
        """Copies a row that holds `past` tokens over another."""
        ...

    def read(self, row: int, start: int, stop: int) -> Slots:
        """Copies the contents of some positions of one chunk in a row."""
        ...

    def write(self, row: int, start: int, slots: Slots, past: int) -> None:
        """Puts back what `read` gave from `start` on; slots to which no token after `past` attends may be left out."""
        ...

    def row_bytes(self, tokens: int) -> int:
        """Bytes that a row takes at most while it holds this number of tokens."""
        ...

    def release(self, row: int) -> None:
        """Gives back the memory of a row that nobody has, where it was made sparse."""
        ...


class Binding(Protocol):
    """A decoder bound to some rows of its caches."""

    def step(
        self,
        ids_BS: NDArray[np.int64],
        past_B: NDArray[np.int32],
        positions_BR: NDArray[np.int64],
        features_MH: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Runs one piece and writes its keys and values to the caches.

        Args:
            ids_BS: Token ids, right-padded.
            past_B: Tokens in each row's cache before the piece.
            positions_BR: Positions of the piece that get logits.
            features_MH: Image features of the piece's image tokens, row by row; None where it has none.

        Returns:
            Logits [B, R, V].
        """
        ...

    def decode(self, ids_B1: NDArray[np.int64], past_B: NDArray[np.int32]) -> Sequence[Row]:
        """Runs a token of each row and writes its keys and values to the caches. Returns each row's logits after it."""
        ...


class StatesBinding(Binding, Protocol):
    """A decoder that also gives the hidden states that a draft reads."""

    def step_with_states(
        self,
        ids_BS: NDArray[np.int64],
        past_B: NDArray[np.int32],
        positions_BR: NDArray[np.int64],
        features_MH: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Runs one piece as `step` does. Returns logits [B, R, V], and the states behind each token [B, S, L·H]."""
        ...


class DraftBinding(Protocol):
    """A draft bound to some rows of its caches; a row's keys and values are written as a decoder's are."""

    def begin(
        self,
        ids_BS: NDArray[np.int64],
        past_B: NDArray[np.int32],
        last_B: NDArray[np.int64],
        states_BSW: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Reads tokens, each beside the decoder's state of the token before it.

        Args:
            ids_BS: Token ids, right-padded.
            past_B: Tokens in each row's cache before them.
            last_B: Each row's last token among them, behind which it guesses.
            states_BSW: The decoder's states [B, S, L·H].

        Returns:
            Logits [B, V'] over the draft's own tokens, and the states [B, H'] with which it goes on; until the next
            call of this.
        """
        ...

    def go_on(
        self, ids_B: NDArray[np.int64], past_B: NDArray[np.int32], hidden_BH: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Reads a guessed token of each row beside the state that it was guessed from.

        Returns:
            What `begin` returns, until the next call of this.
        """
        ...


class DraftBackend(Protocol):
    """A draft with its weights, loaded and ready to run."""

    spec: DraftSpec

    def caches(self, batch: int, positions: int, *, sparse: bool = False) -> Any:
        """Makes `Caches` of this back end, as a decoder does."""
        ...

    def bind(self, caches: Any, rows: slice) -> DraftBinding:
        """Binds some rows of caches that this back end made, for any number of steps."""
        ...


class DecoderBackend(Protocol):
    """A decoder with its weights, loaded and ready to run."""

    spec: ModelSpec

    @property
    def longest(self) -> int:
        """Tokens of a row's piece at most."""
        ...

    @property
    def longest_with_logits(self) -> int:
        """Tokens of a row's piece at most where each gets logits."""
        ...

    @property
    def most(self) -> int | None:
        """Tokens of a piece of several rows at most; None is no limit."""
        ...

    @property
    def takes_ragged(self) -> bool:
        """Whether a piece may hold several tokens of several rows whose caches are filled to different lengths."""
        ...

    @property
    def fault(self) -> str | None:
        """Why it computes nothing any more, in one line; None while it does."""
        ...

    def check_files(self) -> None:
        """Looks whether the files that are read in place are as they were; raises a `SessionError` where not."""
        ...

    def caches(self, batch: int, positions: int, *, sparse: bool = False) -> Any:
        """Makes `Caches` of this back end, zeros at first; sparse ones take memory only for tokens that rows hold.

        A back end that cannot do so makes the others, whose `row_bytes` is that of a whole row.
        """
        ...

    def bind(self, caches: Any, rows: slice) -> Binding:
        """Binds some rows of caches that this back end made, for any number of steps."""
        ...


class TowerBackend(Protocol):
    """A vision tower with its weights, loaded and ready to run."""

    def encode(self, pixels_N3PP: NDArray[np.float32]) -> NDArray[np.float32]:
        """Computes the image features [M, H] of normalised tiles, some tiles at a time."""
        ...
