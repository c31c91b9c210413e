"""Sequences in flight: rows of one state that decode together, where sequences join and leave between steps.

Enters: requests, at any time. Leaves: each one's pieces, as if it ran alone; it has its own sampler and seed.
Invariant: the rows that decode lie side by side from the first on, so that a step costs what its sequences cost. Where
one is left, the last row's sequence moves there, which costs far less than a row that idles along.

Prompts are read in the order of their coming, one at a time or several short ones at once, a budget of tokens in each
step: however long a prompt is, the sequences that decode wait for a piece of it and no more.

On the CPU the kernels of int8 and int4 compute a row alike whatever stands beside it, and a prompt alike however it is
cut: logits and texts equal those of the sequence alone, bit by bit. A float32 product over several rows adds up in
another order than over one: there logits are equal within float32's rounding, and tokens but for ties within it.

An error ends the request that it comes from and no other: its last piece has the `finish` "error" and the error. Where
a step of several rows fails, each is tried alone. A flight belongs to one thread; several may share its session.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

from ..errors import SessionError
from .continuation import Generated, Request
from .rider import Boarding, Rider, board_together
from .shortlist import Row
from .token_session import TokenSession

DEFAULT_SLOTS = 8
"""Sequences at once where the caller names no number."""

PREFILL_BUDGET = 32
"""Tokens of prompts that a step reads beside decoding rows where the caller names no number. More are read faster, and
keep the others waiting longer: `benchmarks/flight_gaps.py`."""

Pieces = list[tuple[int, Generated]]
"""Requests' numbers, each with a piece of its continuation."""

Logits = Row | Exception
"""The logits [V] after a row's last token, or the error that came in their place."""


