"""Memory that is taken where it is written to, and given back in parts: rows of caches that are seldom full.

Enters: a size. Leaves: an array of zeros over it. Invariant: what has been given back reads as zeros. Linux gives pages
back at once; elsewhere they stay with the process, and the next row to be written takes them.
"""

import mmap
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""Linux's MAP_NORESERVE: more may be asked for than there is, since little of it will be taken."""


class SparseMemory:
    """Zeros, in small pages that are taken one by one.

    Args:
        size: Number of bytes.
    """

    def __init__(self, size: int) -> None:
        self.memory = (
            mmap.mmap(-1, max(1, size))
            if sys.platform == "win32"
            else mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        )
        self.gives_back = sys.platform == "linux"
        if self.gives_back and hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._advise(mmap.MADV_NOHUGEPAGE, 0, len(self.memory))  # a huge page would be taken for a few tokens

    def array(self, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> NDArray[Any]:
        """An array over all of it."""
        count = int(np.prod(shape))
        return np.frombuffer(self.memory, dtype=dtype, count=count).reshape(shape)

    def give_back(self, start: int, stop: int) -> None:
        """Gives back the whole pages between two bytes; the rest of them keeps its values."""
        first, last = -(-start // PAGE) * PAGE, stop // PAGE * PAGE
        if self.gives_back and first < last:
            self._advise(mmap.MADV_DONTNEED, first, last - first)

    def _advise(self, advice: int, start: int, length: int) -> None:
        try:
            self.memory.madvise(advice, start, length)
        except OSError:  # a kernel without it: the memory stays taken, which is all that happens
            self.gives_back = False
