"""Weights moved from their file's small pages to huge ones, at the same addresses, while a session runs.

A processor reads huge pages a fifth faster. Filling them takes half a second a gigabyte, so a session starts on the
file's pages and they are exchanged in the background: reads give the same bytes before, after, and in between.
Where the system cannot do it, or would have to make room for such pages without being asked to, everything else stays
as it is. What lies in huge pages is the process's own; the file's are shared by all that map it.
"""

import ctypes
import math
import mmap
import sys
import time
from collections.abc import Iterable, Sequence
from threading import Thread
from typing import get_args

from ...errors import SessionError, shortened
from ...files.machine_memory import find_room
from ...spec.stored_weights import EXPERT, Pages, Weight
from ..room import check_fits

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
    """Bytes of a mapped file.

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


def has_huge_pages() -> bool:
    """Whether this system can exchange pages at all."""
    return sys.platform == "linux" and mmap.PAGESIZE == 4096


def in_huge_pages(weights: Iterable[Weight], pages: Pages) -> list[Weight]:
    """The weights of a graph that are to lie in huge pages.

    Experts never are, of which a token reads few; nor are embeddings, of which it reads a row, nor what is converted.
    """
    if pages == "file":
        return []
    if pages == "auto":
        return [weight for weight in weights if weight.is_made]
    lying = [weight for weight in weights if not weight.is_converted and not EXPERT.search(weight.name)]
    return [weight for weight in lying if weight.is_made or "embed_tokens" not in weight.name]


def check_pages(weights: Iterable[Weight], pages: Pages) -> None:
    """Refuses pages that there are not, or that this system or its memory has not.

    Raises:
        SessionError: There are no such pages, or not so much memory.
    """
    if pages not in get_args(Pages):
        raise SessionError(f"pages is {shortened(pages)}, expected one of {', '.join(get_args(Pages))}")
    if pages == "huge" and not has_huge_pages():
        raise SessionError('pages "huge" are Linux\'s beside pages of 4 KB, which this system has not: take "auto"')
    if pages == "huge":
        size = sum(weight.given_size for weight in in_huge_pages(weights, pages))
        check_fits("a copy of the weights that every token reads, in huge pages", size, 'take pages "auto" or "file"')


def exchange_pages(regions: Sequence[Region], *, insist: bool = False) -> None:
    """Exchanges regions' pages in the background, where they take no more than half of the free memory.

    Args:
        regions: The regions.
        insist: Whether to do so however much memory they take, and if the system has to make room for such pages.
    """
    size = sum(region.size for region in regions)
    if has_huge_pages() and size and (insist or size <= find_room().free // 2):
        Thread(target=_exchange_all, args=(regions, math.inf if insist else SLOW), daemon=True).start()


def _exchange_all(regions: Sequence[Region], slow: float) -> None:
    libc = ctypes.CDLL(None)
    for name in ("mmap", "mremap"):
        getattr(libc, name).restype = ctypes.c_void_p
    for region in regions:
        for address in range(region.first, region.last, PIECE):
            started = time.thread_time()
            if not _exchange(libc, address, min(PIECE, region.last - address)) or time.thread_time() - started > slow:
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
