"""Images on other hosts, fetched where the server's owner allows the host.

Enters: an address. Leaves: the bytes of a file. Invariants: only named hosts are asked, over a connection to an address
that was looked at before, so that no name leads to this machine or its private network, after a redirect or otherwise;
size and time are bounded.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Collection
from urllib.parse import urljoin, urlsplit

from ..errors import shortened
from .errors import RequestError

MOST_BYTES = 64 << 20
MOST_SECONDS = 20.0
MOST_REDIRECTS = 3


def fetch_image(url: str, hosts: Collection[str]) -> bytes:
    """Fetches an image.

    Args:
        url: Its address.
        hosts: Names of hosts that may be asked.

    Raises:
        RequestError: Its host is not among them or has a private address, or there is no file of a fitting size.
    """
    deadline = time.monotonic() + MOST_SECONDS
    for _ in range(MOST_REDIRECTS + 1):
        found = _get(url, hosts, deadline)
        if isinstance(found, bytes):
            return found
        url = found
    raise RequestError(f"the image at {shortened(url)} is redirected too often: give its own address")


def _get(url: str, hosts: Collection[str], deadline: float) -> bytes | str:
    """Asks for a file. Returns its bytes, or the address that it is redirected to."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower().rstrip("."), parts.port
    except ValueError as error:
        raise _refused(url, f"its address is damaged ({error})") from error
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise _refused(url, "expected http:// or https:// and a host")
    if host not in hosts:
        raise _refused(url, f"the host {shortened(host)} is not allowed (--allow-image-host)")
    port = port or (443 if parts.scheme == "https" else 80)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = _Pinned(host, port, _public_address(url, host, port), parts.scheme == "https")
    try:
        connection.timeout = max(0.1, deadline - time.monotonic())
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "arriero"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and (place := answer.getheader("Location")):
            return urljoin(url, place)
        if answer.status != 200:
            raise _refused(url, f"the host answered {answer.status}")
        return _read(url, answer, connection, deadline)
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
        raise _refused(url, f"it could not be fetched ({type(error).__name__})") from error
    finally:
        connection.close()


def _read(url: str, answer: http.client.HTTPResponse, connection: "_Pinned", deadline: float) -> bytes:
    """Reads an answer, within size and time."""
    found = bytearray()
    while piece := answer.read1(1 << 16):
        found += piece
        if len(found) > MOST_BYTES:
            raise _refused(url, f"it is larger than {MOST_BYTES} bytes")
        left = deadline - time.monotonic()
        if left <= 0:
            raise _refused(url, f"it took longer than {MOST_SECONDS:g} s")
        if connection.sock is not None:
            connection.sock.settimeout(left)
    return bytes(found)


def _public_address(url: str, host: str, port: int) -> str:
    """The address of a host, where all that its name stands for are public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _refused(url, f"the host {shortened(host)} is not known") from error
    addresses = [str(each[4][0]) for each in found]
    for address in addresses:
        known = ipaddress.ip_address(address.partition("%")[0])
        known = getattr(known, "ipv4_mapped", None) or known
        if not known.is_global or known.is_multicast:
            raise _refused(url, f"the host {shortened(host)} has a private address")
    return addresses[0]


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, which answers for a host by name."""

    def __init__(self, host: str, port: int, address: str, is_secure: bool) -> None:
        super().__init__(host, port)
        self.address, self.is_secure = address, is_secure
        self.default_port = 443 if is_secure else 80

    def connect(self) -> None:
        self.sock = socket.create_connection((self.address, self.port), self.timeout)
        if self.is_secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


def _refused(url: str, why: str) -> RequestError:
    return RequestError(f"the image at {shortened(url)} is refused: {why}: give a data: URL")
