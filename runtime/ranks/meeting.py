"""The place where the ranks of a group meet: memory that they share, and on GPUs a communicator besides.

Enters: the group's memory, and on GPUs the identifier of the communicator. Leaves: what a rank's decoder is given of
them, and one line on why a group has ended. Invariant: who waits for a rank that is gone, or does not answer, is freed.
"""

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

from ...errors import SessionError
from .nccl import Communicator, Nccl
from .segment import ENDED, SAID, SILENT, Segment

READY_LOOK = 0.01
"""Seconds after which a rank looks again whether the others are there."""


@dataclass(kw_only=True, slots=True)
class Meeting:
    """A rank's part in a group.

    Attributes:
        segment: The memory that the ranks share.
        rank: This rank.
        ranks: Ranks of the group.
        identifier: Identifier of the communicator; empty on the CPU.
        communicator: The communicator, once this rank has joined.
    """

    segment: Segment
    rank: int
    ranks: int
    identifier: bytes = b""
    communicator: Communicator | None = field(default=None)

    def join(self) -> Any:
        """Joins the other ranks' GPUs. Returns the communicator as TensorRT takes it.

        NCCL waits for all ranks without end, so this one waits first until all of them are there.

        Raises:
            SessionError: One of them has ended or failed.
        """
        self.segment.say_ready(self.rank)
        while not all(self.segment.is_ready(rank) for rank in range(self.ranks)):
            if self.fault is not None:
                raise SessionError(self.fault)
            time.sleep(READY_LOOK)
        self.communicator = Communicator(Nccl(), self.identifier, self.ranks, self.rank)
        return self.communicator.capsule()

    def arrive(self) -> None:
        """Says on a GPU that this rank begins a step; on the CPU the sums say so themselves."""
        if self.identifier:
            self.segment.begin_step(self.rank)

    def lost(self, rank: int) -> None:
        """Ends the group since a rank has ended."""
        self.end(ENDED, rank)

    def silent(self) -> None:
        """Ends the group since a rank does not answer: the one that is behind the others."""
        begun = [self.segment.steps_begun(rank) for rank in range(self.ranks)]
        behind = begun.index(min(begun))
        self.end(SILENT, behind if min(begun) < max(begun) else (self.rank + 1) % self.ranks)

    def end(self, why: int, rank: int) -> None:
        """Ends the group, and what a GPU waits for."""
        self.segment.end(why, rank)
        self.abort()

    def abort(self) -> None:
        """Ends what a GPU waits for."""
        if self.communicator is not None:
            with contextlib.suppress(SessionError):
                self.communicator.abort()

    @property
    def fault(self) -> str | None:
        """Why the group has ended; None while it has not."""
        found = self.segment.fault
        return None if found is None else f"rank {found[1]} {SAID[found[0]]}"
