"""Engines and kernels that this user trusts: code, which runs with all that the user may do.

Enters: the record of a bundle's engines. Leaves: nothing, or a refusal. A bundle that was built here is trusted, and
one that the user has said so of; both are remembered by a hash over the engines' and kernels' hashes and everything
that says how they are run, in a folder of the user's own.
"""

import dataclasses
import hashlib
import json
import os
import sys
import warnings
from pathlib import Path

from ..errors import ArrieroWarning, SessionError
from ..spec.folder import FolderSpec


def check_trusted(folder: Path, spec: FolderSpec, *, trust: bool = False) -> None:
    """Refuses a bundle's engine that this user neither built nor trusts.

    Args:
        folder: The bundle.
        spec: Its spec.
        trust: Whether the user trusts it, from now on.

    Raises:
        SessionError: It is not trusted.
    """
    if spec.engine is None:
        return
    if trust:
        remember(folder, spec)
    elif not _record(spec).exists():
        raise SessionError(
            f"{folder} holds an engine, which is code, and this user did not build it here: build it from its model, "
            "or if you trust who made it run it once with --trust (in Python, load it with trust=True)"
        )


def remember(folder: Path, *specs: FolderSpec) -> None:
    """Remembers that bundles' engines are trusted; where the folder for it cannot be written, that is said.

    Warns:
        ArrieroWarning: It could not be written down.
    """
    for spec in specs:
        if spec.engine is None:
            continue
        record = _record(spec)
        try:
            record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            record.write_text(f"{folder.absolute()}\n", "utf-8", errors="replace")
        except OSError as error:
            said = error.strerror or error
            warnings.warn(f"{record}: not remembered as trusted ({said})", ArrieroWarning, stacklevel=3)


def _record(spec: FolderSpec) -> Path:
    """The file that stands for an engine's being trusted."""
    assert spec.engine is not None
    about = [dataclasses.asdict(spec.engine), None]
    if spec.vision is not None and spec.vision.engine is not None:
        about[1] = dataclasses.asdict(spec.vision.engine)
    return state_folder() / "trusted" / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def state_folder() -> Path:
    """The folder of what Arriero keeps for this user: of `XDG_STATE_HOME`, or where the system has such things."""
    if given := os.environ.get("XDG_STATE_HOME"):
        return Path(given) / "arriero"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "arriero"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "arriero"
    return Path.home() / ".local" / "state" / "arriero"
