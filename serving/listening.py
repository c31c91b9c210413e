"""Sockets that a server listens on.

Enters: a name and a port, or a file. Leaves: open sockets. Invariant: a name is listened on at all of this machine's
addresses that it has, at one port, so that no client depends on which of them it tries first.
"""

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Any

from ..errors import SessionError, shortened

BACKLOG = 2048
TRIES = 16
"""Free ports that are tried until one is free at each address."""

LACKING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors of an address that this machine does not have, as where IPv6 is off."""

Address = tuple[socket.AddressFamily, tuple[Any, ...]]


def listen(host: str, port: int, unix_socket: Path | None = None) -> list[socket.socket]:
    """Opens the sockets.

    Args:
        host: An address of this machine's, or a name that it has.
        port: The port; 0 takes one that is free.
        unix_socket: A file to listen on instead.

    Raises:
        SessionError: The port is taken at one of the addresses, or none is this machine's.
    """
    if unix_socket is not None:
        return [_listen_on_file(unix_socket)]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses: list[Address] = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
        for _ in range(TRIES):
            try:
                return _listen_on_all(addresses)
            except OSError as error:
                if port or error.errno != errno.EADDRINUSE:
                    raise
        return _listen_on_all(addresses)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SessionError(
            f"cannot listen on {shortened(host)} port {port} ({reason}): give another --host or --port"
        ) from error


def _listen_on_all(addresses: list[Address]) -> list[socket.socket]:
    """Opens a socket at each address, all at the port of the first; one that this machine lacks is left out.

    Raises:
        OSError: A port is taken, or none is this machine's.
    """
    opened: list[socket.socket] = []
    lacking: OSError | None = None
    try:
        for family, (host, port, *rest) in addresses:
            port = opened[0].getsockname()[1] if opened else port
            try:
                opened.append(_listen_on(family, (host, port, *rest), alone=len(addresses) == 1))
            except OSError as error:
                if error.errno not in LACKING:
                    raise
                lacking = error
        if not opened:
            assert lacking is not None
            raise lacking
    except BaseException:
        for each in opened:
            each.close()
        raise
    return opened


def _listen_on(family: socket.AddressFamily, address: tuple[Any, ...], *, alone: bool) -> socket.socket:
    """Opens a socket; one of IPv6 takes IPv4 as well where the system has it so, but not beside others."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not alone:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _listen_on_file(path: Path) -> socket.socket:
    """Opens a socket in a file; one that nobody listens on any more is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()
        before = os.umask(0o117)  # the owner and the group may ask
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise SessionError(f"cannot listen on {path} ({reason}): give another --unix-socket") from error
    return listener
