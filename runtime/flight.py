"""Sequences in flight: rows of one state that decode together, where sequences join and leave between steps.

Enters: requests, at any time. Leaves: each one's pieces, as if it ran alone; it has its own sampler and seed.
Invariant: the rows that decode lie side by side from the first on, so that a step costs what its sequences cost. Where
one is left, the last row's sequence moves there, which costs far less than a row that idles along.

Prompts are read in the order of their coming, one at a time or several short ones at once, a budget of tokens in each
step: however long a prompt is, the sequences that decode wait for a piece of it and no more. Requests that join as one
have one prompt, which is read once.

Rows may share one budget of memory: each takes what its length needs, and a request waits while that is not there.

On the CPU the kernels compute a row alike whatever stands beside it, and a prompt alike however it is cut: logits and
texts equal those of the sequence alone, bit by bit. On a GPU logits are equal within rounding, and tokens but for ties
within it.

An error ends the request that it comes from and no other: its last piece has the `finish` "error" and the error, a
`StepError` where the step failed by no fault of the request. Where a step of several rows fails, each is tried alone.
A flight belongs to one thread; several may share its session.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence

from ..errors import SessionError
from .checks import whole
from .continuation import Generated, Request
from .guesses import Guessing
from .pace import Pace
from .party import Party, Pieces, failed, usual_budget
from .rider import Boarding, Rider, board_together
from .shortlist import Row
from .speculation import guess_next, settle
from .step_errors import step_error
from .token_session import TokenSession

DEFAULT_SLOTS = 8
"""Sequences at once where the caller names no number."""

ABOVE_0 = "a whole number from 1 up"
Logits = Row | Exception
"""The logits [V] after a row's last token, or the error that came in their place."""


