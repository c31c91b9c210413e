"""Checkpoints in the Hugging Face hub's local cache, by their names or by the cache's own folders.

Enters: what a user gave for a checkpoint. Leaves: the folder with its files. Nothing is ever downloaded.
"""

import os
import re
from pathlib import Path

from ..errors import CheckpointError
from .reading import read_text

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
"""A repository's name on the hub, as `me/x`."""

PREFIX = "models--"

LONGEST = 4096
"""Bytes of `refs/main` at most: the name of a revision."""


def find_checkpoint(given: str | Path) -> Path:
    """The folder of a checkpoint: one given as it is, a hub cache's folder of one, or a name in the local cache.

    Raises:
        CheckpointError: A name is not in the cache, or the cache's folder holds no snapshot.
    """
    path = Path(given)
    if path.is_dir():
        is_cache = (path / "snapshots").is_dir() and not (path / "config.json").exists()
        return _snapshot(path) if is_cache else path
    text = str(given).replace(os.sep, "/")
    if path.exists() or not NAME.fullmatch(text):
        return path
    folder = cache_folder() / f"{PREFIX}{text.replace('/', '--')}"
    if not folder.is_dir():
        raise CheckpointError(
            f"{text} is no folder here, and not in the hub's cache {cache_folder()}; nothing is downloaded: "
            f"get it with `hf download {text}`"
        )
    return _snapshot(folder)


def cache_folder() -> Path:
    """The hub's cache: `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or in the user's cache."""
    if given := os.environ.get("HF_HUB_CACHE"):
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def _snapshot(folder: Path) -> Path:
    """The snapshot that `refs/main` names, or the only one."""
    snapshots = sorted(path for path in (folder / "snapshots").glob("*") if path.is_dir())
    name = folder.name.removeprefix(PREFIX).replace("--", "/")
    again = f"get it with `hf download {name}`"
    try:
        revision = read_text(folder / "refs" / "main", CheckpointError, again, folder=folder, most=LONGEST).strip()
    except FileNotFoundError:
        revision = ""
    if revision and re.fullmatch(r"\w[\w.-]{0,200}", revision) and (found := folder / "snapshots" / revision).is_dir():
        return found
    if revision and snapshots:
        raise CheckpointError(f"{folder}: refs/main names {revision[:60]}, which is not in snapshots/: {again}")
    if len(snapshots) == 1:
        return snapshots[0]
    if snapshots:
        raise CheckpointError(f"{folder} has {len(snapshots)} snapshots and no refs/main: give one of its snapshots/")
    raise CheckpointError(f"{folder} holds no snapshot: {again}")
