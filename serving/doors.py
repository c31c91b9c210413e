"""Doors that a request passes before it is looked at: its number, the host it names, its key, and the log behind it.

Enters: ASGI's requests. Leaves: those that may pass, with their caller. Invariants: keys are compared in constant time,
all of them each time; a server without keys on this machine's own address answers no page of another site that calls
itself by this machine's address (DNS rebinding).
"""

import asyncio
import hashlib
import hmac
import re
import ssl
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import SessionError
from ..files.reading import read_bytes, read_text
from .errors import RequestError, of_session, stopped
from .json_answers import JsonAnswer
from .logs import Log, new_number
from .service import Caller

OPEN = ("/", "/health", "/ready")
"""Paths that need no key: the page, which asks for one itself, and what tells balancers how the server is."""

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
REMEDY = "give a file with a key in each line"
PEM = "give the path of a certificate and of its key, in PEM"
LARGEST_PEM = 1 << 20
"""Bytes of a certificate's or key's file at most."""

LONGEST_KEY = 1024
"""Characters of an API key at most."""

LOCAL = ("localhost", "127.0.0.1", "::1", "[::1]", "")


def read_keys(path: Path) -> list[bytes]:
    """Reads a file of API keys, one a line; empty lines and those that begin with # are none.

    Returns:
        Their digests.

    Raises:
        SessionError: It cannot be read, or holds no keys.
    """
    try:
        lines = read_text(path, SessionError, REMEDY).splitlines()
    except FileNotFoundError as error:
        raise SessionError(f"{path}: cannot be read ({error.strerror}): {REMEDY}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise SessionError(f"{path}: holds no keys: write one in each line, or leave --api-key-file out")
    if any(len(key) > LONGEST_KEY or not key.isprintable() for key in keys):
        raise SessionError(f"{path}: keys have 1 to {LONGEST_KEY} printable characters: {REMEDY}")
    return [hashlib.sha256(key.encode()).digest() for key in keys]


def check_certificate(certificate: Path | None, key: Path | None) -> None:
    """Refuses files that no TLS can be spoken with, before the server reads them.

    Args:
        certificate: The certificate in PEM, or None where no TLS is spoken.
        key: Its key; None where the certificate's file holds it.

    Raises:
        SessionError: One is damaged, too large, of the other's kind, or asks for a password.
    """
    if certificate is None:
        if key is not None:
            raise SessionError("--tls-key is given without --tls-certificate: give both")
        return
    for path in (certificate, key):
        if path is not None and not path.is_file():
            raise SessionError(f"{path} is not a file: {PEM}")
        if path is not None:
            read_bytes(path, SessionError, PEM, most=LARGEST_PEM)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        files = certificate if key is None else f"{certificate} and {key}"
        said = getattr(error, "reason", None) or "the key has a password"
        raise SessionError(f"{files}: no certificate and its key ({said}): {PEM}, without a password") from error


class Doors:
    """Lets requests pass to an application.

    Args:
        app: The application; it finds its `Caller` under `caller` in the request's state, the server's own `send`, and
            may put what the log shows under `about`.
        keys: Digests of API keys; empty asks for none.
        hosts: Names that the server is called by; empty takes any.
        log: The log.
        opened: Paths that need no key.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[bytes], hosts: Collection[str], log: Log, opened: Collection[str] = OPEN
    ) -> None:
        self.app, self.keys, self.hosts, self.log, self.opened = app, keys, hosts, log, opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass, or refuses it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.perf_counter()
        about: dict[str, Any] = {}
        given = headers.get("x-request-id", "")
        number = given if REQUEST_ID.fullmatch(given) else new_number()
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        scope.setdefault("state", {}).update(about=about, send=send)
        try:
            scope["state"]["caller"] = self._caller(scope, headers)
        except RequestError as error:
            answer = JsonAnswer(error.body, error.status, error.headers)
            await answer(scope, receive, send_on)
        else:
            try:
                await self.app(scope, receive, send_on)
            except asyncio.CancelledError:  # the server ends at once
                if not status:
                    await JsonAnswer(stopped().body, stopped().status)(scope, receive, send_on)
                raise
            except Exception as error:  # of whatever kind: it ends this request alone
                self.log.fault(error)
                if not status:
                    answer = JsonAnswer(of_session(error).body, 500)
                    await answer(scope, receive, send_on)
        if scope["path"] not in ("/health", "/ready", "/metrics"):
            seconds = round(time.perf_counter() - started, 4)
            line = {"id": number, "method": scope["method"], "path": scope["path"][:200], "status": status}
            shown = {name: value() if callable(value) else value for name, value in about.items()}
            self.log.write("request", **line, seconds=seconds, **shown)

    def _caller(self, scope: Scope, headers: Headers) -> Caller:
        """Who asks.

        Raises:
            RequestError: The request names another host, or has no key that fits.
        """
        address = (scope.get("client") or ("",))[0]
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        if self.hosts and name not in self.hosts:
            raise RequestError(
                "the request names another host than this server's: ask for it by its address, or start it with "
                "--allow-host or with API keys",
                status=403,
                code="host_not_allowed",
            )
        if not self.keys or scope["path"] in self.opened or scope["method"] == "OPTIONS":
            return Caller(address=address)
        kind, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        fits = 0
        for each in self.keys:
            fits |= hmac.compare_digest(each, digest)
        if kind.lower() != "bearer" or not fits:
            raise RequestError(
                "the API key is missing or wrong: send Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return Caller(tenant=digest[:16], address=address)
