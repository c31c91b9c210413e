"""A checkpoint as a model folder: the canonical graph, its spec and the tokenizer, with the weights left in place.

The checkpoint is only read. Weights move when asked to (`copy_weights`) or when they must change type (`dtype`); then
they are safetensors files of the same names beside the graph. Split over ranks (`tp`, `ep`), of a checkpoint or of a
model folder, it is a group's folder; `split` says which part of the model a rank has. What cannot be exported is
refused before PyTorch and ONNX are imported, which takes seconds.
"""

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from .. import __version__
from ..errors import CheckpointError, ExportError, needing
from ..files.folders import SPEC
from ..files.hub_cache import find_checkpoint
from ..files.output import check_apart, check_free, new_folder
from ..files.reading import read_bytes
from ..files.unheeded import unheeded
from ..spec.folder import FolderSpec, VisionPart
from ..spec.geometry import ModelSpec
from ..spec.types import FLOATS, DType, Progress
from .checkpoint import Checkpoint, open_checkpoint
from .draft_head import DraftHead, open_head
from .prequantised.inventory import Prequantised
from .prequantised.scheme import MODELOPT
from .rewriting import say_missing, say_rewritten
from .split import Split, split_model

GRAPH = "decoder.onnx"


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: DType | None = None,
    copy_weights: bool = False,
    tp: int = 1,
    ep: int | None = None,
    weights: str | Path | None = None,
    tokenizer: str | Path | None = None,
    draft: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda phase, done, total: None,
    notice: Callable[[str], None] = lambda line: None,
) -> Path:
    """Exports a Llama 4 checkpoint: the text decoder, and the vision tower where there is one.

    Args:
        checkpoint: Folder in Hugging Face layout, a hub cache's folder of one, or its name where it is in the local
            cache; or a model folder that is to be split. Only read.
        out: The model folder to write.
        dtype: Type of the graph and its weights; None keeps the checkpoint's. Another type writes converted weights.
        copy_weights: Whether the weights are copied into the folder, so that it stands alone.
        tp: Ranks over which the model is split; 1 leaves all but the experts whole.
        ep: Groups of ranks over which the experts are distributed; None is `tp`, which leaves them in place.
        weights: Folder of a model folder's weight files, where they have moved.
        tokenizer: Folder that tokenizer, chat template and preprocessor are taken from; None is the checkpoint.
        draft: Folder of an EAGLE-3 head, which drafts tokens for the model to verify; None is without one.
        force: Whether an existing model folder at `out` is replaced.
        progress: Called with the phase, the steps done and the steps in all.
        notice: Called with each line that a person should know.

    Returns:
        The model folder, or the group's.

    Raises:
        CheckpointError: The checkpoint is damaged or no Llama 4.
        ExportError: `dtype` is unknown or too narrow for a weight, `tp` or `ep` does not divide what it must, or a
            file changed meanwhile.
        FolderError: `out` exists, or cannot be written.
    """
    _check_dtype(dtype)
    target = Path(out).absolute()
    if (Path(checkpoint) / SPEC).exists():
        _refuse_exported(checkpoint, dtype, tokenizer, draft)
        return _split(checkpoint, target, tp, ep, copy_weights, weights, force=force, progress=progress, notice=notice)
    source = _checkpoint_folder(checkpoint, weights)
    small = source if tokenizer is None else _tokenizer_folder(tokenizer)
    check_apart(source, target)
    check_free(target, force=force)
    opened, spec = _open(source, dtype, notice)
    split = split_model(spec, tp, ep)
    head = _open_draft(draft, target, spec, split)
    _say(opened, small, spec.dtype, notice)
    with needing("export"):
        from .writing import write_checkpoint
    record = _folder_spec(source, opened, spec)
    with new_folder(target, force=force) as folder:
        write_checkpoint(opened, small, head, folder, split, copy_weights, record, progress, notice)
    return target


def _open(source: Path, dtype: DType | None, notice: Callable[[str], None]) -> tuple[Checkpoint, ModelSpec]:
    """Opens a checkpoint that can be exported in a type. Returns it, and the geometry in that type."""
    opened = open_checkpoint(source)
    _check_quantised(opened, dtype, notice)
    return opened, opened.spec if dtype is None else dataclasses.replace(opened.spec, dtype=dtype)


