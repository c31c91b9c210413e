"""The one thread that steps a flight, and the rides of requests on it as the event loop sees them.

Enters: rides, from the event loop. Leaves: their pieces, handed over once a step. Invariant: the flight is touched by
its thread alone; rides by the event loop alone, but for the numbers that the thread gives them. A fault that is not a
request's own ends the rides that are on board, and a new flight takes the next.
"""

import asyncio
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime import Flight, Generated, Request, Session
from ..runtime.flight import failed
from .errors import RequestError
from .fairness import FairQueue
from .metrics import Metrics

MOST_RETRY_SECONDS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class FlightSettings:
    """A flight's settings, as `Flight` has them.

    Attributes:
        slots: Sequences at once.
        prefill_budget: Tokens of prompts that a step reads beside decoding rows; None takes the flight's own.
        cache_bytes: Keys and values of all rows at most.
        queue: Sequences that wait at most.
    """

    slots: int
    prefill_budget: int | None
    cache_bytes: int | None
    queue: int


class Ride:
    """One request's sequences on their way.

    Args:
        parties: Requests, those of one prompt together; they are numbered through.
        user: The name by which users take turns.
    """

    def __init__(self, parties: Sequence[Sequence[Request]], user: str) -> None:
        self.parties, self.user = parties, user
        self.started = time.perf_counter()
        self.timelines = [Timeline(self.started) for party in parties for _ in party]
        self.riding = set(range(len(self.timelines)))
        firsts = itertools.accumulate((len(party) for party in parties), initial=0)
        self.prompts = {first: len(party[0].prompt.ids) for first, party in zip(firsts, parties, strict=False)}
        self.pieces: deque[tuple[int, Generated]] = deque()
        self.timers: list[asyncio.TimerHandle] = []
        self._waiter: asyncio.Future[None] | None = None

    def first_token_seconds(self) -> float | None:
        """Seconds until its first token; None where none came."""
        firsts = [each.first for each in self.timelines if each.first]
        return round(min(firsts) - self.started, 4) if firsts else None

    async def next(self) -> list[tuple[int, Generated]]:
        """Waits for pieces. Returns all that are there, each with its sequence's number; none once all have ended."""
        while not self.pieces:
            if not self.riding:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        found = list(self.pieces)
        self.pieces.clear()
        return found

    def put(self, index: int, piece: Generated) -> None:
        """Takes a piece; the event loop alone does so."""
        if index in self.riding:
            if piece.finish is not None:
                self.riding.remove(index)
            self.pieces.append((index, piece))
            self._wake()

    def end(self, error: Exception | None) -> None:
        """Ends all that has not ended, with an error where there is one."""
        if error is not None:
            self.pieces += [(index, failed(error)) for index in sorted(self.riding)]
        self.riding.clear()
        self._wake()

    def _wake(self) -> None:
        if not self.riding:
            for timer in self.timers:
                timer.cancel()
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


@dataclass(slots=True)
class Timeline:
    """Moments of a sequence, in seconds of `time.perf_counter`.

    Attributes:
        joined: It came into the queue.
        boarded: It got a row; 0 before.
        first: Its first token came; 0 before.
        last: Its last token came; 0 before.
        tokens: New tokens.
    """

    joined: float
    boarded: float = 0.0
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


@dataclass(slots=True)
class Batch:
    """Pieces of a step, for the event loop."""

    boarded: list[tuple[Ride, int, float]] = field(default_factory=list)
    pieces: list[tuple[Ride, int, Generated]] = field(default_factory=list)
    used: float = 0.0
    time: float = 0.0


Entry = tuple[Ride, int, Sequence[Request]]
"""A ride, the number of a party's first sequence in it, and the party."""


