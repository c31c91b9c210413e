"""Disks: which one is full, and room that is taken before it is used."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT}
"""Numbers of the errors that a full disk, or a user's share of it, gives."""

CHUNK = 1 << 20
"""Bytes written at once where the system cannot take room by itself."""


def full_disk(error: BaseException, *places: Path) -> str | None:
    """Names the disk that an error says is full, by its mount point and what is free, with the remedy.

    Args:
        error: The error; the path that it names decides.
        places: Paths that may have been written to, where it names none: the fullest disk of them is taken.

    Returns:
        None where the error is another.
    """
    if not isinstance(error, OSError) or error.errno not in FULL:
        return None
    named = [Path(os.fsdecode(error.filename))] if isinstance(error.filename, str | bytes) else []
    disks = [disk for place in named or [*places, Path(tempfile.gettempdir())] if (disk := _disk(place))]
    if not disks:
        return "the disk is full: make room on it"
    free, mount = min(disks)
    share = "quota on it is used up" if error.errno == errno.EDQUOT else "disk is full"
    remedy = "make room there" if named or places else "make room there, or set TMPDIR to a folder on another disk"
    if Path(tempfile.gettempdir()).resolve().is_relative_to(mount) and _is_temporary(named):
        remedy = "make room there, or set TMPDIR to a folder on another disk"
    return f"the {share}: {mount} has {free / 1e6:,.1f} MB free: {remedy}"


def _is_temporary(named: list[Path]) -> bool:
    folder = Path(tempfile.gettempdir()).resolve()
    return any(path.absolute().is_relative_to(folder) for path in named)


def _disk(place: Path) -> tuple[int, Path] | None:
    """Free bytes and mount point of the disk that a path lies on, or its nearest folder that exists."""
    try:
        place = place.absolute()
        while not place.exists():
            if place == place.parent:
                return None
            place = place.parent
        place = place.resolve()
        free = shutil.disk_usage(place).free
        while not os.path.ismount(place) and place != place.parent:
            place = place.parent
    except OSError:
        return None
    return free, place


def take_room(path: Path, size: int) -> None:
    """Makes a file of zeros whose room on the disk is taken: a full disk is an error here, not a fault in its use.

    Raises:
        OSError: There is no room; the error names the file.
    """
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)
                return
            for start in range(0, size, CHUNK):
                file.write(bytes(min(CHUNK, size - start)))
    except OSError as error:
        path.unlink(missing_ok=True)
        error.filename = str(path)
        raise
