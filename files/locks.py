"""Locks on files, and the life of processes, on each system."""

import os
import sys
from pathlib import Path
from typing import IO


def lock_file(file: IO[str]) -> None:
    """Locks an open file until it is closed.

    Raises:
        BlockingIOError: Another process holds it.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_alive(process: int) -> bool:
    """Whether a process of this number is running; taken to be so where that cannot be found out."""
    if Path("/proc/self").exists():
        return Path(f"/proc/{process}").exists()
    if sys.platform == "win32":  # where signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
