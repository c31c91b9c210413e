"""The service manager that started this process, where it asks to be notified (systemd's `Type=notify`).

Enters: states. Leaves: datagrams to the socket that `NOTIFY_SOCKET` names, as sd_notify(3) describes them; nothing
where there is none. Invariant: the manager's absence or deafness never disturbs the server.
"""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress


class ServiceManager:
    """The manager.

    Args:
        environment: What the process was started with.
        process: This process's number.

    Attributes:
        seconds: Seconds within which the manager wants to hear that all is well; 0 where it has no watchdog.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, process: int | None = None) -> None:
        self.address = environment.get("NOTIFY_SOCKET", "")
        own = str(os.getpid() if process is None else process)
        limit = environment.get("WATCHDOG_USEC", "") if environment.get("WATCHDOG_PID", own) == own else ""
        self.seconds = int(limit) / 1e6 if self.address and limit.isascii() and limit.isdigit() else 0.0

    def say(self, state: str) -> None:
        """Tells the manager a state, as `READY=1`."""
        if not self.address.startswith(("/", "@")) or not hasattr(socket, "AF_UNIX"):
            return
        address = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        with suppress(OSError, ValueError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(state.encode(), address)
