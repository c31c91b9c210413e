"""A queue in which users take turns: someone's tenth request waits behind another's first.

Weighted fair queueing (Demers et al. 1989), each request of the same size: an item's time is one after the user's last,
and not before the queue's, which goes on by one while each user that waits has had a turn. So nobody waits forever,
whoever comes.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of several users, the next one by turns."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, str, T]] = []
        self.last: dict[str, float] = {}
        self.counts: Counter[str] = Counter()
        self.time = 0.0
        self.arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self.heap)

    def push(self, user: str, item: T) -> None:
        """Puts an item of a user's into the queue."""
        start = max(self.time, self.last.get(user, -1.0) + 1)
        self.last[user] = start
        self.counts[user] += 1
        heapq.heappush(self.heap, (start, next(self.arrivals), user, item))

    def pop(self) -> T:
        """Takes the next item out."""
        start, _, user, item = heapq.heappop(self.heap)
        self.time = max(self.time, start) + 1 / len(self.counts)
        self._forget(user)
        return item

    def remove(self, is_meant: Callable[[T], bool]) -> list[T]:
        """Takes items out, wherever they stand. Returns them."""
        removed = [(user, each) for _, _, user, each in self.heap if is_meant(each)]
        if removed:
            self.heap = [entry for entry in self.heap if not is_meant(entry[3])]
            heapq.heapify(self.heap)
        for user, _ in removed:
            self._forget(user)
        return [each for _, each in removed]

    def _forget(self, user: str) -> None:
        """Counts an item that has gone, and forgets users whose past counts no more."""
        self.counts[user] -= 1
        if not self.counts[user]:
            del self.counts[user]
        if len(self.last) > 2 * len(self.counts) + 64:
            self.last = {name: last for name, last in self.last.items() if name in self.counts or last > self.time - 1}
