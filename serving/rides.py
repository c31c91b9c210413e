"""Requests' sequences on their way, as the event loop sees them.

Enters: checked requests, and pieces of their sequences. Leaves: these pieces, to whoever awaits them. Invariant: rides
are the event loop's alone, but for the numbers that the flight's thread gives them.
"""

import asyncio
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..runtime import Generated, Request
from ..runtime.logprobs import TokenLogprobs
from ..runtime.party import failed

FINISHES = {"eos": "stop", "stop": "stop", "length": "length"}
"""Clients' reasons of an end, OpenAI's and Dynamo's, by a session's."""


class Ride:
    """One request's sequences on their way.

    Args:
        parties: Requests, those of one prompt together; they are numbered through.
        user: The name by which users take turns.

    Attributes:
        prompt_logprobs: Those of each party's prompt but its first token, where they are asked for.
        when_taken: Called once, when whoever awaits pieces has taken, and dealt with, those that are there.
        take_at_once: Called with a piece, not a sequence's last, while someone awaits pieces and none is there; where
            it returns True, it has taken the piece, and nobody is woken.
    """

    def __init__(self, parties: Sequence[Sequence[Request]], user: str) -> None:
        self.parties, self.user = parties, user
        self.started = time.perf_counter()
        self.timelines = [Timeline(self.started) for party in parties for _ in party]
        self.riding = set(range(len(self.timelines)))
        firsts = itertools.accumulate((len(party) for party in parties), initial=0)
        self.prompts = {first: len(party[0].prompt.ids) for first, party in zip(firsts, parties, strict=False)}
        self.pieces: list[tuple[int, Generated]] = []
        self.timers: list[asyncio.TimerHandle] = []
        self.prompt_logprobs: list[list[TokenLogprobs]] = []
        self.when_taken: Callable[[], None] | None = None
        self.take_at_once: Callable[[int, Generated], bool] | None = None
        self._waiter: asyncio.Future[None] | None = None

    def first_token_seconds(self) -> float | None:
        """Seconds until its first token; None where none came."""
        firsts = [each.first for each in self.timelines if each.first]
        return round(min(firsts) - self.started, 4) if firsts else None

    async def next(self) -> list[tuple[int, Generated]]:
        """Waits for pieces. Returns all that are there, each with its sequence's number; none once all have ended."""
        while not self.pieces:
            taken, self.when_taken = self.when_taken, None
            if taken is not None:
                taken()
            if not self.riding:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        found, self.pieces = self.pieces, []
        return found

    def put(self, index: int, piece: Generated) -> None:
        """Takes a piece; the event loop alone does so."""
        if index in self.riding:
            waiter, take = self._waiter, self.take_at_once
            if take is not None and waiter is not None and piece.finish is None and not waiter.done():
                try:
                    if take(index, piece):
                        return
                except Exception as error:  # of whatever kind: whoever waits learns of it
                    self._waiter = None
                    waiter.set_exception(error)
                    return
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


class Countdown:
    """Lets a thread wait until several rides' pieces have been dealt with in another.

    Args:
        rides: The rides.
    """

    def __init__(self, rides: Iterable[Ride]) -> None:
        self.left = set(rides)
        self.event = threading.Event()

    def begin(self) -> None:
        """Looks out for each ride, in the event loop."""
        for ride in self.left:
            ride.when_taken = functools.partial(self._count, ride)

    def _count(self, ride: Ride) -> None:
        self.left.discard(ride)
        if not self.left:
            self.event.set()


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