class Flight:
    """A batch that sequences join and leave at any time.

    Args:
        session: The model.
        slots: Sequences that have a row at once; more wait in a queue. None takes `DEFAULT_SLOTS`, or `max_batch` if
            that is less.
        positions: Tokens that each sequence may have; None takes the session's `max_seq`.
        prefill_budget: Tokens of prompts that a step reads at most while others decode; None takes `usual_budget`.
            Where nobody decodes, a step reads a piece as long as the decoder takes it.
        cache_bytes: Keys and values of all rows at most; None is no limit but the rows' own length.
        guessing: How the sequences' next tokens are guessed; None takes the model's draft, where it has one.

    Attributes:
        boarded: Numbers of requests that got a row, in their order, and the time by `time.perf_counter`; whoever looks
            empties it.

    Raises:
        SessionError: The session does not hold that many rows or tokens, the budget is less than 1, or the memory less
            than a row of one token needs.
    """

    def __init__(
        self,
        session: TokenSession,
        slots: int | None = None,
        positions: int | None = None,
        prefill_budget: int | None = None,
        cache_bytes: int | None = None,
        guessing: Guessing | None = None,
    ) -> None:
        self.session = session
        self.guessing = Guessing(draft=session.usual_draft) if guessing is None else guessing
        self.slots = min(DEFAULT_SLOTS, session.max_batch or DEFAULT_SLOTS) if slots is None else slots
        given = None if prefill_budget is None else whole("prefill_budget", prefill_budget, ABOVE_0, least=1)
        self.prefill_budget = given
        is_sparse, self.pace = cache_bytes is not None, Pace()
        self.state = session.start(self.slots, positions, sparse=is_sparse, drafted=self.guessing.draft > 0)
        self.slots = self.state.batch
        self.cache_bytes = cache_bytes
        self.taken: dict[int, int] = {}
        self.waiting: deque[Party] = deque()
        self.rows: list[tuple[int, Rider]] = []
        self.boarding: tuple[Party, Boarding] | None = None
        self.boarded: list[tuple[int, float]] = []
        self.alone: set[int] = set()
        self.numbers = itertools.count()
        if cache_bytes is not None and cache_bytes < (least := self.state.caches.row_bytes(1)):
            raise SessionError(f"cache_bytes is {cache_bytes}, one row needs {least}: give more")

    @property
    def riding(self) -> int:
        """Sequences that have a row."""
        return len(self.rows) + (0 if self.boarding is None else len(self.boarding[0].members))

    @property
    def used(self) -> float:
        """The share of the memory for keys and values that rows have taken, or else of the rows, from 0 to 1."""
        return sum(self.taken.values()) / self.cache_bytes if self.cache_bytes else self.riding / self.slots

    def join(self, request: Request) -> int:
        """Puts a request, as `Session.request` makes it, into the queue. Returns its number.

        Raises:
            SessionError: Its sequence may need more positions than a row has, or more memory than there is.
        """
        return self.join_as_one([request])[0]

    def join_as_one(self, requests: Sequence[Request]) -> list[int]:
        """Puts requests of one prompt into the queue, which is read once for as many as get rows at a time.

        Raises:
            SessionError: As `join` does; then none has joined.
        """
        for request in requests:
            if request.positions > self.state.caches.positions:
                raise SessionError(
                    f"the prompt's {len(request.prompt.ids)} and {request.count} new tokens are more than the "
                    f"{self.state.caches.positions} positions of a row: ask for fewer new tokens, or for more positions"
                )
            if self.cache_bytes is not None and self._bytes(request) > self.cache_bytes:
                raise SessionError(
                    f"the prompt's {len(request.prompt.ids)} and {request.count} new tokens need "
                    f"{self._bytes(request)} bytes of cache, there are {self.cache_bytes}: ask for fewer new tokens, "
                    "or for more cache_bytes"
                )
        party = Party([(next(self.numbers), request) for request in requests])
        if party.members:
            self.waiting.append(party)
        return [number for number, _ in party.members]

    def leave(self, number: int) -> None:
        """Ends a request, whether it waits, has its prompt read, or decodes.

        Raises:
            SessionError: There is none of this number, or it has ended.
        """
        for row, (riding, _) in enumerate(self.rows):
            if riding == number:
                self._vacate(row)
                return
        parties = [*self.waiting, *(() if self.boarding is None else (self.boarding[0],))]
        party = next((each for each in parties if any(member == number for member, _ in each.members)), None)
        if party is None:
            raise SessionError(f"request {number} is not in flight: it has ended, or never joined")
        party.members = [each for each in party.members if each[0] != number]
        self.taken.pop(number, None)
        self.alone.discard(number)
        if not party.members:
            if self.boarding is not None and party is self.boarding[0]:
                self._end_boarding()
            else:
                self.waiting.remove(party)

    def step(self) -> Pieces:
        """Adds a token to every sequence, or several, then reads prompts into free rows, as far as the budget goes.

        Returns:
            A piece of each new token of each sequence, in order: one, and those that were guessed rightly besides. A
            prompt's first comes as soon as it is read. A request has ended, and left, with the piece that has a
            `finish`. Empty while nothing but a prompt is read, or when no request is there.
        """
        pieces: Pieces = []
        if self.rows:
            started, riders = time.perf_counter(), [rider for _, rider in self.rows]
            drafts = self._guess(riders)
            pieces = self._verify(drafts) if any(drafts) else self._take(0, self.pace.of_step(self._decode))
            settle(self.session.costs, riders, time.perf_counter() - started, with_guesses=any(drafts))
        return pieces + self._read_prompts(self._budget())

    def _budget(self) -> int:
        """Tokens of prompts that this step reads."""
        if not self.rows:
            return self.session.decoder.longest
        coming = min(self.slots, self.riding + sum(len(party.members) for party in self.waiting)) - len(self.rows)
        return self.prefill_budget or usual_budget(coming, sum(rider.has_begun for _, rider in self.rows), self.pace)

    def _guess(self, riders: list[Rider]) -> list[list[int]]:
        """Guesses the next tokens of each row; where that fails, none, which changes nothing but the time."""
        try:
            state = self.state.rows(0, len(riders))
            return guess_next(self.session, state, riders) if any(rider.guesses.are_on for rider in riders) else []
        except Exception:  # of whatever kind: the model's own step says what is wrong, if it is
            return []

    def _verify(self, drafts: list[list[int]]) -> Pieces:
        """Adds each row's last token and its guesses; they stand as far as they are right, and one token more."""
        rows = [[rider.continuation.ids[-1], *draft] for (_, rider), draft in zip(self.rows, drafts, strict=True)]
        try:
            logits = self.session.verify(self.state.rows(0, len(rows)), rows)
        except Exception:  # of whatever kind: no row has its token yet, and each is tried without guesses
            return self._take(0, self._decode())
        found: list[Pieces] = []
        for row, ((number, rider), draft) in enumerate(zip(self.rows, drafts, strict=True)):
            try:
                pieces = rider.verify(self.state.rows(row, row + 1), draft, logits[row])
                found.append([(number, piece) for piece in pieces])
            except Exception as error:
                found.append([(number, failed(step_error(error)))])
        for row in reversed(range(len(found))):
            if found[row][-1][1].finish is not None:
                self._vacate(row)
        return [piece for pieces in found for piece in pieces]

    def _read_prompts(self, budget: int) -> Pieces:
        """Reads prompts, in their order. Returns the first pieces of those that were read to their end."""
        pieces: Pieces = []
        while budget > 0 and (self.boarding or (self.waiting and len(self.rows) < self.slots)):
            if self.boarding is not None:
                read, more = self._read_on(*self.boarding, budget)
            elif self.waiting[0].first.count == 0:
                read, more = 0, [(self.waiting[0].members[0][0], Generated([], "", "length"))]
                self._take_first(1)
            elif not (count := self._room(self.waiting[0])):
                break  # others wait behind it, so that one of many tokens has its turn
            elif len(group := self._group(budget)) > 1:
                read, more = self._admit(group)
            else:
                party, row = self._take_first(count), len(self.rows)
                self._count(party.members, time.perf_counter())
                self.boarding = party, Boarding(self.session, self.state.rows(row, row + 1), party.first, self.guessing)
                continue
            budget -= read
            pieces += more
        return pieces

    def _bytes(self, request: Request) -> int:
        """Memory that a request's row takes; none is counted where there is no limit."""
        return 0 if self.cache_bytes is None else self.state.caches.row_bytes(request.positions)

    def _room(self, party: Party) -> int:
        """Members of a party that get rows now: as many as ever can at once, or none."""
        count = min(len(party.members), self.slots)
        if self.cache_bytes is not None:
            each = max(self._bytes(request) for _, request in party.members)
            count = min(count, self.cache_bytes // each)
            if sum(self.taken.values()) + count * each > self.cache_bytes:
                return 0
        return count if len(self.rows) + count <= self.slots else 0

    def _take_first(self, count: int) -> Party:
        """Takes the first members of the party that waits longest out of the queue."""
        party = self.waiting[0].split(count)
        if not self.waiting[0].members:
            self.waiting.popleft()
        return party

    def _count(self, members: Sequence[tuple[int, Request]], started: float) -> None:
        """Takes down that requests got rows, and the memory of these."""
        for number, request in members:
            self.boarded.append((number, started))
            if self.cache_bytes is not None:
                self.taken[number] = self._bytes(request)

    def _end_boarding(self) -> None:
        """Gives up the row whose prompt is being read."""
        assert self.boarding is not None
        party, boarding = self.boarding
        self.boarding = None
        for number, _ in party.members:
            self.taken.pop(number, None)
        self.state.caches.release(boarding.state.first)

    def _read_on(self, party: Party, boarding: Boarding, budget: int) -> tuple[int, Pieces]:
        """Reads on in the prompt that is being read. Returns the tokens read, and the first pieces at its end."""
        try:
            read, logits_V = self.pace.of_piece(boarding, budget) if self.rows else boarding.read(budget)
            riders = [] if logits_V is None else boarding.riders([request for _, request in party.members])
        except Exception as error:  # of whatever kind: it is this prompt's, and the others go on
            self._end_boarding()
            return 0, [(number, failed(step_error(error))) for number, _ in party.members]
        if logits_V is None:
            return read, []
        self.boarding = None
        row, held = len(self.rows), boarding.state.first - self.state.first
        with self.session.lock:
            if held != row:  # rows before it were left meanwhile
                self._move(held, row)
            for copy in range(row + 1, row + len(riders)):
                self.state.move(row, copy)
        self.rows += [(number, rider) for (number, _), rider in zip(party.members, riders, strict=True)]
        return read, self._take(row, [logits_V] * len(riders))

    def _group(self, budget: int) -> list[tuple[int, Request]]:
        """The next requests, several where their prompts together are no longer than the budget and a piece.

        One alone where it may go on from the beginning that another leaves, has images, or failed among others.
        """
        most = min(budget, self.session.decoder.longest, self.session.spec.chunk or self.session.decoder.longest)
        group, longest = [self.waiting[0].members[0]], len(self.waiting[0].first.prompt.ids)
        if self.session.prefixes.limit or len(self.waiting[0].members) > 1:
            return group
        free = (self.cache_bytes or 0) - sum(self.taken.values()) - self._bytes(group[0][1])
        for party in itertools.islice(self.waiting, 1, self.slots - len(self.rows)):
            number, request = party.members[0]
            longest, free = max(longest, len(request.prompt.ids)), free - self._bytes(request)
            plain = group[-1][1].is_plain and request.is_plain and not self.alone & {group[-1][0], number}
            fits = (len(group) + 1) * longest <= most and (self.cache_bytes is None or free >= 0)
            if not plain or len(party.members) > 1 or not fits:
                break
            group.append((number, request))
        return group

    def _admit(self, group: list[tuple[int, Request]]) -> tuple[int, Pieces]:
        """Reads several prompts at once into rows. Returns the tokens computed, pads included, and the first pieces.

        Where that fails, they stay in the queue, to be read alone, so that only the one that is to blame ends.
        """
        first, started = len(self.rows), time.perf_counter()
        try:
            part = self.state.rows(first, first + len(group))
            requests = [request for _, request in group]
            riders, logits_BV = board_together(self.session, part, requests, self.guessing)
        except Exception:  # of whatever kind: it comes again where it comes from
            self.alone |= {number for number, _ in group}
            return 0, []
        self._count(group, started)
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
                pieces.append((number, failed(step_error(error))))
        for row in reversed(range(first, len(self.rows))):
            if pieces[row - first][1].finish is not None:
                self._vacate(row)
        return pieces

    def _vacate(self, row: int) -> None:
        """Leaves a row, and moves the last row's sequence there."""
        number, _ = self.rows[row]
        self.taken.pop(number, None)
        self.alone.discard(number)
        last = self.rows.pop()
        if row < len(self.rows):
            with self.session.lock:
                self._move(len(self.rows), row)
            self.rows[row] = last
        else:
            self.state.caches.release(self.state.first + row)

    def _move(self, source: int, target: int) -> None:
        """Puts a row's sequence where another's was, whose memory is given back, as is that of its own row then."""
        self.state.caches.release(self.state.first + target)
        self.state.move(source, target)
        self.state.caches.release(self.state.first + source)


def stream_requests(
    session: TokenSession,
    requests: Sequence[Request],
    slots: int | None,
    prefill_budget: int | None = None,
    guessing: Guessing | None = None,
) -> Iterator[tuple[int, Generated]]:
    """Runs requests through a flight until all have ended. Yields a request's place in the sequence, and a piece.

    Without a budget each step reads prompts as the decoder takes them, which is the fastest for all together.
    """
    if not requests:
        return
    positions = max(1, *(request.positions for request in requests))
    budget = session.decoder.longest if prefill_budget is None else prefill_budget
    flight = Flight(session, slots, positions, budget, guessing=guessing)
    for request in requests:
        flight.join(request)
    while flight.waiting or flight.riding:
        yield from flight.step()
