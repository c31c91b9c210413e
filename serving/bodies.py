"""Bodies of requests, bounded each alone and all that are under way in common.

Enters: pieces of bodies as they come. Leaves: a whole body, or a refusal. Invariant: bytes count until their request
is answered, since so long something made of them is kept; a short body is never refused for others' sake.
"""

import asyncio

from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RequestError
from .metrics import Metrics

SHORT = 1 << 14
"""Bytes of a body that is read in the event loop; longer ones are read beside it."""

BODY_SECONDS = 60
"""Seconds that a request's body has to come."""


class CommonBound:
    """Lets requests pass to an application, while their bodies together are no larger than they may be.

    Args:
        app: The application.
        most: Bytes of all bodies at most.
        metrics: What is counted.
    """

    def __init__(self, app: ASGIApp, most: int, metrics: Metrics) -> None:
        self.app, self.most, self.metrics = app, most, metrics
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass; a piece of a long body that finds no room any more is refused with 429."""
        taken = 0

        async def receive_some() -> Message:
            nonlocal taken
            message = await receive()
            size = len(message.get("body", b""))
            taken += size
            self.held += size
            if self.held > self.most and taken > SHORT and size:
                self.metrics.refused += 1
                line = f"the requests under way have {self.most} bytes, which are all that this server takes at once"
                headers = {"Retry-After": "1"}
                raise RequestError(f"{line}: try again later", status=429, code="bodies_full", headers=headers)
            return message

        try:
            await self.app(scope, receive_some, send)
        finally:
            self.held -= taken


async def read_body(request: HttpRequest, most: int) -> bytearray:
    """Reads a request's body of JSON.

    Args:
        request: The request.
        most: Bytes of its body at most.

    Raises:
        RequestError: It is of another type, compressed, too large, or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"the body is {kind[:60] or 'of no type'}: send application/json", status=415)
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise RequestError(f"the body is in {coding[:60] or 'no coding'}: send it as it is", status=415)
    body = bytearray()
    if (length := request.headers.get("content-length", "0")).isdigit() and int(length[:20]) > most:
        raise _too_large(most)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise _too_large(most)
    except TimeoutError as error:
        raise RequestError(f"the body did not come within {BODY_SECONDS} s: send it again", status=408) from error
    return body


def _too_large(most: int) -> RequestError:
    return RequestError(f"the body is larger than {most} bytes: send less", status=413, code="body_too_large")
