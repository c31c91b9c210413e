"""Sequences in flight: rows of one state that decode together, where sequences join and leave between steps.

Enters: requests, at any time. Leaves: each one's pieces, as if it ran alone; it has its own sampler and seed.
Invariant: in a decode step the rows in use lie side by side from the first on, so that a step costs what its sequences
cost. A row that was left is given to who waits; where nobody does, the last row's sequence moves there.

A product over several rows adds up in another order than over one. So logits equal those of the sequence alone to
float32's rounding, and tokens are the same but for ties within it.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import SessionError
from .continuation import Generated, Request
from .rider import Rider, board

if TYPE_CHECKING:
    from .session import Session

DEFAULT_SLOTS = 8
"""Sequences at once where nobody says otherwise."""

Pieces = list[tuple[int, Generated]]
"""Requests' numbers, each with a piece of its continuation."""


class Flight:
    """A batch that is never the same for long.

    Args:
        session: The model.
        slots: Sequences that decode at once; more wait in a queue. None takes `DEFAULT_SLOTS`, or `max_batch` if that
            is less.
        positions: Tokens that each sequence may have; None takes the session's `max_seq`.

    Raises:
        SessionError: The session does not hold so much.
    """

    def __init__(self, session: "Session", slots: int | None = None, positions: int | None = None) -> None:
        self.session = session
        self.slots = min(DEFAULT_SLOTS, session.max_batch or DEFAULT_SLOTS) if slots is None else slots
        self.state = session.start(self.slots, positions)
        self.waiting: deque[tuple[int, Request]] = deque()
        self.rows: list[tuple[int, Rider] | None] = []  # None is a row that was left
        self.numbers = itertools.count()

    @property
    def riding(self) -> int:
        """Sequences that have a row."""
        return sum(riding is not None for riding in self.rows)

    def join(self, request: Request) -> int:
        """Puts a request, as `Session.request` makes it, into the queue. Returns the number it is known by.

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
        """Ends a request where it is.

        Raises:
            SessionError: There is none of this number, or it has ended.
        """
        for row, riding in enumerate(self.rows):
            if riding is not None and riding[0] == number:
                self.rows[row] = None
                return
        remaining = deque(each for each in self.waiting if each[0] != number)
        if len(remaining) == len(self.waiting):
            raise SessionError(f"request {number} is not in flight: it has ended, or never joined")
        self.waiting = remaining

    def step(self) -> Pieces:
        """Lets those who wait into free rows, then adds a token to every sequence.

        Returns:
            The pieces that came: one of each sequence, two of one that has just joined. A request has ended, and left,
            with the piece that has a `finish`. Nothing when nobody is there.
        """
        pieces = self._admit()
        self._close_up()
        riding = [each for each in self.rows if each is not None]
        if riding:
            tokens_B = [rider.continuation.ids[-1] for _, rider in riding]
            logits_BV = self.session.decode(self.state.rows(0, len(riding)), tokens_B)
            for row, ((number, rider), logits_V) in enumerate(zip(riding, logits_BV, strict=True)):
                piece = rider.take(self.state, row, logits_V)
                pieces.append((number, piece))
                if piece.finish is not None:
                    self.rows[row] = None
        return pieces

    def _admit(self) -> Pieces:
        """Prefills as many as there are rows for. Returns their first pieces."""
        pieces: Pieces = []
        while self.waiting and self.riding < self.slots:
            number, request = self.waiting.popleft()
            if request.count == 0:
                pieces.append((number, Generated([], "", "length")))
                continue
            row = self.rows.index(None) if None in self.rows else len(self.rows)
            part = self.state.rows(row, row + 1)
            part.rewind([0])
            rider, logits_V = board(self.session, part, request)
            piece = rider.take(part, 0, logits_V)
            pieces.append((number, piece))
            self.rows[row : row + 1] = [(number, rider) if piece.finish is None else None]
        return pieces

    def _close_up(self) -> None:
        """Moves sequences from the last rows into those that were left."""
        while None in self.rows:
            last = self.rows.pop()
            if last is not None:
                row = self.rows.index(None)
                self.state.move(len(self.rows), row)
                self.rows[row] = last


def stream_requests(
    session: "Session", requests: Sequence[Request], slots: int | None
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
