"""A checkpoint as a model folder: the canonical graph, its spec and the tokenizer, with the weights left in place.

The checkpoint is only read. Weights move when asked to (`copy_weights`) or when they must change type (`dtype`); then
they are safetensors files of the same names beside the graph. Split over ranks (`tp`, `ep`), of a checkpoint or of a
model folder, it is a group's folder; `split` says which part of the model a rank has.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .. import __version__
from ..errors import CheckpointError, ExportError
from ..files.folders import OF_TOKENIZER, SPEC, carry_files
from ..files.hub_cache import find_checkpoint
from ..files.output import check_apart, check_free, new_folder
from ..files.reading import read_bytes
from ..files.safetensors import Region, identity
from ..files.unheeded import generation_fields, unheeded
from ..spec.folder import FolderSpec, VisionPart
from ..spec.geometry import ModelSpec
from ..spec.types import CODES, FLOATS, DType, Progress
from .checkpoint import Checkpoint, expected_tensors, open_checkpoint
from .decoder_graph import stitch_decoder
from .draft_head import DraftHead, open_head
from .draft_model import write_draft
from .group import WholeModel, notice_copied, split_folder, write_ranks
from .placement import PlacedWeights, place_quantised, place_whole
from .prequantised.inventory import Prequantised
from .prequantised.scheme import MODELOPT
from .quantised_graph import quantise_graph
from .rewriting import say_missing, say_rewritten, scratch_folder, with_stacks
from .shards import read_json
from .split import Split, split_model
from .tower_graph import stitch_tower

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
        model, moved = Path(checkpoint).absolute(), None if weights is None else Path(weights)
        return split_folder(model, target, tp, ep, copy_weights, moved, force=force, progress=progress, notice=notice)
    source = find_checkpoint(checkpoint).absolute()
    small = source if tokenizer is None else _tokenizer_folder(tokenizer)
    check_apart(source, target)
    check_free(target, force=force)
    opened = open_checkpoint(source)
    _check_quantised(opened, dtype, notice)
    split = split_model(opened.spec, tp, ep)
    spec = opened.spec if dtype is None else dataclasses.replace(opened.spec, dtype=dtype)
    head = _open_draft(draft, target, spec, split)
    _say(opened, small, spec.dtype, notice)
    with new_folder(target, force=force) as folder:
        _write(opened, small, head, folder, split, copy_weights, _folder_spec(source, opened, spec), progress, notice)
    return target


def _refuse_exported(checkpoint: str | Path, *asked: str | Path | None) -> None:
    """Refuses what is asked of a model folder that only a checkpoint can be given.

    Raises:
        ExportError: Something is.
    """
    if any(each is not None for each in asked):
        raise ExportError(
            f"{checkpoint} is exported already: export its checkpoint with --dtype, --tokenizer or --draft instead"
        )


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


def _write(
    checkpoint: Checkpoint,
    small: Path,
    head: DraftHead | None,
    folder: Path,
    split: Split,
    copy_weights: bool,
    record: FolderSpec,
    progress: Progress,
    notice: Callable[[str], None],
) -> None:
    """Writes the model folder, or the group's."""
    if split.ranks == 1:
        states = () if head is None else head.spec.states
        placement, model = _make_whole(checkpoint, folder, record.model, copy_weights, progress, states)
        if head is not None:
            embedding = f"{checkpoint.prefix}model.embed_tokens.weight"
            part = write_draft(head, record.model, embedding, placement, folder, copy_weights)
            record = dataclasses.replace(record, draft=part)
        _write_model((checkpoint.folder, small), folder, model, placement, record)
        return
    notice_copied(_write_group(checkpoint, small, folder, split, copy_weights, record, progress), notice)


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


