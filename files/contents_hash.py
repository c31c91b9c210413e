"""One hash for the contents of a folder, wherever it lies and whatever wrote it down.

Enters: a folder of Arriero's, a checkpoint, or a file. Leaves: a SHA-256. It is taken over the small files that decide
what is computed, and over the identities of the weight files, as `safetensors.identity` has them, so that it takes
milliseconds at any size. A folder that was moved or copied keeps its hash; `spec.json`'s paths are left out.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import ArrieroError, CheckpointError, FolderError
from ..spec.folder import FolderSpec
from .folders import SPEC, read_spec
from .reading import open_regular
from .safetensors import identity

BLOCK = 1 << 20
PLACES = ("source", "source_hashes", "tools", "version")
"""Fields of `spec.json` that say where and by what a folder was made."""


def contents_hash(path: str | Path) -> str:
    """The hash of a folder or file.

    Raises:
        FolderError: It cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return file_hash(path)
    if (path / SPEC).exists():
        parts = _of_folder(path, read_spec(path))
    else:
        parts = {"config.json": file_hash(path / "config.json"), **weight_identities(path)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weight_identities(path: str | Path) -> dict[str, str]:
    """The identity of each weight file by its name: those that `spec.json` lists, or a checkpoint's own.

    Raises:
        FolderError: A file cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return {path.name: file_hash(path)}
    if (path / SPEC).exists():
        return {file.name: file.identity for file in read_spec(path).weight_files}
    try:
        return {file.name: identity(file) for file in sorted(path.glob("*.safetensors"))}
    except CheckpointError as error:
        raise FolderError(str(error)) from error


def file_hash(path: Path) -> str:
    """A file's SHA-256.

    Raises:
        FolderError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise FolderError(f"{path}: {error.strerror or error}: restore the file") from error
    return digest.hexdigest()


def _of_folder(path: Path, spec: FolderSpec) -> dict[str, Any]:
    """The parts of a folder of Arriero's that its hash is taken over."""
    fields = {name: value for name, value in dataclasses.asdict(spec).items() if name not in PLACES}
    for file in fields["weight_files"]:
        file["path"] = ""
    names = [spec.graph, *(part.graph for part in (spec.vision, spec.draft) if part is not None)]
    names += [spec.engine.file] if spec.engine else []
    names += [spec.vision.engine.file] if spec.vision and spec.vision.engine else []
    files = {name: file_hash(path / name) for name in [*names, "tokenizer.json"] if name and (path / name).is_file()}
    return {"spec": fields, "files": files}


def contents_bytes(path: str | Path) -> int:
    """Bytes of a file, or of a folder with the weight files that it reads elsewhere.

    Raises:
        FolderError: `spec.json` cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    listed = {file.name: file.size for file in read_spec(path).weight_files} if (path / SPEC).exists() else {}
    own = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name not in listed)
    return own + sum(listed.values())


def described(path: str | Path) -> dict[str, Any]:
    """A folder or file in a result: its path, hash, bytes and weight files; what cannot be read is None."""
    try:
        known = {"hash": contents_hash(path), "bytes": contents_bytes(path), "weights": weight_identities(path)}
    except (ArrieroError, OSError):
        known = {"hash": None, "bytes": None, "weights": {}}
    return {"path": str(path), **known}
