"""The writing of an export: the graphs, the weights in their places, and the small files, in one folder.

Enters: an opened checkpoint that is refused no more. Leaves: a model folder's files, or a group's. Here PyTorch and
ONNX are imported; `model` does without them until there is something to write.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..files.folders import OF_TOKENIZER, SPEC, carry_files
from ..files.safetensors import Region, identity
from ..files.unheeded import generation_fields
from ..spec.folder import FolderSpec
from ..spec.geometry import ModelSpec
from ..spec.types import CODES, Progress
from .checkpoint import Checkpoint, expected_tensors
from .decoder_graph import stitch_decoder
from .draft_head import DraftHead
from .draft_model import write_draft
from .group import WholeModel, notice_copied, write_ranks
from .placement import PlacedWeights, place_quantised, place_whole
from .quantised_graph import quantise_graph
from .rewriting import scratch_folder, with_stacks
from .shards import read_json
from .split import Split
from .tower_graph import stitch_tower


def write_checkpoint(
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
    """Writes the model folder, or the group's.

    Args:
        checkpoint: The checkpoint.
        small: The folder of its tokenizer, chat template and preprocessor.
        head: The head that drafts for the model; None where there is none.
        folder: An empty folder.
        split: The ranks' parts of the model.
        copy_weights: Whether the weights are copied into the folder.
        record: The folder's spec, but for its weight files, draft and ranks.
        progress: Called with the phase, the steps done and the steps in all.
        notice: Called with each line that a person should know.

    Raises:
        ExportError: A weight does not fit its type, or a file changed meanwhile.
    """
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
    ir.save(model, folder / record.graph)
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
