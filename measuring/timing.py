"""A session timed: prompts read and tokens decoded at several lengths and batches, and how fast memory can be read.

Enters: a session. Leaves: seconds and bytes a second. Tokens are drawn at random from the whole vocabulary, in decoding
too: a continuation that repeats itself would ask the same experts again and again.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files.machine_memory import find_room
from ..runtime.session import Session

STREAM_SIZE = 1 << 30
"""Bytes that are read to measure the memory: far above any cache, where the machine has so much free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One prompt length and one batch: rows of `length` tokens each."""

    length: int
    batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One run of a case.

    Attributes:
        first: Seconds from the token ids to every row's first new token, the caches' allocation included.
        step: Seconds of one decode step, the mean over the run's.
    """

    first: float
    step: float


class Stream:
    """A buffer read from end to end, each thread its own part.

    Args:
        threads: Threads that read.
        size: Bytes of the buffer; a quarter of the free memory at most.
    """

    def __init__(self, threads: int, size: int = STREAM_SIZE) -> None:
        count = min(size, find_room().free // 4) // 4
        self.parts = np.array_split(np.ones(count, dtype=np.float32), threads)
        self.size = count * 4
        self.pool = ThreadPoolExecutor(threads)

    def read(self) -> float:
        """Reads the buffer once. Returns bytes a second; numpy's maximum of float32 is bound by the memory alone."""
        started = time.perf_counter()
        list(self.pool.map(np.max, self.parts))
        return self.size / (time.perf_counter() - started)


def time_case(session: Session, case: Case, decode_tokens: int) -> Reading:
    """Prefills a batch of prompts and decodes `decode_tokens` tokens, the likeliest chosen at each step.

    Raises:
        SessionError: The session does not hold the rows or tokens.
    """
    started = time.perf_counter()
    state = session.start(case.batch, case.length + decode_tokens)  # before the prompts, which may be too many as well
    starting = time.perf_counter() - started
    rng = np.random.default_rng(0)
    vocabulary = session.spec.vocab_size
    rows = rng.integers(0, vocabulary, (case.batch, case.length)).tolist()
    steps: Sequence[list[int]] = rng.integers(0, vocabulary, (decode_tokens, case.batch)).tolist()
    started = time.perf_counter()
    session.prefill(state, rows).argmax(-1)
    first = starting + time.perf_counter() - started
    started = time.perf_counter()
    for tokens_B in steps:
        session.decode(state, tokens_B).argmax(-1)
    return Reading(first=first, step=(time.perf_counter() - started) / decode_tokens)


def peak_memory(others: Iterable[int] = ()) -> int:
    """The largest resident set that this process has had, in bytes; 0 where the system does not say.

    Args:
        others: Processes whose sets are counted too: those of a group's other ranks.
    """
    if not Path("/proc/self/status").exists():
        try:
            import resource
        except ModuleNotFoundError:  # Windows
            return 0
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size if sys.platform == "darwin" else size * 1024
    files = [Path("/proc/self/status"), *(Path(f"/proc/{process}/status") for process in others)]
    return sum(_kilobytes(file, "VmHWM") for file in files) * 1024


def _kilobytes(file: Path, name: str) -> int:
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
