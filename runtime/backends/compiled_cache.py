"""TensorRT-RTX's compiled kernels, kept in a file so that the next session compiles none.

Enters: an engine's file. Leaves: a cache for its execution contexts, filled from the file of an earlier session.
Invariant: what cannot be read or written is done without; TensorRT-RTX refuses a cache of another GPU or driver itself.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

from ...errors import FolderError
from ...files.reading import read_bytes

LARGEST = 1 << 33
"""Bytes of a cache at most."""

ENDING = ".compiled"


class CompiledCache:
    """The cache of one engine.

    Args:
        config: TensorRT-RTX's runtime configuration, which makes the cache.
        engine: The engine's file.
        sha256: SHA-256 of it, by which a cache in the user's folder is known.
    """

    def __init__(self, config: Any, engine: Path, sha256: str) -> None:
        self.cache, self.size = config.create_runtime_cache(), 0
        beside = engine.with_name(engine.name + ENDING)
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        own = Path(home) / "arriero" / f"{sha256}{ENDING}"
        self.paths = (beside, own)
        for path in self.paths:
            if self._read(path):
                break

    def _read(self, path: Path) -> bool:
        with contextlib.suppress(OSError, FolderError):
            data = read_bytes(path, most=LARGEST)
            if self.cache.deserialize(data):
                self.size = len(data)
                return True
        return False

    def save(self) -> None:
        """Writes the cache where it has grown: beside the engine, or in the user's cache folder."""
        data = bytes(self.cache.serialize())
        if len(data) <= self.size:
            return
        self.size = len(data)
        for path in self.paths:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
                    file.write(data)
                Path(file.name).replace(path)
                return
