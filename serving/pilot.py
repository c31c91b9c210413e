"""The one thread that steps a flight, and hands what it gives to the event loop.

Enters: rides, from the event loop. Leaves: their pieces, handed over once a step. Invariant: the flight is touched by
its thread alone; rides by the event loop alone, but for the numbers that the thread gives them. A fault that is not a
request's own ends the rides that are on board, and a new flight takes the next; where none can be opened any more, the
model is lost, and all that wait or come learn so.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ForbiddenError, shortened_text
from ..runtime import Flight, Generated, Request, Session
from ..runtime.guesses import Guessing
from ..runtime.party import Pieces, failed
from .errors import RequestError, is_requests_own, lost_model, step_failed, without_folders
from .fairness import FairQueue
from .metrics import Metrics
from .rides import FINISHES, Countdown, Ride

MOST_RETRY_SECONDS = 60
MOST_STEP_SECONDS = 5.0
"""Seconds that the step under way has to end when the server ends."""

WAIT_SHARE, LEAST_WAIT, MOST_WAIT = 0.2, 0.0005, 0.002
"""The share of a step's time, and seconds, that a step waits for first tokens to be on their way to clients: with all
processors computing they would leave late, and it costs the others little, once a sequence."""

MOST_FAILURES = 3
"""Sequences that ended with no fault of their own, and no other between them, after which a new flight is tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlightSettings:
    """A flight's settings, as `Flight` has them.

    Attributes:
        slots: Sequences at once.
        prefill_budget: Tokens of prompts that a step reads beside decoding rows; None takes the flight's own.
        cache_bytes: Keys and values of all rows at most.
        queue: Sequences that wait at most.
        guessing: How next tokens are guessed; None takes the model's draft, where it has one.
    """

    slots: int
    prefill_budget: int | None
    cache_bytes: int | None
    queue: int
    guessing: Guessing | None = None


