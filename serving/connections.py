"""Connections whose requests' heads are bounded, in bytes, in headers and in seconds: uvicorn bounds none of them.

Enters: bytes of clients. Leaves: requests for the application, or a refusal in OpenAI's form. Invariants: what a client
sends before its request is known takes no more memory than a head may; a connection that sends no request is closed.
"""

import asyncio
import json
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from .errors import RequestError

HEAD_BYTES = 64 << 10
"""Bytes of a request's line and headers at most, and of the trailers behind a body in chunks."""

MOST_HEADERS = 256
HEAD_SECONDS = 30.0
"""Seconds that a request's head has to come, from the connection's opening or from its own first byte."""

LINGER_SECONDS = 2.0
"""Seconds that a refused client has to read why, while what it still sends is thrown away."""

OF_UPGRADES = (b"upgrade", b"connection", b"http2-settings")
"""Headers of an offer to speak another protocol."""


class BoundedConnection(HttpToolsProtocol):
    """A connection as uvicorn has it, its heads bounded."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.is_head = True  # a request's head is awaited or read
        self.has_begun = False
        self.unread = self.parts = self.count = self.size = 0
        self.refusal: RequestError | None = None
        self.is_refused = False
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a head."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all waiting."""
        self._unset_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads on, unless a head is longer than it may be."""
        if self.is_refused:
            return
        if self.timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()
        parts = self.parts
        self._parse(data)
        self.unread = 0 if self.parts != parts else self.unread + len(data)  # of one header, which the parser holds
        if self.unread > HEAD_BYTES and not self.is_refused:
            self._refuse(_too_large())

    def on_message_begin(self) -> None:
        """Begins a head."""
        self.is_head = self.has_begun = True
        self.count = self.size = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Takes a part of the address."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a header; a trailer is counted and forgotten."""
        self.count += 1
        self._count(len(name) + len(value) + 4)
        if self.is_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Ends a head, and begins to answer; the application finds its `PromptWriter` under `writer` in its state."""
        if self._offers_upgrade:  # the parser takes what follows for another protocol's
            return
        self.is_head = self.has_begun = False
        self.parts += 1
        self._unset_timer()
        super().on_headers_complete()
        self.cycle.scope["state"]["writer"] = PromptWriter(self.cycle)
        if self.cycle.scope["http_version"] == "1.0":  # which knows no chunks: an answer ends with its connection
            self.cycle.chunked_encoding, self.cycle.expected_content_length = False, _AnyLength()

    def on_body(self, body: bytes) -> None:
        """Takes a part of the body."""
        self.parts += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Ends a request; what comes next is another's head."""
        if self._offers_upgrade:
            return
        super().on_message_complete()
        self.is_head = True
        self.parts += 1

    def on_response_complete(self) -> None:
        """Ends an answer; the next request's head may have begun behind it."""
        super().on_response_complete()
        if self.has_begun and self.timer is None and not self.transport.is_closing():
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        """Refuses what the parser does not take."""
        refused = self.refusal or RequestError("the request is no HTTP: send it as HTTP/1.1 has it")
        self._refuse(refused)

    @property
    def _offers_upgrade(self) -> bool:
        """Whether the request that is read offers to speak another protocol, as Java's client does in each."""
        return bool(self.parser.should_upgrade()) and any(name == b"upgrade" for name, _ in self.headers)

    def _parse(self, data: bytes) -> None:
        """Reads on. An offer of another protocol is passed over, with a parser that has not seen it (RFC 9110, 7.8)."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            if not self._offers_upgrade:  # the request is to be a tunnel
                self.send_400_response("")
                return
            (behind,) = upgrade.args
            head = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
            head += [b"%b: %b" % (name, value) for name, value in self.headers if name not in OF_UPGRADES]
            if not self.parser.should_keep_alive():
                head.append(b"connection: close")
            self.parser = HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self._parse(b"\r\n".join([*head, b"", data[behind:]]))
        except HttpParserError:
            self.send_400_response("")

    def _count(self, size: int) -> None:
        self.parts += 1
        self.size += size
        if self.size > HEAD_BYTES or self.count > MOST_HEADERS:
            self.refusal = _too_large()
            raise self.refusal  # out of the parser

    def _refuse(self, error: RequestError) -> None:
        """Says why, if no answer has begun, and closes the connection once the client may have read it."""
        self.is_refused = True
        self._unset_timer()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started or self.pipeline:  # a second answer would spoil it
                self.transport.abort()
                return
        body = json.dumps(error.body).encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.status] + head + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.timer = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _await_head(self) -> None:
        self.timer = self.loop.call_later(HEAD_SECONDS, self._end_waiting)

    def _end_waiting(self) -> None:
        self.timer = None
        if self.has_begun:
            self._refuse(RequestError(f"the head did not come within {HEAD_SECONDS:g} s: send it again", status=408))
        else:
            self.transport.close()

    def _unset_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class _AnyLength(int):
    """The length of an answer that is not known: uvicorn subtracts what it writes, and expects 0 in the end."""

    def __lt__(self, other: object) -> bool:
        return False

    def __sub__(self, other: int) -> "_AnyLength":
        return self

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


class PromptWriter:
    """Writes parts of an answer's body with nothing to await, which saves most of what a part costs.

    Args:
        cycle: The request.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self.cycle = cycle

    @property
    def is_open(self) -> bool:
        """Whether an answer in chunks has begun, and its client is there and reads as fast as it is sent to."""
        cycle = self.cycle
        if cycle.flow.write_paused or cycle.disconnected or cycle.response_complete:
            return False
        return bool(cycle.response_started and cycle.chunked_encoding)

    def write(self, body: bytes) -> None:
        """Writes a part, which is not empty."""
        self.cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))


def _too_large() -> RequestError:
    limit = f"{HEAD_BYTES} bytes or {MOST_HEADERS} headers"
    return RequestError(f"the request's head is larger than {limit}: send less", status=431, code="head_too_large")
