"""The memory that the ranks of a group on the CPU share, in which they meet to add up what each computed.

It lies in no file system and goes with the last process that has it. `plugins/cpu/all_reduce_op.h` says how it is laid
out; this module makes it, tells who is who, and writes and reads the one word that says why a group has ended.
"""

import contextlib
import mmap
import os
import struct
import sys
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ...errors import SessionError

MAGIC = 0x31736B6E61526F41
HEAD, LINE, MOST_RANKS = 4096, 128, 64
CAPACITY = 1 << 16
"""Values of a slot: more go in several turns. Two sets of slots of two ranks take 1 MiB, which stays in a cache."""

SPINS = 4000
"""Looks at another rank, some tens of microseconds, before a rank sleeps."""

ENDED, SILENT, OTHER_STEP, FAILED = 1, 2, 3, 4
SAID = {ENDED: "has ended", SILENT: "does not answer", OTHER_STEP: "computes another step", FAILED: "has failed"}
"""The reasons for which a group ends."""

HEADER = struct.Struct("<QIIQII")
FAULT_AT, PROCESS_AT, READY_AT, BEGUN_AT = 28, 8, 12, 32


class Segment:
    """Shared memory of a group.

    Args:
        descriptor: File descriptor of the memory.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.map = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self.map, np.uint8)

    @classmethod
    def create(cls, ranks: int, patience: float, *, spins: int = SPINS, capacity: int = CAPACITY) -> Self:
        """Makes the memory of a group.

        Args:
            ranks: Ranks of the group.
            patience: Seconds that a rank waits for another that is alive.
            spins: Looks before a rank sleeps; none is best where ranks share processors.
            capacity: Values of a slot.

        Raises:
            SessionError: This is no Linux, or there are too many ranks.
        """
        if sys.platform != "linux":
            raise SessionError("a group of ranks runs on Linux only: run the whole model in one process here")
        if ranks > MOST_RANKS:
            raise SessionError(f"a group of {ranks} ranks does not run on the CPU, which takes {MOST_RANKS} at most")
        descriptor = os.memfd_create("arriero-ranks", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, HEAD + MOST_RANKS * LINE + 2 * ranks * capacity * 4)
        made = cls(descriptor)
        HEADER.pack_into(made.map, 0, MAGIC, ranks, spins, capacity, max(1, round(patience * 10)), 0)
        return made

    def join(self, rank: int) -> None:
        """Says that this process is a rank."""
        struct.pack_into("<i", self.map, HEAD + rank * LINE + PROCESS_AT, os.getpid())

    def process(self, rank: int) -> int:
        """The process that is a rank; 0 where none has said so."""
        return int(struct.unpack_from("<i", self.map, HEAD + rank * LINE + PROCESS_AT)[0])

    def say_ready(self, rank: int) -> None:
        """Says that a rank has loaded all that it needs."""
        struct.pack_into("<I", self.map, HEAD + rank * LINE + READY_AT, 1)

    def is_ready(self, rank: int) -> bool:
        """Whether a rank has said so."""
        return bool(struct.unpack_from("<I", self.map, HEAD + rank * LINE + READY_AT)[0])

    def begin_step(self, rank: int) -> None:
        """Says that a rank on a GPU begins a step; turns of the CPU's sums are counted apart."""
        struct.pack_into("<I", self.map, HEAD + rank * LINE + BEGUN_AT, self.steps_begun(rank) + 1 & 0xFFFFFFFF)

    def steps_begun(self, rank: int) -> int:
        """Steps that a rank has begun."""
        return int(struct.unpack_from("<I", self.map, HEAD + rank * LINE + BEGUN_AT)[0])

    def end(self, why: int, rank: int) -> None:
        """Ends the group, if nothing has ended it yet: whoever waits learns of it within a tenth of a second."""
        if self.fault is None:
            struct.pack_into("<I", self.map, FAULT_AT, why << 16 | rank)

    @property
    def fault(self) -> tuple[int, int] | None:
        """Why the group has ended, and the rank that it is about; None while it has not."""
        (word,) = struct.unpack_from("<I", self.map, FAULT_AT)
        return (word >> 16, word & 0xFFFF) if word else None

    def close(self) -> None:
        """Closes the descriptor; the memory stays as long as somebody reads it."""
        with contextlib.suppress(OSError):
            os.close(self.descriptor)