@dataclass(slots=True)
class Batch:
    """Pieces of a step, for the event loop."""

    boarded: list[tuple[Ride, int, float]] = field(default_factory=list)
    pieces: list[tuple[Ride, int, Generated]] = field(default_factory=list)
    used: float = 0.0
    time: float = 0.0
    written: Countdown | None = None


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
        self.failures = 0  # sequences that have failed since one ended well
        self.lost: str | None = None
        self.thread = threading.Thread(target=self._run, name="pilot", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self.thread.start()

    def stop(self) -> bool:
        """Ends the thread after the step that it is in; rides on board get no more pieces.

        Returns:
            Whether it has ended: a step that hangs is waited for as long as `MOST_STEP_SECONDS`.
        """
        self.inbox.put(("stop", None))
        if self.thread.is_alive():
            self.thread.join(MOST_STEP_SECONDS)
        return not self.thread.is_alive()

    @property
    def fault(self) -> str | None:
        """Why the model is lost for good, in one line for clients; None while it is not."""
        found = self.lost or self.session.fault
        return None if found is None else without_folders(found)

    def steps_within(self, seconds: float) -> bool:
        """Whether the thread lives with its model, and has been in one step for less than so long."""
        began = self.stepped
        is_well = self.thread.is_alive() and self.fault is None
        return is_well and (not began or time.perf_counter() - began < seconds)

    def check_queue(self) -> None:
        """Raises the refusal with 429 where all rows are taken, and as many sequences wait as may."""
        if self.active >= self.settings.slots + self.settings.queue:
            seconds = 1 + int(self.seconds * (self.waiting + self.active) / (2 * self.settings.slots))
            raise RequestError(
                f"{self.settings.slots} sequences run and {self.settings.queue} wait at most: try again later",
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
        return Flight(
            self.session, settings.slots, None, settings.prefill_budget, settings.cache_bytes, settings.guessing
        )

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
            found, boarded = self._fly()
            batch.boarded = [(*self.numbers[number], started) for number, started in boarded]
            for number, piece in found:
                ride, index = self.numbers[number]
                if piece.finish is not None:
                    del self.numbers[number]
                    piece = self._judged(piece)
                batch.pieces.append((ride, index, piece))
        except Exception as error:  # none that a request makes comes this far
            self.report(error)
            self._start_anew(batch, error)
        if self.failures >= MOST_FAILURES and not self.numbers:  # whether it is the flight that fails
            self._start_anew(batch, None)
        if self.lost is None and self.failures and (fault := self.session.fault) is not None:
            self._lose(batch, fault)
        self._hand_over(batch)

    def _fly(self) -> tuple[Pieces, list[tuple[int, float]]]:
        """Steps the flight. Returns its pieces, and what got rows, and when."""
        if self.lost is not None:
            return [], []
        found = self.flight.step()
        boarded, self.flight.boarded = self.flight.boarded, []
        return found, boarded

    @property
    def _used(self) -> float:
        return self.flight.used if self.lost is None else 0.0

    def _judged(self, last: Generated) -> Generated:
        """A sequence's last piece, an error in it as the client gets it; counts ends by such errors."""
        if last.error is None or isinstance(last.error, ForbiddenError):
            self.failures = 0
            return last
        if not self.failures:  # the first says why
            self.report(last.error)
        self.failures += 1
        return failed(step_failed(last.error))

    def _hand_over(self, batch: Batch) -> None:
        batch.used, batch.time = self._used, time.perf_counter()
        wait = min(MOST_WAIT, WAIT_SHARE * self.flight.pace.step) if self.lost is None else 0.0
        firsts = {ride for ride, index, _ in batch.pieces if not ride.timelines[index].first}
        if firsts and wait >= LEAST_WAIT:
            batch.written = Countdown(firsts)
        if batch.pieces or batch.boarded:
            self._call(self._deliver, batch)
        if batch.written is not None:
            batch.written.event.wait(wait)

    def _obey(self, command: str, ride: Ride) -> None:
        """Lets a ride join or leave."""
        if command == "join":
            first = 0
            for party in ride.parties:
                self.queue.push(ride.user, (ride, first, party))
                first += len(party)
            return
        self.queue.remove(lambda entry: entry[0] is ride)
        leaving = [number for number, (each, _) in self.numbers.items() if each is ride]
        for number in leaving:
            del self.numbers[number]
        try:
            for number in leaving:
                self.flight.leave(number)
        except Exception as error:  # its rows are in no state that is known
            self.report(error)
            batch = Batch()
            self._start_anew(batch, error)
            self._hand_over(batch)
        self._call(self._left, ride, self._used)

    def _feed(self, batch: Batch) -> None:
        """Gives the flight as many sequences as it has rows for; where the model is lost, each gets the error."""
        while len(self.queue) and self._has_room():
            ride, first, party = self.queue.pop()
            try:
                if self.lost is not None:
                    raise lost_model(without_folders(self.lost))
                numbers = self.flight.join_as_one(party)
            except Exception as error:
                if not is_requests_own(error):
                    self.report(error)
                batch.pieces += [(ride, first + index, failed(error)) for index in range(len(party))]
                continue
            for index, number in enumerate(numbers, first):
                self.numbers[number] = ride, index

    def _has_room(self) -> bool:
        if self.lost is not None:
            return True
        waiting = sum(len(each.members) for each in self.flight.waiting)
        return self.flight.riding + waiting < self.flight.slots

    def _start_anew(self, batch: Batch, error: Exception | None) -> None:
        """Ends all on board with an error; a new flight takes those that wait, or the model is lost."""
        if error is not None:
            self._end_all(batch, step_failed(error))
        for each in (error, *(piece.error for *_, piece in batch.pieces)):
            if each is not None:
                each.__traceback__ = None  # which holds the old flight, whose memory the new one takes
        self.failures = 0
        del self.flight
        try:
            self.flight = self._open()
        except Exception as why:
            self._lose(batch, shortened_text(str(why) or type(why).__name__))

    def _lose(self, batch: Batch, reason: str) -> None:
        """Takes down that there is no model any more. Those on board learn why."""
        self.lost, error = reason, lost_model(without_folders(reason))
        batch.pieces = [(ride, index, failed(error) if piece.error else piece) for ride, index, piece in batch.pieces]
        self._end_all(batch, error)
        self.report(lost_model(reason))

    def _end_all(self, batch: Batch, error: Exception) -> None:
        """Ends all on board with an error."""
        batch.pieces += [(ride, index, failed(error)) for ride, index in self.numbers.values()]
        batch.boarded = []
        self.numbers.clear()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has ended, and with it all who wait
            self.numbers.clear()

    def _deliver(self, batch: Batch) -> None:
        """Hands pieces to their rides, in the event loop."""
        metrics, now = self.metrics, batch.time
        if batch.written is not None:
            batch.written.begin()
        for ride, index, boarded in batch.boarded:
            timeline = ride.timelines[index]
            timeline.boarded = boarded
            self.waiting -= 1
            metrics.queue_time.observe(boarded - timeline.joined)
        gaps, tokens = dict[float, int](), 0
        for ride, index, piece in batch.pieces:
            timeline = ride.timelines[index]
            if piece.ids:
                timeline.tokens += len(piece.ids)
                if timeline.first:
                    gaps[timeline.last] = gaps.get(timeline.last, 0) + 1  # nearly all of a step have one
                else:
                    timeline.first = now
                    metrics.first_token.observe(now - timeline.joined)
                    metrics.prefill_time.observe(now - timeline.boarded)
                    if prompt := ride.prompts.get(index):
                        metrics.count_prompt(prompt, piece.reused)
                timeline.last = now
                tokens += len(piece.ids)
                if piece.drafted:
                    metrics.drafted += piece.drafted
                    metrics.accepted += piece.accepted
            if piece.finish is not None:
                self._ended(ride, index, piece, now)
            ride.put(index, piece)
            if not ride.riding:
                self.rides.discard(ride)
        for last, count in gaps.items():
            metrics.inter_token.observe(now - last, count)
        metrics.generation_tokens += tokens
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
