"""The two that are compared: a checkpoint in PyTorch, or a model or bundle as it runs.

Enters: a path. Leaves: a `Side`. What a side needs is imported when one is opened: PyTorch for a checkpoint alone.
"""

import hashlib
import json
import os
from pathlib import Path

from ...errors import AccuracyError, shortened
from ...files.folders import SPEC
from ...files.hub_cache import find_checkpoint
from ...files.reading import read_json
from .side import Side


def open_side(
    path: str | Path,
    weights: str | Path | None = None,
    threads: int | None = None,
    *,
    device: str = "cpu",
    option: str = "--weights",
) -> Side:
    """Opens one side; its weights are read when it is run.

    Args:
        path: A checkpoint, a model, or a bundle.
        weights: Folder of its weight files, where they have moved.
        threads: Threads of one operator on the CPU.
        device: Where PyTorch computes a checkpoint, see `walk.accelerator`.
        option: The command line's name for the folder of the weight files.

    Raises:
        AccuracyError: It is none of these.
        ArrieroError: It is damaged.
    """
    path = find_checkpoint(path)
    if is_checkpoint(path):
        from ...walk.accelerator import find_device
        from .checkpoint_side import CheckpointSide

        return CheckpointSide(path, find_device(device))
    if path.is_file():
        raise AccuracyError(f"{path} is a file: give a checkpoint, a model, a bundle, or as --against a golden file")
    from .folder_side import FolderSide

    return FolderSide(path, None if weights is None else Path(weights), threads, option)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, which PyTorch computes."""
    return (path / "config.json").is_file() and not (path / SPEC).exists()


def check_device(device: str, *paths: str | Path) -> None:
    """Refuses a device where none of the sides would be computed on it.

    Raises:
        AccuracyError: None is a checkpoint.
    """
    if device not in ("cpu", "auto") and not any(is_checkpoint(find_checkpoint(path)) for path in paths):
        names = " and ".join(map(str, paths))
        verb = "are no checkpoints" if len(paths) > 1 else "is no checkpoint"
        raise AccuracyError(f"{names} {verb}, which alone --device {shortened(device)} is for: leave it out")


def has_tokenizer(path: Path) -> bool:
    """Whether a folder can read text itself: trainers may save a checkpoint without its tokenizer."""
    return os.path.lexists(path / "tokenizer.json")


def tokenizer_of(path: Path) -> str:
    """A fingerprint of what a folder's tokenizer does, whatever the file's layout.

    Raises:
        AccuracyError: There is none, or it is damaged.
    """
    remedy = "copy the checkpoint's into it"
    try:
        content = read_json(path / "tokenizer.json", AccuracyError, remedy, folder=path)
    except FileNotFoundError as error:
        raise AccuracyError(f"{path} has no tokenizer.json that can be read ({error.strerror}): {remedy}") from error
    fields = {name: content.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
