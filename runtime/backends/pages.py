"""Weights moved from their file's small pages to huge ones, at the same addresses, while a session runs.

A processor reads huge pages a fifth faster. Filling them takes half a second a gigabyte, so a session starts on the
file's pages and they are exchanged in the background: reads give the same bytes before, after, and in between.
Where the system cannot do it, or would have to make room for such pages, everything else stays as it is.
"""

import ctypes
import mmap
import sys
import time
from collections.abc import Sequence
from threading import Thread

from ...files.machine_memory import find_room

HUGE = 2 << 20
"""Bytes of a huge page."""
PIECE = 16 * HUGE
"""Bytes that are exchanged at a time; meanwhile there are two copies of them."""
SLOW = 0.04
"""Seconds of a processor for a piece from which on the system is taken to have no huge pages at hand: it takes 15 ms
where it has, and making room for one may take 5 ms by itself."""
FIXED = 3
"""Linux's MREMAP_MAYMOVE | MREMAP_FIXED: the pages at the new address are replaced in one step."""


class Region:
    """The first bytes of a mapped file.

    Args:
        file: The mapping; kept as long as the region is.
        address: The address at which it begins.
        size: Number of bytes.
    """

    def __init__(self, file: mmap.mmap, address: int, size: int) -> None:
        self.file = file
        self.first = -(-address // HUGE) * HUGE  # whole huge pages only
        self.last = (address + size) // HUGE * HUGE

    @property
    def size(self) -> int:
        """Bytes that lie in whole huge pages."""
        return max(0, self.last - self.first)


def exchange_pages(regions: Sequence[Region]) -> None:
    """Exchanges regions' pages in the background, where they take no more than half of the free memory."""
    size = sum(region.size for region in regions)
    if sys.platform == "linux" and mmap.PAGESIZE == 4096 and 0 < size <= find_room().free // 2:
        Thread(target=_exchange_all, args=(regions,), daemon=True).start()


def _exchange_all(regions: Sequence[Region]) -> None:
    libc = ctypes.CDLL(None)
    for name in ("mmap", "mremap"):
        getattr(libc, name).restype = ctypes.c_void_p
    for region in regions:
        for address in range(region.first, region.last, PIECE):
            started = time.thread_time()
            if not _exchange(libc, address, min(PIECE, region.last - address)) or time.thread_time() - started > SLOW:
                return


def _exchange(libc: ctypes.CDLL, address: int, size: int) -> bool:
    """Copies the bytes at an address into huge pages, and puts these there. Returns whether that could be done."""
    word, failed = ctypes.c_size_t, ctypes.c_void_p(-1).value
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    room = libc.mmap(None, word(size + HUGE), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, word(0))
    if room == failed:
        return False
    pages = -(-room // HUGE) * HUGE
    libc.madvise(word(pages), word(size), mmap.MADV_HUGEPAGE)
    ctypes.memmove(pages, address, size)
    moved = libc.mremap(word(pages), word(size), word(size), FIXED, word(address)) != failed
    for start, end in ((room, pages), (pages + size, room + size + HUGE)):
        libc.munmap(word(start), word(end - start))
    if not moved:
        libc.munmap(word(pages), word(size))
    return moved
