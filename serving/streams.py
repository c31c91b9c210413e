"""Answers that end early where nobody waits for them: watched for the client's leaving, whole or as events.

Enters: a ride, and a writer that turns its pieces into bytes. Leaves: an answer over ASGI. Invariants: an error before
the first piece is an answer with its own status, one after it an event; a client that leaves ends its ride.
"""

import asyncio
import functools
import json
from collections.abc import Awaitable, Iterable
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..runtime import Generated
from .errors import RequestError, of_session, stopped
from .rides import Ride
from .service import Service

T = TypeVar("T")
PATIENCE = 10.0
"""Seconds without a piece after which a stream begins nevertheless, and goes on with comments."""

KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Writer(Protocol):
    """Writes a ride's pieces as events."""

    def begin(self) -> bytes:
        """Events that come first."""
        ...

    def write(self, index: int, piece: Generated) -> bytes:
        """Events of a piece; none where it changes nothing.

        Raises:
            RequestError: An error ended the sequence.
        """
        ...

    def end(self) -> bytes:
        """Events that come last."""
        ...

    def fail(self, error: RequestError) -> bytes:
        """Events of an error, the last."""
        ...


class PartWriter(Protocol):
    """Writes parts of an answer with nothing to await."""

    @property
    def is_open(self) -> bool:
        """Whether it can."""
        ...

    def write(self, body: bytes) -> None:
        """Writes a part, which is not empty."""
        ...


def event(data: Any) -> bytes:
    """An event with JSON as its data."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


quoted = json.encoder.encode_basestring_ascii
"""A text as JSON, as `json.dumps` writes it, at a tenth of the time."""


async def watched(service: Service, request: HttpRequest, ride: Ride, work: Awaitable[T]) -> T:
    """Awaits work on a ride, which ends when the client leaves or the work is cancelled."""
    watcher = asyncio.create_task(_watch(service, request.receive, ride))
    try:
        return await work
    finally:
        watcher.cancel()
        service.cancel(ride)


async def _watch(service: Service, receive: Receive, ride: Ride) -> None:
    """Ends a ride when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    service.cancel(ride)


class EventStream(Response):
    """A ride as server-sent events, its first pieces known.

    Args:
        service: The model.
        ride: The ride.
        writer: Writes its pieces.
        first: Its first pieces, where they came in time.
    """

    media_type = "text/event-stream"

    def __init__(self, service: Service, ride: Ride, writer: Writer, first: Iterable[tuple[int, Generated]]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self.service, self.ride, self.writer, self.first = service, ride, writer, first
        self.is_silent = True  # nothing was written since the last look

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream, until it ends or the client leaves."""
        watcher = asyncio.create_task(_watch(self.service, receive, self.ride))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            state = scope["state"]  # what stands between looks at an answer's start alone
            await self._send_all(state.get("send", send), state.get("writer"))
        finally:
            watcher.cancel()
            self.service.cancel(self.ride)

    async def _send_all(self, send: Send, at_once: PartWriter | None) -> None:
        body, pieces, write = self.writer.begin(), list(self.first), self.writer.write
        try:
            if not pieces:
                await send({"type": "http.response.body", "body": body + KEEP_ALIVE, "more_body": True})
                body, pieces = b"", await self._next(send)
            if at_once is not None:
                self.ride.take_at_once = functools.partial(self._take, at_once)
            while pieces:
                for index, piece in pieces:
                    body += write(index, piece)
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    body, self.is_silent = b"", False
                pieces = await self._next(send)
            body = self.writer.end()
        except RequestError as error:
            body += self.writer.fail(error)
        except asyncio.CancelledError:  # the server ends at once
            await send({"type": "http.response.body", "body": body + self.writer.fail(stopped()), "more_body": False})
            raise
        except Exception as error:  # of whatever kind: this stream's, said in its own way
            self.service.report(error)
            body += self.writer.fail(of_session(error))
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _next(self, send: Send) -> list[tuple[int, Generated]]:
        """Waits for pieces, a comment whenever nothing was written for a while, as while a call is not whole yet."""
        while True:
            try:
                async with asyncio.timeout(PATIENCE):  # `wait_for` makes a task of it, which comes a turn later
                    return await self.ride.next()
            except TimeoutError:
                if self.is_silent:
                    await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                self.is_silent = True

    def _take(self, at_once: PartWriter, index: int, piece: Generated) -> bool:
        """Writes a piece that comes while none waits, which saves most of what it costs. Returns whether it could."""
        if not at_once.is_open:
            return False
        if body := self.writer.write(index, piece):
            at_once.write(body)
            self.is_silent = False
        return True


async def stream(service: Service, request: HttpRequest, ride: Ride, writer: Writer) -> EventStream:
    """Opens a stream when its first pieces are there, or after a while.

    Raises:
        RequestError: An error came first, or the client has left.
    """
    watcher = asyncio.create_task(_watch(service, request.receive, ride))
    try:
        async with asyncio.timeout(PATIENCE):
            first = await ride.next()
    except TimeoutError:
        first = []
    except BaseException:
        service.cancel(ride)
        raise
    finally:
        watcher.cancel()
    if not (first or ride.riding):
        raise RequestError("the client has gone", status=499)
    if failed := next((piece.error for _, piece in first if piece.error is not None), None):
        service.cancel(ride)
        raise of_session(failed)
    return EventStream(service, ride, writer, first)
