"""A queue in which users take turns: someone's tenth request waits behind another's first.

Start-time fair queueing (Goyal et al. 1996): an item's time is one after the user's last, and not before that of the
item that left last. So nobody waits forever, whoever comes.
"""

import heapq
import itertools
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of several users, the next one by turns."""

    def __init__(self) -> None:
        self.heap: list[tuple[int, int, T]] = []
        self.last: dict[str, int] = {}
        self.time = 0
        self.arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self.heap)

    def push(self, user: str, item: T) -> None:
        """Puts an item of a user's into the queue."""
        start = max(self.time, self.last.get(user, -1) + 1)
        self.last[user] = start
        heapq.heappush(self.heap, (start, next(self.arrivals), item))

    def pop(self) -> T:
        """Takes the next item out."""
        self.time, _, item = heapq.heappop(self.heap)
        if not self.heap:  # nobody waits, so nobody's past counts
            self.last.clear()
            self.time = 0
        elif len(self.last) > 2 * len(self.heap) + 64:
            self.last = {user: start for user, start in self.last.items() if start >= self.time}
        return item

    def remove(self, is_meant: Callable[[T], bool]) -> list[T]:
        """Takes items out, wherever they stand. Returns them."""
        removed = [each for _, _, each in self.heap if is_meant(each)]
        if removed:
            self.heap = [entry for entry in self.heap if not is_meant(entry[2])]
            heapq.heapify(self.heap)
        return removed
