"""A single file that a verb writes: complete, or not there, and not over another's."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import FolderError
from .output import reason, remove_leftovers, unwritable
from .reading import open_regular


def check_writable(path: Path, *, force: bool, start: bytes) -> None:
    """Refuses a file that exists, unless `force` allows to replace it and it begins as Arriero's do.

    Args:
        path: The file.
        force: Whether it may be replaced.
        start: First bytes of a file of this kind.

    Raises:
        FolderError: It may not be replaced, or nothing can be written where it is to be.
    """
    if (why := unwritable(path.absolute().parent)) is not None:
        raise FolderError(f"{path}: writing failed ({why}): choose another output")
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise FolderError(f"{path} is a folder: give the name of a file with -o")
    try:
        with open_regular(path) as file:
            is_ours = file.read(len(start)) == start
    except OSError:  # a pipe, a link to nothing, or not this user's
        is_ours = False
    if not is_ours:
        raise FolderError(f"{path} exists and is none of Arriero's: it is not replaced, choose another output")
    if not force:
        raise FolderError(f"{path} exists: choose another output, or --force to replace it")


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole.

    Raises:
        FolderError: It cannot be written.
    """
    with new_file(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields the path of a file to write, which becomes `path` when the block ends without an error.

    What a killed writer of the same file left beside it goes.

    Raises:
        FolderError: It cannot be written.
    """
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        start = f".{path.name[:100]}.{os.getpid()}."
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=start, suffix=".partial") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            temporary.replace(path)
    except OSError as error:
        raise FolderError(f"{path}: writing failed ({reason(error, path.parent)}): choose another output") from error
