"""Arithmetic of memory and threads, and whether what is asked for fits this machine; asked before any is allocated.

Enters: a geometry and what a caller wants of it. Leaves: bytes, or a `SessionError` with the figures. `inspect`, `load`
and `start` count alike, since they count here.
"""

from ..errors import SessionError
from ..files.machine_memory import Room, find_room
from ..files.processors import processors
from ..spec.geometry import ModelSpec

THREADS_PER_PROCESSOR = 8
"""Threads of one operator at most, for each processor: more than one wait for each other."""

FEWEST_REFUSED = 64
"""Threads that are not refused, however few processors there are."""


def layer_slots(model: ModelSpec, positions: int) -> list[int]:
    """Positions that each layer's buffers hold; a chunked layer's hold one chunk at most."""
    return [min(layer.chunk or positions, positions) for layer in model.layers]


def cache_bytes(model: ModelSpec, batch: int, positions: int, slot: int) -> int:
    """Bytes of the keys and values of a batch of rows.

    Args:
        model: Geometry.
        batch: Rows.
        positions: Positions that a row can hold.
        slot: Bytes of one position's key and value in one layer.
    """
    return batch * sum(layer_slots(model, positions)) * slot


def check_fits(what: str, needed: int, remedy: str, room: Room | None = None) -> None:
    """Refuses what needs more memory than there is.

    Args:
        what: What is asked for, as an error names it.
        needed: Bytes.
        remedy: What the error advises.
        room: The memory that there is; None looks at this machine's and its container's.

    Raises:
        SessionError: It does not fit.
    """
    room = room or find_room()
    if needed > room.free:
        raise SessionError(
            f"{what} takes {size(needed)} of memory, {size(room.free)} are free of the {size(room.limit)} of "
            f"{room.holder}: {remedy}"
        )


def usual_prefix_bytes(room: Room) -> int:
    """Bytes of known beginnings that a server keeps where nobody says: a quarter of what is free, 256 MB at most."""
    return min(256 << 20, max(0, room.free) // 4)


def check_threads(threads: int | None) -> int:
    """The number of threads of one operator; None takes the processors that this process may use.

    Raises:
        SessionError: There are none, or far more than processors.
    """
    count = processors()
    if threads is None:
        return count
    if threads < 1:
        raise SessionError(f"threads is {threads}, expected a whole number from 1 up")
    most = max(FEWEST_REFUSED, THREADS_PER_PROCESSOR * count)
    if threads > most:
        raise SessionError(f"threads is {threads}, this process may use {count} processors: give at most {most}")
    return threads


def size(count: int) -> str:
    """Bytes in words, as in 1.5 GB."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.95:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:,.1f} {unit}"
        amount /= 1000
    return f"{amount:,.1f} PB"
