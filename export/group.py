"""A group folder: a model split over ranks, a folder a rank, and the spec of them all.

Enters: the whole model's graphs, of a checkpoint as it is exported or of a model folder, and the files of its weights.
Leaves: `rank-0` and so on, each a model folder with a spec of its own but for the tokenizer, which the group has once.
Rank 0 has the vision tower, whole: its features go to all ranks with the tokens.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from .. import __version__
from ..errors import ExportError, FolderError
from ..files.folders import SPEC, carry_files, find_files, rank_fingerprint, read_spec
from ..files.output import check_apart, check_free, new_folder
from ..files.safetensors import Region, identity
from ..plugins.canonical_graph import read_graph
from ..spec.folder import FolderSpec, VisionPart
from ..spec.types import Progress
from .placement import PlacedWeights
from .quantised_graph import PLACED
from .rank_graph import external, narrow_graph, point_into
from .rank_weights import EMBEDDING, HEAD, Source, place_ranks
from .split import Split, split_model

CODES_BY_TYPE = {dtype: code for code, dtype in PLACED.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeModel:
    """A model that is to be split.

    Attributes:
        decoder: The decoder's canonical graph.
        tower: The vision tower's; None where there is none.
        files: The weight files by the graphs' names of them, and whether each outlives the export.
        record: The spec of the group to be, but for its ranks.
    """

    decoder: ir.Model
    tower: ir.Model | None
    files: Mapping[str, tuple[Path, bool]]
    record: FolderSpec


def split_folder(
    source: Path,
    target: Path,
    tp: int,
    ep: int | None,
    copy_weights: bool,
    weights: Path | None,
    *,
    force: bool,
    progress: Progress,
    notice: Callable[[str], None],
) -> Path:
    """Splits a model folder; the arguments are those of `export_checkpoint`.

    Raises:
        ExportError: The split does not fit the model.
        FolderError: It is no model folder, or a file is missing or another.
    """
    spec = read_spec(source)
    if spec.kind != "model" or spec.ranks > 1:
        what = f"rank {spec.rank} of {spec.ranks}" if spec.ranks > 1 and spec.kind == "model" else f"a {spec.kind}"
        raise FolderError(f"{source} is {what}: give a model folder that is whole, or the checkpoint")
    split = split_model(spec.model, tp, ep)
    if spec.draft is not None:
        raise ExportError(f"{source} has a draft, which ranks do not run: export its checkpoint without --draft")
    if split.ranks == 1:
        raise ExportError(f"{source} is exported already: give --tp or --ep to split it, or a checkpoint to export")
    check_apart(source, target)
    check_free(target, force=force)
    files = find_files(source, spec.weight_files, weights)
    tower = None if spec.vision is None else read_graph(source / spec.vision.graph)
    whole = WholeModel(
        decoder=read_graph(source / spec.graph),
        tower=tower,
        files={name: (path.absolute(), True) for name, path in files.items()},
        record=dataclasses.replace(spec, version=__version__, source=str(source)),
    )
    with new_folder(target, force=force) as folder:
        copied = write_ranks(whole, folder, split, copy_weights, progress)
        carry_files(source, folder)
    notice_copied(copied, notice)
    return target


def notice_copied(copied: int, notice: Callable[[str], None]) -> None:
    """Says how much of the weights was written."""
    notice(f"{copied / 1e9:.1f} GB of weights are in the ranks' folders; the rest stays where it is.")


def write_ranks(whole: WholeModel, folder: Path, split: Split, copy_weights: bool, progress: Progress) -> int:
    """Writes a folder a rank and the group's spec. Returns the bytes of weights in the ranks' folders."""
    record = dataclasses.replace(
        whole.record,
        ranks=split.ranks,
        expert_groups=split.expert_groups,
        experts_only=split.experts_only,
        weight_files=(),
    )
    folders = [folder / f"rank-{rank}" for rank in range(split.ranks)]
    for each in folders:
        each.mkdir()
    sources = _sources(whole, unties_head=record.model.tied_embeddings and not split.experts_only)
    of_decoder = {name for name, _ in external(whole.decoder)}
    of_tower = set() if whole.tower is None else {name for name, _ in external(whole.tower)} - of_decoder

    def taken(name: str, rank: int) -> bool:
        return rank == 0 or name not in of_tower

    placements = place_ranks(sources, folders, split, taken, record.model.dtype, copy_weights, progress)
    decoder = ir.to_proto(whole.decoder)
    copied, fingerprints = 0, []
    for rank, (each, placement) in enumerate(zip(folders, placements, strict=True)):
        progress("ranks", rank, split.ranks)
        model = ir.from_proto(decoder)
        narrow_graph(model, record.model, split, rank, placement.regions.__getitem__)
        ir.save(model, each / record.graph)
        vision = record.vision
        if vision is not None and whole.tower is not None:
            vision = VisionPart(spec=vision.spec, graph=vision.graph if rank == 0 else "")
            if rank == 0:
                _place_tower(whole.tower, placement)
                ir.save(whole.tower, each / vision.graph)
        own = dataclasses.replace(record, rank=rank, vision=vision, weight_files=tuple(placement.files))
        (each / SPEC).write_text(own.to_json(), "utf-8")
        copied += sum(file.size for file in placement.files if not file.path)
        fingerprints.append(rank_fingerprint(each))
    group = dataclasses.replace(record, kind="group", graph="", rank_hashes=tuple(fingerprints))
    (folder / SPEC).write_text(group.to_json(), "utf-8")
    return copied


def _place_tower(tower: ir.Model, placement: PlacedWeights) -> None:
    """Points the vision tower's graph at the weights of rank 0."""
    for name, value in tower.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            point_into(value, *placement.regions[name])


def _sources(whole: WholeModel, *, unties_head: bool) -> list[Source]:
    """The weight files, with the tensors that the graphs read in them."""
    found: dict[str, Source] = {}
    graphs = [whole.decoder] if whole.tower is None else [whole.decoder, whole.tower]
    for graph in graphs:
        for name, tensor in external(graph):
            file = str(tensor.location)
            if file not in whole.files:
                raise FolderError(f"the graph reads {file!r}, which spec.json does not list: export the model again")
            if file not in found:
                path, stays = whole.files[file]
                found[file] = Source(path=path, stays=stays, fingerprint=identity(path))
            region = _region(name, tensor)
            found[file].tensors[name] = region
            if tensor.dtype == ir.DataType.INT4:
                found[file].is_int4.add(name)
            if unties_head and name.endswith(EMBEDDING):
                found[file].tensors[name.removesuffix(EMBEDDING) + HEAD] = region
    return list(found.values())


def _region(name: str, tensor: ir.ExternalTensor) -> Region:
    """Where a tensor of a graph lies, as safetensors would say it."""
    if tensor.dtype not in CODES_BY_TYPE or tensor.offset is None or tensor.length is None:
        raise ExportError(f"{name!r} is {tensor.dtype}, which no model folder holds: export the model again")
    shape = tensor.shape.numpy()
    if tensor.dtype == ir.DataType.INT4:
        shape = (*shape[:-1], shape[-1] // 2)
    return Region(CODES_BY_TYPE[tensor.dtype], shape, tensor.offset, tensor.length)
