"""Sequences in flight: rows of one state that decode together, where sequences join and leave between steps.

Enters: requests, at any time. Leaves: each one's pieces, as if it ran alone; it has its own sampler and seed.
Invariant: the rows in use lie side by side from the first on, so that a step costs what its sequences cost. Where one
is left, the last row's sequence moves there, which costs far less than a row that idles along.

On the CPU the kernels of int8 and int4 compute a row alike whatever stands beside it: logits and texts equal those of
the sequence alone, bit by bit. A float32 product over several rows adds up in another order than over one: there logits
are equal within float32's rounding, and tokens but for ties within it.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import SessionError
from .continuation import Generated, Request
from .rider import Rider, board
from .token_session import TokenSession

DEFAULT_SLOTS = 8
"""Sequences at once where the caller names no number."""

Pieces = list[tuple[int, Generated]]
"""Requests' numbers, each with a piece of its continuation."""


class Flight:
    """A batch that sequences join and leave at any time.

    Args:
        session: The model.
        slots: Sequences that decode at once; more wait in a queue. None takes `DEFAULT_SLOTS`, or `max_batch` if that
            is less.
        positions: Tokens that each sequence may have; None takes the session's `max_seq`.

    Raises:
        SessionError: The session does not hold that many rows or tokens.
    """

    def __init__(self, session: TokenSession, slots: int | None = None, positions: int | None = None) -> None:
        self.session = session
        self.slots = min(DEFAULT_SLOTS, session.max_batch or DEFAULT_SLOTS) if slots is None else slots
        self.state = session.start(self.slots, positions)
        self.waiting: deque[tuple[int, Request]] = deque()
        self.rows: list[tuple[int, Rider]] = []
        self.numbers = itertools.count()

    @property
    def riding(self) -> int:
        """Sequences that have a row."""
        return len(self.rows)

    def join(self, request: Request) -> int:
        """Puts a request, as `Session.request` makes it, into the queue. Returns its number.

        Raises:
            SessionError: Its sequence may need more positions than a row has.
        """
        if request.positions > self.state.caches.positions:
            raise SessionError(
                f"the prompt's {len(request.prompt.ids)} and {request.count} new tokens are more than the "
                f"{self.state.caches.positions} positions of a row: ask for fewer new tokens, or for more positions"
            )
        number = next(self.numbers)
        self.waiting.append((number, request))
        return number

    def leave(self, number: int) -> None:
        """Ends a request, whether it waits or rides.

        Raises:
            SessionError: There is none of this number, or it has ended.
        """
        for row, (riding, _) in enumerate(self.rows):
            if riding == number:
                self._vacate(row)
                return
        remaining = deque(each for each in self.waiting if each[0] != number)
        if len(remaining) == len(self.waiting):
            raise SessionError(f"request {number} is not in flight: it has ended, or never joined")
        self.waiting = remaining

    def step(self) -> Pieces:
        """Lets waiting requests into free rows, then adds a token to every sequence.

        Returns:
            A piece of each sequence, two of one that has just joined. A request has ended, and left, with the piece
            that has a `finish`. Empty when no request is there.
        """
        pieces: Pieces = []
        while self.waiting and len(self.rows) < self.slots:
            pieces += self._admit()
        if self.rows:
            tokens_B = [rider.continuation.ids[-1] for _, rider in self.rows]
            logits_BV = self.session.decode(self.state.rows(0, len(self.rows)), tokens_B)
            pieces += self._take(0, logits_BV)
        return pieces

    def _admit(self) -> Pieces:
        """Reads the next prompts into free rows. Returns their first pieces."""
        group = self._group()
        if group[0][1].count == 0:
            return [(group[0][0], Generated([], "", "length"))]
        first, numbers = len(self.rows), [number for number, _ in group]
        part = self.state.rows(first, first + len(group))
        part.rewind([0] * len(group))
        riders, logits_BV = board(self.session, part, [request for _, request in group])
        self.rows += zip(numbers, riders, strict=True)
        return self._take(first, logits_BV)

    def _group(self) -> list[tuple[int, Request]]:
        """Takes the next requests out of the queue: several where their prompts together are no longer than a piece.

        One alone where it may go on from the beginning that another leaves, or has images.
        """
        group, longest = [self.waiting.popleft()], 0
        most = min(self.session.decoder.longest, self.session.spec.chunk or self.session.decoder.longest)
        free = self.slots - len(self.rows)
        while self.waiting and len(group) < free and not self.session.prefixes.limit:
            pair = group[-1][1], self.waiting[0][1]
            longest = max(longest, *(len(request.prompt.ids) for request in pair))
            if (len(group) + 1) * longest > most or not all(request.is_plain for request in pair):
                break
            group.append(self.waiting.popleft())
        return group

    def _take(self, first: int, logits_BV: NDArray[np.float32]) -> Pieces:
        """Chooses a token in each row from `first` on, and leaves the rows whose sequences have ended."""
        pieces: Pieces = []
        for row, ((number, rider), logits_V) in enumerate(zip(self.rows[first:], logits_BV, strict=True), start=first):
            pieces.append((number, rider.take(self.state, row, logits_V)))
        for row in reversed(range(first, len(self.rows))):
            if pieces[row - first][1].finish is not None:
                self._vacate(row)
        return pieces

    def _vacate(self, row: int) -> None:
        """Leaves a row, and moves the last row's sequence there."""
        last = self.rows.pop()
        if row < len(self.rows):
            self.state.move(len(self.rows), row)
            self.rows[row] = last


def stream_requests(
    session: TokenSession, requests: Sequence[Request], slots: int | None
) -> Iterator[tuple[int, Generated]]:
    """Runs requests through a flight until all have ended. Yields a request's place in the sequence, and a piece."""
    if not requests:
        return
    positions = max(1, *(request.positions for request in requests))
    flight = Flight(session, slots, positions)
    for request in requests:
        flight.join(request)
    while flight.waiting or flight.riding:
        yield from flight.step()
