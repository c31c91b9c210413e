"""What a session asks of an engine: caches for a batch, and a step over some of their rows."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...spec.geometry import ModelSpec

Slots = dict[str, NDArray[Any]]
"""What some positions of a row have in each cache, by the cache's name."""


def cache_chunk(spec: ModelSpec, name: str) -> int:
    """Positions of a chunk in the cache of this name, `LAYER.key` or `LAYER.value`; 0 where attention is full."""
    return spec.layers[int(name.partition(".")[0])].chunk


def slots_of(chunk: int, start: int, stop: int) -> slice:
    """The slots of positions that lie in one chunk."""
    first = start % chunk if chunk else start
    return slice(first, first + stop - start)


def is_standing(chunk: int, start: int, past: int) -> bool:
    """Whether what follows the first `past` tokens attends to the one at `start`."""
    return not chunk or start // chunk == past // chunk


def standing(chunk: int, past: int) -> int:
    """Slots of a row that later tokens attend to, the first ones, when it holds so many tokens; 0 is no chunk."""
    return past % chunk if chunk else past


class Caches(Protocol):
    """KV buffers: how many rows, and how many positions each holds."""

    batch: int
    positions: int

    def copy(self, source: int, target: int, past: int) -> None:
        """Copies a row that holds so many tokens over another."""
        ...

    def read(self, row: int, start: int, stop: int) -> Slots:
        """A copy of what some positions of one chunk have in a row."""
        ...

    def write(self, row: int, start: int, slots: Slots, past: int) -> None:
        """Puts back what `read` gave from `start` on; what is not attended to after `past` tokens may be left out."""
        ...


class Binding(Protocol):
    """An engine bound to some rows of the caches."""

    def step(
        self,
        ids_BS: NDArray[np.int64],
        past_B: NDArray[np.int32],
        positions_BR: NDArray[np.int64],
        features_MH: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Runs one piece and writes it to the caches. Returns logits [B, R, V] of the positions asked for."""
        ...


class Decoding(Protocol):
    """A loaded engine: ONNX Runtime's graph or TensorRT's."""

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

    def caches(self, batch: int, positions: int) -> Any:
        """KV buffers for a batch whose rows hold so many positions."""
        ...

    def bind(self, caches: Any, rows: slice) -> Binding:
        """Binds some rows of the caches, for any number of steps."""
        ...