class Pilot:
    """Steps a flight in a thread of its own, from `start` until `stop`.

    Args:
        session: The model.
        settings: The flight's.
        loop: The event loop that rides live on.
        metrics: What is counted.
        report: Called with an error that is not a request's own.
    """

    def __init__(
        self,
        session: Session,
        settings: FlightSettings,
        loop: asyncio.AbstractEventLoop,
        metrics: Metrics,
        report: Callable[[BaseException], None],
    ) -> None:
        self.session, self.settings, self.loop, self.metrics, self.report = session, settings, loop, metrics, report
        self.flight = self._open()
        self.longest = self._longest()
        self.inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.rides: set[Ride] = set()
        self.queue: FairQueue[Entry] = FairQueue()
        self.numbers: dict[int, tuple[Ride, int]] = {}
        self.waiting = self.active = 0  # sequences, as the event loop counts them
        self.seconds = 1.0  # a sequence's, from its row to its end: a mean that forgets
        self.stepped = 0.0  # when the step that runs now began; 0 between steps
        self.thread = threading.Thread(target=self._run, name="pilot", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self.thread.start()

    def stop(self) -> None:
        """Ends the thread after the step that it is in; rides on board get no more pieces."""
        self.inbox.put(("stop", None))
        if self.thread.is_alive():
            self.thread.join()

    def steps_within(self, seconds: float) -> bool:
        """Whether the thread lives, and has been in one step for less than so long."""
        began = self.stepped
        return self.thread.is_alive() and (not began or time.perf_counter() - began < seconds)

    def check_queue(self) -> None:
        """Raises the refusal with 429 where as many sequences wait as may, and no row is free."""
        if self.waiting >= self.settings.queue and self.active >= self.flight.slots:
            seconds = 1 + int(self.seconds * (self.waiting + self.active) / (2 * self.flight.slots))
            raise RequestError(
                f"{self.waiting} requests wait already: try again later",
                status=429,
                code="queue_full",
                headers={"Retry-After": str(min(seconds, MOST_RETRY_SECONDS))},
            )

    def submit(self, ride: Ride) -> None:
        """Puts a ride into the queue.

        Raises:
            RequestError: The queue is full.
        """
        self.check_queue()
        self.waiting += len(ride.timelines)
        self.active += len(ride.timelines)
        self._gauge()
        self.rides.add(ride)
        self.inbox.put(("join", ride))

    def cancel(self, ride: Ride, error: Exception | None = None) -> None:
        """Ends a ride that nobody waits for any more, or that an error ends; its rows are free at the next step."""
        if ride.riding:
            ride.end(error)
            self.rides.discard(ride)
            self.inbox.put(("leave", ride))

    def _open(self) -> Flight:
        settings = self.settings
        return Flight(self.session, settings.slots, None, settings.prefill_budget, settings.cache_bytes)

    def _longest(self) -> int:
        """Tokens of a sequence at most, as a row or the memory allows."""
        caches, limit = self.flight.state.caches, self.settings.cache_bytes
        least, most = 1, caches.positions
        while limit is not None and least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if caches.row_bytes(middle) <= limit else (least, middle - 1)
        return most

    def _run(self) -> None:
        while True:
            is_idle = not (self.numbers or len(self.queue))
            try:
                command, value = self.inbox.get(block=is_idle)
            except queue.Empty:
                self.stepped = time.perf_counter()
                self._step()
                self.stepped = 0.0
                continue
            if command == "stop":
                return
            try:
                self._obey(command, value)
            except Exception as error:  # a fault of ours: the thread goes on
                self.report(error)

    def _step(self) -> None:
        """Steps the flight, and hands over what it gave."""
        batch = Batch()
        try:
            self._feed(batch)
            found = self.flight.step()
            boarded, self.flight.boarded = self.flight.boarded, []
            batch.boarded = [(*self.numbers[number], started) for number, started in boarded]
            for number, piece in found:
                batch.pieces.append((*self.numbers[number], piece))
                if piece.finish is not None:
                    del self.numbers[number]
        except Exception as error:  # none that a request makes comes this far
            self.report(error)
            self._start_anew(batch, error)
        batch.used, batch.time = self.flight.used, time.perf_counter()
        if batch.pieces or batch.boarded:
            self._call(self._deliver, batch)

    def _obey(self, command: str, ride: Ride) -> None:
        """Lets a ride join or leave."""
        if command == "join":
            first = 0
            for party in ride.parties:
                self.queue.push(ride.user, (ride, first, party))
                first += len(party)
            return
        self.queue.remove(lambda entry: entry[0] is ride)
        for number in [number for number, (each, _) in self.numbers.items() if each is ride]:
            self.flight.leave(number)
            del self.numbers[number]
        self._call(self._left, ride, self.flight.used)

    def _feed(self, batch: Batch) -> None:
        """Gives the flight as many sequences as it has rows for."""
        flight = self.flight
        while len(self.queue) and flight.riding + sum(len(each.members) for each in flight.waiting) < flight.slots:
            ride, first, party = self.queue.pop()
            try:
                numbers = flight.join_as_one(party)
            except Exception as error:
                batch.pieces += [(ride, first + index, failed(error)) for index in range(len(party))]
                continue
            for index, number in enumerate(numbers, first):
                self.numbers[number] = ride, index

    def _start_anew(self, batch: Batch, error: Exception) -> None:
        """Ends all on board with an error; a new flight takes those that wait."""
        pieces = [(ride, index, failed(error)) for ride, index in self.numbers.values()]
        batch.pieces, batch.boarded = [*batch.pieces, *pieces], []
        self.numbers.clear()
        self.flight = self._open()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has ended, and with it all who wait
            self.numbers.clear()

    def _deliver(self, batch: Batch) -> None:
        """Hands pieces to their rides, in the event loop."""
        metrics, now = self.metrics, batch.time
        for ride, index, boarded in batch.boarded:
            timeline = ride.timelines[index]
            timeline.boarded = boarded
            self.waiting -= 1
            metrics.queue_time.observe(boarded - timeline.joined)
        for ride, index, piece in batch.pieces:
            timeline = ride.timelines[index]
            if piece.ids:
                timeline.tokens += len(piece.ids)
                if timeline.first:
                    metrics.inter_token.observe(now - timeline.last)
                else:
                    timeline.first = now
                    metrics.first_token.observe(now - timeline.joined)
                    metrics.prefill_time.observe(now - timeline.boarded)
                    if tokens := ride.prompts.get(index):
                        metrics.count_prompt(tokens, piece.reused)
                timeline.last = now
                metrics.generation_tokens += len(piece.ids)
                metrics.drafted += piece.drafted
                metrics.accepted += piece.accepted
            if piece.finish is not None:
                self._ended(ride, index, piece, now)
            ride.put(index, piece)
            if not ride.riding:
                self.rides.discard(ride)
        metrics.cache_usage = batch.used
        self._gauge()

    def _ended(self, ride: Ride, index: int, piece: Generated, now: float) -> None:
        timeline = ride.timelines[index]
        self.active -= 1
        if not timeline.boarded:
            self.waiting -= 1
            timeline.boarded = now
        self.seconds += 0.1 * (now - timeline.boarded - self.seconds)
        if timeline.first:
            self.metrics.decode_time.observe(now - timeline.first)
        self.metrics.whole_time.observe(now - timeline.joined)
        self.metrics.count_end("abort" if piece.finish == "error" else FINISHES[piece.finish or "eos"])
        timeline.joined = 0.0  # ended, and counted

    def _left(self, ride: Ride, used: float) -> None:
        """Counts the sequences of a cancelled ride that had not ended, in the event loop."""
        for timeline in ride.timelines:
            if timeline.joined:
                self.active -= 1
                self.waiting -= not timeline.boarded
                self.metrics.count_end("abort")
                timeline.joined = 0.0
        self.metrics.cache_usage = used
        self._gauge()

    def _gauge(self) -> None:
        self.metrics.waiting, self.metrics.running = self.waiting, self.active - self.waiting


FINISHES = {"eos": "stop", "stop": "stop", "length": "length"}
"""OpenAI's reasons of an end by a session's."""
