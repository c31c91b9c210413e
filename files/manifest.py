"""The manifest of a bundle: bytes and SHA-256 of every file in it, so that a copy is proven to be the same.

Enters: a folder. Leaves: `manifest.json` in it, or the files that are not as it says. It lists every file but itself.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FolderError, shortened, shortened_text
from ..spec.fields import decode
from ..spec.sizes import check_hash, check_name, check_sizes
from ..spec.types import Progress
from .reading import check_inside, open_regular, read_json

MANIFEST = "manifest.json"
SCHEMA = 1
MOST_FILES = 20_000
"""Files of a bundle at most: a group of 256 ranks with its kernels has fewer."""

DEEPEST = 3
"""Parts of a file's path at most, as of `rank-0/kernels/x.cubin`."""

BLOCK = 1 << 20
AGAIN = "copy or unpack the bundle again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file as the manifest has it.

    Attributes:
        bytes: Its size.
        sha256: SHA-256 of its content.
    """

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_sizes(self, ("bytes",), 0, 2**53)
        check_hash("the SHA-256 of a file", self.sha256)


def write_manifest(folder: Path, progress: Progress = lambda phase, done, total: None) -> None:
    """Writes the manifest of all files that a folder holds.

    Raises:
        FolderError: One is not a regular file of the folder's own, or cannot be read.
    """
    names = own_files(folder)
    entries = {}
    for number, name in enumerate(names):
        progress("hashing", number, len(names))
        entries[name] = entry_of(folder / name)
    (folder / MANIFEST).write_text(to_json(entries), "utf-8")


def to_json(entries: Mapping[str, Entry]) -> str:
    """The text of `manifest.json`."""
    files = {name: {"bytes": each.bytes, "sha256": each.sha256} for name, each in sorted(entries.items())}
    return json.dumps({"schema": SCHEMA, "files": files}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Reads a folder's manifest.

    Raises:
        FileNotFoundError: It has none.
        FolderError: It is damaged, of a newer version, or names a file that is outside of the folder.
    """
    path = folder / MANIFEST
    found = read_json(path, remedy=AGAIN, folder=folder)
    try:
        if type(found.get("schema")) is not int or found["schema"] != SCHEMA:
            raise ValueError(f"schema {shortened(found.get('schema'))}, this Arriero reads {SCHEMA}")
        files: Any = found.get("files")
        if not isinstance(files, dict) or len(files) > MOST_FILES:
            raise ValueError(f"files is {shortened(files)}")
        for name in files:
            check_path(name)
        return {name: decode(Entry, each) for name, each in files.items()}
    except (ValueError, TypeError) as error:
        raise FolderError(f"{path}: damaged ({error}): {AGAIN}") from error


def check_path(name: str) -> None:
    """Refuses what is not the path of a file in a bundle, on any system.

    Raises:
        ValueError: It leads elsewhere, or is nested too deeply.
    """
    parts = name.split("/")
    if len(parts) > DEEPEST:
        raise ValueError(f"the file {shortened(name)} is nested more than {DEEPEST} deep")
    for part in parts:
        check_name("the path of a file", part)


def own_files(folder: Path) -> list[str]:
    """The paths of all files in a folder but the manifest, sorted.

    Raises:
        FolderError: One is not a regular file, a link out of the folder, or no bundle's; or there are too many.
    """
    names = []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        try:
            check_path(name)
        except ValueError as error:
            raise FolderError(f"{folder}: {error}: remove the file") from error
        check_inside(path, folder)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FolderError(f"{path} is no regular file: remove it")
        if name != MANIFEST:
            names.append(name)
    return sorted(names)


def _walk(folder: Path) -> Iterator[Path]:
    """All that a folder holds but folders; links to folders are not followed."""
    count = 0
    for place, _, files in os.walk(folder, onerror=_refuse):
        for name in files:
            count += 1
            if count > MOST_FILES:
                raise FolderError(f"{folder} holds more than {MOST_FILES} files: give a bundle's folder")
            yield Path(place) / name


def _refuse(error: OSError) -> None:
    raise FolderError(f"{error.filename}: {error.strerror}: make it readable") from error


def entry_of(path: Path) -> Entry:
    """A file's size and SHA-256.

    Raises:
        FolderError: It cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with open_regular(path) as file:
            while block := file.read(BLOCK):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise FolderError(f"{path}: {error.strerror or error}: restore the file") from error
    return Entry(bytes=size, sha256=digest.hexdigest())


def differences(folder: Path, progress: Progress = lambda phase, done, total: None) -> list[str]:
    """The files that are not as the manifest says, each in words; none where all are.

    Raises:
        FileNotFoundError: There is no manifest.
        FolderError: The manifest is damaged, or the folder holds something that no bundle does.
    """
    entries = read_manifest(folder)
    present = set(own_files(folder))
    found = [f"{shortened_text(name, 100)} is missing" for name in sorted(entries.keys() - present)]
    found += [f"{shortened_text(name, 100)} is not in the manifest" for name in sorted(present - entries.keys())]
    for number, name in enumerate(sorted(present & entries.keys())):
        progress("hashing", number, len(present))
        if os.stat(folder / name).st_size != entries[name].bytes:
            found.append(f"{shortened_text(name, 100)} has another size")
        elif entry_of(folder / name) != entries[name]:
            found.append(f"{shortened_text(name, 100)} has another content")
    return found