class Flight:
    """A batch that sequences join and leave at any time.

    Args:
        session: The model.
        slots: Sequences that have a row at once; more wait in a queue. None takes `DEFAULT_SLOTS`, or `max_batch` if
            that is less.
        positions: Tokens that each sequence may have; None takes the session's `max_seq`.
        prefill_budget: Tokens of prompts that a step reads at most while others decode; None takes `PREFILL_BUDGET`.
            Where nobody decodes, a step reads a piece as long as the decoder takes it.

    Raises:
        SessionError: The session does not hold that many rows or tokens, or the budget is less than 1.
    """

    def __init__(
        self,
        session: TokenSession,
        slots: int | None = None,
        positions: int | None = None,
        prefill_budget: int | None = None,
    ) -> None:
        self.session = session
        self.slots = min(DEFAULT_SLOTS, session.max_batch or DEFAULT_SLOTS) if slots is None else slots
        self.prefill_budget = PREFILL_BUDGET if prefill_budget is None else prefill_budget
        if self.prefill_budget < 1:
            raise SessionError(f"prefill_budget is {prefill_budget}, expected a whole number from 1 up")
        self.state = session.start(self.slots, positions)
        self.waiting: deque[tuple[int, Request]] = deque()
        self.rows: list[tuple[int, Rider]] = []
        self.boarding: tuple[int, Boarding] | None = None
        self.alone: set[int] = set()
        self.numbers = itertools.count()

    @property
    def riding(self) -> int:
        """Sequences that have a row."""
        return len(self.rows) + (self.boarding is not None)

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
        """Ends a request, whether it waits, has its prompt read, or decodes.

        Raises:
            SessionError: There is none of this number, or it has ended.
        """
        if self.boarding is not None and self.boarding[0] == number:
            self.boarding = None
            return
        for row, (riding, _) in enumerate(self.rows):
            if riding == number:
                self._vacate(row)
                return
        remaining = deque(each for each in self.waiting if each[0] != number)
        if len(remaining) == len(self.waiting):
            raise SessionError(f"request {number} is not in flight: it has ended, or never joined")
        self.waiting = remaining

    def step(self) -> Pieces:
        """Reads prompts into free rows, as far as the budget goes, then adds a token to every sequence.

        Returns:
            A piece of each sequence, two of one whose prompt was read to its end. A request has ended, and left, with
            the piece that has a `finish`. Empty while nothing but a prompt is read, or when no request is there.
        """
        pieces = self._read_prompts(self.prefill_budget if self.rows else self.session.decoder.longest)
        if self.rows:
            pieces += self._take(0, self._decode())
        return pieces

    def _read_prompts(self, budget: int) -> Pieces:
        """Reads prompts, in their order. Returns the first pieces of those that were read to their end."""
        pieces: Pieces = []
        while budget > 0 and (self.boarding or (self.waiting and len(self.rows) < self.slots)):
            if self.boarding is not None:
                read, more = self._read_on(*self.boarding, budget)
            elif self.waiting[0][1].count == 0:
                read, more = 0, [(self.waiting.popleft()[0], Generated([], "", "length"))]
            elif len(group := self._group(budget)) > 1:
                read, more = self._admit(group)
            else:
                number, request = self.waiting.popleft()
                row = len(self.rows)
                self.boarding = number, Boarding(self.session, self.state.rows(row, row + 1), request)
                continue
            budget -= read
            pieces += more
        return pieces

    def _read_on(self, number: int, boarding: Boarding, budget: int) -> tuple[int, Pieces]:
        """Reads on in the prompt that is being read. Returns the tokens read, and its first piece at its end."""
        try:
            read, logits_V = boarding.read(budget)
            rider = None if logits_V is None else boarding.rider()
        except Exception as error:  # of whatever kind: it is this request's, and the others go on
            self.boarding = None
            return 0, [(number, failed(error))]
        if logits_V is None or rider is None:
            return read, []
        self.boarding = None
        row = len(self.rows)
        if boarding.state.first != self.state.first + row:  # rows before it were left meanwhile
            with self.session.lock:
                self.state.move(boarding.state.first - self.state.first, row)
        self.rows.append((number, rider))
        return read, self._take(row, [logits_V])

    def _group(self, budget: int) -> list[tuple[int, Request]]:
        """The next requests, several where their prompts together are no longer than the budget and a piece.

        One alone where it may go on from the beginning that another leaves, has images, or failed among others.
        """
        most = min(budget, self.session.decoder.longest, self.session.spec.chunk or self.session.decoder.longest)
        group, longest = [self.waiting[0]], len(self.waiting[0][1].prompt.ids)
        if self.session.prefixes.limit:
            return group
        for number, request in itertools.islice(self.waiting, 1, self.slots - len(self.rows)):
            longest = max(longest, len(request.prompt.ids))
            plain = group[-1][1].is_plain and request.is_plain and not self.alone & {group[-1][0], number}
            if not plain or (len(group) + 1) * longest > most:
                break
            group.append((number, request))
        return group

    def _admit(self, group: list[tuple[int, Request]]) -> tuple[int, Pieces]:
        """Reads several prompts at once into rows. Returns the tokens computed, pads included, and the first pieces.

        Where that fails, they stay in the queue, to be read alone, so that only the one that is to blame ends.
        """
        first = len(self.rows)
        try:
            part = self.state.rows(first, first + len(group))
            riders, logits_BV = board_together(self.session, part, [request for _, request in group])
        except Exception:  # of whatever kind: it comes again where it comes from
            self.alone |= {number for number, _ in group}
            return 0, []
        for number, rider in zip([number for number, _ in group], riders, strict=True):
            self.waiting.popleft()
            self.rows.append((number, rider))
        width = max(len(request.prompt.ids) for _, request in group)
        return width * len(group), self._take(first, list(logits_BV))

    def _decode(self) -> list[Logits]:
        """Adds each row's last token. Returns each row's logits, or its error where it fails alone as well."""
        tokens_B = [rider.continuation.ids[-1] for _, rider in self.rows]
        try:
            return list(self.session.decode_rows(self.state.rows(0, len(self.rows)), tokens_B))
        except Exception as error:  # of whatever kind: no row has its token yet
            if len(tokens_B) == 1:
                return [error]
        found: list[Logits] = []
        for row, token in enumerate(tokens_B):
            try:
                found.append(self.session.decode_rows(self.state.rows(row, row + 1), [token])[0])
            except Exception as error:
                found.append(error)
        return found

    def _take(self, first: int, logits: Sequence[Logits]) -> Pieces:
        """Chooses a token in each row from `first` on, and leaves the rows whose sequences have ended."""
        pieces: Pieces = []
        for row, ((number, rider), found) in enumerate(zip(self.rows[first:], logits, strict=True), start=first):
            try:
                if isinstance(found, Exception):
                    raise found
                pieces.append((number, rider.take(self.state, row, found)))
            except Exception as error:
                pieces.append((number, failed(error)))
        for row in reversed(range(first, len(self.rows))):
            if pieces[row - first][1].finish is not None:
                self._vacate(row)
        return pieces

    def _vacate(self, row: int) -> None:
        """Leaves a row, and moves the last row's sequence there."""
        last = self.rows.pop()
        if row < len(self.rows):
            with self.session.lock:
                self.state.move(len(self.rows), row)
            self.rows[row] = last


def failed(error: Exception) -> Generated:
    """The last piece of a sequence that an error ended."""
    return Generated([], "", "error", error=error)


def stream_requests(
    session: TokenSession, requests: Sequence[Request], slots: int | None, prefill_budget: int | None = None
) -> Iterator[tuple[int, Generated]]:
    """Runs requests through a flight until all have ended. Yields a request's place in the sequence, and a piece.

    Without a budget each step reads prompts as the decoder takes them, which is the fastest for all together.
    """
    if not requests:
        return
    positions = max(1, *(request.positions for request in requests))
    flight = Flight(session, slots, positions, session.decoder.longest if prefill_budget is None else prefill_budget)
    for request in requests:
        flight.join(request)
    while flight.waiting or flight.riding:
        yield from flight.step()
