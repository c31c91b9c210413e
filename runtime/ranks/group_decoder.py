"""A group of ranks as one decoder: rank 0 in a thread of this process, the others in processes of their own.

Enters: what a session asks of a decoder. Leaves: rank 0's answers; every rank has the same logits. Invariant: all ranks
do the same steps in the same order. So whatever interrupts a step's caller, the step is done to its end in the thread
that rank 0 is; and where a step fails on any rank, all end, since nobody can say what the others did.
"""

import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import SessionError, shortened_text
from ...spec.geometry import ModelSpec
from ..backends.interface import Binding, Caches, DecoderBackend, Slots
from ..shortlist import Row
from .followers import Followers, LostRankError
from .meeting import Meeting
from .segment import ENDED, FAILED, SAID, Segment

Result = TypeVar("Result")
AGAIN = "the group has ended, load it again"


class GroupDecoder:
    """A group of ranks.

    Args:
        group: The group's folder, for messages.
        spec: Geometry of the whole model.
        splits_caches: Whether each rank has some of the heads' keys and values, not all.
        cores: Processors that rank 0 is pinned to; None pins it nowhere.
        start: Starts the followers.
        open_local: Opens rank 0's decoder.
        meeting: Rank 0's part in the group.

    Raises:
        SessionError: A rank cannot be opened.
    """

    def __init__(
        self,
        group: Path,
        spec: ModelSpec,
        *,
        splits_caches: bool,
        cores: Iterable[int] | None,
        start: Callable[[], Followers],
        open_local: Callable[[], DecoderBackend],
        meeting: Meeting,
    ) -> None:
        self.group, self.spec, self.splits_caches, self.meeting = group, spec, splits_caches, meeting
        self.failure: str | None = None
        self.unused: deque[int] = deque()
        self.made = 0
        self.worker = ThreadPoolExecutor(1, "arriero-rank-0", _pin, (None if cores is None else tuple(cores),))
        self.followers = start()
        self.close = weakref.finalize(self, _end, self.followers, self.worker, meeting.segment)
        try:
            self.local = self.worker.submit(open_local).result()
            self.followers.receive()  # each says that it is ready
        except LostRankError as error:
            self.close()
            raise SessionError(f"{group}: {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def longest(self) -> int:
        """Tokens of a row's piece at most."""
        return self.local.longest

    @property
    def longest_with_logits(self) -> int:
        """Tokens of a row's piece at most where each gets logits."""
        return self.local.longest_with_logits

    takes_ragged = False

    @property
    def most(self) -> int | None:
        """Tokens of a piece of several rows at most; None is no limit."""
        return self.local.most

    @property
    def fault(self) -> str | None:
        """Why the group has ended; None while it has not."""
        if self.failure is None and (fault := self.meeting.segment.fault) is not None:
            why, rank = fault  # nothing is waited for: whoever asks has other things to do
            is_gone = rank and why == ENDED and self.followers.processes[rank - 1].poll() is not None
            return f"{self.group}: rank {rank} {self.followers.how_ended(rank) if is_gone else SAID[why]}; {AGAIN}"
        return self.failure

    @property
    def processes(self) -> list[int]:
        """The followers' process numbers."""
        return [process.pid for process in self.followers.processes]

    def check_files(self) -> None:
        """Looks on every rank whether the files that are read in place are as they were.

        Raises:
            SessionError: One is not, and the group has ended.
        """
        self.together(("check",), self.local.check_files)

    def caches(self, batch: int, positions: int, *, sparse: bool = False) -> "GroupCaches":
        """Makes caches on every rank."""
        self.made += 1
        number, command = self.made, ("caches", self.made, batch, positions, sparse)
        local = self.together(command, lambda: self.local.caches(batch, positions, sparse=sparse))
        return GroupCaches(self, number, local, batch, positions)

    def bind(self, caches: "GroupCaches", rows: slice) -> "GroupBinding":
        """Binds some rows of the caches, for any number of steps."""
        return GroupBinding(self, caches, rows)

    def together(self, commands: Sequence[tuple[Any, ...]] | tuple[Any, ...], own: Callable[[], Result]) -> Result:
        """Does something on every rank, on this one by `own`.

        Raises:
            SessionError: The group has ended, or ends now.
        """
        return self.worker.submit(self._together, commands, own, False).result()[0]

    def gathered(self, command: tuple[Any, ...], own: Callable[[], Result]) -> list[Result]:
        """Does something on every rank. Returns what each found, in their order.

        Raises:
            SessionError: The group has ended, or ends now.
        """
        return self.worker.submit(self._together, command, own, True).result()

    def _together(
        self, commands: Sequence[tuple[Any, ...]] | tuple[Any, ...], own: Callable[[], Result], answers: bool
    ) -> list[Result]:
        if self.failure is not None:
            raise SessionError(self.failure)
        try:
            while self.unused:
                self.followers.send(("drop", self.unused.popleft()))
            self.followers.send(commands)
            if self.meeting.identifier:  # on the CPU the sums see to that themselves
                self.followers.deadline = time.monotonic() + self.followers.patience
            found = [own()]
            self.followers.deadline = None
            if self.meeting.fault is not None:  # what a GPU gives that was freed from waiting is no result
                raise RuntimeError("a rank is lost")
            return found + self.followers.receive(patience=self.followers.patience) if answers else found
        except BaseException as error:
            self.failure = f"{self.group}: {self._reason(error)}; {AGAIN}"
            self.meeting.abort()  # where this thread learns of it first, nobody else does
            self.followers.kill()
            raise SessionError(self.failure) from error

    def _reason(self, error: BaseException) -> str:
        """The rank that is to blame, and for what: the first that ended the group, whoever fails in its wake."""
        fault = self.meeting.segment.fault
        if isinstance(error, LostRankError) and (fault is None or fault[1] == error.rank):
            return str(error)
        if fault is not None:
            return self._said(*fault)
        if (told := self.followers.last_words()) is not None:
            return f"rank {told[0]} has failed: {told[1]}"
        return f"rank 0 has failed: {shortened_text(str(error))}"

    def _said(self, why: int, rank: int) -> str:
        """A fault of the group in words; of a follower that has ended or failed, how it did."""
        if rank and why == ENDED:
            return str(self.followers.lost(rank))
        if rank and why == FAILED and (words := self.followers.words_of(rank)) is not None:
            return f"rank {rank} has failed: {words}"
        return f"rank {rank} {SAID[why]}"


class GroupCaches:
    """KV buffers of a batch of sequences, on every rank its heads'."""

    def __init__(self, decoder: GroupDecoder, number: int, local: Caches, batch: int, positions: int) -> None:
        self.decoder, self.number, self.local = decoder, number, local
        self.batch, self.positions = batch, positions
        weakref.finalize(self, decoder.unused.append, number)

    def copy(self, source: int, target: int, past: int) -> None:
        """Copies a row that holds `past` tokens over another."""
        command = ("copy", self.number, source, target, past)
        self.decoder.together(command, lambda: self.local.copy(source, target, past))

    def read(self, row: int, start: int, stop: int) -> Slots:
        """Copies the contents of some positions of one chunk in a row, of all heads."""
        if not self.decoder.splits_caches:
            return self.decoder.worker.submit(self.local.read, row, start, stop).result()
        command = ("read", self.number, row, start, stop)
        found = self.decoder.gathered(command, lambda: self.local.read(row, start, stop))
        return {name: np.concatenate([slots[name] for slots in found]) for name in found[0]}

    def write(self, row: int, start: int, slots: Slots, past: int) -> None:
        """Puts back what `read` gave, on each rank its heads'."""
        ranks = len(self.decoder.followers.processes) + 1
        parts = [slots] * ranks
        if self.decoder.splits_caches:
            cut = {name: np.split(values, ranks) for name, values in slots.items()}
            parts = [{name: values[rank] for name, values in cut.items()} for rank in range(ranks)]
        commands = [("write", self.number, row, start, part, past) for part in parts[1:]]
        self.decoder.together(commands, lambda: self.local.write(row, start, parts[0], past))

    def row_bytes(self, tokens: int) -> int:
        """Bytes that a row takes at most on all ranks together, while it holds this number of tokens."""
        return (len(self.decoder.followers.processes) + 1) * self.local.row_bytes(tokens)

    def release(self, row: int) -> None:
        """Gives back the memory of a row that nobody has, on every rank."""
        self.decoder.together(("release", self.number, row), lambda: self.local.release(row))


class GroupBinding:
    """A group's decoder bound to some rows of its caches."""

    def __init__(self, decoder: GroupDecoder, caches: GroupCaches, rows: slice) -> None:
        self.decoder, self.caches, self.rows = decoder, caches, rows
        self.local: Binding | None = None

    def step(
        self,
        ids_BS: NDArray[np.int64],
        past_B: NDArray[np.int32],
        positions_BR: NDArray[np.int64],
        features_MH: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Runs one piece on every rank."""
        positions_BR = np.ascontiguousarray(positions_BR)
        inputs = (ids_BS, past_B.copy(), positions_BR, features_MH)  # the caller's lengths go on, if it is interrupted
        return self._together("step", inputs, lambda local: local.step(*inputs))

    def decode(self, ids_B1: NDArray[np.int64], past_B: NDArray[np.int32]) -> Sequence[Row]:
        """Runs a token of each row on every rank."""
        inputs = (ids_B1, past_B.copy())
        return self._together("decode", inputs, lambda local: local.decode(*inputs))

    def _together(self, name: str, inputs: tuple[Any, ...], run: Callable[[Binding], Result]) -> Result:
        def own() -> Result:
            if self.local is None:
                self.local = self.decoder.local.bind(self.caches.local, self.rows)
            self.decoder.meeting.arrive()
            return run(self.local)

        rows = (self.rows.start, self.rows.stop)
        return self.decoder.together((name, self.caches.number, rows, *inputs), own)


def _pin(cores: tuple[int, ...] | None) -> None:
    """Pins the thread that rank 0 is; the threads that its session makes inherit that."""
    if cores is not None:
        os.sched_setaffinity(0, cores)


def _end(followers: Followers, worker: ThreadPoolExecutor, segment: Segment) -> None:
    """Ends a group that nobody uses any more."""
    followers.close()
    worker.shutdown(wait=False)
    segment.close()
