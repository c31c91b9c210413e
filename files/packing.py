"""A bundle as one file: an uncompressed tar archive that holds all a machine needs, and a manifest of hashes.

Enters: a bundle or a group of bundles, whose weights may lie elsewhere. Leaves: the archive, `spec.json` first and
`manifest.json` last; and from it the folder. Invariant: what is unpacked is data from anywhere: no file is written
outside of the new folder, none that is not a regular one, and nothing stands there that the manifest does not prove.
"""

import dataclasses
import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

from ..errors import FolderError, shortened, shortened_text
from ..spec.folder import FolderSpec
from ..spec.types import Progress
from .folders import SPEC, check_no_rank, find_files, is_packed, rank_fingerprint, rank_folder, read_spec
from .manifest import BLOCK, MANIFEST, MOST_FILES, Entry, check_path, own_files, read_manifest, to_json
from .output import new_folder
from .reading import SMALL, open_regular
from .single import check_writable, new_file

START = b"spec.json\0"
"""First bytes of an archive: the name of its first file."""

PACK_AGAIN = "pack the bundle again, or copy the file again"

Source = Path | bytes


def pack_bundle(
    bundle: str | Path,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Path:
    """Packs a bundle, its weights among it wherever they lie, into one file.

    The same bundle makes the same bytes: names are sorted, and times and owners are left out.

    Args:
        bundle: The bundle, or a group of them.
        out: The file to write.
        weights: Folder of the weight files, where they have moved.
        force: Whether a packed bundle at `out` is replaced.
        progress: Called with the phase, the MiB done and the MiB in all.

    Returns:
        The file.

    Raises:
        FolderError: `bundle` is none, a file of it is missing or damaged, or `out` exists or cannot be written.
    """
    folder, file = Path(bundle), Path(out)
    spec = read_spec(folder)
    check_no_rank(folder, spec)
    if not spec.target:
        raise FolderError(f"{folder} is a {spec.kind}, built for no machine yet: pack what `arriero build` makes of it")
    if file.absolute().resolve().is_relative_to(folder.resolve()):
        raise FolderError(f"{file} lies in the folder that is packed: choose an output beside it")
    check_writable(file, force=force, start=START)
    parts = _parts(folder, spec, None if weights is None else Path(weights))
    known = _known(folder)
    with new_file(file) as temporary, temporary.open("xb") as opened:
        entries = _write(parts, opened, progress)
        changed = sorted(name for name in known.keys() | entries.keys() if known.get(name) != entries.get(name))
        if known and changed:
            raise FolderError(
                f"{folder / changed[0]} is not what {MANIFEST} says: build the bundle again, with --force"
            )
    return file


def _known(folder: Path) -> dict[str, Entry]:
    try:
        return read_manifest(folder)
    except FileNotFoundError:
        return {}


def _parts(folder: Path, spec: FolderSpec, weights: Path | None) -> dict[str, Source]:
    """The archive's files: each one's path here, or its content where that is another than here."""
    if spec.kind != "group":
        return _bundle_parts(folder, spec, weights)
    parts: dict[str, Source] = {name: folder / name for name in own_files(folder) if not name.startswith("rank-")}
    hashes = []
    for rank in range(spec.ranks):
        path, own = rank_folder(folder, spec, rank)
        of_rank = _bundle_parts(path, own, weights)
        text = of_rank[SPEC]
        hashes.append(spec.rank_hashes[rank] if isinstance(text, Path) else rank_fingerprint(path, text))
        parts |= {f"{path.name}/{name}": source for name, source in of_rank.items()}
    if tuple(hashes) != spec.rank_hashes:
        parts[SPEC] = dataclasses.replace(spec, rank_hashes=tuple(hashes)).to_json().encode()
    return parts


def _bundle_parts(folder: Path, spec: FolderSpec, weights: Path | None) -> dict[str, Source]:
    """The files of one bundle, its weights among them, and a spec that looks for them nowhere else."""
    parts: dict[str, Source] = {name: folder / name for name in own_files(folder)}
    parts |= find_files(folder, spec.weight_files, weights)
    if any(file.path for file in spec.weight_files):
        own = tuple(dataclasses.replace(file, path="") for file in spec.weight_files)
        parts[SPEC] = dataclasses.replace(spec, weight_files=own).to_json().encode()
    return parts


def _write(parts: Mapping[str, Source], out: BinaryIO, progress: Progress) -> dict[str, Entry]:
    """Writes the archive. Returns what its manifest lists."""
    sizes = {name: len(each) if isinstance(each, bytes) else each.stat().st_size for name, each in parts.items()}
    names = sorted(parts, key=lambda name: (name != SPEC, sizes[name] > SMALL, name))
    total, done, entries = sum(sizes.values()) >> 20, 0, {}
    with tarfile.TarFile(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            progress("packing", done >> 20, total)
            source = parts[name]
            with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
                hashed = _Hashed(file)
                archive.addfile(_member(name, sizes[name]), hashed)
            entries[name] = Entry(bytes=sizes[name], sha256=hashed.digest.hexdigest())
            done += sizes[name]
        text = to_json(entries).encode()
        archive.addfile(_member(MANIFEST, len(text)), io.BytesIO(text))
    return entries


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


class _Hashed(io.RawIOBase):
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        found = self.file.read(size)
        self.digest.update(found)
        return found


class _Bounded(io.RawIOBase):
    """An archive's file, of which no header takes more memory than a small file may."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= SMALL:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        if whence == 0 and position < 0:
            raise tarfile.ReadError("a member before the beginning")
        return self.file.seek(position, whence)

    def tell(self) -> int:
        return self.file.tell()


def unpack_bundle(
    file: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Path:
    """Unpacks a packed bundle into a folder; each file's hash is proven on the way.

    Args:
        file: The packed bundle.
        out: The folder to write.
        force: Whether a folder of Arriero's at `out` is replaced.
        progress: Called with the phase, the MiB done and the MiB in all.

    Returns:
        The folder.

    Raises:
        FolderError: `file` is no packed bundle or damaged, or `out` exists or cannot be written.
    """
    path, folder = Path(file), Path(out)
    if not is_packed(path):
        what = "is a folder, which is used as it is" if path.is_dir() else "is no packed bundle"
        raise FolderError(f"{path} {what}: give a file that `arriero pack` wrote")
    with new_folder(folder, force=force) as temporary:
        try:
            with open_regular(path) as opened:
                found = _read(opened, path.stat().st_size, temporary, progress)
            (temporary / MANIFEST).write_bytes(found.manifest)
            expected = read_manifest(temporary)
            for name in sorted(expected.keys() | found.entries.keys()):
                if expected.get(name) != found.entries.get(name):
                    raise ValueError(f"{shortened_text(name, 100)} is not what {MANIFEST} says")
            _check_alone(temporary)
        except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
            said = shortened_text(str(error), 200)
            raise FolderError(f"{path}: damaged, or not of `arriero pack` ({said}): {PACK_AGAIN}") from error
        except FolderError as error:
            said = str(error).replace(f"{temporary}/", "").replace(str(temporary), "it")
            raise FolderError(f"{path}: {said}") from error
    return folder


@dataclasses.dataclass(slots=True)
class _Unpacked:
    """Files that were unpacked, and the manifest's text."""

    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)
    manifest: bytes = b""


def _read(opened: BinaryIO, size: int, folder: Path, progress: Progress) -> _Unpacked:
    """Unpacks an archive's members, each checked before it is written.

    Raises:
        ValueError: One is no regular file, leads elsewhere, or is not whole.
        tarfile.TarError: It is no archive.
    """
    found, seen = _Unpacked(), set[str]()
    bounded: Any = _Bounded(opened)
    with tarfile.TarFile(fileobj=bounded, mode="r") as archive:
        for member in archive:
            progress("unpacking", min(opened.tell(), size) >> 20, size >> 20)
            name = member.name
            check_path(name)
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                raise ValueError(f"{shortened_text(name, 100)} is no regular file")
            if name.casefold() in seen or len(seen) >= MOST_FILES:
                raise ValueError(
                    f"{shortened_text(name, 100)} is there twice, or there are more than {MOST_FILES} files"
                )
            if not 0 <= member.size <= size - member.offset_data:
                raise ValueError(
                    f"{shortened_text(name, 100)} has {member.size} bytes, which the archive does not hold"
                )
            seen.add(name.casefold())
            if name == MANIFEST:
                found.manifest = _content(archive, member)
            else:
                found.entries[name] = _extract(archive, member, folder / name)
    if not found.manifest:
        raise ValueError(f"{MANIFEST} is missing")
    return found


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > SMALL:
        raise ValueError(f"{MANIFEST} has {member.size} bytes")
    source = archive.extractfile(member)
    assert source is not None
    return source.read()


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> Entry:
    """Writes one file."""
    source = archive.extractfile(member)
    assert source is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, left = hashlib.sha256(), member.size
    with path.open("xb") as out:
        while left:
            block = source.read(min(BLOCK, left))
            if not block:
                raise ValueError(f"{shortened_text(member.name, 100)} ends early")
            digest.update(block)
            out.write(block)
            left -= len(block)
    return Entry(bytes=member.size, sha256=digest.hexdigest())


def _check_alone(folder: Path) -> None:
    """Refuses a bundle that reads files elsewhere, and what is none."""
    spec = read_spec(folder)
    if not spec.target:
        raise ValueError(f"it holds a {spec.kind}, no bundle")
    ranks = [rank_folder(folder, spec, rank)[1] for rank in range(spec.ranks)] if spec.kind == "group" else [spec]
    for file in (file for own in ranks for file in own.weight_files):
        if file.path:
            raise ValueError(f"weight file {shortened(file.name)} lies outside of it")
