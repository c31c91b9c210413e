"""Memory of the machine that this process can have: what is free, and the limits of its control groups and its own.

Enters: nothing. Leaves: bytes. Where the system is not Linux nothing is known, and nothing is refused.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from .control_groups import legacy_groups, number, unified_groups, words

MEMORY = Path("/proc/meminfo")
OWN_STATUS = Path("/proc/self/status")

UNKNOWN = sys.maxsize
"""Bytes where nobody knows."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that this process can have.

    Attributes:
        free: Bytes that it can take without swapping, beyond what it has.
        limit: Bytes of all that holds it: the machine, its container, or its own limit.
        holder: Name of what leaves the least.
    """

    free: int
    limit: int
    holder: str


def find_room() -> Room:
    """The memory that this process can have, as the tightest of its limits leaves it."""
    rooms = [_of_machine(), *_of_groups(), _of_process()]
    return min((room for room in rooms if room is not None), key=lambda room: room.free, default=UNLIMITED)


UNLIMITED = Room(UNKNOWN, UNKNOWN, "this machine")


def _of_machine() -> Room | None:
    fields = _fields(MEMORY)
    if "MemAvailable" not in fields or "MemTotal" not in fields:
        return None
    return Room(fields["MemAvailable"], fields["MemTotal"], "this machine")


def _of_groups() -> list[Room]:
    """Rooms of the control groups; what a group holds of files can be given back, and is not counted."""
    found = []
    for folder in unified_groups():
        limit = number(folder / "memory.max")
        if limit is not None:
            found.append(_left(limit, _statistic(folder, "anon")))
    for folder in legacy_groups("memory"):
        limit = number(folder / "memory.limit_in_bytes")
        if limit is not None and limit < 1 << 60:  # a number near 2^63 is none
            found.append(_left(limit, _statistic(folder, "total_rss")))
    return found


def _left(limit: int, used: int) -> Room:
    return Room(max(0, limit - used), limit, "this process's control group (container)")


def _statistic(folder: Path, name: str) -> int:
    found = words(folder / "memory.stat")
    return int(found[found.index(name) + 1]) if name in found[:-1] else 0


def _of_process() -> Room | None:
    """The room under the limit of this process's address space (`ulimit -v`)."""
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _fields(OWN_STATUS).get("VmSize")
    if limit == resource.RLIM_INFINITY or used is None:
        return None
    return Room(max(0, limit - used), limit, "this process (ulimit -v)")


def _fields(file: Path) -> dict[str, int]:
    """The fields of one of the system's files that are sizes, in bytes."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    pairs = [(name, value.split()) for name, _, value in (line.partition(":") for line in lines)]
    return {name: int(value[0]) * 1024 for name, value in pairs if len(value) == 2 and value[1] == "kB"}
