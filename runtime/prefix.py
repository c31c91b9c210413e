"""Beginnings that sequences share: their keys and values, kept in blocks of tokens beside the sequences' own caches.

Enters: rows of a state as they fill. Leaves: the longest beginning of a prompt that is known, put into a row; only the
rest is computed. A block is known by its tokens, image features and all that came before it; sequences that begin alike
share it. Blocks that were used longest ago go first, a sequence's end before its beginning.

Invariants: no block crosses a boundary of the chunks, and none is read after later tokens took its slots; the bytes of
all blocks stay within the limit. Sequences of several threads find and keep blocks one after another.
"""

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .backends.interface import Slots
from .state import State

BLOCK = 32
"""Tokens of a block, where chunks are multiples of it."""


class BlockWatch(Protocol):
    """Whoever wants to know which blocks are kept, a router's index say. It is called while the lock is held."""

    def stored(self, parent: bytes | None, key: bytes, tokens: Sequence[int]) -> None:
        """A block is kept behind its parent, None at a sequence's beginning; no image stands before its end."""
        ...

    def removed(self, key: bytes) -> None:
        """A block is kept no more, whether its keeping was announced or not."""
        ...


class Prefixes:
    """The blocks of a session.

    Args:
        chunk: Positions of a chunk; 0 where there are none.
        limit: Bytes of keys and values at most; 0 keeps nothing.
        lock: Held while blocks are looked for, put into a row, or kept: the session's; None is one of their own.

    Attributes:
        watch: Hears of blocks that are kept and removed.
    """

    def __init__(self, chunk: int, limit: int, lock: "threading.RLock | None" = None) -> None:
        self.chunk, self.limit, self.lock = chunk, limit, lock or threading.RLock()
        self.block = math.gcd(chunk, BLOCK)
        self.blocks: OrderedDict[bytes, Slots] = OrderedDict()  # the one used longest ago first
        self.size = 0
        self.watch: BlockWatch | None = None

    def find(self, keys: Sequence[bytes]) -> int:
        """Counts the blocks of a sequence that are known, from its beginning."""
        return next((index for index, key in enumerate(keys) if key not in self.blocks), len(keys))

    def add(self, key: bytes, slots: Slots, chain: set[bytes]) -> bool:
        """Keeps a block where there is room, or something older than its own chain. Returns whether it is kept."""
        if key in self.blocks:
            return True
        size = total(slots)
        while self.size + size > self.limit:
            oldest = next(iter(self.blocks), None)
            if oldest is None or oldest in chain:
                return False
            self.size -= total(self.blocks.pop(oldest))
            if self.watch is not None:
                self.watch.removed(oldest)
        self.blocks[key] = slots
        self.size += size
        return True

    def touch(self, keys: Sequence[bytes]) -> None:
        """Marks blocks as just used, the first as the last to go."""
        for key in reversed(keys):
            self.blocks.move_to_end(key)


class Trail:
    """One sequence among the blocks.

    Args:
        prefixes: The session's.
        image_token: Id of the token that stands for an image feature; None where the model takes no images.
        features_MH: The features of the sequence's images; None where it has none.
        scope: Sequences of one scope share beginnings, those of others do not.

    Attributes:
        reused: Tokens that were put into its row, not computed.
    """

    def __init__(
        self,
        prefixes: Prefixes,
        image_token: int | None = None,
        features_MH: NDArray[np.float32] | None = None,
        scope: bytes = b"",
    ) -> None:
        self.prefixes, self.image_token, self.features_MH, self.scope = prefixes, image_token, features_MH, scope
        self.keys: list[bytes] = []
        self.used = self.reused = 0

    def fork(self) -> "Trail":
        """The trail of another sequence that has begun alike."""
        other = Trail(self.prefixes, self.image_token, self.features_MH, self.scope)
        other.keys, other.used = list(self.keys), self.used
        return other

    def restore(self, state: State, row: int, ids: Sequence[int]) -> int:
        """Puts the known beginning of a sequence into an empty row, all but its last token at most.

        Returns:
            Tokens that the row holds then.
        """
        if not self.prefixes.limit:
            return 0
        keys = self._chain(ids, len(ids) - 1)
        with self.prefixes.lock:
            keys = keys[: self.prefixes.find(keys)]
            size = self.prefixes.block
            self.reused = len(keys) * size
            state.restore(row, [self.prefixes.blocks[key] for key in keys], size)
            self.prefixes.touch(keys)
        return self.reused

    def keep(self, state: State, row: int, ids: Sequence[int]) -> None:
        """Keeps the blocks that are whole in a row and not known yet.

        Args:
            state: The state that holds the sequence.
            row: Its row.
            ids: Its tokens, at least those that the row holds.
        """
        if self.prefixes.limit:
            with self.prefixes.lock:
                self._keep(state, row, ids, self._chain(ids, int(state.past_B[row])))

    def _keep(self, state: State, row: int, ids: Sequence[int], keys: list[bytes]) -> None:
        """Keeps the blocks of these keys, the row's own from its beginning."""
        past, chunk, size = int(state.past_B[row]), self.prefixes.chunk, self.prefixes.block
        known = self.prefixes.find(keys)
        self.prefixes.touch(keys[:known])
        standing = (past - 1) // chunk * chunk if chunk else 0
        if known * size < standing:
            return  # the block that would come next is overwritten
        chain = set(keys)
        for index in range(known, len(keys)):
            slots = state.caches.read(row + state.first, index * size, (index + 1) * size)
            if not self.prefixes.add(keys[index], slots, chain):
                break
            known += 1
            self._tell(keys, index, ids)
        self.prefixes.touch(keys[:known])

    def _tell(self, keys: list[bytes], index: int, ids: Sequence[int]) -> None:
        """Tells of a block that is kept, where it and those before it are text alone: of images, ids say nothing."""
        watch, stop = self.prefixes.watch, (index + 1) * self.prefixes.block
        if watch is not None and (self.features_MH is None or self.image_token not in ids[:stop]):
            parent = keys[index - 1] if index else None
            watch.stored(parent, keys[index], [int(token) for token in ids[stop - self.prefixes.block : stop]])

    def follow(self, state: State, row: int, ids: Sequence[int]) -> None:
        """Keeps the blocks that the next token would overwrite; to be called after every step."""
        if self.prefixes.limit and self.prefixes.chunk and state.past_B[row] % self.prefixes.chunk == 0:
            self.keep(state, row, ids)

    def _chain(self, ids: Sequence[int], count: int) -> list[bytes]:
        """The keys of the whole blocks among the first `count` tokens."""
        size = self.prefixes.block
        while len(self.keys) < count // size:
            start = len(self.keys) * size
            tokens = np.asarray(ids[start : start + size], dtype=np.int64)
            key = hashlib.sha256(self.keys[-1] if self.keys else self.scope)
            key.update(tokens.tobytes())
            seen = 0 if self.image_token is None else int(np.count_nonzero(tokens == self.image_token))
            if seen and self.features_MH is not None:
                key.update(self.features_MH[self.used : self.used + seen].tobytes())
                self.used += seen
            self.keys.append(key.digest())
        return self.keys[: count // size]


def total(slots: Slots) -> int:
    """Bytes of a block."""
    return sum(each.nbytes for each in slots.values())
