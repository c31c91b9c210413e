"""Weight files as they are mapped into memory, and whether they are still the ones that were mapped.

A mapped file is read when its pages are used. One that is cut short meanwhile ends the process (SIGBUS), and one that
is written over changes what is computed: neither can be caught, but a change of size or time is seen before a prompt.
"""

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import FolderError, SessionError
from .reading import open_regular


@dataclass(frozen=True, slots=True)
class Watched:
    """Mapped files, and the size, time and number that each had then."""

    files: tuple[tuple[Path, tuple[int, int, int]], ...] = ()

    @classmethod
    def of(cls, paths: Iterable[Path]) -> "Watched":
        """Notes the state of files.

        Raises:
            FolderError: One is not there.
        """
        try:
            return cls(tuple((path, _state(path)) for path in paths))
        except OSError as error:
            raise FolderError(f"{error.filename}: {error.strerror}: restore the file") from error

    def check(self) -> None:
        """Looks whether the files are as they were.

        Raises:
            SessionError: One is gone or has changed.
        """
        for path, state in self.files:
            try:
                is_same = _state(path) == state
            except OSError:
                is_same = False
            if not is_same:
                raise SessionError(
                    f"{path} has changed since it was loaded, and this session reads it in place: restore the file and "
                    "load again, or export with --copy-weights"
                )


def map_file(path: Path, access: int = mmap.ACCESS_READ) -> mmap.mmap:
    """Maps a file, where it is a regular one that is not empty.

    Raises:
        FolderError: It cannot be mapped.
    """
    try:
        with open_regular(path) as file:
            return mmap.mmap(file.fileno(), 0, access=access)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise FolderError(f"{path}: cannot be mapped ({said}): restore the file") from error


def _state(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino
