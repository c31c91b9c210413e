"""Small files as they are read, whoever wrote them: regular, of a bounded size, decoded, parsed within bounds.

Enters: a path. Leaves: bytes, text or JSON. Invariant: no pipe, device or folder is opened, no more than a bound is
read, and what a folder holds is not read through a link that leads out of it, but into a hub's cache.
"""

import io
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ArrieroError, FolderError, shortened_text
from ..spec.json_text import parse_json

SMALL = 32 << 20
"""Bytes of a small file at most: more than Llama 4's tokenizer has."""

BLOBS, SNAPSHOTS, REPOSITORY = "blobs", "snapshots", "models--"
"""A hub's cache: `models--OWNER--NAME/snapshots/REVISION/FILE` is a link to `models--OWNER--NAME/blobs/HASH`."""

HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""The name of a blob."""

Kind = type[ArrieroError]

AGAIN = "export again from an intact checkpoint"


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading, where it is a regular one; nothing that could wait or never end is opened.

    Raises:
        OSError: It is missing, or something else; the error's `strerror` says what.
    """
    try:
        _check_regular(os.stat(path).st_mode, path)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
    except ValueError as error:  # a path with a NUL in it
        raise OSError(0, str(error), str(path)) from error
    try:
        _check_regular(os.fstat(descriptor).st_mode, path)  # it may be another by now
        return io.BufferedReader(_Unwaiting(descriptor, "rb"))
    except BaseException:
        os.close(descriptor)
        raise


class _Unwaiting(io.FileIO):
    """A file that ends where it would wait, as the kernel's log does behind its last line."""

    def readinto(self, buffer: Any, /) -> int:
        return super().readinto(buffer) or 0

    def readall(self) -> bytes:
        return super().readall() or b""


def _check_regular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        error = IsADirectoryError if stat.S_ISDIR(mode) else OSError
        raise error(0, f"{kind}, expected a regular file", str(path))


def read_bytes(
    path: Path, kind: Kind = FolderError, remedy: str = AGAIN, *, folder: Path | None = None, most: int = SMALL
) -> bytes:
    """Reads a small file.

    Args:
        path: The file.
        kind: Class of the error.
        remedy: What the error advises.
        folder: The folder that the file belongs to, which a link may not lead out of; None lets it lead anywhere.
        most: Bytes at most.

    Raises:
        FileNotFoundError: There is no such file.
        ArrieroError: It is of `kind`; the file is not regular, too large, cannot be read, or lies elsewhere.
    """
    if folder is not None:
        check_inside(path, folder, kind)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = (
                file.read((min(most, size) if size else most) + 1) if size <= most else b""
            )  # of /proc the size is 0
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise kind(f"{path}: a link to a file that is missing: {remedy}") from error
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror or error}): {remedy}") from error
    if max(size, len(content)) > most:
        raise kind(f"{path}: {max(size, len(content))} bytes, expected at most {most}: {remedy}")
    return content


def read_text(
    path: Path, kind: Kind = FolderError, remedy: str = AGAIN, *, folder: Path | None = None, most: int = SMALL
) -> str:
    """Reads a small file of UTF-8 text; the arguments and errors are those of `read_bytes`."""
    content = read_bytes(path, kind, remedy, folder=folder, most=most)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind(
            f"{path}: cannot be read (no UTF-8 text, byte {error.start} is {content[error.start]:#04x}): {remedy}"
        ) from error


def read_json(
    path: Path, kind: Kind = FolderError, remedy: str = AGAIN, *, folder: Path | None = None, most: int = SMALL
) -> dict[str, Any]:
    """Reads a small file that holds a JSON object; the arguments and errors are those of `read_bytes`."""
    text = read_text(path, kind, remedy, folder=folder, most=most)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise kind(f"{path}: damaged, not JSON ({shortened_text(str(error))}): {remedy}") from error
    if not isinstance(value, dict):
        raise kind(f"{path}: damaged, not a JSON object: {remedy}")
    return value


def check_inside(path: Path, folder: Path, kind: Kind = FolderError) -> None:
    """Refuses a link that leads out of a folder, but into a hub's cache.

    Raises:
        ArrieroError: It is of `kind`; the file that the path leads to lies elsewhere.
    """
    try:
        target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    except (OSError, ValueError):
        return  # reading it says what is wrong
    if home.parent.name == SNAPSHOTS:
        home = home.parent.parent  # the repository, whose blobs lie beside its snapshots
    if not target.is_relative_to(home) and not _is_of_hub(target):
        raise kind(
            f"{shortened_text(str(path))} is a link out of its folder, to {shortened_text(str(target), 100)}: put the "
            "file itself there"
        )


def _is_of_hub(target: Path) -> bool:
    """Whether a file lies where a hub's cache keeps a repository's files."""
    if target.parent.name == BLOBS:
        return HASH.fullmatch(target.name) is not None
    above = target.parent.parent
    return above.name == SNAPSHOTS and above.parent.name.startswith(REPOSITORY)
