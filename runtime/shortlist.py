"""The likeliest tokens of a row of logits that lies elsewhere, and the draw among them where they are enough.

Enters: the largest logits, and the weight of all tokens together. Leaves: the token that would be drawn from the whole
row, or None where the filters may end beyond the shortlist: then the row is fetched. Invariant: a token that leaves is
the one that the whole row gives, though the weights' sum was added up in another order: a draw that is so near to a
boundary that it might fall on either side is left to the row.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .draws import Sampling, chosen

DOUBT = 1e-4
"""The weights' sum may be off by this share of it."""

COLDEST, HOTTEST = 1e-2, 1e2
"""Temperatures at which a sum of weights is asked for; others are rare, and the row is fetched."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Shortlist:
    """A row's largest logits, and where the row is.

    Attributes:
        tokens: Tokens of the largest logits, the largest first, of equals the lower token.
        logits: These logits.
        total: Sum of all tokens' weights where the likeliest weighs 1, at one over `sharpness`.
        sharpness: One over the temperature that the weights were computed at, in float32.
        odd: Number of the row's logits that are no finite numbers.
        vocabulary: Number of the row's logits.
        fetch: Fetches the whole row.
        expect: Called with the sharpness that the row's next shortlist is wanted at.
        lock: Held while the row is fetched; the steps hold it too.
        row: The row, once it is fetched.
    """

    tokens: NDArray[np.int32]
    logits: NDArray[np.float32]
    total: float
    sharpness: float
    odd: int
    vocabulary: int
    fetch: Callable[[], NDArray[np.float32]]
    expect: Callable[[float], None]
    lock: "threading.RLock"
    row: NDArray[np.float32] | None = field(default=None)

    def whole(self) -> NDArray[np.float32]:
        """The whole row [V]."""
        with self.lock:  # before another thread's step, or after it was fetched for that
            if self.row is None:
                self.row = self.fetch()
            return self.row

    def draw(self, sampling: Sampling, draw: float) -> int | None:
        """The token that a draw between 0 and 1 chooses by these settings; None where the whole row is needed."""
        below = self.logits - self.logits[0]
        count = len(below)
        if count < self.vocabulary:  # of those that equal the last one some may be missing
            count = int(np.count_nonzero(below > below[-1]))
        if 0 < sampling.top_k < self.vocabulary:
            if sampling.top_k > count:
                return None
            count = int(np.count_nonzero(below >= below[sampling.top_k - 1]))
            return int(self.tokens[chosen(below[:count], sampling, draw, None)])
        if not COLDEST <= sampling.temperature <= HOTTEST:
            return None
        if self.sharpness != (wanted := float(np.float32(1 / sampling.temperature))):
            self.expect(wanted)
            return None
        if not count or not self._covers(below[:count], sampling, draw):
            return None
        totals = (self.total * (1 - DOUBT), self.total, self.total * (1 + DOUBT))
        found = {chosen(below[:count], sampling, draw, total) for total in totals}
        return int(self.tokens[found.pop()]) if len(found) == 1 else None

    def _covers(self, below: NDArray[np.float32], sampling: Sampling, draw: float) -> bool:
        """Whether the filters and the draw end within these tokens, in doubt as well."""
        if len(below) == self.vocabulary:
            return True
        weights = np.exp(below.astype(np.float64) / sampling.temperature)
        known, total = float(weights.sum()), self.total * (1 + DOUBT)
        if sampling.top_p < 1 and sampling.top_p * total < known:
            return True
        if sampling.min_p > 0 and weights[-1] < sampling.min_p * weights[0]:
            return True
        filtered = sampling.top_p < 1 or sampling.min_p > 0 or sampling.typical_p < 1
        return not filtered and draw * total < known


Row = NDArray[np.float32] | Shortlist
"""The logits [V] after a row's last token, or a shortlist of them."""


def whole(row: Row) -> NDArray[np.float32]:
    """All logits of a row."""
    return row.whole() if isinstance(row, Shortlist) else row