def _checkpoint_folder(given: str | Path, weights: str | Path | None) -> Path:
    """The folder of a checkpoint, which has no weights elsewhere.

    Raises:
        ExportError: A folder of moved weights is given.
    """
    folder = find_checkpoint(given).absolute()
    if weights is not None and folder.is_dir():
        raise ExportError(
            f"--weights is for a model folder that is split, and {folder} is none: a checkpoint's weights lie in its "
            "own folder, leave --weights out"
        )
    return folder


def _refuse_exported(checkpoint: str | Path, *asked: str | Path | None) -> None:
    """Refuses what is asked of a model folder that only a checkpoint can be given.

    Raises:
        ExportError: Something is.
    """
    if any(each is not None for each in asked):
        raise ExportError(
            f"{checkpoint} is exported already: export its checkpoint with --dtype, --tokenizer or --draft instead"
        )


def _split(
    model: str | Path,
    target: Path,
    tp: int,
    ep: int | None,
    copy_weights: bool,
    weights: str | Path | None,
    *,
    force: bool,
    progress: Progress,
    notice: Callable[[str], None],
) -> Path:
    """Splits a model folder. Returns the group's."""
    with needing("export"):
        from .group import split_folder
    source, moved = Path(model).absolute(), None if weights is None else Path(weights)
    return split_folder(source, target, tp, ep, copy_weights, moved, force=force, progress=progress, notice=notice)


def _open_draft(draft: str | Path | None, target: Path, spec: ModelSpec, split: Split) -> DraftHead | None:
    """Opens the head that drafts for the model, where one is given.

    Raises:
        ExportError: The model is split over ranks.
    """
    if draft is None:
        return None
    if split.ranks > 1:
        raise ExportError("a model that is split over ranks takes no draft: leave --draft out, or --tp and --ep")
    folder = find_checkpoint(draft).absolute()
    check_apart(folder, target)
    return open_head(folder, spec)


def _say(checkpoint: Checkpoint, small: Path, dtype: DType, notice: Callable[[str], None]) -> None:
    """Says what is not heeded, what is written anew, and what is missing."""
    for line in unheeded(checkpoint.folder):
        notice(line)
    say_rewritten(checkpoint, dtype, notice)
    say_missing(small, checkpoint.vision is not None, notice)


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in FLOATS:
        raise ExportError(f"dtype is {dtype!r}, expected one of {', '.join(FLOATS)}")


def _tokenizer_folder(given: str | Path) -> Path:
    """The folder that a tokenizer is taken from.

    Raises:
        ExportError: It holds none.
    """
    folder = find_checkpoint(given).absolute()
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(f"{folder} has no tokenizer.json: give with --tokenizer a folder that has one")
    return folder


def _folder_spec(source: Path, checkpoint: Checkpoint, spec: ModelSpec) -> FolderSpec:
    """The folder's spec, but for its weight files."""
    return FolderSpec(
        kind="model",
        version=__version__,
        model=spec,
        graph=GRAPH,
        source=str(source),
        source_hashes=_hashes(source),
        recipe=None if checkpoint.quantised is None else checkpoint.quantised.recipe,
        tools={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")},
        vision=None if checkpoint.vision is None else VisionPart(spec=checkpoint.vision),
    )


def _check_quantised(checkpoint: Checkpoint, dtype: DType | None, notice: Callable[[str], None]) -> None:
    """Says how a checkpoint is quantised already, if it is, and refuses what is not done with one.

    Raises:
        ExportError: It would have to be converted.
    """
    if checkpoint.quantised is None:
        return
    if dtype not in (None, checkpoint.spec.dtype):
        own = checkpoint.spec.dtype
        raise ExportError(f"dtype is {dtype}, a quantised checkpoint is not converted: leave it at {own}")
    _notice_quantised(checkpoint.quantised, notice)


def _notice_quantised(quantised: Prequantised, notice: Callable[[str], None]) -> None:
    scheme, recipe = quantised.scheme, quantised.recipe
    notice(f"The checkpoint is quantised ({scheme.method}, {recipe.format}): its own scales are kept.")
    if scheme.kv_cache != recipe.kv_cache:
        notice(f"It asks for {scheme.kv_cache} caches but holds no scales of keys and values: they are not quantised.")


def _hashes(source: Path) -> dict[str, str]:
    """SHA-256 of the checkpoint's small files that decide what is exported."""
    names = ("config.json", MODELOPT, "tokenizer.json", "model.safetensors.index.json")
    contents = {
        name: read_bytes(source / name, CheckpointError, "restore the file", folder=source)
        for name in names
        if (source / name).exists()
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