def _make_whole(
    checkpoint: Checkpoint,
    folder: Path,
    spec: ModelSpec,
    copy_weights: bool,
    progress: Progress,
    states: Sequence[int] = (),
) -> tuple[PlacedWeights, ir.Model]:
    """Places the weights and builds the graph of a model that is not split."""
    given: dict[str, Any] = {"vision": checkpoint.vision, "states": states}
    quantised = checkpoint.quantised
    if quantised is None:
        placement = place_whole(checkpoint, folder, spec.dtype, copy_weights, progress)
        place_of = placement.regions.__getitem__
        return placement, stitch_decoder(spec, checkpoint.prefix, place_of, progress, **given)
    placement = place_quantised(checkpoint, quantised, folder, copy_weights, progress)
    shapes = expected_tensors(spec, checkpoint.prefix)

    def place_later(name: str) -> tuple[str, Region]:
        return "", Region(CODES[spec.dtype], shapes[name], 0, 0)  # until quantise_graph gives it its place

    model = stitch_decoder(spec, checkpoint.prefix, place_later, progress, **given)
    quantise_graph(model, spec, quantised.recipe, placement.regions, folder)
    return placement, model


def _write_group(
    checkpoint: Checkpoint,
    small: Path,
    folder: Path,
    split: Split,
    copy_weights: bool,
    record: FolderSpec,
    progress: Progress,
) -> int:
    """Builds the whole graphs, writes the ranks' folders, and what goes with them. Returns the bytes of weights."""
    with scratch_folder(folder) as scratch:
        with_files = _make_whole if checkpoint.quantised is not None else _make_whole_in_place
        placement, model = with_files(checkpoint, scratch, record.model, False, progress)
        tower = None
        if record.vision is not None:
            text = record.model
            tower = stitch_tower(record.vision.spec, text.hidden_size, text.dtype, placement.regions.__getitem__)
        files = {file.name: (Path(file.path or scratch / file.name), bool(file.path)) for file in placement.files}
        whole = WholeModel(decoder=model, tower=tower, files=files, record=record)
        copied = write_ranks(whole, folder, split, copy_weights, progress)
    _carry(checkpoint.folder, small, folder)
    _write_generation_config(checkpoint.folder, folder)
    return copied


def _make_whole_in_place(
    checkpoint: Checkpoint, folder: Path, spec: ModelSpec, copy_weights: bool, progress: Progress
) -> tuple[PlacedWeights, ir.Model]:
    """Builds the graph over weights as they are stored: what is converted is so when the ranks' parts are written."""
    stacked = with_stacks(checkpoint, folder, spec.dtype, progress)
    placement = PlacedWeights()
    for shard in stacked.shards:
        if regions := stacked.regions(shard):
            placement.add(shard, regions, identity(shard.path), inside=shard.path.parent == folder)
    place_of = placement.regions.__getitem__
    return placement, stitch_decoder(spec, checkpoint.prefix, place_of, progress, vision=checkpoint.vision)


def _write_model(
    sources: tuple[Path, Path], folder: Path, model: ir.Model, placement: PlacedWeights, record: FolderSpec
) -> None:
    """Writes the decoder's graph, the vision tower's, and all that goes with them.

    Args:
        sources: The checkpoint, and the folder of its tokenizer.
        folder: Where to.
        model: The decoder's graph.
        placement: The weights' places.
        record: The folder's spec, but for the weight files.
    """
    source, small = sources
    ir.save(model, folder / GRAPH)
    if record.vision is not None:
        text = record.model
        tower = stitch_tower(record.vision.spec, text.hidden_size, text.dtype, placement.regions.__getitem__)
        ir.save(tower, folder / record.vision.graph)
    _carry(source, small, folder)
    _write_generation_config(source, folder)
    record = dataclasses.replace(record, weight_files=tuple(placement.files))
    (folder / SPEC).write_text(record.to_json(), "utf-8")


def _carry(source: Path, small: Path, folder: Path) -> None:
    """Copies the small files, those of the tokenizer from a folder of their own where there is one."""
    carry_files(source, folder)
    if small != source:
        carry_files(small, folder, OF_TOKENIZER)


def _write_generation_config(source: Path, folder: Path) -> None:
    """Where a checkpoint has no generation config, its `config.json` says what `transformers` takes from there."""
    if not (folder / "generation_config.json").exists():
        fields = generation_fields(read_json(source / "config.json"))
        (folder / "generation_config.json").write_text(json.dumps(fields, indent=1) + "\n", "utf-8")


def _hashes(source: Path) -> dict[str, str]:
    """SHA-256 of the checkpoint's small files that decide what is exported."""
    names = ("config.json", MODELOPT, "tokenizer.json", "model.safetensors.index.json")
    contents = {
        name: read_bytes(source / name, CheckpointError, "restore the file", folder=source)
        for name in names
        if (source / name).exists()
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
