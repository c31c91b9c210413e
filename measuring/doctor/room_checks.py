"""Memory that a CPU bundle will take beside the limits of machine and container, disks, and the server's port."""

import bisect
import dataclasses
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ...errors import FolderError, SessionError, shortened
from ...files.folders import rank_folder
from ...files.machine_memory import Room, find_room
from ...files.trust import state_folder
from ...runtime.memory import Memory, session_memory
from ...runtime.room import size, usual_prefix_bytes
from ...runtime.state import Limits
from ...spec.folder import FolderSpec
from .finding import Finding, found, ok, seen

SPARE_DISK = 64 << 20
"""Bytes that the folder for temporary files should have free."""


def check_memory(folder: Path, spec: FolderSpec, slots: int, max_seq: int | None) -> Finding:
    """Holds what a CPU bundle takes with all of its slots full against the memory that there is."""
    return seen("memory", lambda: _memory(folder, spec, slots, max_seq))


def _memory(folder: Path, spec: FolderSpec, slots: int, max_seq: int | None) -> Finding:
    longest = Limits.of(spec.model, max_seq, slots).max_seq
    parts = _parts(folder, spec)

    def needed(rows: int, positions: int) -> int:
        return sum(_of_part(part, own, rows, positions).total - PRESENT for part, own in parts)

    room = find_room()
    kept = usual_prefix_bytes(room)
    room, total = dataclasses.replace(room, free=room.free - kept), needed(slots, longest)
    whole, process = size(max(total, 0) + PRESENT + kept), size(PRESENT)
    what = f"{slots} sequence{'s' * (slots > 1)} of {longest} tokens take {whole} at most"
    there = f"{size(room.free + kept)} are free of the {size(room.limit)} of {room.holder}"
    if total <= room.free:
        among = f"weights, {size(kept)} of known beginnings and {process} that this process has already among them"
        return ok("memory", f"{what}, {among}; {there}")
    return found("memory", f"{what}, {there}: {_remedy(needed, slots, longest, room)}")


PRESENT = 60_000_000
"""Bytes of the process that this one has already, and are not free any more."""


def _remedy(needed: Callable[[int, int], int], slots: int, longest: int, room: Room) -> str:
    """The settings nearest to those asked for that fit."""
    rows = bisect.bisect(range(1, min(slots, sys.maxsize) + 1), room.free, key=lambda rows: needed(rows, longest))
    if rows:
        return f"serve it with --slots {rows}"
    length = longest
    while length > 1:
        length //= 2
        if needed(1, length) <= room.free:
            return f"serve it with --slots 1 --max-seq {length}"
    least = needed(1, 1)
    return f"it needs {size(least)} with one sequence: give the container more memory, or quantise to fewer bits"


def _parts(folder: Path, spec: FolderSpec) -> list[tuple[Path, FolderSpec]]:
    """The bundles that sessions are opened of: a group's ranks, or the one."""
    if spec.kind != "group":
        return [(folder, spec)]
    ranks = [rank_folder(folder, spec, rank) for rank in range(spec.ranks)]
    return [(path, dataclasses.replace(own, model=own.rank_model)) for path, own in ranks]


def _of_part(folder: Path, spec: FolderSpec, slots: int, max_seq: int) -> Memory:
    """Memory of one bundle's session."""
    parts = ["" if part is None else part.graph for part in (spec.vision, spec.draft)]
    try:
        graph, tower, draft = [(folder / name).stat().st_size if name else 0 for name in (spec.graph, *parts)]
    except OSError as error:
        raise FolderError(f"{error.filename}: {error.strerror}: build the bundle again") from error
    return session_memory(spec, graph, tower, max_seq, slots, draft)


def check_disk(spec: FolderSpec | None) -> Finding:
    """Looks whether temporary files, and what is kept for this user, can be written."""
    return seen("disk", lambda: _disk(spec))


def _disk(spec: FolderSpec | None) -> str:
    temporary = Path(tempfile.gettempdir())
    free = shutil.disk_usage(temporary).free
    if free < SPARE_DISK:
        raise SessionError(f"{temporary} has {size(free)} free: make room there, or set TMPDIR to another folder")
    said = f"{temporary} has {size(free)} free"
    if spec is None or spec.engine is None:
        return said
    place = state_folder()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK):
        raise SessionError(
            f"{state_folder()} cannot be written, where trusted engines and compiled steps are remembered: set "
            "XDG_STATE_HOME to a folder that this user can write"
        )
    return f"{said}; {state_folder()} can be written"


def check_port(host: str, port: int) -> Finding:
    """Looks whether a server can listen."""
    return seen("port", lambda: _port(host, port))


def _port(host: str, port: int) -> str:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SessionError(
            f"{shortened(host)} port {port} cannot be listened on ({reason}): end what listens there, or serve with "
            "--port 0, which takes a free one"
        ) from error
    return f"{host} port {port} is free"
